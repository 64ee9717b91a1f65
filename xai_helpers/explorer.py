"""The explorer: two maps of one picture side by side, each with a method, its main setting, and its scores.

    explorer()

shows it in a notebook. The book's page of the same name is prepared with the same functions.
"""

import base64
import contextlib
import functools
import html
import io
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torchvision.transforms.functional import gaussian_blur

from xai_helpers.attribution import attribute, occlude, rise
from xai_helpers.checkpoints import CHECKPOINTS, as_example, load, scene_categories
from xai_helpers.layers import TargetLayer, find_target_layers
from xai_helpers.leaderboard import CAMS, PIXELS, methods_for
from xai_helpers.pictures import read_picture
from xai_helpers.plots import outline, overlay
from xai_helpers.recipes import RECIPES
from xai_helpers.reshape import layer_to_map
from xai_helpers.scenes import PHOTOS, Scene, as_seen, make_scene, natural, with_article
from xai_helpers.scoring import Example, energy_inside, hits, resize_masks
from xai_helpers.wrappers import category_index, device_of, frozen, input_for, top_categories

if TYPE_CHECKING:  # imported late below
    import ipywidgets

#: What is there to choose from, if no model is given.
MODELS = ["resnet", "vit", "swin", "convnext"]
#: Seed and objects of each scene. Only objects that the published checkpoints know, too.
SCENES = [(19, ["cat", "coffee cup"]), (1, ["flower", "motorcycle"]), (5, ["cat", "rocket"])]
SIDE = 320  # of a picture that is shown, in pixels
FULL_AT = 0.99  # the quantile of a map that has the full colour, so that maps of single pixels can be seen
CATEGORIES = 4  # asked for where a picture has no known answer
EARLIER_LAYERS = 2

NOTHING = "nothing to set"
WINDOWS = {"half of the side": 2, "a quarter": 4, "an eighth": 8}
NOISE = {"0.1": 0.1, "0.3": 0.3, "1.0": 1.0}
MASKS = {"25": 25, "200": 200, "800": 800}


@dataclass(frozen=True)
class Method:
    """A method and what can be set about it.

    Attributes:
        parameter: what is set, such as "baseline"; None if there is nothing to set.
        settings: value -> function (pixel_values, categories) -> maps.
        default: one of the values.
    """

    parameter: str | None
    settings: dict[str, Callable]
    default: str

    def words(self, name: str, setting: str) -> str:
        """The method's name with its setting, such as "RISE (masks: 200)"."""
        return f"{name} ({self.parameter}: {setting})" if self.parameter else name


@dataclass(frozen=True)
class View:
    """A map as it is shown.

    Attributes:
        picture: the map over the picture, a PIL image, with the outline of the answer and a cross at the maximum.
        hit: whether the maximum lies on the object; None without a known answer.
        inside: the share of the map inside the object, in [0, 1]; None without a known answer.
    """

    picture: Image.Image
    hit: bool | None
    inside: float | None

    @property
    def verdict(self) -> str:
        """The scores in words, as the titles of the book's figures have them."""
        return "no known answer" if self.hit is None else f"{'hit' if self.hit else 'miss'}, {self.inside:.0%} inside"


@functools.cache
def pictures() -> dict[str, Scene]:
    """The pictures to choose from: name -> `Scene`. Scenes with two objects, and the photos that they are made of."""
    scenes = [make_scene(seed, objects) for seed, objects in SCENES]
    photos = [natural(name) for name in PHOTOS]
    kinds = ["Scene"] * len(scenes) + ["Photo"] * len(photos)
    return {
        f"{kind}: {' and '.join(map(with_article, scene.categories))}": scene
        for kind, scene in zip(kinds, scenes + photos, strict=True)
    }


