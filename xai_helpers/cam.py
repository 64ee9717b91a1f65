"""Maps of many categories from one forward pass: without a layer by balanced gradients, with one by grad-cam's CAMs."""

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch.nn import functional as F

from xai_helpers.balance import balanced_gradients, check_rules_reach
from xai_helpers.cuts import complete_cuts, read_as_maps, tensors_of_modules
from xai_helpers.layers import NO_GRADIENT, ZERO_GRADIENT, TargetLayer, modules_and_transform
from xai_helpers.reshape import ADVICE, batch_axis, check_finite, check_layout, check_rows, layer_to_map, runs_often
from xai_helpers.scoring import MapWarning
from xai_helpers.wrappers import (
    RUNS_AGAIN,
    Scorer,
    category_targets,
    check_scores,
    eager_attention,
    finished_maps,
    frozen,
    input_for,
    layer_path,
    masked_scores,
    no_checkpointing,
)

CALL_OPTIONS = ("aug_smooth", "eigen_smooth")
TINY = 1e-6  # gradients, beside which what grad-cam adds to its denominators counts
NOTHING_FOR_IT = (
    "nothing speaks for it, at least not {where}; signed=True, without a layer, shows what speaks against it, and a "
    "contrast such as lambda scores: scores[0] - scores[1] what speaks for it rather than for another one"
)


