import copy
import functools

import numpy as np
import pytest
import torch
from captum.attr import DeepLift, InputXGradient, IntegratedGradients, NoiseTunnel, Saliency
from rehearsal import accelerator

from xai_helpers.attribution import attribute, occlude, rise
from xai_helpers.checkpoints import examples, load
from xai_helpers.scoring import score_table


class Corners(torch.nn.Module):
    """Scores of a picture of 16 x 16: the sums of its upper left and of its lower right quarter, over all channels."""

    def forward(self, pixel_values):
        corners = pixel_values[:, :, :8, :8], pixel_values[:, :, 8:, 8:]
        return torch.stack([corner.sum(dim=(1, 2, 3)) for corner in corners], dim=1)


def quarter(rows, columns):
    mask = np.zeros((16, 16), bool)
    mask[rows, columns] = True
    return mask


UPPER_LEFT, LOWER_RIGHT = quarter(slice(8), slice(8)), quarter(slice(8, 16), slice(8, 16))
ONES = torch.ones(1, 3, 16, 16)


@pytest.fixture(scope="module")
def resnet():
    model, processor = load("resnet", weights="bundled")
    return model, examples(model, processor, 20)


def test_the_gradient_of_a_sum_is_its_mask():
    np.testing.assert_array_equal(attribute(Corners(), ONES, [0, 1]), np.float32([UPPER_LEFT, LOWER_RIGHT]))


def test_channels_are_added_up_without_their_sign():
    class Signed(torch.nn.Module):
        def forward(self, pixel_values):  # gradients 3 and -1 at one pixel, 2 at another
            a, b = pixel_values[:, :, 2, 3], pixel_values[:, 0, 9, 9]
            return (3 * a[:, 0] - a[:, 1] + 2 * b)[:, None]

    heat = attribute(Signed(), ONES, 0)[0]
    assert heat[2, 3] == 1 and heat[9, 9] == pytest.approx(0.5) and heat.sum() == pytest.approx(1.5)


def test_what_speaks_for_a_category_is_kept_by_its_sign():
    class Signed(torch.nn.Module):
        def forward(self, pixel_values):  # attributions 3 and -1 at one pixel, -2 at another, 1 at a third
            a, b, c = pixel_values[:, :, 2, 3], pixel_values[:, 0, 9, 9], pixel_values[:, 0, 5, 5]
            return (3 * a[:, 0] - a[:, 1] - 2 * b + c)[:, None]

    heat = attribute(Signed(), ONES, 0, InputXGradient, sign="positive")[0]
    assert heat[2, 3] == 1 and heat[5, 5] == pytest.approx(0.5) and heat.sum() == pytest.approx(1.5)
    absolute = attribute(Signed(), ONES, 0, InputXGradient)[0]
    assert absolute[2, 3] == 1 and absolute[9, 9] == pytest.approx(0.5) and absolute[5, 5] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="sign is \"absolute\" or \"positive\", not 'signed'"):
        attribute(Signed(), ONES, 0, sign="signed")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Saliency, {}),
        (IntegratedGradients, {"n_steps": 4}),
        (lambda net: NoiseTunnel(Saliency(net)), {"nt_samples": 2}),
    ],
)
def test_attributions_are_captums_own(resnet, method, options):
    model, (example, *_) = resnet
    index = list(model.config.id2label.values()).index(example.categories[1])

    def logits(pixels):
        return model(pixels).logits

    engine = method(logits)
    torch.manual_seed(0)
    wanted = engine.attribute(example.pixel_values.clone().requires_grad_(), target=index, **options)
    wanted = wanted.detach().abs().sum(dim=1)[0].numpy()
    torch.manual_seed(0)
    found = attribute(model, example.pixel_values, example.categories[1], method, **options)[0]
    np.testing.assert_allclose(found, wanted / wanted.max(), atol=1e-4)


def test_occlusion_is_what_is_lost():
    """A window of 8 moved by 8 covers each quarter once: only one matters."""
    np.testing.assert_array_equal(
        occlude(Corners(), ONES, [0, 1], window=8, step=8), np.float32([UPPER_LEFT, LOWER_RIGHT])
    )
    # What raises the score when it is hidden is no evidence for it.
    assert not occlude(Corners(), -ONES, [0], window=8, step=8).any()


def test_all_categories_are_read_from_the_same_pictures():
    class Counting(Corners):
        pictures = 0

        def forward(self, pixel_values):
            self.pictures += len(pixel_values)
            return super().forward(pixel_values)

    for method, wanted in ((occlude, 7 * 7 + 1), (rise, 200)):
        model = Counting()
        method(model, ONES, [0, 1])
        assert model.pictures == wanted


@pytest.mark.parametrize(("size", "wanted"), [((3, 3), 9), ((4, 32), 15), ((32, 8), 7)])
def test_the_default_window_fits_into_every_picture(size, wanted):
    """Windows of 1, 4 and 8 pixels, moved by 1, 2 and 4, find 3 x 3, 1 x 15 and 7 x 1 places."""
    picture = torch.ones(1, 3, *size)

    class Sum(torch.nn.Module):
        pictures = 0

        def forward(self, pixel_values):
            self.pictures += len(pixel_values)
            return pixel_values.sum(dim=(1, 2, 3))[:, None]

    model = Sum()
    heat = occlude(model, picture, 0)[0]
    assert heat.shape == size and heat.min() > 0
    assert model.pictures == 1 + wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 17}, "window is a whole number from 1 to 16, not 17"),
        ({"window": 0}, "window is a whole number from 1 to 16, not 0"),
        ({"window": (4, 4)}, r"window is a whole number from 1 to 16, not \(4, 4\)"),
        ({"window": 4, "step": 5}, "step is a whole number from 1 to 4, not 5"),
        ({"step": 0}, "step is a whole number from 1 to 4, not 0"),
    ],
)
def test_a_window_that_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        occlude(Corners(), ONES, 0, **options)


