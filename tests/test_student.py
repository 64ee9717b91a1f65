"""The student edition: what the command writes, the source with holes, and a notebook that stops at its first task."""

import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from IPython.core.interactiveshell import InteractiveShell

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS, STUDENT = ROOT / "notebooks", ROOT / "notebooks" / "student"
COPIES = sorted(path for path in STUDENT.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
STUB = 'raise NotImplementedError("Replace this line by your answer.")'

LABS = [path for path in COPIES if path.parent.name == "labs"]

each_copy = pytest.mark.parametrize("path", COPIES, ids=lambda path: path.relative_to(STUDENT).as_posix())
each_lab = pytest.mark.parametrize("path", LABS, ids=lambda path: path.name)


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def text(cell):
    return "".join(cell["source"])


def of_source(path):
    return NOTEBOOKS / path.relative_to(STUDENT)


def run(*arguments):
    command = [sys.executable, ROOT / "book" / "student.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_committed_copies_are_what_the_command_writes(tmp_path):
    done = run(tmp_path / "edition")
    assert done.returncode == 0, done.stderr
    written = sorted((tmp_path / "edition").rglob("*.ipynb"))
    assert [p.relative_to(tmp_path / "edition") for p in written] == [p.relative_to(STUDENT) for p in COPIES]
    for new, committed in zip(written, COPIES, strict=True):
        assert new.read_bytes() == committed.read_bytes(), f"{committed.name}: run make student"


def test_every_chapter_with_a_task_has_a_copy():
    marked = [path for path in NOTEBOOKS.rglob("*.ipynb") if "BEGIN SOLUTION" in path.read_text(encoding="utf-8")]
    assert sorted(marked) == sorted(map(of_source, COPIES))


def test_there_are_twenty_tasks_and_more():
    assert sum(text(cell).count(STUB) for path in COPIES for cell in cells(path)) >= 20
    parts = {path.relative_to(STUDENT).parts[0] for path in COPIES}
    assert parts == {"labs", "recipes", "clip", "trust"}
    assert len(list((STUDENT / "labs").glob("*.ipynb"))) == 5


@each_copy
def test_a_chapter_with_tasks_links_to_its_copy_in_colab(path):
    prose = "\n".join(text(cell) for cell in cells(of_source(path)) if cell["cell_type"] == "markdown")
    found = re.findall(
        r"\[the edition without them\]\(https://colab\.research\.google\.com/github/\S+/blob/colab/(\S+)\)", prose
    )
    assert found == [path.relative_to(ROOT).as_posix()]


@each_copy
def test_a_copy_is_its_source_with_holes_and_nothing_else(path):
    """Line by line: only the source has marks and what stands between them, only the copy has stubs."""
    for copy, source in zip(cells(path), cells(of_source(path)), strict=True):
        assert {**copy, "source": []} == {**source, "source": []}
        rest, inside = iter(text(copy).splitlines()), None
        for line in text(source).splitlines():
            mark = re.fullmatch(r"(\s*)### (BEGIN|END) (SOLUTION|HIDDEN TESTS)", line)
            if mark and mark[2] == "BEGIN":
                assert inside is None
                inside = mark[3]
                if inside == "SOLUTION":
                    assert next(rest) == mark[1] + STUB
            elif mark:
                assert inside == mark[3]
                inside = None
            elif inside is None:
                assert next(rest, "") == line
        assert inside is None and next(rest, None) is None


@each_copy
def test_each_task_has_a_hint_and_is_followed_by_its_check(path):
    found = cells(path)
    for i, cell in enumerate(found):
        if STUB in text(cell):
            assert re.search(rf"# Hint: .+\n(\s*# .+\n)*\s*{re.escape(STUB)}", text(cell)), text(cell)
            assert "hide-input" in cell["metadata"]["tags"], "the page folds the solution"
            assert "checks." in text(found[i + 1]), text(cell)


@each_lab
def test_labs_can_be_graded(path):
    roles = [cell["metadata"].get("nbgrader") for cell in cells(path)]
    marked = [(text(cell), role) for cell, role in zip(cells(of_source(path)), roles, strict=True) if role]
    assert len({role["grade_id"] for _, role in marked}) == len(marked)
    for code, role in marked:
        assert role["solution"] == ("### BEGIN SOLUTION" in code)
        assert role["grade"] == role["locked"] == ("checks." in code)
        assert role.get("points") == (1 if role["grade"] else None), "a test cell is all or nothing: one mark each"
    assert sum(role["solution"] for _, role in marked) >= 4
    assert any("### BEGIN HIDDEN TESTS" in code for code, _ in marked)


@pytest.mark.slow
@each_lab
def test_a_copy_stops_at_its_first_task(path, monkeypatch):
    """Run as a notebook runs it, up to the check of the first task; nothing after it is reached.

    The other chapters have their tasks at their end, and what stands before them runs as a chapter already.
    """
    monkeypatch.chdir(ROOT)
    plt.switch_backend("agg")
    shell, found = InteractiveShell(), cells(path)
    first = next(i for i, cell in enumerate(found) if STUB in text(cell))
    codes = [text(cell) for cell in found[: first + 2] if cell["cell_type"] == "code"]
    errors = []
    while codes and not errors:
        result = shell.run_cell(codes.pop(0))
        errors = [result.error_in_exec] if result.error_in_exec else []
    plt.close("all")
    assert len(codes) <= 1, "it stops at the task or at its check, and not before"
    assert [type(error) for error in errors] == [NotImplementedError]
    assert str(errors[0]) == "Replace this line by your answer."


def test_a_mark_without_its_other_end_is_an_error(tmp_path):
    sys.path.insert(0, str(ROOT / "book"))
    try:
        from student import with_holes
    finally:
        sys.path.pop(0)

    def notebook(*lines):
        return {"cells": [{"cell_type": "code", "source": [line + "\n" for line in lines]}]}

    good = notebook("a = 1", "    ### BEGIN SOLUTION", "    a = 2", "    ### END SOLUTION", "c = 3")
    assert text(with_holes(good)["cells"][0]) == f"a = 1\n    {STUB}\nc = 3"
    for wrong in (["### BEGIN SOLUTION", "a = 2"], ["a = 2", "### END SOLUTION"], ["### BEGIN HIDDEN TESTS"]):
        with pytest.raises(ValueError, match="a mark without its other end"):
            with_holes(notebook(*wrong))
