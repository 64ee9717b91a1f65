"""Each check of the lab on LIME takes right answers and says what is wrong with others."""

import functools

import numpy as np
import pytest
import torch
from captum._utils.models.linear_model import SkLearnLasso, SkLearnLinearRegression, SkLearnRidge
from captum.attr import KernelShap, Lime
from skimage.segmentation import slic
from sklearn.linear_model import LinearRegression

from xai_helpers.checkpoints import examples, load
from xai_helpers.checks import Wrong
from xai_helpers.checks import lime as checks
from xai_helpers.scoring import resize_masks
from xai_helpers.wrappers import LogitsModel, category_index


@pytest.fixture(scope="module")
def lab():
    model, processor = load("resnet", weights="bundled")
    (example,) = examples(model, processor, 1)
    net, x = LogitsModel(model).requires_grad_(False), example.pixel_values
    mask = resize_masks(example.masks, *x.shape[2:])[0]
    return net, x, [category_index(model, name) for name in example.categories], slic_ids(x, 40), mask


def slic_ids(picture, n, **options):
    return torch.from_numpy(slic(picture[0].permute(1, 2, 0).numpy(), n_segments=n, start_label=0, **options))[None]


def grid(picture, n):
    side, (height, width) = round(n**0.5), picture.shape[2:]
    y, x = torch.meshgrid(torch.arange(height) * side // height, torch.arange(width) * side // width, indexing="ij")
    return (y * side + x)[None]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, n: slic_ids(x, n), None),
        (lambda x, n: slic_ids(x, n, compactness=20), None),
        (lambda x, n: torch.as_tensor(slic(x[0].numpy(), n, channel_axis=0))[None] - 1, None),
        (lambda x, n: slic_ids(x, n) + 1, "The ids start at 1"),
        (lambda x, n: slic_ids(x, n) * 2, "close the gaps"),
        (lambda x, n: slic_ids(x, n).to(torch.uint8), "are of the type torch.uint8"),
        (lambda x, n: slic_ids(x, n).float(), "are of the type torch.float32"),
        (lambda x, n: slic_ids(x, n)[0], r"has the shape \(128, 128\); \(1, 128, 128\) is wanted"),
        (lambda x, n: slic_ids(x, n).numpy(), "have to be a tensor, not ndarray"),
        (lambda x, n: slic_ids(x, 3 * n), r"There are \d+ superpixels; about 40 are wanted"),
        (lambda x, n: slic_ids(x, n).mT, "follow the transposed picture"),
        (grid, "better than a plain grid"),
        (lambda x, n: None, "have to be a tensor, not NoneType"),
    ],
)
def test_cut_up(lab, answer, message, verdict):
    verdict(lambda: checks.cut_up(answer, lab[1], 40), message)


def counts(segments, mask):
    return np.bincount(segments.numpy().ravel(), mask.ravel()), np.bincount(segments.numpy().ravel())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda s, mask: counts(s, mask)[0] / counts(s, mask)[1], None),
        (lambda s, mask: [float(mask[s[0] == i].mean()) for i in range(int(s.max()) + 1)], None),
        (lambda s, mask: counts(s, mask)[0], "is the number of pixels"),
        (lambda s, mask: counts(s, mask)[0] / mask.sum(), "says which share of the object lies in each superpixel"),
        (lambda s, mask: counts(s, mask)[0] / mask.size, "is a share of the whole picture"),
        (lambda s, mask: counts(s, ~mask)[0] / counts(s, mask)[1], "is the share beside the object"),
        (lambda s, mask: counts(s, mask)[0] / counts(s, mask)[1] >= 0.5, "says only whether most of a superpixel"),
        (lambda s, mask: counts(s, mask)[0] > 0, "says only whether a superpixel touches"),
        (lambda s, mask: counts(s, mask)[0][1:], "has the shape"),
        (lambda s, mask: np.random.default_rng(0).random(int(s.max()) + 1), "is not right: its correlation"),
    ],
)
def test_share_on_object(lab, answer, message, verdict):
    verdict(lambda: checks.share_on_object(answer, lab[3], lab[4]), message)


