import copy
import functools
import warnings

import numpy as np
import pytest
import torch
from pytorch_grad_cam import (
    AblationCAM,
    EigenCAM,
    FinerCAM,
    FullGrad,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    ScoreCAM,
    ShapleyCAM,
    XGradCAM,
)
from pytorch_grad_cam.ablation_layer import AblationLayerVit
from pytorch_grad_cam.utils.image import scale_accross_batch_and_channels
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from rehearsal import accelerator
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from torch import nn
from tqdm import tqdm
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from xai_helpers import wrappers
from xai_helpers.cam import explain
from xai_helpers.checkpoints import examples, load
from xai_helpers.reshape import tokens_to_map
from xai_helpers.scenes import labels
from xai_helpers.scoring import score_table
from xai_helpers.wrappers import LogitsModel

GRID = functools.partial(tokens_to_map, grid=(4, 4))
NAMES = {0: "cat", 1: "coffee cup", 2: "rocket", 3: "coin", 4: "pagoda"}


class Convolutions(nn.Module):
    """A CNN with BatchNorm whose running statistics are not the initial ones."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
            nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.5),
        )  # fmt: skip
        self.head = nn.Linear(8, 5)
        for module in self.body:
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.head(self.body(x).mean(dim=(2, 3)))


def tiny(name):
    """A random model of five categories in eval mode, a target layer and its reshape transform."""
    torch.manual_seed(0)
    if name == "resnet":
        config = ResNetConfig(embedding_size=4, hidden_sizes=[8, 16], depths=[1, 1], id2label=NAMES)
        model = ResNetForImageClassification(config).eval()
        model.classifier[1].weight.data.normal_()
        return model, model.resnet.encoder.stages[-1], None
    if name == "vit":
        config = ViTConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
            initializer_range=0.2,
            id2label=NAMES,
        )
        model = ViTForImageClassification(config).eval()
        return model, model.vit.layers[-2], GRID
    model = Convolutions().eval()
    return model, model.body[3], None


def picture(height=32, width=32):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def plain(model, pixel_values, categories, layers, reshape_transform, method=GradCAM, smooth=False, **options):
    """grad-cam as its documentation calls it, at least two rows."""
    targets = [category if callable(category) else ClassifierOutputTarget(category) for category in categories]
    targets *= 2 if len(targets) == 1 else 1
    with method(LogitsModel(model).eval(), layers, reshape_transform, **options) as cam:
        maps = cam(pixel_values.repeat(len(targets), 1, 1, 1), targets, aug_smooth=smooth)
    return maps[: len(categories)]


def count_passes(model, call):
    passes = []
    handle = model.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    call()
    handle.remove()
    return passes


def state(model):
    """What explain must leave as it was."""
    return (
        [(name, id(module), module.training, len(module._forward_hooks)) for name, module in model.named_modules()],
        [(parameter.requires_grad, id(parameter.grad), len(parameter._backward_hooks or ())) for parameter in
         model.parameters()],
    )  # fmt: skip


class OneLayer(nn.Module):
    """Two channels of the image are the activations; scores are weighted sums of the channels' means."""

    def __init__(self, weights):
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1, bias=False)
        self.layer.weight.data = torch.eye(3)[:2, :, None, None]
        self.weights = torch.tensor(weights)

    def forward(self, x):
        return self.layer(x).mean(dim=(2, 3)) @ self.weights.T


