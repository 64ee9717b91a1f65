"""Training goes on where it was stopped, writes the hub's folder format, and never sees a mask."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from training import classifier, recorded, report
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


def test_coin_scenes_have_the_shares_that_they_promise():
    targets = np.array([recorded.coin_scene(i, side=64)["targets"] for i in range(20)])
    coins, objects = targets[:, labels().index("coin")], targets.sum(axis=1)
    assert coins.sum() == 8 and (coins * (objects == 1)).sum() == 3 and (objects == 0).sum() == 4
    assert (objects == 2).sum() == 9 and objects.max() == 3


def test_a_second_cycle_follows_on_scenes_with_coins(runs):
    name = next(name for name, recipe in classifier.recipes().items() if recipe.on_coins)
    classifier.train(name, n_scenes=16, epochs=1, batch=16)
    states = {path.name: torch.load(path, weights_only=True) for path in (runs / name).iterdir()}
    assert states["state.pt"]["epoch"] == 1
    assert states["on_coins.pt"]["epoch"] == classifier.recipes()[name].on_coins
    made = {path.name.partition("-")[0] for path in runs.glob("*-pictures.bin")}
    assert made == {"training_scenes", "coin_scenes"}
    assert len(list(runs.glob("taught-*"))) == 2  # the teacher's answers for the one are not those for the other


def test_scores_by_category_worked_out_by_hand():
    # Scores above a logit of 0 are called. Of cats: 2 scenes with one, of which one is called, and 1 alarm in 2 others.
    names = labels()[:3]
    outputs = {0: np.array([[1.0, -1, -1], [-1, -1, -1]]), 1: np.array([[1.0, 2, -1], [-1, 3, 2]])}
    targets = {0: np.zeros((2, 3), bool), 1: np.array([[True, True, False], [True, True, True]])}
    index = pd.MultiIndex.from_tuples([(0, names[0]), (1, names[0]), (0, names[1]), (1, names[2])])
    index.names = ["scene", "category"]
    falls = pd.DataFrame({"left out": [4.0, 2, 5, 0], "blurred": 9.0}, index)
    padded = [{k: np.pad(v, ((0, 0), (0, 5))) for k, v in part.items()} for part in (outputs, targets)]
    padded[1][1][:, 3:] = True  # the other categories are of no interest, but each needs a scene with it
    rest = pd.DataFrame({"left out": 1.0, "blurred": 1.0}, pd.MultiIndex.from_product([[0], labels()[3:]]))
    found = report.by_category(*padded, 0.5, pd.concat([falls, rest.rename_axis(index.names)]))
    assert found.loc[names[0]].tolist() == [0.5, 0.5, 3]
    assert found.loc[names[1]].tolist() == [1, 0, 5]
    assert found.loc[names[2]].tolist() == [1, 0, 0]


def test_a_card_keeps_its_recipe_when_its_scores_are_measured_anew(runs, monkeypatch):
    (runs / "resnet").mkdir()
    (runs / "resnet" / "README.md").write_text(f"# resnet\n\nRecipe: long ago.\n\n{report.SCORES} are old.\n")
    monkeypatch.setattr(report, "BUNDLED", runs)
    monkeypatch.setattr(report, "scores", lambda folder: f"{report.SCORES} of {folder.name} are new.\n")
    monkeypatch.setattr("sys.argv", ["report", "resnet"])
    report.main()
    card = (runs / "resnet" / "README.md").read_text()
    assert card == f"# resnet\n\nRecipe: long ago.\n\n{report.SCORES} of resnet are new.\n"


def test_shifts_and_flips_keep_the_picture(runs):
    scenes = recorded.Scenes(16).make()
    pictures, rows, flip, _ = next(scenes.batches(16, np.random.default_rng(0)))
    assert pictures.shape == (16, 3, 128, 128) and sorted(rows) == list(range(16)) and 0 < flip.sum() < 16
    # A shift by at most 8 pixels and a flip change where things are, hardly which colours there are.
    means = (scenes.pictures.mean(axis=(1, 2)) / 255 - 0.5) / 0.5
    found = pictures.mean(dim=(2, 3)).numpy()
    assert all(np.abs(means - row).max(axis=1).min() < 0.1 for row in found)
