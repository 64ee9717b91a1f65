"""What a page claims, checked each time it runs, and shown as a table."""

import operator
from collections.abc import Callable

import numpy as np
import pandas as pd

COMPARISONS: dict[str, Callable] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}


def check_claims(*claims: tuple[str, float, str, float]) -> pd.DataFrame:
    """Holds numbers against bounds.

    Args:
        claims: each with its words, a number, one of `COMPARISONS`, and the bound. A number that is not finite fails.

    Returns:
        A table with a row a claim: number, bound, and that it holds, all of them as text.

    Raises:
        AssertionError: a claim does not hold; the message has all that do not.
        ValueError: there is no claim, or an unknown comparison.

    Example:
        >>> check_claims(("one and one", 1 + 1, "==", 2), ("a third", 1 / 3, "<", 0.34)).loc["a third"].tolist()
        ['0.333', '< 0.34', 'yes']
    """
    if not claims:
        raise ValueError("a page without a claim has nothing to check")
    rows, failed = {}, []
    for words, number, comparison, bound in claims:
        if comparison not in COMPARISONS:
            raise ValueError(f"{comparison!r} is none of the comparisons {', '.join(COMPARISONS)}")
        rows[words] = {"number": _short(number), "bound": f"{comparison} {_short(bound)}", "holds": "yes"}
        if not (np.isfinite(number) and COMPARISONS[comparison](number, bound)):
            failed.append(f"{words}: {_short(number)}, claimed {comparison} {_short(bound)}")
    if failed:
        raise AssertionError("; ".join(failed))
    return pd.DataFrame.from_dict(rows, orient="index")


def _short(number):
    """Three digits, and no more zeros than they need."""
    return f"{float(number):.3g}"
