"""Checks of the tasks in the recipes, ResNet and ViT."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from xai_helpers.checks import Wrong, as_array, right, same
from xai_helpers.wrappers import category_index


def rather_than(function: Callable, model: Any, a: str, b: str) -> None:
    """Task: a function (a, b), names of categories -> a target, the score of a minus the score of b."""
    target = function(a, b)
    if not callable(target):
        raise Wrong(f"rather_than returns {type(target).__name__}: return a function, which is given scores later.")
    i, j = category_index(model, a), category_index(model, b)
    n = len(model.config.id2label)
    wanted = torch.eye(n)[i] - torch.eye(n)[j]
    wrong = {
        "explains the first category alone: subtract the score of the second": lambda s: s[i],
        "adds the two scores: subtract the second": lambda s: s[i] + s[j],
        "is that of probabilities, in which all categories have a say: take the scores": lambda s: (
            s.softmax(dim=0)[i] - s.softmax(dim=0)[j]
        ),
        "is that of one probability: take the score of a minus the score of b": lambda s: s.softmax(dim=0)[i],
        "is that of one log-probability, whose rivals are all the others: b is the only rival": lambda s: s.log_softmax(
            dim=0
        )[i],
        "subtracts the mean of all scores: b is the only rival": lambda s: s[i] - s.mean(),
    }
    for ahead, behind, turned in (
        (i, j, "has the opposite sign: a counts for, b counts against"),
        (j, i, "turns round where b has the higher score: leave out the absolute value"),
    ):
        scores = torch.randn(n, generator=torch.Generator().manual_seed(0)) / 4
        scores[ahead], scores[behind] = 2, -2
        mistakes = {sentence: _gradient(other, scores) for sentence, other in wrong.items()}
        same(_gradient(target, scores), wanted, "The target's gradient", {turned: -wanted, **mistakes})
    right(f"The target's gradient is +1 for {a}, -1 for {b}, and 0 for every other category.")


def _gradient(target, scores):
    """The gradient of a target with respect to the scores of one image, (n_categories,)."""
    scores = scores.clone().requires_grad_()
    try:
        with torch.enable_grad():
            value = target(scores)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        shape = tuple(scores.shape)
        raise Wrong(f"The target fails on the scores of one image, a tensor of the shape {shape}: {error}") from error
    as_array(value, "The target's value", ())
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        raise Wrong("The target's value has no gradient: make it of the scores, without item() or detach().")
    return torch.autograd.grad(value, scores)[0]


def lay_out(function: Callable) -> None:
    """Task: a function (tokens, rows, columns) -> map, (batch, channels, rows, columns), for one prefix token."""
    batch, channels, rows, columns = 2, 5, 3, 4
    tokens = torch.randn(batch, 1 + rows * columns, channels, generator=torch.Generator().manual_seed(0))
    answer = _call(function, tokens, rows, columns)
    if not isinstance(answer, torch.Tensor):
        raise Wrong(f"The map is {type(answer).__name__}: grad-cam wants a tensor.")
    for shape, sentence in {
        (batch, rows, columns, channels): "has its channels last: move them to the second axis",
        (batch, channels, columns, rows): "has the axes of rows and columns exchanged",
        (batch, channels, rows * columns): "is still a list of patches: it needs an axis of rows and one of columns",
    }.items():
        if tuple(answer.shape) == shape:
            raise Wrong(f"The map {sentence}; the shape {(batch, channels, rows, columns)} is wanted.")
    wanted = torch.empty(batch, channels, rows, columns)
    for place in range(rows * columns):
        wanted[:, :, place // columns, place % columns] = tokens[:, 1 + place]
    patches = tokens[:, 1:]
    mistakes = {
        "mixes channels with places: a reshape alone does not move an axis": patches.reshape(wanted.shape),
        "is filled column by column: the patches come row by row": (
            patches.mT.reshape(batch, channels, columns, rows).mT
        ),
        "begins with the CLS token and has lost the last patch": tokens[:, :-1].mT.reshape(wanted.shape),
    }
    same(answer, wanted, "The map", mistakes)
    right(f"{tuple(tokens.shape)} becomes {tuple(wanted.shape)}, and each patch is where it was cut out.")


def cls_looks_at(function: Callable, attention: torch.Tensor, rows: int, columns: int) -> None:
    """Task: a function (attention, rows, columns) -> what CLS attends to, the mean over heads, (rows, columns)."""
    drawn = torch.randn(1, 4, 13, 13, generator=torch.Generator().manual_seed(0)).mul(2).softmax(dim=-1)
    for weights, *grid in ((drawn, 3, 4), (attention, rows, columns)):
        heads = weights[0].detach().cpu()
        mean = heads.mean(dim=0)
        wanted = torch.from_numpy(np.mean([head[0, 1:].numpy() for head in heads], axis=0))
        mistakes = {
            "is column 0, what each patch takes from CLS: row 0 is wanted": mean[1:, 0],
            "begins with the CLS token and has lost the last patch: leave out token 0": mean[0, :-1],
            "is that of the first head: take the mean over all heads": heads[0, 0, 1:],
            "is that of the last head: take the mean over all heads": heads[-1, 0, 1:],
            "is the sum over the heads: take their mean": heads[:, 0, 1:].sum(dim=0),
            "is the maximum over the heads: take their mean": heads[:, 0, 1:].amax(dim=0),
            "is the mean over all rows, what all tokens look at: row 0 is wanted": mean[:, 1:].mean(dim=0),
            "is the row of the last patch: row 0 is wanted": mean[-1, 1:],
            "is divided by its sum: rescale nothing": wanted / wanted.sum(),
            "is divided by its largest value: rescale nothing": wanted / wanted.max(),
        }
        mistakes = {sentence: other.reshape(grid) for sentence, other in mistakes.items()}
        mistakes["is filled column by column: the patches come row by row"] = wanted.reshape(grid[::-1]).T
        same(_call(function, weights, *grid), wanted.reshape(grid), "The map", mistakes)
    right(f"CLS takes {wanted.sum():.1%} of what it reads from the patches, and the rest from itself.")


def _call(function, values, rows, columns):
    """What a task's function gives for values and a grid."""
    try:
        return function(values, rows, columns)
    except NotImplementedError:
        raise
    except (IndexError, RuntimeError, ValueError) as error:
        raise Wrong(
            f"The function fails on the shape {tuple(values.shape)} and a grid of {rows} x {columns}: {error}. Is CLS "
            "left out, and is every size read from the arguments?"
        ) from error
