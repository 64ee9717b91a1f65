"""An explanation that ships: scores and maps of any category in one ONNX file, which needs no torch to run."""

import copy
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from xai_helpers.balance import balanced_gradients, check_rules_reach, choices
from xai_helpers.cam import depths_of, map_over_depths
from xai_helpers.cuts import tensors_of_modules
from xai_helpers.layers import NO_GRADIENT, ZERO_GRADIENT, TargetLayer, modules_and_transform
from xai_helpers.pictures import as_linear
from xai_helpers.reshape import ADVICE, check_layout, check_rows, layer_to_map, runs_often
from xai_helpers.wrappers import Scorer, frozen, index_among, input_for, layer_path

CLOSE = 1e-3  # of the largest value
AGREEING = 0.999  # of the pixels
FOLDED = 1024  # values at most of a constant that is computed beforehand: no weights
OUTPUTS, SECOND = ["scores", "signed_map", "map"], "grad_cam_map"

#: A category, by its name or index, or several with their weights.
Question = str | int | dict[str | int, float]

aten = torch.ops.aten


@dataclass(frozen=True)
class Exported:
    """What `to_onnx` wrote.

    Attributes:
        path: of the file.
        inputs, outputs: name -> (type, shape), as onnxruntime has them.
        differences: output -> the largest difference to torch, on the given picture and on a random one, as a share of
            the largest value; a thousandth of the pixels is left out, where gates stand at zero but for rounding.
        nodes: how many the graph has.
        megabytes: of the file.
        labels: the names of the categories, in the order of their indices.
    """

    path: Path
    inputs: dict[str, tuple[str, list[int]]]
    outputs: dict[str, tuple[str, list[int]]]
    differences: dict[str, float]
    nodes: int
    megabytes: float
    labels: list[str]

    def run(self, image: Any, categories: Question | list[Question]) -> dict[str, np.ndarray]:
        """What the file says of a picture, by onnxruntime on the CPU.

        Args:
            image: what the input "image" takes, an array with or without its first dimension, or a picture of its size
                if it takes pixels.
            categories: a name or an index, a dict of such with their weights for a contrast, or a list of these.

        Returns:
            Output -> array, as `outputs` has them, with a row for each category.

        Raises:
            ValueError: an unknown category (the closest names are given), an image of another shape.

        Example:
            >>> made.run(image, ["cat", {"cat": 1, "coin": -1}])["map"].shape  # doctest: +SKIP
            (2, 128, 128)
        """
        wanted, shape = self.inputs["image"]
        image = np.asarray(image, np.uint8 if wanted == "tensor(uint8)" else np.float32)
        image = image[None] if image.ndim == 3 else image
        if list(image.shape) != shape:
            given = list(image.shape)
            raise ValueError(f"the file takes pictures of shape {shape}, not {given}: resize and crop it first")
        session, names, rows = _session(self.path), dict(enumerate(self.labels)), []
        for question in categories if isinstance(categories, list) else [categories]:
            weights = np.zeros((1, len(names)), np.float32)
            for category, weight in (question if isinstance(question, dict) else {question: 1}).items():
                index = index_among(names, category) if isinstance(category, str) else range(len(names))[category]
                weights[0, index] += weight
            rows.append(session.run(None, {"image": image, "weights": weights}))
        outputs = (np.concatenate(values) for values in zip(*rows, strict=True))
        return dict(zip(self.outputs, outputs, strict=True))


