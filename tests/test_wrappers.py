import functools
import types

import numpy as np
import pytest
import torch
from test_attention import tiny_vit
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel, ViTConfig, ViTForImageClassification

from xai_helpers.attention import relevance, rollout
from xai_helpers.attribution import attribute, occlude, rise
from xai_helpers.cam import explain
from xai_helpers.concepts import factorize
from xai_helpers.layers import find_target_layers, layer_table
from xai_helpers.leaderboard import faithfulness
from xai_helpers.reshape import tokens_to_map
from xai_helpers.scoring import Example
from xai_helpers.wrappers import (
    LogitsModel,
    category_index,
    category_targets,
    check_count,
    check_picture,
    count_passes,
    device_of,
    frozen,
    input_for,
    layer_path,
    passes_table,
    top_categories,
)

SCORES = torch.tensor([10.0, 20.0, 30.0])


def tiny_resnet(names=("cat", "tabby cat", "rocket"), model_class=ResNetForImageClassification):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], id2label=dict(enumerate(names)))
    return model_class(config).eval()


def test_logits_come_as_a_tensor():
    model, pixel_values = tiny_resnet(), torch.randn(2, 3, 32, 32)
    assert torch.equal(LogitsModel(model)(pixel_values), model(pixel_values).logits)
    assert LogitsModel(model).config is model.config


def test_tensors_and_wrapped_models_pass_through():
    model, pixel_values = torch.nn.Flatten(), torch.randn(1, 3, 2, 2)
    assert torch.equal(LogitsModel(LogitsModel(model))(pixel_values), pixel_values.flatten(1))
    assert LogitsModel(model).config is None


def test_options_reach_the_model():
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32, patch_size=16
    )
    model, wide = ViTForImageClassification(config).eval(), torch.randn(1, 3, 32, 64)
    with pytest.raises(ValueError, match="doesn't match model"):
        LogitsModel(model)(wide)
    assert LogitsModel(model, interpolate_pos_encoding=True)(wide).shape == (1, 2)


def test_a_model_without_head_says_so():
    with pytest.raises(ValueError, match="ResNetModel returned .*neither a tensor nor an object with `logits`"):
        LogitsModel(tiny_resnet(model_class=ResNetModel))(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("categories", "picked"),
    [
        ("rocket", [30]),
        (1, [20]),
        (np.int64(1), [20]),
        (["tabby cat", 0, lambda scores: scores.sum()], [20, 10, 60]),
        (torch.tensor([2, 0]), [30, 10]),
        (torch.tensor(2), [30]),
        (SCORES.topk(2).indices, [30, 20]),
        (np.array([1]), [20]),
        ([torch.tensor(1), np.array(2)], [20, 30]),
        (lambda scores: scores[1:2], [20]),  # one number, whatever its shape
    ],
)
def test_categories_pick_their_scores(categories, picked):
    assert [float(target(SCORES)) for target in category_targets(tiny_resnet(), categories)] == picked


@pytest.mark.parametrize(
    ("names", "categories", "message"),
    [
        (("cat", "tabby cat", "rocket"), "Tabby", "no category 'Tabby'; the closest are: 'tabby cat'"),
        (("cat", "tabby cat", "rocket"), ["cat", "rokcet"], "no category 'rokcet'; the closest are: 'rocket'"),
        (("cat", "tabby cat", "rocket"), "zzz", "'cat', 'tabby cat', 'rocket'"),
        (("crane", "cat", "crane"), "crane", r"several categories are named 'crane'.*\[0, 2\]"),
        (("cat", "rocket"), [], "no category"),
        (("cat", "rocket"), [1.5], "not float"),
        (("cat", "rocket"), 1.0, "a name, an index or a callable, not float"),
        (("cat", "rocket"), None, "a name, an index or a callable, not NoneType"),
        (("cat", "rocket"), True, "a name, an index or a callable, not bool"),
        (("cat", "rocket"), np.array([False, True]), "a name, an index or a callable, not bool"),
        (("cat", "rocket"), b"cat", "a name, an index or a callable, not bytes"),
        (("cat", "rocket"), [["cat"]], "a name, an index or a callable, not list"),
    ],
)
def test_unknown_categories_name_the_known(names, categories, message):
    with pytest.raises(ValueError, match=message):
        category_targets(tiny_resnet(names), categories)


