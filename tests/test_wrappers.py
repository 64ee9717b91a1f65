import types

import numpy as np
import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel, ViTConfig, ViTForImageClassification

from xai_helpers.cam import explain
from xai_helpers.wrappers import (
    LogitsModel,
    category_index,
    category_targets,
    check_picture,
    count_passes,
    frozen,
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
    ],
)
def test_unknown_categories_name_the_known(names, categories, message):
    with pytest.raises(ValueError, match=message):
        category_targets(tiny_resnet(names), categories)


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
    with pytest.raises(ValueError, match="no config.id2label.*give the index"):
        category_targets(torch.nn.Flatten(), "cat")


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
        (torch.zeros(1, 4, 8, 8), r"\(1, 4, 8, 8\).*processor"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8.*normalise"),
    ],
)
def test_pictures_of_another_kind_say_what_to_do(pixel_values, message):
    with pytest.raises(ValueError, match=message):
        check_picture(pixel_values)


def test_pictures_pass():
    check_picture(torch.zeros(1, 3, 8, 9))
    check_picture(torch.zeros(1, 1, 8, 9))


def test_a_layer_knows_its_path():
    model = tiny_resnet()
    assert layer_path(model, model.resnet.encoder.stages[1]) == "resnet.encoder.stages.1"
    with pytest.raises(ValueError, match="Conv2d is not part of this ResNetForImageClassification"):
        layer_path(model, torch.nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="is a module such as .* not 'classifier'"):
        layer_path(model, "classifier")


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


def test_top_categories_are_the_models_first_ones():
    class Fixed(torch.nn.Module):
        config = types.SimpleNamespace(id2label={0: "cat", 1: "tabby cat", 2: "rocket"})

        def forward(self, pixel_values):
            return SCORES[[2, 0, 1]].expand(len(pixel_values), -1)  # 30, 10, 20

    found = top_categories(Fixed(), torch.zeros(1, 3, 4, 4), k=2)
    assert found.index.tolist() == ["cat", "rocket"] and found["score"].tolist() == [30, 20]
    with pytest.raises(ValueError, match="one image at a time"):
        top_categories(Fixed(), torch.zeros(2, 3, 4, 4))


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
