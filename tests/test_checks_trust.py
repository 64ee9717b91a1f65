"""Each check of the tasks on trust takes right answers and says what is wrong with others."""

import cv2
import numpy as np
import pytest
from scipy.stats import rankdata

from xai_helpers.checks import trust as checks
from xai_helpers.scoring import centre_dots, energy_inside, resize_masks


def small(mask, heat):
    return resize_masks(mask[None], *heat.shape)[0]


def ratio(part, whole):
    return part / whole if whole else 0.0


def in_loops(heat, mask):
    part, inside = small(mask, heat), 0.0
    for row, column in zip(*np.nonzero(part), strict=True):
        inside += heat[row, column]
    return ratio(inside, heat.sum())


def enlarged(heat, mask, mode):
    large = cv2.resize(np.float64(heat), mask.shape[::-1], interpolation=mode)
    return ratio(large[mask].sum(), large.sum())


def nearest(mask, heat):
    return cv2.resize(np.uint8(mask), heat.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0


def areas(mask, heat):
    return cv2.resize(np.float32(mask), heat.shape[::-1], interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda h, m: ratio((h * small(m, h)).sum(), h.sum()), None),
        (lambda h, m: energy_inside(h[None], m[None])[0], None),
        (in_loops, None),
        (lambda h, m: h[small(m, h)].sum(), "is the sum of the map inside"),
        (lambda h, m: h[small(m, h)].mean(), "is the mean of the map inside"),
        (lambda h, m: (h * small(m, h)).mean(), "is divided by the number of pixels"),
        (lambda h, m: h[small(m, h)].sum() / h[~small(m, h)].sum(), "is the ratio of inside to outside"),
        (lambda h, m: ratio(h[~small(m, h)].sum(), h.sum()), "is the share outside of the mask"),
        (lambda h, m: small(m, h).mean(), "is the share of the picture that the mask covers"),
        (lambda h, m: ratio(h[m[: len(h), : h.shape[1]]].sum(), h.sum()), "takes a corner of the mask"),
        (lambda h, m: ratio(h[nearest(m, h)].sum(), h.sum()), "takes one pixel of the mask"),
        (lambda h, m: ratio(h[areas(m, h) > 0].sum(), h.sum()), "takes a pixel as inside where any of it was"),
        (lambda h, m: ratio((h * areas(m, h)).sum(), h.sum()), "weighs the pixels at the border"),
        (lambda h, m: enlarged(h, m, cv2.INTER_NEAREST), "weighs the pixels at the border"),
        (lambda h, m: enlarged(h, m, cv2.INTER_LINEAR), "is that of an enlarged map"),
        (lambda h, m: h[small(m, h)].sum() / h.sum(), "zero everywhere has values that are not finite"),
        (lambda h, m: float(h[small(m, h)].sum()) / float(h.sum()), "zero everywhere has values that are not finite"),
        (lambda h, m: ratio(h[small(m, h)].sum(), h.sum()) if h.any() else 1, "that is zero everywhere is not 0"),
        (lambda h, m: ratio(h * small(m, h), h.sum()), r"has the shape \(4, 6\); \(\) is wanted"),
        (lambda h, m: None, "The share is None"),
        (lambda h, m: 0.123, "is 0.123, which is not right"),
    ],
)
def test_share_inside(function, message, verdict):
    heat, mask = centre_dots(1, 20, 30)[0], np.zeros((40, 60), bool)
    mask[10:30, 20:40] = True
    verdict(lambda: checks.share_inside(function, heat, mask), message)


def test_the_message_has_both_shares(capsys):
    heat, mask = np.zeros((4, 4)), np.zeros((8, 8), bool)
    heat[0, :2], mask[0:2, 0:2] = 1, True
    checks.share_inside(in_loops, heat, mask)
    assert "50% of the map lies inside the object, which covers 6% of the picture" in capsys.readouterr().out


def order(heat):
    return np.argsort(-heat.ravel(), kind="stable")


def rank(heat, values=None):
    found = np.empty(heat.size, int)
    found[order(heat)] = np.arange(heat.size) if values is None else values
    return found.reshape(heat.shape)


def in_a_loop(heat):
    left, found = {index: heat[index] for index in np.ndindex(heat.shape)}, np.zeros(heat.shape)
    for number in range(heat.size):
        highest = max(left, key=left.get)
        found[highest] = number
        del left[highest]
    return found


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (rank, None),
        (lambda h: np.argsort(order(h)).reshape(h.shape), None),
        (lambda h: rankdata(-h, method="ordinal").reshape(h.shape) - 1, None),
        (lambda h: rank(h[::-1, ::-1])[::-1, ::-1], None),  # other ties
        (in_a_loop, None),
        (lambda h: h.size - 1 - rank(h), "gives the lowest value the rank 0"),
        (lambda h: np.argsort(np.argsort(h.ravel())).reshape(h.shape), "gives the lowest value the rank 0"),
        (lambda h: rank(h) + 1, "begins with 1"),
        (lambda h: order(h).reshape(h.shape), "is the order and not the rank: it says which pixel goes first"),
        (lambda h: np.argsort(h.ravel()).reshape(h.shape), "is the order and not the rank, and the lowest value"),
        (lambda h: rank(h).ravel().reshape(h.shape, order="F"), "is filled column by column"),
        (lambda h: np.argsort(-h), "orders each row by itself"),
        (lambda h: np.argsort(np.argsort(-h)), "ranks each row by itself"),
        (lambda h: (rankdata(-h, method="min") - 1).reshape(h.shape), "Pixels of equal value have the same rank"),
        (lambda h: (rankdata(-h, method="dense") - 1).reshape(h.shape), "Pixels of equal value have the same rank"),
        (lambda h: order(h), r"has the shape \(35,\); \(5, 7\) is wanted"),
        (lambda h: rank(h) / h.size, "the right pattern on another scale"),
        (lambda h: rank(h) + 0.1, "are not the whole numbers 0 to 34"),
        (lambda h: rank(h) if len(set(h.ravel())) == h.size else rank(-h), "goes after one of lower value"),
        (lambda h: np.arange(h.size).reshape(h.shape), "is not right: its correlation"),
    ],
)
def test_removal_rank(function, message, verdict):
    heat = np.maximum(centre_dots(1, 6, 8)[0] - 0.5, 0)
    verdict(lambda: checks.removal_rank(function, heat), message)