@pytest.mark.parametrize(
    ("category", "found"),
    [
        (lambda scores: scores, r"returned shape \(3,\) for scores of shape \(3,\)"),
        (lambda scores: 1.0, "returned float"),
    ],
)
def test_a_callable_that_returns_no_single_number_says_so(category, found):
    (target,) = category_targets(tiny_resnet(), category)
    with pytest.raises(ValueError, match=f"a callable category makes a tensor of one number.*{found}"):
        target(SCORES)


IMAGENET_1K = ("tench", "Egyptian cat", "remote control, remote", "cat", "crane", "crane")
IMAGENET_22K = ("Egyptian_cat", "remote_control, remote", "domestic_cat, house_cat", "daisy", "African_daisy", "Daisy")


@pytest.mark.parametrize(
    ("names", "name", "index"),
    [
        (IMAGENET_1K, "Egyptian cat", 1),
        (IMAGENET_1K, "egyptian_CAT", 1),
        (IMAGENET_1K, "remote control, remote", 2),
        (IMAGENET_1K, "remote control", 2),
        (IMAGENET_1K, "Remote", 2),
        (IMAGENET_1K, "cat", 3),  # and not the cats in whose names the word occurs
        (IMAGENET_22K, "Egyptian cat", 0),
        (IMAGENET_22K, "remote control, remote", 1),
        (IMAGENET_22K, "house cat", 2),
        (IMAGENET_22K, "daisy", 3),  # as it stands, though it is ambiguous in another spelling
        (IMAGENET_22K, "Daisy", 5),
        (("remote", "remote control, remote"), "remote", 0),  # a whole name goes before a synonym
        (("Remote", "remote control, remote"), "remote", 0),
    ],
)
def test_a_name_is_found_in_either_spelling(names, name, index):
    assert category_index(tiny_resnet(names), name) == index
    (target,) = category_targets(tiny_resnet(names), name)
    assert target(torch.arange(6)) == index


@pytest.mark.parametrize(
    ("names", "name", "message"),
    [
        (IMAGENET_1K, "crane", r"several categories are named 'crane'.*\[4, 5\]"),
        (IMAGENET_22K, "DAISY", r"several categories are named 'DAISY'.*\[3, 5\]"),
        (("marguerite, daisy", "oxeye, marguerite"), "marguerite", r"several categories .*'marguerite'.*\[0, 1\]"),
        (IMAGENET_22K, "cat", "no category 'cat'; the closest are: 'Egyptian_cat', 'domestic_cat, house_cat'"),
        (IMAGENET_22K, "african dasiy", "no category 'african dasiy'; the closest are: 'African_daisy'"),
        (("rocket",), "", "no category ''; the closest are: 'rocket'"),
    ],
)
def test_an_unknown_or_ambiguous_name_has_no_index(names, name, message):
    with pytest.raises(ValueError, match=message):
        category_index(tiny_resnet(names), name)


def test_a_name_needs_a_config():
    with pytest.raises(ValueError, match="no config.id2label.*give the index"):
        category_index(torch.nn.Flatten(), "cat")
    with pytest.raises(ValueError, match="no config.id2label.*give the index$"):
        category_targets(torch.nn.Flatten(), "cat")
    with pytest.raises(ValueError, match="no config.id2label.*give the index, or explain model.module"):
        category_index(torch.nn.DataParallel(tiny_resnet()), "cat")


