"""Each check of the lab on perturbation takes right answers and says what is wrong with others."""

import math

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, Occlusion

from xai_helpers.checkpoints import examples, load
from xai_helpers.checks import Wrong
from xai_helpers.checks import perturbation as checks
from xai_helpers.wrappers import LogitsModel, category_index

SETTINGS = [(8, 4, 2), (6, 6, 3), (9, 4, 2), (12, 5, 5), (7, 1, 1)]


@pytest.fixture(scope="module")
def lab():
    model, processor = load("resnet", weights="bundled")
    (example,) = examples(model, processor, 1)
    index = category_index(model, example.categories[0])
    return LogitsModel(model), example.pixel_values, index


def counted(side, window, stride):
    """As many windows as pictures that Captum asks for, less the one without a window."""
    seen = []

    def forward(pictures):
        seen.append(len(pictures))
        return pictures.sum(dim=(1, 2, 3))

    Occlusion(forward).attribute(
        torch.ones(1, 3, side, side), sliding_window_shapes=(3, window, window), strides=(3, stride, stride)
    )
    return sum(seen) - 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda side, window, stride: (math.ceil((side - window) / stride) + 1) ** 2, None),
        (lambda side, window, stride: len(range(0, side - window + stride, stride)) ** 2, None),
        (counted, None),
        (lambda side, window, stride: ((side - window) // stride + 1) ** 2, "leaves out the windows that stick out"),
        (lambda side, window, stride: math.ceil((side - window) / stride) + 1, "counts one side only"),
        (lambda side, window, stride: math.ceil((side - window) / stride) ** 2, "there is one window more than moves"),
        (lambda side, window, stride: math.ceil(side / stride) ** 2, "counts a window for every stride"),
        (lambda *setting: counted(*setting) + 1, "counts the picture as it is, too"),
        (lambda side, window, stride: side * window * stride, "which is not right"),
        (lambda side, window, stride: None, "is None: give it a value"),
    ],
)
def test_n_windows(answer, message, verdict):
    verdict(lambda: checks.n_windows(answer, SETTINGS), message)


def occluded(lab, index=None, window=32, stride=16, **options):
    net, x, right = lab
    options = {"sliding_window_shapes": (3, window, window), "strides": (3, stride, stride), **options}
    return Occlusion(net).attribute(x, target=right if index is None else index, perturbations_per_eval=25, **options)


def in_loops(lab, window=32, stride=16):
    """A mean over the windows that cover a pixel, in loops over the places of an evenly fitting window."""
    net, x, index = lab
    total, covered = np.zeros(x.shape), np.zeros(x.shape)
    with torch.no_grad():
        for top in range(0, x.shape[2] - window + 1, stride):
            for left in range(0, x.shape[3] - window + 1, stride):
                place = (..., slice(top, top + window), slice(left, left + window))
                changed = x.clone()
                changed[place] = 0
                total[place] += float(net(x)[0, index] - net(changed)[0, index])
                covered[place] += 1
    return total / covered, total


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda lab: occluded(lab), None),
        (lambda lab: in_loops(lab)[0], None),
        (lambda lab: occluded(lab, strides=16).numpy(), None),
        (lambda lab: in_loops(lab)[1], "is the sum over the windows that cover a pixel"),
        (lambda lab: -occluded(lab), "has the opposite sign"),
        (lambda lab: occluded(lab, lab[2] - 1 if lab[2] else 1), "belongs to another category"),
        (lambda lab: occluded(lab, stride=32), "with a stride as long as the window"),
        (lambda lab: occluded(lab, strides=(1, 16, 16), sliding_window_shapes=(1, 32, 32)), "between the channels"),
        (lambda lab: occluded(lab).clamp(min=0), "has no negative values"),
        (lambda lab: occluded(lab).transpose(2, 3), "is transposed"),
        (lambda lab: occluded(lab).abs(), "has lost its sign"),
        (lambda lab: occluded(lab) / occluded(lab).max(), "the right pattern on another scale"),
        (lambda lab: occluded(lab)[0], r"has the shape \(3, 128, 128\); \(1, 3, 128, 128\) is wanted"),
        (lambda lab: torch.rand(1, 1, 128, 128).expand(1, 3, 128, 128), "is not right: its correlation"),
    ],
)
def test_occlusion(lab, answer, message, verdict):
    net, x, index = lab
    verdict(lambda: checks.occlusion(answer(lab), net, x, index, 32, 16), message)


