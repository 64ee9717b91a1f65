"""Maps from the pixels: Captum's gradient methods, occlusion, and random masks."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch

from xai_helpers.balance import balanced_gradients, check_rules_reach
from xai_helpers.layers import NO_GRADIENT
from xai_helpers.wrappers import LogitsModel, category_targets, check_count, frozen, input_for, masked_scores


class _Score(torch.nn.Module):
    """The scores of several targets as columns, so that Captum finds each by its number."""

    def __init__(self, model, targets):
        super().__init__()
        self.model = LogitsModel(model)
        self.targets = targets

    def forward(self, pixel_values):
        return torch.stack([torch.stack([target(row) for target in self.targets]) for row in self.model(pixel_values)])


def _scaled(maps):
    maps = np.float32(maps)
    return maps / maps.max(axis=(1, 2), keepdims=True).clip(min=1e-12)


@contextlib.contextmanager
def _captum_tidied(model):
    """Takes away what Captum's DeepLift notes in a model's modules, and leaves there when it is interrupted."""
    before = {module: set(vars(module)) for module in model.modules()}
    try:
        yield
    finally:
        for module, known in before.items():
            for name in {"input", "input_ref", "output"} & set(vars(module)) - known:
                delattr(module, name)


def attribute(
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    categories: str | int | Callable | Sequence,
    method: Callable | str | None = None,
    sign: str = "absolute",
    **options: Any,
) -> np.ndarray:
    """How much each pixel speaks for or against each category, by one of Captum's methods or balanced gradients.

    Args:
        model: a transformers classification model, or any module that maps images to a score tensor.
        pixel_values: one image as the model's processor makes it, float tensor (1, 3, height, width).
        categories: as in `cam.explain`.
        method: a class of Captum such as Saliency or IntegratedGradients, or a function of a scorer that makes one,
            such as `lambda net: NoiseTunnel(Saliency(net))`; None: Saliency. "balanced": value times balanced gradient
            (`balance.balanced_gradients`), whose option is `gamma`.
        sign: of Captum's attributions: "absolute" adds up the absolute values over the channels; "positive" adds up the
            values, and keeps what speaks for the category, as a CAM does.
        options: for its `attribute`, such as `n_steps` or `nt_samples`. Tensors, such as `baselines`, may be on any
            device.

    Returns:
        A float32 array (n_categories, height, width) in [0, 1]: the attributions, summed over the channels and divided
        by the largest of the map. With "balanced" the attributions themselves, signed and not scaled, summed over the
        channels: those of all pixels, and of the model's biases and other constants, add up to the score.

    Raises:
        ValueError: an unknown method, sign or category; a callable that returns no single number; pixel_values of
            another shape or not finite; a model in half precision, or for "balanced" one of torch.jit or without a
            gradient.

    Example:
        >>> from captum.attr import IntegratedGradients
        >>> from xai_helpers.checkpoints import examples, load
        >>> model, processor = load("resnet", weights="bundled")
        >>> [example] = examples(model, processor, 1)
        >>> maps = attribute(model, example.pixel_values, example.categories, IntegratedGradients, n_steps=8)
        >>> maps.shape  # a scene with two objects
        (2, 128, 128)
    """
    from captum.attr import Saliency  # late: most explanations need no Captum

    pixel_values = input_for(model, pixel_values)
    if sign not in ("absolute", "positive"):
        raise ValueError(f'sign is "absolute" or "positive", not {sign!r}')
    if isinstance(method, str):
        if method != "balanced":
            raise ValueError(f'there is no method {method!r}: give "balanced", or a class of Captum')
        return _balanced(model, pixel_values, categories, **options)
    options = {name: _like(option, pixel_values) for name, option in options.items()}
    scorer = _Score(model, category_targets(model, categories))
    with frozen(scorer), _captum_tidied(scorer), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting .*backward hooks")  # Captum removes them
        warnings.filterwarnings("ignore", "Input Tensor .* did not already require gradients")
        engine = (method or Saliency)(scorer)
        found = [
            engine.attribute(pixel_values.clone().requires_grad_(), target=i, **options).detach()
            for i in range(len(scorer.targets))
        ]
    values = torch.cat(found)
    maps = values.abs().sum(dim=1) if sign == "absolute" else values.sum(dim=1).clamp(min=0)
    return _scaled(maps.cpu().numpy())


def _balanced(model, pixel_values, categories, **options):
    """Value times balanced gradient at the pixels, summed over the channels."""
    scorer, source = _Score(model, category_targets(model, categories)), pixel_values.clone().requires_grad_()
    with frozen(scorer):
        check_rules_reach(scorer)
        with balanced_gradients(**options):
            scores = scorer(source.clone())[0]  # on which it may work in place
        if not scores.requires_grad:
            raise ValueError(NO_GRADIENT)
        gradients = [torch.autograd.grad(score, source, retain_graph=True)[0] for score in scores]
    return np.concatenate([(pixel_values * gradient).sum(dim=1).numpy(force=True) for gradient in gradients])


def _like(option, pixel_values):
    """An option of Captum's: a tensor, or a tuple with some, goes where the picture is; anything else stays."""
    if isinstance(option, tuple):
        return tuple(_like(part, pixel_values) for part in option)
    if not isinstance(option, torch.Tensor):
        return option
    return option.to(pixel_values if option.is_floating_point() else pixel_values.device)


