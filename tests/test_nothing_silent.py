"""Faults that people report of other projects: each kind gets the right map or a clear answer, from every function."""

import copy
import functools
import gc
import threading
import warnings

import numpy as np
import pytest
import torch
import torchvision
from captum.attr import LRP, DeepLift, InputXGradient, IntegratedGradients
from PIL import Image, ImageOps
from pytorch_grad_cam import AblationCAM, EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, ScoreCAM, XGradCAM
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    BatchEncoding,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    SwinForImageClassification,
    ViltConfig,
    ViltForQuestionAnswering,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from xai_helpers.attention import relevance, rollout
from xai_helpers.attribution import attribute, baseline_for, occlude, rise
from xai_helpers.cam import explain
from xai_helpers.checkpoints import examples, load
from xai_helpers.concepts import factorize
from xai_helpers.export import to_onnx
from xai_helpers.layers import find_target_layers, layer_table
from xai_helpers.plots import compare_maps, overlay, show_maps
from xai_helpers.reshape import channels_last_to_map, tokens_to_map
from xai_helpers.scenes import Scene, as_seen
from xai_helpers.scoring import Example, score_maps
from xai_helpers.wrappers import LogitsModel, PromptClassifier, frozen, top_categories

CAMS = [GradCAM, HiResCAM, EigenCAM, ScoreCAM, AblationCAM]
ignore_zero_maps = pytest.mark.filterwarnings("ignore:the map of category number")
ignore_no_fork = pytest.mark.filterwarnings("ignore:the model cannot be forked")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make().eval()


class Net(nn.Module):
    """A convolution with a head; `before` is done to the picture, `after` to the scores."""

    def __init__(self, channels=3, categories=4, before=None, after=None):
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, stride=2)
        self.head = nn.Linear(6, categories)
        self.before, self.after = before or nn.Identity(), after or nn.Identity()

    def forward(self, x):
        return self.after(self.head(self.conv(self.before(x)).relu().mean((2, 3))))


class Do(nn.Module):
    """A function as a part of a model."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def tiny_vit(**options):
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        initializer_range=0.2,
        num_labels=4,
        **options,
    )
    return ViTForImageClassification(config)


GRID = functools.partial(tokens_to_map, grid=(4, 4))

# All functions that make maps of a model with a module `conv` and of four categories.
MAPS = {
    "explain": lambda model, x, asked: explain(model, x, asked),
    **{
        f"explain, {cam.__name__}": lambda model, x, asked, cam=cam: explain(model, x, asked, model.conv, method=cam)
        for cam in CAMS
        if cam is not EigenCAM
    },
    "attribute": lambda model, x, asked: attribute(model, x, asked),
    "attribute, IntegratedGradients": lambda model, x, asked: attribute(model, x, asked, IntegratedGradients),
    "attribute, balanced": lambda model, x, asked: attribute(model, x, asked, "balanced"),
    "occlude": lambda model, x, asked: occlude(model, x, asked, window=8),
    "rise": lambda model, x, asked: rise(model, x, asked, n_masks=20),
}
each_function = pytest.mark.parametrize("name", MAPS)


def settings(model):
    """What no call may change, but for the values of weights."""
    return [
        (id(module), module.training, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks),
         len(module._backward_hooks), [p.requires_grad for p in module.parameters()])
        for module in model.modules()
    ]  # fmt: skip


# A layer that runs several times in a pass.


class Pair(nn.Module):
    """The product of what a convolution sees in a reference and in the picture."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 4, 4)
        nn.init.ones_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        self.reference = torch.zeros(1, 3, 32, 32)
        self.reference[..., :8, :8] = 1

    def forward(self, x):
        return self.conv(self.reference.expand_as(x)).mean((2, 3)) * self.conv(x).mean((2, 3))


class SharedHead(nn.Module):
    """One head for two levels of a pyramid."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        levels = [self.stem(x), F.avg_pool2d(self.stem(x), 2)]
        return sum(self.conv(level).mean((2, 3)) for level in levels)


def several_times():
    resnet = seeded(torchvision.models.resnet18)
    yield pytest.param(seeded(Pair), lambda model: model.conv, 32, id="pair")
    yield pytest.param(seeded(SharedHead), lambda model: model.conv, 32, id="shared head")
    yield pytest.param(resnet, lambda model: model.layer4[-1].relu, 64, id="ReLU of a block")


@pytest.mark.parametrize(("model", "layer", "size"), list(several_times()))
@pytest.mark.parametrize("method", [*CAMS, "factorize", "layer_table", "to_onnx"])
def test_a_layer_that_runs_several_times_has_no_map(model, layer, size, method, tmp_path):
    x, before = noise(1, 3, size, size), settings(model)
    with pytest.raises(ValueError, match="runs more than once in a pass.*find_target_layers"):
        if method == "factorize":
            factorize(model, x, layer(model), lambda vectors: vectors)
        elif method == "layer_table":
            layer_table(model, x, 0, {"layer": layer(model)})
        elif method == "to_onnx":
            to_onnx(model, x, tmp_path / "explained.onnx", target_layer=layer(model))
        else:
            explain(model, x, 0, layer(model), method=method)
    assert settings(model) == before and not list(tmp_path.iterdir())


def test_without_a_layer_a_pair_shows_the_picture_and_not_the_reference():
    model = seeded(Pair)
    x = model.reference.flip(-1, -2)  # its bright corner is (24, 24) to (31, 31)
    (heat,) = explain(model, x, 0)
    assert heat[24:, 24:].sum() > 0.5 * heat.sum() and heat[:8, :8].max() < 0.05


# Rows of the layer that are no pictures.


class Flips(nn.Module):
    """Scores averaged over a picture and its mirror image: red and green, each by a channel of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 4, 4, bias=False)
        self.conv.weight.data.zero_()
        self.conv.weight.data[0, 0] = self.conv.weight.data[1, 1] = 1

    def forward(self, x):
        return torch.stack(self.conv(torch.cat([x, x.flip(-1)])).mean((2, 3)).chunk(2)).mean(0)


