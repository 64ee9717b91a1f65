"""The lab's solutions are Captum's methods, and each check takes right answers and says what is wrong with others."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from captum._utils.models.linear_model import SkLearnLinearRegression
from captum.attr import InputXGradient, IntegratedGradients, Lime
from sklearn.linear_model import LinearRegression, Ridge

from xai_helpers.checkpoints import examples, load
from xai_helpers.checks import Wrong, correlation
from xai_helpers.checks import write_it_yourself as checks
from xai_helpers.wrappers import LogitsModel, category_index

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks/labs/write_it_yourself.ipynb"


def solutions():
    """The functions of the notebook's task cells: name -> function."""
    names = {"np": np, "torch": torch}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["metadata"].get("nbgrader", {}).get("solution"):
            exec("".join(cell["source"]), names)
    return names


SOLUTION = solutions()


@pytest.fixture(scope="module")
def lab():
    model, processor = load("resnet", weights="bundled")
    (example,) = examples(model, processor, 1)
    picture = torch.nn.functional.avg_pool2d(example.pixel_values, 2)  # four times as fast
    return LogitsModel(model), picture, category_index(model, example.categories[1])


@pytest.fixture(scope="module")
def squares(lab):
    """Superpixels without skimage: 5 x 6 rectangles."""
    height, width = lab[1].shape[2:]
    rows, columns = np.arange(height) * 5 // height, np.arange(width) * 6 // width
    return rows[:, None] * 6 + columns


def gradient(net, x, index):
    picture = x.detach().clone().requires_grad_()
    return torch.autograd.grad(net(picture)[:, index].sum(), picture)[0]


# ---- the solutions are Captum's methods ------------------------------------------------------------------------------


def test_input_x_gradient_is_captums(lab):
    net, x, index = lab
    captum = InputXGradient(net).attribute(x.clone().requires_grad_(), target=index)
    assert torch.equal(SOLUTION["input_x_gradient"](net, x, index), captum)


def test_integrated_gradients_is_captums(lab):
    net, x, index = lab
    baseline = torch.full_like(x, -0.5)
    engine = IntegratedGradients(net)
    captum = engine.attribute(x, baseline, target=index, n_steps=12, method="riemann_middle").float()
    mine = SOLUTION["integrated_gradients"](net, x, index, baseline, 12)
    assert (mine - captum).abs().max() < 1e-3 * captum.abs().max()


def captum_lime(net, x, index, segments, n_samples, seed):
    def similarity(original, changed, switches, **rest):
        return torch.exp(-((1 - switches.float().mean().sqrt()) ** 2) / 0.25**2)

    torch.manual_seed(seed)
    mask = torch.from_numpy(segments)[None, None]
    options = {"feature_mask": mask, "n_samples": n_samples, "perturbations_per_eval": 50, "return_input_shape": False}
    return Lime(net, SkLearnLinearRegression(), similarity).attribute(x, target=index, **options)[0]


def test_lime_weights_are_captums(lab, squares):
    net, x, index = lab
    mine = SOLUTION["lime_weights"](net, x, index, squares, 400, 0)
    assert correlation(mine, captum_lime(net, x, index, squares, 400, 0).numpy()) > 0.95


# ---- the checks ------------------------------------------------------------------------------------------------------


def with_backward(net, x, index):
    picture = x.clone().requires_grad_()
    net(picture)[0, index].backward()
    return (picture * picture.grad).detach().numpy()


def adds_up(net, x, index):
    x.requires_grad_()
    net(x)[0, index].backward()
    found = (x * x.grad).detach()
    x.requires_grad_(False)
    return found