def off(samples):
    return 1 - samples.float().mean(dim=1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda s, w: torch.exp(-(off(s) ** 2) / w**2), None),
        (lambda s, w: [np.exp(-((np.mean(one.numpy() == 0) / w) ** 2)) for one in s], None),
        (lambda s, w: torch.exp(-(s.mean(dim=1) ** 2) / w**2), "takes the share that is on"),
        (lambda s, w: torch.exp(-(off(s) ** 2) / (2 * w**2)), r"has 2 w\^2 in the exponent"),
        (lambda s, w: torch.exp(-off(s) / w**2), "does not square the distance"),
        (lambda s, w: torch.exp(-(off(s) ** 2) / w), "does not square the kernel width"),
        (lambda s, w: torch.exp(-off(s) / w), "squares neither"),
        (lambda s, w: torch.exp(off(s) ** 2 / w**2), "rises with the distance"),
        (lambda s, w: torch.exp(-((1 - s).sum(dim=1) ** 2) / w**2), "takes the number of superpixels"),
        (lambda s, w: torch.exp(-(off(s) ** 2) / 0.25), "is not right"),
        (lambda s, w: torch.exp(-(off(s) ** 2)), "ignores the kernel width"),
        (lambda s, w: torch.exp(-((1 - s.mean(dim=0)) ** 2) / w**2), "has the shape"),
    ],
)
def test_kernel_weight(answer, message, verdict):
    samples = torch.bernoulli(torch.full((40, 6), 0.5), generator=torch.Generator().manual_seed(0))
    verdict(lambda: checks.kernel_weight(answer, samples), message)


def solved(samples, scores, rows, intercept=True):
    """Least squares of rows that are scaled by a tensor (n_samples, 1)."""
    design = torch.cat([samples, torch.ones(len(samples), int(intercept))], dim=1)
    return torch.linalg.lstsq(rows * design, rows * scores).solution


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda z, y, w: LinearRegression().fit(z, y, sample_weight=w).coef_.T, None),
        (lambda z, y, w: solved(z, y, w[:, None].sqrt())[:-1], None),
        (lambda z, y, w: solved(z, y, w[:, None].sqrt()), "leave the intercept out"),
        (lambda z, y, w: solved(z, y, w[:, None])[:-1], "counts the similarities twice"),
        (lambda z, y, w: solved(z, y, torch.ones(len(z), 1))[:-1], "ignores the similarities"),
        (lambda z, y, w: solved(z, y, w[:, None].sqrt(), intercept=False), "has no intercept"),
        (lambda z, y, w: -solved(z, y, w[:, None].sqrt())[:-1], "has the opposite sign"),
        (lambda z, y, w: solved(1 - z, y, w[:, None].sqrt())[:-1], "has the opposite sign"),
        (lambda z, y, w: solved(z, y, w[:, None].sqrt())[:-1].T, "has the shape"),
        (lambda z, y, w: solved(z, y, w[:, None].sqrt())[1:], "is not right"),
    ],
)
def test_weighted_fit(answer, message, verdict):
    draw = torch.Generator().manual_seed(0)
    samples = torch.bernoulli(torch.full((60, 5), 0.5), generator=draw).double()
    scores = samples @ torch.randn(5, 2, generator=draw).double() + 3 + samples[:, :1] * samples[:, 1:2]
    similarities = torch.rand(60, generator=draw).double()
    verdict(lambda: checks.weighted_fit(answer, samples, scores, similarities), message)


def captum(net, x, index, segments, regression, n_samples, **options):
    options = {"perturbations_per_eval": 25, "return_input_shape": False} | options
    engine = Lime(net) if regression is None else Lime(net, interpretable_model=regression)
    return engine.attribute(x, target=index, feature_mask=segments, n_samples=n_samples, **options)[0]


@functools.cache
def once(net, x, index, segments):
    return captum(net, x, index, segments, SkLearnLinearRegression(), 150)


def probability(net):
    return lambda pictures: net(pictures).sigmoid()