def test_a_cam_worked_out_by_hand():
    # A channel's weight is the mean of its gradient, w / 6, so a map is relu(w0 * A0 + w1 * A1), here divided by
    # its maximum (the minimum of each is 0).
    model = OneLayer([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    A0 = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    A1 = torch.tensor([[0.0, 0.0, 8.0], [0.0, 2.0, 0.0]])
    pixel_values = torch.stack([A0, A1, torch.full((2, 3), 7.0)])[None]
    maps = explain(model, pixel_values, [0, 1, 2, 3], model.layer)
    assert maps.dtype == np.float32 and maps.shape == (4, 2, 3)
    np.testing.assert_allclose(maps[0], [[1, 0, 0], [0, 0, 0.25]], atol=1e-6)
    np.testing.assert_allclose(maps[1], [[0.5, 0, 1], [0, 0.25, 0.125]], atol=1e-6)
    np.testing.assert_allclose(maps[2], [[1, 0, 0], [0, 0, 0.25]], atol=1e-6)
    np.testing.assert_array_equal(maps[3], np.zeros((2, 3)))  # everything speaks against it: no error, a map of zeros


class WorksInPlace(OneLayer):
    """Adds the third channel of the image to what the layer has put out, in its memory, as a residual block may."""

    def forward(self, x):
        activations = self.layer(x)
        activations += x[:, 2:]
        return activations.mean(dim=(2, 3)) @ self.weights.T


def test_a_step_in_place_behind_the_layer_changes_no_map():
    # Each weight is 1 / 6 with and without the addition, so the map is A0 / 4; from what stands in that memory
    # afterwards it would be (A0 + 9 at one position) / 9.
    model = WorksInPlace([[1.0, 0.0]])
    A0 = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    added = torch.tensor([[0.0, 9.0, 0.0], [0.0, 0.0, 0.0]])
    pixel_values = torch.stack([A0, torch.zeros(2, 3), added])[None]
    before = state(model)
    maps = explain(model, pixel_values, 0, model.layer)
    np.testing.assert_allclose(maps[0], [[1, 0, 0], [0, 0, 0.25]], atol=1e-6)
    assert state(model) == before
    assert plain(model, pixel_values, [0], [model.layer], None)[0, 0, 1] == pytest.approx(1)  # on a CPU


def test_a_step_in_place_behind_the_layer_changes_no_ablation():
    class NotInPlace(OneLayer):
        def forward(self, x):
            return (self.layer(x) + x[:, 2:]).mean(dim=(2, 3)) @ self.weights.T

    weights = [[1.0, 0.6]]
    maps = [explain(model, picture().abs(), 0, model.layer, method=AblationCAM)
            for model in (WorksInPlace(weights), NotInPlace(weights))]  # fmt: skip
    np.testing.assert_allclose(maps[0], maps[1], atol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "vit", "batchnorm"])
@pytest.mark.parametrize("indices", [[3], [2, 0], [4, 1, 0, 3, 2]])
@pytest.mark.parametrize("method", [GradCAM, GradCAMPlusPlus, XGradCAM, LayerCAM, HiResCAM, EigenCAM])
def test_maps_equal_plain_grad_cam(name, indices, method):
    model, layer, reshape_transform = tiny(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a fallback to the repeated image would pass unnoticed
        warnings.filterwarnings("ignore", "the map of category number")  # as grad-cam's, that are zero
        maps = explain(model, picture(), indices, layer, reshape_transform, method=method)
    expected = plain(model, picture(), indices, [layer], reshape_transform, method)
    assert maps.max() > 0.9
    np.testing.assert_allclose(maps, expected, atol=1e-5)


def test_maps_equal_plain_grad_cam_at_a_norm_inside_a_block():
    model, _, reshape_transform = tiny("vit")
    layer = model.vit.layers[-1].layernorm_before
    maps = explain(model, picture(), [0, 4], layer, reshape_transform)
    np.testing.assert_allclose(maps, plain(model, picture(), [0, 4], [layer], reshape_transform), atol=1e-5)


def test_maps_of_several_layers_are_averaged_as_in_grad_cam():
    model, _, reshape_transform = tiny("vit")
    layers = [model.vit.layers[1], model.vit.layers[0]]
    maps = explain(model, picture(), [0, 4], layers, reshape_transform)
    np.testing.assert_allclose(maps, plain(model, picture(), [0, 4], layers, reshape_transform), atol=1e-5)


def test_shapley_cam_needs_second_derivatives():
    model, layer, _ = tiny("batchnorm")
    maps = explain(model, picture(), [0, 4], layer, method=ShapleyCAM)
    np.testing.assert_allclose(maps, plain(model, picture(), [0, 4], [layer], None, ShapleyCAM), atol=1e-5)


class Attends(nn.Module):
    """Convolution, attention between its positions as a ViT has it, and convolution again."""

    def __init__(self):
        super().__init__()
        self.before, self.behind = nn.Conv2d(3, 16, 4, stride=4), nn.Conv2d(16, 8, 1)
        self.block, self.head = tiny("vit")[0].vit.layers[0], nn.Linear(8, 5)

    def forward(self, x):
        x = self.before(x)
        x = self.block(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
        return self.head(self.behind(x).relu().mean(dim=(2, 3)) ** 2)


def test_shapley_cam_of_a_model_that_attends():
    torch.manual_seed(0)
    model = Attends().eval()
    config = model.block.attention.config
    assert config._attn_implementation == "sdpa"
    maps = explain(model, picture(), [0, 4], model.behind, method=ShapleyCAM)
    assert config._attn_implementation == "sdpa"
    config._attn_implementation = "eager"
    wanted = plain(model, picture(), [0, 4], [model.behind], None, ShapleyCAM)
    np.testing.assert_allclose(maps, wanted, atol=1e-5)


def test_shapley_cam_says_that_it_takes_no_tokens():
    model, layer, reshape_transform = tiny("vit")
    with pytest.raises(ValueError, match="ShapleyCAM takes no reshape transform.*GradCAM, HiResCAM and LayerCAM"):
        explain(model, picture(), "cat", layer, reshape_transform, method=ShapleyCAM)


def full_gradients(model, x, category):
    """Input * gradient, and bias * gradient of each BatchNorm2d, all with their signs (Srinivas and Fleuret 2019)."""
    outputs = {}
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [norm.register_forward_hook(lambda n, inputs, output: outputs.update({n: output})) for norm in norms]
    x = x.clone().requires_grad_()
    score = LogitsModel(model)(x)[0, category]
    gradients = torch.autograd.grad(score, [x, *outputs.values()])
    for handle in handles:
        handle.remove()
    parts = [x * gradients[0]]
    for norm, gradient in zip(outputs, gradients[1:], strict=True):
        bias = norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()
        parts.append(bias[:, None, None] * gradient)
    return score.item(), [part.detach() for part in parts]


def test_full_grad_pairs_each_bias_with_its_own_gradient():
    model, layer, _ = tiny("resnet")  # its shortcuts are defined before the layers that run before them
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.bias.data, module.running_mean):
                value.normal_()
    wanted = []
    for category in (0, 4):
        score, parts = full_gradients(model, picture(), category)
        whole = sum(part.sum().item() for part in parts) + model.classifier[1].bias[category].item()
        assert whole == pytest.approx(score, abs=1e-3)  # the parts are complete: none is missing, none is twice
        scaled = [scale_accross_batch_and_channels(part.abs().numpy(), (32, 32)).sum(axis=(0, 1)) for part in parts]
        heat = sum(scaled)
        wanted.append((heat - heat.min()) / (heat.max() - heat.min()))
    maps = explain(model, picture(), [0, 4], layer, method=FullGrad)
    np.testing.assert_allclose(maps, wanted, atol=1e-5)


class PairOfScores(nn.Module):
    """Has a bias, and returns no tensor."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(5))

    def forward(self, scores):
        return scores + self.bias, None


class LogitsOf(nn.Module):
    """The first of what a model's head returns."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, x):
        return self.model.classifier(self.model.resnet(x).pooler_output)[0]


def test_full_grad_prints_nothing_and_refuses_what_it_cannot_read(capsys):
    model, layer, _ = tiny("resnet")
    explain(model, picture(), "cat", layer, method=FullGrad)
    assert capsys.readouterr().out == ""
    model.classifier.append(PairOfScores())
    with pytest.raises(ValueError, match="this model has them in PairOfScores"):
        explain(LogitsOf(model), picture(), "cat", layer, method=FullGrad)
    model, layer, reshape_transform = tiny("vit")
    before = state(model)
    with pytest.raises(ValueError, match="FullGrad adds up .* this model has them in LayerNorm, Linear: use a method"):
        explain(model, picture(), "cat", layer, reshape_transform, method=FullGrad)
    assert state(model) == before


@pytest.mark.parametrize("name", ["resnet", "vit", "batchnorm"])
def test_five_categories_cost_one_forward_pass(name):
    model, layer, reshape_transform = tiny(name)
    passes = count_passes(model, lambda: explain(model, picture(), range(5), layer, reshape_transform))
    assert passes == [1]


def test_the_layers_before_the_target_layer_see_one_row_and_those_behind_a_row_a_category():
    model, layer, reshape_transform = tiny("vit")
    before = count_passes(model.vit.layers[0], lambda: explain(model, picture(), range(5), layer, reshape_transform))
    behind = count_passes(model.vit.layers[2], lambda: explain(model, picture(), range(5), layer, reshape_transform))
    assert (before, behind) == ([1], [5])


def masking_case(name, method):
    """A model, a target layer, its reshape transform, and what grad-cam's own method is to be constructed with."""
    model, layer, reshape_transform = tiny(name)
    if name == "vit":
        layer = model.vit.layers[-1].layernorm_before
    options = {"ablation_layer": AblationLayerVit()} if method is AblationCAM and name == "vit" else {}
    return model, layer, reshape_transform, options


each_masking_method = pytest.mark.parametrize("method", [ScoreCAM, AblationCAM])
each_layout = pytest.mark.parametrize("name", ["batchnorm", "resnet", "vit"])


@each_masking_method
@each_layout
@pytest.mark.parametrize(
    "categories",
    [[3], [2, 0], [2, 0, 4], [lambda scores: scores[2] - scores[0], 1, lambda scores: scores[4:].sum() - scores[1]]],
    ids=["one", "two", "three", "callables"],
)
def test_maps_of_masking_methods_equal_plain_grad_cam(name, method, categories):
    model, layer, reshape_transform, options = masking_case(name, method)
    maps = explain(model, picture(), categories, layer, reshape_transform, method=method)
    expected = plain(model, picture(), categories, [layer], reshape_transform, method, **options)
    assert maps.max() > 0.9
    np.testing.assert_allclose(maps, expected, atol=1e-5)


@each_masking_method
@each_layout
def test_further_categories_cost_masking_methods_no_further_pass(name, method):
    model, layer, reshape_transform, _ = masking_case(name, method)
    one, two, five = (
        count_passes(model, lambda n=n: explain(model, picture(), range(n), layer, reshape_transform, method=method))
        for n in (1, 2, 5)
    )
    channels = {"batchnorm": 8, "resnet": 16, "vit": 16}[name]
    # The image for its activations and scores; then masked images, or the image up to the layer, and rows behind it.
    assert one == [1, channels if method is ScoreCAM else 1]
    assert two == five == one


def test_ablated_activations_are_rows_behind_the_layer_alone():
    model, layer, reshape_transform = tiny("vit")
    call = functools.partial(explain, model, picture(), [0, 1, 2], layer, reshape_transform, method=AblationCAM)
    assert count_passes(model.vit.layers[0], call) == [1, 1]
    assert count_passes(model.vit.layers[2], call) == [3, 16]  # categories, channels


@each_masking_method
def test_masking_methods_average_several_layers_as_in_grad_cam(method):
    model, layer, _ = tiny("batchnorm")
    layers = [model.body[0], layer]
    maps = explain(model, picture(), [2, 0], layers, method=method)
    np.testing.assert_allclose(maps, plain(model, picture(), [2, 0], layers, None, method), atol=1e-5)


@each_masking_method
def test_masking_methods_take_layers_in_any_order(method):
    model, layer, _ = tiny("batchnorm")
    maps = explain(model, picture(), [2, 0], [layer, model.body[0]], method=method)
    expected = explain(model, picture(), [2, 0], [model.body[0], layer], method=method)
    np.testing.assert_array_equal(maps, expected)


@each_masking_method
def test_masking_methods_smooth_as_grad_cam(method):
    model, layer, _ = tiny("batchnorm")
    maps = explain(model, picture(), [2, 0], layer, method=method, aug_smooth=True)
    expected = plain(model, picture(), [2, 0], [layer], None, method, smooth=True)
    np.testing.assert_allclose(maps, expected, atol=1e-5)


class InThrees:
    """grad-cam's masking methods, three masked images a pass."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.batch_size = 3


class ScoreInThrees(InThrees, ScoreCAM):
    pass


class AblationInThrees(InThrees, AblationCAM):
    pass


@pytest.fixture
def bars(monkeypatch):
    """The progress bars that explain makes; they come without delay and show every step."""
    made = []

    class Bar(tqdm):
        def __init__(self, **options):
            super().__init__(**options, mininterval=0)
            made.append(self)

    monkeypatch.setattr("xai_helpers.wrappers.tqdm", Bar)
    monkeypatch.setattr("xai_helpers.wrappers.BAR_AFTER", 0)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    return made


@pytest.mark.parametrize("method", [ScoreInThrees, AblationInThrees])
@pytest.mark.parametrize(
    ("places", "options", "masks"), [([3], {}, [8]), ([0, 3], {}, [6, 8]), ([3], {"aug_smooth": True}, [8] * 6)]
)
def test_a_progress_bar_counts_the_masks_of_a_layer(bars, capsys, method, places, options, masks):
    model, _, _ = tiny("batchnorm")
    explain(model, picture(), [0, 1, 2], [model.body[place] for place in places], method=method, **options)
    assert [(bar.n, bar.total) for bar in bars] == [(n, n) for n in masks]
    out, err = capsys.readouterr()
    shown = [state for state in err.split("\r") if state.strip()]
    assert len(shown) > 1 and all(state.startswith(f"{method.__name__}, masked passes: ") for state in shown)
    assert out == "" and err.split("\r")[-2].isspace()  # the bar is wiped out


@each_masking_method
@pytest.mark.parametrize("reason", ["a quick call", "switched off"])
def test_there_is_no_progress_bar_for(reason, bars, monkeypatch, capfd, method):
    if reason == "a quick call":
        monkeypatch.setattr("xai_helpers.wrappers.BAR_AFTER", 3600)
    else:
        monkeypatch.setenv("TQDM_DISABLE", "1")
    model, layer, _ = tiny("batchnorm")
    explain(model, picture(), [0, 1], layer, method=method)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("method", [ScoreInThrees, AblationInThrees])
def test_the_progress_bar_goes_when_the_model_fails(bars, capsys, method):
    model, layer, _ = tiny("batchnorm")
    passes = []

    def fails_in_the_second_masked_pass(module, inputs, output):
        passes.append(1)
        if len(passes) == 3:
            raise RuntimeError("midway")

    with model.register_forward_hook(fails_in_the_second_masked_pass), pytest.raises(RuntimeError, match="midway"):
        explain(model, picture(), 0, layer, method=method)
    assert [(bar.n, bar.total) for bar in bars] == [(3, 8)]
    assert capsys.readouterr().err.split("\r")[-2].isspace()


@each_masking_method
def test_a_target_that_fails_does_so_before_the_masked_passes(method):
    model, layer, _ = tiny("batchnorm")
    passes = count_passes(model, lambda: pytest.raises(ValueError, explain, model, picture(), 7, layer, method=method))
    assert passes == [1]


def test_ablation_works_on_a_whole_transformer_block():
    model, layer, reshape_transform = tiny("vit")
    maps = explain(model, picture(), [0, 1], layer, reshape_transform, method=AblationCAM)
    assert maps.shape == (2, 32, 32) and maps.max() > 0.9


def test_names_indices_and_callables_say_the_same():
    model, layer, _ = tiny("resnet")
    by_index = explain(model, picture(), [2, 1], layer)
    np.testing.assert_array_equal(explain(model, picture(), ["rocket", "coffee cup"], layer), by_index)
    by_callable = explain(model, picture(), [lambda scores: scores[2], ClassifierOutputTarget(1)], layer)
    np.testing.assert_array_equal(by_callable, by_index)
    np.testing.assert_array_equal(explain(model, picture(), "rocket", layer), by_index[:1])
    np.testing.assert_array_equal(explain(model, picture(), 1, layer), by_index[1:])
    assert not np.allclose(by_index[0], by_index[1])


def test_maps_have_the_size_of_a_picture_that_is_not_square():
    model, layer, _ = tiny("resnet")
    maps = explain(model, picture(48, 80), ["cat", "coin"], layer)
    assert maps.shape == (2, 48, 80) and maps.dtype == np.float32
    assert maps.min() >= 0 and maps.max() <= 1


def test_smoothing_is_passed_to_the_call():
    model, layer, _ = tiny("resnet")
    passes = count_passes(model, lambda: explain(model, picture(), [0, 1], layer, aug_smooth=True))
    assert passes == [1] * 6  # flipped or not, times three brightnesses
    smooth, rough = (explain(model, picture(), [0, 1], layer, eigen_smooth=flag) for flag in (True, False))
    assert not np.allclose(smooth, rough)


class EarlierFeatures(nn.Module):
    """A head that also reads features from before the target layer, joined row by row."""

    def __init__(self):
        super().__init__()
        self.early, self.late = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        early = self.early(x)
        return self.head(torch.cat([early, self.late(early)], dim=1)).sigmoid().mean(dim=(2, 3))


def test_a_model_that_cannot_be_forked_gets_the_repeated_image_and_one_warning():
    torch.manual_seed(0)
    model = EarlierFeatures().eval()
    with pytest.warns(UserWarning, match="cannot be forked") as caught:
        maps = explain(model, picture(), [0, 3, 1], model.late)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    np.testing.assert_allclose(maps, plain(model, picture(), [0, 3, 1], [model.late], None), atol=1e-5)


class NormedTokens(nn.Module):
    """Tokens that come to a BatchNorm by permute and view, with one row a fault of some PyTorch versions."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, stride=8)
        self.tokens = nn.Identity()
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        tokens = self.tokens(self.embed(x).flatten(2).transpose(1, 2))
        normed = self.norm(tokens.permute(0, 2, 1).view(-1, 8, 4, 4))
        return self.head((normed**3).mean(dim=(2, 3)))


@pytest.mark.filterwarnings("ignore:the model cannot be forked")
def test_a_decoder_that_reads_recorded_states_gets_them_forked():
    """transformers records hidden states by hooks that are there from a model's first call on."""

    class Region(nn.Module):
        def __init__(self):
            super().__init__()
            self.segmenter, _ = load("segmenter", "bundled", device="cpu")

        def forward(self, x):
            return self.segmenter(x).logits[:, :, 8:24, 8:24].mean(dim=(2, 3))

    x = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    maps = []
    for called_before in (False, True):
        model = Region().eval()
        if called_before:
            model(x)
        stage = model.segmenter.segformer.stages[2]
        maps.append(explain(model, x, [0, 1], stage, method=HiResCAM))
        with HiResCAM(model, [stage]) as cam:
            wanted = cam(x.repeat(2, 1, 1, 1), [ClassifierOutputTarget(i) for i in (0, 1)])
        np.testing.assert_allclose(maps[-1], wanted, atol=1e-4)
    np.testing.assert_allclose(*maps, atol=1e-5)


def test_one_category_is_explained_with_two_rows():
    torch.manual_seed(0)
    model = NormedTokens().eval()
    reshape_transform = functools.partial(tokens_to_map, grid=(4, 4), prefix=0)
    rows = []
    handle = model.norm.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    alone = explain(model, picture(), 2, model.tokens, reshape_transform)
    handle.remove()
    assert rows == [2]
    np.testing.assert_allclose(alone, explain(model, picture(), [2, 0], model.tokens, reshape_transform)[:1], atol=1e-6)


def test_a_model_in_train_mode_is_explained_in_eval_mode():
    model, layer, _ = tiny("batchnorm")
    expected = explain(model, picture(), [0, 1], layer)
    statistics = model.body[1].running_mean.clone()
    model.train()
    np.testing.assert_array_equal(explain(model, picture(), [0, 1], layer), expected)
    assert model.training and model.body[1].training
    assert torch.equal(model.body[1].running_mean, statistics)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_switched_off(context):
    model, layer, reshape_transform = tiny("vit")
    expected = explain(model, picture(), [0, 1], layer, reshape_transform)
    with context():
        maps = explain(model, picture() * 1, [0, 1], layer, reshape_transform)
    np.testing.assert_array_equal(maps, expected)


def test_the_picture_is_left_alone():
    model, layer, _ = tiny("resnet")
    pixel_values = picture().requires_grad_()
    explain(model, pixel_values, [0, 1], layer)
    assert pixel_values.grad is None
    assert torch.equal(pixel_values.detach(), picture())


def test_the_same_input_gives_the_same_maps():
    model, layer, reshape_transform = tiny("vit")
    first, second = (explain(model, picture(), [0, 1], layer, reshape_transform) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def mixed_state(model):
    """Puts a model into a state that is neither all train nor all eval, with gradients of a training step."""
    LogitsModel(model)(picture()).sum().backward()
    modules = list(model.modules())
    model.train()
    modules[-1].eval()
    next(model.parameters()).requires_grad_(False)
    return state(model)


@pytest.mark.parametrize("name", ["resnet", "vit", "batchnorm"])
@pytest.mark.parametrize("method", [GradCAM, ScoreCAM, AblationCAM, EigenCAM, ShapleyCAM])
def test_the_model_is_as_before(name, method):
    if (name, method) == ("vit", ShapleyCAM):
        pytest.skip("ShapleyCAM takes no tokens")
    model, layer, reshape_transform = tiny(name)
    before = mixed_state(model)
    explain(model, picture(), [0, 1], layer, reshape_transform, method=method)
    assert state(model) == before


def raises_index_error(scores):
    return [][1]


@pytest.mark.parametrize("method", [GradCAM, ScoreCAM, AblationCAM, EigenCAM])
@pytest.mark.parametrize("name", ["vit", "batchnorm"])
def test_the_model_is_as_before_when_a_target_fails(name, method):
    model, layer, reshape_transform = tiny(name)
    before = mixed_state(model)
    # EigenCAM asks no target, so it cannot fail there.
    if method is EigenCAM:
        explain(model, picture(), [0, raises_index_error], layer, reshape_transform, method=method)
    else:
        with pytest.raises(IndexError):
            explain(model, picture(), [0, raises_index_error], layer, reshape_transform, method=method)
    assert state(model) == before


def test_ablation_gives_the_layer_back_when_it_fails_midway():
    model, layer, _ = tiny("batchnorm")
    asked = []

    def fails_during_the_ablation(scores):
        asked.append(scores)
        if len(asked) > 3:
            raise RuntimeError("midway")
        return scores[0]

    with pytest.raises(RuntimeError, match="midway"):
        explain(model, picture(), fails_during_the_ablation, layer, method=AblationCAM)
    assert model.body[3] is layer
    explain(model, picture(), 0, layer)


def test_ablation_takes_its_hook_away_when_it_is_interrupted():
    model, layer, _ = tiny("resnet")
    before, passes = state(model), []

    def interrupts(module, inputs, output):
        passes.append(1)
        if len(passes) == 2:
            raise KeyboardInterrupt

    with model.classifier.register_forward_hook(interrupts), pytest.raises(KeyboardInterrupt):
        explain(model, picture(), "cat", layer, method=AblationCAM)
    assert state(model) == before


def vit_error(layer=lambda model: model.vit.layers[-2], reshape_transform=GRID, categories=(0, 1), **options):
    model, _, _ = tiny("vit")
    before = mixed_state(model)
    with pytest.raises((ValueError, TypeError)) as error:
        explain(model, picture(), categories, layer(model), reshape_transform, **options)
    assert state(model) == before
    return str(error.value)


@pytest.mark.parametrize(
    ("layer", "reshape_transform", "message"),
    [
        (lambda model: nn.Linear(2, 2), GRID, "Linear is not part of this ViTForImageClassification"),
        (lambda model: "vit.layers.1", GRID, "a target layer is a module"),
        (lambda model: model.vit.layers, GRID, "vit.layers is not reached"),
        (lambda model: model.vit.layers[-1], GRID, "vit.layers.2 gets a gradient of zero at every position for any"),
        (lambda model: model.vit, GRID, "vit returns a BaseModelOutput"),
        (lambda model: model.classifier, None, "classifier returns shape (1, 5), wanted (batch, channels, height,"),
        (lambda model: model.vit.layers[1], None, "returns shape (1, 17, 16), wanted (batch, channels, height, width)"),
        (lambda model: model.vit.layers[1], functools.partial(tokens_to_map, grid=(7, 7)), "wanted (batch, 50, "),
    ],
)
def test_a_layer_that_cannot_be_explained_points_to_the_finder(layer, reshape_transform, message):
    error = vit_error(layer, reshape_transform)
    assert message in error
    assert "find_target_layers(model, pixel_values)" in error


def test_a_layer_off_the_way_to_the_scores_points_to_the_finder():
    class SideBranch(OneLayer):
        def forward(self, x):
            self.side(x)
            return super().forward(x)

    model = SideBranch([[1.0, 0.0], [0.0, 1.0]])
    model.side = nn.Conv2d(3, 2, 1)
    with pytest.raises(ValueError, match="scores do not depend on target layer side.*find_target_layers"):
        explain(model, picture(), [0, 1], model.side)


def test_a_gradient_of_zero_for_one_category_names_it():
    model = OneLayer([[1.0, 0.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="layer gets a gradient of zero at every position for category number 2"):
        explain(model, picture(), [0, 1], model.layer)


def test_other_errors_say_what_is_wrong():
    assert "no category 'cap'; the closest are: 'cat'" in vit_error(categories=["cat", "cap"])
    assert "category 5 is out of range: the model's scores are 0 to 4" in vit_error(categories=[0, 5])
    assert "FinerCAM is not derived from grad-cam's BaseCAM" in vit_error(method=FinerCAM)
    assert "GradCAM got an unexpected keyword argument 'aug'" in vit_error(aug=True)
    assert "no target layer: give a module" in vit_error(layer=lambda model: [])
    assert "makes a tensor of one number" in vit_error(categories=lambda scores: scores)
    model, layer, _ = tiny("resnet")
    with pytest.raises(ValueError, match="unsqueeze"):
        explain(model, picture()[0], 0, layer)
    nothing_to_learn = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="Sequential has no parameters.*such as attribute or occlude"):
        explain(nothing_to_learn, picture(), 0, nothing_to_learn[0])


@pytest.mark.parametrize("method", [None, ScoreCAM, AblationCAM, ShapleyCAM])
def test_a_model_on_another_device_gets_the_same_maps(method):
    model, layers, reshape_transform = tiny("cnn")
    wanted = explain(model, picture(), [0, 1], layers, reshape_transform, method)
    with accelerator() as device:
        for pixel_values in (picture(), picture().to(device)):
            maps = explain(model.to(device), pixel_values, [0, 1], layers, reshape_transform, method)
            np.testing.assert_allclose(maps, wanted, atol=1e-3)


# Without a layer


class Chain(nn.Module):
    """Two channels of the picture go through n convolutions that change nothing; scores are sums of their means."""

    def __init__(self, n, weights=((1.0, 0.0), (-0.5, 2.0))):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 2, 2, 1, bias=False) for i in range(n)))
        for layer in self.layers:
            layer.weight.data = torch.eye(3)[:2, : layer.in_channels, None, None]
        self.weights = torch.tensor(weights)

    def forward(self, x):
        return self.layers(x).mean(dim=(2, 3)) @ self.weights.T


def relevance_of_chain(x, weights):
    """Worked out by hand: at each depth the same, without the third channel, which no score reads."""
    channels = x[0, :2].numpy().astype(np.float64)
    centred = channels - 0.6 * channels.mean(axis=(1, 2), keepdims=True)
    summed = np.tensordot(weights, centred, axes=(1, 0))
    sigma = 0.02 * max(summed.shape[1:])
    return np.stack([gaussian_filter(one, sigma, mode="mirror", truncate=3) for one in summed])


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(32, 32), (24, 60)])
def test_a_map_without_a_layer_worked_out_by_hand(n, size):
    model, x = Chain(n), picture(*size)
    relevance = relevance_of_chain(x, model.weights.numpy())
    power = 1 if n == 1 else 1.5  # times the root of the later depths, where there are any
    signed = np.sign(relevance) * np.abs(relevance) ** power
    wanted = signed.clip(min=0) / signed.max(axis=(1, 2), keepdims=True)
    maps = explain(model, x, [0, 1], gamma=0)
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps, wanted, atol=1e-5)
    signed /= np.abs(signed).max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(explain(model, x, [0, 1], signed=True, gamma=0), signed, atol=1e-5)


