"""Each check of the lab on gradients takes right answers and says what is wrong with others."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import DeepLift, InputXGradient, IntegratedGradients, NoiseTunnel, Saliency
from PIL import Image

from xai_helpers.checkpoints import examples, load
from xai_helpers.checks import gradients as checks
from xai_helpers.imagenet import efficientnet_lite
from xai_helpers.pictures import as_linear
from xai_helpers.wrappers import LogitsModel, category_index

LAB = Path(__file__).resolve().parents[1] / "notebooks/labs/gradients.ipynb"

pytestmark = pytest.mark.filterwarnings("ignore:Setting forward, backward hooks:UserWarning")


@pytest.fixture(scope="module")
def lab():
    model, processor = load("resnet", weights="bundled")
    (example,) = examples(model, processor, 1)
    index, other = (category_index(model, name) for name in example.categories)
    return LogitsModel(model), example.pixel_values.clone().requires_grad_(), index, other, processor


def solution(task, **given):
    """What the lab's own solution of a task defines, with the names that it is given."""
    cells = json.loads(LAB.read_text(encoding="utf-8"))["cells"]
    (cell,) = [cell for cell in cells if cell["metadata"].get("nbgrader", {}).get("grade_id") == task]
    names = {"torch": torch, "Saliency": Saliency, **given}
    exec("".join(cell["source"]), names)
    return names[task] if task in names else names["evidence"]


def gradient_of(net, x, index):
    return torch.autograd.grad(net(x)[0, index], x)[0]


def unit(heat):
    return heat / heat.max()


@pytest.mark.parametrize("task", ["saliency", "input_x_gradient", "integrated", "smoothgrad"])
def test_the_labs_answers_are_captums(task, lab):
    net, x, cat, *_ = lab
    torch.manual_seed(0)
    black = torch.full_like(x, -1)
    given = solution(task, net=net, x=x, cat=cat, black=black, gradient=gradient_of(net, x, cat))
    if task == "saliency":
        wanted = unit(Saliency(net).attribute(x, target=cat).amax(dim=1)[0])
    elif task == "input_x_gradient":
        wanted = InputXGradient(net).attribute(x, target=cat).sum(dim=1)[0]
    elif task == "integrated":
        wanted = IntegratedGradients(net).attribute(x, black, target=cat, n_steps=64, internal_batch_size=16)
    else:
        torch.manual_seed(1)
        given = given(net, x, cat, 5, 0.2)
        torch.manual_seed(1)
        tunnel = NoiseTunnel(Saliency(net))
        wanted = tunnel.attribute(x, target=cat, nt_samples=5, stdevs=0.2, abs=False)
    assert torch.allclose(given, wanted, atol=1e-5 * float(wanted.detach().abs().max()))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda net, x, i, j: unit(Saliency(net).attribute(x, target=i)[0].amax(dim=0)), None),
        (lambda net, x, i, j: unit(np.abs(gradient_of(net, x, i).numpy()).max(axis=1)[0]), None),
        (lambda net, x, i, j: unit(Saliency(net).attribute(x, target=i)[0].sum(dim=0)), "is the sum or the mean over"),
        (lambda net, x, i, j: unit(Saliency(net).attribute(x, target=i)[0].mean(dim=0)), "is the sum or the mean over"),
        (lambda net, x, i, j: Saliency(net).attribute(x, target=i)[0].amax(dim=0), "divide it by that"),
        (lambda net, x, i, j: unit(Saliency(net).attribute(x, target=j)[0].amax(dim=0)), "belongs to another category"),
        (lambda net, x, i, j: unit(gradient_of(net, x, i)[0].amax(dim=0)), "take absolute values first"),
        (lambda net, x, i, j: unit(gradient_of(net, x, i)[0].amax(dim=0).relu()), "shows positive gradients only"),
        (lambda net, x, i, j: unit((x * gradient_of(net, x, i)).abs()[0].amax(dim=0)), "times the picture"),
        (lambda net, x, i, j: unit(Saliency(net).attribute(x, target=i)[0].amax(dim=0)).T, "is transposed"),
        (lambda net, x, i, j: unit(Saliency(net).attribute(x, target=i)), r"has the shape \(1, 3, 128, 128\)"),
        (lambda net, x, i, j: unit(torch.rand(128, 128)), "is not right: its correlation"),
    ],
)
def test_saliency(lab, answer, message, verdict):
    net, x, index, other, _ = lab
    if message == "belongs to another category":
        other = index - 1 if index else 1  # the neighbour that the check compares with
    verdict(lambda: checks.saliency(answer(net, x, index, other), net, x, index), message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda net, x, i, g: (x * g).sum(dim=1)[0], None),
        (lambda net, x, i, g: InputXGradient(net).attribute(x, target=i)[0].sum(dim=0), None),
        (lambda net, x, i, g: np.einsum("chw,chw->hw", x[0].detach(), g[0]), None),
        (lambda net, x, i, g: (x * g).sum(dim=1)[0].abs(), "has lost its sign"),
        (lambda net, x, i, g: (x * g).abs().sum(dim=1)[0], "has lost its sign before the channels"),
        (lambda net, x, i, g: (x * g.abs()).sum(dim=1)[0], "has lost the sign of the gradient"),
        (lambda net, x, i, g: -(x * g).sum(dim=1)[0], "has the opposite sign"),
        (lambda net, x, i, g: g.sum(dim=1)[0], "is the gradient alone"),
        (lambda net, x, i, g: x.sum(dim=1)[0] * g.sum(dim=1)[0], "multiplies two sums"),
        (lambda net, x, i, g: (x * g).amax(dim=1)[0], "is the largest value of the channels"),
        (lambda net, x, i, g: (x * g).mean(dim=1)[0], "the right pattern on another scale"),
        (
            lambda net, x, i, g: (x * gradient_of(net, x, i - 1 if i else 1)).sum(dim=1)[0],
            "belongs to another category",
        ),
        (lambda net, x, i, g: x * g, "has the shape"),
    ],
)
def test_input_x_gradient(lab, answer, message, verdict):
    net, x, index, *_ = lab
    verdict(lambda: checks.input_x_gradient(answer(net, x, index, gradient_of(net, x, index)), net, x, index), message)