def to_onnx(
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    path: str | Path,
    target_layer: torch.nn.Module | TargetLayer | None = None,
    reshape_transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    processor: Any = None,
    half: bool = False,
    gamma: float = 0.25,
    signed: bool = False,
    grad_cam_at: torch.nn.Module | TargetLayer | None = None,
) -> Exported:
    """Writes a model and its explanation to one ONNX file, and checks it against the model.

    The file takes "image" and "weights", a row of numbers over the categories: 1 for one of them, or a contrast, such
    as 1 for one and -1 for another. It gives "scores"; "signed_map", which adds up to the weighed score but for biases,
    as `attribute(..., method="balanced")` does; and "map", that of `explain`, in [0, 1]. Pictures have the size of
    pixel_values.

    Args:
        model: a transformers classification model, or any module that maps images to scores (1, n_categories).
        pixel_values: one image as the model's processor makes it, float tensor (1, channels, height, width). What the
            rules decide by looking at values is decided by it.
        path: of the file.
        target_layer, reshape_transform: None: balanced gradients. A layer, as in `explain`: both maps are Grad-CAM's
            there, the signed one before its ReLU.
        processor: the model's image processor; then the file takes uint8 pixels, (1, height, width, 3), red, green and
            blue, already resized and cropped, and does the rest. None: it takes what pixel_values is.
        half: whether weights are stored in half precision. They are rounded, and computed with in single precision.
        gamma: as in `balanced_gradients`.
        signed: whether "map" has what speaks against the category, too, in [-1, 1], as `explain(..., signed=True)`.
        grad_cam_at: a layer for a fourth output, "grad_cam_map": Grad-CAM's map, as a second opinion from the same
            weights. A layer that needs a reshape transform is given as a `TargetLayer`.

    Returns:
        An `Exported`. The file's metadata has "labels" (a JSON list), "size", "method", "second_method" (empty without
        one) and "versions".

    Raises:
        ValueError: scores that are not (1, n_categories), or have no gradient; scores or maps that differ from the
            model's by more than a thousandth of their largest value; a processor that does more to colours than scaling
            and mixing; several layers; and as `explain` does.
        RuntimeError: an operation of the model has no form in ONNX.
        ImportError: onnx, onnxscript or onnxruntime is not installed.

    Example:
        >>> from xai_helpers.checkpoints import examples, load
        >>> model, processor = load("resnet", weights="bundled", device="cpu")
        >>> [example] = examples(model, processor, 1)
        >>> made = to_onnx(model, example.pixel_values, "explained.onnx")  # doctest: +SKIP
        >>> made.inputs  # doctest: +SKIP
        {'image': ('tensor(float)', [1, 3, 128, 128]), 'weights': ('tensor(float)', [1, 8])}
    """
    _check_installed()
    pixel_values = input_for(model, pixel_values).cpu()
    place = None if target_layer is None else _place(model, target_layer, reshape_transform)
    if place and signed:
        raise ValueError("signed=True is for balanced gradients; with a layer, signed_map has both signs")
    second = None if grad_cam_at is None else _place(model, grad_cam_at)
    scorer = Scorer(copy.deepcopy(model).cpu())
    if half:
        for tensor in scorer.parameters():
            if tensor.ndim > 1:
                tensor.data = tensor.data.half().to(tensor.dtype)
    # Attention by its formula: the fused kernels' backward passes have no form in ONNX.
    with frozen(scorer), _Formula(), sdpa_kernel(SDPBackend.MATH):
        check_rules_reach(scorer)
        weights = _one_hot(scorer, pixel_values)
        if place is None:
            explanation = _balanced(scorer, pixel_values, weights, gamma, signed)
        else:
            explanation = _grad_cam(scorer, *place)
        names = OUTPUTS
        if second is not None:
            names, explanation = [*OUTPUTS, SECOND], _with_a_second(explanation, _grad_cam(scorer, *second))
        image = pixel_values
        if processor is not None:
            image, explanation = _from_pixels(explanation, processor, pixel_values)
        program = _program(explanation, image, weights, names)
        about = {
            "labels": json.dumps(labels := _labels(model, weights.shape[1])),
            "size": json.dumps(list(pixel_values.shape[2:])),
            "method": "balanced gradients" if place is None else f"Grad-CAM at {place[0]}",
            "second_method": "" if second is None else f"Grad-CAM at {second[0]}",
            "versions": json.dumps({"torch": torch.__version__, "python": platform.python_version()}),
        }
        draft = Path(path).with_name(f"{Path(path).name}.draft")
        try:
            nodes = _write(program, draft, about, half)
            differences = _differences(draft, explanation, image, weights, names)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    session = _session(Path(path))
    inputs, outputs = (
        {one.name: (one.type, one.shape) for one in some} for some in (session.get_inputs(), session.get_outputs())
    )
    return Exported(Path(path), inputs, outputs, differences, nodes, Path(path).stat().st_size / 1e6, labels)


def _place(model, target_layer, reshape_transform=None):
    """A layer's path and its reshape transform."""
    (layer, *more), reshape_transform = modules_and_transform(target_layer, reshape_transform)
    if more:
        raise ValueError("there are several target layers: export each by itself")
    return layer_path(model, layer), reshape_transform


def _check_installed():
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{error.name} is not installed: pip install onnx onnxscript onnxruntime, or xai-helpers[export]"
        ) from error


def _labels(model, n):
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    return [str(names.get(i, i)) for i in range(n)]


def _one_hot(scorer, pixel_values):
    """Weights for the category with the highest score."""
    with torch.no_grad():
        scores = scorer(pixel_values)
    if scores.ndim != 2 or len(scores) != 1:
        raise ValueError(
            f"the scores have shape {tuple(scores.shape)}, wanted (1, n_categories): wrap the model in a module whose "
            "forward gives a row of scores, such as those of one box or one region"
        )
    return F.one_hot(scores.argmax(dim=1), scores.shape[1]).to(scores)


