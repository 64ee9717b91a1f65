"""Which method points where, on which model: the same test scenes for all, beside baselines that know nothing.

`python -m benchmarks.known_answers` writes the full table, `results()` reads it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_grad_cam as grad_cam
import torch
from captum.attr import GuidedBackprop, InputXGradient, IntegratedGradients, NoiseTunnel, Saliency
from pytorch_grad_cam.metrics.road import ROADLeastRelevantFirst, ROADMostRelevantFirst
from sklearn.metrics import average_precision_score
from transformers import ResNetConfig

from xai_helpers.attention import relevance, rollout
from xai_helpers.attribution import attribute, occlude, rise
from xai_helpers.cam import explain
from xai_helpers.checkpoints import CHECKPOINTS, examples, load, names_of
from xai_helpers.layers import TargetLayer, find_target_layers
from xai_helpers.recipes import RECIPES
from xai_helpers.scenes import labels, with_article
from xai_helpers.scoring import (
    Example,
    behind_best,
    blurred_away,
    bootstrap_interval,
    centre_dots,
    edge_maps,
    perturbation_curves,
    random_maps,
    resize_masks,
    score_maps,
    wilson_interval,
)
from xai_helpers.wrappers import LogitsModel, PromptClassifier, category_index, category_targets, frozen, input_for

RESULTS = Path(__file__).with_name("known_answers.csv")
HUB_RESULTS = Path(__file__).with_name("hub_results.csv")
MODELS = names_of("classification", "imagenet", "prompts")
WHERE_HIDING_MATTERS = "pointing where hiding matters"
#: The higher, the better, against the known answer.
ON_ANSWERS = ["pointing", WHERE_HIDING_MATTERS, "energy", "average precision"]
SCORES = [*ON_ANSWERS, "on the other", "ROAD", "deletion", "seconds"]

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
_INTEGRATED: dict[str, Any] = {"n_steps": 32, "internal_batch_size": 32}
#: Captum's, each with the options of `attribute`. Those with signs are there as absolute values and as what speaks for
#: the category, which is what CAMs, occlusion and RISE show.
PIXELS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "gradient": (Saliency, {}),
    "input x gradient": (InputXGradient, {}),
    "input x gradient, positive": (InputXGradient, {"sign": "positive"}),
    "SmoothGrad": (
        lambda net: NoiseTunnel(Saliency(net)),
        {"nt_samples": 16, "nt_samples_batch_size": 16, "stdevs": 0.3, "abs": False},
    ),
    "integrated gradients": (IntegratedGradients, _INTEGRATED),
    "integrated gradients, positive": (IntegratedGradients, _INTEGRATED | {"sign": "positive"}),
}
#: Methods that take many times as long as Grad-CAM.
SLOW = ["Ablation-CAM", "Score-CAM", "FullGrad", "SmoothGrad", *(name for name in PIXELS if "integrated" in name)]
SLOW += ["occlusion", "RISE"]
BASELINES = ["random map", "centre dot", "edges", "RandomCAM"]


def classifier(name: str, device: torch.device | str | None = None) -> tuple[Any, Any]:
    """One of `MODELS`, or one with a fault, bundled, with its processor.

    A CLIP becomes a `PromptClassifier` with a prompt for each category of the scenes. Its scores are contrasts: the
    similarity to a prompt less the mean over all of them.
    """
    model, processor = load(name, "bundled", device)
    if CHECKPOINTS[name].task == "prompts":
        prompts = {label: f"a photo of {with_article(label)}" for label in labels()}
        model = PromptClassifier(model, processor, prompts, scores="contrast")
    return model, processor


def _family(name):
    """The family to which a model with a fault belongs; else its own name."""
    return CHECKPOINTS[name].fault_of or name


def layers_to_try(name: str, model: Any, pixel_values: torch.Tensor) -> dict[str, TargetLayer]:
    """Layers worth a sweep: those of the family's recipe; else the last five, without branches, that are found."""
    if recipe := RECIPES.get(_family(name)):
        return recipe.sweep(model, pixel_values)
    report = find_target_layers(model, pixel_values)
    branches = {candidate.path for candidate in report.candidates if candidate.begins_branch}
    return dict([(path, layer) for path, layer in report.sweep.items() if path not in branches][:5])