class Tiles(nn.Module):
    """The mean over four tiles."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 4, 4)

    def forward(self, x):
        half = x.shape[-1] // 2
        tiles = torch.cat([x[..., i : i + half, j : j + half] for i in (0, half) for j in (0, half)])
        return self.conv(tiles).mean((2, 3)).unflatten(0, (4, len(x))).mean(0)


def tiny_swin():
    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=4, num_labels=2
    )
    return SwinForImageClassification(config)


def other_rows():
    window = functools.partial(tokens_to_map, grid=(4, 4), prefix=0)
    yield pytest.param(seeded(Flips), lambda model: model.conv, None, id="flips")
    yield pytest.param(seeded(Tiles), lambda model: model.conv, None, id="tiles")
    swin = seeded(tiny_swin)
    query = swin.swin.encoder.layers[0].blocks[0].attention.q_proj
    yield pytest.param(swin, lambda model: query, window, id="windows")


@pytest.mark.parametrize(("model", "layer", "transform"), list(other_rows()))
@pytest.mark.parametrize("method", [*CAMS, "factorize"])
def test_rows_that_are_no_pictures_have_no_map(model, layer, transform, method):
    x, before = noise(1, 3, 32, 32), settings(model)
    with pytest.raises(ValueError, match=r"puts out \d+ rows for 1 picture"):
        if method == "factorize":
            factorize(model, x, layer(model), lambda vectors: vectors, transform)
        else:
            explain(model, x, [0, 1], layer(model), transform, method=method)
    assert settings(model) == before


def test_without_a_layer_flips_are_the_picture_that_was_given():
    x = torch.zeros(1, 3, 64, 64)
    x[0, 0, 4:12, 4:12] = x[0, 1, 48:60, 44:56] = 1  # red and green
    red, green = explain(seeded(Flips), x, [0, 1])
    assert red[4:12, 4:12].sum() > 0.5 * red.sum() and green[48:60, 44:56].sum() > 0.5 * green.sum()


# Channels that come last.


class Last(nn.Module):
    """A convolution whose features have their channels last."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 24)

    def forward(self, x):
        return self.linear(self.conv(x).permute(0, 2, 3, 1)).relu().mean((1, 2))[:, :4]


def channels_last():
    swin = seeded(lambda: torchvision.models.SwinTransformer([2, 2], 16, [1, 1], [1, 1], [4, 4], num_classes=3))
    config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=3, image_size=64)
    convnext = seeded(lambda: ConvNextForImageClassification(config))
    yield pytest.param(swin, swin.features[1], (64, 64), id="torchvision's Swin")
    yield pytest.param(convnext, convnext.convnext.encoder.stages[1].layers[0].pwconv2, (64, 64), id="ConvNeXt's block")
    last = seeded(Last)
    yield pytest.param(last, last.linear, (32, 80), id="a linear layer")


@pytest.mark.parametrize(("model", "layer", "size"), list(channels_last()))
def test_a_layer_whose_channels_come_last_wants_a_reshape_transform(model, layer, size, tmp_path):
    x = noise(1, 3, *size)
    for call in (
        lambda: explain(model, x, 0, layer),
        lambda: explain(model, x, 0, layer, method=EigenCAM),
        lambda: factorize(model, x, layer, lambda vectors: vectors),
        lambda: to_onnx(model, x, tmp_path / "explained.onnx", target_layer=layer),
    ):
        with pytest.raises(ValueError, match="looks like .batch, height, width, channels.: give reshape_transform="):
            call()
    assert explain(model, x, 0, layer, channels_last_to_map).shape == (1, *size)


# Scores that are not (pictures, categories).


def dense():
    yield pytest.param(nn.Conv2d(3, 4, 1), (4, 16, 16), id="segmenter")
    yield pytest.param(nn.Sequential(Net(), nn.Unflatten(1, (4, 1, 1))), (4, 1, 1), id="a position")
    yield pytest.param(nn.Sequential(Net(), nn.Unflatten(1, (2, 2))), (2, 2), id="queries")


def first_convolution(model):
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


