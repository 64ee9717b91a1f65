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
from xai_helpers.recipes import RECIPES
from xai_helpers.reshape import tokens_to_map
from xai_helpers.scoring import (
    Example,
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
SCORES = ["pointing", "energy", "on the other", "ROAD", "deletion", "seconds"]

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


def target_layer(name: str, model: Any, pixel_values: torch.Tensor) -> tuple[torch.nn.Module, Callable | None]:
    """The layer at which a family's CAMs are made: that of its recipe, or the better one that its chapter found.

    Returns:
        (module, reshape_transform)
    """
    if name == "swin":
        stride = model.config.patch_size * 2 ** (len(model.config.depths) - 1)
        height, width = pixel_values.shape[2:]
        grid = height // stride, width // stride
        norm = model.swin.encoder.layers[-1].blocks[0].layernorm_before
        return norm, functools.partial(tokens_to_map, grid=grid, prefix=0)
    layer = RECIPES[name.removesuffix("-shortcut")].cam(model, pixel_values)
    return layer.module, layer.reshape_transform


def methods_for(
    name: str | None, model: Any, pixel_values: torch.Tensor, layer: tuple | None = None
) -> dict[str, Callable]:
    """All methods that can explain a model: name -> function (pixel_values, categories) -> maps.

    Args:
        name, model: as for `checkpoints.load`, of one of `MODELS`, or "resnet-shortcut".
        pixel_values: a picture, whose size the others have, too.
        layer: where the CAMs are made, (module, reshape_transform). None: at the `target_layer` of the family; with a
            layer of your own, the name is not used.
    """
    module, reshape_transform = layer or target_layer(str(name), model, pixel_values)
    methods: dict[str, Callable] = {
        key: functools.partial(explain, model, target_layer=module, reshape_transform=reshape_transform, method=cam)
        for key, cam in CAMS.items()
    }
    if isinstance(model.config, ResNetConfig):
        methods["FullGrad"] = functools.partial(explain, model, target_layer=module, method=grad_cam.FullGrad)
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


def measure(
    model: torch.nn.Module,
    methods: dict[str, Callable],
    examples: Sequence[Example],
    n_faithful: int = 0,
    seed: int = 0,
) -> pd.DataFrame:
    """Score methods map by map.

    Args:
        model, methods: as `methods_for` has them.
        examples: `Example` objects with at least two objects each.
        n_faithful: in how many of them `faithfulness` is measured, for the first category; else it is NaN.
        seed: of RandomCAM.

    Returns:
        What `scoring.score_maps` returns, with the baselines, and the columns of `faithfulness` beside.
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
