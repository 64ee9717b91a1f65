"""Checks of the lab on perturbation."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from xai_helpers.checks import Wrong, another, as_array, is_heat_map, is_rather, right, same
from xai_helpers.wrappers import device_of


def _starts(side, window, stride):
    """Where windows start along a side: the last one is the first that reaches the edge."""
    starts = [0]
    while starts[-1] + window < side:
        starts.append(starts[-1] + stride)
    return starts


def n_windows(function: Callable, settings: Iterable[tuple[int, int, int]]) -> None:
    """Task: a function (side, window, stride) -> number of windows on a square picture.

    `settings` are several (side, window, stride), with a stride of at most the window.
    """
    for side, window, stride in settings:
        n = len(_starts(side, window, stride))
        whole = sum(start + window <= side for start in _starts(side, window, stride))
        what = f"The number of windows of {window} px with a stride of {stride} px on {side} x {side} px"
        mistakes = {
            "counts one side only: the window moves down, too": n,
            "leaves out the windows that stick out of the picture: Captum cuts them off and uses them": whole**2,
            "counts the picture as it is, too: only the windows are wanted": n**2 + 1,
            "counts the moves: there is one window more than moves along a side": (n - 1) ** 2,
            "counts a window for every stride on a side: the first that reaches the edge is the last one": (
                -(-side // stride)
            )
            ** 2,
        }
        same(function(side, window, stride), n**2, what, mistakes, tolerance=1e-6)
    right(f"{window} px on {side} x {side} px with a stride of {stride} px: {n} x {n} windows.")


def _scores(net, pictures, batch=25):
    with torch.no_grad():
        return torch.cat([net(some) for some in pictures.split(batch)]).cpu().double()


def _falls(net, pixel_values, hidden):
    """How far each score falls with zeros where each mask, bool (n, height, width), is true: (n, scores)."""
    hidden = hidden[:, None].to(pixel_values.device)
    return _scores(net, pixel_values) - _scores(net, torch.where(hidden, 0.0, pixel_values))


def _windows(height, width, window, stride):
    hidden = []
    for top in _starts(height, window, stride):
        for left in _starts(width, window, stride):
            one = torch.zeros(height, width, dtype=torch.bool)
            one[top : top + window, left : left + window] = True
            hidden.append(one)
    return torch.stack(hidden)


def occlusion(
    answer: Any, net: torch.nn.Module, pixel_values: torch.Tensor, index: int, window: int, stride: int
) -> None:
    """Task: Captum's Occlusion with zeros, (1, 3, height, width), with its signs."""
    pixel_values = pixel_values.to(device_of(net))

    def maps(stride):
        hidden = _windows(*pixel_values.shape[2:], window, stride)
        falls = _falls(net, pixel_values, hidden)[:, [index, another(index)]]
        added = torch.einsum("nc,nhw->chw", falls, hidden.double())
        return (added / hidden.sum(dim=0))[:, None, None].expand(-1, 1, pixel_values.shape[1], -1, -1), added

    (wanted, other), added = maps(stride)
    given = as_array(answer, "The occlusion", wanted.shape)
    if np.ptp(given, axis=1).max() > 1e-3 * max(np.abs(given).max(), 1e-12):
        raise Wrong(
            "The occlusion differs between the channels: the window has to hide all of them, (3, ...), at once."
        )
    mistakes = {
        "belongs to another category: is the target the category's index": other,
        "was made with a stride as long as the window": maps(window)[0][0],
        "is the sum over the windows that cover a pixel: it has to be their mean": added[0].expand_as(wanted),
        "has no negative values: keep both signs": wanted.clamp(min=0),
    }
    same(given, wanted, "The occlusion", mistakes)
    right(f"Hiding lowers the score at {(wanted > 0).double().mean():.0%} of the pixels.")


