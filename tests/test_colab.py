"""The notebooks as Colab opens them: the package at one commit, and nothing else changed."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
NOTEBOOKS = sorted(p for p in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
LINK = r"colab\.research\.google\.com/github/[\w-]+/[\w.-]+/blob/(\w+)/([\w./-]+)"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def colab(folder, commit, root=ROOT):
    return subprocess.run([sys.executable, root / "book/colab.py", folder, commit], capture_output=True, text=True)


@pytest.fixture
def clone(tmp_path):
    """What the command reads, with one notebook, in a folder of its own."""
    for name in ("book/colab.py", "book/fork.py", "pyproject.toml", "notebooks/start/first_explanation.ipynb"):
        copy = tmp_path / "clone" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    return tmp_path / "clone"


@pytest.mark.parametrize("commit", [COMMIT, "v0.2.0"])
def test_copies_install_the_commit_and_are_otherwise_the_notebooks(tmp_path, commit):
    done = colab(tmp_path / "copies", commit)
    assert done.returncode == 0, done.stderr
    written = sorted(p for p in (tmp_path / "copies").rglob("*") if p.is_file())
    assert [p.relative_to(tmp_path / "copies") for p in written] == [p.relative_to(ROOT) for p in NOTEBOOKS]
    for copy, stored in zip(written, NOTEBOOKS, strict=True):
        new, old = (json.loads(p.read_text(encoding="utf-8")) for p in (copy, stored))
        assert new["cells"][1]["source"][-1] == f'    %pip install -q "git+{ADDRESS}@{commit}"'
        new["cells"][1]["source"][-1] = f'    %pip install -q "git+{ADDRESS}"'
        assert new == old, stored


@pytest.mark.parametrize("wrong", ["", "main", COMMIT[:7], COMMIT.upper(), COMMIT + "0", "v2", f"{COMMIT}\n"])
def test_a_commit_that_is_none_is_an_error(clone, tmp_path, wrong):
    done = colab(tmp_path / "copies", wrong, clone)
    assert done.returncode == 1 and "git rev-parse HEAD" in done.stderr
    assert not (tmp_path / "copies").exists()


@pytest.mark.parametrize("times", [0, 2])
def test_a_notebook_without_the_one_install_cell_is_an_error(clone, tmp_path, times):
    stored = clone / "notebooks/start/first_explanation.ipynb"
    other = clone / "notebooks/start/second.ipynb"
    notebook = json.loads(stored.read_text(encoding="utf-8"))
    notebook["cells"][1:2] = times * [notebook["cells"][1]]
    other.write_text(json.dumps(notebook, indent=1), encoding="utf-8")
    done = colab(tmp_path / "copies", COMMIT, clone)
    assert done.returncode == 1 and done.stderr.startswith(f"notebooks/start/second.ipynb: {times} cells")
    assert not (tmp_path / "copies").exists()


def test_a_folder_that_is_in_use_is_an_error(clone, tmp_path):
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies/mine").write_text("kept")
    done = colab(tmp_path / "copies", COMMIT, clone)
    assert done.returncode == 1 and "choose a new folder" in done.stderr
    assert [p.name for p in (tmp_path / "copies").iterdir()] == ["mine"]


def test_links_open_a_notebook_on_the_branch_that_is_published():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    [branch] = re.findall(r"git push --force origin (\S+)", workflow)
    assert yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]["branch"] == branch
    pages = [ROOT / "README.md", *(ROOT / "book").glob("*.md"), *NOTEBOOKS]
    links = [link for page in pages for link in re.findall(LINK, page.read_text(encoding="utf-8"))]
    assert len(links) > 10
    for of_link, path in links:
        assert of_link == branch and (ROOT / path) in NOTEBOOKS, path