def changes_x(net, x, index):
    x.requires_grad_()
    return x * torch.autograd.grad(net(x)[0, index], x)[0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (SOLUTION["input_x_gradient"], None),
        (with_backward, None),
        (lambda *lab: gradient(*lab), "is the gradient alone"),
        (lambda net, x, index: x * gradient(net, x, index - 1 if index else 1), "belongs to another category"),
        (lambda net, x, index: x * gradient(net, x, slice(None)), "is the gradient of the sum of all scores"),
        (lambda net, x, index: (x * gradient(net, x, index)).abs(), "has lost its sign"),
        (lambda net, x, index: -x * gradient(net, x, index), "has the opposite sign"),
        (lambda net, x, index: (x * gradient(net, x, index)).mT, "is transposed"),
        (lambda net, x, index: (x * gradient(net, x, index))[0], r"has the shape \(3, 64, 64\)"),
        (lambda net, x, index: torch.rand_like(x), "is not right: its correlation"),
        (changes_x, "made to require gradients: work on a copy"),
        (adds_up, "A second call gives another answer"),
        (lambda net, x, index: None, "is None: give it a value"),
    ],
)
def test_input_x_gradient(lab, answer, message, verdict):
    verdict(lambda: checks.input_x_gradient(answer, *lab), message)


def integral(net, x, index, baseline, n_steps, places=None, weight=None):
    """By the trapezoid rule, one place after the other."""
    places = torch.linspace(0, 1, n_steps) if places is None else places
    weights = torch.full((len(places),), 1 / (len(places) - 1)) if weight is None else weight
    if weight is None:
        weights[[0, -1]] /= 2
    pairs = zip(places, weights, strict=True)
    return (x - baseline) * sum(w * gradient(net, baseline + t * (x - baseline), index) for t, w in pairs)


def by_gauss(net, x, index, baseline, n_steps):
    places, weights = np.polynomial.legendre.leggauss(n_steps)
    return integral(net, x, index, baseline, n_steps, torch.tensor(places / 2 + 0.5).float(), weights / 2).numpy()


def by_captum(net, x, index, baseline, n_steps):
    return IntegratedGradients(net).attribute(x, baseline, target=index, n_steps=n_steps)


INTEGRATED = SOLUTION["integrated_gradients"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (INTEGRATED, None),
        (integral, None),
        (by_gauss, None),
        (by_captum, None),
        (lambda net, x, c, b, n: INTEGRATED(net, x, c, torch.zeros_like(x), n), "starts at zero"),
        (lambda net, x, c, b, n: n * INTEGRATED(net, x, c, b, n), "is a sum of gradients, not their mean"),
        (lambda net, x, c, b, n: INTEGRATED(net, x, c, b, n) / (x - b).clamp(min=1e-6), "is the mean gradient alone"),
        (
            lambda net, x, c, b, n: INTEGRATED(net, x, c, b, n) * x / (x - b).clamp(min=1e-6),
            "multiplied by the picture",
        ),
        (lambda net, x, c, b, n: (x - b) * gradient(net, x, c), "is the gradient at the picture only"),
        (lambda net, x, c, b, n: (x - b) * gradient(net, b, c), "is the gradient at the baseline only"),
        (lambda net, x, c, b, n: INTEGRATED(net, x, c, b, n).abs(), "has lost its sign"),
        (lambda net, x, c, b, n: -INTEGRATED(net, x, c, b, n), "has the opposite sign"),
        (lambda net, x, c, b, n: INTEGRATED(net, x, c - 1 if c else 1, b, n), "belongs to another category"),
        (lambda net, x, c, b, n: INTEGRATED(net, x, c, b, n)[0], r"has the shape \(3, 32, 32\)"),
        (lambda net, x, c, b, n: torch.rand_like(x), "is not right: its correlation"),
    ],
)
def test_integrated_gradients(lab, answer, message, verdict):
    verdict(lambda: checks.integrated_gradients(answer, *lab), message)


SMOOTHED = SOLUTION["smoothed"]


def in_numpy(attribute, x, n_samples, stdev, seed, combine=lambda found: sum(found) / len(found), draw=None):
    rng = np.random.default_rng(seed)
    draw = draw or (lambda rng, shape: rng.normal(size=shape))
    pictures = [x + torch.from_numpy(stdev * draw(rng, x.shape)).float() for _ in range(n_samples)]
    return combine([attribute(picture) for picture in pictures])


