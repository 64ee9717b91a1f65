import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from rehearsal import accelerator
from skimage.color import rgb2lab

from xai_helpers.concepts import Concepts
from xai_helpers.plots import (
    CONCEPT_COLOURS,
    DIM,
    HEAT,
    HEAT_AGAINST,
    OPACITY,
    SIGNED,
    compare_maps,
    outline_boxes,
    overlay,
    show_concepts,
    show_maps,
    show_scores,
)


@pytest.fixture(autouse=True)
def no_windows():
    plt.switch_backend("agg")
    yield
    plt.close("all")


def flat(width=48, height=32, colour=(128, 128, 128)):
    return Image.new("RGB", (width, height), colour)


def panels(figure):
    """The axes with a picture in them; the colour bar has none."""
    return [ax for ax in figure.axes if ax.get_images()]


def lightness(pixels):
    """CIE L*, 0 for black and 100 for white."""
    return rgb2lab(np.asarray(pixels) / 255)[..., 0]


def test_a_zero_map_leaves_the_dimmed_grey_picture():
    # ITU-R 601: 0.299 R + 0.587 G + 0.114 B.
    found = overlay(flat(colour=(200, 100, 50)), np.zeros((4, 6)))
    assert found.dtype == np.uint8 and found.shape == (32, 48, 3)
    assert (np.abs(found - 255 * (0.04 + 0.36 * (0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255)) <= 1).all()


@pytest.mark.parametrize("grey", [0, 64, 128, 192, 255])
@pytest.mark.parametrize("colours", [HEAT, HEAT_AGAINST])
def test_the_higher_the_lighter_on_any_ground(grey, colours):
    low, high = DIM
    ground = low + (high - low) * grey / 255
    seen = OPACITY[:, None] * colours + (1 - OPACITY[:, None]) * ground
    steps = np.diff(lightness(255 * seen)[::15])  # 17 of them
    assert (steps > 0.7).all()
    if grey == 128:  # on a middling ground, evenly
        assert steps.max() < 1.4 * steps.min()


def test_overlay_goes_from_the_ground_to_the_last_colour():
    ramp = np.linspace(0, 1, 256)[None].repeat(2, axis=0)
    found = overlay(flat(256, 2), ramp)[0]
    ground = 0.04 + 0.36 * 128 / 255
    np.testing.assert_allclose(found[0] / 255, ground, atol=0.005)
    np.testing.assert_allclose(found[-1] / 255, 0.9 * np.array(to_rgb("#f7f770")) + 0.1 * ground, atol=0.005)


# What the colour-blind see, in linear RGB (Machado et al., 2009, severity 1).
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def as_seen_with(blindness, colours):
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.transpose(BLINDNESS[blindness]), 0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_the_colour_blind_see_the_same_order_and_both_signs(blindness):
    for_it, against_it = (
        rgb2lab(as_seen_with(blindness, OPACITY[:, None] * colours + (1 - OPACITY[:, None]) * np.mean(DIM)))[::15]
        for colours in (HEAT, HEAT_AGAINST)
    )
    for seen in (for_it, against_it):
        assert (np.diff(seen[:, 0]) > 1).all()  # CIE L*
    apart = np.linalg.norm(for_it - against_it, axis=1)
    assert (apart[3:] > 20).all()  # CIE76: 2.3 can just be noticed


def test_what_speaks_against_has_the_cold_colours():
    ramp = np.linspace(-1, 1, 511, dtype=np.float32)[None].repeat(2, axis=0)
    found = overlay(flat(511, 2), ramp)[0]
    np.testing.assert_array_equal(found[255:], overlay(flat(256, 2), ramp[:, 255:])[0])
    ground = 0.04 + 0.36 * 128 / 255
    np.testing.assert_allclose(found[0] / 255, 0.9 * np.array(to_rgb("#85ffff")) + 0.1 * ground, atol=0.005)
    np.testing.assert_allclose(found[255] / 255, ground, atol=0.005)
    # As a colour map, over a middling grey: the same.
    np.testing.assert_allclose(SIGNED([0.0, 1.0])[:, :3], found[[0, -1]] / 255, atol=0.005)


def test_a_signed_map_is_scored_by_what_speaks_for_the_category():
    signed = MAPS.copy()
    signed[0, 3] = -0.9
    figure = show_maps(flat(), signed, ["cat"], ANSWER)
    assert [ax.get_title() for ax in panels(figure)][1:] == ["cat\nhit, 75% inside"]
    assert figure.axes[-1].get_ylim() == (-1, 1) and "against" in figure.axes[-1].get_ylabel()
    figure = compare_maps(flat(), {"one": signed, "two": MAPS}, ["cat"], ANSWER)
    assert [ax.get_xlabel() for ax in panels(figure)][1:] == ["hit, 75% inside"] * 2
    assert figure.axes[-1].get_ylim() == (-1, 1)
    assert show_maps(flat(), MAPS, ["cat"]).axes[-1].get_ylim() == (0, 1)


@pytest.mark.parametrize("n, least", [(4, 50), (8, 20)])
def test_concepts_are_told_apart_by_everybody(n, least):
    for seen in [CONCEPT_COLOURS, *(as_seen_with(blindness, CONCEPT_COLOURS) for blindness in BLINDNESS)]:
        colours = rgb2lab(seen[:n])
        apart = np.linalg.norm(colours[:, None] - colours, axis=-1)
        assert apart[np.triu_indices(n, 1)].min() > least  # CIE76
        assert np.hypot(colours[:, 1], colours[:, 2]).min() > 12  # no grey


def test_boxes_stand_where_they_are_with_their_labels():
    figure = show_maps(flat(), MAPS, ["cat"])
    outline_boxes(figure.axes[0], np.array([[4, 2, 20, 30], [24, 8, 40, 16]]), ["cat", "coin"])
    boxes = {(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in figure.axes[0].patches}
    assert boxes == {(4, 2, 16, 28), (24, 8, 16, 8)}
    assert [(text.get_text(), text.get_position()) for text in figure.axes[0].texts] == [
        ("cat", (4, 2)), ("coin", (24, 8))
    ]  # fmt: skip


def test_overlay_has_the_geometry_of_the_picture():
    heat = np.zeros((32, 48))
    heat[10, 20] = 1
    shades = lightness(overlay(flat(), heat))
    assert np.unravel_index(shades.argmax(), shades.shape) == (10, 20)
    small = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])  # a map of 2 x 3 for a picture of 32 x 48
    shades = lightness(overlay(flat(), small))
    assert (shades[:8, 40:] > 80).all()
    assert shades[24:].max() < 30 and shades[:, :24].max() < 30