def as_question(scene: Scene, model: Any, processor: Any, categories: Sequence[str] | None = None) -> Example:
    """A picture as a model gets it, and what to ask about it.

    Args:
        scene: a `Scene`. Its picture may be of any mode.
        model, processor: as `checkpoints.load` gives them.
        categories: names of the model's. None: those objects of the scene that the model knows, with their answers;
            if there is none, the categories to which the model gives the highest scores.

    Returns:
        An `Example`; its masks are None where the answer is not known.

    Raises:
        ValueError: the model has no such category, or there is none to ask for.
    """
    if categories is not None and not len(categories):
        raise ValueError("categories are a list of at least one name; leave them out to ask for those of the picture.")
    scene = replace(scene, image=read_picture(scene.image))
    if categories is None:
        known = [i for i, name in enumerate(scene.categories) if name in scene_categories(model)]
        if known:
            names = [scene.categories[i] for i in known]
            return as_example(Scene(scene.image, names, scene.masks[known]), model, processor)
    image = as_seen(scene, processor).image
    pixel_values = processor(images=scene.image, return_tensors="pt")["pixel_values"]
    pixel_values = pixel_values.to(device_of(model))
    if categories is None:
        names = top_categories(model, pixel_values, min(CATEGORIES, len(model.config.id2label))).index
    else:
        names = [model.config.id2label[category_index(model, name)] for name in categories]
    return Example(pixel_values, list(names), None, image)  # type: ignore[arg-type]  # no answers are known


def cam_layers(model: Any, pixel_values: torch.Tensor) -> dict[str, TargetLayer]:
    """Layers at which CAMs can be made, by a label with path and grid.

    The first is the one to begin with: that of the family's recipe, if it has one. Then come the one that
    `find_target_layers` chooses, and the latest ones of finer grids; in a model that keeps its grid, the layer before.
    """
    report = find_target_layers(model, pixel_values)
    family = getattr(model.config, "model_type", None)
    best = RECIPES[family].cam(model, pixel_values) if family in RECIPES else report.cam
    grid, last = _grid(model, best, pixel_values), _grid(model, report.cam, pixel_values)
    grids = {c.path: c.grid for c in report.candidates if not c.begins_branch}
    whole = {path: found for path, found in reversed(report.sweep.items()) if path in grids}
    before = list(itertools.takewhile(lambda path: path != best.path, whole))
    finer = {grids[path]: path for path in before if np.prod(grids[path]) > np.prod(grid)}
    earlier = list(finer.values())[-EARLIER_LAYERS:] or before[-1:]
    layers = {_label(best.path, grid): best, _label(report.cam.path, last): report.cam}
    for path in reversed(earlier):
        layers[_label(path, grids[path])] = whole[path]
    return layers


def _grid(model, layer, pixel_values):
    """Rows and columns of a layer's map."""
    found = []
    with layer.module.register_forward_hook(lambda module, inputs, output: found.append(output)):
        with frozen(model), torch.no_grad():
            model(input_for(model, pixel_values, coarse=True))
    return tuple(layer_to_map(found[0], layer.reshape_transform, layer.path).shape[2:])


def _label(path, grid):
    return f"{path.partition('.')[2] or path}, {grid[0]} × {grid[1]}"


def methods_with_settings(model: Any, processor: Any, pixel_values: torch.Tensor) -> dict[str, Method]:
    """All methods that can explain a model, with what can be set about them: name -> `Method`.

    Args:
        model, processor: as `checkpoints.load` gives them, for a classification model.
        pixel_values: a picture, whose size the others have, too.
    """
    by_layer = {
        label: methods_for(None, model, pixel_values, layer) for label, layer in cam_layers(model, pixel_values).items()
    }
    first = next(iter(by_layer))
    methods = {}
    for name, function in by_layer[first].items():
        if name in CAMS:
            methods[name] = Method("layer", {label: found[name] for label, found in by_layer.items()}, first)
        else:
            methods[name] = Method(None, {NOTHING: function}, NOTHING)

    smooth, options = PIXELS["SmoothGrad"]
    methods["SmoothGrad"] = Method(
        "noise",
        {
            label: functools.partial(attribute, model, method=smooth, **options | {"stdevs": noise})
            for label, noise in NOISE.items()
        },
        "0.3",
    )
    methods["integrated gradients"] = Method("baseline", _baselines(model, processor), "grey")
    methods["occlusion"] = Method(
        "window",
        {label: functools.partial(_occlude, model, share=share) for label, share in WINDOWS.items()},
        "a quarter",
    )
    methods["RISE"] = Method(
        "masks", {label: functools.partial(rise, model, n_masks=n) for label, n in MASKS.items()}, "200"
    )
    return methods