def globally_seeded(attribute, x, n_samples, stdev, seed):
    torch.manual_seed(seed)
    total = torch.zeros_like(x)
    for _ in range(n_samples):
        total += attribute(torch.normal(x, stdev)) / n_samples
    return total.numpy()


def of_the_mean(attribute, x, n_samples, stdev, seed):
    """As if the attributions were those of the check: the negative square."""
    pictures = []
    in_numpy(lambda picture: pictures.append(picture) or attribute(picture), x, n_samples, stdev, seed)
    return -((sum(pictures) / n_samples) ** 2)


def in_place(attribute, x, n_samples, stdev, seed):
    draw = torch.Generator().manual_seed(seed)
    return sum(attribute(x.add_(stdev * torch.randn(x.shape, generator=draw))) for _ in range(n_samples)) / n_samples


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (SMOOTHED, None),
        (in_numpy, None),
        (globally_seeded, None),
        (partial(in_numpy, combine=sum), "is a sum: take the mean of the attributions"),
        (partial(in_numpy, combine=lambda found: found[-1]), "is that of the last noisy picture only"),
        (partial(in_numpy, combine=lambda found: sum(found).abs() / len(found)), "has another sign"),
        (
            partial(in_numpy, combine=lambda found: sum(a**2 for a in found) / len(found)),
            "mean of squared attributions",
        ),
        (of_the_mean, "is the attribution of the mean picture"),
        (partial(in_numpy, draw=lambda rng, shape: rng.random(shape)), "The noise has a mean of"),
        (partial(in_numpy, draw=lambda rng, shape: np.full(shape, rng.normal())), "one number added everywhere"),
        (
            partial(in_numpy, draw=lambda rng, shape: np.repeat(rng.normal(size=(1, 1, *shape[2:])), 3, 1)),
            "all channels",
        ),
        (lambda a, x, n, stdev, seed: SMOOTHED(a, x, n, stdev**0.5, seed), "a standard deviation of 0.4"),
        (lambda a, x, n, stdev, seed: SMOOTHED(a, x, n, 0, seed), "There is no noise"),
        (lambda a, x, n, stdev, seed: sum(SMOOTHED(a, x, 1, stdev, seed) for _ in range(n)) / n, "have the same noise"),
        (lambda a, x, n, stdev, seed: SMOOTHED(a, x, n, stdev, 5), "Two seeds give the same noise"),
        (lambda a, x, n, stdev, seed: SMOOTHED(a, x, n, stdev, torch.seed() % 2**31), "the same seed give other noise"),
        (lambda a, x, n, stdev, seed: SMOOTHED(a, x, 3, stdev, seed), "was called 3 times"),
        (
            lambda a, x, n, stdev, seed: a(x + stdev * torch.randn(n, *x.shape[1:])).mean(0, keepdim=True),
            "one picture at",
        ),
        (lambda a, x, n, stdev, seed: SMOOTHED(a, x.double(), n, stdev, seed), "the network wants torch.float32"),
        (in_place, "has been changed"),
    ],
)
def test_smoothed(lab, answer, message, verdict):
    net, x, index = lab
    verdict(lambda: checks.smoothed(answer, INTEGRATED, net, x, index), message)


def test_smoothing_of_a_wrong_attribution(lab):
    net, x, index = lab
    with pytest.raises(Wrong, match="The smoothed Integrated Gradients"):
        checks.smoothed(SMOOTHED, lambda net, x, c, b, n: x * gradient(net, x, c), net, x, index)


def lime(net, x, index, segments, n_samples, seed, power=1.0, fit=None, blank=None, likely=0.5):
    """By scikit-learn. A power of the kernel, another regression, another blank picture."""
    on = (np.random.default_rng(seed).random((n_samples, segments.max() + 1)) < likely).astype(float)
    on[0] = 1
    visible = torch.from_numpy(on[:, segments])[:, None].to(x)
    pictures = x * visible + (0 if blank is None else blank(x, segments)) * (1 - visible)
    with torch.no_grad():
        scores = torch.cat([net(some) for some in pictures.split(64)])[:, index].numpy()
    weights = np.exp(-power * (1 - np.sqrt(on.mean(axis=1))) ** 2 / 0.25**2)
    return (fit or LinearRegression()).fit(on, scores, weights).coef_


