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
from xai_helpers.wrappers import (
    Scorer,
    category_targets,
    check_count,
    check_scores,
    finished_maps,
    frozen,
    input_for,
    masked_scores,
    no_checkpointing,
)

BLUR = 0.1  # of the longer side, of a baseline
SATURATED = "a saturated target, as a probability of 1 is, which only its logit tells more of"


class _Score(torch.nn.Module):
    """The scores of several targets as columns, so that Captum finds each by its number."""

    def __init__(self, model, targets):
        super().__init__()
        self.model = Scorer(model)
        self.targets, self.has_gradient, self.fault = targets, True, None

    def forward(self, pixel_values):
        try:
            rows = self.model(pixel_values)
            scores = torch.stack([torch.stack([target(row) for target in self.targets]) for row in rows])
            check_scores(scores)
        except Exception as error:
            self.fault = error  # the model's own, and none of Captum's
            raise
        self.has_gradient = scores.requires_grad
        return scores


def _scaled(maps):
    maps = maps.cpu().numpy().astype(np.float64)  # in which the smallest score is none too small to divide by
    return maps / np.where((largest := maps.max(axis=(1, 2), keepdims=True)) > 0, largest, 1)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextlib.contextmanager
def _captum_tidied(model):
    """Takes away what Captum notes in a model's modules and hooks to them, and leaves there when it is interrupted."""
    before = [
        (module, set(vars(module)), {name: set(getattr(module, name)) for name in HOOKS}) for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, hooks in before:
            for name in set(vars(module)) - attributes:
                delattr(module, name)
            for name, known in hooks.items():
                for key in set(getattr(module, name)) - known:
                    del getattr(module, name)[key]


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
        pixel_values: one image as the model's processor makes it, float tensor (1, channels, height, width).
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
        ValueError: an unknown method, sign or category; a callable that returns no single number; scores that are not
            finite, or not (categories,) for a name or an index; pixel_values of another shape or not finite; a model
            without a gradient, in half precision, exported, made in inference mode, or for "balanced" of torch.jit; a
            method of Captum that cannot explain the model, as DeepLift where a module runs twice.

    Warns:
        MapWarning: a map is zero everywhere.
        UserWarning: the relevance of Captum's LRP is off by more than the whole score.

    Example:
        >>> from captum.attr import IntegratedGradients
        >>> from xai_helpers.checkpoints import examples, load
        >>> model, processor = load("resnet", weights="bundled")
        >>> [example] = examples(model, processor, 1)
        >>> maps = attribute(model, example.pixel_values, example.categories, IntegratedGradients, n_steps=8)
        >>> maps.shape  # a scene with two objects
        (2, 128, 128)
    """
    from captum.attr import LRP, Saliency  # late: most explanations need no Captum

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
        source = pixel_values.clone().requires_grad_()
        with _captum_explained(engine, scorer), no_checkpointing():
            found = [engine.attribute(source, target=i, **options).detach() for i in range(len(scorer.targets))]
        if isinstance(engine, LRP):
            _check_adds_up(found, scorer(pixel_values)[0])
    values = torch.cat(found)
    maps = values.abs().sum(dim=1) if sign == "absolute" else values.sum(dim=1).clamp(min=0)
    against = '; nothing speaks for it, and sign="absolute" shows the rest' if sign == "positive" else ""
    return finished_maps(_scaled(maps), f"{ZERO_AT_PIXELS}{against}")


def _check_adds_up(attributions, scores):
    for number, (values, score) in enumerate(zip(attributions, scores.tolist(), strict=True), start=1):
        total = values.sum().item()
        if not abs(total - score) <= abs(score):
            warnings.warn(
                f"the relevance for category number {number} adds up to {total:.3g}, and its score is {score:.3g}: "
                "Captum's LRP has no rule for a part of this model, such as a residual connection or a batch norm, so "
                'its map is none of the score; "balanced" adds up in any model',
                stacklevel=3,
            )


ZERO_AT_PIXELS = f"no pixel has a gradient of it, as of {SATURATED}, or of a score that does not depend on the picture"
CAPTUMS_OWN = (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError)


@contextlib.contextmanager
def _captum_explained(engine, scorer):
    """What Captum raises where a model is not made for a method says so, and what to do."""
    from captum.attr import GradientAttribution

    try:
        yield
    except CAPTUMS_OWN as error:
        if error is scorer.fault:
            raise
        if isinstance(engine, GradientAttribution) and not scorer.has_gradient:
            raise ValueError(NO_GRADIENT) from error
        if isinstance(error, TypeError) and "argument" in str(error):  # an option that the method does not have
            raise
        raise ValueError(
            f"Captum's {type(engine).__name__} cannot explain this {type(scorer.model.model).__name__}: "
            f"{type(error).__name__}: {error}. Methods with rules for single modules, such as DeepLift, LRP and "
            "GuidedBackprop, need each activation as a module of its own that runs once and not in place; "
            'IntegratedGradients and "balanced" take any model'
        ) from error


def _balanced(model, pixel_values, categories, **options):
    """Value times balanced gradient at the pixels, summed over the channels."""
    scorer = _Score(model, category_targets(model, categories))
    with frozen(scorer):
        check_rules_reach(scorer)
        source = pixel_values.clone().requires_grad_()
        with no_checkpointing(), balanced_gradients(**options):
            scores = scorer(source)[0]
            if not scores.requires_grad:
                raise ValueError(NO_GRADIENT)
            gradients = [torch.autograd.grad(score, source, retain_graph=True)[0] for score in scores]
    maps = np.concatenate([(pixel_values * gradient).sum(dim=1).numpy(force=True) for gradient in gradients])
    return finished_maps(maps, ZERO_AT_PIXELS)


def baseline_for(pixel_values: torch.Tensor, baseline: Any) -> torch.Tensor:
    """What stands where a picture is hidden, a tensor of the picture's shape.

    Args:
        pixel_values: float tensor (1, channels, height, width).
        baseline: a number; "mean", the picture's mean of each channel; "blur", the picture blurred by a tenth of its
            longer side; a value a channel, as a list or a tensor (channels,); or a picture, a tensor (1, channels,
            height, width). All of them as the model gets them, so normalised.

    Raises:
        ValueError: it is none of these, or has another shape.
    """
    if isinstance(baseline, str):
        if baseline == "mean":
            return pixel_values.mean(dim=(2, 3), keepdim=True).expand_as(pixel_values)
        if baseline == "blur":
            sigma, picture = BLUR * max(pixel_values.shape[2:]), pixel_values[0].permute(1, 2, 0).cpu().numpy()
            blurred = np.stack([cv2.GaussianBlur(one, (0, 0), sigma) for one in np.moveaxis(picture, 2, 0)])
            return torch.from_numpy(blurred).to(pixel_values)[None]
    else:
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            values = baseline if isinstance(baseline, torch.Tensor) else torch.as_tensor(baseline, device="cpu")
            values = values.reshape(1, -1, 1, 1) if values.ndim == 1 else values
            if values.ndim in (0, 4) and values.isfinite().all():
                return values.to(pixel_values).expand_as(pixel_values)
    found = repr(baseline) if isinstance(baseline, (str, int, float)) else f"{type(baseline).__name__} "
    found += "" if isinstance(baseline, (str, int, float)) else f"of shape {tuple(np.shape(baseline))}"
    raise ValueError(
        f'a baseline is a number, "mean", "blur", a value for each of the {pixel_values.shape[1]} channels, or a '
        f"picture of shape {tuple(pixel_values.shape)}, all finite, not {found}"
    )


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
    baseline: Any = 0.0,
) -> np.ndarray:
    """How much of each score is lost where a window is greyed out (Zeiler, Fergus, ECCV 2014); Captum slides it.

    Args:
        model, pixel_values, categories: as in `attribute`. All categories are read from the same pictures.
        window: its side in pixels; None: a quarter of the picture's longer side, or its shorter side if that is less.
        step: how far it moves, at most by its side; None: half of its side.
        batch: pictures in one pass.
        baseline: what the window shows, as in `baseline_for`. 0 is grey for a model whose input is normalised, and
            black for one that takes values in [0, 1], to which "mean" or "blur" is fairer.

    Returns:
        A float32 array (n_categories, height, width) in [0, 1]; what raises the score when it is hidden is zero.

    Raises:
        ValueError: as in `attribute`; a window that does not fit into the picture, or a step beyond it; no baseline.

    Warns:
        MapWarning: a map is zero everywhere.

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
    baseline = baseline_for(pixel_values, baseline)
    scorer = _Score(model, category_targets(model, categories))
    with frozen(scorer), torch.no_grad():
        drops = Occlusion(scorer).attribute(
            pixel_values,
            baselines=baseline,
            sliding_window_shapes=(pixel_values.shape[1], window, window),
            strides=(pixel_values.shape[1], step, step),
            perturbations_per_eval=batch,
        )
    lowered = drops[:, 0].clamp(min=0)
    return finished_maps(_scaled(lowered), f"no hidden window lowers the score, as of {SATURATED}, or of one too small")


def rise(
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    categories: str | int | Callable | Sequence,
    n_masks: int = 200,
    cells: int = 7,
    batch: int = 50,
    seed: int = 0,
    baseline: Any = 0.0,
) -> np.ndarray:
    """Which pixels were visible when the score was high: RISE (Petsiuk, Das, Saenko, BMVC 2018).

    The picture, less its baseline, is multiplied with random masks, coarse grids of zeros and ones, enlarged smoothly
    and shifted. The map is the covariance of "visible" and "score", over the masks: the original weighs the masks by
    the scores themselves, which were probabilities; with logits the map would mostly show how often each pixel happened
    to be visible.

    Args:
        model, pixel_values, categories: as in `attribute`. All categories are read from the same masked pictures.
        n_masks: how many, at least 2.
        cells: of a grid, along a side.
        batch: pictures in one pass.
        seed: of the masks.
        baseline: what the hidden part shows, as in `occlude`.

    Returns:
        A float32 array (n_categories, height, width) in [0, 1].

    Raises:
        ValueError: as in `attribute`; fewer than 2 masks; no baseline.

    Warns:
        MapWarning: a map is zero everywhere.

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
    baseline = baseline_for(pixel_values, baseline)
    scorer = _Score(model, category_targets(model, categories))

    def scores_of(part):
        return scorer(baseline + (pixel_values - baseline) * masks[part, None])

    with frozen(scorer), torch.no_grad():
        scores = masked_scores(scores_of, n_masks, batch, "RISE")
        differ = (scores != scores[:1]).any(dim=0)  # else their changes are rounding
        changes = (scores - scores.mean(dim=0)) * differ
        maps = torch.einsum("mc,mhw->chw", changes, masks)
    why = f"the score is the same whatever is hidden, as of {SATURATED}, or no pixel raises it"
    return finished_maps(_scaled(maps.clamp(min=0)), why)


def _random_masks(n, cells, size, seed):
    rng, (height, width) = np.random.default_rng(seed), size
    tall, wide = -(-height // cells), -(-width // cells)
    grids = (rng.random((n, cells + 1, cells + 1)) < 0.5).astype(np.float32)
    large = [cv2.resize(grid, (wide * (cells + 1), tall * (cells + 1))) for grid in grids]
    shifts = rng.integers((tall, wide), size=(n, 2))
    return np.stack([mask[y : y + height, x : x + width] for mask, (y, x) in zip(large, shifts, strict=True)])