class _Formula(TorchFunctionMode):
    """Pooling to one position by a mean, since the backward pass of some of torch's own has no form in ONNX."""

    POOLS = {
        F.adaptive_avg_pool1d: (-1,),
        torch.adaptive_avg_pool1d: (-1,),
        F.adaptive_avg_pool2d: (-2, -1),
    }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.POOLS and not kwargs and args[1] in (1, (1,), (1, 1), [1, 1]):
            return args[0].mean(self.POOLS[func], keepdim=True)
        return func(*args, **kwargs)


def _balanced(scorer, pixel_values, weights, gamma, signed):
    """A function (image, weights) -> scores, signed map, map, whose maps are those of `attribute` and `explain`."""

    def run(image):
        source = image.detach().requires_grad_()
        with balanced_gradients(gamma), tensors_of_modules(scorer) as (tensors, outputs):
            scores = scorer(source)
        return source, tensors, outputs, scores

    source, tensors, outputs, scores = run(pixel_values)
    if not scores.requires_grad:
        raise ValueError(NO_GRADIENT)
    score = (scores * weights).sum()
    depths = depths_of(score, source, tensors, outputs)
    if not torch.autograd.grad(score, source)[0].any():
        raise ValueError(ZERO_GRADIENT)

    def explanation(image, weights):
        source, tensors, _, scores = run(image)
        looked_at = [source, *(tensors[place] for place, _ in depths)]
        gradients = torch.autograd.grad((scores * weights).sum(), looked_at)
        adds_up = (source * gradients[0]).sum(dim=1)
        return scores.detach(), adds_up.detach(), map_over_depths(looked_at, gradients, depths, signed)[None]

    return explanation


def _grad_cam(scorer, path, reshape_transform):
    """The same for Grad-CAM at a layer."""
    layer, caught, size = scorer.model.get_submodule(path), [], None

    def at_layer(module, inputs, output):
        maps = layer_to_map(output, reshape_transform, path)
        check_rows(maps, 1, path)
        check_layout(maps, size, path)
        caught.append(output)
        return output.clone()  # on which a later step may work in place

    def explanation(image, weights):
        nonlocal size
        caught.clear()
        size = image.shape[2:]
        with layer.register_forward_hook(at_layer, prepend=True):
            scores = scorer(image.detach().requires_grad_())
        if len(caught) != 1:
            unreached = f"target layer {path} is not reached in the forward pass; {ADVICE}"
            raise ValueError(runs_often(path) if caught else unreached)
        (output,) = caught
        maps = layer_to_map(output, reshape_transform, path)
        (gradient,) = torch.autograd.grad((scores * weights).sum(), output)
        gradient = layer_to_map(gradient, reshape_transform, path)
        signed = (gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True)

        def scaled(heat):  # as grad-cam does it, before and after it is enlarged
            heat = heat - heat.amin(dim=(2, 3), keepdim=True)
            return heat / (heat.amax(dim=(2, 3), keepdim=True) + 1e-7)

        heat = F.interpolate(scaled(signed.clamp(min=0)), size, mode="bilinear", align_corners=False)
        signed = F.interpolate(signed, size, mode="bilinear", align_corners=False)
        return scores.detach(), signed[:, 0].detach(), scaled(heat)[:, 0].detach()

    return explanation


def _with_a_second(explanation, second):
    """An explanation with the map of another one behind it."""

    def both(image, weights):
        return *explanation(image, weights), second(image, weights)[2]

    return both


def _from_pixels(explanation, processor, pixel_values):
    """A picture in uint8 that is (nearly) that of some pixel values, and the explanation of such."""
    matrix, offset = (torch.from_numpy(values) for values in as_linear(processor))
    colours = (pixel_values.permute(0, 2, 3, 1) - offset) @ torch.linalg.inv(matrix).T
    image = colours.round().clamp(0, 255).to(torch.uint8)

    def from_pixels(image, weights):
        return explanation((image.to(matrix.dtype) @ matrix.T + offset).permute(0, 3, 1, 2), weights)

    return image, from_pixels


