"""Activations of any layout -> maps (batch, channels, height, width): the reshape transforms of grad-cam."""

from collections.abc import Callable

import torch

ADVICE = "find_target_layers(model, pixel_values) lists the layers that work, with their reshape transforms"


def tokens_to_map(
    tokens: torch.Tensor, grid: tuple[int, int], prefix: int = 1, batch_first: bool = True
) -> torch.Tensor:
    """Lays the patch tokens of a transformer out as the grid they were cut from.

    As a reshape transform: `functools.partial(tokens_to_map, grid=(14, 14))`.

    Args:
        tokens: tensor (batch, prefix + rows * columns, channels), the patches row by row.
        grid: (rows, columns) of patches, that is image height and width divided by the patch size.
        prefix: how many tokens stand before the patches: 1 for a CLS token, 0 for none, 5 for CLS and 4 registers.
        batch_first: False for a tensor (prefix + rows * columns, batch, channels), as in OpenAI's CLIP.

    Returns:
        A contiguous tensor (batch, channels, rows, columns).

    Raises:
        ValueError: the tensor has another number of dimensions or tokens.

    Example:
        >>> tokens_to_map(torch.tensor([[[9], [1], [2], [3], [4]]]), grid=(2, 2))  # 9 is the CLS token
        tensor([[[[1, 2],
                  [3, 4]]]])
    """
    rows, columns = grid
    wanted = prefix + rows * columns
    if tokens.ndim != 3 or tokens.shape[1 if batch_first else 0] != wanted:
        shape = f"(batch, {wanted}, channels)" if batch_first else f"({wanted}, batch, channels)"
        raise ValueError(
            f"tokens_to_map got shape {tuple(tokens.shape)}, wanted {shape}: "
            f"{prefix} prefix tokens and a grid of {rows} x {columns} patches"
        )
    tokens = tokens if batch_first else tokens.transpose(0, 1)
    patches = tokens[:, prefix:].transpose(1, 2)
    return patches.reshape(*patches.shape[:2], rows, columns).contiguous()


def channels_last_to_map(x: torch.Tensor) -> torch.Tensor:
    """Moves the channels of (batch, height, width, channels), as Swin has them, to the front.

    As a reshape transform it needs no arguments.

    Returns:
        A contiguous tensor (batch, channels, height, width).

    Raises:
        ValueError: the tensor has not four dimensions.

    Example:
        >>> channels_last_to_map(torch.zeros(1, 7, 7, 768)).shape
        torch.Size([1, 768, 7, 7])
    """
    if x.ndim != 4:
        raise ValueError(
            f"channels_last_to_map got shape {tuple(x.shape)}, wanted (batch, height, width, channels): "
            "tokens go through tokens_to_map"
        )
    return x.permute(0, 3, 1, 2).contiguous()


def layer_to_map(
    output: torch.Tensor, reshape_transform: Callable[[torch.Tensor], torch.Tensor] | None, path: str
) -> torch.Tensor:
    """A target layer's output as maps, or an error that says why it cannot be one.

    Args:
        output: what the layer returned.
        reshape_transform: callable to (batch, channels, height, width), or None if the layer returns that already.
        path: the layer's name, for the error.

    Returns:
        A tensor (batch, channels, height, width) with more than one position.

    Raises:
        ValueError: the output is no tensor, has no positions, or the reshape transform does not fit or returns none.
    """
    if not isinstance(output, torch.Tensor):
        raise ValueError(f"target layer {path} returns a {type(output).__name__}, not a tensor; {ADVICE}")
    maps = output
    if reshape_transform is not None:
        try:
            maps = reshape_transform(output)
        except Exception as error:
            raise ValueError(
                f"the reshape transform does not fit target layer {path}, which returns shape {tuple(output.shape)}: "
                f"{error}; {ADVICE}"
            ) from error
        if not isinstance(maps, torch.Tensor):
            raise ValueError(
                f"the reshape transform for target layer {path} returned a {type(maps).__name__}, not a tensor; "
                f"{ADVICE}"
            )
    if maps.ndim != 4 or maps.shape[2] * maps.shape[3] < 2:
        after = "" if reshape_transform is None else f" and, reshaped, {tuple(maps.shape)}"
        raise ValueError(
            f"target layer {path} returns shape {tuple(output.shape)}{after}, wanted (batch, channels, height, width) "
            f"with more than one position; {ADVICE}"
        )
    return maps


def check_rows(maps: torch.Tensor, n: int, path: str) -> None:
    """Raises a ValueError unless a target layer's maps are a row for each of n pictures."""
    if len(maps) != n:
        raise ValueError(
            f"target layer {path} puts out {len(maps)} rows for {n} picture{'s' if n > 1 else ''}: they are not "
            "pictures, but parts or copies of one, such as windows, tiles or flips, each with places of its own. Take "
            f"a layer where they are together, or explain without a layer; {ADVICE}"
        )


def check_layout(maps: torch.Tensor, size: tuple[int, ...], path: str) -> None:
    """Raises a ValueError if a target layer's maps have the picture's proportions with the channels last alone.

    Args:
        maps: what is taken for (batch, channels, height, width).
        size: height and width of the picture.
        path: the layer's name, for the error.
    """

    def is_like_it(grid):
        return abs(grid[0] * size[1] - grid[1] * size[0]) <= max(size)

    if is_like_it(maps.shape[1:3]) and not is_like_it(maps.shape[2:]):
        raise ValueError(
            f"target layer {path} returns shape {tuple(maps.shape)}, which looks like (batch, height, width, "
            f"channels): give reshape_transform=channels_last_to_map, of xai_helpers.reshape; {ADVICE}"
        )


def check_finite(maps: torch.Tensor, path: str) -> None:
    """Raises a ValueError unless a target layer's maps are finite."""
    if not maps.isfinite().all():
        raise ValueError(f"target layer {path} puts out NaN or infinite values: look for broken weights or an overflow")


def runs_often(path: str) -> str:
    """What is said of a target layer that has no output of its own."""
    return (
        f"target layer {path} runs more than once in a pass, as one that several places share does, so that it has "
        f"no output of its own: take one that runs once, such as the module around it, or explain without a layer; "
        f"{ADVICE}"
    )


def batch_axis(output: torch.Tensor, reshape_transform: Callable[[torch.Tensor], torch.Tensor] | None) -> int:
    """The axis of a layer's output along which the pictures lie: 0, or 1 for tokens (tokens, batch, channels).

    Args:
        output: what the layer returned.
        reshape_transform: one that fits it; it is asked what it makes of the output twice.
    """
    if reshape_transform is None or output.ndim != 3:
        return 0
    try:
        return int(len(reshape_transform(output.repeat(1, 2, 1))) == 2 * output.shape[1])
    except Exception:  # those that do not fit raise what they like
        return 0