def needed(function: Callable, drops: torch.Tensor) -> None:
    """Task: a function of signed maps, (n, 3, height, width), -> heat maps in [0, 1], (n, height, width)."""
    wanted = drops[:, 0].detach().cpu().double().numpy()
    answers = as_array(function(drops), "The maps", wanted.shape)
    for number, (given, signed) in enumerate(zip(answers, wanted, strict=True)):
        what = f"Map {number}" if len(wanted) > 1 else "The map"
        scaled = np.maximum(signed, 0) / signed.max()
        if is_rather(given, np.abs(signed), scaled):
            raise Wrong(f"{what} shows absolute values: what the score is better off without looks as if needed.")
        if is_rather(given, np.maximum(-signed, 0), scaled):
            raise Wrong(f"{what} shows where the score rises: what the score needs is above zero in the signed map.")
        if given.min() >= 0 and is_rather(given, signed, scaled):
            raise Wrong(f"{what} is shifted up until its lowest value is 0: set what is negative to zero instead.")
        if np.allclose(given, scaled * signed.max() / wanted.max(), atol=1e-4) and signed.max() < wanted.max():
            raise Wrong(f"{what} is divided by the largest value of all maps: each is divided by its own.")
        is_heat_map(given, what, scaled.shape)
        same(given, scaled, what)
    right("Each map lies in [0, 1], and only what the score needs is in it.")


def nothing_is_needed(function: Callable) -> None:
    """Part of the task `needed`: where no place lowers the score, the map is zero."""
    answer = as_array(function(-torch.ones(1, 3, 4, 4)), "The map of a score that needs nothing", (1, 4, 4))
    if np.abs(answer).max() > 0:
        raise Wrong(
            "The map of a score that needs nothing is not zero: set what is negative to zero before you divide."
        )
    right("Where the score needs nothing, the map is zero.")


def superpixel_drops(
    function: Callable, net: torch.nn.Module, pixel_values: torch.Tensor, segments: torch.Tensor, index: int
) -> None:
    """Task: a function (picture, segments, index) -> how far the score falls without each superpixel, (n,)."""
    pixel_values = pixel_values.to(device_of(net))
    hidden = torch.stack([segments == i for i in segments.unique()]).to(pixel_values.device)
    without = _scores(net, torch.where(hidden[:, None], 0.0, pixel_values))
    alone = _scores(net, torch.where(hidden[:, None], pixel_values, 0.0))
    falls = _scores(net, pixel_values) - without
    wanted, pixels = falls[:, index], hidden.sum(dim=(1, 2)).cpu()
    what = "The superpixels' list of numbers"
    given = as_array(function(pixel_values, segments, index), what)
    if given.shape == tuple(pixel_values.shape) or given.shape == tuple(segments.shape):
        raise Wrong(f"{what} has a number for each pixel; one for each superpixel is wanted, ({len(wanted)},).")
    mistakes = {
        "belongs to another category": falls[:, another(index)],
        "is the sum over the pixels of a superpixel: all of them have the same number, take it once": wanted * pixels,
        "is the sum over the channels: all of them have the same number, take it once": 3 * wanted,
        "is the sum over channels and pixels: all of them have the same number, take it once": 3 * wanted * pixels,
        "holds the scores that are left: take them from the score of the picture": without[:, index],
        "holds the scores of each superpixel alone: hide one and keep the others": alone[:, index],
        "is not in the order of the ids": wanted.sort(descending=True).values,
        "has no negative values: keep both signs": wanted.clamp(min=0),
    }
    same(given, wanted, what, mistakes)
    right(f"{len(wanted)} superpixels; without the most important one, the score falls by {wanted.max():.1f}.")


def random_mask_map(function: Callable, scores: torch.Tensor, masks: torch.Tensor) -> None:
    """Task: a function (scores (n,), masks (n, height, width)) -> covariance of the two, (height, width)."""
    values, visible = (numbers.detach().cpu().double().numpy() for numbers in (scores, masks))
    mean_score, n = sum(values) / len(values), len(values)
    wanted, raw = np.zeros(visible.shape[1:]), np.zeros(visible.shape[1:])
    for row, column in np.ndindex(wanted.shape):
        seen = visible[:, row, column]
        wanted[row, column] = sum((values - mean_score) * (seen - sum(seen) / n)) / n
        raw[row, column] = sum(values * seen) / n
    spread = visible.std(axis=0) * values.std()
    mistakes = {
        "weighs the masks by the scores as they are: take the mean score from them first": raw,
        "is the sum over the masks: divide by their number": wanted * n,
        "is divided by the number of masks less one: divide by their number": wanted * n / (n - 1),
        "is the correlation: leave out the division by the standard deviations": wanted / np.maximum(spread, 1e-12),
        "is the share of the masks in which a pixel is visible: the scores are missing": visible.mean(axis=0),
        "has no negative values: keep both signs": np.maximum(wanted, 0),
    }
    same(function(scores, masks), wanted, "The map", mistakes)
    right(f"The covariance goes from {wanted.min():.2g} to {wanted.max():.2g}.")
