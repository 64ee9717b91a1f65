import contextlib
import functools
import warnings

import numpy as np
import pytest
import pytorch_grad_cam
import torch
from published import PUBLISHED
from torch import nn
from transformers import AutoModelForImageClassification, SegformerConfig, SegformerForSemanticSegmentation

from training.classifier import recipes
from xai_helpers.cam import explain
from xai_helpers.checkpoints import examples, load, names_of
from xai_helpers.concepts import factorize
from xai_helpers.layers import find_target_layers
from xai_helpers.recipes import RECIPES
from xai_helpers.scoring import score_table
from xai_helpers.wrappers import LogitsModel

each_family = pytest.mark.parametrize("name", names_of("classification"))

# Height and width of images, and the rows and columns that follow from the strides of the bundled models, 16 in all.
# Where a side is no multiple of 16, convolutions with padding and Swin's padded patches round up: 72 / 16 gives 5.
SIZES = [((128, 128), (8, 8)), ((96, 160), (6, 10)), ((72, 104), (5, 7))]
CUT = {"convnext": (4, 6), "vit": (4, 6)}  # these two cut the picture into patches and drop what is left over


def picture(height, width):
    """A random image without fine detail, (1, 3, height, width)."""
    coarse = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, (height, width), mode="bicubic")


def build(config, pixel_values):
    """A random model in eval mode. Its batch norms know this image, else nothing of it would reach the scores."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageClassification.from_config(config).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            nn.init.ones_(norm.weight)
            norm.momentum = 1.0
            norm.train()
        with torch.no_grad():
            model(pixel_values.repeat(2, 1, 1, 1))
    return model.eval()


def bundled_like(name):
    """A random model of the bundled shape. The ViT is told to stretch its positions to the image."""
    model = build(recipes()[name].config, picture(128, 128))
    return LogitsModel(model, interpolate_pos_encoding=True) if name == "vit" else model


def run(model, pixel_values, layers):
    """The scores of the image, and what each of the layers puts out, reshaped as its entry says."""
    outputs = {}
    handles = [
        layer.module.register_forward_hook(lambda _, inputs, output, i=i: outputs.update({i: output}))
        for i, layer in enumerate(layers)
    ]
    with torch.no_grad():
        scores = LogitsModel(model)(pixel_values)[0]
    for handle in handles:
        handle.remove()
    return scores, [
        layer.reshape_transform(outputs[i]) if layer.reshape_transform else outputs[i] for i, layer in enumerate(layers)
    ]


def check_recipe(name, model, pixel_values, grid):
    """All layers have the wanted grid, or a finer one; explain and factorize give maps, finite and not constant."""
    recipe, size = RECIPES[name], tuple(pixel_values.shape[2:])
    layers, dff = recipe.sweep(model, pixel_values), recipe.dff(model, pixel_values)
    scores, outputs = run(model, pixel_values, [*layers.values(), dff])
    for path, output in zip([*layers, "concepts"], outputs, strict=True):
        assert output.ndim == 4, path
        finer = [of_map / of_last for of_map, of_last in zip(output.shape[2:], grid, strict=True)]
        assert finer == [1, 1] or all(1.6 <= times <= 4.2 for times in finer), path  # by a stride of 2, or of 4
    assert outputs[0].shape[2:] == grid
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the model cannot be forked")  # a Swin or a CvT has counted the rows before
        # The highest scores: for others there may be nothing but evidence against them, which is an empty map.
        maps = explain(model, pixel_values, scores.topk(2).indices, recipe.cam(model, pixel_values))
    check_maps(maps, size)
    concepts = factorize(model, pixel_values, dff, recipe.concept_head(model, pixel_values), n_concepts=2)
    check_maps(concepts.maps, size)
    assert concepts.scores.shape == (2, len(scores)) and np.isfinite(concepts.scores).all()


def check_maps(maps, size):
    assert maps.shape == (2, *size) and np.isfinite(maps).all()
    assert (maps.min(axis=(1, 2)) < 0.1).all() and (maps.max(axis=(1, 2)) > 0.9).all()


def test_every_described_family_has_a_checkpoint():
    assert set(names_of("classification")) == set(PUBLISHED)
    assert set(RECIPES) == set(names_of("classification", "imagenet"))


@each_family
@pytest.mark.parametrize(("size", "grid"), SIZES)
def test_recipe_fits_the_bundled_shape_at_every_size(name, size, grid):
    grid = CUT.get(name, grid) if size == (72, 104) else grid
    check_recipe(name, bundled_like(name), picture(*size), grid)


@each_family
def test_a_concept_head_says_what_the_model_says_of_a_picture_of_the_concept_alone(name):
    pixel_values = picture(224, 224)  # the size that the head of the CvT assumes
    model = bundled_like(name)
    layer, concepts = RECIPES[name].dff(model, pixel_values), []

    def overwrite(module, inputs, output):
        concepts.append(torch.randn(output.shape[1 if output.ndim == 4 else 2]))
        return (concepts[0][:, None, None] if output.ndim == 4 else concepts[0]).expand_as(output)

    handle = layer.module.register_forward_hook(overwrite)
    with torch.no_grad():
        wanted = LogitsModel(model)(pixel_values)
        handle.remove()
        head = RECIPES[name].concept_head(model, pixel_values)
        found = head(torch.stack([concepts[0], torch.zeros_like(concepts[0])]))
    torch.testing.assert_close(found[:1], wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


@each_family
def test_concepts_are_taken_where_the_finder_says_or_it_is_said_why_not(name):
    model, pixel_values, recipe = bundled_like(name), picture(128, 128), RECIPES[name]
    described, found = recipe.dff(model, pixel_values), find_target_layers(model, pixel_values).dff
    assert model.get_submodule(described.path) is described.module
    assert (described.path != found.path) == bool(recipe.differs)
    if not recipe.differs:
        _, maps = run(model, pixel_values, [described, found])
        assert torch.equal(*maps)


@each_family
def test_layers_of_a_sweep_are_named_by_their_paths(name):
    model, pixel_values, recipe = bundled_like(name), picture(128, 128), RECIPES[name]
    for path, layer in recipe.sweep(model, pixel_values).items():
        inner = model.model if isinstance(model, LogitsModel) else model
        base = getattr(inner, name)
        places = [base, getattr(base, "encoder", base), *getattr(getattr(base, "encoder", base), "stages", [])[-1:]]
        found = []
        for place in places:
            with contextlib.suppress(AttributeError, IndexError):
                found.append(eval(f"place.{path}", {"place": place}))
        assert layer.module in [*found, *(one[-1] for one in found if isinstance(one, nn.ModuleList))], path


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings("ignore:the model cannot be forked")
def test_no_layer_points_better_than_that_of_the_recipe(name):
    """By the numbers of the benchmark, of which 16 scenes are drawn here, beside published layers and a random map."""
    recipe, (model, processor) = RECIPES[name], load(name, "bundled")
    scenes = examples(model, processor, 16, "validation")
    methods = {
        path: functools.partial(explain, model, target_layer=layer)
        for path, layer in recipe.sweep(model, scenes[0].pixel_values).items()
        if recipe.layers[path].source or path == recipe.best
    }
    methods[recipe.best] = functools.partial(methods[recipe.best], method=getattr(pytorch_grad_cam, recipe.method))
    pointing = score_table(methods, scenes)["pointing"]
    assert abs(pointing[recipe.best] - recipe.pointing) <= 0.13  # two standard errors of 32 maps
    assert pointing[recipe.best] >= pointing.max() - 0.07 and pointing[recipe.best] > pointing["random map"] + 0.4


def test_published_layers_have_their_source():
    for recipe in RECIPES.values():
        assert any(layer.source for layer in recipe.layers.values()) or recipe.architecture
        assert recipe.best in recipe.layers


@each_family
def test_another_model_is_refused(name):
    other = build(recipes()["regnet" if name == "resnet" else "resnet"].config, picture(64, 64))
    message = f"recipe for {name} does not fit a {type(other).__name__}.*load\\('{name}'\\).*find_target_layers"
    recipe = RECIPES[name]
    for call in (recipe.cam, recipe.sweep, recipe.dff, recipe.concept_head):
        with pytest.raises(ValueError, match=message):
            call(other, picture(64, 64))


def test_a_model_for_another_task_is_refused():
    model = SegformerForSemanticSegmentation(SegformerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8]))
    with pytest.raises(ValueError, match="does not fit a SegformerForSemanticSegmentation"):
        RECIPES["segformer"].cam(model, picture(64, 64))


@pytest.mark.slow
@each_family
def test_recipe_fits_the_published_shape(name):
    published = PUBLISHED[name]
    pixel_values = picture(published.side, published.side)
    model = build(published.config, pixel_values)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(published.millions, abs=0.05)
    check_recipe(name, model, pixel_values, (published.positions, published.positions))


def test_the_ways_to_explain_are_the_calls_that_they_name():
    model, processor = load("swin", "bundled", device="cpu")
    [example] = examples(model, processor, 1)
    ways = RECIPES["swin"].ways(model, example.pixel_values)
    calls = {
        "balanced gradients": {},
        "HiResCAM at layers[-1].blocks[0].layernorm_before": {
            "target_layer": RECIPES["swin"].cam(model, example.pixel_values), "method": pytorch_grad_cam.HiResCAM,
        },
        "published: Grad-CAM at layernorm": {
            "target_layer": RECIPES["swin"].sweep(model, example.pixel_values)["layernorm"],
        },
    }  # fmt: skip
    assert list(ways) == [*calls, "published: Grad-CAM at layers[-1].blocks[-1].layernorm_before"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, options in calls.items():
            wanted = explain(model, example.pixel_values, example.categories, **options)
            np.testing.assert_array_equal(ways[name](example.pixel_values, example.categories), wanted)