def test_one_mask_tells_nothing():
    with pytest.raises(ValueError, match="n_masks is a whole number of at least 2, not 1"):
        rise(Corners(), ONES, 0, n_masks=1)


def test_random_masks_find_the_quarter_that_matters():
    maps = rise(Corners(), ONES, [0, 1], n_masks=500)
    assert maps.shape == (2, 16, 16) and maps.dtype == np.float32 and maps.max() == 1 and maps.min() >= 0
    for heat, mask in zip(maps, (UPPER_LEFT, LOWER_RIGHT), strict=True):
        assert mask.ravel()[heat.argmax()] and heat[mask].sum() > 0.6 * heat.sum()
    np.testing.assert_array_equal(maps, rise(Corners(), ONES, [0, 1], n_masks=500))
    assert np.abs(maps - rise(Corners(), ONES, [0, 1], n_masks=500, seed=1)).max() > 0.05


@pytest.mark.parametrize("size", [(8, 80), (80, 8)])
def test_random_masks_fit_a_picture_that_is_not_square(size):
    heat = rise(Corners(), torch.ones(1, 3, *size), 0, n_masks=500)[0]
    assert heat.shape == size and heat[:8, :8].max() == 1 and heat[:24, :24].sum() > 0.6 * heat.sum()


def test_a_constant_added_to_the_scores_changes_no_random_mask_map():
    class Raised(Corners):
        def forward(self, pixel_values):
            return super().forward(pixel_values) + 1000

    np.testing.assert_allclose(rise(Raised(), ONES, [0]), rise(Corners(), ONES, [0]), atol=1e-3)


def test_maps_of_a_trained_model_point_at_the_objects(resnet):
    model, scenes = resnet
    methods = {method.__name__: lambda x, names, m=method: m(model, x, names) for method in (attribute, occlude, rise)}
    table = score_table(methods, scenes)
    baseline = table.loc[["centre dot", "random map"], "pointing"].max()
    for name in methods:
        assert table.loc[name, "pointing"] > max(0.7, baseline + 0.3)
        assert table.loc[name, "on the other"] < 0.15


@pytest.mark.parametrize("method", [attribute, occlude, rise])
def test_a_model_is_left_as_it_was(resnet, method):
    model, (example, *_) = resnet
    model.train()
    try:
        method(model, example.pixel_values, example.categories)
        assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
        assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    finally:
        model.eval()


def test_deeplift_leaves_nothing_behind_when_it_is_interrupted(resnet):
    model, (example, *_) = resnet

    def interrupts(scores):
        raise KeyboardInterrupt

    before = [set(vars(module)) for module in model.modules()]
    with pytest.raises(KeyboardInterrupt):
        attribute(model, example.pixel_values, interrupts, DeepLift)
    assert [set(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize("method", [attribute, occlude, rise])
def test_bad_input_is_named(resnet, method):
    model, (example, *_) = resnet
    with pytest.raises(ValueError, match="no category 'dog'; the closest are"):
        method(model, example.pixel_values, "dog")
    with pytest.raises(ValueError, match="one image at a time"):
        method(model, example.pixel_values.repeat(2, 1, 1, 1), "cat")


def test_a_model_on_another_device_gets_the_same_maps(resnet):
    model, (example, *_) = resnet
    black = -torch.ones_like(example.pixel_values)
    calls = [
        functools.partial(attribute, method=IntegratedGradients, baselines=(black.double(),), n_steps=4),
        functools.partial(occlude, window=64),
        functools.partial(rise, n_masks=20),
    ]
    wanted = [call(model, example.pixel_values, example.categories) for call in calls]
    with accelerator() as device:
        there = copy.deepcopy(model).to(device)
        for pixel_values in (example.pixel_values, example.pixel_values.to(device)):
            maps = [call(there, pixel_values, example.categories) for call in calls]
            np.testing.assert_allclose(maps, wanted, atol=1e-3)


def test_balanced_attributions_are_signed_and_add_up_to_the_score():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, bias=False), torch.nn.SiLU(), torch.nn.GroupNorm(2, 8),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 3, bias=False),
    )  # fmt: skip
    x = torch.randn(1, 3, 12, 16)
    found = attribute(net, x, [0, 2], "balanced")
    assert found.shape == (2, 12, 16) and found.dtype == np.float32 and found.min() < 0 < found.max()
    np.testing.assert_allclose(found.sum(axis=(1, 2)), net(x)[0, [0, 2]].detach(), atol=1e-5)
    np.testing.assert_allclose(attribute(net, x, 2, "balanced", gamma=0)[0], found[1], atol=1e-6)  # no ReLU


def test_balanced_attributions_say_what_is_wrong():
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match='no method \'balance\': give "balanced", or a class of Captum'):
        attribute(net, x, 0, "balance")
    with pytest.raises(TypeError, match="n_steps"):
        attribute(net, x, 0, "balanced", n_steps=5)
    net[2].register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(ValueError, match="the scores have no gradient"):
        attribute(net, x, 0, "balanced")
