import numpy as np
import pandas as pd
import pytest
import torch
from rehearsal import accelerator

from xai_helpers.scoring import (
    Example,
    behind_best,
    blurred_away,
    bootstrap_interval,
    centre_dots,
    edge_maps,
    energy_inside,
    hits,
    likeness,
    perturbation_curves,
    random_maps,
    resize_masks,
    sanity_check,
    score_maps,
    score_table,
    strongest_inside,
    wilson_interval,
)

LEFT = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0]], bool)


def test_hit_is_a_maximum_on_the_object():
    on = [[0, 0, 0], [0.9, 0.8, 0], [0, 0, 0]]
    off = [[0.8, 0, 0], [0.8, 0.9, 0], [0.8, 0, 0]]  # more of it lies on the object, but not its maximum
    found = hits([on, off], [LEFT, LEFT])
    assert found.dtype == bool and found.tolist() == [True, False]


def test_a_zero_map_is_a_miss_without_energy():
    zero = np.zeros((1, 3, 3))
    whole = np.ones((1, 3, 3), bool)
    assert hits(zero, whole).tolist() == [False]
    assert energy_inside(zero, whole).tolist() == [0]


def test_nothing_lies_on_an_object_that_cannot_be_seen():
    maps, masks = np.ones((1, 3, 3)), np.zeros((1, 3, 3), bool)
    assert hits(maps, masks).tolist() == [False]
    assert energy_inside(maps, masks).tolist() == [0]


@pytest.mark.parametrize(
    ("peaks", "hit"),
    [
        ([(0, 0), (1, 0), (2, 2)], True),  # two of three on the object
        ([(0, 0), (2, 2)], False),  # as many on it as off it
        ([(0, 0), (1, 1), (2, 2)], False),
    ],
)
def test_of_equal_maxima_most_must_lie_on_the_object(peaks, hit):
    heat = np.full((1, 3, 3), 0.2)
    for peak in peaks:
        heat[0][peak] = 0.7
    assert hits(heat, LEFT[None]).tolist() == [hit]


def test_energy_is_the_share_inside():
    maps = [[[1, 0, 0], [2, 1, 0], [0, 0, 4]], [[0, 0, 0], [0, 5, 0], [0, 0, 0]], [[3, 0, 0], [0, 0, 0], [0, 0, 0]]]
    np.testing.assert_allclose(energy_inside(maps, [LEFT, LEFT, LEFT]), [3 / 8, 0, 1])


def test_each_map_has_its_own_mask():
    heat = np.eye(3)[[0]].T @ np.eye(3)[[2]]  # the upper right pixel
    right = LEFT[:, ::-1]
    assert hits([heat, heat], [LEFT, right]).tolist() == [False, True]
    assert energy_inside([heat, heat], [LEFT, right]).tolist() == [0, 1]


def test_masks_come_to_the_size_of_the_maps():
    # Blocks of 2 x 2 pixels with 4, 2, 1 and 0 of them inside: half is enough.
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    assert resize_masks(mask[None], 2, 2).tolist() == [[[True, True], [False, False]]]
    heat = np.array([[[1, 2], [4, 8]]])
    np.testing.assert_allclose(energy_inside(heat, mask[None]), [3 / 15])
    assert hits(heat, mask[None]).tolist() == [False]
    assert hits(heat, ~mask[None]).tolist() == [True]


def test_masks_are_brought_to_other_proportions():
    mask = np.zeros((1, 6, 4), bool)
    mask[0, :3, :2] = True  # the upper left quarter
    wanted = np.zeros((1, 4, 8), bool)
    wanted[0, :2, :4] = True
    np.testing.assert_array_equal(resize_masks(mask, 4, 8), wanted)
    assert resize_masks(np.zeros((0, 6, 4), bool), 4, 8).shape == (0, 4, 8)


@pytest.mark.parametrize("score", [hits, energy_inside])
def test_what_is_no_pair_of_maps_and_masks_is_named(score):
    maps, masks = np.ones((2, 3, 3)), np.ones((2, 3, 3), bool)
    for wrong in ((maps, masks[:1]), (maps[0], masks[0]), (maps, masks[0])):
        with pytest.raises(ValueError, match="do not pair up.*one mask a map"):
            score(*wrong)
    with pytest.raises(ValueError, match=r"\(2, 3, 3\) and masks of shape \(1, 3, 3\)"):
        score(maps, masks[:1])
    for value in (-0.1, np.nan, np.inf):
        maps[1, 2, 2] = value
        with pytest.raises(ValueError, match="finite and not negative"):
            score(maps, masks)