@pytest.mark.parametrize("index", [3, -1])
def test_an_index_beyond_the_scores_is_refused(index):
    (target,) = category_targets(torch.nn.Flatten(), index)
    with pytest.raises(ValueError, match=f"category {index} is out of range: the model's scores are 0 to 2"):
        target(SCORES)


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (np.zeros((1, 3, 8, 8), np.float32), "is a ndarray.*processor"),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, "is a dict.*pixel_values"),
        (torch.zeros(3, 8, 8), r"\(3, 8, 8\).*unsqueeze\(0\)"),
        (torch.zeros(2, 3, 8, 8), r"one image at a time: pixel_values\[i : i \+ 1\]"),
        (torch.zeros(1, 8, 8, 3), r"permute\(0, 3, 1, 2\)"),
        (torch.zeros(1, 8, 8), "unsqueeze"),
        (torch.zeros(1, 0, 8, 8), r"\(1, 0, 8, 8\).*processor"),
        (torch.zeros(1, 16, 3, 8, 8), r"a video or a volume, explain one frame.*flatten\(1, 2\).*occlude"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8.*normalise"),
        (torch.full((1, 3, 8, 8), float("nan")), "NaN or infinite"),
        (torch.zeros(1, 3, 8, 8).log(), "NaN or infinite"),
    ],
)
def test_pictures_of_another_kind_say_what_to_do(pixel_values, message):
    with pytest.raises(ValueError, match=message):
        check_picture(pixel_values)


def test_pictures_pass():
    check_picture(torch.zeros(1, 3, 8, 9))
    for channels in (1, 2, 4, 5, 9, 12):
        check_picture(torch.zeros(1, channels, 8, 9))
    check_picture(torch.zeros(1, 3, 8, 9, device="meta"))  # has no values


def test_a_layer_knows_its_path():
    model = tiny_resnet()
    assert layer_path(model, model.resnet.encoder.stages[1]) == "resnet.encoder.stages.1"
    with pytest.raises(ValueError, match="Conv2d is not part of this ResNetForImageClassification"):
        layer_path(model, torch.nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="is a module such as .* not 'classifier'"):
        layer_path(model, "classifier")


def test_what_is_no_layer_is_not_printed_whole():
    model = tiny_resnet()
    with pytest.raises(ValueError, match="not list; find_target_layers") as error:
        layer_path(model, [model.resnet])
    assert "Conv2d" not in str(error.value)


@pytest.mark.parametrize("fails", [False, True])
def test_frozen_gives_everything_back(fails):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Dropout())
    model[1].eval()
    model[1].bias.requires_grad_(False)
    model(torch.ones(1, 2)).sum().backward()
    gradient = model[0].weight.grad
    try:
        with torch.inference_mode(), frozen(model):
            assert not model.training and not model[2].training
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            model.zero_grad()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert [module.training for module in model] == [True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert model[0].weight.grad is gradient


@pytest.mark.parametrize("value", [0, 4, -1, 1.0, "2", True, None, (2, 2)])
def test_a_count_is_a_whole_number_in_its_range(value):
    with pytest.raises(ValueError, match="window is a whole number from 1 to 3, not"):
        check_count("window", value, most=3)
    check_count("window", np.int64(3), most=3)


def test_a_model_is_where_its_first_tensor_is():
    without_parameters = torch.nn.BatchNorm2d(3, affine=False)
    for model in (torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 2)), without_parameters):
        assert device_of(model).type == "cpu" and device_of(model.to("meta")).type == "meta"
    assert device_of(torch.nn.ReLU()).type == "cpu"


def test_an_input_comes_to_the_models_device_and_precision():
    model, pixel_values = torch.nn.Conv2d(3, 2, 1), torch.ones(1, 3, 4, 4, requires_grad=True)
    assert input_for(model.double(), pixel_values).dtype == torch.float64
    assert input_for(model.float(), pixel_values.double()).dtype == torch.float32
    assert input_for(model.half(), pixel_values, coarse=True).dtype == torch.float16
    assert input_for(model.to("meta", torch.float32), pixel_values).device.type == "meta"
    assert input_for(torch.nn.ReLU(), pixel_values.double()).dtype == torch.float64
    assert not input_for(model, pixel_values).requires_grad


