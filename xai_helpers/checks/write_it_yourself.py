"""Checks of the lab in which every method is written by hand."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LinearRegression

from xai_helpers.checks import Wrong, alike, another, as_array, is_heat_map, is_noise, right, same
from xai_helpers.wrappers import device_of


def input_x_gradient(function: Callable, net: torch.nn.Module, pixel_values: torch.Tensor, index: int) -> None:
    """Task: a function (net, x, index) -> the picture times the gradient of a score, of the picture's shape."""
    x = pixel_values.detach().to(device_of(net))
    gradient = _gradient(net, x, index)
    mistakes = {
        "belongs to another category": x * _gradient(net, x, another(index)),
        "is the gradient alone: multiply it by the picture": gradient,
        "is the gradient of the sum of all scores": x * _gradient(net, x, slice(None)),
        "has lost its sign: take no absolute value": (x * gradient).abs(),
    }
    given = x.clone()
    first, second = _called(function, net, given, index), _called(function, net, given, index)
    same(first, x * gradient, "The attribution", mistakes)
    if not np.allclose(as_array(first, "The attribution"), as_array(second, "The attribution")):
        raise Wrong("A second call gives another answer: gradients add up in the field grad. Use torch.autograd.grad.")
    _left_alone(given, x)
    right(f"The attribution adds up to {as_array(first, 'The attribution').sum():.2f}.")


def integrated_gradients(
    function: Callable, net: torch.nn.Module, pixel_values: torch.Tensor, index: int, n_steps: int = 64
) -> None:
    """Task: a function (net, x, index, baseline, n_steps) -> Integrated Gradients, of the picture's shape.

    The picture is halved, which makes the check four times as fast.
    """
    x = _halved(net, pixel_values)
    baseline = torch.full_like(x, float(x.min()))
    wanted, difference = _integral(net, x, index, baseline), x - baseline
    towards_zero = _integral(net, x, index, torch.zeros_like(x))
    factor = torch.where(difference.abs() > 1e-6, difference, torch.ones_like(difference))
    mistakes = {
        "belongs to another category": _integral(net, x, another(index), baseline),
        "is a sum of gradients, not their mean: divide by the number of steps": wanted * n_steps,
        "is the mean gradient alone: multiply it by the picture minus the baseline": wanted / factor,
        "has the mean gradient multiplied by the picture: multiply by the picture minus the baseline": wanted
        / factor
        * x,
        "starts at zero: the path starts at the baseline that is given": towards_zero,
        "is the gradient at the picture only: take the mean along the path": difference * _gradient(net, x, index),
        "is the gradient at the baseline only: take the mean along the path": difference
        * _gradient(net, baseline, index),
        "has lost its sign: take no absolute value": wanted.abs(),
    }
    given, start = x.clone(), baseline.clone()
    answer = same(
        _called(function, net, given, index, start, n_steps), wanted, "The attribution", mistakes, tolerance=0.08
    )
    _left_alone(given, x)
    _left_alone(start, baseline, "baseline")
    gained = _score(net, x, index) - _score(net, baseline, index)
    if abs(answer.sum() - gained) > 0.05 * np.abs(answer).sum():
        raise Wrong(
            f"The attribution adds up to {answer.sum():.3g}, but from baseline to picture {gained:.3g} is gained."
        )
    right(f"The attribution adds up to {answer.sum():.2f}; from baseline to picture the score changes by {gained:.2f}.")