def test_which_map_is_strongest_inside():
    maps = [[[0.9, 0.1], [0.5, 0.5]], [[0.1, 0.9], [0.4, 0.6]]]  # the first rules the left, the second the right
    top, left, nothing = [[1, 1], [0, 0]], [[1, 0], [1, 0]], [[0, 0], [0, 0]]
    found = strongest_inside(maps, np.array([top, left, nothing], bool))
    np.testing.assert_allclose(found, [[0.5, 1, np.nan], [0.5, 0, np.nan]])
    large = np.kron(np.array([top, left]), np.ones((1, 3, 3))).astype(bool)
    np.testing.assert_allclose(strongest_inside(maps, large), [[0.5, 1], [0.5, 0]])


def test_random_maps():
    maps = random_maps(3, 40, 64, seed=5)
    assert maps.shape == (3, 40, 64) and maps.dtype == np.float32
    np.testing.assert_array_equal(maps.min(axis=(1, 2)), 0)
    np.testing.assert_array_equal(maps.max(axis=(1, 2)), 1)
    np.testing.assert_array_equal(maps, random_maps(3, 40, 64, seed=5))
    assert np.abs(maps - random_maps(3, 40, 64, seed=6)).mean() > 0.1
    assert np.abs(maps[0] - maps[1]).mean() > 0.1


def test_maxima_of_random_maps_lie_everywhere():
    peaks = [random_maps(1, 32, 32, seed)[0].argmax() for seed in range(200)]
    rows, columns = np.unravel_index(peaks, (32, 32))
    quarters = np.bincount(2 * (rows >= 16) + (columns >= 16), minlength=4)
    assert (quarters > 25).all()  # 50 each are expected, with a standard deviation of 6


def test_centre_dots():
    maps = centre_dots(2, 601, 301)
    assert maps.shape == (2, 601, 301) and maps.dtype == np.float32
    np.testing.assert_array_equal(maps[0], maps[1])
    assert np.unravel_index(maps[0].argmax(), maps[0].shape) == (300, 150) and maps.max() == 1
    # A sixth of the side is one standard deviation of a Gaussian.
    assert maps[0, 300 + 100, 150] == pytest.approx(np.exp(-0.5), abs=2e-3)
    assert maps[0, 300, 150 - 50] == pytest.approx(np.exp(-0.5), abs=4e-3)
    assert maps[0, 300 - 200, 150] == pytest.approx(np.exp(-2), abs=2e-3)


def example(*boxes):
    """A picture of 4 x 4 pixels with a box (rows, columns) an object."""
    masks = np.zeros((len(boxes), 4, 4), bool)
    for mask, (rows, columns) in zip(masks, boxes, strict=True):
        mask[rows, columns] = True
    return Example(torch.zeros(1, 3, 4, 4), ["cat", "coin"], masks)


def test_score_table_worked_out_by_hand():
    left, right, middle, top = (slice(None), slice(0, 2)), (slice(None), slice(2, 4)), (slice(1, 3),) * 2, (0, slice(4))
    examples = [example(left, right), example(middle, top)]
    maps = np.zeros((2, 2, 4, 4), np.float32)
    maps[0, 0, 1, 0] = 1  # on its object, all of it
    maps[0, 1, 2, 1] = 0.5  # on the other object, all of it
    maps[1, 0, 1, 1], maps[1, 0, 3, 3] = 0.6, 0.4  # on its object by 0.6, beside both by 0.4
    # maps[1, 1] is zero everywhere
    asked = []

    def method(pixel_values, categories):
        asked.append((tuple(pixel_values.shape), categories))
        return maps[len(asked) - 1]

    table = score_table({"mine": method}, examples)
    assert asked == [((1, 3, 4, 4), ["cat", "coin"])] * 2
    assert list(table.index) == ["mine", "centre dot", "random map"]
    assert (table["maps"] == 4).all()
    assert table.loc["mine", "pointing"] == pytest.approx(2 / 4)
    assert table.loc["mine", "energy"] == pytest.approx((1 + 0 + 0.6 + 0) / 4)
    assert table.loc["mine", "on the other"] == pytest.approx(1 / 4)
    asked.clear()
    single = score_maps({"mine": method}, examples).loc["mine"]
    assert list(single.index) == [(0, "cat"), (0, "coin"), (1, "cat"), (1, "coin")]
    assert single["pointing"].tolist() == [1, 0, 1, 0] and single["on the other"].tolist() == [0, 1, 0, 0]
    assert single["energy"].tolist() == pytest.approx([1, 0, 0.6, 0])
    # The dot's maximum is the four pixels in the middle: half of them on the left and half on the right are no hit,
    # all of them are on the object in the middle and on the other object of the one at the top.
    assert table.loc["centre dot", "pointing"] == pytest.approx(1 / 4)
    assert table.loc["centre dot", "on the other"] == pytest.approx(1 / 4)