def explain(
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    categories: str | int | Callable | Sequence,
    target_layer: torch.nn.Module | TargetLayer | list[torch.nn.Module | TargetLayer] | None = None,
    reshape_transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    method: type | None = None,
    **options: Any,
) -> np.ndarray:
    """Shows what in an image speaks for each category.

    *Without a layer*, by balanced gradients (`balance.balanced_gradients`), in any model that gradients flow through.
    The score is accounted for at several depths: at the pixels, and at every place that all ways from the score to the
    pixels lead through (`cuts.complete_cuts`). At each, gradient times (value minus six tenths of its mean over the
    positions) is summed over the channels, enlarged, smoothed and divided by its sum of absolute values. The map is
    the positive part of the sum over the pixels and the first half of the depths, times the root of that over the
    second half. It is a display; what adds up to the score is what `attribute(..., method="balanced")` returns. The
    image runs through the model once, and back once a category.

    *With a layer*, by a class activation map, Grad-CAM (Selvaraju et al., ICCV 2017) unless another one is asked for.
    The image runs through the model once. At the target layer its activations are repeated, one row a category, so only
    the layers behind it run for each category, forward and backward. The maps are those that grad-cam gives for the
    repeated image, where no later step works in place on what the layer put out: grad-cam keeps no copy of it on a CPU,
    `explain` does. Each is divided by its own maximum, and gradients of a tiny score are scaled up before, where
    grad-cam adds 1e-7. ScoreCAM and AblationCAM score many masked images or activations; all categories are read from
    the same scores. AblationCAM does to a channel what grad-cam does, which is not what its paper says: it sets it to 0
    only where 0 is the least value of the layer, as behind a ReLU, and else to that value minus ten million. And it
    divides by the score, so that the map of a negative one is turned round, of which a warning tells. The model is
    explained in eval mode and left as it was. Threads that explain one model take turns; others should not run it
    meanwhile.

    Args:
        model: a transformers classification model, or any module that maps images to a score tensor.
        pixel_values: one image as the model's processor makes it, float tensor (1, channels, height, width).
        categories: names from `config.id2label`, indices, or callables (scores of one image -> scalar); one or several.
            Of a model with a single score, 0 asks what speaks for it, and `lambda scores: -scores` what against it, so
            for the other one of two categories. Scores that are no row a picture, as a segmenter's, need a callable.
        target_layer: None; or the module whose output is explained, or a `TargetLayer`, as `find_target_layers` and
            `RECIPES` give it; or a list of them, whose maps are averaged. FullGrad reads all layers with a bias,
            whichever is given.
        reshape_transform: turns that output into (batch, channels, height, width); None if it has that shape, or for a
            `TargetLayer`, which has its own.
        method: a class of grad-cam derived from its BaseCAM; None: GradCAM.
        options: without a layer, `signed=True` for a map that also shows what speaks against the category, and `gamma`
            as in `balanced_gradients`. With a layer, `aug_smooth` and `eigen_smooth` as in grad-cam's call, others for
            the method's constructor.

    Returns:
        A float32 array (n_categories, height, width) in [0, 1], or in [-1, 1] if signed, at the size of pixel_values.
        Its maximum is 1, or it is zero everywhere, where nothing (at the target layer) speaks for the category.

    Raises:
        ValueError: an unknown category or method; a callable that returns no single number; scores that are not finite,
            or not (categories,) for a name or an index; pixel_values of another shape or not finite; a model without a
            gradient, of torch.jit, exported, or made in inference mode; a method or reshape transform without a layer;
            an empty list of layers, or one that is not in the model, is not reached, runs more than once in a pass, has
            no positions, its channels last, other rows than the picture's or no gradient; a reshape transform that does
            not fit; FullGrad for a model with biases that it does not read; ShapleyCAM with a reshape transform; a
            model in half precision or without parameters.
        TypeError: an option that the method does not have.

    Warns:
        MapWarning: a map is zero everywhere, or AblationCAM's of a negative score.
        UserWarning: the model cannot be forked at the target layer, and the whole of it runs a row a category.

    Example:
        >>> from xai_helpers.checkpoints import examples, load
        >>> model, processor = load("resnet", weights="bundled")
        >>> [example] = examples(model, processor, 1)
        >>> maps = explain(model, example.pixel_values, example.categories)
        >>> maps.shape  # a scene with two objects
        (2, 128, 128)
        >>> grad_cam = explain(model, example.pixel_values, example.categories, model.resnet.encoder.stages[-1])
    """
    if target_layer is None:
        maps = _without_layer(model, pixel_values, categories, reshape_transform, method, **options)
        return finished_maps(maps, NOTHING_FOR_IT.format(where="where explain looks"))
    # grad-cam brings scikit-learn along, which takes a while to import: late, here and below.
    from pytorch_grad_cam import AblationCAM, FullGrad, GradCAM, ScoreCAM, ShapleyCAM
    from pytorch_grad_cam.ablation_layer import AblationLayer, AblationLayerVit
    from pytorch_grad_cam.base_cam import BaseCAM

    method = GradCAM if method is None else method
    check_rules_reach(model)
    pixel_values = input_for(model, pixel_values)
    targets = category_targets(model, categories)
    layers, reshape_transform = modules_and_transform(target_layer, reshape_transform)
    if not layers:
        raise ValueError(f"no target layer: give a module, or a list of at least one; {ADVICE}")
    if not any(True for _ in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has no parameters, from which grad-cam reads the device: use a method that needs "
            "no layer, such as attribute or occlude"
        )
    fork = _Fork(model, layers, reshape_transform)
    if not (isinstance(method, type) and issubclass(method, BaseCAM)):
        raise ValueError(
            f"method {getattr(method, '__name__', method)} is not derived from grad-cam's BaseCAM "
            "(for FinerCAM, give its FinerWeightedTarget as a category)"
        )
    if issubclass(method, AblationCAM):
        options.setdefault("ablation_layer", AblationLayer() if reshape_transform is None else AblationLayerVit())
    masks = getattr(method, "get_cam_weights", None) in (ScoreCAM.get_cam_weights, AblationCAM.get_cam_weights)
    if masks:
        method = _masking_cam(method)
    call_options = {name: options.pop(name) for name in CALL_OPTIONS if name in options}
    try:
        inspect.signature(method).bind(fork, layers, reshape_transform, **options)
    except TypeError as error:
        raise TypeError(f"{method.__name__} {error}; for the call there are {', '.join(CALL_OPTIONS)}") from None

    if issubclass(method, ShapleyCAM) and reshape_transform is not None:
        raise ValueError(
            "grad-cam's ShapleyCAM takes no reshape transform: it needs a layer whose output is (batch, channels, "
            "height, width). GradCAM, HiResCAM and LayerCAM take one"
        )
    with frozen(fork), fork.hooks(), contextlib.ExitStack() as stack:
        full_grad = issubclass(method, FullGrad)
        cam = method(fork, *([], None) if full_grad else (layers, reshape_transform), **options)
        fork.targets = targets if masks or cam.uses_gradients else []  # of EigenCAM, which asks for none
        stack.callback(cam.activations_and_grads.release)  # grad-cam's own `with` block would swallow an IndexError
        for layer in layers:
            stack.enter_context(layer.register_forward_hook(_copy))
        if full_grad:
            _pair_biases(cam, fork, pixel_values)
        if not cam.detach:
            stack.enter_context(eager_attention(fork))  # ShapleyCAM differentiates twice
        with no_checkpointing():
            maps = _forked_maps(cam, fork, pixel_values, targets, call_options)
    if not call_options.get("aug_smooth"):  # whose maps are means
        maps = maps / maps.max(axis=(1, 2), keepdims=True, where=maps > 0, initial=LEAST)
    return finished_maps(maps, NOTHING_FOR_IT.format(where="at the target layer"))


