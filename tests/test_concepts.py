import functools
import types

import numpy as np
import pytest
import torch
from rehearsal import accelerator
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from xai_helpers.concepts import Concepts, factorize, named_right
from xai_helpers.reshape import tokens_to_map
from xai_helpers.scoring import Example


class Channels(nn.Module):
    """Hands the image's channels to its target layer as they are."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1, bias=False)
        self.layer.weight.data = torch.eye(3)[:, :, None, None]

    def forward(self, x):
        return self.layer(x).mean(dim=(2, 3))


def halves(left, right):
    """A 2 x 4 image whose left and right half have one value a channel."""
    columns = [torch.tensor(left), torch.tensor(left), torch.tensor(right), torch.tensor(right)]
    return torch.stack(columns, dim=1)[None, :, None].repeat(1, 1, 2, 1)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([3.0, 0.0, 0.0], [0.0, 5.0, 0.0]),
        # Less each channel's smallest value: (4, 0, 0) and (0, 7, 2), so the two halves are apart again.
        ([3.0, -2.0, 1.0], [-1.0, 5.0, 3.0]),
    ],
)
def test_two_halves_are_two_concepts(left, right):
    model = Channels()
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, -1.0]])
    concepts = factorize(model, halves(left, right), model.layer, lambda vectors: vectors @ weights.T, n_concepts=2)
    first = int(np.argmax(concepts.maps[:, 0, 0]))  # the concept of the left half
    order = [first, 1 - first]
    assert concepts.maps.dtype == np.float32 and concepts.maps.shape == (2, 2, 4)
    np.testing.assert_allclose(concepts.maps[order[0]], [[1, 1, 0, 0]] * 2, atol=1e-3)
    np.testing.assert_allclose(concepts.maps[order[1]], [[0, 0, 1, 1]] * 2, atol=1e-3)
    np.testing.assert_allclose(concepts.vectors[order], [left, right], atol=0.01)
    scores = [[left[0], 2 * left[1] - left[2]], [right[0], 2 * right[1] - right[2]]]
    np.testing.assert_allclose(concepts.scores[order], scores, atol=0.03)


def test_named_right_compares_the_name_of_the_ruling_concept():
    model = Channels()
    model.config = types.SimpleNamespace(id2label={0: "red", 1: "green"})
    left = np.zeros((2, 2, 4), bool)
    left[0, :, :2] = left[1, :, 2:] = True  # a mask for the left half, one for the right
    image = halves([3.0, 0.0, 0.0], [0.0, 5.0, 0.0])

    def share(categories, swapped=False):
        head = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]] if swapped else [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        return named_right(model, [Example(image, categories, left)], model.layer, lambda v: v @ head, n_concepts=2)

    assert share(["red", "green"]) == 1
    assert share(["red", "green"], swapped=True) == 0
    assert share(["red", "red"]) == 0.5


def test_a_label_is_the_best_category_without_its_synonyms():
    concepts = Concepts(None, None, np.array([[0.5, 1.5], [2, -1]]))
    assert concepts.labels({0: "remote control, remote", 1: "cat"}) == ["cat (1.5)", "remote control (2.0)"]


def tiny_resnet():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
    model = ResNetForImageClassification(config)
    return model, model.resnet.encoder.stages[-1], model.classifier, None


def tiny_vit():
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32,
                       patch_size=8, num_labels=5)
    model = ViTForImageClassification(config)

    def head(vectors):  # with the norm that stands between the last block and the classifier
        return model.classifier(model.vit.layernorm(vectors))

    return model, model.vit.layers[-1], head, functools.partial(tokens_to_map, grid=(4, 4))


def picture(height=32, width=32):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("build", [tiny_resnet, tiny_vit])
def test_shapes_and_ranges(build):
    model, layer, head, reshape_transform = build()
    concepts = factorize(model, picture(), layer, head, reshape_transform, n_concepts=3)
    assert concepts.maps.shape == (3, 32, 32) and concepts.maps.dtype == np.float32
    assert concepts.maps.min() >= 0 and 0.9 < concepts.maps.max() <= 1
    assert concepts.vectors.shape == (3, 16) and concepts.vectors.dtype == np.float32
    assert concepts.scores.shape == (3, 5) and concepts.scores.dtype == np.float32
    with torch.no_grad():
        np.testing.assert_allclose(concepts.scores, head(torch.from_numpy(concepts.vectors)).numpy(), atol=1e-5)


def test_a_picture_that_is_not_square():
    model, layer, head, _ = tiny_resnet()
    assert factorize(model, picture(32, 64), layer, head).maps.shape == (4, 32, 64)


@pytest.mark.parametrize("build", [tiny_resnet, tiny_vit])
def test_the_same_input_gives_the_same_concepts(build):
    model, layer, head, reshape_transform = build()
    np.random.seed(0)
    first = factorize(model, picture(), layer, head, reshape_transform)
    np.random.seed(1)
    second = factorize(model, picture(), layer, head, reshape_transform)
    np.testing.assert_array_equal(first.maps, second.maps)
    np.testing.assert_array_equal(first.scores, second.scores)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Linear(7, 2), r"for \(4, 16\) it raised RuntimeError"),
        (lambda vectors: vectors.numpy(), r"for \(4, 16\) it returned \(4, 16\)"),
        (lambda vectors: vectors.sum(), r"for \(4, 16\) it returned Tensor"),
        (lambda vectors: vectors.sum(dim=0, keepdim=True), r"for \(4, 16\) it returned \(1, 16\)"),
    ],
)
def test_a_head_that_does_not_fit_says_what_came_back(head, message):
    model, layer, _, _ = tiny_resnet()
    with pytest.raises(ValueError, match=message):
        factorize(model, picture(), layer, head)


@pytest.mark.parametrize(
    ("layer", "reshape_transform", "message"),
    [
        (lambda model: nn.Linear(2, 2), None, "Linear is not part of this ViTForImageClassification"),
        (lambda model: model.vit.layers, None, "vit.layers is not reached"),
        (lambda model: model.vit.layers[0], None, r"vit.layers.0 returns shape \(1, 17, 16\)"),
        (lambda model: model.vit.layers[0], functools.partial(tokens_to_map, grid=(3, 3)), r"wanted \(batch, 10, "),
    ],
)
def test_a_layer_that_cannot_be_factorized_points_to_the_finder(layer, reshape_transform, message):
    model, _, head, _ = tiny_vit()
    before = state(model)
    with pytest.raises(ValueError, match=message) as error:
        factorize(model, picture(), layer(model), head, reshape_transform)
    assert "find_target_layers" in str(error.value)
    assert state(model) == before


def state(model):
    modules = [(module.training, len(module._forward_hooks)) for module in model.modules()]
    return modules, [(parameter.requires_grad, id(parameter.grad)) for parameter in model.parameters()]


def test_the_model_is_as_before_and_was_in_eval_mode():
    model, layer, head, _ = tiny_resnet()
    expected = factorize(model.eval(), picture(), layer, head)
    model.train().classifier.requires_grad_(False)
    before, statistics = state(model), {name: value.clone() for name, value in model.state_dict().items()}
    concepts = factorize(model, picture(), layer, head)
    np.testing.assert_array_equal(concepts.vectors, expected.vectors)
    assert state(model) == before
    assert all(torch.equal(value, statistics[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("n_concepts", [0, -1, 1.5, "4", None])
def test_concepts_are_counted_in_whole_numbers(n_concepts):
    model, layer, head, _ = tiny_resnet()
    with pytest.raises(ValueError, match="n_concepts is a whole number of at least 1, not"):
        factorize(model, picture(), layer, head, n_concepts=n_concepts)


def test_a_model_without_parameters_is_factorized():
    model = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    concepts = factorize(model, halves([3.0, 0.0, 0.0], [0.0, 5.0, 0.0]), model[0], nn.Identity(), n_concepts=2)
    assert concepts.maps.shape == (2, 2, 4)


def test_pictures_of_another_kind_say_what_to_do():
    model, layer, head, _ = tiny_resnet()
    with pytest.raises(ValueError, match="unsqueeze"):
        factorize(model, picture()[0], layer, head)


def test_a_model_on_another_device_has_the_same_concepts():
    model, layer, head, reshape_transform = tiny_vit()
    wanted = factorize(model, picture(), layer, head, reshape_transform)
    with accelerator() as device:
        for pixel_values in (picture(), picture().to(device)):
            concepts = factorize(model.to(device), pixel_values, layer, head, reshape_transform)
            for found, here in zip(vars(concepts).values(), vars(wanted).values(), strict=True):
                np.testing.assert_allclose(found, here, atol=1e-3)