def test_seconds_are_those_of_the_call(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("xai_helpers.scoring.time.perf_counter", lambda: clock[0])

    def method(pixel_values, categories):
        clock[0] += 1.5 if clock[0] else 0.5
        return np.ones((2, 4, 4))

    halves = example((slice(0, 2), slice(4)), (slice(2, 4), slice(4)))
    scores = score_maps({"slow": method}, [halves, halves])
    assert scores["seconds"].xs("slow").tolist() == [0.5, 0.5, 1.5, 1.5]
    assert scores["seconds"].xs("centre dot").tolist() == [0] * 4


def test_maps_that_are_made_already_score_as_their_method_does():
    examples = [
        Example(torch.zeros(1, 3, 2, 2), ["cat", "cup"], np.array([[[1, 0], [0, 0]], [[0, 1], [1, 1]]], bool)),
        Example(torch.zeros(1, 3, 2, 2), ["cup", "cat"], np.array([[[0, 0], [0, 1]], [[1, 1], [0, 0]]], bool)),
    ]
    maps = [
        torch.tensor([[[0.9, 0.1], [0, 0]], [[0.5, 0.3], [0.2, 0]]]),
        np.array([[[0.5, 0], [0, 0.5]], [[0, 1], [0, 0]]]),
    ]
    scores = score_maps({"mine": maps}, examples)
    mine = scores.loc["mine"]
    assert mine["pointing"].tolist() == [1, 0, 0, 1]  # a maximum that is shared with another place is no hit
    np.testing.assert_allclose(mine["energy"], [0.9, 0.5, 0.5, 1], rtol=1e-6)
    assert mine["seconds"].isna().all() and scores.loc["random map", "seconds"].notna().all()
    with pytest.raises(ValueError, match="'mine': 1 arrays of maps for 2 examples"):
        score_maps({"mine": maps[:1]}, examples)


def test_scores_of_the_baselines_do_not_depend_on_the_methods_beside_them():
    examples = [example((slice(0, 2), slice(4)), (slice(2, 4), slice(4)))] * 5
    alone = score_table({}, examples)
    beside = score_table({"ones": lambda pixel_values, categories: np.ones((2, 4, 4))}, examples)
    np.testing.assert_array_equal(alone, beside.loc[["centre dot", "random map"]])


def test_bootstrap_interval_worked_out_by_hand():
    # The mean of 4 redrawn values of [0, 0, 0, 4] is the number of fours among them: binomial, n = 4, p = 1/4. It is 0
    # with probability .316, at most 2 with .949, at most 3 with .996.
    assert bootstrap_interval([0, 0, 0, 4]) == (0, 3)
    # At most 1 with .738, so the quantiles .3 and .7 are 0 and 1.
    assert bootstrap_interval([0, 0, 0, 4], level=0.4) == (0, 1)
    assert bootstrap_interval([2.5] * 7) == (2.5, 2.5)


def test_bootstrap_interval_of_many_values_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(3, 2, 400)
    half = 1.96 * values.std() / 400**0.5
    low, high = bootstrap_interval(values, n=20_000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_an_interval_holds_the_true_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).random((300, 60)) < 0.7
    intervals = [bootstrap_interval(some, n=400) for some in draws]
    assert 0.89 < np.mean([low <= 0.7 <= high for low, high in intervals]) < 0.99


@pytest.mark.parametrize("wrong", [[], [[1, 2], [3, 4]], [1, np.nan], 3])
def test_bootstrap_interval_wants_a_number_a_scene(wrong):
    with pytest.raises(ValueError, match=r"\(n_scenes,\).*average the maps of a scene first"):
        bootstrap_interval(wrong)


def test_wilson_interval_worked_out_by_hand():
    # Of 4 with a half: 1.96 * sqrt(1/16 + 1.96²/64) / (1 + 1.96²/4) = 0.35 to both sides.
    assert wilson_interval(0.5, 4) == pytest.approx((0.15, 0.85), abs=1e-3)
    assert wilson_interval(1, 100) == pytest.approx((100 / (100 + 1.96**2), 1), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0, 1.96**2 / (10 + 1.96**2)), abs=1e-4)