DENSE = {
    "explain": lambda model, x: explain(model, x, 1),
    "explain at a layer": lambda model, x: explain(model, x, 1, first_convolution(model)),
    "attribute": lambda model, x: attribute(model, x, 1),
    "attribute, balanced": lambda model, x: attribute(model, x, 1, "balanced"),
    "occlude": lambda model, x: occlude(model, x, 1),
    "rise": lambda model, x: rise(model, x, 1, n_masks=4),
    "layer_table": lambda model, x: layer_table(model, x, 1, {"first": first_convolution(model)}),
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(("model", "shape"), list(dense()))
def test_an_index_does_not_say_which_of_dense_scores_is_meant(model, shape, name):
    with pytest.raises(ValueError) as error:
        DENSE[name](model, noise(1, 3, 16, 16))
    assert f"have shape {shape}, not (categories,)" in str(error.value) and "give a callable" in str(error.value)


def test_a_name_asks_a_segmenter_or_a_detector_for_a_callable():
    for name in ("segmenter", "yolos"):
        model, processor = load(name, "bundled", device="cpu")
        [example] = examples(model, processor, 1)
        for function in (explain, occlude):
            with pytest.raises(ValueError, match="give a callable"):
                function(model, example.pixel_values, example.categories[0])
        with pytest.raises(ValueError, match="no order of categories for the whole image"):
            top_categories(model, example.pixel_values)


# Models that work in place on their input.


def shifts(x):
    return x.sub_(0.5).div_(0.25)


def clips(x):
    return x.clamp_(-0.5, 0.5)


def paints(x):
    x[..., :4, :4] = 0
    return x


@each_function
@pytest.mark.parametrize("step", [shifts, clips, paints])
@ignore_zero_maps
def test_a_model_that_works_in_place_on_its_input_is_explained_as_one_that_does_not(step, name):
    in_place, plain = (seeded(lambda f=f: Net(before=Do(f))) for f in (step, lambda x: step(x.clone())))
    x = noise(1, 3, 16, 16)
    given = x.clone()
    found = [MAPS[name](in_place, given, [0, 2]) for _ in range(2)]
    torch.testing.assert_close(given, x, rtol=0, atol=0)
    np.testing.assert_array_equal(*found)
    np.testing.assert_allclose(found[0], MAPS[name](plain, x, [0, 2]), atol=1e-6)


# Tiny and saturated scores.


@pytest.mark.parametrize("factor", [1e-8, 1e-20, 1e-26])
@pytest.mark.parametrize("name", [name for name in MAPS if "Score" not in name])
@ignore_zero_maps
def test_a_positive_factor_changes_no_map(name, factor):
    model, x = seeded(Net), noise(1, 3, 16, 16)
    asked = [lambda scores, i=i: scores[i] for i in range(4)]
    small = [lambda scores, i=i: scores[i] * factor for i in range(4)]
    maps, of_small = (np.asarray(MAPS[name](model, x, one), np.float64) for one in (asked, small))
    if name == "attribute, balanced":  # which is not scaled
        maps, of_small = maps / abs(maps).max(), of_small / abs(of_small).max()
    np.testing.assert_allclose(of_small, maps, atol=1e-3)
    assert set(abs(of_small).max(axis=(1, 2)).round(6)) <= {0, 1} or name == "attribute, balanced"


@pytest.mark.parametrize("method", [GradCAM, XGradCAM, LayerCAM, HiResCAM])
@ignore_zero_maps
def test_maps_of_several_layers_count_alike_however_small_the_score(method):
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), Pool()))
    x, layers = noise(1, 3, 16, 16), [model[0], model[2]]
    maps = explain(model, x, 1, layers, method=method)
    small = explain(model, x, lambda scores: scores[1] * 1e-20, layers, method=method)
    assert maps.max() > 0.5
    np.testing.assert_allclose(small, maps, atol=1e-3)


@pytest.mark.parametrize("factor", [1e-4, 1e-8, 1e-20])
def test_grad_cam_plus_plus_is_not_empty_however_small_the_score(factor):
    model, x = seeded(Net), noise(1, 3, 16, 16)
    (heat,) = explain(model, x, lambda scores: scores[0] * factor, model.conv, method=GradCAMPlusPlus)
    assert heat.max() == 1


