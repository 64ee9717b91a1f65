import base64
import io
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from rehearsal import accelerator

from xai_helpers.plots import map_picture, overlay, show_maps
from xai_helpers.slides import WIDTH, before_after, step_through

LEFT = np.eye(4, dtype=np.float32)[:, :1].repeat(4, axis=1).T  # a map of four columns that is 1 in the first
MAPS = {"Grad-CAM": [LEFT, LEFT[:, ::-1]], "RISE": [LEFT, LEFT]}
PHOTO = Image.effect_noise((96, 48), 60).convert("RGB")


class Page(HTMLParser):
    """The tags of a piece of HTML, with their attributes, and its words."""

    def __init__(self, shown):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(shown.data)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self):
        for image in self.all("img"):
            kind, data = image["src"].split(",")
            assert kind == "data:image/webp;base64"
            picture = Image.open(io.BytesIO(base64.b64decode(data)))
            assert (image["width"], image["height"]) == tuple(map(str, picture.size))
            yield np.asarray(picture.convert("RGB"), float)


def test_a_step_has_a_picture_of_each_method_with_its_scores():
    page = Page(step_through(PHOTO, MAPS, ["early", "late"], "By layer", answer=LEFT > 0))
    assert [step["data-said"] for step in page.all("li")] == [
        "early; Grad-CAM: hit, 100% inside; RISE: hit, 100% inside",
        "late; Grad-CAM: miss, 0% inside; RISE: hit, 100% inside",
    ]
    assert [image["alt"] for image in page.all("img")] == [
        "Grad-CAM, early, hit, 100% inside",
        "RISE, early, hit, 100% inside",
        "Grad-CAM, late, miss, 0% inside",
        "RISE, late, hit, 100% inside",
    ]
    (slider,) = page.all("input")
    assert (slider["type"], slider["aria-label"], slider["max"]) == ("range", "By layer", "1")
    assert page.words[:4] == ["By layer", "early (1 of 2)", "Grad-CAM", "hit, 100% inside"]
    for drawn, wanted in zip(page.pictures(), [LEFT, LEFT, LEFT[:, ::-1], LEFT], strict=True):
        assert drawn.shape == (WIDTH // 2, WIDTH, 3)
        there = np.asarray(map_picture(PHOTO, wanted, WIDTH, LEFT > 0)[0], float)
        assert np.abs(drawn - there).mean() < 4  # what WebP loses


def test_without_an_answer_there_are_no_scores():
    page = Page(step_through(PHOTO, MAPS, ["early", "late"], "By layer"))
    assert [step["data-said"] for step in page.all("li")] == ["early", "late"]
    assert page.words == ["By layer", "early (1 of 2)", "Grad-CAM", "RISE", "late (2 of 2)", "Grad-CAM", "RISE"]


def test_before_is_the_picture_and_after_the_map_over_it():
    page = Page(before_after(PHOTO, np.zeros((4, 4)), "What speaks for a cat"))  # a map without a cross
    before, after = page.pictures()
    large = PHOTO.resize((WIDTH, WIDTH // 2), Image.Resampling.LANCZOS)
    assert np.abs(before - np.asarray(large, float)).mean() < 4
    assert np.abs(after - overlay(large, np.zeros((4, 4))).astype(float)).mean() < 4
    assert [image["alt"] for image in page.all("img")] == ["The picture", "The map over it: What speaks for a cat"]
    assert page.words == ["What speaks for a cat"]
    scored = Page(before_after(PHOTO, LEFT, "A cat", answer=LEFT > 0))
    assert scored.words == ["A cat: hit, 100% inside"] and scored.all("input")[0]["aria-label"] == "A cat"


def test_a_picture_of_a_map_is_its_overlay_with_outline_and_cross():
    nothing, words = map_picture(PHOTO, np.zeros((4, 4)), width=96)
    assert words == ""
    np.testing.assert_array_equal(nothing, overlay(PHOTO, np.zeros((4, 4))))
    drawn, words = map_picture(PHOTO, LEFT, 192, answer=LEFT[:, ::-1] > 0)
    large = PHOTO.resize((192, 96), Image.Resampling.LANCZOS)
    (ax,) = show_maps(large, [LEFT], "a", answers=[LEFT[:, ::-1] > 0]).axes[1:2]
    assert ax.get_title() == f"a\n{words}" == "a\nmiss, 0% inside"
    changed = np.abs(np.asarray(drawn, int) - overlay(large, LEFT)).max(axis=2) > 9
    assert changed[48, 143:145].all() and not changed[48, 148:188].any()  # the answer: columns 144 to 192
    assert changed[:, :48].any() and not changed[:, 48:140].any()  # the cross: in the first quarter


def test_a_picture_of_a_map_needs_no_layout_of_its_own(recwarn):
    with matplotlib.rc_context({"figure.constrained_layout.use": True}):  # as in the book's matplotlibrc
        map_picture(PHOTO, LEFT, width=96, seen=(0, 0, 96, 48))
    assert [str(warning.message) for warning in recwarn] == []


def test_names_are_no_markup_and_numbers_do_not_clash():
    shown = step_through(PHOTO, {"<b>": [LEFT]}, ['"1 & 2"'], "Is a < b?", answer=LEFT > 0)
    page = Page(shown)
    assert page.words == ["Is a < b?", '"1 & 2" (1 of 1)', "<b>", "hit, 100% inside"]
    assert page.all("li")[0]["data-said"] == '"1 & 2"; <b>: hit, 100% inside'
    assert not any("id" in attributes for _, attributes in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not re.search(r"https?:|url\(", shown.data)


def test_tensors_will_do_and_nothing_is_changed():
    photo, heat, answer = PHOTO.copy(), LEFT.copy(), LEFT > 0
    wanted = step_through(photo, {"one": [heat]}, ["a"], "Steps", answer).data
    assert before_after(photo, heat, "A map", answer).data == before_after(PHOTO, LEFT, "A map", LEFT > 0).data
    np.testing.assert_array_equal(heat, LEFT)
    np.testing.assert_array_equal(answer, LEFT > 0)
    np.testing.assert_array_equal(photo, PHOTO)
    with accelerator() as device:
        there = torch.from_numpy(LEFT.copy()).to(device)
        assert step_through(photo, {"one": [there]}, ["a"], "Steps", there > 0).data == wanted


def test_what_does_not_fit_is_refused():
    for maps, labels in ((MAPS, ["early"]), ({}, ["early"]), ({"one": []}, []), ({**MAPS, "x": [LEFT]}, ["a", "b"])):
        with pytest.raises(ValueError, match="labels need as many maps of each method; and a step, and a method"):
            step_through(PHOTO, maps, labels, "By layer")
    with pytest.raises(ValueError, match="A title is wanted"):
        step_through(PHOTO, MAPS, ["early", "late"], " ")
    with pytest.raises(ValueError, match="A title is wanted"):
        before_after(PHOTO, LEFT, "")
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        before_after(PHOTO, 2 * LEFT, "A map")
