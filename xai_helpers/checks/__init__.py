"""Checks of the book's tasks, one module a chapter: each says in a sentence what is right or wrong with an answer.

    from xai_helpers.checks import gradients as checks

    checks.saliency(attribution, net, pixel_values, index)

A check computes the right answer in its own way, so that any right way to it is accepted, and the answers of typical
mistakes, so that it can say which one was made. It prints a sentence, or raises `Wrong` with one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr

from xai_helpers.scoring import energy_inside, hits, without_device

NO_SIGN = "has lost its sign: negative values are wanted, too"


class Wrong(AssertionError):
    """An answer is not right; the message says why."""


def right(sentence: str) -> None:
    """Tell the reader that an answer is right."""
    print(f"Right. {sentence}")


def as_array(answer: Any, what: str, shape: Sequence[int] | None = None) -> np.ndarray:
    """An answer as numbers.

    Args:
        answer: a tensor on any device, an array, a number, or a list of them.
        what: what it is called in messages, such as "The attribution".
        shape: the shape that is wanted, as a tuple; None takes any.

    Returns:
        A float64 array.

    Raises:
        Wrong: it has no numbers, another shape, or values that are not finite.
    """
    if answer is None or answer is Ellipsis:
        raise Wrong(f"{what} is {answer}: give it a value, or let the function return one.")
    try:
        values = np.asarray(without_device(answer), np.float64)
    except (TypeError, ValueError) as error:
        raise Wrong(f"{what} has to be a tensor or an array of numbers, not {type(answer).__name__}.") from error
    if shape is not None and values.shape != tuple(shape):
        raise Wrong(f"{what} has the shape {values.shape}; {tuple(shape)} is wanted.")
    if not np.isfinite(values).all():
        raise Wrong(f"{what} has values that are not finite. Is there a division by zero?")
    return values


def same(
    answer: Any, wanted: Any, what: str, mistakes: dict[str, Any] | None = None, tolerance: float = 0.01
) -> np.ndarray:
    """The answer is the wanted one, up to rounding.

    Args:
        answer: as in `as_array`.
        wanted: the right answer, an array or a tensor of any shape.
        what: what the answer is called in messages.
        mistakes: sentence -> the answer that this mistake gives, such as {"belongs to another category": ...}. The
            sentence follows `what`. Transposed answers, other signs and other scales are found without being listed.
        tolerance: of the largest difference, as a share of the wanted answer's largest absolute value.

    Returns:
        The answer as a float64 array.

    Raises:
        Wrong: it is not, with the mistake that gives it.
    """
    wanted = as_array(wanted, "The right answer")
    given = as_array(answer, what, wanted.shape)
    if _close(given, wanted, tolerance):
        return given
    for sentence, other in {**(mistakes or {}), **_typical(wanted)}.items():
        if _close(given, as_array(other, "A wrong answer"), tolerance):
            raise Wrong(f"{what} {sentence}.")
    if wanted.size == 1:
        raise Wrong(f"{what} is {given.item():.4g}, which is not right.")
    likeness = correlation(given, wanted)
    if likeness > 0.999:
        raise Wrong(
            f"{what} has the right pattern on another scale: it goes from {given.min():.3g} to {given.max():.3g}, the "
            f"right one from {wanted.min():.3g} to {wanted.max():.3g}."
        )
    raise Wrong(f"{what} is not right: its correlation with the right one is {likeness:.2f}.")


def alike(
    answer: Any, wanted: Any, what: str, mistakes: dict[str, Any] | None = None, least: float = 0.9
) -> np.ndarray:
    """The answer is like the wanted one, as two runs of a random method are alike: on any scale.

    Args and errors are those of `same`, but an answer and a mistake need not be equal: the answer's correlation with
    the wanted one has to be `least` or more, and higher than with any mistake.

    Returns:
        The answer as a float64 array.
    """
    wanted = as_array(wanted, "The right answer")
    given = as_array(answer, what, wanted.shape)
    found = {
        sentence: as_array(other, "A wrong answer")
        for sentence, other in {**(mistakes or {}), **_typical(wanted)}.items()
        if sentence != NO_SIGN or given.min() >= 0
    }
    sentence = max(found, key=lambda one: correlation(given, found[one]))
    if is_rather(given, found[sentence], wanted, least=0.5):
        raise Wrong(f"{what} {sentence}.")
    likeness = correlation(given, wanted)
    if likeness < least:
        raise Wrong(
            f"{what} is not right: its correlation with one that is right is {likeness:.2f}, and {least:.2f} is wanted."
        )
    return given


def is_heat_map(answer: Any, what: str, shape: Sequence[int]) -> np.ndarray:
    """The answer is a map in [0, 1] whose largest value is 1.

    Returns:
        The answer as a float64 array.

    Raises:
        Wrong: it is not.
    """
    given = as_array(answer, what, shape)
    if given.min() < 0:
        raise Wrong(f"{what} goes down to {given.min():.3g}: a heat map has no negative values.")
    if not np.isclose(given.max(), 1, atol=1e-3):
        raise Wrong(f"{what} has the largest value {given.max():.3g}: divide it by that, so that it becomes 1.")
    return given


def points_at(heat: Any, mask: Any, what: str, least_energy: float = 0.0) -> None:
    """The largest value of a map, (height, width), lies on the object, and enough of its energy does.

    Raises:
        Wrong: it does not.
    """
    heat, mask = np.asarray(without_device(heat))[None], np.asarray(without_device(mask))[None]
    if not hits(heat, mask)[0]:
        raise Wrong(f"{what} has its largest value outside the object.")
    if (inside := energy_inside(heat, mask)[0]) < least_energy:
        raise Wrong(f"{what} has {inside:.0%} of its energy inside the object; {least_energy:.0%} is wanted.")


def correlation(a: Any, b: Any) -> float:
    """Pearson's correlation of two arrays or tensors of one shape; 0 where one is constant, or the shapes differ."""
    a, b = np.ravel(without_device(a)), np.ravel(without_device(b))
    if a.shape != b.shape or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(pearsonr(a, b).statistic)