def test_what_is_no_map_is_named():
    for heat in (np.zeros((1, 4, 4)), np.full((4, 4), 1.2), np.full((4, 4), -1.1), np.full((4, 4), np.nan)):
        with pytest.raises(ValueError, match=r"\(height, width\) in \[0, 1\], or signed in \[-1, 1\], not \("):
            overlay(flat(), heat)
    with pytest.raises(ValueError, match=r"not \(1, 4, 4\)"):
        overlay(flat(), np.zeros((1, 4, 4)))
    with pytest.raises(ValueError, match=r"in \[0\.5, 3\]"):
        overlay(flat(), np.array([[0.5, 3.0]]))


MAPS = np.array([[[0, 0, 0, 0], [0, 0.5, 1, 0], [0, 0, 0.5, 0], [0, 0, 0, 0]]], np.float32)  # its peak: row 1, column 2
ANSWER = np.zeros((1, 4, 4), bool)
ANSWER[0, 1:3, 2:4] = True  # holds the peak and 0.5 beside it: 1.5 of 2


def test_titles_say_what_the_scores_are():
    figure = show_maps(flat(), np.concatenate([MAPS] * 3), ["cat", "coin", "none"],
                       answers=np.stack([ANSWER[0], ~ANSWER[0], np.eye(4, dtype=bool)]))  # fmt: skip
    titles = [ax.get_title() for ax in panels(figure)]
    # The diagonal holds the 0.5 of row 1 but not the peak, and the 0.5 of row 2.
    assert titles == ["what the model saw", "cat\nhit, 75% inside", "coin\nmiss, 25% inside", "none\nmiss, 50% inside"]


def test_without_answers_titles_are_as_given():
    figure = show_maps(flat(), MAPS, ["cat"])
    assert [ax.get_title() for ax in panels(figure)] == ["what the model saw", "cat"]
    assert [ax.get_title() for ax in panels(show_maps(flat(), MAPS, "cat"))] == ["what the model saw", "cat"]


@pytest.mark.parametrize("n", [1, 3, 4, 8])
def test_one_panel_for_the_picture_and_one_a_map(n):
    figure = show_maps(flat(), MAPS.repeat(n, axis=0), [str(i) for i in range(n)])
    assert [ax.get_title() for ax in panels(figure)] == ["what the model saw"] + [str(i) for i in range(n)]
    assert not any(ax.axison for ax in figure.axes if not ax.get_label() == "<colorbar>")
    (bar,) = [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]
    assert bar.get_ylim() == (0, 1)


