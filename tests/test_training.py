"""Training goes on where it was stopped, writes the hub's folder format, and never sees a mask."""

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from training import classifier, recorded
from xai_helpers.scenes import labels, make_scene


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "RUNS", tmp_path)
    monkeypatch.setattr(recorded, "RUNS", tmp_path)
    monkeypatch.setattr(classifier, "score", lambda *args, **options: {})
    return tmp_path


def test_a_stopped_run_goes_on_to_the_same_model(runs, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    whole, _ = classifier.train("resnet", n_scenes=32, epochs=2, batch=16)
    (runs / "resnet" / "state.pt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(classifier, "score", stop)  # called at the end of the first epoch
        with pytest.raises(KeyboardInterrupt):
            classifier.train("resnet", n_scenes=32, epochs=2, batch=16)
    resumed, _ = classifier.train("resnet", n_scenes=32, epochs=2, batch=16)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_saved_checkpoint_loads_with_the_same_scores_in_half_precision(runs):
    model = AutoModelForImageClassification.from_config(classifier.recipes()["resnet"].config).eval()
    image = make_scene(3, size=128).image
    pixels = classifier.normalised(np.asarray(image)[None])
    with torch.no_grad():
        before = model(pixel_values=pixels).logits
        classifier.save(model, runs / "folder")
        after = AutoModelForImageClassification.from_pretrained(runs / "folder", dtype=torch.float32).eval()(
            pixel_values=AutoImageProcessor.from_pretrained(runs / "folder")(image, return_tensors="pt")["pixel_values"]
        )
    assert [after_name for _, after_name in sorted(model.config.id2label.items())] == labels()
    torch.testing.assert_close(before, after.logits, atol=0.02, rtol=0.02)


def test_training_scenes_are_those_of_the_training_split():
    made = recorded.training_scene(9)  # the tenth of every twenty has one object
    scene = make_scene(9, 1, 128, split="train")
    assert (made["pictures"] == np.asarray(scene.image)).all()
    assert [labels()[i] for i in np.flatnonzero(made["targets"])] == scene.categories
    assert ((made["facts"][:-1, 0] > 0) == made["targets"]).all()


def test_shifts_and_flips_keep_the_picture(runs):
    scenes = recorded.Scenes(16).make()
    pictures, rows, flip, _ = next(scenes.batches(16, np.random.default_rng(0)))
    assert pictures.shape == (16, 3, 128, 128) and sorted(rows) == list(range(16)) and 0 < flip.sum() < 16
    # A shift by at most 8 pixels and a flip change where things are, hardly which colours there are.
    means = (scenes.pictures.mean(axis=(1, 2)) / 255 - 0.5) / 0.5
    found = pictures.mean(dim=(2, 3)).numpy()
    assert all(np.abs(means - row).max(axis=1).min() < 0.1 for row in found)