def occlude(
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    categories: str | int | Callable | Sequence,
    window: int | None = None,
    step: int | None = None,
    batch: int = 25,
) -> np.ndarray:
    """How much of each score is lost where a window is greyed out (Zeiler, Fergus, ECCV 2014); Captum slides it.

    Args:
        model, pixel_values, categories: as in `attribute`. All categories are read from the same pictures.
        window: its side in pixels; None: a quarter of the picture's longer side, or its shorter side if that is less.
        step: how far it moves, at most by its side; None: half of its side.
        batch: pictures in one pass.

    Returns:
        A float32 array (n_categories, height, width) in [0, 1]; what raises the score when it is hidden is zero.

    Raises:
        ValueError: as in `attribute`; a window that does not fit into the picture, or a step beyond it.

    Example:
        >>> from xai_helpers.checkpoints import examples, load
        >>> model, processor = load("resnet", weights="bundled")
        >>> [example] = examples(model, processor, 1)
        >>> occlude(model, example.pixel_values, example.categories, window=64).shape
        (2, 128, 128)
    """
    from captum.attr import Occlusion

    pixel_values = input_for(model, pixel_values)
    shorter, longer = sorted(pixel_values.shape[2:])
    window = max(1, min(longer // 4, shorter)) if window is None else window
    check_count("window", window, most=shorter)
    step = max(1, window // 2) if step is None else step
    check_count("step", step, most=window)
    scorer = _Score(model, category_targets(model, categories))
    with frozen(scorer), torch.no_grad():
        drops = Occlusion(scorer).attribute(
            pixel_values,
            sliding_window_shapes=(pixel_values.shape[1], window, window),
            strides=(pixel_values.shape[1], step, step),
            perturbations_per_eval=batch,
        )
    return _scaled(drops[:, 0].clamp(min=0).cpu().numpy())


def rise(
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    categories: str | int | Callable | Sequence,
    n_masks: int = 200,
    cells: int = 7,
    batch: int = 50,
    seed: int = 0,
) -> np.ndarray:
    """Which pixels were visible when the score was high: RISE (Petsiuk, Das, Saenko, BMVC 2018).

    The picture is multiplied with random masks, coarse grids of zeros and ones, enlarged smoothly and shifted. The map
    is the covariance of "visible" and "score", over the masks: the original weighs the masks by the scores themselves,
    which were probabilities; with logits the map would mostly show how often each pixel happened to be visible.

    Args:
        model, pixel_values, categories: as in `attribute`. All categories are read from the same masked pictures.
        n_masks: how many, at least 2.
        cells: of a grid, along a side.
        batch: pictures in one pass.
        seed: of the masks.

    Returns:
        A float32 array (n_categories, height, width) in [0, 1].

    Raises:
        ValueError: as in `attribute`; fewer than 2 masks.

    Example:
        >>> from xai_helpers.checkpoints import examples, load
        >>> model, processor = load("resnet", weights="bundled")
        >>> [example] = examples(model, processor, 1)
        >>> rise(model, example.pixel_values, example.categories, n_masks=20).shape
        (2, 128, 128)
    """
    pixel_values = input_for(model, pixel_values)
    check_count("n_masks", n_masks, least=2)
    masks = torch.from_numpy(_random_masks(n_masks, cells, pixel_values.shape[2:], seed)).to(pixel_values)
    scorer = _Score(model, category_targets(model, categories))
    with frozen(scorer), torch.no_grad():
        scores = masked_scores(lambda part: scorer(pixel_values * masks[part, None]), n_masks, batch, "RISE")
        maps = torch.einsum("mc,mhw->chw", scores - scores.mean(dim=0), masks)
    return _scaled(maps.clamp(min=0).cpu().numpy())


def _random_masks(n, cells, size, seed):
    rng, (height, width) = np.random.default_rng(seed), size
    tall, wide = -(-height // cells), -(-width // cells)
    grids = (rng.random((n, cells + 1, cells + 1)) < 0.5).astype(np.float32)
    large = [cv2.resize(grid, (wide * (cells + 1), tall * (cells + 1))) for grid in grids]
    shifts = rng.integers((tall, wide), size=(n, 2))
    return np.stack([mask[y : y + height, x : x + width] for mask, (y, x) in zip(large, shifts, strict=True)])