def another(index: int) -> int:
    """The number of another category, to which an answer may belong by mistake."""
    return index - 1 if index else 1


def is_noise(noise: torch.Tensor, stdev: float) -> None:
    """Noise, a tensor (n_pictures, channels, height, width), is Gaussian with mean 0, and drawn anew for every number.

    Raises:
        Wrong: it is not, or has another standard deviation than stdev.
    """
    noise = noise.detach().cpu()
    if noise.abs().max() == 0:
        raise Wrong("There is no noise in the pictures.")
    if noise.flatten(1).std(dim=1).max() < 1e-6:
        raise Wrong("A noisy picture has one number added everywhere: draw noise of the picture's shape.")
    if any(correlation(one, noise[0]) > 0.5 for one in noise[1:]):
        raise Wrong("Several pictures have the same noise: draw it anew for each.")
    if noise.shape[1] > 1 and correlation(noise[:, 0], noise[:, -1]) > 0.5:
        raise Wrong("The noise is the same in all channels: draw noise of the picture's shape.")
    if noise.mean().abs() > 0.1 * noise.std():
        raise Wrong(f"The noise has a mean of {noise.mean():.3g}: 0 is wanted, as torch.randn draws it.")
    if abs(noise.std() / stdev - 1) > 0.1:
        hint = ": it is not the variance" if np.isclose(noise.std(), stdev**0.5, rtol=0.1) else ""
        raise Wrong(f"The noise has a standard deviation of {noise.std():.3g}; {stdev:.3g} is wanted{hint}.")
    if noise.abs().max() < 2.5 * stdev:
        raise Wrong("The noise never goes beyond 2.5 standard deviations: Gaussian noise is wanted (torch.randn).")


def is_rather(answer: Any, mistake: Any, wanted: Any, least: float = 0.999) -> bool:
    """Whether an answer is that of a mistake, on any scale: like it by `least`, and more than like the wanted one."""
    # Where mistake and right answer are the same numbers, rounding must not decide.
    return correlation(answer, mistake) > max(least, correlation(answer, wanted) + 1e-6)


def _close(given, other, tolerance):
    return given.shape == other.shape and np.abs(given - other).max() <= tolerance * max(np.abs(other).max(), 1e-12)


def _typical(wanted):
    """The wrong answers that anybody can give: sentence -> answer."""
    found = {"has the opposite sign": -wanted}
    if wanted.ndim >= 2 and wanted.shape[-1] == wanted.shape[-2]:
        found["is transposed: rows and columns are exchanged"] = wanted.swapaxes(-1, -2)
    if (wanted < 0).any() and (wanted > 0).any():
        found[NO_SIGN] = np.abs(wanted)
    return found
