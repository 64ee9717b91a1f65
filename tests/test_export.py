import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import MobileViTImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor

from xai_helpers.attribution import attribute
from xai_helpers.cam import explain
from xai_helpers.export import to_onnx
from xai_helpers.layers import find_target_layers
from xai_helpers.pictures import as_linear

NAMES = {0: "cat", 1: "coffee cup", 2: "rocket", 3: "coin"}


class Convolutions(nn.Module):
    """Convolutions, norms and a gate, whose statistics are not the initial ones."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 12, 3, stride=2),
            nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, groups=4), nn.SiLU(),
        )  # fmt: skip
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(12, 4)
        for module in self.body:
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.head(self.pool(self.body(x)).flatten(1))


def tiny(name):
    torch.manual_seed(0)
    if name == "convolutions":
        return Convolutions().eval()
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        initializer_range=0.2, id2label=NAMES,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def picture(seed=1):
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def run(path, image, weights):
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {"image": np.asarray(image), "weights": np.float32([weights])})


@pytest.fixture(scope="module", params=["convolutions", "vit"])
def exported(request, tmp_path_factory):
    model = tiny(request.param)
    path = tmp_path_factory.mktemp("exported") / "explained.onnx"
    return model, to_onnx(model, picture(), path)


def test_the_file_gives_the_scores_and_maps_of_another_picture(exported):
    model, made = exported
    for seed, weights, category in (
        (2, [0, 0, 1, 0], 2),
        (3, [1, 0, 0, 0], 0),
        (4, [0, 1, 0, -1], lambda scores: scores[1] - scores[3]),
    ):
        x = picture(seed)
        scores, signed, heat = run(made.path, x, weights)
        with torch.no_grad():
            wanted = model(x)
        wanted = wanted if isinstance(wanted, torch.Tensor) else wanted.logits
        np.testing.assert_allclose(scores, wanted, atol=1e-5)
        attributed = attribute(model, x, category, method="balanced")
        np.testing.assert_allclose(signed, attributed, atol=1e-4 * np.abs(attributed).max())
        np.testing.assert_allclose(heat, explain(model, x, category), atol=1e-3)


def test_what_is_said_of_the_file_is_so(exported):
    model, made = exported
    assert made.inputs == {"image": ("tensor(float)", [1, 3, 32, 32]), "weights": ("tensor(float)", [1, 4])}
    assert made.outputs == {
        "scores": ("tensor(float)", [1, 4]), "signed_map": ("tensor(float)", [1, 32, 32]),
        "map": ("tensor(float)", [1, 32, 32]),
    }  # fmt: skip
    assert made.megabytes == made.path.stat().st_size / 1e6 and max(made.differences.values()) < 1e-3
    proto = onnx.load(made.path)
    assert made.nodes == len(proto.graph.node)
    about = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(about["labels"]) == (list(NAMES.values()) if hasattr(model, "config") else list("0123"))
    assert json.loads(about["size"]) == [32, 32] and about["method"] == "balanced gradients"
    assert json.loads(about["versions"])["torch"] == torch.__version__
    assert [path.name for path in made.path.parent.iterdir()] == ["explained.onnx"]  # no weights beside it


def test_the_file_is_run_by_names_and_indices_and_contrasts(exported):
    model, made = exported
    x, names = picture(2), made.labels
    found = made.run(x, [names[2], 0, {names[1]: 1, 3: -1}])
    for row, weights in enumerate([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, -1]]):
        for values, wanted in zip(found.values(), run(made.path, x, weights), strict=True):
            np.testing.assert_array_equal(values[row], wanted[0])
    np.testing.assert_array_equal(made.run(x[0].numpy(), 0)["map"], found["map"][1:2])
    with pytest.raises(ValueError, match=r"no category 'otter'; the closest are"):
        made.run(x, "otter")
    with pytest.raises(ValueError, match=r"pictures of shape \[1, 3, 32, 32\], not \[1, 32, 32, 3\]"):
        made.run(x.permute(0, 2, 3, 1), 0)


def test_weights_are_stored_once_and_in_half_precision_are_rounded(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 5, stride=4), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.SiLU(), nn.Flatten(), nn.Linear(1600, 4)
    )
    full, half = (to_onnx(net, picture(), tmp_path / f"{flag}.onnx", half=flag) for flag in (False, True))
    stored = [onnx.numpy_helper.to_array(one) for one in onnx.load(full.path).graph.initializer]
    for layer in (net[0], net[2], net[5]):
        values = np.sort(layer.weight.detach().numpy(), axis=None)
        assert sum(one.size == values.size and np.array_equal(np.sort(one, None), values) for one in stored) == 1
    weights = sum(p.numel() for p in net.parameters()) * 4 / 1e6
    # Beside the weights, by as much in both, there are the graph and what enlarges and smooths maps.
    assert weights < full.megabytes and full.megabytes - half.megabytes == pytest.approx(weights / 2, rel=0.05)

    scores, _, heat = run(half.path, picture(5), [1, 0, 0, 0])
    with torch.no_grad():
        assert np.abs(net(picture(5)).numpy() - scores).max() > 1e-6  # that net is as it was
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.half())
        np.testing.assert_allclose(scores, net(picture(5)), atol=1e-5)
    np.testing.assert_allclose(heat, explain(net, picture(5), 0), atol=1e-3)


@pytest.mark.parametrize("name", ["convolutions", "vit"])
def test_grad_cam_at_a_layer(tmp_path, name):
    model = tiny(name)
    layer = find_target_layers(model, picture()).cam
    made = to_onnx(model, picture(), tmp_path / "cam.onnx", layer)
    _, signed, heat = run(made.path, picture(2), [0, 0, 1, 0])
    np.testing.assert_allclose(heat, explain(model, picture(2), 2, layer), atol=1e-3)
    assert (signed < 0).any() and np.corrcoef(signed.clip(min=0).ravel(), heat.ravel())[0, 1] > 0.9
    about = {entry.key: entry.value for entry in onnx.load(made.path).metadata_props}
    assert about["method"] == f"Grad-CAM at {layer.path}"


def test_grad_cam_and_what_speaks_against_come_from_the_same_weights(tmp_path):
    model = tiny("vit")
    layer = find_target_layers(model, picture()).cam
    made = to_onnx(model, picture(), tmp_path / "both.onnx", signed=True, grad_cam_at=layer)
    _, _, heat, grad_cam = run(made.path, picture(2), [0, 0, 1, 0])
    np.testing.assert_allclose(heat, explain(model, picture(2), 2, signed=True), atol=1e-3)
    assert heat.min() < -0.05
    np.testing.assert_allclose(grad_cam, explain(model, picture(2), 2, layer), atol=1e-3)
    assert made.outputs["grad_cam_map"] == ("tensor(float)", [1, 32, 32]) and made.differences["grad_cam_map"] < 1e-3
    about = {entry.key: entry.value for entry in onnx.load(made.path).metadata_props}
    assert about["second_method"] == f"Grad-CAM at {layer.path}"
    sizes = [onnx.numpy_helper.to_array(one).size for one in onnx.load(made.path).graph.initializer]
    assert sizes.count(3 * 8 * 8 * 16) == 1  # the patch embedding, the largest


def test_grad_cam_before_a_step_in_place_is_that_of_explain(tmp_path):
    """A ReLU works in place on what the layer has put out."""
    model = tiny("convolutions")
    layer = model.body[1]
    made = to_onnx(model, picture(), tmp_path / "cam.onnx", layer)
    _, _, heat = run(made.path, picture(2), [0, 0, 0, 1])
    np.testing.assert_allclose(heat, explain(model, picture(2), 3, layer), atol=1e-3)


def test_with_a_processor_the_file_takes_pixels(tmp_path):
    model = tiny("vit")
    mean, deviation = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=mean, image_std=deviation)
    made = to_onnx(model, picture(), tmp_path / "pixels.onnx", processor=processor)
    assert made.inputs["image"] == ("tensor(uint8)", [1, 32, 32, 3])
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    x = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    scores, _, heat = run(made.path, pixels[None], [0, 1, 0, 0])
    np.testing.assert_allclose(scores, model(x).logits.detach(), atol=1e-4)
    np.testing.assert_allclose(heat, explain(model, x, 1), atol=2e-3)
    np.testing.assert_array_equal(made.run(Image.fromarray(pixels), 1)["map"], heat)


def test_colours_as_a_matrix():
    matrix, offset = as_linear(ViTImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3]))
    np.testing.assert_allclose(matrix, np.diag(1 / 255 / np.array([0.2, 0.25, 0.3])), atol=1e-6)
    np.testing.assert_allclose(offset, [-2, -2, -2], atol=1e-5)
    size = {"height": 32, "width": 32}
    turned, _ = as_linear(MobileViTImageProcessor(size={"shortest_edge": 32}, crop_size=size))  # blue, green, red
    np.testing.assert_allclose(turned, np.eye(3)[::-1] / 255, atol=1e-6)


def test_colours_that_no_matrix_describes():
    def squares(image, return_tensors):
        return {"pixel_values": torch.tensor(np.array(image)).permute(2, 0, 1)[None] ** 2.0}

    with pytest.raises(ValueError, match="does more to colours"):
        as_linear(squares)


def test_it_runs_where_there_is_no_torch(exported):
    _, made = exported
    code = (
        "import sys; sys.modules['torch'] = None\nimport numpy as np, onnxruntime\n"
        f"session = onnxruntime.InferenceSession({str(made.path)!r})\n"
        "image = np.zeros((1, 3, 32, 32), np.float32); weights = np.eye(4, dtype=np.float32)[:1]\n"
        "print(session.run(['map'], {'image': image, 'weights': weights})[0].shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 32, 32)", done.stderr


def test_the_model_is_left_as_it_was(tmp_path):
    model = tiny("convolutions").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    to_onnx(model, picture(), tmp_path / "explained.onnx", half=True)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Unknown(Convolutions):
    def forward(self, x):
        return super().forward(x) + torch.special.bessel_j1(x.detach()).mean()


class OfThisPictureAlone(nn.Module):
    """A convolution of the pixels, which are nowhere negative in one picture and negative in another."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean(dim=(2, 3))