def _baselines(model, processor):
    """Integrated gradients from several baselines: name -> function (pixel_values, categories) -> maps."""
    from captum.attr import IntegratedGradients

    def plain(pixel_values, level):
        picture = Image.new("RGB", (64, 64), (level, level, level))
        plain = processor(images=picture, return_tensors="pt")["pixel_values"].to(pixel_values.device)
        row, column = plain.shape[2] // 2, plain.shape[3] // 2
        return plain[..., row : row + 1, column : column + 1].expand_as(pixel_values)

    def blurred(pixel_values):
        sigma = max(pixel_values.shape[2:]) / 10
        return gaussian_blur(pixel_values, 2 * int(2 * sigma) + 1, sigma)

    made = {"grey": lambda x: plain(x, 128), "black": lambda x: plain(x, 0), "blurred picture": blurred}
    options = PIXELS["integrated gradients"][1]
    return {
        label: lambda x, names, baseline=baseline: attribute(
            model, x, names, method=IntegratedGradients, baselines=baseline(x), **options
        )
        for label, baseline in made.items()
    }


def _occlude(model, pixel_values, categories, share):
    """A window of a share of the longer side, as far as it fits, moved by an eighth of it whatever its size."""
    shorter, longer = sorted(pixel_values.shape[2:])
    window = max(1, min(longer // share, shorter))
    return occlude(model, pixel_values, categories, window=window, step=max(1, min(longer // 8, window)))


def make_maps(method: Method, setting: str, example: Example) -> np.ndarray:
    """The maps of all categories of an example, the same ones every time: (n_categories, height, width) in [0, 1].

    Args:
        method: a `Method`.
        setting: one of its settings.
        example: an `Example`.
    """
    with _same_numbers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the model cannot be forked")
        return method.settings[setting](example.pixel_values, example.categories)


@contextlib.contextmanager
def _same_numbers():
    """SmoothGrad draws from torch's global generator, RandomCAM from numpy's: both start anew, and are put back."""
    state = np.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            np.random.seed(0)
            yield
    finally:
        np.random.set_state(state)


def view(example: Example, index: int, heat: np.ndarray, side: int = SIDE) -> View:
    """A map over its picture, with its scores.

    Args:
        example: an `Example`, with an image.
        index: of the map's category.
        heat: the map, (height, width) in [0, 1].
        side: the longer side of the picture that is made.
    """
    assert example.image is not None
    image = shown(example.image, side)
    picture = Image.fromarray(overlay(image, heat, FULL_AT))
    hit = inside = None
    if example.masks is not None:
        answer = example.masks[index]
        picture = with_outline(picture, answer)
        hit, inside = bool(hits(heat[None], answer[None])[0]), float(energy_inside(heat[None], answer[None])[0])
    if heat.max() > 0:
        _cross(picture, heat)
    return View(picture, hit, inside)


def shown(image: Image.Image, side: int = SIDE) -> Image.Image:
    """A picture at the size in which it is shown: its longer side has `side` pixels, and the other one at least one."""
    factor = side / max(image.size)
    return image.resize([max(1, round(length * factor)) for length in image.size], Image.Resampling.LANCZOS)


def with_outline(picture: Image.Image, answer: np.ndarray) -> Image.Image:
    """A picture with the outline of a mask, bool (height, width) at any resolution."""
    packed = np.packbits(answer).tobytes()
    return Image.alpha_composite(picture.convert("RGBA"), _outline(packed, answer.shape, picture.size)).convert("RGB")


@functools.lru_cache(64)
def _outline(packed, shape, size):
    """The outline of a mask that was packed into bytes: RGBA, transparent elsewhere."""
    answer = np.unpackbits(np.frombuffer(packed, np.uint8), count=shape[0] * shape[1]).reshape(shape).astype(bool)
    figure = Figure(figsize=(size[0] / 80, size[1] / 80), dpi=80, layout="none")
    canvas = FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.axis("off")
    outline(ax, answer, Image.new("1", size))
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).resize(size)


def peak(heat: np.ndarray) -> tuple[float, float]:
    """Where a map has its maximum, as shares of its width and height; of several, the one nearest to their middle."""
    peaks = np.argwhere(heat == heat.max())
    row, column = peaks[np.square(peaks - peaks.mean(axis=0)).sum(axis=1).argmin()]
    return (column + 0.5) / heat.shape[1], (row + 0.5) / heat.shape[0]


def _cross(picture, heat):
    """Marks the maximum of a map."""
    x, y = np.multiply(peak(heat), picture.size)
    draw, arm = ImageDraw.Draw(picture), max(4, max(picture.size) // 32)
    for reach, width, colour in ((arm + 2, 7, "white"), (arm, 3, "black")):
        draw.line((x - reach, y, x + reach, y), colour, width)
        draw.line((x, y - reach, x, y + reach), colour, width)


def explorer(
    model: torch.nn.Module | str | None = None,
    processor: Any = None,
    image: str | Path | Image.Image | Scene | None = None,
    categories: Sequence[str] | None = None,
) -> "ipywidgets.VBox":
    """Shows two maps of one picture side by side; picture, model, category, methods and settings can be chosen.

        explorer()                                   the book's pictures and models
        explorer(image="my_photo.jpg")               a picture of your own
        explorer(my_model, my_processor)             a model of your own

    Maps are made when they are asked for, for all categories of a picture at once, and kept. The models are left as
    they were.

    Args:
        model: a transformers model for image classification, or a name as in `checkpoints.load`. None: `MODELS`.
        processor: the processor of a model of your own.
        image: a path, a PIL image of any mode, or a `Scene`, whose masks are then the known answers. None: scenes and
            photos with known answers.
        categories: with a picture of your own, what to ask for: names of the model's categories. None: those of the
            `Scene`, or the ones to which the model gives the highest scores.

    Returns:
        A VBox of ipywidgets, which a notebook shows.

    Raises:
        ValueError: a model without its processor or without `config.id2label`, a picture that cannot be read, a
            category that the model does not have, or an empty list of them.
        ImportError: ipywidgets is not installed.
    """
    return _Explorer(_models(model, processor), _scenes(image, categories), categories).box


def _models(model, processor):
    """Name -> function that gives model and processor."""
    if model is None and processor is None:
        return {name: functools.partial(load, name) for name in MODELS}
    if isinstance(model, str) and processor is None:
        classifiers = [name for name, one in CHECKPOINTS.items() if one.task == "classification"]
        if model not in classifiers:
            raise ValueError(f"There is no classifier {model!r}. There are: {', '.join(classifiers)}.")
        return {model: functools.partial(load, model)}
    if not isinstance(model, torch.nn.Module) or processor is None:
        raise ValueError(
            "A model of your own comes with its processor: explorer(model, processor). For one of the book's, give its "
            f"name alone, such as explorer({MODELS[0]!r})."
        )
    if not getattr(getattr(model, "config", None), "id2label", None):
        raise ValueError(
            f"{type(model).__name__} has no config.id2label, so its categories have no names: a classification model "
            "of transformers has one."
        )
    return {type(model).__name__: lambda: (model, processor)}


def _scenes(image, categories):
    """Name -> `Scene`."""
    if image is None:
        if categories is not None:
            raise ValueError("categories go with a picture of your own: explorer(image=..., categories=[...]).")
        return pictures()
    if isinstance(categories, str):
        raise ValueError(f"categories are a list of names: [{categories!r}].")
    if isinstance(image, Scene):
        return {"your picture": image}
    image = read_picture(image)
    return {"your picture": Scene(image, [], np.zeros((0, image.height, image.width), bool))}


class _Panel:
    """One of the two maps: the choice of a method and of its setting, and what is shown."""

    def __init__(self, widgets, title):
        self.method = widgets.Dropdown(description="method", layout=widgets.Layout(width="auto"))
        self.setting = widgets.Dropdown(description="setting", layout=widgets.Layout(width="auto"))
        self.shown = widgets.HTML()
        layout = widgets.Layout(width="360px", margin="0 12px 0 0")
        self.box = widgets.VBox([widgets.HTML(f"<b>{title}</b>"), self.method, self.setting, self.shown], layout=layout)


class _Explorer:
    """The widgets, and what keeps them in step."""

    def __init__(self, models, scenes, categories=None):
        import ipywidgets as widgets

        self.models, self.scenes, self.asked = models, scenes, categories
        self.picture = widgets.Dropdown(description="picture", options=list(scenes), layout={"width": "330px"})
        self.model = widgets.Dropdown(description="model", options=list(models), layout={"width": "190px"})
        self.category = widgets.Dropdown(description="category", layout={"width": "210px"})
        self.panels = [_Panel(widgets, "Map A"), _Panel(widgets, "Map B")]
        wrap = {"flex_flow": "row wrap"}
        self.box = widgets.VBox(
            [
                widgets.HBox([self.picture, self.model, self.category], layout=wrap),
                widgets.HBox([panel.box for panel in self.panels], layout=wrap),
                widgets.HTML("White line: the known answer. Cross: the map's maximum; a map without one is zero."),
            ]
        )
        self.loaded, self.questions, self.methods, self.maps = {}, {}, {}, {}
        self.busy = False
        self.refresh(first=True)
        for control in self.controls():
            control.observe(self.changed, names="value")

    def controls(self):
        return [self.picture, self.model, self.category] + [c for p in self.panels for c in (p.method, p.setting)]

    def changed(self, change):
        """A control has a new value. What goes wrong is shown, since a notebook shows no error of a widget."""
        if self.busy:  # it was set by `refresh`
            return
        self.busy = True
        try:
            self.refresh()
        except Exception as error:
            for panel in self.panels:
                panel.shown.value = _failed(error)
        finally:
            self.busy = False

    def refresh(self, first=False):
        """Brings choices and maps in step with picture and model."""
        model, processor = _kept(self.loaded, self.model.value, self.models[self.model.value])
        key = self.model.value, self.picture.value
        question = _kept(
            self.questions, key, lambda: as_question(self.scenes[self.picture.value], model, processor, self.asked)
        )
        shape = self.model.value, tuple(question.pixel_values.shape)
        methods = _kept(self.methods, shape, lambda: methods_with_settings(model, processor, question.pixel_values))
        _offer(self.category, question.categories, question.categories[0])
        for panel, start in zip(self.panels, ("Grad-CAM", "integrated gradients"), strict=True):
            _offer(panel.method, methods, start)
            method = methods[panel.method.value]
            _offer(panel.setting, method.settings, method.default)
            panel.setting.description = method.parameter or "setting"
            panel.setting.disabled = len(method.settings) < 2
            try:
                panel.shown.value = self.show(key, question, method, panel)
            except Exception as error:
                if first:
                    raise
                panel.shown.value = _failed(error)

    def show(self, key, question, method, panel):
        """A panel's map with its scores, as HTML."""
        choice = (*key, panel.method.value, panel.setting.value)
        if choice not in self.maps:
            panel.shown.value = "<p>being made ...</p>"
        maps = _kept(self.maps, choice, lambda: make_maps(method, panel.setting.value, question))
        seen = view(question, self.category.index, maps[self.category.index])
        file = io.BytesIO()
        seen.picture.save(file, "PNG")
        words = method.words(panel.method.value, panel.setting.value)
        alt = f"{words} of {self.model.value} for {self.category.value}: {seen.verdict}"
        source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        even = ""
        if question.masks is not None:
            even = f" (an even map: {covers(question, self.category.index):.0%})"
        return (
            f'<img src="{source}" alt="{html.escape(alt)}" style="max-width: 100%">'
            f'<p style="line-height: 1.4"><b>{seen.verdict}</b>{even}</p>'
        )


def covers(example: Example, index: int) -> float:
    """The share of the picture that an object covers: what an even map would have inside."""
    return float(resize_masks(example.masks, *example.pixel_values.shape[2:])[index].mean())


def _kept(store, key, make):
    if key not in store:
        store[key] = make()
    return store[key]


def _offer(control, values, default):
    """Gives a dropdown its values. What was chosen stays chosen, where it is still among them."""
    values = tuple(values)
    if control.options != values:
        chosen = control.value if control.value in values else default
        control.options = values
        control.value = chosen


def _failed(error):
    return f"<p><b>This cannot be shown.</b> {html.escape(f'{type(error).__name__}: {error}')}</p>"