CENTRE = 0.6  # of the mean over the positions is taken off
BLUR = 0.02  # of the longer side
LEAST = torch.finfo(torch.float32).tiny  # by which zero may be divided


def _without_layer(model, pixel_values, categories, reshape_transform, method, signed=False, gamma=0.25):
    if method is not None or reshape_transform is not None:
        what = "a reshape transform" if method is None else getattr(method, "__name__", repr(method))
        raise ValueError(f"{what} needs a target layer; {ADVICE}. Without a layer, explain takes neither")
    pixel_values = input_for(model, pixel_values)
    scorer, targets = Scorer(model), category_targets(model, categories)
    with frozen(scorer):
        check_rules_reach(scorer)
        source = pixel_values.clone().requires_grad_()
        with no_checkpointing(), balanced_gradients(gamma):
            with tensors_of_modules(scorer) as (tensors, outputs):
                scores = scorer(source)[0]
            picked = [target(scores) for target in targets]
            check_scores(torch.stack(picked))
            if not all(target.requires_grad for target in picked):
                raise ValueError(NO_GRADIENT)
            # Within, since layers under gradient checkpointing run once more on the way back.
            depths = depths_of(torch.stack(picked).sum(), source, tensors, outputs)
            looked_at = [source, *(tensors[place] for place, _ in depths)]
            found = [torch.autograd.grad(target, looked_at, retain_graph=True) for target in picked]
        if not all(any(gradient.any() for gradient in gradients) for gradients in found):
            raise ValueError(ZERO_GRADIENT)
        maps = [map_over_depths(looked_at, gradients, depths, signed) for gradients in found]
    return torch.stack(maps).numpy(force=True)


def depths_of(
    score: torch.Tensor, source: torch.Tensor, tensors: list[torch.Tensor], outputs: set[int]
) -> list[tuple[int, Callable]]:
    """Where `explain` looks without a layer, beside the pixels: the complete cuts that can be read as maps.

    Args:
        score: a scalar with a graph.
        source: pixel values, (1, channels, height, width), a leaf.
        tensors, outputs: as `cuts.tensors_of_modules` collects them.

    Returns:
        (place in `tensors`, function to (1, channels, rows, columns)) for each.
    """
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    found = read_as_maps(complete_cuts(score, source, tensors), source)
    return [(places[id(tensor)], lay_out) for tensor, lay_out in found if id(tensor) in outputs]


