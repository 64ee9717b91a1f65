"""What all checks are made of."""

import importlib
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rehearsal import accelerator

from xai_helpers.checks import Wrong, alike, as_array, correlation, is_heat_map, is_noise, points_at, same

WANTED = np.array([[1.0, -2.0], [3.0, 4.0]])


@pytest.mark.parametrize("answer", [WANTED, WANTED.tolist(), torch.tensor(WANTED, requires_grad=True), WANTED + 0.03])
def test_what_is_the_same(answer):
    np.testing.assert_allclose(same(answer, WANTED, "The map"), WANTED, atol=0.03)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (WANTED.T, "^The map is transposed: rows and columns are exchanged.$"),
        (-WANTED, "^The map has the opposite sign.$"),
        (np.abs(WANTED), "^The map has lost its sign: negative values are wanted, too.$"),
        (WANTED + 10, "^The map is a mistake of its own.$"),
        (WANTED / 4, "the right pattern on another scale: it goes from -0.5 to 1, the right one from -2 to 4"),
        (np.ones((2, 2)), "is not right: its correlation with the right one is 0.00"),
        (WANTED[0], r"^The map has the shape \(2,\); \(2, 2\) is wanted.$"),
        (WANTED * np.nan, "values that are not finite"),
        (None, "^The map is None: give it a value"),
        (..., "^The map is Ellipsis: give it a value"),
        ("a map", "has to be a tensor or an array of numbers, not str"),
    ],
)
def test_what_is_not_the_same(answer, message):
    with pytest.raises(Wrong, match=message):
        same(answer, WANTED, "The map", {"is a mistake of its own": WANTED + 10})


def test_a_number_is_named():
    same(torch.tensor(2.0), 2, "The share")
    with pytest.raises(Wrong, match="^The share is 3, which is not right.$"):
        same(3, 2, "The share")


def test_two_runs_of_a_random_method_are_alike():
    rng = np.random.default_rng(0)
    wanted = rng.normal(size=(8, 9))
    other = rng.normal(size=(8, 9))
    noisy = 5 * wanted + rng.normal(size=(8, 9))  # on another scale; its correlation is 5 / sqrt(26), or .98
    assert alike(noisy, wanted, "The map", {"belongs to another category": other}).shape == (8, 9)
    for message, answer in {
        "belongs to another category": other,
        "has the opposite sign": -noisy,
        "has lost its sign": np.abs(wanted),
        "is not right: its correlation with one that is right is": rng.normal(size=(8, 9)),
    }.items():
        with pytest.raises(Wrong, match=message):
            alike(answer, wanted, "The map", {"belongs to another category": other})


def test_an_answer_with_both_signs_has_not_lost_them():
    wanted = np.array([10.0, 9.0, 8.0, -0.1, 0.2, 0.1])  # nearly its own absolute values
    answer = np.array([10.0, 9.0, 8.0, -0.02, 0.2, 0.1])
    alike(answer, wanted, "The weights")


def test_heat_maps():
    is_heat_map([[0, 0.5], [1, 0.2]], "The map", (2, 2))
    with pytest.raises(Wrong, match="goes down to -0.5: a heat map has no negative values"):
        is_heat_map([[-0.5, 1]], "The map", (1, 2))
    with pytest.raises(Wrong, match="has the largest value 0.5: divide it by that"):
        is_heat_map([[0, 0.5]], "The map", (1, 2))


def test_where_a_map_points():
    heat, mask = np.array([[0.0, 1.0], [0.5, 0.5]]), np.array([[False, True], [False, False]])
    points_at(heat, mask, "The map", least_energy=0.5)
    with pytest.raises(Wrong, match="its largest value outside the object"):
        points_at(heat, ~mask, "The map")
    with pytest.raises(Wrong, match="has 50% of its energy inside the object; 60% is wanted"):
        points_at(heat, mask, "The map", least_energy=0.6)


def test_the_correlation_of_what_is_constant_is_zero():
    assert correlation(np.ones(4), np.arange(4)) == 0 == correlation(np.arange(3), np.arange(4))
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)


def test_any_shape_is_taken_where_none_is_wanted():
    assert as_array(3, "The number").shape == ()


ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path.stem for path in (ROOT / "xai_helpers" / "checks").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_every_check_stands_in_a_chapter_and_is_tested(name):
    module = importlib.import_module(f"xai_helpers.checks.{name}")
    found = {
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    }
    chapters = ""
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        cells = ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        code = "\n".join(cells)
        if "student" not in path.parts and f"from xai_helpers.checks import {name} as checks" in code:
            chapters += code
    tests = (ROOT / "tests" / f"test_checks_{name}.py").read_text(encoding="utf-8")
    assert found
    for check in found:
        assert f"checks.{check}(" in chapters, check
        assert f"checks.{check}(" in tests, check


def test_answers_may_be_on_any_device():
    noise = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with accelerator() as device:
        there = torch.tensor(WANTED, dtype=torch.float32).to(device)
        same(there, WANTED, "The map")
        same(list(there.requires_grad_()), WANTED, "The map")  # a list of tensors with a gradient
        assert correlation(there, -there) == pytest.approx(-1)
        points_at(there.abs(), there > 3, "The map")
        is_noise(noise.to(device), 1)
        with pytest.raises(Wrong, match="is not the variance"):
            is_noise(noise.to(device) * 0.5, 0.25)
