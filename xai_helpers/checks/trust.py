"""Checks of the tasks in the chapters on trust."""

from collections.abc import Callable

import cv2
import numpy as np

from xai_helpers.checks import Wrong, as_array, right, same


def share_inside(function: Callable, heat: np.ndarray, mask: np.ndarray) -> None:
    """Task: a function (heat, mask) -> the share of a map inside a mask of any resolution, a number."""
    rng = np.random.default_rng(0)
    drawn, fine = rng.random((4, 6)), rng.random((12, 18)) < 0.5
    covered = fine.reshape(4, 3, 6, 3).mean(axis=(1, 3))  # of each of the map's pixels
    coarse = covered >= 0.5
    total = drawn.sum()
    smooth = cv2.resize(drawn, fine.shape[::-1], interpolation=cv2.INTER_LINEAR)
    mistakes = {
        "is the sum of the map inside: divide it by the sum of the whole map": drawn[coarse].sum(),
        "is the mean of the map inside: divide the sum by the sum of the whole map": drawn[coarse].mean(),
        "is divided by the number of pixels: divide by the sum of the whole map": (drawn * coarse).mean(),
        "is the ratio of inside to outside: divide by the whole map": drawn[coarse].sum() / drawn[~coarse].sum(),
        "is the share outside of the mask": drawn[~coarse].sum() / total,
        "is the share of the picture that the mask covers: the map has no part in it": coarse.mean(),
        "takes a corner of the mask: resize it, so that all of the picture is in it": drawn[fine[:4, :6]].sum() / total,
        "takes one pixel of the mask for each of the map: resize_masks asks whether half of it was inside": (
            drawn[fine[::3, ::3]].sum() / total
        ),
        "takes a pixel as inside where any of it was: half of it has to be": drawn[covered > 0].sum() / total,
        "weighs the pixels at the border by their part inside: bring the mask, not the map, to the other's size": (
            (drawn * covered).sum() / total
        ),
        "is that of an enlarged map: bring the mask to the map's size": smooth[fine].sum() / smooth.sum(),
    }
    same(_number(function, drawn, fine), drawn[coarse].sum() / total, "The share", mistakes)
    same(_number(function, drawn, coarse), drawn[coarse].sum() / total, "The share, with a mask of the map's size")
    if _number(function, np.zeros((4, 6)), coarse) != 0:
        raise Wrong("The share of a map that is zero everywhere is not 0.")
    share, part = _number(function, heat, mask), np.mean(mask)
    right(f"{share:.0%} of the map lies inside the object, which covers {part:.0%} of the picture.")


def _number(function, heat, mask):
    """What a task's function gives for a map and a mask."""
    try:
        with np.errstate(all="ignore"):
            answer = function(heat, mask)
    except ZeroDivisionError:
        answer = np.nan
    what = "The share" if heat.any() else "The share of a map that is zero everywhere"
    return float(as_array(answer, what, ()))


def removal_rank(function: Callable, heat: np.ndarray) -> None:
    """Task: a function of a map -> the rank of each pixel, (height, width), 0 for the highest value."""
    drawn = np.random.default_rng(0).permutation(35).reshape(5, 7) / 35
    values = drawn.ravel()
    wanted = (values > values[:, None]).sum(axis=1).reshape(drawn.shape)  # how many are higher
    falling, last = np.argsort(-values), values.size - 1
    in_rows = np.argsort(-drawn, axis=1)
    mistakes = {
        "gives the lowest value the rank 0: the highest comes first": last - wanted,
        "begins with 1: the first pixel has the rank 0": wanted + 1,
        "is the order and not the rank: it says which pixel goes first, not when a pixel goes": falling,
        "is the order and not the rank, and the lowest value comes first": falling[::-1],
        "is filled column by column": wanted.ravel().reshape(drawn.shape, order="F"),
        "orders each row by itself: flatten the map first": in_rows,
        "ranks each row by itself: flatten the map first": np.argsort(in_rows, axis=1),
    }
    mistakes = {sentence: other.reshape(drawn.shape) for sentence, other in mistakes.items()}
    same(function(drawn), wanted, "The rank", mistakes)
    for tied in (np.where(drawn < 0.6, 0, drawn), np.asarray(heat)):
        ranks = as_array(function(tied), "The rank", tied.shape).ravel()
        if len(np.unique(ranks)) < ranks.size:
            raise Wrong(
                "Pixels of equal value have the same rank: all of a map's zeros would go at once. Give each rank once."
            )
        if not np.array_equal(np.sort(ranks), np.arange(ranks.size)):
            raise Wrong(f"The ranks of a map with {ranks.size} pixels are not the whole numbers 0 to {ranks.size - 1}.")
        if (np.diff(tied.ravel()[np.argsort(ranks)]) > 0).any():
            raise Wrong("A pixel goes after one of lower value, in a map with ties.")
    _, counts = np.unique(heat, return_counts=True)
    right(
        f"{counts[counts > 1].sum()} of the {np.size(heat)} pixels share their value, and each has a rank of its own."
    )