def test_maps_may_have_sizes_of_their_own():
    large = np.kron(MAPS[0], np.ones((2, 2), np.float32))
    figure = show_maps(flat(), [MAPS[0], large], ["small", "large"], answers=ANSWER.repeat(2, axis=0))
    titles = [ax.get_title() for ax in panels(figure)[1:]]
    assert titles == ["small\nhit, 75% inside", "large\nhit, 75% inside"]


@pytest.mark.parametrize(("n", "grid"), [(1, (1, 2)), (3, (1, 4)), (4, (2, 3)), (5, (2, 3)), (7, (2, 4)), (8, (3, 3))])
def test_panels_leave_few_places_empty(n, grid):
    figure = show_maps(flat(), MAPS.repeat(n, axis=0), [str(i) for i in range(n)])
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == grid


def test_panels_show_the_picture_and_the_overlays():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))
    first, second = panels(show_maps(picture, MAPS, ["cat"]))
    np.testing.assert_array_equal(first.get_images()[0].get_array(), np.asarray(picture))
    np.testing.assert_array_equal(second.get_images()[0].get_array(), overlay(picture, MAPS[0]))


def crosses(ax):
    return [line.get_xydata().tolist() for line in ax.lines if line.get_marker() == "+"]


def test_the_cross_lies_on_the_peak():
    # A map's pixel is 32 x 16 of the picture's. The middle of column 2 is 2.5 * 32, of row 1 it is 1.5 * 16; pixel
    # centres are whole numbers on an axis with a picture.
    _, ax = panels(show_maps(flat(128, 64), MAPS, ["cat"]))
    assert crosses(ax) == [[[79.5, 23.5]]]
    _, ax = panels(show_maps(flat(4, 4), MAPS, ["cat"]))
    assert crosses(ax) == [[[2, 1]]]
    _, ax = panels(show_maps(flat(4, 4), 0 * MAPS, ["cat"], answers=ANSWER))
    assert crosses(ax) == [] and ax.get_title() == "cat\nmiss, 0% inside"


def test_of_several_peaks_the_cross_lies_on_the_one_nearest_to_their_centre():
    heat = np.zeros((1, 8, 8), np.float32)
    heat[0, 2:7, 1:6] = 1  # rows 2 to 6 and columns 1 to 5: their centre is row 4, column 3
    _, ax = panels(show_maps(flat(8, 8), heat, ["block"]))
    assert crosses(ax) == [[[3, 4]]]


@pytest.mark.parametrize("factor", [1, 2])
def test_of_several_peaks_the_cross_lies_where_the_title_says(factor):
    heat = np.zeros((1, 8, 8), np.float32)
    heat[0, 5, [0, 1, 2, 4, 6, 7]] = 1  # their centre is column 20 / 6, and 4 is the nearest
    _, ax = panels(show_maps(flat(8, 8), heat, ["no answer"]))
    assert crosses(ax) == [[[4, 5]]]
    answers = np.zeros((3, 8, 8), bool)
    answers[0, :, :3] = True  # three of six are no majority: a miss. Outside are 4, 6 and 7, with the centre 17 / 3
    answers[1, :, 4:] = True  # a miss, too. Outside are 0, 1 and 2
    answers[2, :, [0, 1, 2, 3, 5, 6, 7]] = True  # a hit. Inside are 0, 1, 2, 6 and 7, with the centre 16 / 5
    answers = answers.repeat(factor, axis=1).repeat(factor, axis=2)
    found = panels(show_maps(flat(8, 8), heat.repeat(3, axis=0), list("abc"), answers=answers))[1:]
    assert [ax.get_title()[2:6] for ax in found] == ["miss", "miss", "hit,"]
    assert [crosses(ax) for ax in found] == [[[[6, 5]]], [[[1, 5]]], [[[2, 5]]]]


@pytest.mark.parametrize("factor", [1, 4])
def test_the_outline_runs_along_the_edge_of_the_answer(factor):
    answer = ANSWER.repeat(factor, axis=1).repeat(factor, axis=2)
    _, ax = panels(show_maps(flat(128, 64), MAPS, ["cat"], answers=answer))
    assert len(ax.collections) == 2  # a dark line under a white one
    for contour in ax.collections:
        points = np.concatenate([path.vertices for path in contour.get_paths()])
        # Columns 2 and 3 of 4 are the right half of 128 pixels, rows 1 and 2 the half in the middle of 64.
        np.testing.assert_allclose(points.min(axis=0), [64 - 0.5, 16 - 0.5], atol=0.01)
        np.testing.assert_allclose(points.max(axis=0), [128 - 0.5, 48 - 0.5], atol=0.01)
    assert ax.get_xlim() == (-0.5, 127.5) and ax.get_ylim() == (63.5, -0.5)