# What holds for every function that looks at a model: each is called on a tiny ViT, and gives numbers.

GRID = functools.partial(tokens_to_map, grid=(4, 4))


def inner(model):
    return getattr(model, "_orig_mod", model).vit.layers


def concepts(model, x):
    found = factorize(model, x, inner(model)[-2], lambda vectors: model.classifier(vectors), GRID, n_concepts=2)
    return found.scores


def shares(model, x):
    torch.manual_seed(0)  # ROAD fills gaps with a little noise
    return list(faithfulness(model, Example(x, ["cat"], None), np.linspace(0, 1, 1024).reshape(32, 32)).values())


CALLS = dict(
    explain=lambda model, x: explain(model, x, ["cat", "coin"], inner(model)[-1].layernorm_before, GRID),
    relevance=lambda model, x: relevance(model, x, ["cat", "coin"]),
    rollout=rollout,
    factorize=concepts,
    attribute=lambda model, x: attribute(model, x, "cat"),
    occlude=lambda model, x: occlude(model, x, "cat"),
    rise=lambda model, x: rise(model, x, "cat", n_masks=10),
    layer_table=lambda model, x: layer_table(model, x, "cat", {"a": inner(model)[-2]})[["share with gradient"]],
    faithfulness=shares,
    top_categories=top_categories,
    find_target_layers=lambda model, x: [
        [candidate.share_with_gradient, len(candidate.grid)] for candidate in find_target_layers(model, x).candidates
    ],
)
X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
each_call = pytest.mark.parametrize("name", CALLS)


@functools.cache
def expected(name):
    return np.array(CALLS[name](tiny_vit(), X), float)


def check_same(name, found, atol=1e-5):
    found = np.array(found, float)
    assert np.isfinite(found).all() and found.any()
    np.testing.assert_allclose(found, expected(name), atol=atol)


@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_in_double_precision_and_either_picture(name, dtype):
    check_same(name, CALLS[name](tiny_vit().double(), X.to(dtype)), atol=1e-3)


@each_call
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_says_what_to_do(name, dtype):
    model = tiny_vit().to(dtype)
    for pixel_values in (X, X.to(dtype)):
        if name in ("find_target_layers", "top_categories"):
            assert len(CALLS[name](model, pixel_values))
        else:
            with pytest.raises(ValueError, match=r"computes in torch\.b?float16.*model\.float\(\)"):
                CALLS[name](model, pixel_values)


@each_call
def test_autocast_and_default_precision_and_device_change_nothing(name):
    model = tiny_vit()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_same(name, CALLS[name](model, X))
    if name == "faithfulness":  # ROAD makes tensors as they are by default
        return
    try:
        torch.set_default_dtype(torch.float64)
        check_same(name, CALLS[name](model, X))
    finally:
        torch.set_default_dtype(torch.float32)
    try:
        torch.set_default_device("meta")
        found = CALLS[name](model, X)
    finally:
        torch.set_default_device(None)
    check_same(name, found)


@pytest.fixture(scope="module")
def compiled():
    model = torch.compile(tiny_vit(), backend="eager")
    with torch.no_grad():
        model(X)
    yield model
    torch._dynamo.reset()


@each_call
def test_a_compiled_model_is_explained_as_it_was_written(name, compiled):
    check_same(name, CALLS[name](compiled, X))


@each_call
def test_the_picture_is_brought_to_the_models_device(name):
    model, devices = tiny_vit().to("meta"), []
    model.register_forward_pre_hook(lambda module, inputs: devices.append(inputs[0].device.type))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta tensor"):  # there are no numbers on this device
        CALLS[name](model, X)
    assert set(devices) == {"meta"} or name == "find_target_layers"  # which asks for numbers before it asks the model


