"""Detectors and the segmenter are trained on the right boxes and pixels, and reach what their cards say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from training import detector, recorded, segmenter
from training.report import MEAN, SIDE, STD
from xai_helpers.checkpoints import load
from xai_helpers.detectors import SceneFasterRCNN
from xai_helpers.scenes import labels, make_scene


@pytest.fixture
def runs(tmp_path, monkeypatch):
    for module in (recorded, detector, segmenter):
        monkeypatch.setattr(module, "RUNS", tmp_path)
    monkeypatch.setattr(detector, "average_precision", lambda *args, **options: {})
    monkeypatch.setattr(segmenter, "intersection_over_union", lambda *args, **options: {})
    return tmp_path


def test_placed_scenes_are_those_of_the_training_split_and_some_repeat_a_category():
    found = [recorded.placed_scene(i, side=64) for i in range(60)]
    repeated = 0
    for i, made in enumerate(found):
        categories = made["categories"][made["categories"] > 0]
        assert len(categories) == recorded.n_objects(i)
        assert set(np.unique(made["places"])) <= set(range(len(categories) + 1))
        repeated += len(categories) > len(set(categories))
    assert repeated == 9  # of the first twenty scenes, those with two or three objects
    names = [labels()[i - 1] for i in found[31]["categories"] if i]
    scene = make_scene(31, recorded.n_objects(31), 64, split="train")
    assert names == scene.categories
    for number, mask in enumerate(scene.masks, start=1):
        np.testing.assert_array_equal(found[31]["places"] == number, mask)


def test_answers_move_with_their_pictures(runs):
    """A scene whose places are written into its pictures: after shift and flip they still agree."""

    def marked_scene(i, side=SIDE):
        places = recorded.placed_scene(i, side)["places"]
        return {"pictures": np.repeat(places[..., None] * 50, 3, axis=2), "places": places}

    scenes = recorded.Scenes(24, side=64, one=marked_scene).make()
    pictures, rows, flip, move = next(scenes.batches(24, np.random.default_rng(0)))
    assert 0 < flip.sum() < 24
    seen = ((pictures.numpy() * STD + MEAN) * 255 / 50).round()[:, 0]
    moved = move(scenes.places[rows])
    np.testing.assert_array_equal(seen, moved)
    assert (moved != scenes.places[rows]).any(axis=(1, 2)).sum() > 12


def test_boxes_are_those_of_visible_pixels():
    places = np.zeros((2, 16, 16), np.uint8)
    places[0, 2:8, 3:10] = 1
    places[0, 12:, 12:] = 2
    places[0, 0, 0] = 3  # one visible pixel is no object to be found
    categories = np.array([[5, 2, 7], [0, 0, 0]], np.uint8)
    first, second = detector.targets_of(places, categories)
    assert first["boxes"].tolist() == [[3, 2, 10, 8], [12, 12, 16, 16]] and first["labels"].tolist() == [5, 2]
    assert second["boxes"].shape == (0, 4) and second["labels"].tolist() == []


def test_each_patch_answers_for_the_smallest_box_around_it():
    # 2 x 2 patches with their centres at 1/4 and 3/4; the large box holds all of them, the small one the last.
    wanted = [{"boxes": torch.tensor([[0.5, 0.5, 1, 1], [0.75, 0.75, 0.3, 0.3]]), "class_labels": torch.tensor([0, 1])}]
    named = torch.tensor([0, 0, 0, 1])
    logits = torch.nn.functional.one_hot(named, 3).float()[None] * 20
    boxes = wanted[0]["boxes"][named][None].clone()
    assert detector.patch_loss(logits, boxes, wanted) < 1e-4
    boxes[0, 3] = wanted[0]["boxes"][0]  # the last patch takes the large box: 0.25 + 0.25 + 0.7 + 0.7 off, times 5
    overlap = 1 - 0.09  # the small box lies within the large one, of area 1
    assert detector.patch_loss(logits, boxes, wanted).item() == pytest.approx((5 * 1.9 + 2 * overlap) / 4, abs=1e-3)
    nothing = [{"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0, dtype=torch.int64)}]
    empty = torch.nn.functional.one_hot(torch.full((4,), 2), 3).float()[None] * 20
    assert detector.patch_loss(empty, boxes, nothing) < 1e-4


def test_pixels_get_the_category_of_their_object():
    places = np.array([[[0, 1], [2, 3]]], np.uint8)
    found = segmenter.category_of_each_pixel(places, np.array([[4, 8, 1]], np.uint8))
    assert found.tolist() == [[[0, 4], [8, 1]]]


@pytest.mark.parametrize("name", detector.RECIPES)
def test_a_detector_is_trained_and_saved(name, runs, monkeypatch):
    monkeypatch.setitem(detector.RECIPES, name, replace(detector.RECIPES[name], batch=4))
    model, _ = detector.train(name, n_scenes=8, epochs=1)
    pictures = np.stack([np.asarray(make_scene(i, 1, SIDE).image) for i in range(2)])
    before = detector.detections(name, model, pictures)
    detector.save(name, model, runs / "folder")
    again, processor = load(name, weights=str(runs / "folder"))
    after = detector.detections(name, again, pictures)
    assert len(before) == len(after) == 2 and not again.training
    for a, b in zip(before, after, strict=True):
        if name == "yolos":  # a Faster R-CNN that was hardly trained has no stable order
            torch.testing.assert_close(a["boxes"], b["boxes"], atol=1, rtol=0)
    pixels = processor(images=make_scene(0, 1, 200).image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, SIDE, SIDE)
    low, high = (0, 1) if name == "faster-rcnn" else (-1, 1)
    third = (high - low) / 3
    assert low <= pixels.min() < low + third < high - third < pixels.max() <= high


def test_an_object_claimed_twice_is_found_once():
    model, _ = load("yolos", weights="bundled")
    pictures = np.stack([np.asarray(make_scene(i, 2, SIDE).image) for i in range(20)])
    for kept, every in zip(
        *(detector.detections("yolos", model, pictures, overlap) for overlap in (0.5, 1.0)), strict=True
    ):
        assert len(every["boxes"]) == model.config.num_detection_tokens
        best, wanted = every["scores"].argsort(descending=True).tolist(), []
        for i in best:  # the rule, written out: a box goes where a more probable one of its category lies
            same = [k for k in wanted if every["labels"][k] == every["labels"][i]]
            if not (box_iou(every["boxes"][[i]], every["boxes"][same]) > 0.5).any():
                wanted.append(i)
        torch.testing.assert_close(kept["scores"], every["scores"][wanted])
        torch.testing.assert_close(kept["boxes"], every["boxes"][wanted])


def test_the_segmenter_is_trained(runs, monkeypatch):
    monkeypatch.setattr(segmenter, "BATCH", 4)
    model, _ = segmenter.train(n_scenes=8, epochs=1)
    assert model(torch.zeros(1, 3, SIDE, SIDE)).logits.shape == (1, 1 + len(labels()), SIDE // 4, SIDE // 4)
    assert model.config.id2label == dict(enumerate(["background", *labels()]))


@pytest.mark.parametrize(("name", "bar"), [("faster-rcnn", 0.95), ("yolos", 0.85)])
def test_bundled_detectors_find_the_objects(name, bar):
    model, _ = load(name, weights="bundled")
    scenes = [make_scene(600_000 + i, 1 + i % 2, SIDE) for i in range(200)]
    metric = MeanAveragePrecision(iou_thresholds=[0.5])
    metric.update(
        detector.detections(name, model, np.stack([np.asarray(scene.image) for scene in scenes])),
        [
            {
                "boxes": torch.tensor(scene.boxes, dtype=torch.float32),
                "labels": torch.tensor([1 + labels().index(category) for category in scene.categories]),
            }
            for scene in scenes
        ],
    )
    assert metric.compute()["map_50"] >= bar


def test_the_bundled_segmenter_finds_the_pixels():
    model, _ = load("segmenter", weights="bundled")
    found = segmenter.intersection_over_union(model, "test", n=100)
    assert found["mean"] >= 0.8 and min(found.values()) >= 0.5, found


def test_a_faster_rcnn_is_made_again_from_its_config(tmp_path):
    torch.manual_seed(0)
    model = SceneFasterRCNN(categories=["a", "b"], hidden_sizes=[8, 16], depths=[1, 1], side=64, channels=8).eval()
    model.save_pretrained(tmp_path)
    again = SceneFasterRCNN.from_pretrained(tmp_path).eval()
    assert again.config.id2label == {0: "background", 1: "a", 2: "b"}
    levels = again.backbone(torch.zeros(1, 3, 64, 64))
    assert {key: tuple(level.shape) for key, level in levels.items()} == {
        "0": (1, 8, 16, 16),
        "1": (1, 8, 8, 8),
        "pool": (1, 8, 4, 4),
    }
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