class Pool(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


SATURATED = {
    "a probability of 1": Do(lambda scores: (scores + 1e4 * torch.eye(4)[0]).softmax(1)),
    "a clamped score": Do(lambda scores: scores.clamp(max=-50)),
    "a sigmoid at its end": Do(lambda scores: (scores + 1e4).sigmoid()),
}


@pytest.mark.parametrize("fault", SATURATED)
@pytest.mark.parametrize("name", [name for name in MAPS if "ScoreCAM" not in name])  # equal scores weigh masks alike
def test_a_saturated_score_says_so(name, fault):
    model, x = seeded(lambda: Net(after=SATURATED[fault])), noise(1, 3, 16, 16)
    best = int(model(x)[0].argmax())
    if name.startswith("explain") and "Ablation" not in name:
        with pytest.raises(ValueError, match="saturated"):
            MAPS[name](model, x, best)
        return
    with pytest.warns(UserWarning, match="category number 1 is zero everywhere.*(saturated|nothing speaks for it)"):
        maps = MAPS[name](model, x, best)
    assert not maps.any()


def test_a_map_of_nothing_but_what_speaks_against_says_so():
    model, x = seeded(lambda: Net(categories=1)), torch.ones(1, 3, 16, 16)
    model.conv.weight.data.abs_()
    model.head.weight.data.abs_().neg_()
    with pytest.warns(UserWarning, match="nothing speaks for it, at least not at the target layer; signed=True"):
        assert not explain(model, x, 0, model.conv).any()
    assert explain(model, x, 0, signed=True).min() < 0
    with pytest.warns(UserWarning, match='sign="absolute" shows the rest'):
        assert not attribute(model, x, 0, InputXGradient, sign="positive").any()


def test_in_a_table_of_many_maps_one_of_nothing_is_a_miss_and_no_warning():
    model = seeded(lambda: Net(after=SATURATED["a clamped score"]))
    example = Example(noise(1, 3, 16, 16), [0, 1], np.ones((2, 16, 16), bool))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = score_maps({"occlusion": lambda x, asked: occlude(model, x, asked)}, [example])
    assert table.loc["occlusion", "energy"].eq(0).all()


@pytest.mark.parametrize("shift", [-1, -5, -50])
def test_ablation_cam_says_that_a_negative_score_turns_its_map_round(shift):
    model, x = seeded(Net), noise(1, 3, 16, 16)

    score = model(x)[0, 1].item()

    def with_constant(c):
        return explain(model, x, lambda scores: scores[1] - score + c, model.conv, method=AblationCAM)

    right = with_constant(3)
    with pytest.warns(UserWarning, match=r"speaks against it: AblationCAM divides.* scores\[0\] \+ 100") as seen:
        turned = with_constant(shift)
    assert seen[0].filename == __file__  # where explain was called
    np.testing.assert_allclose(with_constant(100), right, atol=1e-3)  # as it says: a constant changes nothing
    assert np.corrcoef(right.ravel(), turned.ravel())[0, 1] < 0


# Scores that are not finite.

NOT_FINITE = {
    "NaN": Do(lambda scores: scores * float("nan")),
    "the logarithm of zero": Do(lambda scores: (scores * 0).log()),
    "an overflow": Do(lambda scores: scores.abs() * 1e38 * 1e38),
}


@pytest.mark.parametrize("fault", NOT_FINITE)
@each_function
def test_scores_that_are_not_finite_have_no_map(name, fault):
    model, x = seeded(lambda: Net(after=NOT_FINITE[fault])), noise(1, 3, 16, 16)
    before = settings(model)
    with pytest.raises(ValueError, match=r"score of category number 1 is (nan|inf|-inf)"):
        MAPS[name](model, x, [0, 2])
    assert settings(model) == before


def test_relevance_has_no_map_of_scores_that_are_not_finite():
    model, x = seeded(tiny_vit), noise(1, 3, 32, 32)
    for target in (lambda scores: scores[0] / 0, lambda scores: scores[0] * float("nan"), lambda s: (s[0] * 0).log()):
        with pytest.raises(ValueError, match="score of category number 1 is"):
            relevance(model, x, target)
    model.classifier.weight.data[0] = float("inf")
    with pytest.raises(ValueError, match="score of category number"):
        rollout(model, x)


@each_function
def test_a_score_that_is_finite_with_a_gradient_that_is_not(name):
    """A root at zero: its gradient is infinite, and where it is multiplied by zero it is none."""
    model, x = seeded(lambda: Net(after=Do(lambda s: s + (s - s.detach()).abs().sqrt()))), noise(1, 3, 16, 16)
    if name in ("explain, ScoreCAM", "explain, AblationCAM", "occlude", "rise"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert np.isfinite(MAPS[name](model, x, 0)).all()  # which need no gradient
        return
    with pytest.raises(ValueError, match="not finite|NaN or infinite"):
        MAPS[name](model, x, 0)


# Threads.


@pytest.mark.parametrize("name", ["explain", "explain, GradCAM", "explain, AblationCAM", "attribute", "occlude"])
def test_threads_that_explain_one_model_take_turns(name):
    model = seeded(Net).train()
    model.head.weight.requires_grad_(False)
    pictures, before = [noise(1, 3, 24, 24, seed=i) for i in range(8)], settings(model)
    alone = [MAPS[name](model, x, [0, 1]) for x in pictures]
    found = [None] * 8

    def work(first):
        for i in range(first, 8, 4):
            wrapped = LogitsModel(model) if i % 2 and name == "explain" else model
            found[i] = MAPS[name](wrapped, pictures[i], [0, 1])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    np.testing.assert_allclose(found, alone, atol=1e-6)
    assert settings(model) == before


def test_threads_that_explain_different_models_do_not_wait_for_each_other():
    first, second, order = seeded(Net), seeded(Net), []
    with frozen(first):
        thread = threading.Thread(target=lambda: order.append(explain(second, noise(1, 3, 16, 16), 0)))
        thread.start()
        thread.join(timeout=60)
    assert len(order) == 1


def test_a_function_that_runs_the_model_meanwhile_says_so():
    model, x = seeded(Net), noise(1, 3, 16, 16)
    for other in (x, x * 2, noise(1, 3, 16, 16, seed=1)):
        with pytest.raises(ValueError, match="a category's function runs the model"):
            explain(model, x, lambda scores, other=other: scores[0] - model(other)[0, 0], model.conv)
        reference = model(other)[0, 0].item()
        assert explain(model, x, lambda scores, c=reference: scores[0] - c, model.conv).max() == 1


# A second input, single scores, other inputs.


class TwoInputs(nn.Module):
    """A picture and a row of numbers, which is as many rows as there are pictures."""

    def __init__(self, own=None):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(8, 4)
        self.own = own

    def forward(self, x, meta=None):
        features = self.conv(x).relu().mean((2, 3))
        return self.head(torch.cat([features, self.own if meta is None else meta], dim=1))


@each_function
@pytest.mark.parametrize("meta", [[[0.0, 0.0]], [[1.0, -1.0]], [[5.0, 2.0]]])
@ignore_no_fork
@ignore_zero_maps
def test_a_second_input_of_one_row_is_repeated(name, meta):
    model, x = seeded(TwoInputs), noise(1, 3, 16, 16)
    expanding = seeded(TwoInputs)
    given = LogitsModel(model, meta=torch.tensor(meta))
    given.conv = model.conv

    class Expands(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.conv = expanding, expanding.conv

        def forward(self, x):
            features = self.conv(x).relu().mean((2, 3))
            return self.inner.head(torch.cat([features, torch.tensor(meta).expand(len(features), 2)], dim=1))

    np.testing.assert_allclose(MAPS[name](given, x, [0, 1]), MAPS[name](Expands(), x, [0, 1]), atol=1e-6)


def test_a_model_that_holds_one_row_of_its_own_says_what_to_do():
    model, x = seeded(lambda: TwoInputs(torch.ones(1, 2))), noise(1, 3, 16, 16)
    for call in (
        lambda: explain(model, x, [0, 1], model.conv),
        lambda: occlude(model, x, 0),
        lambda: rise(model, x, 0),
        lambda: attribute(model, x, 0, IntegratedGradients),
    ):
        with pytest.raises(ValueError, match="takes one image, but fails for .* any number of rows"):
            call()
    # One category works as in plain grad-cam, which runs a single row.
    with pytest.warns(UserWarning, match="it runs in one row"):
        (heat,) = explain(model, x, 0, model.conv)
    with GradCAM(model, [model.conv]) as cam:
        np.testing.assert_allclose(heat, cam(x, [lambda scores: scores[0]])[0], atol=1e-5)
    assert explain(model, x, [0, 1]).shape == occlude(model, x, [0, 1], batch=1).shape == (2, 16, 16)


SQUEEZED = {
    "(rows,)": Do(lambda scores: scores[:, 0]),
    "(), or (rows,)": Do(lambda scores: scores.squeeze()),
    "(rows, 1)": nn.Identity(),
}


@each_function
@ignore_zero_maps
def test_one_score_is_a_category_however_it_is_squeezed(name):
    x, found = noise(1, 3, 16, 16), {}
    for shape, after in SQUEEZED.items():
        model = seeded(lambda after=after: Net(categories=1, after=after))
        found[shape] = MAPS[name](model, x, 0), MAPS[name](model, x, lambda scores: -scores)
    for one in found.values():
        np.testing.assert_array_equal(one, found["(rows, 1)"])
    with pytest.raises(ValueError, match=r"category 1 is out of range.*against a single score.*lambda scores: -scores"):
        MAPS[name](model, x, 1)


def test_scores_without_the_pictures_dimension_say_so():
    for after in (lambda s: s[0], lambda s: s.flatten()[:3], lambda s: s.repeat(3, 1)):
        model = seeded(lambda after=after: Net(after=Do(after)))
        for name in ("explain", "explain, GradCAM", "attribute", "occlude"):
            with pytest.raises(ValueError, match=r"scores have shape \(\d.*wanted \(images, categories\)"):
                MAPS[name](model, noise(1, 3, 16, 16), 0)


@each_function
@pytest.mark.parametrize("channels", [1, 2, 4, 5, 9, 12])
@ignore_zero_maps
def test_any_number_of_channels_will_do(channels, name):
    model, x = seeded(lambda: Net(channels)), noise(1, channels, 20, 16)
    assert MAPS[name](model, x, [0, 3]).shape == (2, 20, 16)


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 9, 12])
def test_the_finder_takes_any_number_of_channels(channels):
    model = seeded(lambda: Net(channels))
    assert find_target_layers(model, noise(1, channels, 32, 32)).cam.path == "conv"


def test_a_video_is_explained_as_its_message_says():
    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Net()

        def forward(self, clip):  # (batch, frames, channels, height, width)
            return self.inner(clip.flatten(0, 1)).unflatten(0, clip.shape[:2]).mean(1)

    video, clip = seeded(Video), noise(1, 5, 3, 16, 16)
    with pytest.raises(ValueError, match=r"explain one frame.*pixel_values.flatten\(1, 2\)"):
        occlude(video, clip, 0)

    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.video = video

        def forward(self, x):
            return self.video(x.unflatten(1, (5, 3)))

    folded = clip.flatten(1, 2)
    assert occlude(Folded(), folded, 0, window=8).max() == explain(Folded(), folded, 0).max() == 1


def tiny_clip():
    text = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 12}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    return text, vision


