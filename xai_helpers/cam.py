"""Class activation maps of many categories from one forward pass; grad-cam computes them."""

import contextlib
import inspect
import warnings

import numpy as np
import torch
from pytorch_grad_cam import AblationCAM, GradCAM, ScoreCAM
from pytorch_grad_cam.ablation_layer import AblationLayer, AblationLayerVit
from pytorch_grad_cam.base_cam import BaseCAM

from xai_helpers.reshape import ADVICE, layer_to_map
from xai_helpers.wrappers import LogitsModel, category_targets, check_picture, frozen, layer_path

CALL_OPTIONS = ("aug_smooth", "eigen_smooth")


def explain(model, pixel_values, categories, target_layer, reshape_transform=None, method=GradCAM, **options):
    """Shows what in an image speaks for each category, by default with Grad-CAM (Selvaraju et al., ICCV 2017).

    The image runs through the model once. At the target layer its activations are repeated, one row a category, so
    only the layers behind it run for each category, forward and backward. The maps are those that grad-cam gives
    for the repeated image. The model is explained in eval mode and left as it was.

    Args:
        model: a transformers classification model, or any module that maps images to a score tensor.
        pixel_values: one image as the model's processor makes it, float tensor (1, 3, height, width).
        categories: names from `config.id2label`, indices, or callables (scores of one image -> scalar); one or several.
        target_layer: the module whose output is explained, or a list of modules whose maps are averaged.
        reshape_transform: turns that output into (batch, channels, height, width); None if it has that shape.
        method: a class of grad-cam derived from its BaseCAM.
        options: `aug_smooth` and `eigen_smooth` as in grad-cam's call, others for the method's constructor.

    Returns:
        A float32 array (n_categories, height, width) in [0, 1], at the size of pixel_values. A map is zero
        everywhere where nothing at the target layer speaks for the category.

    Raises:
        ValueError: an unknown category or method; pixel_values of another shape; a layer that is not in the model,
            is not reached, has no positions or gets no gradient; a reshape transform that does not fit.
        TypeError: an option that the method does not have.
    """
    check_picture(pixel_values)
    targets = category_targets(model, categories)
    layers = list(target_layer) if isinstance(target_layer, (list, tuple)) else [target_layer]
    fork = _Fork(model, layers, reshape_transform)
    if not (isinstance(method, type) and issubclass(method, BaseCAM)):
        raise ValueError(
            f"method {getattr(method, '__name__', method)} is not derived from grad-cam's BaseCAM "
            "(for FinerCAM, give its FinerWeightedTarget as a category)"
        )
    if issubclass(method, AblationCAM):
        options.setdefault("ablation_layer", AblationLayer() if reshape_transform is None else _TokenAblation())
    call_options = {name: options.pop(name) for name in CALL_OPTIONS if name in options}
    try:
        inspect.signature(method).bind(fork, layers, reshape_transform, **options)
    except TypeError as error:
        raise TypeError(f"{method.__name__} {error}; for the call there are {', '.join(CALL_OPTIONS)}") from None

    run = _masked_maps if issubclass(method, (ScoreCAM, AblationCAM)) else _forked_maps
    with frozen(fork), fork.hooks():
        cam = method(fork, layers, reshape_transform, **options)
        try:
            maps = run(cam, fork, pixel_values.detach(), targets, call_options)
        finally:  # grad-cam's own `with` block would swallow an IndexError
            cam.activations_and_grads.release()
    return np.float32(maps)


