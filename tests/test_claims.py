import numpy as np
import pytest

from xai_helpers.claims import check_claims


def test_each_comparison_is_what_it_says():
    table = check_claims(("a", 1, "<", 2), ("b", 2, "<=", 2), ("c", 3, ">", 2), ("d", 2, ">=", 2), ("e", 2, "==", 2))
    assert table["holds"].tolist() == ["yes"] * 5
    assert table["bound"].tolist() == ["< 2", "<= 2", "> 2", ">= 2", "== 2"]
    assert table.index.tolist() == list("abcde")
    for comparison, number in {"<": 2, "<=": 3, ">": 2, ">=": 1, "==": 1}.items():
        with pytest.raises(AssertionError, match=f"mine: {number}, claimed {comparison} 2"):
            check_claims(("mine", number, comparison, 2))


def test_all_that_fail_are_named_and_none_that_holds():
    with pytest.raises(AssertionError) as error:
        check_claims(("first", 0.51234, ">", 0.9), ("second", 1, ">", 0), ("third", np.nan, ">", 0))
    assert str(error.value) == "first: 0.512, claimed > 0.9; third: nan, claimed > 0"


def test_numbers_have_three_digits_and_truth_is_a_number():
    table = check_claims(("small", 1.23456e-5, "<", 1e-4), ("true", np.True_, "==", True), ("large", 123456, ">", 1))
    assert table["number"].tolist() == ["1.23e-05", "1", "1.23e+05"]


def test_what_is_no_claim_is_said():
    with pytest.raises(ValueError, match="nothing to check"):
        check_claims()
    with pytest.raises(ValueError, match="'≥' is none of the comparisons <, <=, >, >=, =="):
        check_claims(("mine", 1, "≥", 1))