def test_pictures_are_given_by_name_where_text_comes_first():
    text, vision = tiny_clip()
    clip = seeded(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)))
    prompts = {"input_ids": torch.tensor([[1, 5, 2], [1, 7, 2]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    config = ViltConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32,
                        patch_size=8, vocab_size=99, num_labels=3)  # fmt: skip
    vilt = seeded(lambda: ViltForQuestionAnswering(config))
    question = {"input_ids": torch.tensor([[1, 5, 7, 2]])}

    class TextFirst(Net):
        def forward(self, input_ids, pixel_values):
            return super().forward(pixel_values) * input_ids.float().mean(1, keepdim=True)

    x = noise(1, 3, 32, 32)
    for model, options, n in ((clip, prompts, 2), (vilt, question, 3), (seeded(TextFirst), question, 4)):
        scorer = LogitsModel(model, **options)
        assert scorer(x).shape == (1, n)
        assert explain(scorer, x, [0, 1]).max() == occlude(scorer, x, [0, 1], window=16).max() == 1


def test_a_word_of_a_vision_language_model_is_explained_by_a_function():
    text = LlamaConfig(vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                              image_size=32, patch_size=8)  # fmt: skip
    llava = seeded(
        lambda: LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=98))
    )
    prompt = torch.tensor([[1, *[98] * 16, 5, 7]])  # 4 x 4 patches, and two words
    scorer, x = LogitsModel(llava, input_ids=prompt, attention_mask=torch.ones_like(prompt)), noise(1, 3, 32, 32)
    assert scorer(x.repeat(2, 1, 1, 1)).shape == (2, 19, 99)
    with pytest.raises(ValueError, match=r"have shape \(19, 99\), not \(categories,\)"):
        explain(scorer, x, 42)
    answer = lambda scores: scores[-1, 42]  # noqa: E731
    assert explain(scorer, x, answer).max() == occlude(scorer, x, answer, window=8).max() == 1


# What the hub's other families want.


class Tokenizer:
    """Words as numbers, padded as it is told to, as transformers' tokenizers do it."""

    unk_token_id, bos_token_id, eos_token_id, pad_token_id, unk_token = 3, None, 1, 0, "<unk>"

    def __len__(self):
        return 99

    def __call__(self, text, padding=None, max_length=None, return_tensors=None):
        texts = [text] if isinstance(text, str) else text
        ids = [[3 if "?" in word else 4 + sum(map(ord, word)) % 90 for word in one.split()] + [1] for one in texts]
        if return_tensors is None:
            return {"input_ids": ids[0]}
        longest = max_length if padding == "max_length" else max(map(len, ids))
        return BatchEncoding({"input_ids": torch.tensor([one + [0] * (longest - len(one)) for one in ids])})


def test_no_prompt_of_a_siglip_depends_on_how_long_another_one_is():
    text, vision = tiny_clip()
    model = seeded(lambda: SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))
    x, prompts = noise(1, 3, 32, 32), ["a cat", "a cup of tea on a table", "dog"]
    together = PromptClassifier(model, Tokenizer(), prompts)
    for prompt in prompts:
        alone = PromptClassifier(model, Tokenizer(), prompt)
        torch.testing.assert_close(alone(x)[0, 0], together(x)[0, prompts.index(prompt)])
    padded = Tokenizer()(prompts, padding="max_length", max_length=12, return_tensors="pt")
    torch.testing.assert_close(together(x), model(pixel_values=x, **padded).logits_per_image)