def channels(values):
    return torch.tensor(values, dtype=torch.float32).reshape(1, 3, 1, 1)


def filled(x, values):
    return values.expand(x.shape)


def processed_black(x, processor):
    picture = Image.new("RGB", (x.shape[3], x.shape[2]))
    return processor(images=picture, return_tensors="pt")["pixel_values"]


def normalised(x, processor, value):
    return filled(x, (value - channels(processor.image_mean)) / channels(processor.image_std))


@pytest.mark.parametrize("numbers", [None, ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28])], ids=["bundled", "other numbers"])
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, p: normalised(x, p, 0), None),
        (processed_black, None),
        (lambda x, p: normalised(x, p, 0).numpy(), None),
        (lambda x, p: torch.zeros_like(x), "is zero everywhere, which is the mean colour"),
        (lambda x, p: filled(x, -channels(p.image_mean)), "is not divided by the standard deviation"),
        (lambda x, p: normalised(x, p, 1), "is white, or has the opposite sign"),
        (lambda x, p: -normalised(x, p, 0), "has the opposite sign"),
        (lambda x, p: torch.zeros_like(x) + x.min(), "is the darkest value of this picture"),
        (lambda x, p: normalised(x, p, 0)[0], "has the shape"),
        (lambda x, p: None, "let the function return one"),
    ],
)
def test_black_like(lab, answer, message, numbers, verdict):
    x, processor = lab[1], copy.deepcopy(lab[-1])
    if numbers:
        processor.image_mean, processor.image_std = numbers
    verdict(lambda: checks.black_like(answer, x, processor), message)