def test_occlusion_whose_last_windows_are_cut_off(lab, verdict):
    net, x, index = lab
    verdict(lambda: checks.occlusion(occluded(lab, window=50, stride=40), net, x, index, 50, 40), None)


def unit(maps):
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def shifted(maps):
    return unit(maps - maps.amin(dim=(1, 2), keepdim=True))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda drops: unit(drops[:, 0].clamp(min=0)), None),
        (lambda drops: np.stack([np.maximum(one / one.max(), 0) for one in drops.mean(dim=1).numpy()]), None),
        (lambda drops: drops[:, 0].clamp(min=0) / drops.max(), "is divided by the largest value of all maps"),
        (lambda drops: unit(drops[:, 0].abs()), "shows absolute values"),
        (lambda drops: unit((-drops[:, 0]).clamp(min=0)), "shows where the score rises"),
        (lambda drops: shifted(drops[:, 0]), "is shifted up until its lowest value is 0"),
        (lambda drops: unit(drops[:, 0]), "goes down to"),
        (lambda drops: drops[:, 0].clamp(min=0), "has the largest value"),
        (lambda drops: unit(drops[:, 0].clamp(min=0)).transpose(1, 2), "is transposed"),
        (lambda drops: unit(drops[0].clamp(min=0)), r"has the shape \(3, 6, 6\); \(2, 6, 6\) is wanted"),
        (lambda drops: unit(torch.rand(2, 6, 6)), "is not right: its correlation"),
    ],
)
def test_needed(answer, message, verdict):
    maps = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    drops = (maps * torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)).expand(2, 3, 6, 6)
    verdict(lambda: checks.needed(answer, drops), message)


@pytest.mark.parametrize("seed", range(5))
def test_where_all_is_needed_the_absolute_value_is_right_too(seed):
    drops = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(seed)).expand(2, 3, 6, 6)
    for function in (lambda drops: unit(drops[:, 0].clamp(min=0)), lambda drops: unit(drops[:, 1].abs()).numpy()):
        checks.needed(function, drops)


def test_a_score_that_needs_nothing():
    checks.nothing_is_needed(lambda drops: torch.zeros(1, 4, 4))
    with pytest.raises(Wrong, match="is not zero: set what is negative to zero before you divide"):
        checks.nothing_is_needed(lambda drops: drops[:, 0] / drops.amin())
    with pytest.raises(Wrong, match="Is there a division by zero"):
        checks.nothing_is_needed(lambda drops: drops[:, 0].clamp(min=0) / drops.clamp(min=0).max())