def map_over_depths(
    looked_at: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    depths: list[tuple[int, Callable]],
    signed: bool = False,
) -> torch.Tensor:
    """The map of one score, (height, width), from its relevance at the pixels and at complete cuts; see `explain`.

    Args:
        looked_at: the pixel values, (1, channels, height, width), and the tensors at `depths`.
        gradients: the score's, one for each of them.
        depths: as `depths_of` gives them.
        signed: whether what speaks against the score is negative in the map, or zero.
    """
    size, maps = looked_at[0].shape[2:], []
    lay_outs = [lambda pixels: pixels, *(lay_out for _, lay_out in depths)]
    for tensor, gradient, lay_out in zip(looked_at, gradients, lay_outs, strict=True):
        values, gradient = lay_out(tensor.detach()).float(), lay_out(gradient).float()  # of autocast in half precision
        centred = values - CENTRE * values.mean(dim=(2, 3), keepdim=True)
        relevance = (centred * gradient).sum(dim=(0, 1))
        to_rows, to_columns = (
            torch.from_numpy(_enlarging(n, wanted, BLUR * max(size))).to(relevance)
            for n, wanted in zip(relevance.shape, size, strict=True)
        )
        maps.append(to_rows @ relevance @ to_columns.T)
    smooth = torch.stack(maps)
    shares = smooth / smooth.abs().sum(dim=(1, 2), keepdim=True).clamp(min=LEAST)
    n_early = 1 + math.ceil(len(depths) / 2)
    early, late = shares[:n_early].sum(dim=0), shares[n_early:].sum(dim=0)
    has_late = late.abs().sum() > 0  # not where CLS has it all

    def towards(sign):
        heat = (sign * early).clamp(min=0)
        return torch.where(has_late, heat * (sign * late).clamp(min=0).sqrt(), heat)

    heat = towards(1) - towards(-1) if signed else towards(1)
    return heat / heat.abs().amax(dim=(0, 1)).clamp(min=LEAST)


@functools.lru_cache(maxsize=64)
def _enlarging(n, size, sigma):
    """A float32 matrix (size, n): n values enlarged bilinearly, then blurred by a Gaussian that the border reflects."""
    at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    lines = np.stack([np.interp(at, np.arange(n), one) for one in np.eye(n)], axis=1)
    reach = min(int(3 * sigma + 0.5), size - 1)
    return gaussian_filter1d(lines, sigma, axis=0, mode="mirror", radius=reach).astype(np.float32)


def _masking_cam(method):
    """A ScoreCAM or AblationCAM whose masked passes serve all categories: grad-cam has one row of passes for each.

    It takes a `_Fork` for a model, and all rows of its input are the same image.
    """
    from pytorch_grad_cam import ScoreCAM

    class Shared(method):
        def compute_cam_per_layer(self, *args):
            self.target_layers.sort(key=list(self.model.outputs).index)  # grad-cam has the activations as they run
            return super().compute_cam_per_layer(*args)

        def scores(self, targets, scores_of, n, batch):
            """Each target's score of the image, (targets,), and of n masked ones, (targets, n)."""

            def run(part):
                scores = scores_of(part)
                self.activations_and_grads.activations.clear()  # of masked pictures, which nobody reads
                return scores

            whole = torch.stack([target(self.model.scores[0]) for target in targets])  # a bad target fails at once
            scores = masked_scores(run, n, batch, f"{method.__name__}, masked passes")
            return whole, torch.stack([torch.stack([target(row) for row in scores]) for target in targets])

    class Score(Shared):
        def get_cam_weights(self, images, layer, targets, activations, grads):
            maps = torch.from_numpy(activations[:1]).to(images.device)
            masks = F.interpolate(maps, images.shape[2:], mode="bilinear", align_corners=True)[0]
            lows, highs = masks.amin((1, 2), keepdim=True), masks.amax((1, 2), keepdim=True)
            masks = (masks - lows) / (highs - lows + 1e-8)
            batch = getattr(self, "batch_size", 16)
            _, scores = self.scores(
                targets, lambda part: self.model(images[:1] * masks[part, None]), len(masks), batch
            )
            check_scores(scores.T)
            return scores.softmax(dim=1).numpy(force=True)

    class Ablation(Shared):
        def get_cam_weights(self, images, layer, targets, activations, grads):
            fork, ablation = self.model, self.ablation_layer
            output, axis = fork.outputs[layer], fork.axes[layer]
            channels = ablation.activations_to_be_ablated(activations[0], self.ratio_channels_to_ablate)

            def ablated(part):
                ablation.indices = channels[part]
                ablation.set_next_batch(0, output.movedim(axis, 0), len(ablation.indices))
                put_in = ablation(None).movedim(0, axis)
                rows = images[:1] if fork.copies > 1 else images[:1].repeat(len(ablation.indices), 1, 1, 1)
                fork.put_in = len(ablation.indices)
                try:
                    with layer.register_forward_hook(lambda *_: put_in, prepend=True):
                        return fork(rows)
                finally:
                    fork.put_in = None

            if fork.mixes is not None and self.batch_size > 1:
                raise ValueError(fork.mixed())
            whole, without = self.scores(targets, ablated, len(channels), self.batch_size)
            check_scores(without.T)
            whole = whole.numpy(force=True)
            for number in np.flatnonzero(whole < 0) + 1:
                warnings.warn(
                    f"the map of category number {number} shows what speaks against it: {method.__name__} divides by "
                    "the score, which is negative here. Explain it with a constant added, such as lambda scores: "
                    "scores[0] + 100, or by another method",
                    MapWarning,
                    stacklevel=9,  # through grad-cam, to who called explain
                )
            without = [
                self.assemble_ablation_scores(scores, score, channels, activations.shape[1])  # of those left out, too
                for scores, score in zip(without.numpy(force=True), whole, strict=True)
            ]
            return (whole[:, None] - np.float32(without)) / np.where(whole == 0, 1, whole)[:, None]

    made = Score if issubclass(method, ScoreCAM) else Ablation
    made.__name__ = method.__name__
    return made