def test_what_speaks_against_is_negative():
    weights = ((-1.0, 0.0),)
    x = torch.zeros(1, 3, 32, 32)
    x[0, 0, 8:16, 8:16] = 1
    maps = explain(Chain(2, weights), x, [0], signed=True)
    assert maps[0, 12, 12] == maps.min() == pytest.approx(-1, abs=1e-3)
    assert explain(Chain(2, weights), x, [0])[0, 12, 12] == 0


@pytest.mark.parametrize("name", ["resnet", "vit", "cnn"])
def test_without_a_layer_a_category_costs_a_backward_pass(name):
    model, *_ = tiny(name)
    with wrappers.count_passes(model) as passed:
        maps = explain(model, picture(), [0, 3, 1])
    assert passed == {"pictures": 1, "backward passes": 3}
    assert maps.shape == (3, 32, 32) and maps.min() >= 0 and maps.max(axis=(1, 2)) == pytest.approx([1, 1, 1])
    np.testing.assert_array_equal(explain(model, picture(), 3)[0], maps[1])


def test_without_a_layer_names_indices_and_callables_say_the_same():
    model, *_ = tiny("vit")
    maps = explain(model, picture(), ["coffee cup", 1, lambda scores: scores[1]])
    np.testing.assert_array_equal(maps[0], maps[1])
    np.testing.assert_array_equal(maps[0], maps[2])


