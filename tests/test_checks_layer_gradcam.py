"""Each check of the lab on Layer Grad-CAM takes right answers and says what is wrong with others."""

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam

from xai_helpers.checkpoints import examples, load
from xai_helpers.checks import Wrong
from xai_helpers.checks import layer_gradcam as checks
from xai_helpers.wrappers import LogitsModel, category_index


@pytest.fixture(scope="module")
def lab():
    model, processor = load("resnet", weights="bundled")
    (example,) = examples(model, processor, 1)
    net, layer = LogitsModel(model), model.resnet.encoder.stages[-1]
    index, other = (category_index(model, name) for name in example.categories)
    return net, layer, example.pixel_values, index, other


def captum(lab, index=None, **options):
    net, layer, x, right, _ = lab
    return LayerGradCam(net, layer).attribute(x, target=right if index is None else index, **options)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda lab: captum(lab), None),
        (lambda lab: captum(lab).detach().numpy(), None),
        (lambda lab: captum(lab).transpose(2, 3), "is transposed"),
        (lambda lab: -captum(lab), "has the opposite sign"),
        (lambda lab: captum(lab, lab[4]), "belongs to another category"),
        (lambda lab: captum(lab, relu_attributions=True), "has no negative values"),
        (lambda lab: captum(lab).abs(), "has lost its sign"),
        (lambda lab: captum(lab) / captum(lab).max(), "the right pattern on another scale"),
        (lambda lab: captum(lab)[0], r"has the shape \(1, 8, 8\); \(1, 1, 8, 8\) is wanted"),
        (lambda lab: torch.rand(1, 1, 8, 8), "is not right: its correlation"),
        (lambda lab: None, "The evidence is None: give it a value"),
    ],
)
def test_evidence(lab, answer, message, verdict):
    # asked about the other category first, whose neighbour in the model's list the check compares with
    net, layer, x, index, other = lab
    if message == "belongs to another category":
        lab = (net, layer, x, index, index - 1 if index else 1)
    verdict(lambda: checks.evidence(answer(lab), net, layer, x, index), message)


def channels(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(6, 4, 4, generator=draw), torch.randn(6, 4, 4, generator=draw)


def in_loops(activations, gradients):
    total = np.zeros(activations.shape[1:])
    weights = [float(gradient.sum()) / gradient.numel() for gradient in gradients]
    for weight, channel in zip(weights, activations.numpy(), strict=True):
        total += weight * channel
    return weights, total


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a, g: (g.mean((1, 2)), (g.mean((1, 2))[:, None, None] * a).sum(0)), None),
        (in_loops, None),
        (lambda a, g: (g.sum((1, 2)), (g.sum((1, 2))[:, None, None] * a).sum(0)), "is the sum of the gradients"),
        (lambda a, g: (a.mean((1, 2)), (a * g).sum(0)), "is the mean of the activations"),
        (lambda a, g: (g.mean((1, 2)), (a * g).sum(0)), "multiplies every activation by its own gradient"),
        (lambda a, g: (g.mean((1, 2)), (g.mean((1, 2))[:, None, None] * g).sum(0)), "weighs the gradients"),
        (lambda a, g: (g.mean((1, 2)), (g.mean((1, 2))[:, None, None] * a).sum(0).T), "is transposed"),
        (lambda a, g: (g.mean((1, 2)), a.sum(0)), "is the plain sum of the channels"),
        (lambda a, g: (g.mean((0, 1)), a.sum(0)), r"has the shape \(4,\); \(6,\) is wanted"),
    ],
)
def test_by_hand(answer, message, verdict):
    verdict(lambda: checks.by_hand(*answer(*channels()), *channels()), message)


def enlarge(evidence, size, mode="bilinear"):
    return torch.nn.functional.interpolate(evidence.detach(), size, mode=mode)[0, 0]


