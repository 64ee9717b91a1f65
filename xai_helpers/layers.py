"""Which layer to explain: finds it in a model that nobody described, and shows what layers put out."""

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from xai_helpers.cuts import tensor_in
from xai_helpers.reshape import channels_last_to_map, layer_to_map, tokens_to_map
from xai_helpers.wrappers import LogitsModel, category_targets, frozen, input_for, layer_path

if TYPE_CHECKING:  # imported late below: only tables need it
    import pandas as pd

PATCHES = [(0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)]  # centres (y, x) as shares of the sides
PATCH_SIDE = 1 / 3
DRAWS = 2  # of noise for each patch
MOST_PREFIX_TOKENS = 16
MOST_NORMS = 3
SHOWN_ROWS = 12

NO_GRADIENT = (
    "the scores have no gradient: something between the image and the scores cuts them off, such as torch.no_grad(), "
    ".detach() or whole numbers; explain a model through which gradients flow"
)
ZERO_GRADIENT = (
    "the gradient of the scores is zero everywhere, as in an untrained model whose head starts at zero: load trained "
    "weights, or give the head's weight random values"
)


@dataclass(frozen=True)
class TargetLayer:
    """A layer to explain, as `explain` and `factorize` take it.

    Attributes:
        module: returns a tensor.
        path: its dotted name in the model.
        reshape_transform: turns its output into (batch, channels, height, width); None if it has that shape.
    """

    module: torch.nn.Module
    path: str
    reshape_transform: Callable[[torch.Tensor], torch.Tensor] | None


def modules_and_transform(
    target_layer: Any, reshape_transform: Callable | None = None
) -> tuple[list[torch.nn.Module], Callable | None]:
    """One or several target layers, each a module or a `TargetLayer`, as modules and the reshape transform of them all.

    What is neither is passed on, for the caller to name.

    Raises:
        ValueError: a reshape transform beside a `TargetLayer`, which has its own, or layers with different ones.
    """
    layers = list(target_layer) if isinstance(target_layer, (list, tuple)) else [target_layer]
    described = [layer for layer in layers if isinstance(layer, TargetLayer)]
    if not described:
        return layers, reshape_transform
    if reshape_transform is not None:
        raise ValueError(f"the TargetLayer {described[0].path} brings its own reshape transform: leave yours out")
    transforms = [layer.reshape_transform if isinstance(layer, TargetLayer) else None for layer in layers]
    # What a partial function holds is compared by value: each layer of a report has one of its own.
    known = {(getattr(one, "func", one), repr(getattr(one, "keywords", None))) for one in transforms}
    if len(known) > 1:
        paths = ", ".join(layer.path for layer in described)
        raise ValueError(f"{paths} want different reshape transforms: explain them one by one, and average the maps")
    return [layer.module if isinstance(layer, TargetLayer) else layer for layer in layers], transforms[0]


@dataclass(frozen=True)
class Candidate:
    """A layer whose output has positions.

    Attributes:
        path: its dotted name. Of several modules that put out the same values, the outermost.
        layout: "channels first", "channels last" or "tokens".
        prefix: number of tokens before the patches.
        grid: (rows, columns).
        share_with_gradient: share of the positions at which the scores have a gradient.
        flows_around: whether evidence can get from the image to the scores without passing this layer.
        verdict: what speaks for or against it.
        target: the `TargetLayer`; None if the layer is of no use.
    """

    path: str
    layout: str
    prefix: int
    grid: tuple[int, int]
    share_with_gradient: float
    flows_around: bool
    verdict: str
    target: TargetLayer | None = field(repr=False)


