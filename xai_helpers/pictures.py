"""Any picture -> RGB, and the part of it that a processor shows to the model."""

import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps

from xai_helpers.scoring import without_device

RAMP_START, RAMP_SPAN = 10, 235  # of the colours by which `seen_box` marks coordinates
ORIENTATION = 274  # the number of EXIF's tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SEEN = "the part that a model saw"  # the mark of a picture that `scenes.as_seen` has cut out

Box = tuple[float, float, float, float]


def read_picture(source: str | Path | Image.Image) -> Image.Image:
    """Open a picture of any mode as RGB, upright.

    Args:
        source: a path, or a PIL image of any mode. Transparent pixels are put on white, 16-bit and floating-point
            pictures are stretched from their lowest to their highest value, and an EXIF rotation is carried out.

    Returns:
        A PIL image of mode RGB.

    Raises:
        ValueError: `source` is neither, it cannot be read as a picture, it has no pixels or more than PIL takes for a
            safe number, or it has values that are not finite.

    Example:
        >>> read_picture(Image.new("RGBA", (3, 2))).getpixel((0, 0))  # transparent
        (255, 255, 255)
    """
    if isinstance(source, (str, Path)):
        try:
            opened = Image.open(source)
            opened.load()
        except Image.DecompressionBombError as error:
            raise ValueError(f"{source} is too large to be read as a picture: {error}. Make it smaller.") from error
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(
                f"{source} cannot be read as a picture: {error}. Save it as PNG or JPEG and try again."
            ) from error
        source = opened
    if not isinstance(source, Image.Image):
        raise ValueError(
            f"A picture is a path or a PIL image, not {type(source).__name__}. Make one with PIL.Image.fromarray."
        )
    if not all(source.size):
        raise ValueError(f"The picture has no pixels: it is {source.width} x {source.height}.")
    image = ImageOps.exif_transpose(source)
    if image.mode == "La":  # premultiplied, which PIL turns back into LA only
        image = image.convert("LA")
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("The picture has values that are not finite. Replace them, with numpy.nan_to_num say.")
        spread = values.max() - values.min()
        image = Image.fromarray(((values - values.min()) / (spread or 1) * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def seen_box(processor: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of a picture that a processor shows to the model, in pixels of the picture.

    The processor itself is asked: it is given a picture whose colours are its coordinates, and a line through what
    comes out says where the edges lie. So every way to resize, squash or crop is covered.

    Args:
        processor: an image processor of transformers, or a processor that has one.
        size: width and height of the picture.

    Returns:
        left, top, right, bottom as floats. They lie outside the picture where the processor pads it.
    """
    processor = getattr(processor, "image_processor", processor)
    width, height = size
    ramp = np.full((height, width, 3), 255.0)  # the third channel tells picture from padding, which is 0
    ramp[..., 0] = RAMP_START + RAMP_SPAN * (np.arange(width) + 0.5) / width
    ramp[..., 1] = RAMP_START + RAMP_SPAN * (np.arange(height)[:, None] + 0.5) / height
    # Noise under the ramp, so that rounding to 8 bits averages out instead of adding up. It has a mean of zero along
    # the axis that is averaged over.
    noise = np.random.default_rng(0).uniform(-RAMP_START / 2, RAMP_START / 2, (height, width, 2))
    ramp[..., 0] += noise[..., 0] - noise[::-1, :, 0]
    ramp[..., 1] += noise[..., 1] - noise[:, ::-1, 1]
    out = _not_normalised(processor, Image.fromarray(ramp.round().astype(np.uint8)))
    inside = out[2] > 254
    edges = []
    for channel, length, axis in ((0, width, 0), (1, height, 1)):
        valid = np.flatnonzero(inside.any(axis=axis))
        values = np.where(inside, out[channel], np.nan)
        means = np.nanmean(values[:, valid] if channel == 0 else values[valid], axis=axis)
        slope, offset = np.polyfit(valid + 0.5, (means - RAMP_START) / RAMP_SPAN * length, 1)
        edges.append((float(offset), float(offset + slope * out.shape[2 - channel])))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def to_original(maps: Any, processor: Any, size: tuple[int, int]) -> np.ndarray:
    """Maps back on the photo that a processor made the model's input from, whatever it resized, squashed or cropped.

    Args:
        maps: (n, height, width), of the part of the photo that the model saw; an array, or a tensor on any device.
        processor: an image processor of transformers, or a processor that has one; or the box that the model saw: left,
            top, right and bottom in pixels of the photo, as `seen_box` gives it.
        size: width and height of the photo, as the processor got it.

    Returns:
        A float32 array (n, height, width) at the photo's size, zero where the model did not look.

    Example:
        >>> from xai_helpers.checkpoints import load
        >>> _, processor = load("efficientnet-lite", weights="bundled")
        >>> to_original(np.ones((1, 224, 224)), processor, (640, 480)).mean(axis=(0, 1))[[0, 100, 320, 600]]
        array([0.   , 0.   , 0.875, 0.   ], dtype=float32)
    """
    maps = np.asarray(without_device(maps), np.float32)
    left, top, right, bottom = processor if isinstance(processor, (tuple, list)) else seen_box(processor, size)
    if not (left < right and top < bottom):
        raise ValueError(f"a box is left, top, right and bottom in pixels of the photo, not {tuple(processor)}")
    x, y = (np.arange(length) + 0.5 for length in size)
    rows, columns = ((y - top) / (bottom - top), (x - left) / (right - left))
    inside = ((rows >= 0) & (rows <= 1))[:, None] & ((columns >= 0) & (columns <= 1))
    at_rows, at_columns = np.meshgrid(rows * maps.shape[1] - 0.5, columns * maps.shape[2] - 0.5, indexing="ij")
    grid = at_columns.astype(np.float32), at_rows.astype(np.float32)
    return np.stack([cv2.remap(one, *grid, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) * inside for one in maps])


def on_photo(
    image: str | Path | Image.Image, maps: list[np.ndarray], seen: Any = None
) -> tuple[Image.Image, list[np.ndarray]]:
    """A photo upright, and maps of it where they belong: what figures are drawn from.

    A processor of transformers takes a PIL image as it lies in memory and does not read its EXIF data, so the maps of
    one that is to be turned are turned with it.

    Args:
        image: a picture, as for `read_picture`.
        maps: each (height, width), of what the model saw.
        seen: the processor that made the model's input from this picture, or the box that the model saw, as in
            `to_original`. None: all of the picture.

    Returns:
        A PIL image of mode RGB, and the maps, of its size if `seen` is given.

    Warns:
        UserWarning: without `seen`, a map has other proportions than the picture, which was not cut out by
            `scenes.as_seen`.
    """
    turn = TURNS.get(image.getexif().get(ORIENTATION, 1)) if isinstance(image, Image.Image) else None
    picture = read_picture(image)
    if seen is not None:
        size = (picture.height, picture.width) if turn in _TURNS_SIDES else picture.size
        maps = [to_original(np.asarray(one, np.float32)[None], seen, size)[0] for one in maps]
    if turn is not None:
        maps = [np.asarray(Image.fromarray(np.asarray(one, np.float32)).transpose(turn)) for one in maps]
    others = [one.shape for one in maps if one.ndim == 2 and not _in_proportion(one.shape, picture)]
    if others and not picture.info.get(SEEN):
        rows, columns = others[0]
        warnings.warn(
            f"the map is {columns} x {rows} and the picture {picture.width} x {picture.height}: unless the model saw "
            "all of the picture, squashed, the map is drawn in the wrong place. Give seen=processor, or the box that "
            "the model saw, or draw on the part that scenes.as_seen cuts out",
            stacklevel=4,
        )
    return picture, maps


_TURNS_SIDES = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)


def _in_proportion(shape, picture):
    """Up to a row or column, or a fiftieth."""
    rows, columns = shape
    wanted = rows * picture.width / picture.height
    return abs(columns - wanted) < max(1, 0.02 * wanted) or abs(rows - columns * picture.height / picture.width) < 1


def as_linear(processor: Any) -> tuple[np.ndarray, np.ndarray]:
    """What a processor makes of a pixel's colour, as a matrix: scaling, mean and deviation, order of channels.

    Args:
        processor: an image processor of transformers, or a processor that has one.

    Returns:
        A float32 matrix (3, 3) and an offset (3,): the model's values are matrix @ (red, green, blue) + offset, with
        colours from 0 to 255.

    Raises:
        ValueError: it makes something else of colours.

    Example:
        >>> from xai_helpers.checkpoints import load
        >>> matrix, offset = as_linear(load("efficientnet-lite", weights="bundled")[1])
        >>> (matrix @ [0, 127.5, 255] + offset).round(3)  # mean and deviation are a half
        array([-1.,  0.,  1.])
    """
    processor = getattr(processor, "image_processor", processor)

    def of(*colour):
        out = processor(Image.new("RGB", (64, 64), colour), return_tensors="pt")["pixel_values"][0]
        return out[:, out.shape[1] // 2, out.shape[2] // 2].numpy(force=True).astype(np.float64)

    offset = of(0, 0, 0)
    matrix = np.stack([of(255, 0, 0), of(0, 255, 0), of(0, 0, 255)], axis=1)
    matrix = (matrix - offset[:, None]) / 255
    if not np.allclose(of(40, 130, 210), matrix @ (40, 130, 210) + offset, atol=1e-3):
        raise ValueError(f"{type(processor).__name__} does more to colours than scale and mix them")
    return matrix.astype(np.float32), offset.astype(np.float32)


def _not_normalised(processor, picture):
    """What a processor makes of a picture, with the picture's own values, (3, height, width)."""
    as_it_is = {"do_normalize": False, "do_rescale": False, "return_tensors": "pt"}
    if getattr(processor, "do_flip_channel_order", False):  # of MobileViT, which was trained on blue, green, red
        as_it_is["do_flip_channel_order"] = False
    of_timm = getattr(processor, "data_config", None)
    if of_timm:  # transformers' wrapper of timm's processing takes no such options
        as_it_is = {}
    out = processor(picture, **as_it_is)["pixel_values"][0].numpy(force=True).astype(np.float64)
    if of_timm:
        out = 255 * (out * np.reshape(of_timm["std"], (3, 1, 1)) + np.reshape(of_timm["mean"], (3, 1, 1)))
    return out


def widened(pixel_values: torch.Tensor, image: Image.Image) -> tuple[torch.Tensor, Image.Image]:
    """Stretches an input and its picture to one and a half times their width, to try a recipe on another shape.

    Args:
        pixel_values: float tensor (batch, channels, height, width).
        image: the PIL image of what the model sees there.

    Returns:
        Both, stretched alike. Masks of the picture can stay as they are, since `show_maps` and `hits` bring them to
        the size of the maps.
    """
    height, width = pixel_values.shape[2:]
    wide = torch.nn.functional.interpolate(pixel_values, size=(height, width * 3 // 2), mode="bicubic")
    return wide, image.resize((image.width * 3 // 2, image.height))