def smoothed(
    function: Callable,
    attribute: Callable,
    net: torch.nn.Module,
    pixel_values: torch.Tensor,
    index: int,
    n_samples: int = 6,
    stdev: float = 0.2,
) -> None:
    """Task: a function (attribute, x, n_samples, stdev, seed) -> the mean attribution of noisy pictures.

    Args:
        attribute: the answer to the task `integrated_gradients`, which is smoothed at the end.
    """
    x = _halved(net, pixel_values)

    def run(attribution, seed, noise=stdev, samples=n_samples):
        """The answer, and the noisy pictures, (n_samples, channels, height, width)."""
        pictures = []

        def recorded(picture):
            _one_like(picture, x)
            pictures.append(picture.detach().clone())
            return attribution(picture)

        given = x.clone()
        answer = as_array(_called(function, recorded, given, samples, noise, seed), "The attribution", x.shape)
        _left_alone(given, x)
        if len(pictures) != samples:
            raise Wrong(f"n_samples is {samples}, but the attribution function was called {len(pictures)} times.")
        return answer, torch.cat(pictures)

    answer, pictures = run(lambda picture: -(picture**2), seed=0)
    is_noise(pictures - x, stdev)
    squares = -(pictures**2)
    mistakes = {
        "is a sum: take the mean of the attributions": squares.sum(dim=0, keepdim=True),
        "is the attribution of the mean picture: take the mean of the attributions": -(
            pictures.mean(dim=0, keepdim=True) ** 2
        ),
        "is that of the last noisy picture only: take the mean of all": squares[-1:],
        "has another sign: leave the attributions as they are": -squares.mean(dim=0, keepdim=True),
        "is the mean of squared attributions; SmoothGrad takes their plain mean": (squares**2).mean(0, keepdim=True),
    }
    same(answer, squares.mean(dim=0, keepdim=True), "The attribution", mistakes)
    if not torch.equal(pictures, run(lambda picture: picture, seed=0)[1]):
        raise Wrong("Two calls with the same seed give other noise: let the seed decide all of it.")
    if torch.equal(pictures, run(lambda picture: picture, seed=1)[1]):
        raise Wrong("Two seeds give the same noise: use the seed that is given.")

    baseline = torch.zeros_like(x)
    answer, pictures = run(lambda picture: attribute(net, picture, index, baseline, 32), 0, noise=0.1, samples=4)
    wanted = torch.stack([_integral(net, picture[None], index, baseline) for picture in pictures]).mean(dim=0)
    alike(answer, wanted, "The smoothed Integrated Gradients", least=0.95)
    start, clean = _score(net, baseline, index), _score(net, x, index)
    gained = np.mean([_score(net, picture[None], index) for picture in pictures]) - start
    right(
        f"Smoothed Integrated Gradients add up to {answer.sum():.2f}. From grey, the noisy pictures gain {gained:.2f} "
        f"on average, the picture without noise {clean - start:.2f}."
    )


def lime_weights(
    function: Callable, net: torch.nn.Module, pixel_values: torch.Tensor, index: int, segments: Any
) -> None:
    """Task: a function (net, x, index, segments, n_samples, seed) -> a weight for each superpixel, (n_superpixels,)."""
    toy, x, cells, wanted, mean_colours = _toy(index + 1)
    constant = as_array(_called(function, toy, x, 0, cells, 400, 0), "The weights' vector", (4,))
    if np.abs(constant - wanted).max() < 0.1 or np.abs(constant - _regression(1)).max() < 0.1:
        raise Wrong("The weights' vector belongs to another category: use the index that is given.")
    if np.abs(constant).max() > 0.02:
        raise Wrong(
            "A network whose score never changes gets weights that are not zero: the regression needs an intercept, a "
            "column of ones beside the switches."
        )
    mistakes = {
        "is zero everywhere: use the index that is given, and a regression without a penalty": np.zeros(4),
        "compares with superpixels in their mean colour: switch them off by setting them to zero": mean_colours,
    }
    same(_called(function, toy, x, 1, cells, 1000, 0), wanted, "The weights' vector", mistakes, tolerance=0.05)
    _is_local(as_array(_called(function, toy, x, 2, cells, 3000, 0), "The weights' vector", (4,)))

    small, cells = _halved(net, pixel_values), np.asarray(segments)[::2, ::2]
    n = int(cells.max()) + 1
    first, again = (as_array(_called(function, net, small, index, cells, 8 * n, 0), "The weights") for _ in range(2))
    if not np.allclose(first, again, atol=1e-4 * np.abs(first).max()):
        raise Wrong("Two calls with the same seed give other weights: let the seed decide all switches.")
    runs = _lime(net, small, cells, 8 * n)
    mistakes = {"belongs to another category": runs[:, another(index)]}
    alike(first, runs[:, index], "The weights' vector", mistakes, least=0.8)
    right(f"{n} superpixels; the strongest one adds {first.max():.2f} to the score, the weakest {first.min():.2f}.")