def shap(net, x, index, segments, n_samples):
    engine = KernelShap(net)
    options = {"target": index, "feature_mask": segments, "n_samples": n_samples}
    return engine.attribute(x, perturbations_per_eval=25, return_input_shape=False, **options)[0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (captum, None),
        (lambda net, x, i, s, model, n: captum(net, x, i, s, SkLearnRidge(alpha=1), n).numpy(), None),
        (lambda net, x, i, s, model, n: captum(probability(net), x, i, s, None, n), "weights are exactly zero"),
        (lambda net, x, i, s, model, n: captum(net, x, i, s, SkLearnLasso(alpha=5), n), "weights are exactly zero"),
        (lambda net, x, i, s, model, n: torch.zeros(int(s.max()) + 1), "weights are exactly zero"),
        (lambda net, x, i, s, model, n: -once(net, x, i, s), "has the opposite sign"),
        (lambda net, x, i, s, model, n: once(net, x, i, s).abs(), "has lost its sign"),
        (lambda net, x, i, s, model, n: captum(probability(net), x, i, s, model, n), "on another scale"),
        (
            lambda net, x, i, s, model, n: captum(net, x, i, s, model, n, return_input_shape=True)[None],
            "have the shape of the picture",
        ),
        (lambda net, x, i, s, model, n: once(net, x, i, s)[None], r"\(1, \d+\); \(\d+,\) is wanted"),
        (lambda net, x, i, s, model, n: captum(net, x, i, s, model, 10), "its correlation with one that is right"),
        (lambda net, x, i, s, model, n: torch.rand(int(s.max()) + 1), "its correlation with|another category"),
    ],
)
def test_captum_weights(lab, answer, message, verdict):
    net, x, indices, segments, _ = lab
    verdict(lambda: checks.captum_weights(answer, net, x, indices, segments), message)


def test_captum_weights_of_another_category(lab):
    net, x, (index, other), segments, _ = lab

    def always_the_same(net, x, index, segments, regression, n_samples):
        return once(net, x, other, segments)

    with pytest.raises(Wrong, match="belongs to another category"):
        checks.captum_weights(always_the_same, net, x, [index, other], segments)
    checks.captum_weights(always_the_same, net, x, [other, index], segments)


def test_kernel_shap_is_near_enough_to_lime(lab, verdict):
    net, x, indices, segments, _ = lab
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = shap(net, x, indices[0], segments, 200)
    verdict(lambda: checks.captum_weights(lambda *given: weights, net, x, indices, segments), None)


def by_ids(weights, segments):
    return np.asarray(weights)[segments[0].numpy()]


def unit(heat):
    return heat / heat.max()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda w, s: unit(np.clip(by_ids(w, s), 0, None)), None),
        (lambda w, s: unit(torch.as_tensor(w).relu())[s][0], None),
        (lambda w, s: np.clip(by_ids(w, s), 0, None), "is not divided by its largest value"),
        (lambda w, s: unit(by_ids(w, s)), "still has negative values"),
        (lambda w, s: unit(np.abs(by_ids(w, s))), "shows absolute values"),
        (lambda w, s: unit(by_ids(w, s) - by_ids(w, s).min()), "is shifted up until its lowest value is 0"),
        (lambda w, s: unit(np.clip(by_ids(np.roll(w, 1), s), 0, None)), "its neighbour's weight"),
        (lambda w, s: unit(np.clip(by_ids(np.roll(w, -1), s), 0, None)), "as if ids began at 1"),
        (lambda w, s: unit(np.clip(by_ids(w, s), 0, None)).T, "is transposed"),
        (lambda w, s: unit(np.clip(by_ids(w, s), 0, None))[None], "has the shape"),
        (lambda w, s: np.random.default_rng(0).random(s.shape[1:]), "is not right: its correlation"),
    ],
)
def test_paint(lab, answer, message, verdict):
    weights = np.random.default_rng(1).normal(size=int(lab[3].max()) + 1) * 3
    verdict(lambda: checks.paint(answer, weights, lab[3]), message)


def test_a_map_without_positive_weights(lab):
    checks.nothing_positive(lambda weights, segments: torch.zeros(128, 128), lab[3])
    with pytest.raises(Wrong, match="is not zero: set what is negative to zero before you divide"):
        checks.nothing_positive(lambda weights, segments: unit(-by_ids(weights, segments)), lab[3])
    with pytest.raises(Wrong, match="Is there a division by zero"), np.errstate(invalid="ignore"):
        checks.nothing_positive(lambda weights, segments: unit(np.clip(by_ids(weights, segments), 0, None)), lab[3])