def _copy(layer, inputs, output):
    """Lets the model go on with a copy, which it may work on in place: grad-cam keeps what the layer put out."""
    return output.clone()


class _Fork(Scorer):
    """A model whose activations are detached and repeated to `copies` rows at the first target layer it reaches."""

    def __init__(self, model, layers, reshape_transform):
        super().__init__(model)
        self.paths = {layer: layer_path(model, layer) for layer in layers}
        self.reshape_transform, self.targets = reshape_transform, []

    def start(self, copies):
        """Forgets what was seen so far."""
        self.copies, self.put_in, self.is_running = copies, None, False  # put_in: rows that AblationCAM puts in
        self.outputs, self.axes, self.scores = {}, {}, None  # layer -> its output, and the axis of its pictures
        self.has_gradient = {}  # layer -> bool (rows,), from the backward pass

    def rows(self, pixel_values):
        return self.put_in or len(pixel_values) * (self.copies if self.seen and torch.is_grad_enabled() else 1)

    @contextlib.contextmanager
    def hooks(self):
        with contextlib.ExitStack() as stack:
            for layer in self.paths:
                # Before all others: transformers' own, there from the first call on, hand what they see to decoders.
                stack.enter_context(layer.register_forward_hook(self.at_target_layer, prepend=True))
            yield

    def at_target_layer(self, layer, inputs, output):
        if self.is_masked:
            return None
        path = self.paths[layer]
        if not self.is_running:
            raise ValueError(RUNS_AGAIN)
        if layer in self.seen:
            raise ValueError(runs_often(path))
        self.seen.add(layer)
        maps = layer_to_map(output, self.reshape_transform, path)
        if not torch.is_grad_enabled():
            raise ValueError(f"target layer {path} runs in torch.no_grad(), where no gradient arrives; {ADVICE}")
        check_rows(maps, len(self.images) * (self.copies if output.requires_grad else 1), path)
        check_layout(maps, self.images.shape[2:], path)
        check_finite(maps, path)
        axis = batch_axis(output, self.reshape_transform)
        if output.dtype in (torch.float16, torch.bfloat16):  # of autocast, and grad-cam makes arrays of it
            output = output.float()
        self.outputs[layer], self.axes[layer] = output.detach(), axis
        self.has_gradient[layer] = torch.tensor(False, device="cpu")
        if not output.requires_grad:
            copies = [self.copies if i == axis else 1 for i in range(output.ndim)]
            output = output.detach().requires_grad_().repeat(copies)

        def at_gradient(gradient):
            maps = layer_to_map(gradient, self.reshape_transform, path)
            largest = maps.detach().flatten(1).abs().amax(1)
            if not largest.isfinite().all():
                raise ValueError(f"the gradient at target layer {path} is not finite, as that of a root at zero")
            self.has_gradient[layer] = self.has_gradient[layer] | (largest > 0).cpu()
            if not ((largest > 0) & (largest < TINY)).any():
                return None
            factors = torch.where((largest > 0) & (largest < TINY), 1 / largest.clamp(min=LEAST), 1)
            return gradient * factors.reshape([-1 if i == axis else 1 for i in range(gradient.ndim)])

        output.register_hook(at_gradient)
        return output

    def takes(self, images):
        self.is_masked = True
        return super().takes(images)

    def forward(self, pixel_values):
        self.is_masked = not torch.is_grad_enabled()  # of masked pictures
        self.images, self.is_running, self.seen = pixel_values, True, set()
        try:
            scores = super().forward(pixel_values)
        finally:
            self.is_running = False
        if self.is_masked:
            return scores
        for layer, path in self.paths.items():
            if layer not in self.outputs:
                raise ValueError(f"target layer {path} is not reached in the forward pass; {ADVICE}")
        if not scores.requires_grad:
            raise ValueError(f"the scores do not depend on target layer {', '.join(self.paths.values())}; {ADVICE}")
        self.scores = scores.detach()
        if self.targets:
            check_scores(torch.stack([target(scores[0]) for target in self.targets]))
        return scores

    def check_gradients(self):
        for layer, has_gradient in self.has_gradient.items():
            if not has_gradient.all():
                row = int(has_gradient.int().argmin())
                which = f"category number {row + 1}" if has_gradient.any() else "any category"
                raise ValueError(
                    f"target layer {self.paths[layer]} gets a gradient of zero at every position for {which}: its "
                    "score does not depend on what stands there, as with the patch tokens of a ViT's last block, or "
                    f"the target is saturated, as a probability of 1 is (explain a logit); {ADVICE}"
                )


