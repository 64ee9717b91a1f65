"""Checks of the lab on LIME and KernelSHAP."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from captum._utils.models.linear_model import SkLearnLinearRegression
from sklearn.linear_model import LinearRegression

from xai_helpers.checks import Wrong, alike, as_array, right, same
from xai_helpers.wrappers import device_of


def cut_up(function: Callable, pixel_values: torch.Tensor, n: int) -> None:
    """Task: a function (picture, n) -> superpixels, a LongTensor (1, height, width) with ids from 0."""
    found, size = function(pixel_values, n), tuple(pixel_values.shape[2:])
    if not isinstance(found, torch.Tensor):
        raise Wrong(f"The superpixels have to be a tensor, not {type(found).__name__}: torch.from_numpy makes one.")
    if found.dtype != torch.long:
        raise Wrong(f"The superpixels are of the type {found.dtype}: make them torch.long, to be used as indices.")
    ids = as_array(found, "The tensor of superpixels", (1, *size))[0].astype(int)
    used = np.unique(ids)
    if used[0] != 0:
        raise Wrong(f"The ids start at {used[0]}: let them start at 0, or Captum shifts them.")
    if len(used) != used[-1] + 1:
        raise Wrong(f"There are {len(used)} superpixels, but ids up to {used[-1]}: close the gaps.")
    if not n / 2 <= len(used) <= 2 * n:
        raise Wrong(f"There are {len(used)} superpixels; about {n} are wanted.")
    colours = pixel_values[0].permute(1, 2, 0).cpu().double().numpy().reshape(-1, 3)
    if size[0] == size[1] and _left_over(colours, ids) > _left_over(colours, ids.T):
        raise Wrong("The superpixels follow the transposed picture: rows and columns are exchanged.")
    y, x = np.indices(size)
    side = int(np.sqrt(len(used)))  # a grid of no more cells than there are superpixels
    grid = (y * side // size[0]) * side + x * side // size[1]
    if _left_over(colours, ids) > 0.99 * _left_over(colours, grid):
        raise Wrong("The superpixels don't follow the colours of the picture better than a plain grid does.")
    right(f"{len(used)} superpixels of {np.bincount(ids.ravel()).mean():.0f} pixels on average.")


def _left_over(colours, ids):
    """How much the colours of pixels, (n_pixels, 3), differ from the mean of their superpixel."""
    ids = ids.ravel()
    counts = np.bincount(ids)
    means = np.stack([np.bincount(ids, weights=channel) / np.maximum(counts, 1) for channel in colours.T], axis=1)
    return ((colours - means[ids]) ** 2).sum()


def share_on_object(function: Callable, segments: torch.Tensor, mask: np.ndarray) -> None:
    """Task: a function (segments, mask) -> share of each superpixel on the object, (n,)."""
    parts = [segments[0].cpu().numpy() == i for i in range(int(segments.max()) + 1)]
    counts = np.array([mask[part].sum() for part in parts], float)
    wanted = np.array([mask[part].mean() for part in parts])
    mistakes = {
        "is the number of pixels on the object: divide it by the superpixel's own number": counts,
        "says which share of the object lies in each superpixel: divide by the superpixel's own pixels": counts
        / mask.sum(),
        "is a share of the whole picture: divide by the superpixel's own pixels": counts / mask.size,
        "is the share beside the object": 1 - wanted,
        "says only whether most of a superpixel is on the object: give the share": wanted >= 0.5,
        "says only whether a superpixel touches the object: give the share": wanted > 0,
    }
    same(function(segments, mask), wanted, "The answer of the superpixels", mistakes)
    right(f"{(wanted >= 0.5).sum()} of {len(wanted)} superpixels lie at least half on the object.")


def kernel_weight(function: Callable, samples: torch.Tensor) -> None:
    """Task: a function (samples, width) -> similarities exp(-d^2 / width^2), d the share that is off: (n_samples,)."""
    bits = samples.cpu().double().numpy()
    off = (bits == 0).mean(axis=1)
    for width in (0.3, 0.8):
        mistakes = {
            "takes the share that is on for the distance": np.exp(-((1 - off) ** 2) / width**2),
            "has 2 w^2 in the exponent; here it is w^2": np.exp(-(off**2) / (2 * width**2)),
            "does not square the distance": np.exp(-off / width**2),
            "does not square the kernel width": np.exp(-(off**2) / width),
            "squares neither the distance nor the width": np.exp(-off / width),
            "rises with the distance: the exponent is negative": np.exp(off**2 / width**2),
            "takes the number of superpixels that are off: take their share": np.exp(
                -((off * bits.shape[1]) ** 2) / width**2
            ),
            "ignores the kernel width": np.exp(-(off**2)),
        }
        same(function(samples, width), np.exp(-((off / width) ** 2)), "The similarity", mistakes)
    right("The picture itself would have the weight 1, and the weight falls with each superpixel that is off.")


def weighted_fit(function: Callable, samples: torch.Tensor, scores: torch.Tensor, similarities: torch.Tensor) -> None:
    """Task: a function (samples, scores, similarities) -> weights of least squares, (n, k), without the intercept."""
    bits, targets, trust = (one.cpu().double().numpy() for one in (samples, scores, similarities))
    wanted = _least_squares(bits, targets, trust)
    without = np.linalg.pinv(np.sqrt(trust)[:, None] * bits) @ (np.sqrt(trust)[:, None] * targets)
    mistakes = {
        "ignores the similarities": _least_squares(bits, targets, np.ones_like(trust)),
        "counts the similarities twice: scale the rows by their square root": _least_squares(bits, targets, trust**2),
        "has no intercept in its model: add a column of ones": without,
    }
    answer = function(samples, scores, similarities)
    n, k = wanted.shape
    if np.shape(answer) == (n + 1, k):
        raise Wrong(f"The fit has {n + 1} rows for {n} superpixels: leave the intercept out.")
    same(answer, wanted, "The fit", mistakes, tolerance=0.001)
    right(f"{n} weights for each of the scores' {k} column{'s' if k > 1 else ''}.")


def _least_squares(samples, scores, similarities):
    """Weighted least squares with an intercept: (n, k)."""
    return LinearRegression().fit(samples, scores, sample_weight=similarities).coef_.T


def captum_weights(
    function: Callable, net: torch.nn.Module, pixel_values: torch.Tensor, indices: Sequence[int], segments: torch.Tensor
) -> None:
    """Task: a function (scorer, picture, index, segments, regression, n_samples) -> LIME's weights, (n,).

    Args:
        function: the answer.
        net: what it explains.
        pixel_values: a picture.
        indices: of the category that is explained, and of another object in the picture.
        segments: its superpixels.
    """
    index, other = indices
    n, n_samples = int(segments.max()) + 1, 150
    pixel_values = pixel_values.to(device_of(net))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        answer = function(net, pixel_values, index, segments, SkLearnLinearRegression(), n_samples)
    if np.shape(answer) == tuple(pixel_values.shape):
        raise Wrong("The weights have the shape of the picture: set return_input_shape to False.")
    given = as_array(answer, "The vector of weights", (n,))
    if (given == 0).mean() > 0.25:
        raise Wrong(
            f"{(given == 0).sum()} of {n} weights are exactly zero, as from Captum's default, a Lasso: give "
            "`regression` to Lime."
        )
    draw = np.random.default_rng(0)
    samples = torch.from_numpy(draw.integers(0, 2, (n_samples, n)))
    states = samples[:, segments.cpu()].to(pixel_values)
    with torch.no_grad():
        scores = torch.cat([net(pixel_values * some) for some in states.split(25)]).cpu().double()[:, [index, other]]
    wanted, of_other = _least_squares(samples.numpy(), scores.numpy(), np.ones(n_samples)).T
    mistakes = {"belongs to another category: is the target `index`": of_other}
    alike(given, wanted, "The vector of weights", mistakes, least=0.7)
    if not 0.4 < np.ptp(given) / np.ptp(wanted) < 2.5:
        raise Wrong(
            f"The vector of weights has the right pattern on another scale: it goes from {given.min():.3g} to "
            f"{given.max():.3g}. Explain the scorer that is given, and leave the weights as they are."
        )
    right(f"{(given > 0).sum()} of {n} superpixels speak for the category.")


def paint(function: Callable, weights: Any, segments: torch.Tensor) -> None:
    """Task: a function (weights, segments) -> heat map, (height, width) in [0, 1]."""
    numbers = as_array(weights, "The weights")
    ids = segments[0].cpu().numpy()

    def painted(values):
        heat = np.zeros(ids.shape)
        for i, value in enumerate(values):
            heat[ids == i] = value
        return heat

    positive = np.maximum(numbers, 0)
    spread = (numbers - numbers.min()) / np.ptp(numbers)
    mistakes = {
        "shows absolute values: what speaks against the category looks like evidence for it": painted(
            np.abs(numbers) / np.abs(numbers).max()
        ),
        "is shifted up until its lowest value is 0: what speaks against the category looks neutral": painted(spread),
        "still has negative values: set them to zero": painted(numbers / numbers.max()),
        "is not divided by its largest value": painted(positive),
        "gives each superpixel its neighbour's weight": painted(np.roll(positive, 1) / positive.max()),
        "gives each superpixel its neighbour's weight, as if ids began at 1": painted(
            np.roll(positive, -1) / positive.max()
        ),
    }
    same(function(weights, segments), painted(positive / positive.max()), "The map", mistakes)
    right(f"{(numbers > 0).mean():.0%} of the superpixels have a colour.")


def nothing_positive(function: Callable, segments: torch.Tensor) -> None:
    """Part of the task `paint`: weights that are all negative give a map of zeros."""
    size = tuple(segments.shape[1:])
    answer = as_array(function(-np.ones(int(segments.max()) + 1), segments), "The map of negative weights", size)
    if np.abs(answer).max() > 0:
        raise Wrong("The map of negative weights is not zero: set what is negative to zero before you divide.")
    right("Where no weight is positive, the map is zero.")