def to_heat_map(function: Callable, attribution: torch.Tensor | None = None) -> None:
    """Task: a function: attribution (1, channels, height, width) -> heat map (height, width) in [0, 1]."""
    if attribution is None:
        attribution = torch.randn(1, 3, 6, 9, generator=torch.Generator().manual_seed(3))
    values = as_array(attribution, "The attribution")[0]
    total = values.sum(axis=0)
    heat = as_array(_called(function, attribution), "The map", total.shape)
    mistakes = {
        "shows absolute values: what speaks against the category looks like evidence for it": np.abs(total),
        "adds absolute values up: what speaks against the category looks like evidence": np.abs(values).sum(axis=0),
        "is shifted up until its lowest value is 0: what speaks against looks neutral": total - total.min(),
        "was cut off at zero in each channel: add the channels up first": np.maximum(values, 0).sum(axis=0),
        "shows the strongest channel: add the channels up": np.maximum(values.max(axis=0), 0),
        "shows what speaks against the category": np.maximum(-total, 0),
    }
    wanted = np.maximum(total, 0) / total.max()
    if not np.allclose(heat, wanted, atol=1e-4):
        for sentence, other in mistakes.items():
            if np.allclose(heat, other / other.max(), atol=1e-4):
                raise Wrong(f"The map {sentence}.")
    is_heat_map(heat, "The map", total.shape)
    same(heat, wanted, "The map", tolerance=1e-3)
    for name, empty in (("zero", torch.zeros(1, 3, 4, 5)), ("negative", -torch.ones(1, 3, 4, 5))):
        nothing = as_array(_called(function, empty), f"The map of an attribution that is {name} everywhere", (4, 5))
        if np.abs(nothing).max() > 0:
            raise Wrong(f"The map of an attribution that is {name} everywhere is not zero.")
    single = torch.tensor([[[[1.0, -2.0], [0.5, 0.0]]]])
    same(_called(function, single), [[1, 0], [0.5, 0]], "The map of an attribution with a single channel")
    right(f"The map lies in [0, 1]; {np.mean(wanted == 0):.0%} of it is zero.")


def _called(function, *arguments):
    """The function's answer, with gradients on, as they are in a fresh notebook."""
    with torch.enable_grad():
        return function(*arguments)


def _halved(net, pixel_values):
    return torch.nn.functional.avg_pool2d(pixel_values.detach().to(device_of(net)), 2)


def _score(net, pixel_values, index):
    with torch.no_grad():
        return net(pixel_values)[:, index].item()


def _gradient(net, pictures, index):
    with torch.enable_grad():
        pictures = pictures.detach().clone().requires_grad_()
        return torch.autograd.grad(net(pictures)[:, index].sum(), pictures)[0]


def _integral(net, x, index, baseline, n=32):
    """Integrated Gradients by Gauss and Legendre."""
    places, weights = (torch.from_numpy(values).to(x) / 2 for values in np.polynomial.legendre.leggauss(n))
    total = torch.zeros_like(x)
    for place, weight in zip((places + 0.5).split(16), weights.split(16), strict=True):
        gradients = _gradient(net, baseline + place[:, None, None, None] * (x - baseline), index)
        total += torch.einsum("n,nchw->chw", weight, gradients)
    return (x - baseline) * total


def _left_alone(given, before, name="picture"):
    if given.requires_grad or given.grad is not None or not torch.equal(given, before):
        raise Wrong(f"The {name} that was given has been changed, or made to require gradients: work on a copy of it.")