class _Fork(LogitsModel):
    """A model whose activations are detached and repeated to `copies` rows at the first target layer it reaches."""

    def __init__(self, model, layers, reshape_transform):
        super().__init__(model)
        self.paths = {layer: layer_path(model, layer) for layer in layers}
        self.reshape_transform = reshape_transform

    def start(self, copies, rows):
        """Forgets the layers seen so far; from here on, `rows` rows of scores are wanted (None: any number)."""
        self.copies, self.rows = copies, rows
        self.has_gradient = {}  # layer -> bool (rows,), from the backward pass

    @contextlib.contextmanager
    def hooks(self):
        handles = [layer.register_forward_hook(self.at_target_layer) for layer in self.paths]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def at_target_layer(self, layer, inputs, output):
        layer_to_map(output, self.reshape_transform, self.paths[layer])
        self.has_gradient.setdefault(layer, torch.tensor(False))
        if not torch.is_grad_enabled():
            return None
        if not output.requires_grad:
            output = output.detach().requires_grad_().repeat(self.copies, *[1] * (output.ndim - 1))

        def at_gradient(gradient):
            maps = layer_to_map(gradient, self.reshape_transform, self.paths[layer])
            self.has_gradient[layer] = self.has_gradient[layer] | maps.flatten(1).any(1).cpu()

        output.register_hook(at_gradient)
        return output

    def forward(self, pixel_values):
        scores = super().forward(pixel_values)
        for layer, path in self.paths.items():
            if layer not in self.has_gradient:
                raise ValueError(f"target layer {path} is not reached in the forward pass; {ADVICE}")
        if self.rows is not None and len(scores) != self.rows:
            raise RuntimeError(f"{len(scores)} rows of scores for {self.rows} rows of activations")
        if torch.is_grad_enabled() and not scores.requires_grad:
            raise ValueError(f"the scores do not depend on target layer {', '.join(self.paths.values())}; {ADVICE}")
        return scores

    def check_gradients(self):
        for layer, has_gradient in self.has_gradient.items():
            if not has_gradient.all():
                row = int(has_gradient.int().argmin())
                which = f"category number {row + 1}" if has_gradient.any() else "any category"
                raise ValueError(
                    f"target layer {self.paths[layer]} gets a gradient of zero at every position for {which}: its "
                    "score does not depend on what stands there, as with the patch tokens of a ViT's last block; "
                    f"{ADVICE}"
                )


def _forked_maps(cam, fork, image, targets, call_options):
    """Runs the image once, its activations repeated at the target layer; where that fails, the repeated image."""
    n = len(targets)
    targets = targets * 2 if n == 1 else targets  # one row: PyTorch's BatchNorm2d can return a wrong input gradient
    maps = fault = None
    if not cam.compute_input_gradient:
        fork.start(copies=len(targets), rows=len(targets))
        try:
            maps = cam(image, targets, **call_options)
        except Exception as error:
            if not fork.has_gradient:  # it failed before the fork
                raise
            fault = error
    else:  # ShapleyCAM differentiates the gradient once more, down to the parameters
        fork.requires_grad_(True)
    if maps is None:
        fork.start(copies=1, rows=len(targets))
        maps = cam(image.repeat(len(targets), 1, 1, 1), targets, **call_options)
        if fault is not None:
            message = f"the model cannot be forked at its target layer, so the image was repeated ({fault})"
            warnings.warn(message, stacklevel=3)
    if cam.uses_gradients:
        fork.check_gradients()
    return maps[:n]


def _masked_maps(cam, fork, image, targets, call_options):
    """Runs ScoreCAM or AblationCAM one category at a time; the scores of the masked passes serve all of them."""
    parents = [
        (parent, name, child)
        for parent in fork.modules()
        for name, child in parent.named_children()
        if child in fork.paths
    ]
    fork.start(copies=1, rows=None)
    cam.model = passes = _SharedPasses(fork)
    maps = []
    try:
        with torch.no_grad():
            for target in targets:
                passes.position = 0
                maps.extend(cam(image, [target], **call_options))
    finally:  # AblationCAM leaves its layer in the model when it fails
        for parent, name, child in parents:
            setattr(parent, name, child)
    return maps


class _SharedPasses(torch.nn.Module):
    """Gives the scores of earlier passes again when they are asked for in the same order from position 0."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.scores = []
        self.position = 0

    def forward(self, pixel_values):
        if self.position == len(self.scores):
            self.scores.append(self.model(pixel_values))
        self.position += 1
        return self.scores[self.position - 1]


class _TokenAblation(AblationLayerVit):
    """grad-cam's ablation of tokens, in the place of modules that are called with more than the tokens."""

    def __call__(self, tokens, *args, **kwargs):
        return super().__call__(tokens)