def test_black_is_not_minus_one_for_every_processor(lab, verdict):
    x, processor = lab[1], copy.deepcopy(lab[-1])
    verdict(lambda: checks.black_like(lambda x, p: -torch.ones_like(x), x, processor), None)
    processor.image_mean = [0.48, 0.46, 0.41]
    verdict(lambda: checks.black_like(lambda x, p: -torch.ones_like(x), x, processor), "is -1 everywhere")


def test_black_for_a_processor_without_image_mean(lab, verdict):
    x, (_, processor) = lab[1], efficientnet_lite()
    assert not hasattr(processor, "image_mean")  # its mean and deviation are a half
    verdict(lambda: checks.black_like(lambda x, p: filled(x, channels(as_linear(p)[1])), x, processor), None)
    verdict(lambda: checks.black_like(lambda x, p: torch.zeros_like(x), x, processor), "which is the mean colour")


def integrate(net, x, index, baseline=-1.0, steps=12, **options):
    engine = IntegratedGradients(net, **options)
    return engine.attribute(x, baseline + torch.zeros_like(x), target=index, n_steps=steps, internal_batch_size=8)


def in_a_loop(net, x, index, steps=40):
    """The middles of equal steps, one after the other."""
    black = -torch.ones_like(x)
    total = torch.zeros_like(x)
    for step in range(steps):
        point = (black + (step + 0.5) / steps * (x - black)).detach().requires_grad_()
        total += gradient_of(net, point, index)
    return ((x - black) * total / steps).detach().numpy()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda net, x, i: integrate(net, x, i, steps=50), None),
        (in_a_loop, None),
        (lambda net, x, i: integrate(net, x, i, steps=6), "Take more steps"),
        (lambda net, x, i: integrate(net, x, i, baseline=0.0), "belongs to the mean colour"),
        (lambda net, x, i: integrate(net, x, i - 1 if i else 1), "belongs to another category"),
        (lambda net, x, i: integrate(net, x, i, multiply_by_inputs=False), "lacks the factor picture minus baseline"),
        (lambda net, x, i: -integrate(net, x, i), "has the opposite sign"),
        (lambda net, x, i: integrate(net, x, i).abs(), "has lost its sign"),
        (lambda net, x, i: unit(integrate(net, x, i)), "was scaled: leave its values"),
        (lambda net, x, i: (x + 1) * gradient_of(net, x, i), "takes the gradient of the picture alone"),
        (lambda net, x, i: x * gradient_of(net, x, i), "is input x gradient"),
        (lambda net, x, i: integrate(net, x, i).sum(dim=1), "has the shape"),
        (lambda net, x, i: torch.randn(x.shape), "is not right: its correlation"),
    ],
)
def test_integrated(lab, answer, message, verdict):
    net, x, index, *_ = lab
    verdict(lambda: checks.integrated(answer(net, x, index), net, x, -torch.ones_like(x), index), message)


def by_captum(net, x, index, n, sigma, method=Saliency, **options):
    options = {"nt_samples": n, "stdevs": sigma, "abs": False, **options}
    return NoiseTunnel(method(net)).attribute(x, target=index, **options)


def by_hand(make_noise, finish=lambda gradients: gradients.mean(dim=0, keepdim=True)):
    def function(net, x, index, n, sigma):
        noise = make_noise(n, x, sigma)
        return finish(torch.cat([gradient_of(net, (x + one).detach().requires_grad_(), index) for one in noise]))

    return function