def test_the_best_and_those_behind_it_on_the_scenes_that_all_had():
    by_scene = {
        "a": [(1, 0), (1, 1), (0, 0), (0, 0)],
        "b": [(1, 1), (1, 1), (0, 0)],
        "c": [(0, 0), (0, 0), (0, 0), (1, 1)],
    }
    rows = {
        (method, scene, category): value
        for method, scenes in by_scene.items()
        for scene, both in enumerate(scenes)
        for category, value in zip("xy", both, strict=True)
    }
    index = pd.MultiIndex.from_tuples(rows, names=["method", "scene", "category"])
    table = behind_best(pd.DataFrame({"pointing": rows.values()}, index, dtype=float), ["a", "b", "c"])
    # b has 1, 1, 0 in the three scenes, a has 1/2, 1, 0, and c has 0, 0, 0; the fourth scene is not b's.
    assert list(table.index) == ["b", "a", "c"]
    assert table["pointing"].tolist() == pytest.approx([2 / 3, 1 / 2, 0])
    assert table["behind"].tolist() == pytest.approx([0, 1 / 6, 2 / 3])
    assert table.loc["b", ["from", "to"]].tolist() == [0, 0]
    # a: of three gaps 1/2, 0, 0 none is drawn with probability 8/27, all three with 1/27, above 2.5 %.
    assert table.loc["a", ["from", "to"]].tolist() == pytest.approx([0, 1 / 2])


def left_pixels(pictures):
    """The sum over the two pixels on the left."""
    return pictures[:, 0, :, 0].sum(dim=1)


def test_deletion_and_insertion_worked_out_by_hand():
    # 2 x 2 pixels; the score sums the left ones, 3 and 5. The map's order: 5, 7, 3, 1. The baseline is 10 everywhere.
    picture = torch.tensor([[3.0, 1.0], [5.0, 7.0]]).expand(1, 3, 2, 2)
    heat = [[0.2, 0.1], [0.9, 0.5]]
    deletion, insertion = perturbation_curves(left_pixels, picture, heat, baseline=10, steps=4)
    assert deletion.tolist() == [8, 13, 13, 20, 20]
    assert insertion.tolist() == [20, 15, 15, 8, 8]
    halves, _ = perturbation_curves(left_pixels, picture, heat, baseline=torch.full((1, 3, 1, 1), 10.0), steps=2)
    assert halves.tolist() == [8, 13, 20]


def test_equal_values_change_one_after_the_other_in_random_order():
    picture, flat = torch.ones(1, 3, 8, 8), np.zeros((8, 8))
    curves = [
        perturbation_curves(lambda x: x[:, 0, :, :4].sum(dim=(1, 2)), picture, flat, 0, steps=2, seed=seed)[0]
        for seed in range(40)
    ]
    # Half of the 64 pixels are gone in the middle, and with them about half of the 32 on the left.
    middle = [curve[1] for curve in curves]
    assert len(set(middle)) > 3 and np.mean(middle) == pytest.approx(16, abs=1.5)
    assert {curve[0] for curve in curves} == {32} and {curve[2] for curve in curves} == {0}


def test_a_map_of_another_size_than_the_picture_is_named():
    with pytest.raises(ValueError, match=r"shape \(4, 4\) for a picture of \(8, 8\) pixels"):
        perturbation_curves(left_pixels, torch.ones(1, 3, 8, 8), np.ones((4, 4)), 0)


