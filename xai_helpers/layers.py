"""Which layer to explain: finds it in a model that nobody described, and shows what layers put out."""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from xai_helpers.balance import check_rules_reach
from xai_helpers.cuts import tensor_in
from xai_helpers.reshape import batch_axis, channels_last_to_map, layer_to_map, runs_often, tokens_to_map
from xai_helpers.wrappers import Scorer, category_targets, frozen, input_for, layer_path

if TYPE_CHECKING:  # imported late below: only tables need it
    import pandas as pd

PATCHES = [(0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)]  # centres (y, x) as shares of the sides
PATCH_SIDE = 1 / 3
DRAWS = 2  # of noise for each patch
MOST_PREFIX_TOKENS = 16
MOST_TRIED = 16  # of a kind, for a sweep
WHOLE, BRANCHES = 8, 5  # layers in a sweep that all evidence passes, and with which branches begin
ALL = 0.999  # of the change of the scores
SEQUENCE_FIRST = ", sequence first"

NO_GRADIENT = (
    "the scores have no gradient: something between the image and the scores cuts them off, such as torch.no_grad(), "
    ".detach() or whole numbers; explain a model through which gradients flow"
)
ZERO_GRADIENT = (
    "the gradient of the scores is zero everywhere, as in an untrained model whose head starts at zero: load trained "
    "weights, or give the head's weight random values; or because the target is saturated, as a probability of 1 is: "
    "explain a logit"
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
        layout: "channels first", "channels last", "tokens" or "tokens, sequence first".
        prefix: number of tokens before the patches.
        grid: (rows, columns).
        share_with_gradient: share of the positions at which the scores have a gradient.
        back: how far the scores of a noisy picture come back if this layer puts out what it does for the clean one: 1
            where all evidence passes it, 0 where none does; None if that was not tried.
        in_sweep: whether it is worth a sweep.
        begins_branch: whether it is one that does not hold all evidence, such as the norm of a block.
        verdict: what is to be known of it.
        target: the `TargetLayer`; None if it puts out no tensor of its own.
    """

    path: str
    layout: str
    prefix: int
    grid: tuple[int, int]
    share_with_gradient: float
    back: float | None
    in_sweep: bool
    begins_branch: bool
    verdict: str
    target: TargetLayer | None = field(repr=False)


@dataclass(frozen=True, repr=False)
class LayerReport:
    """What `find_target_layers` found. A notebook shows the layers that matter.

    Attributes:
        candidates: the layers with positions in the order in which the model runs them.
        cam: the layer for Grad-CAM and its relatives to begin with.
        dff: the layer for Deep Feature Factorization.
    """

    candidates: list[Candidate]
    cam: TargetLayer
    dff: TargetLayer

    @property
    def sweep(self) -> dict[str, TargetLayer]:
        """The layers among which to choose on pictures with known answers, path -> `TargetLayer`, the latest first."""
        return {c.path: c.target for c in reversed(self.candidates) if c.in_sweep and c.target}

    def table(self) -> "pd.DataFrame":
        """All candidates: a pandas DataFrame, a row a layer."""
        import pandas as pd

        rows = {
            c.path: {
                "for": ", ".join(
                    use
                    for use, is_meant in [
                        ("Grad-CAM", c.path == self.cam.path),
                        ("DFF", c.path == self.dff.path),
                        ("sweep", c.in_sweep),
                    ]
                    if is_meant
                ),
                "layout": c.layout,
                "prefix tokens": c.prefix,
                "grid": f"{c.grid[0]} x {c.grid[1]}",
                "share with gradient": round(c.share_with_gradient, 3),
                "scores back": "" if c.back is None else f"{_percent(c.back)} %",
                "verdict": c.verdict,
            }
            for c in self.candidates
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    def _short_table(self):
        """The layers for something, and the last one of all."""
        table = self.table()
        return table[(table["for"] != "") | (table.index == table.index[-1])].drop(columns=["layout", "prefix tokens"])

    def _repr_html_(self):
        import pandas as pd

        short = self._short_table().drop(columns="scores back")  # of which the verdict tells
        short.insert(0, "verdict", short.pop("verdict"))  # what the others lead to, beside the name
        with pd.option_context("display.max_colwidth", None):
            table = short.to_html()
        return f"<p>{NO_LAYER_NEEDED}</p>{table}<p>{len(short)} of {len(self.candidates)} layers; table() has all.</p>"

    def __repr__(self):
        import pandas as pd

        with pd.option_context("display.max_colwidth", None, "display.width", None, "display.max_columns", None):
            return f"{NO_LAYER_NEEDED}\n{self._short_table().to_string()}"


NO_LAYER_NEEDED = (
    "explain(model, pixel_values, categories) needs no layer. For class activation maps, these are the layers among "
    "which to choose on pictures with known answers."
)


def find_target_layers(model: torch.nn.Module, pixel_values: torch.Tensor) -> LayerReport:
    """Finds the layers to explain in a model that nobody described, by trying.

    1. Shapes: which modules put out a tensor that can be read as a map of the image: channels first, channels last, or
       tokens with prefix tokens before them.
    2. Locality: where a patch of the image is changed, the map has to change more than elsewhere.
    3. Gradient: the scores have to have one at more than one position. Where the head reads the CLS token alone,
       the last patch tokens have none.
    4. Cut: while a noisy image runs, the layer puts out what it did for the clean one. If the scores are back, all
       evidence passes here; if they are back in part, the rest flows around it, as by a residual connection.

    The DFF layer is the latest that passes 1, 2 and 4, the Grad-CAM layer the latest that passes all. One kind of layer
    may be flown around: the norm before the last attention, if all that flows around it does so in prefix tokens.
    Neither need be the layer that points best. Worth a sweep are the latest layers that all evidence passes, the last
    one of each earlier grid, and what reads them: the norms and convolutions with which blocks and branches begin.
    All this costs some sixty forward passes of the image. The model is left as it was.

    Args:
        model: a transformers classification model, or any module that maps images to a score tensor.
        pixel_values: one image as the model's processor makes it, float tensor (1, channels, height, width).

    Returns:
        A `LayerReport`. Its `cam` and `dff` are `TargetLayer`s, its `sweep` a dict of them; a notebook shows a table.

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
    check_rules_reach(model)
    scorer = Scorer(model)
    paths = {module: path for path, module in model.named_modules() if path}
    disable = bool(os.environ.get("TQDM_DISABLE"))  # which tqdm's bar for notebooks does not read
    with frozen(scorer), tqdm(desc="target layers", total=3, delay=1, leave=False, disable=disable) as bar:
        layers = _layers_with_positions(scorer, paths, pixel_values)
        bar.update()
        _find_gradients(scorer, layers, pixel_values)
        bar.update()
        trial = functools.partial(_put_back, scorer, pixel_values)
        maps = [layer for layer in layers if layer.is_map]
        dff = _latest(maps, trial, lambda layer: layer.passes)
        cam = _latest([layer for layer in maps if layer.has_gradient], trial, lambda layer: layer.passes_for_cam)
        if cam is not None:
            _choose_sweep(layers, cam, trial)
        bar.update()
    last = layers.index(dff) if dff else 0
    shown = [layer for i, layer in enumerate(layers) if layer.is_local or (i > last and layer.share)]
    candidates = [layer.candidate(cam, dff) for layer in shown]
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
    output: tuple  # what tells the values that it puts out from others, in whatever order they are
    reads: tuple | None  # and those that it reads
    keeps_shape: bool  # of what it reads
    share: float | None = None  # of the positions with a gradient; None if the scores do not depend on it
    back: float | None = None
    back_but_for_prefix: float | None = None
    in_sweep: bool = False

    @property
    def is_map(self):
        """Of the image, and one that a hook can get at."""
        return self.is_local and self.kind == "Tensor" and self.calls == 1

    @property
    def axis(self):
        """Of the pictures."""
        return int(self.reading[0].endswith(SEQUENCE_FIRST))

    @property
    def has_gradient(self):
        """At more than one position."""
        rows, columns = self.reading[2]
        return (self.share or 0) * rows * columns > 1.5

    @property
    def passes(self):
        return self.back is not None and self.back >= ALL

    @property
    def passes_for_cam(self):
        return self.passes or (self.back_but_for_prefix or 0) >= ALL

    @property
    def has_parts(self):
        return any(self.module.children())

    @property
    def begins_branch(self):
        return self.in_sweep and not self.passes_for_cam

    @functools.cached_property
    def target(self):
        return TargetLayer(self.module, self.path, _reshape_transform(self.reading))

    def candidate(self, cam, dff):
        target = self.target if self.is_map and (self.share is not None or self.passes) else None
        found = self.share or 0.0, self.back, self.in_sweep, self.begins_branch
        return Candidate(self.path, *self.reading, *found, self._verdict(cam, dff), target)

    def _verdict(self, cam, dff):
        prefix = {0: "", 1: "CLS token"}.get(self.reading[1], "prefix tokens")
        if not self.is_local:
            return "does not change where the image does: its positions are no places in the image"
        if self.kind != "Tensor":
            return f"returns a {self.kind}, in which grad-cam's hooks find no tensor"
        if self.calls > 1:
            return f"runs {self.calls} times in a pass, so it has no output of its own"
        if self.share is None and not self.passes:
            return "no gradient of the scores reaches it"
        if not self.has_gradient and not prefix:
            return "at most one position gets a gradient: for Grad-CAM use a layer before"
        if not self.has_gradient:
            return f"the head reads its {prefix} alone, patch tokens get no gradient: for Grad-CAM use the block before"
        if self.back is None:
            return "inside a block or before it: not tried"
        if self.passes_for_cam:
            reason = "all evidence passes it"
            if not self.passes:
                reason = "holds the patches as they are read for the last time"
                reason += f"; what the {prefix} had before flows around it"
            if self is cam or self is dff:
                reason += "; nothing later does"
            return reason + (f"; {1 - self.depth:.0%} of the model comes after it" if self.depth < 0.4 else "")
        around = f"{100 - _percent(self.back)} % of the evidence flows around it"
        return f"begins a branch: {around}" if self.begins_branch else f"a part: {around}"


def _percent(share):
    return 100 if share >= ALL else min(99, round(100 * share))  # 100 for what passes, and for nothing else


def _layers_with_positions(scorer, paths, image):
    """Steps 1 and 2, in one forward pass of the image and of copies with a changed patch."""
    rows = _changed_images(image)
    groups, calls, steps, reads = {}, {}, [0], {}

    def at_input(module, inputs):
        tensor = next((value for value in inputs if isinstance(value, torch.Tensor)), None)
        if tensor is not None and module not in reads:
            reads[module] = tensor.shape, _fingerprint(tensor, len(rows))

    def at_output(module, inputs, output):
        calls[module] = calls.get(module, 0) + 1
        steps[0] += not any(module.children())
        tensor = _tensor_in(output)
        if tensor is None or _picture_axis(tensor, len(rows)) is None:  # windows are rows of the batch too
            return
        key = tensor.shape, _fingerprint(tensor, len(rows))  # modules with the same values are one layer
        if key not in groups:
            groups[key] = _best_reading(tensor, image.shape[2:]), steps[0], []
        groups[key][2].append((module, "Tensor" if isinstance(output, torch.Tensor) else type(output).__name__))

    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in paths:
            stack.enter_context(module.register_forward_pre_hook(at_input))
            stack.enter_context(module.register_forward_hook(at_output))
        scorer(rows)
    layers = []
    for (shape, fingerprint), (found, step, modules) in groups.items():
        if found is None:
            continue
        module, kind = min(  # the outermost of those that can be hooked
            modules, key=lambda m: (not m[1] == "Tensor", calls[m[0]] > 1, paths[m[0]].count("."))
        )
        is_local, reading = found
        shape_read, read = reads.get(module, (None, None))
        place = paths[module], kind, calls[module], reading, is_local, step / steps[0]
        layers.append(_Layer(module, *place, fingerprint, read, keeps_shape=shape == shape_read))
    return layers


def _fingerprint(tensor, n_rows):
    """Alike for tensors that have the same values for the first picture, in whatever order; None without pictures."""
    axis = _picture_axis(tensor, n_rows)
    if axis is None or not tensor.is_floating_point():
        return None
    bits = tensor.detach().select(axis, 0).float().cpu().contiguous().view(torch.int32).long()
    return bits.numel(), bits.sum().item(), (bits * bits).sum().item()  # whole numbers: exact, if need be modulo 2^64


def _picture_axis(tensor, n_rows):
    """0; 1 for tokens that come sequence first; None where the rows are no pictures, as those of windows."""
    if tensor.ndim and len(tensor) == n_rows:
        return 0
    return 1 if tensor.ndim == 3 and tensor.shape[1] == n_rows else None


def _find_gradients(scorer, layers, image):
    """Step 3, in one forward and one backward pass, with the score a random mixture of all, so that each matters.

    The image is run in two rows (with one, PyTorch's BatchNorm2d can return a wrong input gradient).
    """
    by_module, starts = {layer.module: layer for layer in layers if layer.calls == 1}, []

    def at_output(module, inputs, output):
        tensor = _tensor_in(output)
        if not tensor.requires_grad:  # before it the gradient is cut off, as by no_grad or a look-up of colours
            starts.append(tensor.requires_grad_())
        tensor.register_hook(functools.partial(at_gradient, by_module[module]))
        return _with(output, tensor.clone())  # on which the model may work in place

    def at_gradient(layer, gradient):
        layer.share = _positions_with_gradient(gradient, layer.reading)

    starts.append(image.repeat(2, 1, 1, 1).requires_grad_())
    with contextlib.ExitStack() as stack:
        for module in by_module:
            stack.enter_context(module.register_forward_hook(at_output, prepend=True))  # before those of transformers
        scores = scorer(starts[0].clone())[0].flatten()
    weights = torch.randn(len(scores), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    score = (scores * weights.to(scores)).sum()
    if not score.requires_grad:
        raise ValueError(NO_GRADIENT)
    gradients = [g for g in torch.autograd.grad(score, starts, allow_unused=True) if g is not None]
    if not gradients:
        raise ValueError(NO_GRADIENT)
    if not any(gradient.any() for gradient in gradients):
        raise ValueError(ZERO_GRADIENT)


def _put_back(scorer, image, layers, but_for_prefix=True):
    """Step 4 for some layers, in one forward pass: the image, noise in its place, and noise once more for each trial.

    In a trial a layer puts out what it does for the image. In a second one, for a layer that reads tokens and puts out
    as many, what it reads has the image's prefix tokens, too: those go around it, along a residual connection.
    """
    trials = [(layer, 0) for layer in layers]
    if but_for_prefix:
        inner = [layer for layer in layers if layer.has_gradient and layer.keeps_shape and not layer.has_parts]
        trials += [(layer, layer.reading[1]) for layer in inner if layer.reading[1]]
    noise = torch.randn(image.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(image)
    noise = image.mean() + noise * (image.std() if image.std() > 0 else 1)
    rows = torch.cat([image, noise.expand(len(trials) + 1, -1, -1, -1)])

    def at_input(layer, row, prefix, module, inputs):
        if inputs and getattr(inputs[0], "ndim", 0) == 3:
            tokens = inputs[0].movedim(layer.axis, 0)
            tokens[row, :prefix] = tokens[0, :prefix]  # in place: the residual connection has the same tensor

    def at_output(layer, row, module, inputs, output):
        tensor = _tensor_in(output).clone()
        pictures = tensor.movedim(layer.axis, 0)
        pictures[row] = pictures[0]
        return _with(output, tensor)

    with contextlib.ExitStack() as stack, torch.no_grad():
        for row, (layer, prefix) in enumerate(trials, start=2):
            if prefix:
                before = functools.partial(at_input, layer, row, prefix)
                stack.enter_context(layer.module.register_forward_pre_hook(before))
            put_back = functools.partial(at_output, layer, row)
            stack.enter_context(layer.module.register_forward_hook(put_back, prepend=True))
        scores = scorer(rows).flatten(1).cpu().double()
    changes = (scores - scores[:1]).norm(dim=1)
    rounding = 10 * torch.finfo(image.dtype).eps * scores[0].norm()
    back = 1 - (changes - rounding).clamp(min=0) / changes[1].clamp(min=1e-300)
    for (layer, prefix), share in zip(trials, back[2:].tolist(), strict=True):
        if prefix:
            layer.back_but_for_prefix = share
        else:
            layer.back = max(share, 0.0)


def _latest(layers, trial, is_meant):
    """The latest of some layers that is meant; they are tried from the end, one, and then eight at a time."""
    sizes, end = itertools.chain([1], itertools.repeat(8)), len(layers)
    while end > 0:
        start = max(0, end - next(sizes))
        if some := [layer for layer in layers[start:end] if layer.back is None]:
            trial(some)
        if found := [layer for layer in layers[start:end] if is_meant(layer)]:
            return found[-1]
        end = start
    return None


def _choose_sweep(layers, cam, trial):
    """Marks the layers that are worth a sweep, and tries those that may be.

    First modules with parts, such as stages and blocks, the outer ones and the latest before others; then what reads a
    layer that all evidence passes, such as the norms of blocks, and what reads that.
    """
    order = {layer: i for i, layer in enumerate(layers)}
    usable = [x for x in layers if x.is_local and x.calls == 1 and x.has_gradient and (x.depth > 0.1 or x is cam)]

    def outer_and_late(layer):
        return not layer.has_parts, layer.path.count("."), -order[layer]

    def try_some(some):
        if some := [layer for layer in some if layer.back is None]:
            trial(some, but_for_prefix=False)

    may_pass = [layer for layer in usable if layer.kind in ("Tensor", "tuple", "list")]
    try_some(sorted(may_pass, key=outer_and_late)[:MOST_TRIED])
    last_of_grids = {layer.reading[2]: layer for layer in may_pass if layer.passes}
    late = {*list(last_of_grids)[-2:], cam.reading[2]}
    tried, left = 0, [x for x in reversed(usable) if x.is_map and x.back is None and x.reading[2] in late]
    while readers := [layer for layer in left if layer.reads in _cuts(layers)][: MOST_TRIED - tried]:
        try_some(readers)
        tried += len(readers)
        left = [layer for layer in left if layer not in readers]
    blocks = [layer.module for layer in usable if layer.passes and not isinstance(layer.module, torch.nn.Sequential)]
    parts = {child for module in blocks for child in module.children()}
    whole = [x for x in usable if x.passes and x.reading[2] in late and (x.has_parts or x.module not in parts)]
    branches = [x for x in usable if x.reads in _cuts(layers) and x.back is not None and x.keeps_shape]
    branches = [x for x in branches if not (x.passes or x.has_parts)]
    for layer in [cam, *sorted(whole, key=outer_and_late)[:WHOLE], *branches[-BRANCHES:], *last_of_grids.values()]:
        layer.in_sweep = layer.is_map


def _cuts(layers):
    return {layer.output for layer in layers if layer.passes}


def _with(output, tensor):
    """An output of a module with another tensor in it."""
    if isinstance(output, torch.Tensor):
        return tensor
    if isinstance(output, (tuple, list)):
        values = [_with(output[0], tensor), *output[1:]]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    return output


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
    results, suffix = [], ""
    n_rows = 1 + DRAWS * len(PATCHES)
    if _picture_axis(tensor, n_rows) == 1:
        tensor, suffix = tensor.transpose(0, 1), SEQUENCE_FIRST
    for layout, prefix, (rows, columns) in _readings(tuple(tensor.shape), tuple(image_size)):
        changes = (tensor[1:] - tensor[:1]).float()
        changes /= changes.abs().max().clamp(min=1e-37)  # in a deep model with random weights next to nothing
        changes = changes.norm(dim=1 if layout == "channels first" else -1).cpu()
        changes = changes.unflatten(0, (DRAWS, len(PATCHES))).mean(dim=0)
        maps = [changes]
        if layout == "tokens":  # cut out from every start up to the one in question, which should be the best
            n = rows * columns
            maps = [changes[:, start : start + n].unflatten(1, (rows, columns)) for start in range(prefix + 1)]
        *_, ratios = found = [_locality(changes) for changes in maps]
        *_, mean = means = [ratios.log().mean().exp().item() for ratios in found]
        is_local = ratios.min().item() > 1 and mean > max(1.05, 0.97 * max(means))
        results.append((is_local, mean, (layout + suffix, prefix, (rows, columns))))
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
    if layout == "tokens" + SEQUENCE_FIRST:
        return functools.partial(tokens_to_map, grid=grid, prefix=prefix, batch_first=False)
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
        pixel_values: one image as the model's processor makes it, float tensor (1, channels, height, width).
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
    check_rules_reach(model)
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
            raise ValueError(runs_often(paths[layer]))
        for other, reshape_transform in asked.values():
            if other is layer and (reshape_transform is not None or not isinstance(output, torch.Tensor)):
                layer_to_map(output, reshape_transform, paths[layer])
        outputs[layer] = output if output.requires_grad else output.detach().requires_grad_()
        return outputs[layer].clone()  # what is kept is safe from a ReLU that works in place

    scorer = Scorer(model)
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
    axis = batch_axis(gradient, reshape_transform)
    gradient = gradient.movedim(axis, 0)[: max(1, gradient.shape[axis] // 2)].movedim(0, axis)
    output = " x ".join(map(str, gradient.shape))
    if reshape_transform is not None:
        gradient = reshape_transform(gradient)
    is_map = gradient.ndim == 4 and gradient.shape[2] * gradient.shape[3] > 1
    alive = (gradient != 0).any(dim=1 if gradient.ndim == 4 else -1).float().mean().item()
    if not is_map:
        return [output, "-", "-", alive]
    grid = gradient.shape[2:]
    strides = [f"{side / n:.3g}" for side, n in zip(image_size, grid, strict=True)]
    return [output, " x ".join(map(str, grid)), " x ".join(dict.fromkeys(strides)), alive]