@pytest.mark.filterwarnings("error")
def test_an_answer_that_a_crop_cut_off_is_a_miss():
    _, ax = panels(show_maps(flat(), MAPS, ["cat"], answers=np.zeros((1, 4, 4), bool), seen=(0, 0, 48, 32)))
    assert ax.get_title() == "cat\nmiss, 0% inside"


def test_maps_titles_and_answers_are_to_be_as_many():
    with pytest.raises(ValueError, match="1 maps need as many titles and answers, not 2 and none"):
        show_maps(flat(), MAPS, ["cat", "coin"])
    with pytest.raises(ValueError, match="not 1 and 2"):
        show_maps(flat(), MAPS, ["cat"], answers=np.concatenate([ANSWER, ANSWER]))
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        show_maps(flat(), 2 * MAPS, ["cat"])


def concepts(n):
    """Concepts side by side: each rules one column of a picture of n columns."""
    maps = np.eye(n, dtype=np.float32)[:, None, :].repeat(2, axis=1)
    return Concepts(maps, np.ones((n, 3), np.float32), np.ones((n, 5), np.float32))


def test_concepts_have_a_panel_a_colour_and_a_legend_entry_each():
    figure = show_concepts(flat(4, 2), concepts(4), ["cat", "coin", "cat", "rocket"])
    entries = ["concept 1: cat", "concept 2: coin", "concept 3: cat", "concept 4: rocket"]
    assert [ax.get_title() for ax in panels(figure)] == ["what the model saw", "strongest concept", *entries]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == entries
    colours = [to_rgb(handle.get_color()) for handle in legend.legend_handles]
    assert len(set(colours)) == 4
    # On a black picture a concept at its strongest is its colour at an opacity of 0.85; elsewhere it stays black.
    figure = show_concepts(flat(4, 2, (0, 0, 0)), concepts(4), list("abcd"))
    joint, *single = [ax.get_images()[0].get_array() for ax in panels(figure)[1:]]
    for i, colour in enumerate(colours):
        np.testing.assert_allclose(joint[:, i], [0.85 * np.array(colour)] * 2, atol=1e-6)
        np.testing.assert_allclose(single[i][:, i], joint[:, i], atol=1e-6)
        assert single[i].sum() == pytest.approx(joint[:, i].sum())


def test_concepts_are_stretched_to_the_picture():
    figure = show_concepts(flat(64, 32, (0, 0, 0)), concepts(2), ["left", "right"])
    joint = panels(figure)[1].get_images()[0].get_array()
    assert joint.shape == (32, 64, 3)
    np.testing.assert_allclose(joint[:, :16], np.broadcast_to(0.85 * CONCEPT_COLOURS[0], (32, 16, 3)), atol=1e-6)
    np.testing.assert_allclose(joint[:, 48:], np.broadcast_to(0.85 * CONCEPT_COLOURS[1], (32, 16, 3)), atol=1e-6)


def test_concepts_and_labels_are_to_be_as_many_and_few():
    with pytest.raises(ValueError, match="3 concepts need as many labels, not 2"):
        show_concepts(flat(), concepts(3), ["cat", "coin"])
    with pytest.raises(ValueError, match="at most 8"):
        show_concepts(flat(), concepts(9), list("abcdefghi"))


def test_a_quantile_gets_the_full_colour():
    heat = np.zeros((32, 48), np.float32)
    heat[:16] = 0.2
    heat[20, 30] = 1
    figure = show_maps(flat(), heat[None], "a", full_at=0.9)  # half of the map is 0.2, and so is its 0.9 quantile
    drawn = np.asarray(panels(figure)[1].get_images()[0].get_array())
    np.testing.assert_array_equal(drawn[5, 5], drawn[20, 30])
    np.testing.assert_array_equal(drawn[5, 5], overlay(flat(), np.ones((32, 48)))[0, 0])
    assert "share of the 0.9 quantile" in [ax.get_ylabel() for ax in figure.axes]
    sparse = np.zeros((32, 48), np.float32)
    sparse[3, 4] = 1  # its 0.9 quantile is 0: drawn up to the maximum
    drawn = np.asarray(panels(show_maps(flat(), sparse[None], "a", full_at=0.9))[1].get_images()[0].get_array())
    np.testing.assert_array_equal(drawn, overlay(flat(), sparse))
    with pytest.raises(ValueError, match="full_at is a quantile, above 0 and at most 1, not 99"):
        show_maps(flat(), heat[None], "a", full_at=99)