def test_an_object_is_replaced_by_the_mean_of_its_surroundings_near_ones_first():
    # Left half 1, right half 3, and an object of 100 in the middle: at its left edge the fill is nearer to 1.
    picture = torch.ones(1, 3, 64, 64)
    picture[..., 32:] = 3
    mask = np.zeros((64, 64), bool)
    mask[24:40, 24:40] = True
    picture[..., torch.from_numpy(mask)] = 100
    before = picture.clone()
    found = blurred_away(picture, mask)
    assert torch.equal(picture, before) and found.dtype == picture.dtype and found.shape == picture.shape
    assert torch.equal(found[..., torch.from_numpy(~mask)], picture[..., torch.from_numpy(~mask)])
    inside = found[0, 0, 24:40, 24:40].numpy()
    assert 1 < inside.min() and inside.max() < 3
    assert (np.diff(inside, axis=1) > 0).all()  # from left to right
    np.testing.assert_allclose(inside + inside[:, ::-1], 4, atol=1e-4)  # by symmetry, 2 in the middle
    # A mask of another size is brought to the picture's, and so is one channel.
    coarse = blurred_away(picture[:, :1], mask[::2, ::2])
    torch.testing.assert_close(coarse, found[:, :1])


def test_an_object_is_blurred_away_on_any_device():
    picture, mask = torch.rand(1, 3, 16, 16), np.zeros((16, 16), bool)
    mask[:8, :8] = True
    with accelerator() as device:
        there = blurred_away(picture.to(device), torch.from_numpy(mask).to(device))
        assert there.device.type == device.type
        np.testing.assert_allclose(there.numpy(force=True), blurred_away(picture, mask).numpy())


def test_edges_are_where_brightness_changes():
    pixels = torch.zeros(1, 3, 40, 40)
    pixels[:, :, :, 20:] = 1
    maps = edge_maps(2, pixels)
    assert maps.shape == (2, 40, 40) and maps.dtype == np.float32 and (maps[0] == maps[1]).all()
    assert maps.max() == 1 and maps[0][:, [19, 20]].min() > 0.9 and maps[0][:, [5, 35]].max() < 1e-3
    assert not edge_maps(1, torch.ones(1, 3, 40, 40)).any()


def test_likeness_is_the_rank_correlation_where_both_are_above_zero():
    rng = np.random.default_rng(0)
    a = rng.random((10, 10)) + 0.1
    assert likeness(a, a**3) == pytest.approx(1) and likeness(a, 1 / a) == pytest.approx(-1)
    b = a.copy()
    b[:3] = 0  # left out: what is zero in either map
    assert likeness(a, b) == pytest.approx(1) and likeness(b, a) == pytest.approx(1)
    b[:5], b[5, 0] = 0, 0  # 49 pixels are left
    assert np.isnan(likeness(a, b))


class TwoParts(torch.nn.Module):
    """A body that brightens the left half, and a head that the map may or may not depend on."""

    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Linear(4, 2)

    def forward(self, pixels):
        return self.head(self.body(pixels).mean(dim=(2, 3)))