def _one_like(picture, x):
    """The attribution function is called with one picture like x."""
    if not isinstance(picture, torch.Tensor) or picture.shape != x.shape:
        found = tuple(picture.shape) if isinstance(picture, torch.Tensor) else type(picture).__name__
        raise Wrong(f"The attribution function got {found}: call it with one picture at a time, {tuple(x.shape)}.")
    if picture.dtype != x.dtype:
        raise Wrong(f"The noisy picture is {picture.dtype}: the network wants {x.dtype}, as the picture is.")


#: What the superpixels of `_toy` add to its score 1.
TOY_WEIGHTS = np.array([1.5, -1.0, 0.5, 0.25])


def _toy(n_scores):
    """A network whose weights are known, as its score is made of four superpixels.

    Score 0 is always 2; score 1 adds `TOY_WEIGHTS` for what is switched on; score 2 is `_together`. Others, up to
    `n_scores`, are always 0, for those who ask for a category of their own.

    Returns:
        (network, picture, superpixels, weights for score 1, the same where off means the mean colour)
    """
    draw = np.random.default_rng(0)
    cells = np.arange(48).reshape(6, 8) % 4
    draw.shuffle(cells.ravel())
    x, factors = (torch.from_numpy(draw.uniform(0.5, 1.5, (1, 3, 6, 8))).float() for _ in range(2))
    masks = torch.from_numpy(np.stack([cells == i for i in range(4)])).float()

    def switches(pictures):
        shares = torch.einsum("nchw,chw,khw->nk", pictures, factors[0], masks)
        return shares / torch.einsum("chw,chw,khw->k", x[0], factors[0], masks)

    def network(pictures):
        on = switches(pictures)
        known = torch.stack([2 + 0 * on[:, 0], 2 + on @ torch.from_numpy(TOY_WEIGHTS).float(), _together(on)], dim=1)
        return torch.nn.functional.pad(known, (0, max(0, n_scores - 3)))

    means = torch.einsum("chw,khw->kc", x[0], masks) / masks.sum(dim=(1, 2))[:, None]
    blank = torch.einsum("kc,khw->chw", means, masks)[None]
    return network, x, cells, TOY_WEIGHTS, TOY_WEIGHTS * (1 - switches(blank)[0].numpy())


def _together(on):
    """A score that three superpixels have together only; (n, 4) -> (n,)."""
    return on[:, 0] * on[:, 1] * on[:, 2] + 0.2 * on[:, 3]


def _kernel(on):
    return np.exp(-((1 - np.sqrt(on.mean(axis=1))) ** 2) / 0.25**2)


def _solved(on, scores, weights):
    """Weighted least squares with an intercept, which is left out."""
    return LinearRegression().fit(on, scores, sample_weight=weights).coef_.T


def _regression(power):
    """The weights of `_together` from all of its 16 pictures, each with the kernel to a power."""
    on = np.array(list(itertools.product([0, 1], repeat=4)))
    return _solved(on, _together(on), _kernel(on) ** power)


def _is_local(weights):
    """The weights of `_together` are those of a regression in which near pictures count more."""
    answers = {
        None: _regression(1),
        "are those of a regression in which all pictures count alike: weigh each by its likeness to x": _regression(0),
        "count likeness twice: multiply rows and scores by the root of a picture's weight": _regression(2),
        "count likeness too little: is the weight exp(-d^2 / 0.25^2), without a root or a half": _regression(0.5),
    }
    sentence = min(answers, key=lambda key: np.abs(weights - answers[key]).max())
    if sentence:
        raise Wrong(f"The weights {sentence}.")
    if np.abs(weights - answers[None]).max() > 0.08:
        raise Wrong("The weights of a network in which superpixels work together are not right: look at the kernel.")


def _lime(net, x, cells, n_samples):
    """The weights for all categories, (n_superpixels, n_categories)."""
    on = np.random.default_rng(11).random((n_samples, cells.max() + 1)) < 0.5
    with torch.no_grad():
        parts = torch.from_numpy(on[:, cells]).to(x)[:, None].split(50)
        scores = torch.cat([net(x * visible) for visible in parts]).cpu().numpy()
    return _solved(on.astype(float), scores.astype(float), _kernel(on))