def gaussian(n, x, sigma):
    return sigma * torch.randn(n, *x.shape)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (by_captum, None),
        (lambda *task: by_captum(*task, nt_samples_batch_size=2), None),
        (by_hand(gaussian), None),
        (lambda net, x, *task: (net(x), by_hand(gaussian)(net, x, *task))[1].numpy(), None),
        (lambda *task: by_captum(*task, abs=True), "is the mean of absolute gradients"),
        (lambda *task: by_captum(*task).abs(), "is the absolute value of the mean"),
        (lambda *task: by_captum(*task, nt_type="smoothgrad_sq"), "is the mean of squared gradients"),
        (lambda net, x, i, *task: by_captum(net, x, i - 1 if i else 1, *task), "belongs to another category"),
        (lambda net, x, i, n, sigma: by_captum(net, x, i, n, sigma**2), "has a standard deviation of 0.0"),
        (lambda net, x, i, n, sigma: by_captum(net, x, i, n, sigma**0.5), "not the variance"),
        (lambda net, x, i, n, sigma: by_captum(net, x, i, 5, sigma), "5 noisy copies went through the network; 6"),
        (lambda net, x, i, n, sigma: Saliency(net).attribute(x, target=i, abs=False), "No noisy copy of the picture"),
        (by_hand(gaussian, lambda gradients: gradients.sum(dim=0, keepdim=True)), "is the sum of the gradients"),
        (by_hand(gaussian, lambda gradients: gradients[-1:]), "is the gradient of the last copy alone"),
        (by_hand(lambda n, x, sigma: [sigma * torch.randn(x.shape)] * n), "Several pictures have the same noise"),
        (by_hand(lambda n, x, sigma: sigma * torch.randn(n, 1, 1, *x.shape[2:])), "the same in all channels"),
        (by_hand(lambda n, x, sigma: sigma * 12**0.5 * (torch.rand(n, *x.shape) - 0.5)), "Gaussian noise is wanted"),
        (by_hand(lambda n, x, sigma: sigma * 12**0.5 * torch.rand(n, *x.shape)), "The noise has a mean of"),
        (by_hand(gaussian, lambda gradients: gradients.mean(dim=0)), "has the shape"),
    ],
)
def test_smoothgrad(lab, answer, message, verdict):
    net, x, index, *_ = lab
    torch.manual_seed(0)
    verdict(lambda: checks.smoothgrad(answer, net, x, index, 6, 0.2), message)


class Reusing(torch.nn.Module):
    def __init__(self, rectify):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 4, 5), torch.nn.Conv2d(4, 4, 5)
        self.head = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
        self.rectify = rectify

    def forward(self, picture):
        return self.head(self.rectify(self.second(self.rectify(self.first(picture)))))


class OneEach(Reusing):
    def __init__(self, network):
        super().__init__(None)
        self.load_state_dict(network.state_dict())
        self.after_first, self.after_second = torch.nn.ReLU(), torch.nn.ReLU()

    def forward(self, picture):
        return self.head(self.after_second(self.second(self.after_first(self.first(picture)))))


def in_a_row(network, *between):
    return torch.nn.Sequential(network.first, between[0], network.second, between[1], network.head)


def with_functions(network):
    other = Reusing(torch.relu)
    other.load_state_dict(network.state_dict())
    return other


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda network: in_a_row(network, torch.nn.ReLU(), torch.nn.ReLU()), None),
        (OneEach, None),
        (lambda network: in_a_row(network, *[torch.nn.ReLU()] * 2), "is used 2 times"),
        (copy.deepcopy, "'rectify' is used 2 times"),
        (lambda network: network, "This is the network that fails"),
        (with_functions, "is a ReLU a function"),
        (lambda network: in_a_row(network, torch.nn.ReLU(), torch.nn.Identity()), "gives other scores"),
        (lambda network: Reusing(torch.nn.ReLU()), "gives other scores"),
        (lambda network: None, "A network is wanted"),
    ],
)
def test_cured(lab, answer, message, verdict):
    torch.manual_seed(0)
    network, x = Reusing(torch.nn.ReLU()).eval(), lab[1]
    verdict(lambda: checks.cured(answer(network), network, x, torch.full_like(x, -1)), message)


def test_deeplift_fails_on_a_relu_that_is_used_twice(lab):
    with pytest.raises(RuntimeError, match="being used more than once"):
        DeepLift(Reusing(torch.nn.ReLU())).attribute(lab[1], target=0)