def _convolution_backward(gradient, x, weight, bias_sizes, stride, padding, dilation, transposed, _, groups, mask):
    """The gradient with respect to the input, as a transposed convolution; the weights need none."""
    if transposed:
        return aten.convolution(gradient, weight, None, stride, padding, dilation, False, [0, 0], groups), None, None
    rest = [
        x.shape[2 + i]
        - ((gradient.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1)
        for i in range(len(stride))
    ]
    return aten.convolution(gradient, weight, None, stride, padding, dilation, True, rest, groups), None, None


def _decompositions():
    """What makes ONNX's few operations of torch's many."""
    from torch._decomp import core_aten_decompositions, get_decompositions

    table = dict(core_aten_decompositions())
    table.update(
        get_decompositions(
            [
                aten.native_layer_norm_backward,
                aten.gelu_backward,
                aten.silu_backward,
                aten._softmax_backward_data,
                aten.threshold_backward,
                aten.native_batch_norm_backward,
                aten.hardtanh_backward,
            ]
        )
    )
    table[aten.convolution_backward.default] = _convolution_backward
    # Functionalising makes copies of views, which are views again here.
    for name in "slice view select permute expand transpose unsqueeze squeeze detach alias".split():
        of_copies = getattr(aten, f"{name}_copy")
        for overload in of_copies.overloads():
            if hasattr(getattr(aten, name), overload):
                view = getattr(getattr(aten, name), overload)
                table[getattr(of_copies, overload)] = lambda *args, view=view, **options: view(*args, **options)
    return table


def _program(explanation, image, weights, names):
    """The explanation as an ONNX program: traced, without writes in place, and exported."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with choices() as made:
        explanation(image, weights)

    def again(image, weights):
        with choices(made):
            return explanation(image, weights)

    table = _decompositions()
    graph = make_fx(again, decomposition_table=table)(image, weights)
    graph = make_fx(torch.func.functionalize(graph, remove="mutations_and_views"), decomposition_table=table)(
        image, weights
    )
    try:
        return torch.onnx.export(
            graph.eval(),
            (image, weights),
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=["image", "weights"],
            output_names=names,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        causes, cause = [], error
        while cause is not None:
            causes.append(str(cause).splitlines()[0])
            cause = cause.__cause__
        raise RuntimeError(f"an operation of the model has no form in ONNX: {causes[-1]}") from error


def _write(program, path, about, half):
    """Stores each weight once; only small constants are computed beforehand. Returns the number of nodes."""
    import onnx
    import onnx_ir
    from onnx_ir.passes import common
    from onnxscript import optimizer

    graph = program.model
    optimizer.optimize_ir(graph, input_size_limit=FOLDED, output_size_limit=FOLDED)
    for tidy in (
        lambda: common.DeduplicateInitializersPass(size_limit=2**31),
        common.CommonSubexpressionEliminationPass,
        common.RemoveUnusedNodesPass,
        common.ClearMetadataAndDocStringPass,
    ):
        tidy()(graph)
    proto = onnx_ir.to_proto(graph)
    if half:
        _halve(proto)
    del proto.metadata_props[:]
    for key, value in about.items():
        proto.metadata_props.add(key=key, value=value)
    onnx.save(proto, path)
    return len(proto.graph.node)


def _halve(proto):
    """Stores in half precision what loses nothing by it; it is turned back where it is read."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for stored in proto.graph.initializer:
        if stored.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(stored)
        with np.errstate(over="ignore"):
            halved = values.astype(np.float16)
        if values.size < FOLDED or not (halved.astype(np.float32) == values).all():
            continue
        name = stored.name
        stored.CopyFrom(numpy_helper.from_array(halved, f"{name}_half"))
        casts.append(helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _session(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it remarks on constants that it leaves as they are
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _differences(path, explanation, image, weights, names):
    """Output -> the largest difference to torch, as a share of the largest value, on this picture and a random one.

    Where an activation is zero but for rounding, its gate falls either way. So a thousandth of the pixels may differ,
    and the random picture is the best of three: what is wrong with the file is wrong with all of them.

    Raises:
        ValueError: one is too large.
    """
    session, generator = _session(path), torch.Generator().manual_seed(0)
    contrast = weights - weights.roll(1, dims=1)  # one category rather than the one beside it

    def compared(one, asked):
        given = session.run(names, {"image": one.numpy(), "weights": asked.numpy()})
        found = []
        for mine, wanted in zip(given, explanation(one, asked), strict=True):
            wanted = wanted.numpy(force=True)
            difference = np.quantile(np.abs(mine - wanted), AGREEING) / max(np.abs(wanted).max(), 1e-30)
            found.append(float(difference))
        return found

    def random():
        if image.dtype == torch.uint8:
            return torch.randint(0, 256, image.shape, generator=generator, dtype=torch.uint8)
        return image.mean() + image.std() * torch.randn(image.shape, generator=generator)

    at_random = min((compared(random(), contrast) for _ in range(3)), key=max)
    found = dict(zip(names, map(max, compared(image, weights), at_random), strict=True))
    worst = max(found, key=found.__getitem__)
    if not found[worst] <= CLOSE:
        raise ValueError(
            f"{worst} of the file and of the model differ by {found[worst]:.1e} of the largest value: what was decided "
            "by looking at this picture does not hold for another one. Give another picture, or gamma=0"
        )
    return found