def test_a_map_fails_the_sanity_check_if_it_does_not_need_the_destroyed_part():
    torch.manual_seed(0)
    model = TwoParts()
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def of_body(net, x):
        return net.body(x).detach()[0].abs().sum(dim=0).numpy()[None]

    def of_head(net, x):
        return (net.head.weight.detach()[0, :, None, None] * net.body(x).detach()[0]).sum(dim=0).abs().numpy()[None]

    def methods_of(net):
        return {
            "of the picture": lambda x, names: x[0].abs().sum(dim=0).numpy()[None],
            "of the body": lambda x, names: of_body(net, x),
            "of both": lambda x, names: of_head(net, x),
        }

    examples = [Example(torch.randn(1, 3, 16, 16), ["a"], np.ones((1, 16, 16), bool)) for _ in range(3)]
    state = torch.get_rng_state()
    table = sanity_check(model, {"the head": "head", "the body": "body"}, methods_of, examples)
    assert list(table.index) == ["the head", "the body"]
    assert table["of the picture"].tolist() == pytest.approx([1, 1])
    assert table.loc["the head", "of the body"] == pytest.approx(1) and table.loc["the body", "of the body"] < 0.95
    assert table["of both"].max() < 0.9
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_the_sanity_check_averages_over_copies_with_weights_of_their_own():
    torch.manual_seed(7)  # not one of the copies' own
    model, seen = torch.nn.Sequential(torch.nn.Linear(6, 1), torch.nn.Linear(1, 1)), []
    picture = Example(torch.ones(1, 3, 9, 9), ["a"], np.ones((1, 9, 9), bool))

    def methods_of(net):
        seen.append(net[0].weight.detach().clone())
        rising = np.arange(1.0, 82).reshape(1, 9, 9)
        turned = net is not model and len(seen) % 2 == 1
        return {
            "turned in one copy of two": lambda x, names: rising[:, ::-1, ::-1] if turned else rising,
            "empty in one copy of two": lambda x, names: rising * (0 if turned else 1),
            "always empty": lambda x, names: rising * 0,
        }

    table = sanity_check(model, {"the first layer": "0"}, methods_of, [picture, picture], seeds=2)
    assert len(seen) == 3 and torch.equal(seen[0], model[0].weight)
    assert not any(torch.equal(seen[i], seen[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert table.loc["the first layer"].tolist() == pytest.approx([0, 1, np.nan], nan_ok=True)


def test_a_map_that_is_not_finite_gives_no_order():
    heat = np.ones((8, 8))
    heat[3, 3] = np.nan
    with pytest.raises(ValueError, match="values that are not finite"):
        perturbation_curves(left_pixels, torch.ones(1, 3, 8, 8), heat, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_edges_and_curves_of_pictures_in_other_precisions(dtype):
    pixels = torch.zeros(1, 3, 8, 8)
    pixels[:, :, :, 4:] = 1
    np.testing.assert_array_equal(edge_maps(1, pixels.to(dtype)), edge_maps(1, pixels))
    heat = np.arange(64.0).reshape(8, 8)
    found, wanted = (perturbation_curves(left_pixels, x, heat, 1, steps=4) for x in (pixels.to(dtype), pixels))
    np.testing.assert_array_equal(found, wanted)


def test_no_maps_are_no_hits():
    nothing = np.zeros((0, 8, 8))
    assert hits(nothing, nothing).shape == energy_inside(nothing, np.zeros((0, 9, 9), bool)).shape == (0,)


def test_maps_may_be_tensors_on_any_device():
    maps, masks = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 4, 6, dtype=bool)
    masks[0, :, :3], masks[1, :, 3:] = True, True
    with accelerator() as device:
        there, there_masks = maps.to(device), masks.to(device)
        for score in (hits, energy_inside, strongest_inside):
            for some in (there, list(there)):
                np.testing.assert_array_equal(score(some, there_masks), score(maps.numpy(), masks.numpy()))
        many = torch.rand(2, 10, 10, generator=torch.Generator().manual_seed(0))
        assert likeness(many[0].to(device), many[1]) == likeness(*many.numpy())


def test_curves_and_edges_of_a_picture_on_any_device():
    pixels = torch.zeros(1, 3, 8, 8)
    pixels[:, :, :, 4:] = 1
    heat = np.arange(64.0).reshape(8, 8)
    black = torch.full((1, 3, 1, 1), -1.0, dtype=torch.float64)
    wanted = perturbation_curves(left_pixels, pixels, heat, black, steps=4)
    with accelerator() as device:
        there = pixels.to(device)
        np.testing.assert_array_equal(edge_maps(1, there), edge_maps(1, pixels))
        found = perturbation_curves(
            left_pixels, there, torch.tensor(heat, dtype=torch.float32).to(device), black, steps=4
        )
        np.testing.assert_allclose(found, wanted)


def test_the_sanity_check_of_a_model_elsewhere_leaves_the_random_state():
    torch.manual_seed(0)
    model, example = TwoParts(), Example(torch.randn(1, 3, 16, 16), ["a"], np.ones((1, 16, 16), bool))

    def methods_of(net):
        return {"body": lambda x, names: net.body(x).abs().sum(dim=1).detach()}  # a tensor on the model's device

    with accelerator() as device:
        example.pixel_values = example.pixel_values.to(device)
        state = torch.get_rng_state()
        table = sanity_check(model.to(device), {"the head": "head", "the body": "body"}, methods_of, [example], seeds=1)
        assert torch.equal(torch.get_rng_state(), state)
    assert table.loc["the head", "body"] == pytest.approx(1) and table.loc["the body", "body"] < 0.95


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
def test_the_sanity_check_leaves_the_accelerators_random_state():
    device = torch.get_device_module(torch.accelerator.current_accelerator())
    state = device.get_rng_state()
    sanity_check(TwoParts(), {"the head": "head"}, lambda net: {}, [])
    assert torch.equal(device.get_rng_state(), state)