def unit(values):
    return values / values.max()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda e, *size: unit(LayerAttribution.interpolate(e, size, "bilinear")[0, 0].clamp(min=0)), None),
        (lambda e, *size: np.maximum(0, enlarge(unit(e), size).numpy()) / enlarge(unit(e), size).max().item(), None),
        (lambda e, *size: unit(enlarge(e, size, "nearest").relu()), "is made of squares"),
        (lambda e, *size: enlarge(e, size).relu(), "the largest value"),
        (lambda e, *size: unit(enlarge(e, size)), "goes down to"),
        (lambda e, *size: unit(enlarge(e, size) - enlarge(e, size).min()), "is shifted up until its lowest value is 0"),
        (lambda e, *size: unit(enlarge(e, size).abs()), "shows absolute values"),
        (lambda e, *size: unit(enlarge(e.relu(), size)), "was cut off at zero before it was enlarged"),
        (lambda e, *size: unit(enlarge(e, size).relu()).T, r"has the shape"),
        (lambda e, *size: unit(torch.rand(size)), "is not right: its correlation"),
    ],
)
def test_heat_map(answer, message, verdict):
    evidence = torch.randn(1, 1, 5, 6, generator=torch.Generator().manual_seed(1))
    verdict(lambda: checks.heat_map(answer, evidence), message)


def test_where_everything_speaks_for_it_the_absolute_value_is_right_too():
    evidence = torch.rand(1, 1, 5, 6, generator=torch.Generator().manual_seed(2)) + 0.5
    for function in (lambda e, *size: unit(enlarge(e, size).relu()), lambda e, *size: unit(enlarge(e, size)).numpy()):
        checks.heat_map(function, evidence)


def test_on_the_object(verdict):
    mask = np.zeros((8, 8), bool)
    mask[:4] = True
    inside = np.where(mask, 1.0, 0.25)  # 32 of 40 inside
    verdict(lambda: checks.on_the_object(inside, mask), None)
    verdict(lambda: checks.on_the_object(torch.tensor(inside), np.kron(mask, np.ones((2, 2), bool))), None)
    verdict(lambda: checks.on_the_object(inside.T, mask), "its largest value outside the object")
    verdict(lambda: checks.on_the_object(1.25 - inside, mask), "its largest value outside the object")
    verdict(lambda: checks.on_the_object(inside / 2, mask), "the largest value 0.5: divide it by that")
    flat = np.full((8, 8), 0.9)
    flat[0, 0] = 1
    small = np.zeros((8, 8), bool)
    small[0, :3] = True
    verdict(lambda: checks.on_the_object(flat, small), "has 5% of its energy inside the object; 50% is wanted")


def test_a_map_without_evidence():
    checks.nothing_speaks_for_it(lambda evidence, *size: torch.zeros(size))
    with pytest.raises(Wrong, match="is not zero: cut off at zero before you divide"):
        checks.nothing_speaks_for_it(lambda evidence, *size: unit(-enlarge(evidence, size)))
    with pytest.raises(Wrong, match="Is there a division by zero"):
        checks.nothing_speaks_for_it(lambda evidence, *size: unit(enlarge(evidence, size).relu()))


def both(values):
    return torch.stack([values.relu(), (-values).relu()])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda values: both(values), None),
        (lambda values: [np.maximum(values.numpy(), 0), np.maximum(-values.numpy(), 0)], None),
        (lambda values: both(values).flip(0), "has the two in the wrong order"),
        (lambda values: torch.stack([values.relu(), values.clamp(max=0)]), "has a negative second map"),
        (lambda values: torch.stack([values, -values]), "has the whole evidence and its opposite"),
        (lambda values: both(values).swapaxes(1, 2), "is transposed"),
        (lambda values: both(values) / values.max(), "the right pattern on another scale"),
        (lambda values: values.relu(), "has the shape"),
    ],
)
def test_for_and_against(lab, answer, message, verdict):
    net, layer, x, index, _ = lab

    def function(picture, category):
        return answer(captum((net, layer, picture, category, None))[0, 0].detach())

    verdict(lambda: checks.for_and_against(function, net, layer, x, index), message)
