"""The package as readers install it: the wheel of a clean copy brings weights and masks and runs a chapter anywhere."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIRST_CHAPTER = ROOT / "notebooks" / "start" / "first_explanation.ipynb"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clean_copy(tmp_path_factory):
    """The files that git has, or would have after `git add .`."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = "git -c safe.directory=* ls-files -z --cached --others --exclude-standard"
    listed = subprocess.run(command.split(), cwd=ROOT, check=True, capture_output=True, text=True).stdout
    copy = tmp_path_factory.mktemp("clean_copy")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def installed(clean_copy, tmp_path_factory):
    """A folder with nothing but the package, unpacked from its wheel."""
    folder = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "uv", "build", "--wheel", "--no-build-isolation", "--offline", "--quiet"]
    subprocess.run([*build, "--python", sys.executable, "--out-dir", folder, clean_copy], check=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(command, installed, cwd):
    """Run Python with the installed package in front of the one that is being worked on."""
    environment = os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    environment.pop("XAI_WEIGHTS", None)
    result = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_wheel_holds_the_package_and_all_its_data(installed, clean_copy):
    def files(root):
        return {p.relative_to(root).as_posix() for p in (root / "xai_helpers").rglob("*") if p.is_file()}

    assert files(installed) == files(clean_copy)
    assert {p.name for p in installed.iterdir() if p.suffix != ".dist-info"} == {"xai_helpers"}
    assert sum(name.endswith(".safetensors") for name in files(installed)) >= 2
    assert any(name.startswith("xai_helpers/scenes/masks/") for name in files(installed))


def test_installed_package_runs_from_an_empty_folder(installed, tmp_path):
    code = """
import xai_helpers
from xai_helpers.checkpoints import example_scene, load
scene = example_scene()
model, processor = load("resnet")
print(xai_helpers.__file__, len(scene.categories), model.num_labels > 1)
"""
    path, categories, has_labels = run(["-c", code], installed, tmp_path).split()
    assert Path(path).is_relative_to(installed)
    assert (categories, has_labels) == ("2", "True")


def test_a_chapter_runs_from_an_empty_folder(installed, tmp_path):
    shutil.copy(FIRST_CHAPTER, tmp_path)
    run(["-m", "jupyter", "execute", FIRST_CHAPTER.name], installed, tmp_path)
