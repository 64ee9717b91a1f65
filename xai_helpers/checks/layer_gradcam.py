"""Checks of the lab on Layer Grad-CAM."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from xai_helpers.checks import Wrong, another, as_array, is_heat_map, is_rather, points_at, right, same
from xai_helpers.scoring import energy_inside
from xai_helpers.wrappers import device_of


def _grad_cam(net, layer, pixel_values, index):
    """Grad-CAM's evidence, (rows, columns), and that of HiResCAM, from the gradient of what follows the layer."""
    kept = []
    picture = pixel_values.detach().to(device_of(net)).clone().requires_grad_()
    with torch.enable_grad(), layer.register_forward_hook(lambda module, inputs, output: kept.append(output)):
        (gradient,) = torch.autograd.grad(net(picture)[0, index], kept[0])
    activation = kept[0][0].detach()
    return (
        (gradient[0].mean(dim=(1, 2), keepdim=True) * activation).sum(dim=0),
        (gradient[0] * activation).sum(dim=0),
    )


def evidence(answer: Any, net: torch.nn.Module, layer: torch.nn.Module, pixel_values: torch.Tensor, index: int) -> None:
    """Task: Captum's LayerGradCam at a layer, (1, 1, rows, columns), with its signs."""
    wanted, elementwise = _grad_cam(net, layer, pixel_values, index)
    other = _grad_cam(net, layer, pixel_values, another(index))[0]
    mistakes = {
        "belongs to another category: is the target the category's index": other[None, None],
        "has no negative values: leave relu_attributions as it is": wanted.relu()[None, None],
        "weighs every position by its own gradient; Grad-CAM takes the mean of a channel": elementwise[None, None],
    }
    same(answer, wanted[None, None], "The evidence", mistakes)
    right(f"{wanted.shape[0]} x {wanted.shape[1]} positions, {(wanted < 0).float().mean():.0%} of them negative.")


def by_hand(weights: Any, answer: Any, activations: torch.Tensor, gradients: torch.Tensor) -> None:
    """Task: the weights of the channels, (channels,), and the map that they give, (rows, columns)."""
    wanted = gradients.mean(dim=(1, 2))
    same(
        weights,
        wanted,
        "The weights' vector",
        {
            "is the sum of the gradients, not their mean": gradients.sum(dim=(1, 2)),
            "is the mean of the activations: take the gradients": activations.mean(dim=(1, 2)),
        },
    )
    same(
        answer,
        torch.einsum("c,chw->hw", wanted, activations),
        "The map",
        {
            "weighs the gradients: weigh the activations": torch.einsum("c,chw->hw", wanted, gradients),
            "multiplies every activation by its own gradient; use the channels' weights": (activations * gradients).sum(
                dim=0
            ),
            "is the plain sum of the channels: the weights are missing": activations.sum(dim=0),
        },
    )
    right("These are the numbers of Captum's LayerGradCam.")


def heat_map(function: Callable, evidence: torch.Tensor) -> None:
    """Task: a function (evidence, height, width) -> map in [0, 1], (height, width)."""
    height, width = 4 * evidence.shape[2], 5 * evidence.shape[3]
    answer = function(evidence, height, width)

    def enlarged(values, mode):
        return torch.nn.functional.interpolate(values.detach(), (height, width), mode=mode)[0, 0]

    wanted = enlarged(evidence, "bilinear")
    scaled = wanted.relu() / wanted.max()
    given = as_array(answer, "The map", scaled.shape)
    if given.min() >= 0 and is_rather(given, wanted, scaled):
        raise Wrong(
            "The map is shifted up until its lowest value is 0: what speaks against the category looks neutral."
        )
    if is_rather(given, wanted.abs(), scaled):
        raise Wrong("The map shows absolute values: what speaks against the category looks like evidence for it.")
    is_heat_map(answer, "The map", scaled.shape)
    same(
        answer,
        scaled,
        "The map",
        {
            "is made of squares: it was enlarged in the mode 'nearest'": enlarged(evidence, "nearest").relu()
            / evidence.max(),
            "was cut off at zero before it was enlarged: enlarge the evidence first": enlarged(
                evidence.relu(), "bilinear"
            )
            / enlarged(evidence.relu(), "bilinear").max(),
        },
        tolerance=0.005,
    )
    right("The map lies in [0, 1], and only what speaks for the category is in it.")


def on_the_object(answer: Any, mask: np.ndarray) -> None:
    """Part of the task `heat_map`: the map, (height, width), of a category points at the object of that category."""
    heat = is_heat_map(answer, "The map", np.shape(answer))
    points_at(heat, mask, "The map", least_energy=0.5)
    right(f"{energy_inside(heat[None], mask[None])[0]:.0%} of the map lies on the object, and its maximum does.")


def nothing_speaks_for_it(function: Callable) -> None:
    """Part of the task `heat_map`: evidence that is negative everywhere gives a map of zeros."""
    answer = as_array(function(-torch.ones(1, 1, 3, 3), 6, 6), "The map of evidence that is all negative", (6, 6))
    if np.abs(answer).max() > 0:
        raise Wrong("The map of evidence that is all negative is not zero: cut off at zero before you divide.")
    right("Where nothing speaks for the category, the map is zero.")


def for_and_against(
    function: Callable, net: torch.nn.Module, layer: torch.nn.Module, pixel_values: torch.Tensor, index: int
) -> None:
    """Task: a function (picture, index) -> what speaks for and against a category, (2, rows, columns)."""
    pixel_values = pixel_values.to(device_of(net))
    wanted, elementwise = _grad_cam(net, layer, pixel_values, index)
    other = _grad_cam(net, layer, pixel_values, another(index))[0]

    def parts(values):
        return torch.stack([values.relu(), (-values).relu()])

    mistakes = {
        "has the two in the wrong order": parts(wanted).flip(0),
        "has a negative second map: turn its sign round": torch.stack([wanted.relu(), wanted.clamp(max=0)]),
        "has the whole evidence and its opposite: set what is negative to zero": torch.stack([wanted, -wanted]),
        "belongs to another category": parts(other),
        "weighs every position by its own gradient; Grad-CAM takes the mean of a channel": parts(elementwise),
    }
    same(function(pixel_values, index), parts(wanted), "The pair of maps", mistakes)
    share = float(wanted.relu().sum() / wanted.abs().sum())
    right(f"{share:.0%} of the evidence speaks for the category, the rest against it.")