def test_the_scores_are_those_of_the_whole_map():
    heat = np.zeros((32, 48), np.float32)
    heat[:, 24:] = 0.5
    heat[:, :2] = 1  # 64 of 448 in all
    answer = np.zeros((32, 48), bool)
    answer[:, :24] = True
    for quantile in (0.5, 1.0):
        figure = show_maps(flat(), heat[None], "a", answers=answer[None], full_at=quantile)
        assert panels(figure)[1].get_title() == "a\nhit, 14% inside"


def test_maps_and_answers_may_be_tensors_on_any_device():
    maps, answers = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 4, 6)
    answers[0, :2] = 1
    wanted = show_maps(flat(), maps.numpy(), ["a", "b"], answers.numpy() > 0)
    with accelerator() as device:
        there = maps.to(device)
        np.testing.assert_array_equal(overlay(flat(), there[0]), overlay(flat(), maps[0].numpy()))
        for some in (there, list(there.requires_grad_())):
            found = show_maps(flat(), some, ["a", "b"], answers.to(device) > 0)
            for ax, other in zip(panels(found), panels(wanted), strict=True):
                assert ax.get_title() == other.get_title()
                np.testing.assert_array_equal(ax.get_images()[0].get_array(), other.get_images()[0].get_array())


def test_a_matrix_has_a_row_a_question_and_a_column_a_method():
    heats = np.concatenate([MAPS, MAPS[:, :, ::-1]])
    answers = np.concatenate([ANSWER] * 2)
    figure = compare_maps(flat(), {"one": heats, "two": heats[::-1]}, ["cat", "coin"], answers)
    found = panels(figure)
    assert len(found) == 6
    assert [ax.get_title() for ax in found] == ["picture", "one", "two", "", "", ""]
    assert [ax.get_ylabel() for ax in found] == ["cat", "", "", "coin", "", ""]
    words = [ax.get_xlabel() for ax in found]
    assert words[0] == words[3] == "" and words[1] == words[5] and words[2] == words[4]
    alone = panels(show_maps(flat(), heats, ["cat", "coin"], answers))
    assert [ax.get_title() for ax in alone[1:]] == [f"cat\n{words[1]}", f"coin\n{words[4]}"]
    np.testing.assert_array_equal(found[5].get_images()[0].get_array(), overlay(flat(), heats[0]))


def test_a_matrix_takes_pictures_of_their_own_and_needs_no_answers():
    pictures = [flat(), flat(32, 48, (10, 20, 30))]
    found = panels(compare_maps(pictures, {"one": [MAPS[0], MAPS[0].T]}, ["wide", "high"]))
    assert [ax.get_images()[0].get_array().shape[:2] for ax in found] == [(32, 48)] * 2 + [(48, 32)] * 2
    assert {ax.get_xlabel() for ax in found} == {""}


def test_a_matrix_that_does_not_fit_is_refused():
    for images, maps, rows, answers in (
        (flat(), {"one": MAPS}, ["cat", "coin"], None),
        ([flat()] * 2, {"one": MAPS}, "cat", None),
        (flat(), {}, "cat", None),
        (flat(), {"one": MAPS}, "cat", np.concatenate([ANSWER] * 2)),
    ):
        with pytest.raises(ValueError, match="rows need as many images, maps of each method, and answers"):
            compare_maps(images, maps, rows, answers)


def test_the_best_of_each_column_is_bold():
    columns = {"pointing": [0.9, 0.5, 0.9], "energy": [0.1, 0.123, 0.1], "on the other": [0.2, 0, 0.1]}
    page = show_scores(pd.DataFrame(columns | {"maps": [9, 9, 9]}, index=["a", "b", "c"])).to_html()
    rules = re.findall(r"([^{}]+)\{\s*font-weight: bold", page)
    bold = set(re.findall(r"row\d_col\d", " ".join(rules)))
    assert bold == {"row0_col0", "row2_col0", "row1_col1", "row1_col2"}
    assert ">0.12<" in page


def test_what_looks_equal_is_equally_bold():
    page = show_scores(pd.DataFrame({"pointing": [0.861, 0.859, 0.5]})).to_html()
    assert set(re.findall(r"row\d_col\d", page.split("</style>")[0])) == {"row0_col0", "row1_col0"}