def _forked_maps(cam, fork, image, targets, call_options):
    """Runs the image once, its activations repeated at the target layer; where that fails, the repeated image.

    A single category has two rows, since PyTorch's BatchNorm2d can return a wrong input gradient for one; but one for
    a model that takes no more.
    """
    n = len(targets)
    rows = max(n, 2)
    repeated = targets * 2 if n == 1 else targets
    if cam.compute_input_gradient:  # ShapleyCAM differentiates the gradient once more, down to the parameters
        fork.requires_grad_(True)
        tries = [(1, rows)]
    else:
        tries = [(rows, 1), (1, rows)]
    tries += [(1, 1)] if n == 1 else []
    faults = []
    for copies, images in tries:
        fork.start(copies)
        try:
            maps = cam(image.repeat(images, 1, 1, 1), repeated[: copies * images], **call_options)
            break
        except Exception as error:
            # It failed before the fork or behind the scores, or there is nothing left to try.
            if fork.scores is not None or not fork.outputs and copies > 1 or (copies, images) == tries[-1]:
                raise
            faults.append(error)
    if faults:
        how = "the image was repeated" if images > 1 else "it runs in one row"
        message = f"the model cannot be forked at its target layer, so {how} ({faults[0]})"
        warnings.warn(message, stacklevel=3)
    if cam.uses_gradients:
        fork.check_gradients()
    return maps[:n]


def _pair_biases(cam, fork, image):
    """Puts the biases of FullGrad into the order in which their layers run: that of the gradients that they weigh.

    grad-cam has them in the order in which the layers were defined. In transformers' ResNet, where shortcuts are
    defined first and run last, each bias would meet another layer's gradient.
    """
    ran, left_out = [], []

    def note(layer, inputs, output):
        if layer in cam.target_layers:
            ran.append(layer)
        elif getattr(output, "ndim", 3) > 2:  # what is no tensor is taken for positions
            left_out.append(type(layer).__name__)

    fork.start(copies=1)
    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer in fork.modules():
            if isinstance(getattr(layer, "bias", None), torch.Tensor):
                stack.enter_context(layer.register_forward_hook(note))
        fork(image)
    if left_out or not ran:
        found = ", ".join(dict.fromkeys(left_out)) or "no layer with positions"
        raise ValueError(
            "FullGrad adds up the biases of all layers, and grad-cam's reads those of Conv2d and BatchNorm2d; this "
            f"model has them in {found}: use a method with a target layer"
        )
    biases = dict(zip(cam.target_layers, cam.bias_data, strict=True))
    cam.bias_data = [biases[layer] for layer in ran]
