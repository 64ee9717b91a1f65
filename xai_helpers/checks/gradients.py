"""Checks of the lab on gradients."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from captum.attr import DeepLift
from PIL import Image

from xai_helpers.checks import Wrong, alike, another, as_array, correlation, is_heat_map, is_noise, right, same
from xai_helpers.wrappers import check_picture, device_of, frozen

MOST_OFF = 0.02  # of the score's change, for attributions that are called complete


def _gradients(net, pictures, index, batch=8):
    """The gradient of each picture's score for a category, of the pictures' shape."""
    found = []
    with frozen(net):
        for some in pictures.detach().split(batch):
            some = some.clone().requires_grad_()
            found.append(torch.autograd.grad(net(some)[:, index].sum(), some)[0])
    return torch.cat(found)


def _change(net, pixel_values, baseline, index):
    """The score of the picture minus that of the baseline."""
    with frozen(net), torch.no_grad():
        return float(net(pixel_values)[0, index] - net(baseline)[0, index])


def saliency(answer: Any, net: torch.nn.Module, pixel_values: torch.Tensor, index: int) -> None:
    """Task: the largest absolute gradient of the channels, (height, width), divided by the largest of the map."""
    picture = pixel_values.detach().to(device_of(net))
    gradient = _gradients(net, picture, index)[0]

    def unit(heat):
        return heat / heat.max()

    wanted = unit(gradient.abs().amax(dim=0))
    given = as_array(answer, "The map", wanted.shape)
    signed = gradient.amax(dim=0)
    if given.min() < 0 and correlation(given, signed) > 0.999:
        raise Wrong("The map has lost what is negative before the largest was taken: take absolute values first.")
    is_heat_map(answer, "The map", wanted.shape)
    mistakes = {
        "is the sum or the mean over the channels: take the largest of the three": unit(gradient.abs().sum(dim=0)),
        "belongs to another category: is the target the category's index": unit(
            _gradients(net, picture, another(index))[0].abs().amax(dim=0)
        ),
        "shows positive gradients only: take absolute values": unit(signed.clamp(min=0)),
        "is the gradient times the picture: saliency is the gradient alone": unit(
            (gradient * picture[0]).abs().amax(dim=0)
        ),
    }
    same(answer, wanted, "The map", mistakes)
    right(f"Half of the pixels have less than {wanted.median():.0%} of the largest value.")


def input_x_gradient(answer: Any, net: torch.nn.Module, pixel_values: torch.Tensor, index: int) -> None:
    """Task: picture times gradient, summed over the channels, (height, width), with its signs."""
    pixel_values = pixel_values.detach().to(device_of(net))
    picture, gradient = pixel_values[0], _gradients(net, pixel_values, index)[0]
    wanted = (picture * gradient).sum(dim=0)
    mistakes = {
        "is the gradient alone: multiply it by the picture": gradient.sum(dim=0),
        "has lost its sign before the channels were added up": (picture * gradient).abs().sum(dim=0),
        "has lost the sign of the gradient": (picture * gradient.abs()).sum(dim=0),
        "is the largest value of the channels: add them up": (picture * gradient).amax(dim=0),
        "multiplies two sums: multiply first, then add the channels up": picture.sum(dim=0) * gradient.sum(dim=0),
        "belongs to another category": (picture * _gradients(net, pixel_values, another(index))[0]).sum(dim=0),
    }
    same(answer, wanted, "The map", mistakes)
    right(f"It adds up to {wanted.sum():.2f}, and {(wanted < 0).float().mean():.0%} of the pixels are negative.")


def black_like(function: Callable, pixel_values: torch.Tensor, processor: Any) -> None:
    """Task: a function (picture, processor) -> a black picture of the same shape, as the processor would make it."""
    def of(colour):
        made = processor(images=Image.new("RGB", (64, 64), colour), return_tensors="pt")["pixel_values"][0]
        return made[:, made.shape[1] // 2, made.shape[2] // 2].numpy(force=True).reshape(1, -1, 1, 1)

    black, white = of("black"), of("white")
    whole = np.zeros(pixel_values.shape)
    darkest = float(pixel_values.detach().min())
    mistakes = {
        "is zero everywhere, which is the mean colour: black is 0 before the normalisation": whole,
        "is not divided by the standard deviation": whole + black / (white - black),
        "is white, or has the opposite sign: black is 0 before the normalisation, and the mean is taken off": whole
        + white,
        "has the opposite sign: the mean is taken off": whole - black,
        "is the darkest value of this picture, which need not be black": whole + darkest,
        "is -1 everywhere, which is black for a mean and a standard deviation of 0.5 only": whole - 1,
    }
    same(function(pixel_values, processor), whole + black, "The picture", mistakes, tolerance=1e-3)
    right("Black is " + ", ".join(f"{value:.2f}" for value in black.ravel()) + " in the channels.")


def _integral(net, pixel_values, baseline, index, steps=24):
    """The mean gradient on the way from the baseline to the picture, by the middles of equal steps."""
    shares = (torch.arange(steps, device=baseline.device) + 0.5) / steps
    path = baseline + shares[:, None, None, None] * (pixel_values - baseline)
    return _gradients(net, path, index).mean(dim=0, keepdim=True)


def integrated(
    answer: Any, net: torch.nn.Module, pixel_values: torch.Tensor, baseline: torch.Tensor, index: int
) -> None:
    """Task: integrated gradients against a baseline, of the picture's shape; they add up to the score's change."""
    picture, baseline = (one.detach().to(device_of(net)) for one in (pixel_values, baseline))
    what = "The attribution"
    mean_gradient = _integral(net, picture, baseline, index)
    wanted = (picture - baseline) * mean_gradient
    given = as_array(answer, what, wanted.shape)
    if correlation(given, wanted) < 0.97:  # the mistakes take time: only then
        zeros, other = torch.zeros_like(picture), another(index)
        mistakes = {
            "is the mean gradient alone: it lacks the factor picture minus baseline": mean_gradient,
            "belongs to the mean colour, zeros: give the black picture as the baseline": (
                picture * _integral(net, picture, zeros, index, steps=12)
            ),
            "belongs to another category": (picture - baseline) * _integral(net, picture, baseline, other, steps=12),
            "is input x gradient: the gradient of the picture alone": picture * _gradients(net, picture, index),
            "takes the gradient of the picture alone: it changes on the way from the baseline": (
                (picture - baseline) * _gradients(net, picture, index)
            ),
        }
        alike(answer, wanted, what, mistakes)
    total, change = float(given.sum()), _change(net, picture, baseline, index)
    if abs(total - change) > MOST_OFF * abs(change):
        if np.isclose(np.abs(given).max(), 1) or not 0.3 < total / change < 3:
            raise Wrong(
                f"{what} was scaled: leave its values as they are. "
                f"It adds up to {total:.4g}, and the score changes by {change:.4g}."
            )
        raise Wrong(
            f"{what} adds up to {total:.4g}, and the score changes by {change:.4g}: "
            f"it is off by {abs(total / change - 1):.0%}, and {MOST_OFF:.0%} is allowed. Take more steps."
        )
    right(f"The attributions add up to {total:.2f}, and the score changes by {change:.2f} from baseline to picture.")


class _Recorder(torch.nn.Module):
    """A network that remembers the pictures that went through it."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.seen = []

    def forward(self, pictures):
        self.seen.append(pictures.detach().clone())
        return self.net(pictures)