def mean_colours(x, segments):
    blank = torch.zeros_like(x)
    for i in range(segments.max() + 1):
        inside = torch.from_numpy(segments == i)
        blank[..., inside] = x[..., inside].mean(dim=-1, keepdim=True)
    return blank


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (SOLUTION["lime_weights"], None),
        (lime, None),
        (partial(lime, fit=Ridge(alpha=0.1)), None),
        (captum_lime, None),
        (partial(lime, power=0), "in which all pictures count alike"),
        (partial(lime, power=2), "count likeness twice"),
        (partial(lime, power=0.5), "count likeness too little"),
        (partial(lime, fit=LinearRegression(fit_intercept=False)), "the regression needs an intercept"),
        (partial(lime, blank=mean_colours), "superpixels in their mean colour"),
        (lambda *asked: -lime(*asked), "has the opposite sign"),
        (lambda *asked: lime(*asked) / np.abs(lime(*asked)).max().clip(1e-3), "the right pattern on another scale"),
        (lambda *asked: np.append(lime(*asked), 0), r"has the shape \(5,\); \(4,\) is wanted"),
        (lambda net, x, c, s, n, seed: lime(net, x, 1, s, n, seed), "belongs to another category"),
        (lambda net, x, c, s, n, seed: lime(net, x, 2, s, n, seed), "belongs to another category"),
        (lambda net, x, c, s, n, seed: lime(net, x, 5, s, n, seed), "is zero everywhere: use the index"),
        (lambda net, x, c, s, n, seed: lime(net, x, c, s, n, None), "Two calls with the same seed give other weights"),
        (lambda net, x, c, s, n, seed: np.zeros(s.max() + 1), "and a regression without a penalty"),
    ],
)
def test_lime_weights(lab, squares, answer, message, verdict):
    net, x, index = lab
    verdict(lambda: checks.lime_weights(answer, net, x, index, squares), message)


def unit(values):
    return values / values.max()


def in_a_loop(attribution):
    total = sum(channel.numpy() for channel in attribution[0])
    total = np.where(total > 0, total, 0)
    return total / total.max() if total.max() > 0 else total


@pytest.mark.parametrize("attribution", [None, torch.linspace(-3, 4, 140).reshape(1, 4, 5, 7).sin()])
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (SOLUTION["to_heat_map"], None),
        (in_a_loop, None),
        (lambda a: a[0].mean(0).relu() / a[0].mean(0).relu().max().clamp(min=1e-9), None),
        (lambda a: unit(a[0].sum(0).abs()), "shows absolute values"),
        (lambda a: unit(a[0].abs().sum(0)), "adds absolute values up"),
        (lambda a: unit(a[0].relu().sum(0)), "was cut off at zero in each channel"),
        (lambda a: unit(a[0].amax(0).relu()), "shows the strongest channel"),
        (lambda a: unit(a[0].sum(0) - a[0].sum(0).min()), "is shifted up until its lowest value is 0"),
        (lambda a: unit((-a[0].sum(0)).relu()), "shows what speaks against the category"),
        (lambda a: a[0].sum(0).relu(), "divide it by that"),
        (lambda a: unit(a[0].sum(0)), "goes down to"),
        (lambda a: unit(a[0].sum(0).relu()).T, "has the shape"),
        (lambda a: unit(a.sum(1).relu()), "has the shape"),
        (lambda a: unit(a[0].sum(0).relu()), "Is there a division by zero"),
        (
            lambda a: (a[0].sum(0) / a[0].sum(0).max().clamp(min=1e-9)).relu() + (a.max() == 0),
            "is zero everywhere is not",
        ),
    ],
)
def test_to_heat_map(attribution, answer, message, verdict):
    verdict(lambda: checks.to_heat_map(answer, attribution), message)