class Aside(Convolutions):
    """A layer that the pass does not reach, and one that it reaches twice."""

    def __init__(self):
        super().__init__()
        self.unreached, self.twice = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return super().forward(self.twice(self.twice(x)))


class ZeroHead(Convolutions):
    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.head.weight)


class Dense(Convolutions):
    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    ("model_class", "pixel_values", "options", "kind", "message"),
    [
        (Unknown, picture(), {}, RuntimeError, "has no form in ONNX: .*bessel_j1"),
        (OfThisPictureAlone, picture().abs(), {}, ValueError, "of the file and of the model differ by .* or gamma=0"),
        (Dense, picture(), {}, ValueError, r"scores have shape \(1, 12, 15, 15\), wanted \(1, n_categories\)"),
        (Convolutions, picture()[0], {}, ValueError, "unsqueeze"),
        (Convolutions, picture(), {"target_layer": nn.Linear(1, 1)}, ValueError, "Linear is not part of this"),
        (Convolutions, picture(), {"gamma": -1}, ValueError, "gamma is a number of at least 0"),
        (ZeroHead, picture(), {}, ValueError, "gradient of the scores is zero everywhere"),
        (Aside, picture(), {"target_layer": "unreached"}, ValueError, "unreached is not reached.*find_target_layers"),
        (Aside, picture(), {"target_layer": "twice"}, ValueError, "twice runs more than once in a pass"),
        (Convolutions, picture(), {"target_layer": "head"}, ValueError, "head returns shape .*find_target_layers"),
    ],
)
def test_what_is_wrong_is_said_and_no_file_is_left(tmp_path, model_class, pixel_values, options, kind, message):
    torch.manual_seed(0)
    model = model_class().eval()
    if isinstance(options.get("target_layer"), str):
        options = {"target_layer": model.get_submodule(options["target_layer"])}
    with pytest.raises(kind, match=message):
        to_onnx(model, pixel_values, tmp_path / "explained.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_several_layers_and_what_a_layer_does_not_have_are_refused(tmp_path):
    model = tiny("convolutions")
    with pytest.raises(ValueError, match="export each by itself"):
        to_onnx(model, picture(), tmp_path / "explained.onnx", [model.body[3], model.body[6]])
    with pytest.raises(ValueError, match="several target layers: export each by itself"):
        to_onnx(model, picture(), tmp_path / "explained.onnx", grad_cam_at=[model.body[3], model.body[6]])
    with pytest.raises(ValueError, match="signed=True is for balanced gradients"):
        to_onnx(model, picture(), tmp_path / "explained.onnx", model.body[3], signed=True)


def test_without_its_packages_it_says_which_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime is not installed: pip install .* xai-helpers\[export\]"):
        to_onnx(tiny("convolutions"), picture(), tmp_path / "explained.onnx")