def smoothgrad(
    function: Callable, net: torch.nn.Module, pixel_values: torch.Tensor, index: int, n: int, sigma: float
) -> None:
    """Task: a function (net, picture, index, n, sigma) -> the mean gradient of n noisy copies, of the picture's shape.

    The noise is random, so the check looks at the copies that went through the network: at their noise, and whether
    the answer is the mean of their gradients.
    """
    check_picture(pixel_values)
    pixel_values = pixel_values.detach().to(device_of(net))
    recorder = _Recorder(net).eval()
    answer = as_array(function(recorder, pixel_values, index, n, sigma), "The attribution", pixel_values.shape)
    seen = torch.cat(recorder.seen) if recorder.seen else pixel_values[:0]
    noise = seen - pixel_values
    noisy = noise.abs().amax(dim=(1, 2, 3)) > 0
    seen, noise = seen[noisy], noise[noisy]
    if not len(noise):
        raise Wrong("No noisy copy of the picture went through the network that the function is given.")
    if len(noise) != n:
        raise Wrong(f"{len(noise)} noisy copies went through the network; {n} are wanted.")
    is_noise(noise, sigma)
    gradients = _gradients(net, seen, index)
    mean = gradients.mean(dim=0, keepdim=True)
    mistakes = {
        "is the mean of absolute gradients: keep the signs (Saliency has abs=False)": gradients.abs().mean(
            dim=0, keepdim=True
        ),
        "is the absolute value of the mean: keep the signs": mean.abs(),
        "is the sum of the gradients: divide by their number": gradients.sum(dim=0, keepdim=True),
        "is the mean of squared gradients: take the gradients as they are": gradients.square().mean(
            dim=0, keepdim=True
        ),
        "is the gradient of the last copy alone: take the mean over all": gradients[-1:],
        "is the gradient of the picture without noise": _gradients(net, pixel_values, index),
        "belongs to another category": _gradients(net, seen, another(index)).mean(dim=0, keepdim=True),
    }
    same(answer, mean, "The attribution", mistakes)
    alone = np.mean([correlation(one, mean[0]) for one in gradients.numpy(force=True)])
    right(f"{n} copies; the gradient of a single one has a correlation of {alone:.2f} with their mean.")