def test_a_tokenizer_that_tells_no_places_names_the_words_that_it_does_not_know():
    text, vision = tiny_clip()
    model = seeded(lambda: SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))
    with pytest.warns(UserWarning, match=r"does not know 'c\?t' in 'a c\?t' and reads it as <unk>"):
        PromptClassifier(model, Tokenizer(), "a c?t")


def test_a_tokenizer_of_another_library_or_without_its_vocabulary_says_so():
    text, vision = tiny_clip()
    clip = seeded(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)))

    class SimpleTokenizer:  # as open_clip's
        def __call__(self, texts):
            return torch.zeros(len(texts), 77, dtype=torch.long)

    with pytest.raises(ValueError, match="SimpleTokenizer is no processor of transformers.*AutoProcessor"):
        PromptClassifier(clip, SimpleTokenizer(), "a cat")

    class Empty(Tokenizer):
        def __len__(self):
            return 2

    with pytest.raises(ValueError, match="the tokenizer has 2 tokens and the model 99.*tokenizer.json"):
        PromptClassifier(clip, Empty(), ["a cat", "a dog"])


def dinov2():
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=32,
        patch_size=8,
        num_labels=3,
        initializer_range=1.0,
        layerscale_value=1.0,
    )
    return Dinov2ForImageClassification(config)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_relevance_reads_each_token_as_far_as_the_head_does(seed):
    x = noise(1, 3, 32, 32, seed=seed)

    def heat(of_cls, of_mean):
        model = seeded(dinov2, seed)
        weight = model.classifier.weight.data  # CLS, then the patches' mean
        weight[:, :16] *= of_cls
        weight[:, 16:] *= of_mean
        return relevance(model, x, 0).ravel()

    cls, mean = heat(1, 0), heat(0, 1)
    assert np.corrcoef(heat(1e-6, 1), mean)[0, 1] > 0.999
    assert np.corrcoef(heat(1, 1e-6), cls)[0, 1] > 0.999
    assert np.corrcoef(cls, mean)[0, 1] < 0.9  # so that the two before say something


# Models that were made or are run in another mode.


def made_in_inference_mode():
    with torch.inference_mode():
        return seeded(Net)


@each_function
def test_a_model_made_in_inference_mode_says_so(name):
    model, x = made_in_inference_mode(), noise(1, 3, 16, 16)
    before = settings(model)
    with pytest.raises(ValueError, match="made in torch.inference_mode.*copy.deepcopy"):
        MAPS[name](model, x, 0)
    assert settings(model) == before
    assert MAPS[name](copy.deepcopy(model), x, [0, 1]).shape == (2, 16, 16)  # as it says


@each_function
def test_pictures_and_calls_in_inference_mode(name):
    model = seeded(Net)
    with torch.inference_mode():
        x = noise(1, 3, 16, 16) * 1
        found = MAPS[name](model, x, [0, 1])
    np.testing.assert_array_equal(MAPS[name](model, x, [0, 1]), found)
    np.testing.assert_array_equal(MAPS[name](model, noise(1, 3, 16, 16), [0, 1]), found)


def test_prompts_read_in_inference_mode_are_explained():
    text, vision = tiny_clip()
    clip = seeded(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)))
    with torch.inference_mode():
        prompts = PromptClassifier(clip, Tokenizer(), ["a cat", "a dog"])
    assert not prompts.text_embeds.is_inference()
    assert explain(prompts, noise(1, 3, 32, 32), "a cat").max() == 1


class Autocast(Net):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


@each_function
@ignore_zero_maps
def test_autocast_inside_the_model_gives_maps_in_float(name):
    model, plain, x = seeded(Autocast), seeded(Net), noise(1, 3, 16, 16)
    maps = MAPS[name](model, x, [0, 1])
    assert maps.dtype == np.float32
    assert np.corrcoef(maps.ravel(), MAPS[name](plain, x, [0, 1]).ravel())[0, 1] > 0.9


def test_autocast_inside_a_transformer_gives_maps_in_float():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = seeded(tiny_vit)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.inner(x).logits

    model, x = Cast(), noise(1, 3, 32, 32)
    for maps in (
        explain(model, x, [0, 1]),
        explain(model, x, [0, 1], model.inner.vit.layers[1], GRID),
        relevance(model, x, [0, 1]),
        factorize(model, x, model.inner.vit.layers[1], lambda v: v, GRID).maps,
    ):
        assert maps.dtype == np.float32 and np.isfinite(maps).all() and maps.max() > 0.9


class NoGrad(Net):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


@each_function
@ignore_zero_maps
def test_no_grad_inside_the_model_says_so(name):
    model, x = seeded(NoGrad), noise(1, 3, 16, 16)
    before = settings(model)
    if name in ("occlude", "rise"):
        assert MAPS[name](model, x, [0, 1]).shape == (2, 16, 16)
        return
    with pytest.raises(ValueError, match=r"torch\.no_grad\(\)"):
        MAPS[name](model, x, [0, 1])
    assert settings(model) == before


def test_no_grad_inside_an_attention_says_so():
    model = seeded(tiny_vit)
    inner = model.vit.forward
    model.vit.forward = torch.no_grad()(inner)
    with pytest.raises(ValueError, match=r"torch\.no_grad\(\)"):
        relevance(model, noise(1, 3, 32, 32), 0)


@pytest.mark.parametrize("reentrant", [True, False])
@each_function
@ignore_zero_maps
def test_gradient_checkpointing_is_no_obstacle_or_says_so(name, reentrant):
    class Checkpoints(Net):
        def forward(self, x):
            features = checkpoint(lambda v: self.conv(v).relu(), self.before(x), use_reentrant=reentrant)
            return self.head(features.mean((2, 3)))

    model, plain, x = seeded(Checkpoints), seeded(Net), noise(1, 3, 16, 16)
    before = settings(model)
    try:
        maps = MAPS[name](model, x, [0, 1])
    except ValueError as error:
        assert "gradient checkpointing" in str(error) or "no_grad" in str(error)
    else:
        np.testing.assert_allclose(maps, MAPS[name](plain, x, [0, 1]), atol=1e-5)
    assert settings(model) == before


