"""How well a map hits a known answer, how sure that is, and whether a score depends on what the map shows."""

import copy
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:  # imported late below: only tables need it
    import pandas as pd

Methods = Mapping[str, Callable[[torch.Tensor, list[str]], np.ndarray] | Sequence[np.ndarray]]


class MapWarning(UserWarning):
    """Who looks at a map is to know that it is zero everywhere, or turned round. Tables of many maps do without."""


@dataclass
class Example:
    """A picture as a model gets it, with known answers.

    Attributes:
        pixel_values: float tensor (1, channels, height, width).
        categories: the model's names for the objects in it.
        masks: bool (n_categories, height, width), one a category, of the part that the model sees.
        image: that part of the picture, to draw maps on; scores do not need it.
    """

    pixel_values: torch.Tensor
    categories: list[str]
    masks: np.ndarray
    image: Image.Image | None = None


def without_device(values: Any) -> Any:
    """A tensor on any device as an array, and a list of tensors as one of arrays; anything else as it is."""
    if isinstance(values, (list, tuple)):
        return [without_device(value) for value in values]
    return values.numpy(force=True) if isinstance(values, torch.Tensor) else values


def _without_warnings(method, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapWarning)
        return method(*args)


def resize_masks(masks: np.ndarray, height: int, width: int) -> np.ndarray:
    """Masks, bool (n, height, width), brought to another size: a pixel is inside where at least half of it was."""
    masks = np.asarray(without_device(masks), bool)
    if masks.shape[1:] == (height, width):
        return masks
    return np.array(
        [cv2.resize(m.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA) >= 0.5 for m in masks], bool
    ).reshape(-1, height, width)


def _pair(maps, masks):
    maps, masks = np.asarray(without_device(maps), np.float64), np.asarray(without_device(masks))
    if maps.ndim != 3 or masks.ndim != 3 or len(maps) != len(masks):
        raise ValueError(
            f"maps of shape {maps.shape} and masks of shape {masks.shape} do not pair up: both are wanted as "
            "(n_categories, height, width), one mask a map."
        )
    if not np.isfinite(maps).all() or (maps < 0).any():
        raise ValueError("maps have to be finite and not negative; explain() and relevance() give such maps.")
    return maps, resize_masks(masks, *maps.shape[1:])