@pytest.mark.parametrize("name", ["resnet", "vit", "cnn"])
@pytest.mark.parametrize("fails", [False, True])
def test_without_a_layer_the_model_its_input_and_chance_are_as_before(name, fails):
    model, *_ = tiny(name)
    model.train()
    next(model.parameters()).requires_grad_(False)
    x, before, drawn = picture(), state(model), torch.get_rng_state()
    kept = x.clone()
    with torch.no_grad():
        if fails:
            with pytest.raises(ValueError, match="makes a tensor of one number"):
                explain(model, x, [0, lambda scores: scores])
        else:
            in_train_mode = explain(model, x, [0])
            np.testing.assert_array_equal(in_train_mode, explain(model.eval(), x, [0]))
            model.train()
    assert state(model) == before and torch.equal(x, kept) and torch.equal(torch.get_rng_state(), drawn)
    a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    assert torch.autograd.grad(a * b, a)[0] == 5  # not half


def test_a_compiled_model_is_explained_as_it_was_written():
    model, *_ = tiny("cnn")
    np.testing.assert_array_equal(explain(torch.compile(model), picture(), 0), explain(model, picture(), 0))


class Cut(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.no_grad():
            return self.model(x)


def test_without_a_layer_errors_say_what_is_wrong():
    model, layer, reshape_transform = tiny("vit")
    with pytest.raises(ValueError, match=r"^HiResCAM needs a target layer; find_target_layers\("):
        explain(model, picture(), 0, method=HiResCAM)
    with pytest.raises(ValueError, match=r"^a reshape transform needs a target layer; find_target_layers\("):
        explain(model, picture(), 0, reshape_transform=reshape_transform)
    with pytest.raises(TypeError, match="aug_smooth"):
        explain(model, picture(), 0, aug_smooth=True)
    with pytest.raises(ValueError, match="gamma is a number of at least 0"):
        explain(model, picture(), 0, gamma=-1)
    with pytest.raises(ValueError, match="unsqueeze"):
        explain(model, picture()[0], 0)
    with pytest.raises(ValueError, match="no category 'cap'; the closest are: "):
        explain(model, picture(), "cap")
    with pytest.raises(ValueError, match="the scores have no gradient"):
        explain(Cut(model), picture(), 0)
    model.classifier.weight.data.zero_()
    with pytest.raises(ValueError, match="gradient of the scores is zero everywhere"):
        explain(model, picture(), 0)
    with pytest.raises(ValueError, match=r"the model computes in torch\.bfloat16.*model\.float\(\)"):
        explain(model.bfloat16(), picture(), 0)


@pytest.mark.parametrize("name", ["resnet", "vit", "cnn"])
def test_without_a_layer_a_model_on_another_device_gets_the_same_maps(name):
    model, *_ = tiny(name)
    wanted = explain(model, picture(), [0, 1])
    with accelerator() as device:
        for pixel_values in (picture(), picture().to(device)):
            np.testing.assert_allclose(explain(model.to(device), pixel_values, [0, 1]), wanted, atol=1e-3)


def trained(name):
    """A bundled model and its processor; a CLIP tells its prompts apart."""
    if not name.startswith("clip"):
        return load(name, "bundled", "cpu")
    clip, processor = load(name, "bundled", "cpu")
    prompts = {label: f"a photo of a {label}" for label in labels()}
    return wrappers.PromptClassifier(clip, processor, prompts, scores="contrast"), processor


@pytest.mark.slow
@pytest.mark.parametrize("name", "resnet vit swin segformer convnext regnet cvt mobilevit clip-base clip-large".split())
def test_maps_without_a_layer_point_at_the_objects(name):
    model, processor = trained(name)
    scenes = examples(model, processor, 60)
    table = score_table({"balanced": functools.partial(explain, model)}, scenes)
    ours, baselines = table.loc["balanced"], table.loc[["centre dot", "random map"]].max()
    assert ours["pointing"] > max(0.82, baselines["pointing"] + 0.5)
    assert ours["energy"] > 0.55 and ours["on the other"] <= 0.08


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "vit", "convnext"])
def test_maps_without_a_layer_pass_the_sanity_check(name):
    """With a random classifier the map is another one (Adebayo et al., NeurIPS 2018)."""
    model, processor = trained(name)
    broken = copy.deepcopy(model)
    head = [module for module in broken.modules() if isinstance(module, nn.Linear)][-1]
    correlations = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for example in examples(model, processor, 8) * 3:
            head.reset_parameters()
            maps = [explain(one, example.pixel_values, example.categories[:1]).ravel() for one in (model, broken)]
            correlations.append(spearmanr(*maps).statistic)
    assert np.mean(correlations) < 0.2
