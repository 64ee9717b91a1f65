"""Each check of the recipes' tasks takes right answers and says what is wrong with others."""

import numpy as np
import pytest
import torch

from xai_helpers.checkpoints import load
from xai_helpers.checks import recipes as checks
from xai_helpers.wrappers import CategoryTarget, category_index


@pytest.fixture(scope="module")
def model():
    return load("resnet", weights="bundled")[0]


def one_hot(n, i):
    return torch.eye(n)[i]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda i, j: lambda s: s[i] - s[j], None),
        (lambda i, j: lambda s: s @ (one_hot(len(s), i) - one_hot(len(s), j)), None),
        (lambda i, j: lambda s: s.log_softmax(dim=-1)[i] - s.log_softmax(dim=-1)[j], None),
        (lambda i, j: lambda s: CategoryTarget(i)(s) - CategoryTarget(j)(s), None),
        (lambda i, j: lambda s: s[j] - s[i], "has the opposite sign: a counts for, b counts against"),
        (lambda i, j: lambda s: s[i], "explains the first category alone"),
        (lambda i, j: CategoryTarget(i), "explains the first category alone"),
        (lambda i, j: lambda s: s[i] + s[j], "adds the two scores"),
        (lambda i, j: lambda s: (s[i] - s[j]).abs(), "turns round where b has the higher score"),
        (lambda i, j: lambda s: s.softmax(dim=0)[i] - s.softmax(dim=0)[j], "is that of probabilities"),
        (lambda i, j: lambda s: s.softmax(dim=0)[i], "is that of one probability"),
        (lambda i, j: lambda s: s.log_softmax(dim=0)[i], "is that of one log-probability"),
        (lambda i, j: lambda s: s[i] - s.mean(), "subtracts the mean of all scores"),
        (lambda i, j: lambda s: s[i] * s[j], "gradient is not right"),
        (lambda i, j: lambda s: 2 * (s[i] - s[j]), "the right pattern on another scale"),
        (lambda i, j: lambda s: s[:, i] - s[:, j], r"fails on the scores of one image, a tensor of the shape \(8,\)"),
        (lambda i, j: lambda s: s.logits[i], "fails on the scores of one image"),
        (lambda i, j: lambda s: s[i].item() - s[j].item(), "has no gradient"),
        (lambda i, j: lambda s: s.detach()[i], "has no gradient"),
        (lambda i, j: lambda s: s, r"The target's value has the shape \(8,\); \(\) is wanted"),
        (lambda i, j: lambda s: None, "The target's value is None"),
        (lambda i, j: one_hot(8, i) - one_hot(8, j), "returns Tensor: return a function"),
        (lambda i, j: None, "returns NoneType: return a function"),
    ],
)
def test_rather_than(model, target, message, verdict):
    def function(a, b):
        return target(category_index(model, a), category_index(model, b))

    verdict(lambda: checks.rather_than(function, model, "coin", "cat"), message)


def in_loops(tokens, rows, columns):
    found = torch.zeros(len(tokens), tokens.shape[2], rows, columns)
    for row in range(rows):
        for column in range(columns):
            found[:, :, row, column] = tokens[:, 1 + row * columns + column]
    return found


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda t, r, c: t[:, 1:].reshape(len(t), r, c, -1).permute(0, 3, 1, 2), None),
        (lambda t, r, c: t[:, 1:].transpose(1, 2).unflatten(2, (r, c)), None),
        (in_loops, None),
        (lambda t, r, c: t[:, 1:].reshape(len(t), -1, r, c), "mixes channels with places"),
        (lambda t, r, c: t[:, 1:].mT.reshape(len(t), -1, c, r).mT, "is filled column by column"),
        (lambda t, r, c: t[:, :-1].mT.reshape(len(t), -1, r, c), "begins with the CLS token"),
        (lambda t, r, c: t[:, 1:].reshape(len(t), r, c, -1), "has its channels last"),
        (lambda t, r, c: t[:, 1:].mT.reshape(len(t), -1, c, r), "has the axes of rows and columns exchanged"),
        (lambda t, r, c: t[:, 1:].mT, "is still a list of patches"),
        (lambda t, r, c: t.mT.reshape(len(t), -1, r, c), r"fails on the shape \(2, 13, 5\) .* Is CLS left out"),
        (lambda t, r, c: t[:, 1:].mT.reshape(len(t), -1, 8, 8), "is every size read from the arguments"),
        (lambda t, r, c: in_loops(t, r, c)[:1], r"has the shape \(1, 5, 3, 4\); \(2, 5, 3, 4\) is wanted"),
        (lambda t, r, c: in_loops(t, r, c).flip(2), "is not right: its correlation"),
        (lambda t, r, c: in_loops(t, r, c).numpy(), "is ndarray: grad-cam wants a tensor"),
        (lambda t, r, c: None, "is NoneType: grad-cam wants a tensor"),
    ],
)
def test_lay_out(function, message, verdict):
    verdict(lambda: checks.lay_out(function), message)


def test_a_hole_stays_a_hole():
    def function(tokens, rows, columns):
        raise NotImplementedError("Replace this line by your answer.")

    with pytest.raises(NotImplementedError):
        checks.lay_out(function)


def row(attention):
    return attention.mean(dim=(0, 1))[0, 1:]


@pytest.mark.parametrize(
    ("weights_of", "message"),
    [
        (row, None),
        (lambda A: np.average(A[0].numpy(), axis=0)[0][1:], None),
        (lambda A: sum(head[0] for head in A[0])[1:] / A.shape[1], None),
        (lambda A: A[0].mean(dim=0)[1:, 0], "is column 0"),
        (lambda A: A[0].mean(dim=0)[0, :-1], "begins with the CLS token"),
        (lambda A: A[0].mean(dim=0)[0], "fails on the shape .* Is CLS left out"),
        (lambda A: A[0, 0, 0, 1:], "is that of the first head"),
        (lambda A: A[0, -1, 0, 1:], "is that of the last head"),
        (lambda A: A[0].sum(dim=0)[0, 1:], "is the sum over the heads"),
        (lambda A: A[0].amax(dim=0)[0, 1:], "is the maximum over the heads"),
        (lambda A: A[0].mean(dim=(0, 1))[1:], "is the mean over all rows"),
        (lambda A: A[0].mean(dim=0)[-1, 1:], "is the row of the last patch"),
        (lambda A: row(A) / row(A).sum(), "is divided by its sum"),
        (lambda A: row(A) / row(A).max(), "is divided by its largest value"),
        (lambda A: row(A) - row(A).min(), "the right pattern on another scale"),
        (lambda A: 1 / row(A), "is not right: its correlation"),
    ],
)
def test_cls_looks_at(weights_of, message, verdict):
    attention = torch.rand(1, 3, 17, 17, generator=torch.Generator().manual_seed(1)).softmax(dim=-1)

    def function(weights, rows, columns):
        return weights_of(weights).reshape(rows, columns)

    verdict(lambda: checks.cls_looks_at(function, attention, 4, 4), message)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (lambda values, rows, columns: values.reshape(columns, rows).T, "is filled column by column"),
        (lambda values, rows, columns: values, r"has the shape \(12,\); \(3, 4\) is wanted"),
        (lambda values, rows, columns: values.reshape(4, 4), "is every size read from the arguments"),
    ],
)
def test_cls_looks_at_in_a_grid(layout, message, verdict):
    attention = torch.rand(1, 3, 17, 17).softmax(dim=-1)
    verdict(lambda: checks.cls_looks_at(lambda A, *grid: layout(row(A), *grid), attention, 4, 4), message)