def test_timms_gradient_checkpointing_is_switched_off_meanwhile():
    import timm

    model = seeded(lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=2))
    x, plain = noise(1, 3, 32, 32), explain(model, noise(1, 3, 32, 32), [0, 1])
    model.set_grad_checkpointing()
    np.testing.assert_array_equal(explain(model, x, [0, 1]), plain)
    assert model.grad_checkpointing is True


class OfTheBatch(nn.Module):
    """A batch norm that takes the statistics of whatever runs together."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm, self.head = nn.BatchNorm2d(6, track_running_stats=False), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@each_function
@ignore_zero_maps
def test_statistics_of_the_batch_mix_no_pictures(name):
    model, x = seeded(OfTheBatch), noise(1, 3, 16, 16)
    if name in ("explain", "explain, GradCAM", "explain, HiResCAM", "attribute", "attribute, balanced"):
        assert MAPS[name](model, x, [0, 1]).max() > 0  # whose rows are alike
        return
    with pytest.raises(ValueError, match="batch norm at norm takes the statistics of the images that run together"):
        MAPS[name](model, x, [0, 1])
    drops = occlude(model, x, range(4), window=8, step=8, batch=1)  # as it says, and as it is by hand
    by_hand = np.zeros((4, 16, 16))
    for i in (0, 8):
        for j in (0, 8):
            hidden = x.clone()
            hidden[..., i : i + 8, j : j + 8] = 0
            by_hand[:, i : i + 8, j : j + 8] = (model(x) - model(hidden)).detach()[0, :, None, None].clamp(min=0)
    assert by_hand.any(axis=(1, 2)).sum() > 1
    largest = by_hand.max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(drops, by_hand / np.where(largest > 0, largest, 1), atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_and_exported_models_say_so():
    x = noise(1, 3, 16, 16)
    traced = torch.jit.trace(seeded(Net), x)
    for call in (explain, lambda *args: attribute(*args, "balanced")):
        with pytest.raises(ValueError, match="torch.jit"):
            call(traced, x, 0)
    with pytest.raises(ValueError, match="torch.jit"):
        explain(traced, x, 0, traced.conv)
    assert occlude(traced, x, 0, window=8).max() == 1
    exported = torch.export.export(seeded(Net), (x,)).module()
    for name in ("explain", "attribute", "occlude", "rise"):
        with pytest.raises(ValueError, match="was exported.*explain the model that it was made of"):
            MAPS[name](exported, x, 0)


def test_captums_rules_leave_nothing_behind_in_a_model_that_they_cannot_explain():
    model, x = seeded(torchvision.models.resnet18), noise(1, 3, 32, 32)
    before, maps = settings(model), explain(model, noise(1, 3, 32, 32), 0)
    with pytest.raises(ValueError, match="Captum's DeepLift cannot explain this ResNet.*IntegratedGradients"):
        attribute(model, x, 0, DeepLift)
    assert settings(model) == before
    with pytest.warns(UserWarning, match="category number 1 adds up to .*Captum's LRP has no rule for a part"):
        attribute(model, x, 0, LRP)
    assert settings(model) == before
    np.testing.assert_array_equal(explain(model, x, 0), maps)


def test_what_a_model_itself_raises_is_not_put_down_to_captum():
    for fault in (RuntimeError("mat1 and mat2"), TypeError("of a layer"), KeyError("a name")):

        def fails(scores, fault=fault):
            raise fault

        for method in (None, IntegratedGradients, DeepLift):
            with pytest.raises(type(fault)) as error:
                attribute(seeded(lambda f=fails: Net(after=Do(f))), noise(1, 3, 16, 16), 0, method)
            assert error.value is fault


def test_lrp_is_not_warned_of_where_it_adds_up():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)

        def forward(self, x):
            return self.head(self.relu(self.conv(x)).mean((2, 3)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attribute(seeded(Plain), noise(1, 3, 8, 8), 0, LRP).any()


# What is hidden by what.


def test_baselines_worked_out_by_hand():
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    assert torch.equal(baseline_for(x, 0.5), torch.full_like(x, 0.5))
    assert torch.equal(baseline_for(x, "mean")[0, :, 0, 0], torch.tensor([7.5, 23.5]))
    assert torch.equal(baseline_for(x, [1, 2]), torch.tensor([1.0, 2]).reshape(1, 2, 1, 1).expand_as(x))
    assert torch.equal(baseline_for(x, torch.tensor([1, 2])), baseline_for(x, [1, 2]))
    assert torch.equal(baseline_for(x, x + 1), x + 1)
    flat = baseline_for(noise(1, 5, 64, 64), "blur")
    assert flat.shape == (1, 5, 64, 64) and 0 < flat.std() < 0.1 and abs(flat.mean()) < 0.05  # of noise little is left
    for wrong in ("grey", [1, 2, 3], torch.zeros(1, 2, 5, 5), float("nan"), {}, None):
        with pytest.raises(ValueError, match='a baseline is a number, "mean", "blur", a value for each of the 2 chan'):
            baseline_for(x, wrong)


class Brightness(nn.Module):
    def forward(self, x):
        return x.mean((1, 2, 3))[:, None] * torch.tensor([1.0, -1.0])


def test_black_is_no_grey_for_a_model_that_takes_values_from_0_to_1():
    x = torch.full((1, 3, 16, 16), 0.5)
    x[..., :8, :8] = 0.9
    assert occlude(Brightness(), x, 0, window=8, step=8)[0, 12, 12] > 0.5  # all is brighter than black
    for baseline in ("mean", [0.5, 0.5, 0.5], 0.5, torch.full_like(x, 0.5)):
        heat = occlude(Brightness(), x, 0, window=8, step=8, baseline=baseline)[0]
        assert heat[4, 4] == 1 and heat[12, 12] == 0
    masked = rise(Brightness(), x, 0, n_masks=100, baseline=0.5)[0]
    assert masked[4, 4] > 3 * masked[12, 12] and rise(Brightness(), x, 0, n_masks=100)[0, 12, 12] > masked[12, 12]


# Photos that were turned, cropped or squashed.

CROPS = ViTImageProcessor(size={"height": 32, "width": 32})


CENTRE_CROP = ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875)


def glowing(drawn):
    """Rows and columns of the middle of what is drawn in colour over grey."""
    colour = drawn.astype(int).max(axis=2) - drawn.astype(int).min(axis=2)
    return np.argwhere(colour > 60).mean(axis=0)


@pytest.mark.parametrize("size", [(128, 64), (64, 64), (60, 120)])
def test_an_overlay_within_the_part_that_the_model_saw(size):
    processor = CENTRE_CROP
    photo = Image.new("RGB", size)
    x, y = size[0] // 2 + 10, size[1] // 2 - 8
    photo.paste((255, 255, 255), (x - 3, y - 3, x + 3, y + 3))
    seen = processor(photo, return_tensors="pt")["pixel_values"][0].mean(0)  # where the white square went
    heat = (seen > seen.min() + 0.5 * (seen.max() - seen.min())).float()
    np.testing.assert_allclose(glowing(overlay(photo, heat, seen=processor)), (y, x), atol=2)
    (ax,) = show_maps(photo, heat[None], "square", seen=processor).axes[1:2]
    np.testing.assert_allclose(glowing(np.asarray(ax.get_images()[0].get_array())), (y, x), atol=2)
    ax = compare_maps(photo, {"one": heat[None]}, "square", seen=processor).axes[1]
    np.testing.assert_allclose(glowing(np.asarray(ax.get_images()[0].get_array())), (y, x), atol=2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_that_exif_turns_is_turned_with_its_map(orientation):
    lying = Image.new("RGB", (96, 48))
    lying.paste((255, 255, 255), (70, 6, 80, 16))
    lying.getexif()[274] = orientation
    processor = ViTImageProcessor(size={"height": 48, "width": 96})  # which does not read EXIF data
    seen = processor(lying, return_tensors="pt")["pixel_values"][0].mean(0)
    heat = (seen > 0).float()
    upright = np.asarray(ImageOps.exif_transpose(lying).convert("L"))
    wanted = np.argwhere(upright > 128).mean(axis=0)
    for given in (None, processor, (0, 0, 96, 48)):
        drawn = overlay(lying, heat, seen=given)
        assert drawn.shape[:2] == upright.shape
        np.testing.assert_allclose(glowing(drawn), wanted, atol=1.5)
    figure = show_maps(lying, heat[None], "square", answers=(heat > 0.5).numpy()[None])
    assert figure.axes[1].get_title() == "square\nhit, 100% inside"


def test_a_map_of_other_proportions_warns_unless_it_is_said_what_the_model_saw():
    photo, heat = Image.new("RGB", (128, 64)), np.eye(32)
    for call in (
        lambda: overlay(photo, heat),
        lambda: show_maps(photo, heat[None], "a"),
        lambda: compare_maps(photo, {"a": heat[None]}, "b"),
    ):
        with pytest.warns(UserWarning, match="the map is 32 x 32 and the picture 128 x 64.*seen=processor"):
            call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        overlay(photo, heat, seen=(0, 0, 128, 64))
        overlay(photo, heat, seen=CENTRE_CROP)
        overlay(photo, np.ones((16, 33)))  # a column of a coarse grid more
        scene = as_seen(Scene(photo, [], np.zeros((0, 64, 128), bool)), CROPS)  # squashed
        overlay(scene.image, heat)
    with pytest.raises(ValueError, match="a box is left, top, right and bottom"):
        overlay(photo, heat, seen=(10, 0, 5, 64))


# All functions, again and again.


def n_tensors():
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


@ignore_zero_maps
def test_a_thousand_maps_leave_no_hooks_and_no_memory():
    model, x = seeded(Net), noise(1, 3, 12, 12)
    before = settings(model)

    def round_of_maps():
        for name in MAPS:
            MAPS[name](model, x, [0, 1, 2, 3])

    for _ in range(3):
        round_of_maps()
    first = n_tensors()
    for _ in range(25):  # of 10 functions with 4 maps each
        round_of_maps()
    assert len(MAPS) >= 10 and settings(model) == before and n_tensors() <= first + 2


@ignore_zero_maps
def test_maps_of_attentions_and_concepts_leave_no_hooks_and_no_memory():
    model, x = seeded(tiny_vit), noise(1, 3, 32, 32)
    before = settings(model)

    def round_of_maps():
        relevance(model, x, [0, 1])
        rollout(model, x)
        factorize(model, x, model.vit.layers[1], lambda vectors: vectors, GRID, n_concepts=2)
        explain(model, x, [0, 1], model.vit.layers[1], GRID)
        explain(model, x, [0, 1])

    round_of_maps()
    first = n_tensors()
    for _ in range(10):
        round_of_maps()
    assert settings(model) == before and n_tensors() <= first + 2


@each_function
@ignore_zero_maps
def test_after_a_failure_the_map_is_the_same(name):
    model, x = seeded(Net), noise(1, 3, 16, 16)
    first, before = MAPS[name](model, x, [0, 1]), settings(model)
    for wrong in ([9], [lambda scores: scores], [lambda scores: scores[0] * float("nan")], [lambda scores: 1 / 0]):
        with pytest.raises((ValueError, ZeroDivisionError)):
            MAPS[name](model, x, wrong)
    with pytest.raises(ValueError):
        MAPS[name](model, x[0], [0])
    assert settings(model) == before
    np.testing.assert_array_equal(MAPS[name](model, x, [0, 1]), first)
