"""A family is complete only with all the steps of CONTRIBUTING.md; what is missing is named."""

from pathlib import Path

import pytest
import yaml

from training.classifier import recipes
from xai_helpers.checkpoints import BUNDLED, CHECKPOINTS, load, names_of
from xai_helpers.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
FILES = ("README.md", "config.json", "model.safetensors", "preprocessor_config.json")


def missing_steps(name):
    """What a family still lacks, a sentence each."""
    pages = [
        chapter["file"]
        for part in yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]
        for chapter in part["chapters"]
    ]
    folder, page = ROOT / "xai_helpers" / "bundled" / name, f"notebooks/recipes/{name}"
    published = (ROOT / "tests" / "published.py").read_text()
    steps = {
        f"step 1: add {name!r} to CHECKPOINTS in xai_helpers/checkpoints.py": name in CHECKPOINTS,
        f"step 1: add a Recipe {name!r} to recipes() in training/classifier.py": name in recipes(),
        f"step 1: run python -m training.classifier {name}": all((folder / file).is_file() for file in FILES),
        f"step 2: add {name!r} to RECIPES in xai_helpers/recipes.py": name in RECIPES,
        f"step 2: add the published config of {name!r} to tests/published.py": f'"{name}"' in published,
        f"step 3: write {page}.ipynb": (ROOT / f"{page}.ipynb").is_file(),
        f"step 3: add {page} to _toc.yml": page in pages,
    }
    return [step for step, done in steps.items() if not done]


CHAPTERS = (ROOT / "notebooks" / "recipes").glob("*.ipynb")
THERE = {folder.name for folder in BUNDLED.iterdir()} - {*names_of("prompts", "detection", "segmentation")}
ALL = {*names_of("classification"), *recipes(), *RECIPES, *THERE, *(page.stem for page in CHAPTERS)}
ALL -= {*names_of(faulty=True), *names_of("imagenet")}


@pytest.mark.parametrize("name", sorted(ALL))
def test_family_has_all_its_steps(name):
    assert missing_steps(name) == [], "see CONTRIBUTING.md"


def test_each_missing_step_is_named():
    found = missing_steps("poolformer")
    assert [step.split(":")[0] for step in found] == ["step 1"] * 3 + ["step 2"] * 2 + ["step 3"] * 2
    for part in (
        "CHECKPOINTS",
        "training/classifier.py",
        "python -m training.classifier poolformer",
        "RECIPES",
        "tests/published.py",
        "notebooks/recipes/poolformer.ipynb",
        "_toc.yml",
    ):
        assert any(part in step for step in found), part


def test_a_checkpoint_that_was_not_trained_yet_says_how(monkeypatch, tmp_path):
    monkeypatch.setattr("xai_helpers.checkpoints.BUNDLED", tmp_path)
    with pytest.raises(OSError, match=r"python -m training\.classifier resnet"):
        load("resnet", "bundled")
    with pytest.raises(OSError, match=r"python -m training\.clip clip-base"):
        load("clip-base", "bundled")
    with pytest.raises(OSError, match=r"python -m training\.detector yolos; or use the published one"):
        load("yolos", "bundled")
    with pytest.raises(OSError, match=r"python -m training\.classifier resnet-shortcut\.$"):
        load("resnet-shortcut", "bundled")