@dataclass(frozen=True, repr=False)
class LayerReport:
    """What `find_target_layers` found. A notebook shows the rows that matter.

    Attributes:
        candidates: the layers with positions in the order in which the model runs them.
        cam: the layer for Grad-CAM and its relatives.
        dff: the layer for Deep Feature Factorization.
    """

    candidates: list[Candidate]
    cam: TargetLayer
    dff: TargetLayer

    def table(self) -> "pd.DataFrame":
        """All candidates: a pandas DataFrame, a row a layer."""
        import pandas as pd

        chosen = {self.cam.path: "Grad-CAM", self.dff.path: "DFF"}
        if len(chosen) == 1:
            chosen = {self.cam.path: "Grad-CAM, DFF"}
        rows = {
            c.path: {
                "chosen for": chosen.get(c.path, ""),
                "layout": c.layout,
                "prefix tokens": c.prefix,
                "grid": f"{c.grid[0]} x {c.grid[1]}",
                "share with gradient": round(c.share_with_gradient, 3),
                "evidence flows around it": "yes" if c.flows_around else "no",
                "verdict": c.verdict,
            }
            for c in self.candidates
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    def _short_table(self):
        """The last usable layer of each of three earlier grids, and the layers from shortly before the chosen on."""
        paths = [c.path for c in self.candidates]
        first, last = sorted((paths.index(self.cam.path), paths.index(self.dff.path)))
        usable = [c for c in self.candidates if c.target]
        earlier = {c.grid: c.path for c in usable if c.path in paths[:first]}
        shown = [paths[first], paths[last], *list(earlier.values())[-3:], *paths[max(0, first - 3) : first]]
        shown += [c.path for c in usable if c.path in paths[first:]] + paths[:first:-1]
        shown = list(dict.fromkeys(shown))[:SHOWN_ROWS]
        table = self.table()
        return table[table.index.isin(shown)]

    def _repr_html_(self):
        import pandas as pd

        short = self._short_table().drop(columns=["layout", "prefix tokens"])
        short.insert(0, "verdict", short.pop("verdict"))  # what the others lead to, beside the name
        with pd.option_context("display.max_colwidth", None):
            table = short.to_html()
        return f"{table}<p>{len(short)} of {len(self.candidates)} layers with positions; table() has them all.</p>"

    def __repr__(self):
        import pandas as pd

        with pd.option_context("display.max_colwidth", None, "display.width", None, "display.max_columns", None):
            return self._short_table().to_string()


def find_target_layers(model: torch.nn.Module, pixel_values: torch.Tensor) -> LayerReport:
    """Finds the layers to explain in a model that nobody described, by trying.

    1. Shapes: which modules put out a tensor that can be read as a map of the image: channels first, channels last, or
       tokens with prefix tokens before them.
    2. Locality: where a patch of the image is changed, the map has to change more than elsewhere.
    3. Cut: without the layer, no way may be left from the image to the scores. Else evidence flows around the layer,
       and a map made there shows a part of it.
    4. Gradient: the scores have to have one at more than one position. Where the head reads the CLS token alone,
       the last patch tokens have none.

    The DFF layer is the latest that passes 1 to 3, the Grad-CAM layer the latest that passes all. One kind of layer may
    be flown around: the norm before the last attention, if all that flows around it does so in prefix tokens.
    The image runs through the model 11 times and back twice, and 2 times and back twice for each such norm (3 at
    most): at most 33 forward passes' worth, a backward pass counted as two. The model is left as it was.

    Args:
        model: a transformers classification model, or any module that maps images to a score tensor.
        pixel_values: one image as the model's processor makes it, float tensor (1, 3, height, width).

    Returns:
        A `LayerReport`. Its `cam` and `dff` are the chosen ones, each a `TargetLayer`; a notebook shows a table.

    Raises:
        ValueError: no layer passes; the scores have no gradient, or one of zero; pixel_values of another shape or not
            finite.

    Example:
        >>> from xai_helpers.checkpoints import examples, load
        >>> model, processor = load("vit", weights="bundled")
        >>> [example] = examples(model, processor, 1)
        >>> report = find_target_layers(model, example.pixel_values)
        >>> report.cam.path
        'vit.layers.5.layernorm_before'
    """
    from tqdm.auto import tqdm

    pixel_values = input_for(model, pixel_values, coarse=True)
    scorer = LogitsModel(model)
    paths = {module: path for path, module in model.named_modules() if path}
    disable = bool(os.environ.get("TQDM_DISABLE"))  # which tqdm's bar for notebooks does not read
    with frozen(scorer), tqdm(desc="target layers", total=3, delay=1, leave=False, disable=disable) as bar:
        image = pixel_values.clone()
        layers, dependent = _layers_with_positions(scorer, paths, image)
        bar.update()
        _follow_evidence(scorer, dependent, layers, image)
        bar.update()
        for norm in _norms_to_try(layers):
            norm.only_prefix_flows_around = _only_prefix_flows_around(scorer, dependent, norm, image)
            if norm.only_prefix_flows_around:
                break
        bar.update()
    cam = next((layer for layer in reversed(layers) if layer.has_gradient and layer.passes), None)
    dff = next((layer for layer in reversed(layers) if layer.passes and not layer.flows_around), None)
    candidates = [
        layer.candidate(cam, dff) for layer in layers if layer.is_local or (layer.depends and not layer.flows_around)
    ]
    if cam is None or dff is None:
        raise ValueError(_nothing_found(model, candidates))
    return LayerReport(candidates, cam.target, dff.target)


def _nothing_found(model, candidates):
    nearest = f" The last with positions is {candidates[-1].path}: {candidates[-1].verdict}." if candidates else ""
    return (
        f"{type(model).__name__} has no layer to explain: none has positions of the image and lets all evidence for "
        f"the scores through.{nearest} If your model has such a tensor, pass it through a torch.nn.Identity() that is "
        "a part of the model; else use a method that needs no layer, such as relevance or Captum's Occlusion"
    )


@dataclass(eq=False)
class _Layer:
    """What is known of a module while it is examined."""

    module: torch.nn.Module
    path: str
    kind: str  # of its output
    calls: int  # in one pass
    reading: tuple  # layout, number of prefix tokens, grid
    is_local: bool
    depth: float  # share of the model's innermost modules that have run before
    depends: bool = False  # the scores depend on it
    share: float = 0.0
    flows_around: bool = True
    input_is_cut: bool = False
    only_prefix_flows_around: bool = False

    @property
    def is_map(self):
        """Of the image, and one that a hook can get at."""
        return self.is_local and self.kind == "Tensor"

    @property
    def passes(self):
        return self.is_map and (not self.flows_around or self.only_prefix_flows_around)

    @property
    def has_gradient(self):
        """At more than one position."""
        rows, columns = self.reading[2]
        return self.share * rows * columns > 1.5

    @functools.cached_property
    def target(self):
        return TargetLayer(self.module, self.path, _reshape_transform(self.reading))

    def candidate(self, cam, dff):
        target = self.target if self.passes else None
        return Candidate(self.path, *self.reading, self.share, self.flows_around, self._verdict(cam, dff), target)

    def _verdict(self, cam, dff):
        prefix = {0: "", 1: "CLS token"}.get(self.reading[1], "prefix tokens")
        if self.kind != "Tensor":
            return f"returns a {self.kind}, in which grad-cam's hooks find no tensor"
        if self.calls > 1:
            return f"runs {self.calls} times in a pass, so it has no output of its own"
        if not self.is_local:
            return "does not change where the image does: its positions are no places in the image"
        if not self.depends:
            return "the scores do not depend on it"
        if self.flows_around and not self.only_prefix_flows_around:
            return "evidence flows around it, as by a residual connection: use a layer where the ways have met again"
        if not self.has_gradient:
            if not prefix:
                return "at most one position gets a gradient: for Grad-CAM use a layer before"
            return f"the head reads its {prefix} alone, patch tokens get no gradient: for Grad-CAM use the block before"
        reason = "all evidence passes it"
        if self.flows_around:
            reason = "holds the patches as they are read for the last time"
            reason += f"; only what the {prefix} had before flows around it" if prefix else ""
        if self is not cam and self is not dff:
            return f"usable: {reason}; there is a later one"
        if self.depth < 0.4:
            return f"{reason}; but {1 - self.depth:.0%} of the model comes after it: do not expect much of its maps"
        return f"{reason}, and nothing later will do"


def _layers_with_positions(scorer, paths, image):
    """Steps 1 and 2, in one forward pass of the image and of copies with a changed patch.

    Returns:
        The layers, and what depends on the image: (module, position or name of an input, or None for the output).
    """
    rows = _changed_images(image)
    groups, calls, steps, dependent = {}, {}, [0], set()

    def watch(module, inputs, options, output):
        calls[module] = calls.get(module, 0) + 1
        steps[0] += not any(module.children())
        for place, value in [*enumerate(inputs), *options.items(), (None, output)]:
            is_batch = isinstance(value, torch.Tensor) and value.shape[:1] == rows.shape[:1]
            if is_batch and not torch.equal(value[0], value[1]):
                dependent.add((module, place))
        tensor = _tensor_in(output)
        if tensor is None or len(tensor) != len(rows):  # windows are rows of the batch too
            return
        values = tensor[0].detach().float().cpu().contiguous().numpy()
        key = tensor.shape, hashlib.sha256(values).digest()  # modules with the same values are one layer
        if key not in groups:
            groups[key] = _best_reading(tensor, image.shape[2:]), steps[0], []
        groups[key][2].append((module, "Tensor" if isinstance(output, torch.Tensor) else type(output).__name__))

    with _hooks(paths, watch), torch.no_grad():
        scorer(rows)
    layers = []
    for found, step, modules in groups.values():
        if found is None:
            continue
        module, kind = min(  # the outermost of those that can be hooked
            modules, key=lambda m: (not m[1] == "Tensor", calls[m[0]] > 1, paths[m[0]].count("."))
        )
        is_local, reading = found
        layers.append(_Layer(module, paths[module], kind, calls[module], reading, is_local, step / steps[0]))
    return layers, dependent


def _follow_evidence(scorer, dependent, layers, image):
    """Steps 3 and 4, in one forward and one backward pass: sets `share`, `flows_around` and what goes with them."""
    by_module = {layer.module: layer for layer in layers if layer.calls == 1}
    outputs, inputs_of = {}, {}

    def watch(module, inputs, options, output):
        layer, tensor = by_module[module], _tensor_in(output)
        if not tensor.requires_grad:
            return
        outputs[layer] = tensor.grad_fn, tensor.output_nr
        if inputs and isinstance(inputs[0], torch.Tensor) and inputs[0].shape == tensor.shape:
            inputs_of[layer] = inputs[0].grad_fn, inputs[0].output_nr
        tensor.register_hook(lambda gradient: at_gradient(layer, gradient))

    def at_gradient(layer, gradient):
        layer.share = _positions_with_gradient(gradient, layer.reading)

    score, leaves = _some_score(scorer, dependent, image, by_module, watch)
    gradients = torch.autograd.grad(score, leaves, allow_unused=True)
    through, in_all = _count_ways(score, leaves)
    if not in_all:
        raise ValueError(NO_GRADIENT)
    if not any(gradient is not None and gradient.any() for gradient in gradients):
        raise ValueError(ZERO_GRADIENT)
    for layer in layers:
        layer.depends = outputs.get(layer) in through
        layer.flows_around = through.get(outputs.get(layer), 0) != in_all
        layer.input_is_cut = through.get(inputs_of.get(layer), 0) == in_all


def _norms_to_try(layers):
    """What comes after all that passed and reads a tensor that all evidence passes: a few layers, the latest first."""
    found = []
    for layer in reversed(layers):
        if layer.passes and layer.has_gradient:
            break
        if layer.is_map and layer.has_gradient and layer.flows_around and layer.input_is_cut:
            found.append(layer)
    return found[:MOST_NORMS]


def _only_prefix_flows_around(scorer, dependent, layer, image):
    """Whether, with the layer's output detached, no patch of its input has a gradient any more."""
    shares = []

    def detach(module, inputs, options, output):
        inputs[0].register_hook(lambda gradient: shares.append(_positions_with_gradient(gradient, layer.reading)))
        return output.detach()

    score, leaves = _some_score(scorer, dependent, image, [layer.module], detach)
    torch.autograd.grad(score, leaves, allow_unused=True)
    return not any(shares)


def _hooks(modules, hook):
    """A context in which the modules have the forward hook."""
    stack = contextlib.ExitStack()
    for module in modules:
        stack.enter_context(module.register_forward_hook(hook, with_kwargs=True))
    return stack


def _some_score(scorer, dependent, image, watched, hook):
    """Runs the image in two rows (with one, PyTorch's BatchNorm2d can return a wrong input gradient).

    Args:
        dependent: as `_layers_with_positions` returns it.
        watched, hook: modules, and the forward hook that they have meanwhile.

    Returns:
        A random mixture of the image's scores, so that what matters to any of them matters to it; and where gradients
        end: at the image, and at what depends on it by a way without gradient, such as a look-up of colours.
    """
    leaves = [image.repeat(2, 1, 1, 1).requires_grad_()]

    def start(module, place, value):
        needs_one = torch.is_grad_enabled() and (module, place) in dependent and value.is_floating_point()
        if not needs_one or value.requires_grad:
            return value
        leaves.append(value.detach().requires_grad_())
        return leaves[-1].clone()  # a leaf could not be worked on in place

    def at_inputs(module, inputs, options):
        inputs = tuple(start(module, i, value) for i, value in enumerate(inputs))
        return inputs, {name: start(module, name, value) for name, value in options.items()}

    with contextlib.ExitStack() as stack:
        for module in {module for module, _ in dependent}:
            stack.enter_context(module.register_forward_pre_hook(at_inputs, with_kwargs=True))
            stack.enter_context(_hooks([module], lambda module, _, options, output: start(module, None, output)))
        stack.enter_context(_hooks(watched, hook))
        scores = scorer(leaves[0].clone())[0].flatten()
    weights = torch.randn(len(scores), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    score = (scores * weights.to(scores)).sum()
    if not score.requires_grad:
        raise ValueError(NO_GRADIENT)
    return score, leaves


def _count_ways(score, leaves):
    """Counts the ways through autograd's graph from the score back to the leaves.

    Returns:
        For each output of a node, as (node, number), how many of the ways lead through it; and how many there are.
    """
    starts = {id(leaf) for leaf in leaves}
    order, to_start, stack = [], {}, [(score.grad_fn, False)]
    while stack:
        node, is_done = stack.pop()
        before = [other for other, _ in node.next_functions if other is not None]
        if is_done:
            is_start = id(getattr(node, "variable", None)) in starts
            to_start[node] = is_start + sum(to_start[other] for other in before)
            order.append(node)
        elif node not in to_start:
            to_start[node] = None
            stack.append((node, True))
            stack.extend((other, False) for other in before if other not in to_start)
    arriving, from_score = {(score.grad_fn, 0): 1}, {score.grad_fn: 1}
    for node in reversed(order):
        for other, number in node.next_functions:
            if other is not None:
                arriving[other, number] = arriving.get((other, number), 0) + from_score[node]
                from_score[other] = from_score.get(other, 0) + from_score[node]
    return {output: ways * to_start[output[0]] for output, ways in arriving.items()}, to_start[score.grad_fn]


def _tensor_in(output):
    """The tensor that a module puts out, if it may have positions; None without one."""
    tensor = tensor_in(output)
    return tensor if tensor is not None and tensor.is_floating_point() and tensor.ndim in (3, 4) else None


def _changed_images(image):
    """The image, and for each draw of noise a copy for each patch, in which the noise lies over the patch."""
    generator = torch.Generator("cpu").manual_seed(0)
    rows = image.repeat(1 + DRAWS * len(PATCHES), 1, 1, 1)
    strength = image.std() if image.std() > 0 else 1
    for row, centre in zip(rows[1:], PATCHES * DRAWS, strict=True):
        top, left = (round((c - PATCH_SIDE / 2) * n) for c, n in zip(centre, image.shape[2:], strict=True))
        bottom, right = (round((c + PATCH_SIDE / 2) * n) for c, n in zip(centre, image.shape[2:], strict=True))
        patch = row[:, top:bottom, left:right]
        colour = torch.randn((len(patch), 1, 1), generator=generator, device="cpu")
        patch += strength * (colour + torch.randn(patch.shape, generator=generator, device="cpu")).to(patch)
    return rows


def _best_reading(tensor, image_size):
    """How a tensor can be read as maps: (whether it changes where the image does, reading); None if it cannot."""
    results = []
    for layout, prefix, (rows, columns) in _readings(tuple(tensor.shape), tuple(image_size)):
        changes = (tensor[1:].float() - tensor[:1].float()).norm(dim=1 if layout == "channels first" else -1).cpu()
        changes = changes.unflatten(0, (DRAWS, len(PATCHES))).mean(dim=0)
        maps = [changes]
        if layout == "tokens":  # cut out from every start up to the one in question, which should be the best
            n = rows * columns
            maps = [changes[:, start : start + n].unflatten(1, (rows, columns)) for start in range(prefix + 1)]
        *_, ratios = found = [_locality(changes) for changes in maps]
        *_, mean = means = [ratios.log().mean().exp().item() for ratios in found]
        is_local = ratios.min().item() > 1 and mean > max(1.05, 0.97 * max(means))
        results.append((is_local, mean, (layout, prefix, (rows, columns))))
    if not results:
        return None
    is_local, _, reading = max(results)
    return is_local, reading


@functools.cache
def _readings(shape, image_size):
    """The ways to read a tensor as maps: a list of layout, number of prefix tokens, grid."""
    if len(shape) == 4:
        readings = [("channels first", 0, shape[2:]), ("channels last", 0, shape[1:3])]
        return [reading for reading in readings if _misfit(reading[2], image_size) is not None]
    if shape[2] == 1:  # pooled maps, the channels in the place of tokens
        return []
    for prefix in range(min(MOST_PREFIX_TOKENS, shape[1] - 2) + 1):
        n = shape[1] - prefix
        grids = [(rows, n // rows) for rows in range(1, n + 1) if n % rows == 0]
        fitting = [grid for grid in grids if _misfit(grid, image_size) is not None]
        if fitting:
            return [("tokens", prefix, min(fitting, key=lambda grid: _misfit(grid, image_size)))]
    return []


def _misfit(grid, image_size):
    """By how much a grid fails to have the image's sides in proportion; None if it is more than a row or column."""
    (rows, columns), (height, width) = grid, image_size
    slack = 0 if height == width else max(height, width)
    misfit = abs(rows * width - columns * height)
    return misfit if 1 < rows * columns <= height * width and misfit <= slack else None


def _reshape_transform(reading):
    layout, prefix, grid = reading
    if layout == "tokens":
        return functools.partial(tokens_to_map, grid=grid, prefix=prefix)
    return channels_last_to_map if layout == "channels last" else None


def _as_map(tensor, reading):
    reshape_transform = _reshape_transform(reading)
    return tensor if reshape_transform is None else reshape_transform(tensor)


def _locality(changes):
    """How many times more a map changes at a patch when the image does so there than when it does elsewhere.

    Args:
        changes: (n_patches, rows, columns), how much the map changes with each patch of the image.

    Returns:
        A tensor with a ratio a patch, limited to 0.001 and 1000.
    """
    shares = changes / changes.sum(dim=(1, 2), keepdim=True).clamp(min=1e-30)
    ratios = []
    for i, (y, x) in enumerate(PATCHES):
        there = shares[:, _cells(y, changes.shape[1])][:, :, _cells(x, changes.shape[2])].mean(dim=(1, 2))
        elsewhere = (there.sum() - there[i]) / (len(PATCHES) - 1)
        ratios.append(there[i] / elsewhere.clamp(min=1e-12))
    return torch.stack(ratios).nan_to_num(0).clamp(1e-3, 1e3)


def _cells(centre, n):
    """Which of n rows or columns belong to a patch: those with their middle in it, or else the nearest."""
    distances = ((torch.arange(n, device="cpu") + 0.5) / n - centre).abs()
    return distances <= max(PATCH_SIDE / 2, distances.min().item()) + 1e-6


def _positions_with_gradient(gradient, reading):
    """The share of the map's positions at which the gradient of the first row is not zero in all channels."""
    return (_as_map(gradient, reading)[0] != 0).any(dim=0).float().mean().item()


def layer_table(
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    category: str | int | Callable,
    layers: Mapping[str, torch.nn.Module | TargetLayer | tuple[torch.nn.Module, Callable]],
) -> "pd.DataFrame":
    """What some layers put out, and at which of their positions the score of a category has a gradient.

    One forward pass and one backward pass, with the image in two rows (with one, PyTorch's BatchNorm2d can return a
    wrong input gradient). The model is looked at in eval mode and left as it was.

    Args:
        model: a transformers classification model, or any module that maps images to a score tensor.
        pixel_values: one image as the model's processor makes it, float tensor (1, 3, height, width).
        category: a name from `config.id2label`, an index, or a callable (scores of one image -> scalar).
        layers: name -> module or `TargetLayer`, or name -> (module, reshape_transform) where the output is not (batch,
            channels, height, width) already.

    Returns:
        A pandas DataFrame, a row a name: "output" (its shape), "grid" (rows x columns of the map), "stride" (pixels
        of the input that a position stands for; height x width where they differ), "share with gradient" (share of
        the positions at which the gradient is not zero in every channel). Grid and stride are "-" where the output
        is no map; its positions are then all but the first and the last axis.

    Raises:
        ValueError: no layers; more than one category or an unknown one; a layer that is not in the model, is not
            reached or returns no tensor; a reshape transform that does not fit; pixel_values of another shape or not
            finite; a model in half precision.
    """
    import pandas as pd

    pixel_values = input_for(model, pixel_values)
    targets = category_targets(model, category)
    if len(targets) > 1:
        raise ValueError(f"layer_table looks at one category, not at {len(targets)}: call it once for each")
    if not layers:
        raise ValueError('no layers to look at: give a dict such as {"last stage": model.resnet.encoder.stages[-1]}')
    asked = {}
    for name, layer in layers.items():
        (module,), transform = modules_and_transform(*(layer if isinstance(layer, tuple) else (layer,)))
        asked[name] = module, transform
    paths = {layer: layer_path(model, layer) for layer, _ in asked.values()}
    outputs = {}

    def watch(layer, inputs, output):
        if layer in outputs:
            raise ValueError(f"layer {paths[layer]} runs more than once in a pass: look at one that runs once")
        for other, reshape_transform in asked.values():
            if other is layer and (reshape_transform is not None or not isinstance(output, torch.Tensor)):
                layer_to_map(output, reshape_transform, paths[layer])
        outputs[layer] = output if output.requires_grad else output.detach().requires_grad_()
        return outputs[layer].clone()  # what is kept is safe from a ReLU that works in place

    scorer = LogitsModel(model)
    with frozen(scorer):
        with contextlib.ExitStack() as stack:
            for layer in paths:
                stack.enter_context(layer.register_forward_hook(watch))
            rows = pixel_values.clone().requires_grad_().repeat(2, 1, 1, 1)
            score = targets[0](scorer(rows)[0])
        for layer, path in paths.items():
            if layer not in outputs:
                raise ValueError(f"layer {path} is not reached in the forward pass")
        if not (isinstance(score, torch.Tensor) and score.requires_grad):
            raise ValueError("the score does not depend on the image: give a category, or a function of the scores")
        found = torch.autograd.grad(score, list(outputs.values()), allow_unused=True, materialize_grads=True)
        gradients = dict(zip(outputs, found, strict=True))
    table = {
        name: _row(gradients[layer], reshape_transform, pixel_values.shape[2:])
        for name, (layer, reshape_transform) in asked.items()
    }
    return pd.DataFrame.from_dict(table, orient="index", columns=["output", "grid", "stride", "share with gradient"])


def _row(gradient, reshape_transform, image_size):
    """One row of `layer_table`, from the gradient at a layer for two images, or two times n windows of them."""
    n_rows = max(1, len(gradient) // 2)
    output = " x ".join(map(str, (n_rows, *gradient.shape[1:])))
    if reshape_transform is not None:
        gradient = reshape_transform(gradient)
    is_map = gradient.ndim == 4 and gradient.shape[2] * gradient.shape[3] > 1
    alive = (gradient[:n_rows] != 0).any(dim=1 if gradient.ndim == 4 else -1).float().mean().item()
    if not is_map:
        return [output, "-", "-", alive]
    grid = gradient.shape[2:]
    strides = [f"{side / n:.3g}" for side, n in zip(image_size, grid, strict=True)]
    return [output, " x ".join(map(str, grid)), " x ".join(dict.fromkeys(strides)), alive]