@each_call
def test_a_picture_that_is_not_finite_is_refused(name):
    with pytest.raises(ValueError, match="NaN or infinite"):
        CALLS[name](tiny_vit(), torch.where(X > 2, float("nan"), X))


def test_top_categories_are_the_models_first_ones():
    class Fixed(torch.nn.Module):
        config = types.SimpleNamespace(id2label={0: "cat", 1: "tabby cat", 2: "rocket"})

        def forward(self, pixel_values):
            return SCORES[[2, 0, 1]].expand(len(pixel_values), -1)  # 30, 10, 20

    found = top_categories(Fixed(), torch.zeros(1, 3, 4, 4), k=2)
    assert found.index.tolist() == ["cat", "rocket"] and found["score"].tolist() == [30, 20]
    assert top_categories(Fixed(), torch.zeros(1, 3, 4, 4))["score"].tolist() == [30, 20, 10]  # four are asked for
    with pytest.raises(ValueError, match="one image at a time"):
        top_categories(Fixed(), torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="k is a whole number of at least 1, not 0"):
        top_categories(Fixed(), torch.zeros(1, 3, 4, 4), k=0)
    with pytest.raises(ValueError, match="no config.id2label, so its categories have no names: .* yourself$"):
        top_categories(torch.nn.Flatten(), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="or explain model.module"):
        top_categories(torch.nn.DataParallel(Fixed()), torch.zeros(1, 3, 4, 4))


def test_passes_are_counted():
    model, x = tiny_resnet(), torch.randn(3, 3, 32, 32)
    with count_passes(model) as passed:
        with torch.no_grad():
            model(x)
        scores = model(pixel_values=x[:2]).logits
        for score in scores[0, :2]:
            score.backward(retain_graph=True)
    assert passed == {"pictures": 5, "backward passes": 2}
    model(x)  # no longer counted
    assert passed == {"pictures": 5, "backward passes": 2}


def test_pictures_of_a_list_are_counted_and_a_backward_pass_of_any_of_their_scores():
    class Detector(torch.nn.Module):
        """Takes a list of pictures of any size, as torchvision's detectors do."""

        def forward(self, options, pictures):
            return [{"scores": picture.mean(dim=(1, 2))} for picture in pictures]

    model, pictures = Detector(), [torch.ones(3, 4, 4, requires_grad=True), torch.ones(3, 5, 2, requires_grad=True)]
    with count_passes(model) as passed:
        first, second = model("fast", pictures)
        (first["scores"].sum() + second["scores"].sum()).backward(retain_graph=True)  # one, though of two pictures
        second["scores"][0].backward()
    assert passed == {"pictures": 2, "backward passes": 2}


def test_an_explanation_of_three_categories_is_one_picture_and_one_backward_pass():
    model, x = tiny_resnet(), torch.randn(1, 3, 32, 32)
    with count_passes(model) as passed:
        explain(model, x, range(3), model.resnet.encoder.stages[-1])
    assert passed == {"pictures": 1, "backward passes": 1}


def test_counting_leaves_no_hook_behind_when_the_call_fails():
    model = tiny_resnet()
    with pytest.raises(ValueError, match="wrong"), count_passes(model):
        raise ValueError("wrong")
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_row_of_passes_for_each_method():
    model = tiny_resnet()
    example = types.SimpleNamespace(pixel_values=torch.randn(1, 3, 32, 32), categories=["cat", "rocket"])

    def each_alone(x, names):
        return [explain(model, x, name, model.resnet.encoder.stages[-1]) for name in names]

    table = passes_table(model, {"look": lambda x, names: model(x), "alone": each_alone}, example)
    assert table.to_dict(orient="index") == {
        "look": {"pictures": 1, "backward passes": 0},
        "alone": {"pictures": 2, "backward passes": 2},
    }