def best_layers(model: Any, layers: Mapping[str, TargetLayer], validation: Sequence[Example]) -> dict[str, str]:
    """The layer at which each of the `CAMS` does best, by the sum of pointing and energy: CAM -> a name in layers.

    RandomCAM, a baseline, is made at Grad-CAM's.
    """
    best = {}
    for cam, method in CAMS.items():
        if cam != "RandomCAM":
            at = {
                path: functools.partial(explain, model, target_layer=layer, method=method)
                for path, layer in layers.items()
            }
            scores = score_maps(at, validation).groupby("method").mean().loc[list(layers)]
            best[cam] = (scores["pointing"] + scores["energy"]).idxmax()
    return best | {"RandomCAM": best["Grad-CAM"]}


def layers_on_board(name: str, model: Any, pixel_values: torch.Tensor) -> dict[str, TargetLayer]:
    """At which layer each CAM was made for the full table: CAM -> `TargetLayer`."""
    table, layers = results(), layers_to_try(name, model, pixel_values)
    made = table[(table["model"] == _family(name)) & table["layer"].notna()].groupby("method")["layer"].first()
    return {cam: layers[path] for cam, path in made.items() if cam in CAMS}


def methods_for(
    name: str | None,
    model: Any,
    pixel_values: torch.Tensor,
    layer: TargetLayer | Mapping[str, TargetLayer] | None = None,
) -> dict[str, Callable]:
    """All methods that can explain a model: name -> function (pixel_values, categories) -> maps.

    Args:
        name, model: one of `MODELS`, or one with a fault, as `classifier` gives it.
        pixel_values: a picture, whose size the others have, too.
        layer: where the CAMs are made, all of them or each of the `CAMS` by its name. None: at the layer of the
            family's recipe. With a layer, the name is not used.
    """
    if layer is None:
        layer = RECIPES[_family(name)].cam(model, pixel_values)
    layers = layer if isinstance(layer, Mapping) else dict.fromkeys(CAMS, layer)
    methods: dict[str, Callable] = {"balanced gradients": functools.partial(explain, model)}
    for key, cam in CAMS.items():
        methods[key] = functools.partial(explain, model, target_layer=layers[key], method=cam)
    if isinstance(model.config, ResNetConfig):
        methods["FullGrad"] = functools.partial(
            explain, model, target_layer=layers["Grad-CAM"], method=grad_cam.FullGrad
        )
    if hasattr(model, "vit"):
        methods["rollout"] = lambda x, names: np.repeat(rollout(model, x), len(names), axis=0)
    if hasattr(model, "vit") or isinstance(model, PromptClassifier):
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
        What `scoring.score_maps` returns, with the baselines, and beside it: the columns of `faithfulness`; "pointing
        where hiding matters", which is NaN for the other objects, and without `matters` for all; "average precision" of
        the map's pixels, as to whether they are in the object, which depends on their order alone.
    """
    kept: dict[str, list[np.ndarray]] = {}

    def keep(key, method):
        def kept_method(x, names):
            maps = method(x, names)
            kept.setdefault(key, []).append(maps)
            return maps

        return kept_method

    height, width = examples[0].pixel_values.shape[2:]
    state = np.random.get_state()
    try:
        np.random.seed(seed)  # RandomCAM draws from numpy's global generator
        scores = score_maps({key: keep(key, method) for key, method in methods.items()}, examples)
    finally:
        np.random.set_state(state)
    counts = [len(example.categories) for example in examples]
    kept["centre dot"] = [centre_dots(n, height, width) for n in counts]
    kept["random map"] = [random_maps(n, height, width, seed=i) for i, n in enumerate(counts)]
    rows, precision = {}, {}
    for key, maps in kept.items():
        for i, (example, of_scene) in enumerate(zip(examples, maps, strict=True)):
            answers = resize_masks(example.masks, height, width)
            for category, heat, answer in zip(example.categories, of_scene, answers, strict=True):
                precision[key, i, category] = average_precision_score(answer.ravel(), heat.ravel())
            if i < n_faithful:
                rows[key, i, example.categories[0]] = faithfulness(model, example, of_scene[0], seed=i)
    found = pd.DataFrame.from_dict(rows, orient="index", columns=["ROAD", "deletion"], dtype=float)
    if rows:
        found.index = pd.MultiIndex.from_tuples(found.index, names=scores.index.names)
    matters = pd.Series(dtype=bool) if matters is None else matters
    where = [matters.get((scene, category), False) for _, scene, category in scores.index]
    scores[WHERE_HIDING_MATTERS] = scores["pointing"].where(where)
    scores["average precision"] = [precision[key] for key in scores.index]
    return scores.join(found.reindex(scores.index))


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """The mean of each score over scenes, how sure it is, and how far it is behind the best method's.

    Args:
        scores: what `measure` returned.

    Returns:
        A pandas DataFrame with the columns "method", "score", "mean"; "from" and "to", the ends of its 95 %
        `bootstrap_interval` (of the `wilson_interval` over scenes, if every map points, or none does); "scenes", how
        many it is over; and for scores against the known answer "behind", "behind from", "behind to": what
        `scoring.behind_best` says on the scenes that all methods had. With "behind from" at most 0, the scenes can't
        tell the method from the best one.
    """
    by_scene = scores[SCORES].groupby(["method", "scene"], sort=False).mean()
    rows = []
    for method, of_method in by_scene.groupby("method", sort=False):
        for score, values in of_method.items():
            values = values.dropna()
            if len(values):
                mean, n = values.mean(), len(values)
                is_share = score == "on the other" or str(score).startswith("pointing")
                interval = wilson_interval(mean, n) if is_share and mean in (0, 1) else bootstrap_interval(values)
                rows.append((method, score, mean, *interval, n))
    table = pd.DataFrame(rows, columns=["method", "score", "mean", "from", "to", "scenes"])
    behind = []
    for score in ON_ANSWERS:
        if scores[score].notna().any():
            gaps = behind_best(scores, scores.index.unique("method"), score)[["behind", "from", "to"]]
            gaps = gaps.set_axis(["behind", "behind from", "behind to"], axis=1).rename_axis("method")
            behind.append(gaps.assign(score=score).reset_index())
    return table.merge(pd.concat(behind), how="left", on=["method", "score"]) if behind else table


def results() -> pd.DataFrame:
    """The full table: what `summarise` returns for each of `MODELS`, with a column "model" in front.

    Returns:
        A pandas DataFrame, with a last column "layer", at which a CAM was made; its `attrs["made"]` says when it was
        made, and by which command.
    """
    table = pd.read_csv(RESULTS, comment="#")
    table.attrs["made"] = RESULTS.read_text().splitlines()[0].removeprefix("# ")
    return table


def on_the_hub(name: str, path: Path = HUB_RESULTS) -> str:
    """What the maps of a family's published checkpoint scored, in words.

    Args:
        name: one of `RECIPES`.
        path: the table, which `python -m benchmarks.hub` writes.

    Returns:
        A line that says which checkpoint it was, and when, and a line a method; or that nobody has measured it yet.

    Raises:
        ValueError: there is no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; the recipes are: {', '.join(RECIPES)}")
    table = pd.read_csv(path)
    table = table[table["model"] == name]
    if table.empty:
        return f"published weights, {CHECKPOINTS[name].hub}: not measured yet"
    first = table.iloc[0]
    about = f"published weights, {first['checkpoint']}: {first['scenes']} scenes, {first['made']}, {first['device']}"
    width = table["method"].str.len().max()
    rows = (
        f"  {row['method']:{width}}  pointing {row['pointing']:.2f}, energy {row['energy']:.2f}, "
        f"on the other {row['on the other']:.2f}"
        for _, row in table.iterrows()
    )
    return "\n".join([about, *rows])