SQUARES = (torch.arange(128) // 32)[:, None] * 4 + torch.arange(128) // 32


def ablated(net, x, index):
    return FeatureAblation(net).attribute(x, target=index, feature_mask=SQUARES[None, None], perturbations_per_eval=16)


def one_each(values):
    return torch.stack([values[SQUARES == i][0] for i in range(16)])


def one_by_one(net, x, index, alone=False):
    with torch.no_grad():
        return [float(net(x * ((i == SQUARES) == alone))[0, index]) for i in range(16)]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda net, x, index: one_each(ablated(net, x, index)[0, 2]), None),
        (lambda net, x, index: np.array(float(net(x)[0, index])) - one_by_one(net, x, index), None),
        (lambda net, x, index: one_each(ablated(net, x, index)[0, 0]) * 1024, "is the sum over the pixels"),
        (lambda net, x, index: one_each(ablated(net, x, index)[0].sum(0)), "is the sum over the channels"),
        (lambda net, x, index: one_each(ablated(net, x, index)[0].sum(0)) * 1024, "over channels and pixels"),
        (lambda net, x, index: one_each(ablated(net, x, index - 1 if index else 1)[0, 0]), "another category"),
        (one_by_one, "holds the scores that are left"),
        (lambda net, x, index: one_by_one(net, x, index, alone=True), "holds the scores of each superpixel alone"),
        (lambda net, x, index: one_each(-ablated(net, x, index)[0, 0]), "has the opposite sign"),
        (lambda net, x, index: one_each(ablated(net, x, index)[0, 0]).abs(), "has lost its sign"),
        (lambda net, x, index: one_each(ablated(net, x, index)[0, 0]).relu(), "has no negative values"),
        (lambda net, x, index: one_each(ablated(net, x, index)[0, 0]).sort(descending=True)[0], "in the order of the"),
        (lambda net, x, index: ablated(net, x, index), "has a number for each pixel; one for each superpixel"),
        (lambda net, x, index: one_each(ablated(net, x, index)[0, 0])[1:], r"has the shape \(15,\); \(16,\) is wanted"),
        (lambda net, x, index: torch.rand(16), "is not right: its correlation"),
    ],
)
def test_superpixel_drops(lab, answer, message, verdict):
    net, x, index = lab

    def function(picture, segments, category):
        assert segments is SQUARES
        with torch.no_grad():
            return answer(net, picture, category)

    verdict(lambda: checks.superpixel_drops(function, net, x, SQUARES, index), message)


def covariance(scores, masks, **options):
    flat = masks.flatten(1).numpy()
    return np.array([np.cov(scores.numpy(), one, **options)[0, 1] for one in flat.T]).reshape(masks.shape[1:])


def weighted(scores, masks):
    return torch.einsum("n,nhw->hw", scores, masks) / len(masks)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda s, m: weighted(s - s.mean(), m - m.mean(0)), None),
        (lambda s, m: weighted(s - s.mean(), m), None),
        (lambda s, m: weighted(s, m) - s.mean() * m.mean(0), None),
        (lambda s, m: covariance(s, m, bias=True), None),
        (covariance, "is divided by the number of masks less one"),
        (weighted, "weighs the masks by the scores as they are"),
        (lambda s, m: weighted(s - s.mean(), m) * len(m), "is the sum over the masks"),
        (
            lambda s, m: weighted((s - s.mean()) / s.std(correction=0), (m - m.mean(0)) / m.std(0, correction=0)),
            "is the corr",
        ),
        (lambda s, m: m.mean(0), "the scores are missing"),
        (lambda s, m: weighted(s - s.mean(), 1 - m), "has the opposite sign"),
        (lambda s, m: weighted(s - s.mean(), m).relu(), "has no negative values"),
        (lambda s, m: weighted(s - s.mean(), m).T, "is transposed"),
        (lambda s, m: weighted(s - s.mean(), m)[None], r"has the shape \(1, 5, 5\); \(5, 5\) is wanted"),
        (lambda s, m: torch.rand(5, 5), "is not right: its correlation"),
    ],
)
def test_random_mask_map(answer, message, verdict):
    draw = torch.Generator().manual_seed(2)
    masks = torch.rand(20, 5, 5, generator=draw)
    scores = 3 * masks[:, 1, 2] - masks[:, 3, 3] + 5
    verdict(lambda: checks.random_mask_map(answer, scores, masks), message)


def test_random_masks_counted_by_hand(verdict):
    # The mean score is 2. The pixel (0, 0) is visible for the score 5 only: (5 - 2) * 1 / 3 = 1, and so on.
    masks = torch.tensor([[[1, 0], [0, 1]], [[0, 1], [0, 1]], [[0, 0], [1, 1]]]).float()
    by_hand = [[1.0, -2 / 3], [-1 / 3, 0.0]]
    verdict(lambda: checks.random_mask_map(lambda *given: by_hand, torch.tensor([5.0, 0.0, 1.0]), masks), None)