def hits(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The pointing game (Zhang et al., IJCV 2018), without a tolerance: does the maximum lie on the object?

    Args:
        maps: (n_categories, height, width), not negative; an array, or a tensor on any device, as all maps and masks.
        masks: bool, (n_categories, height, width) at any resolution of the same picture.

    Returns:
        bool, (n_categories,). A map that is zero everywhere is a miss. Where the maximum is reached at several
        pixels, most of them must lie on the object.

    Raises:
        ValueError: the shapes do not pair up, or a map has negative or non-finite values.

    Example:
        >>> maps = np.array([[[0.1, 0.6], [0.2, 0.1]], [[0.9, 0], [0, 0.1]]])
        >>> masks = np.array([[[0, 1], [0, 0]], [[0, 0], [0, 1]]], bool)
        >>> hits(maps, masks).tolist()
        [True, False]
    """
    maps, masks = _pair(maps, masks)
    peaks = [m == m.max() for m in maps]
    return np.array(
        [m.max() > 0 and inside[peak].mean() > 0.5 for m, inside, peak in zip(maps, masks, peaks, strict=True)], bool
    )


def energy_inside(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The share of a map inside the mask: the energy-based pointing game (Wang et al., Score-CAM, CVPRW 2020).

    Args and errors are those of `hits`.

    Returns:
        float, (n_categories,), in [0, 1]; 0 for a map that is zero everywhere.

    Example:
        >>> maps = np.array([[[0.1, 0.6], [0.2, 0.1]], [[0.9, 0], [0, 0.1]]])
        >>> masks = np.array([[[0, 1], [0, 0]], [[0, 0], [0, 1]]], bool)
        >>> energy_inside(maps, masks).round(2).tolist()
        [0.6, 0.1]
    """
    maps, masks = _pair(maps, masks)
    total = maps.sum(axis=(1, 2))
    return (maps * masks).sum(axis=(1, 2)) / np.where(total > 0, total, 1)


def strongest_inside(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Which map rules inside which mask: the share of each mask's pixels in which each map is the strongest of all.

    Args:
        maps: (n_maps, height, width), such as the maps of concepts.
        masks: bool, (n_masks, height, width) at any resolution of the same picture.

    Returns:
        float, (n_maps, n_masks), in [0, 1]; each column adds up to 1, or is NaN where a mask is empty.
    """
    strongest = np.asarray(without_device(maps)).argmax(axis=0)
    masks = resize_masks(masks, *strongest.shape)
    counts = np.array([[np.sum(strongest[mask] == k) for mask in masks] for k in range(len(maps))], float)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(axis=0)


def random_maps(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """A baseline: random maps, noise on a 7 x 7 grid resized like a class activation map, float32 in [0, 1]."""
    grids = np.random.default_rng(seed).random((n, 7, 7), np.float32)
    maps = np.array([cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR) for grid in grids])
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    return (maps - low) / (high - low)


def centre_dots(n: int, height: int, width: int) -> np.ndarray:
    """A baseline: the same dot at the centre for every category, a Gaussian of a sixth of the picture, in [0, 1]."""
    y, x = ((np.arange(length) + 0.5) / length - 0.5 for length in (height, width))
    dot = np.exp(-(y[:, None] ** 2 + x**2) / (2 / 36)).astype(np.float32)
    return np.repeat(dot[None] / dot.max(), n, axis=0)


def edge_maps(n: int, pixel_values: torch.Tensor) -> np.ndarray:
    """A baseline: where the picture has edges, the same for every category; it has never seen the model.

    Args:
        n: how many.
        pixel_values: one image, float tensor (1, channels, height, width).

    Returns:
        A float32 array (n, height, width) in [0, 1].
    """
    grey = pixel_values[0].float().mean(dim=0).numpy(force=True)
    strength = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    smooth = cv2.GaussianBlur(strength, (0, 0), max(grey.shape) / 40)
    return np.repeat(smooth[None] / max(smooth.max(), 1e-12), n, axis=0)


def score_maps(methods: Methods, examples: Sequence[Example]) -> "pd.DataFrame":
    """Score methods map by map, beside the baselines "centre dot" and "random map".

    Args:
        methods: name -> function (pixel_values, categories) -> maps, one a category; or a list of such maps that are
            made already, an array an example.
        examples: `Example` objects with at least two objects each.

    Returns:
        A pandas DataFrame with the index levels "method", "scene" (the number of the example) and "category", a row a
        map: "pointing" (1 where its maximum lies on the object, else 0), "energy" (share of the map inside the object),
        "on the other" (1 where its maximum lies on another object of the picture, else 0), "seconds" (of the call that
        made all maps of the scene; they depend on the machine, so compare them within a run only; NaN without a call).

    Raises:
        ValueError: a list of maps of another length than the examples, and what `hits` raises.
    """
    import pandas as pd

    baselines: dict[str, Callable] = {
        "centre dot": lambda pixels, names: centre_dots(len(names), pixels.shape[2], pixels.shape[3]),
        "random map": lambda pixels, names: random_maps(len(names), pixels.shape[2], pixels.shape[3], next(seeds)),
    }
    index: list[tuple[str, int, str]] = []
    rows: list[tuple[float, ...]] = []
    for name, method in {**methods, **baselines}.items():
        seeds = itertools.count()
        if not callable(method) and len(method) != len(examples):
            raise ValueError(f"{name!r}: {len(method)} arrays of maps for {len(examples)} examples; each has one")
        for number, example in enumerate(examples):
            start = time.perf_counter()
            if callable(method):
                maps = without_device(_without_warnings(method, example.pixel_values, example.categories))
                seconds = [time.perf_counter() - start] * len(maps)
            else:
                maps = without_device(method[number])
                seconds = [np.nan] * len(maps)
            others = np.array([np.delete(example.masks, i, axis=0).any(axis=0) for i in range(len(maps))])
            scores = hits(maps, example.masks), energy_inside(maps, example.masks), hits(maps, others), seconds
            rows.extend(zip(*scores, strict=True))
            index.extend((name, number, category) for category in example.categories)
    index = pd.MultiIndex.from_tuples(index, names=["method", "scene", "category"])
    return pd.DataFrame(rows, index, ["pointing", "energy", "on the other", "seconds"], dtype=float)


def score_table(methods: Methods, examples: Sequence[Example]) -> "pd.DataFrame":
    """The means of `score_maps` for each method, without the seconds: arguments as there.

    Returns:
        A pandas DataFrame, a row a method: "pointing" (share of maps whose maximum lies on the object), "energy"
        (mean share of the map inside the object), "on the other" (share of maps whose maximum lies on another object of
        the picture), "maps" (how many).
    """
    by_method = score_maps(methods, examples).groupby("method", sort=False)
    return by_method.mean().drop(columns="seconds").assign(maps=by_method.size()).rename_axis(None)


def bootstrap_interval(
    values: Iterable[float], level: float = 0.95, n: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """How far a mean over scenes can be trusted: the percentile bootstrap (Efron, Annals of Statistics 1979).

    The scenes are drawn again, as many as there are, with replacement. For two methods or models on the same scenes,
    give their difference in each scene: what makes a scene hard for both then drops out.

    Args:
        values: one number a scene, (n_scenes,). Average the maps of a scene first: they are not independent.
        level: the share of redrawn means inside the interval.
        n: how often to redraw.

    Returns:
        (low, high).

    Raises:
        ValueError: values of another shape, none at all, or one that is not finite.

    Example:
        >>> bootstrap_interval([0.5, 0.5, 0.5])  # scenes that agree leave no doubt
        (0.5, 0.5)
        >>> low, high = bootstrap_interval([0, 1] * 50)  # about twice the standard error of 0.05 to both sides
        >>> round(low, 1), round(high, 1)
        (0.4, 0.6)
    """
    values = np.asarray(values, float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(
            f"values of shape {values.shape} are wanted as (n_scenes,), at least one and all finite: average the maps "
            "of a scene first, and leave out what has no number"
        )
    drawn = np.random.default_rng(seed).integers(len(values), size=(n, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n independent cases (Wilson, JASA 1927), which has a width at 0 and 1, too.

    Example:
        >>> low, high = wilson_interval(1, 100)
        >>> round(low, 3), high
        (0.963, 1.0)
    """
    z2 = 1.959964**2
    centre, spread = share + z2 / (2 * n), math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))
    return max(0.0, (centre - spread) / (1 + z2 / n)), min(1.0, (centre + spread) / (1 + z2 / n))