@contextlib.contextmanager
def _count_calls(network):
    """How often each module without parts is called: name -> number."""
    calls = {}

    def count(name):
        return lambda module, inputs, output: calls.update({name: calls.get(name, 0) + 1})

    leaves = [
        (name or "the network", module) for name, module in network.named_modules() if not list(module.children())
    ]
    with contextlib.ExitStack() as stack:
        for name, module in leaves:
            stack.enter_context(module.register_forward_hook(count(name)))
        yield calls


def cured(
    answer: Any, network: torch.nn.Module, pixel_values: torch.Tensor, baseline: torch.Tensor, index: int = 0
) -> None:
    """Task: a network with the scores of another, whose non-linear modules are used once each, for DeepLift."""
    if not isinstance(answer, torch.nn.Module):
        raise Wrong(f"A network is wanted, a torch.nn.Module, not {type(answer).__name__}.")
    if answer is network:
        raise Wrong("This is the network that fails: make another one with its layers.")
    picture, baseline = (one.detach().to(device_of(network)) for one in (pixel_values, baseline))
    pictures = torch.cat([picture, baseline, torch.randn_like(baseline)])
    with torch.no_grad(), _count_calls(answer) as calls:
        scores = answer(pictures)
    with torch.no_grad():
        wanted = network(pictures)
    if scores.shape != wanted.shape or not torch.allclose(scores, wanted, rtol=1e-3, atol=1e-5):
        raise Wrong(
            "The network gives other scores than the one that it was made of: "
            "take over its layers with their weights, and put a ReLU after each convolution."
        )
    several = [name for name, count in calls.items() if count > 1]
    if several:
        raise Wrong(f"The module {several[0]!r} is used {calls[several[0]]} times: each place needs a ReLU of its own.")
    off = _off_with_deeplift(answer, picture, baseline, index)
    if off > MOST_OFF / 10:
        raise Wrong(
            f"DeepLift runs, but its sum is off by {off:.0%} of the score's change: is a ReLU a function, such as "
            "torch.relu? DeepLift sees modules only."
        )
    right(f"The same scores, each module used once, and DeepLift's sum is off by {off:.2%} of the score's change.")


def _off_with_deeplift(network, picture, baseline, index):
    """By how much the sum of DeepLift's attributions misses the score's change, as a share of it."""
    change = _change(network, picture, baseline, index)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting forward, backward hooks")
        found = DeepLift(network).attribute(picture.clone().requires_grad_(), baseline, target=index)
    return abs(float(found.detach().sum()) / change - 1)
