"""The whole round of a course with nbgrader: hand out, hand in, grade."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def course():
    spec = importlib.util.spec_from_file_location("course", ROOT / "book" / "course.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources(path):
    return ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]


@pytest.mark.slow
def test_three_hand_ins_get_the_marks_that_they_should(course, tmp_path):
    """The lab's tasks: evidence (1), by_hand (1), heat_map (1 and 1 hidden), for_and_against (1 and 1 hidden)."""
    assert course.try_out(tmp_path / "course", "layer_gradcam") == {
        "right": (6, 6),
        "half": (2, 6),  # the first two of four tasks
        "untouched": (0, 6),
    }
    released = sources(tmp_path / "course" / "release" / "layer_gradcam" / "layer_gradcam.ipynb")
    student = sources(ROOT / "notebooks" / "student" / "labs" / "layer_gradcam.ipynb")
    assert [cell.rstrip("\n") for cell in released] == student


@pytest.mark.slow
def test_all_labs_can_be_handed_out(course, tmp_path):
    course.new_course(tmp_path)
    for lab in course.LABS:
        released = "\n".join(sources(tmp_path / "release" / lab / f"{lab}.ipynb"))
        assert "NotImplementedError" in released
        assert not re.search("(BEGIN|END) (SOLUTION|HIDDEN)", released)
    assert sorted(course.LABS) == sorted(path.stem for path in (ROOT / "notebooks" / "labs").glob("*.ipynb"))


def test_the_page_for_lecturers_has_the_marks(course):
    page = (ROOT / "book" / "lecturers.md").read_text(encoding="utf-8")
    for lab in course.LABS:
        notebook = json.loads((ROOT / "notebooks" / "labs" / f"{lab}.ipynb").read_text(encoding="utf-8"))
        points = sum(course.role(cell).get("points", 0) for cell in notebook["cells"])
        (row,) = [line.split("|") for line in page.splitlines() if line.startswith(f"| {{doc}}`/notebooks/labs/{lab}`")]
        assert int(row[3]) == points, lab
    for path in (ROOT / "notebooks" / "student").rglob("*.ipynb"):
        assert f"/blob/colab/{path.relative_to(ROOT).as_posix()})" in page, path


def test_a_course_does_not_overwrite_anything(course, tmp_path):
    (tmp_path / "marks.txt").write_text("all of last year's")
    with pytest.raises(FileExistsError, match="is not empty: give the course a folder of its own"):
        course.new_course(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["marks.txt"]


@pytest.mark.parametrize(
    "arguments", [[], ["new"], ["grade", "folder"], ["try", "folder", "lime", "gradients"], ["new", "folder", "resnet"]]
)
def test_wrong_commands_say_what_there_is(course, arguments):
    with pytest.raises(SystemExit, match="LABs: gradients, perturbation"):
        course.main(*arguments)


def test_nbgrader_s_own_words_reach_the_reader(course, tmp_path):
    with pytest.raises(RuntimeError, match="nbgrader generate_assignment nothing failed"):
        course.nbgrader(tmp_path, "generate_assignment", "nothing")