def behind_best(scores: "pd.DataFrame", methods: Iterable[str], score: str = "pointing") -> "pd.DataFrame":
    """How far methods are behind the best of them, scene by scene, and whether the scenes can tell.

    Args:
        scores: what `score_maps` returned, or several of them in one; only scenes that all the methods had count.
        methods: the names of those to compare.
        score: the column.

    Returns:
        A pandas DataFrame, a row a method, best first: the mean "score" over the scenes; how far it is "behind" the
        best one, and the 95 % `bootstrap_interval` of that, "from" and "to". With "from" at most 0, these scenes can't
        tell the two apart.
    """
    import pandas as pd

    by_scene = scores[score].groupby(["method", "scene"]).mean().unstack("method")[list(methods)].dropna()
    by_scene = by_scene[by_scene.mean().sort_values(ascending=False, kind="stable").index]
    gaps = {name: by_scene.iloc[:, 0] - by_scene[name] for name in by_scene}
    rows = {name: (by_scene[name].mean(), gap.mean(), *bootstrap_interval(gap)) for name, gap in gaps.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=[score, "behind", "from", "to"])


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two maps, (height, width), over the pixels where both are above zero.

    Zeros are left out, since maps that end in a ReLU share many of them. NaN for fewer than 50 pixels.
    """
    from scipy.stats import spearmanr  # late, since it takes a third of a second

    a, b = (np.asarray(without_device(one)) for one in (a, b))
    both = (a > 0) & (b > 0)
    return float(spearmanr(a[both], b[both]).statistic) if both.sum() >= 50 else float("nan")


def sanity_check(
    model: torch.nn.Module,
    parts: Mapping[str, str],
    methods_of: Callable[[torch.nn.Module], Methods],
    examples: Sequence[Example],
    seeds: int = 3,
) -> "pd.DataFrame":
    """Do maps change when the model is destroyed? The cascading randomisation of Adebayo et al. (NeurIPS 2018).

    A copy of the model gets random weights, one part after the other from the top down; after each, the maps of the
    examples' first categories are made anew. One random classifier may happen to resemble the trained one, or its
    opposite, so this is done with several copies.

    Args:
        model: it is left as it is.
        parts: name -> dotted path of a module in it, the last one of the model first.
        methods_of: function of a model that gives its methods, name -> function (pixel_values, categories) -> maps.
        examples: `Example` objects.
        seeds: how many copies; their random weights are those of the seeds 0, 1, ...

    Returns:
        A pandas DataFrame, a row a part, a column a method: the mean `likeness` to the map of the trained model, over
        the copies and the examples. Pairs of maps that have none are left out; NaN where no pair has one.
    """
    import pandas as pd

    def maps_of(copy):
        return {
            name: [_without_warnings(method, one.pixel_values, one.categories[:1])[0] for one in examples]
            for name, method in methods_of(copy).items()
        }

    trained = maps_of(model)
    found: dict[str, dict[str, list[float]]] = {part: {name: [] for name in trained} for part in parts}
    with torch.random.fork_rng():
        for seed in range(seeds):
            torch.manual_seed(seed)
            broken = copy.deepcopy(model)
            for part, path in parts.items():
                for module in broken.get_submodule(path).modules():
                    getattr(module, "reset_parameters", lambda: None)()
                for name, after in maps_of(broken).items():
                    found[part][name] += [likeness(a, b) for a, b in zip(trained[name], after, strict=True)]
    means = {part: {name: pd.Series(values).mean() for name, values in row.items()} for part, row in found.items()}
    return pd.DataFrame.from_dict(means, orient="index")


def blurred_away(pixel_values: torch.Tensor, mask: np.ndarray) -> torch.Tensor:
    """The picture with its surroundings, blurred, in the place of an object.

    Args:
        pixel_values: one picture, float tensor (1, channels, height, width).
        mask: the object's, bool (height, width) at any resolution of the same picture.

    Returns:
        A tensor like pixel_values. Outside the mask it is the same; inside it is the mean of what is outside, weighted
        by a Gaussian of an eighth of the picture's longer side.
    """
    mask = resize_masks(np.asarray(without_device(mask))[None], *pixel_values.shape[2:])[0]
    picture = pixel_values[0].permute(1, 2, 0).float().numpy(force=True)
    outside, sigma = (~mask).astype(np.float32), max(mask.shape) / 8
    around = cv2.GaussianBlur(picture * outside[..., None], (0, 0), sigma).reshape(picture.shape)
    share = cv2.GaussianBlur(outside, (0, 0), sigma)[..., None].clip(min=1e-6)
    filled = np.where(mask[..., None], around / share, picture)
    return torch.from_numpy(filled).permute(2, 0, 1)[None].to(pixel_values)


def perturbation_curves(
    score: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    heat: np.ndarray,
    baseline: torch.Tensor | float,
    steps: int = 16,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Deletion and insertion (Petsiuk, Das, Saenko: RISE, BMVC 2018): does the score depend on what a map shows?

    Pixels change in the order of the map, the highest value first. Where the map has equal values, as a mask has or a
    map with many zeros, their order is random: a threshold would take all of them at once.

    Args:
        score: function of pictures (n, 3, height, width) that gives n numbers, such as the logits of a category.
        pixel_values: one picture, float tensor (1, channels, height, width).
        heat: its map, (height, width).
        baseline: what stands for "nothing there", a tensor that can be broadcast to the picture, or a number.
        steps: in how many equal parts the pixels change.
        seed: of the order among equal values.

    Returns:
        Two float arrays, (steps + 1,). Deletion: the scores while the picture's pixels are replaced by the baseline's,
        from the picture to the baseline. Insertion: while the baseline's are replaced by the picture's.

    Raises:
        ValueError: the map and the picture differ in size, or the map has values that are not finite.
    """
    heat = np.asarray(without_device(heat))
    if heat.shape != tuple(pixel_values.shape[2:]):
        raise ValueError(f"a map of shape {heat.shape} for a picture of {tuple(pixel_values.shape[2:])} pixels")
    if not np.isfinite(heat).all():
        raise ValueError("the map has values that are not finite, which have no place in an order")
    shuffled = np.random.default_rng(seed).permutation(heat.size)
    order = shuffled[np.argsort(-heat.ravel()[shuffled], kind="stable")]
    rank = np.empty(heat.size)
    rank[order] = np.arange(heat.size)
    steps_done = rank < np.linspace(0, heat.size, steps + 1)[:, None]
    changed = torch.from_numpy(steps_done.reshape(-1, 1, *heat.shape)).to(pixel_values.device)
    empty = torch.as_tensor(baseline, dtype=pixel_values.dtype, device=pixel_values.device).expand_as(pixel_values)
    with torch.no_grad():
        deletion, insertion = (
            score(torch.where(changed, new, old)).cpu().double().numpy()
            for new, old in ((empty, pixel_values), (pixel_values, empty))
        )
    return deletion, insertion
