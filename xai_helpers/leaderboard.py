"""Which method points where, on which model: the same test scenes for all, beside baselines that know nothing.

`python -m benchmarks.known_answers` writes the full table, `results()` reads it.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_grad_cam as grad_cam
import torch
from captum.attr import GuidedBackprop, InputXGradient, IntegratedGradients, NoiseTunnel, Saliency
from pytorch_grad_cam.metrics.road import ROADLeastRelevantFirst, ROADMostRelevantFirst
from transformers import ResNetConfig

from xai_helpers.attention import relevance, rollout
from xai_helpers.attribution import attribute, occlude, rise
from xai_helpers.cam import explain
from xai_helpers.checkpoints import FAULTY, examples
from xai_helpers.layers import TargetLayer
from xai_helpers.recipes import RECIPES
from xai_helpers.scoring import (
    Example,
    blurred_away,
    bootstrap_interval,
    centre_dots,
    edge_maps,
    perturbation_curves,
    random_maps,
    score_maps,
)
from xai_helpers.wrappers import LogitsModel, category_index, category_targets, frozen, input_for

RESULTS = Path(__file__).with_name("known_answers.csv")
MODELS = ["resnet", "vit", "swin", "convnext"]
WHERE_HIDING_MATTERS = "pointing where hiding matters"
SCORES = ["pointing", WHERE_HIDING_MATTERS, "energy", "on the other", "ROAD", "deletion", "seconds"]

CAMS = {
    "Grad-CAM": grad_cam.GradCAM,
    "HiResCAM": grad_cam.HiResCAM,
    "LayerCAM": grad_cam.LayerCAM,
    "Grad-CAM++": grad_cam.GradCAMPlusPlus,
    "XGrad-CAM": grad_cam.XGradCAM,
    "EigenGradCAM": grad_cam.EigenGradCAM,
    "Eigen-CAM": grad_cam.EigenCAM,
    "Ablation-CAM": grad_cam.AblationCAM,
    "Score-CAM": grad_cam.ScoreCAM,
    "RandomCAM": grad_cam.RandomCAM,
}
#: Captum's, each with the options of its `attribute`.
PIXELS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "gradient": (Saliency, {}),
    "input x gradient": (InputXGradient, {}),
    "SmoothGrad": (
        lambda net: NoiseTunnel(Saliency(net)),
        {"nt_samples": 16, "nt_samples_batch_size": 16, "stdevs": 0.3},
    ),
    "integrated gradients": (IntegratedGradients, {"n_steps": 32, "internal_batch_size": 32}),
}
#: Methods that take many times as long as Grad-CAM.
SLOW = ["Ablation-CAM", "Score-CAM", "FullGrad", "SmoothGrad", "integrated gradients", "occlusion", "RISE"]
BASELINES = ["random map", "centre dot", "edges", "RandomCAM"]


def methods_for(
    name: str | None, model: Any, pixel_values: torch.Tensor, layer: TargetLayer | None = None
) -> dict[str, Callable]:
    """All methods that can explain a model: name -> function (pixel_values, categories) -> maps.

    Args:
        name, model: as for `checkpoints.load`, of one of `MODELS`, or of the `checkpoints.FAULTY`.
        pixel_values: a picture, whose size the others have, too.
        layer: where the CAMs are made. None: where the family's recipe says; with a layer, the name is not used.
    """
    if layer is None:
        layer = RECIPES[FAULTY.get(str(name), str(name))].cam(model, pixel_values)
    methods: dict[str, Callable] = {"balanced gradients": functools.partial(explain, model)}
    methods |= {key: functools.partial(explain, model, target_layer=layer, method=cam) for key, cam in CAMS.items()}
    if isinstance(model.config, ResNetConfig):
        methods["FullGrad"] = functools.partial(explain, model, target_layer=layer, method=grad_cam.FullGrad)
    if hasattr(model, "vit"):
        methods["rollout"] = lambda x, names: np.repeat(rollout(model, x), len(names), axis=0)
        methods["relevance"] = functools.partial(relevance, model)
    pixels = {**PIXELS, "guided backprop": (GuidedBackprop, {})} if isinstance(model.config, ResNetConfig) else PIXELS
    for key, (method, options) in pixels.items():
        methods[key] = functools.partial(attribute, model, method=method, **options)
    methods["occlusion"] = functools.partial(occlude, model)
    methods["RISE"] = functools.partial(rise, model)
    methods["edges"] = lambda x, names: edge_maps(len(names), x)
    return methods


def faithfulness(model: torch.nn.Module, example: Example, heat: np.ndarray, seed: int = 0) -> dict[str, float]:
    """How much the score of an example's first category depends on what a map shows; the higher, the more.

    Args:
        model: a classification model.
        example: an `Example`.
        heat: the map of its first category, (height, width) in [0, 1].
        seed: of the order among equal values, and of the noise that ROAD adds to what it fills in.

    Returns:
        Two shares of the way from the picture's score down to that of a grey picture. "ROAD" (Rong et al., ICML 2022)
        is half the difference between what is lost without the map's top fifth and without all but it, "deletion"
        (RISE) what is lost on average while pixels turn grey in the map's order. Both are NaN where picture and grey
        score alike.
    """
    x, index = input_for(model, example.pixel_values), category_index(model, example.categories[0])
    scorer = LogitsModel(model)
    broken = heat + 1e-4 * np.random.default_rng(seed).random(heat.shape)  # ROAD removes all equal values at once
    broken = (broken / broken.max()).astype(np.float32)[None]
    target = category_targets(model, example.categories[:1])
    with frozen(scorer), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        full, grey = (scorer(picture)[0, index].item() for picture in (x, torch.zeros_like(x)))
        single, as_single = x.float(), lambda pictures: scorer(pictures.to(x))  # ROAD works in single precision
        most = ROADMostRelevantFirst(80)(single, broken, target, as_single)[0]
        least = ROADLeastRelevantFirst(20)(single, broken, target, as_single)[0]
        deletion, _ = perturbation_curves(lambda pictures: scorer(pictures)[:, index], x, heat, baseline=0, seed=seed)
    way = full - grey or np.nan
    return {"ROAD": (least - most) / 2 / way, "deletion": (full - deletion.mean()) / way}


def effects_of_hiding(model: torch.nn.Module, processor: Any, n: int, split: str = "test") -> pd.DataFrame:
    """Does the model look at the objects? How far the score of each object's category falls when the object is hidden.

    Args:
        model, processor: a classifier, as `checkpoints.load` gives them.
        n, split: the scenes, with two objects each: those of `checkpoints.examples`.

    Returns:
        A pandas DataFrame with the index levels "scene" and "category" and two columns, in the units of the model's
        scores. "left out": the score for the picture less that for the picture in which the object was never pasted;
        "blurred": the same for the picture with `scoring.blurred_away` in the object's place.
    """
    whole = examples(model, processor, n, split)
    left_out = [examples(model, processor, n, split, leave_out=k) for k in (0, 1)]
    scorer, rows, index = LogitsModel(model), [], []
    for number, (example, *others) in enumerate(zip(whole, *left_out, strict=True)):
        x = example.pixel_values
        pictures = [x, *(other.pixel_values for other in others), *(blurred_away(x, mask) for mask in example.masks)]
        with frozen(scorer), torch.no_grad():
            scores = scorer(torch.cat([input_for(model, picture) for picture in pictures])).float()
        for k, category in enumerate(example.categories):
            column = scores[:, category_index(model, category)]
            rows.append([(column[0] - column[place]).item() for place in (1 + k, 3 + k)])
            index.append((number, category))
    names = ["scene", "category"]
    return pd.DataFrame(rows, pd.MultiIndex.from_tuples(index, names=names), ["left out", "blurred"], dtype=float)


def hiding_matters(falls: pd.DataFrame | pd.Series, share: float = 0.2) -> pd.DataFrame | pd.Series:
    """For which objects hiding matters: the score falls by at least a fifth of what it falls by in the median.

    Args:
        falls: what `effects_of_hiding` returned, or a column of it.
        share: another share of the median.

    Returns:
        The same with True and False. A map can't be right about an object that the model does not use.
    """
    return falls >= share * falls.median()


def measure(
    model: torch.nn.Module,
    methods: dict[str, Callable],
    examples: Sequence[Example],
    n_faithful: int = 0,
    seed: int = 0,
    matters: pd.Series | None = None,
) -> pd.DataFrame:
    """Score methods map by map.

    Args:
        model, methods: as `methods_for` has them.
        examples: `Example` objects with at least two objects each.
        n_faithful: in how many of them `faithfulness` is measured, for the first category; else it is NaN.
        seed: of RandomCAM.
        matters: for which of the examples' objects `hiding_matters`, with the index levels "scene" and "category".

    Returns:
        What `scoring.score_maps` returns, with the baselines, and beside it the columns of `faithfulness` and
        "pointing where hiding matters", which is NaN for the other objects, and without `matters` for all.
    """
    kept: dict[str, list[np.ndarray]] = {}

    def keep(key, method):
        def kept_method(x, names):
            maps = method(x, names)
            kept.setdefault(key, []).append(maps[0])
            return maps

        return kept_method

    height, width = examples[0].pixel_values.shape[2:]
    state = np.random.get_state()
    try:
        np.random.seed(seed)  # RandomCAM draws from numpy's global generator
        scores = score_maps({key: keep(key, method) for key, method in methods.items()}, examples)
    finally:
        np.random.set_state(state)
    kept["centre dot"] = [centre_dots(1, height, width)[0]] * len(examples)
    kept["random map"] = [random_maps(1, height, width, seed=i)[0] for i in range(len(examples))]
    rows = {
        (key, i, example.categories[0]): faithfulness(model, example, maps[i], seed=i)
        for key, maps in kept.items()
        for i, example in enumerate(examples[:n_faithful])
    }
    found = pd.DataFrame.from_dict(rows, orient="index", columns=["ROAD", "deletion"], dtype=float)
    if rows:
        found.index = pd.MultiIndex.from_tuples(found.index, names=scores.index.names)
    matters = pd.Series(dtype=bool) if matters is None else matters
    counts = [matters.get((scene, category), False) for _, scene, category in scores.index]
    scores[WHERE_HIDING_MATTERS] = scores["pointing"].where(counts)
    return scores.join(found.reindex(scores.index))


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """The mean of each score over scenes, with its 95 % `bootstrap_interval`.

    Args:
        scores: what `measure` returned.

    Returns:
        A pandas DataFrame with the columns "method", "score", "mean", "from", "to" and "scenes", how many it is over.
    """
    by_scene = scores[SCORES].groupby(["method", "scene"], sort=False).mean()
    rows = []
    for method, of_method in by_scene.groupby("method", sort=False):
        for score, values in of_method.items():
            values = values.dropna()
            if len(values):
                rows.append((method, score, values.mean(), *bootstrap_interval(values), len(values)))
    return pd.DataFrame(rows, columns=["method", "score", "mean", "from", "to", "scenes"])


def results() -> pd.DataFrame:
    """The full table: what `summarise` returns for each of `MODELS`, with a column "model" in front.

    Returns:
        A pandas DataFrame; its `attrs["made"]` says when, and by which command.
    """
    table = pd.read_csv(RESULTS, comment="#")
    table.attrs["made"] = RESULTS.read_text().splitlines()[0].removeprefix("# ")
    return table
