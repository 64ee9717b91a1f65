"""Captions say what is true of a scene, and for each it is known of which other scenes it is true."""

import re

import numpy as np
import pytest
from PIL import Image

from training.captions import COLOURS, UNKNOWN, background, caption, facts_of, flipped, is_true, truth, vocabulary
from training.clip import tokenizer
from xai_helpers.scenes import Scene, labels, make_scene


def scene(colour=(0, 0, 255), **boxes):
    """A scene of 10 x 10 pixels with the given boxes (left, top, right, bottom)."""
    masks = np.zeros((len(boxes), 10, 10), bool)
    pixels = np.full((10, 10, 3), colour, np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.values(), strict=True):
        mask[top:bottom, left:right] = True
        pixels[mask] = 255 - pixels[mask]
    return Scene(Image.fromarray(pixels), [name.replace("_", " ") for name in boxes], masks)


CAT_LEFT = scene(cat=(0, 6, 2, 10), coffee_cup=(6, 0, 10, 6))  # the cat also stands lower
CAT_ALONE = scene(colour=(128, 128, 128), cat=(3, 3, 7, 7))
EMPTY = scene(colour=(10, 10, 10))
FACTS = np.stack([facts_of(made) for made in (CAT_LEFT, CAT_ALONE, EMPTY)])


def test_facts_by_hand():
    cat, cup = (FACTS[0, labels().index(name)] for name in ("cat", "coffee cup"))
    assert cat == pytest.approx([0.08, 0.05, 0.75]) and cup == pytest.approx([0.24, 0.75, 0.25])
    assert FACTS[0, -1] == pytest.approx([0, 0, 1])
    there = [labels()[i] for i in np.flatnonzero(FACTS[0, :-1, 0])]
    assert there == ["cat", "coffee cup"] and not FACTS[2, :-1].any()


@pytest.mark.parametrize(
    ("claim", "holds"),
    [
        (("there", "cat"), [True, True, False]),
        (("there", "coin"), [False, False, False]),
        (("empty",), [False, False, True]),
        (("never",), [False, False, False]),
        (("left", "cat"), [True, False, False]),
        (("right", "cat"), [False, False, False]),
        (("bottom", "cat"), [True, False, False]),
        (("top", "coffee cup"), [True, False, False]),
        (("middle", "cat"), [False, True, False]),
        (("small", "coffee cup"), [False, False, False]),
        (("large", "coffee cup"), [True, False, False]),
        (("left of", "cat", "coffee cup"), [True, False, False]),
        (("right of", "cat", "coffee cup"), [False, False, False]),
        (("below", "cat", "coffee cup"), [True, False, False]),
        (("above", "coffee cup", "cat"), [True, False, False]),
        (("background", "blue"), [True, False, False]),
        (("background", "grey"), [False, True, False]),
        (("background", "black"), [False, False, True]),
    ],
)
def test_claims_by_hand(claim, holds):
    assert is_true(claim, FACTS).tolist() == holds


def test_a_caption_is_true_where_all_its_claims_are():
    claims = [[("there", "cat"), ("left", "cat")], [], [("there", "cat"), ("never",)]]
    assert truth(claims, FACTS).tolist() == [[True, True, False], [False, True, False], [False, True, False]]


def test_a_mirrored_scene_swaps_left_and_right():
    facts = flipped(FACTS, np.array([True, False, True]))
    assert is_true(("left of", "coffee cup", "cat"), facts).tolist() == [True, False, False]
    assert is_true(("below", "cat", "coffee cup"), facts)[0] and is_true(("background", "blue"), facts)[0]
    np.testing.assert_array_equal(facts[1:], FACTS[1:])
    assert is_true(("left", "cat"), FACTS)[0]  # the facts themselves are as they were


def test_colours_of_backgrounds():
    shades = {
        "red": (200, 30, 30),
        "orange": (230, 130, 30),
        "yellow": (220, 220, 40),
        "green": (40, 160, 50),
        "blue": (40, 60, 200),
        "purple": (170, 40, 180),
        "white": (240, 240, 240),
        "grey": (120, 122, 118),
        "black": (15, 15, 15),
        None: (130, 110, 105),  # neither grey nor clearly brown
    }
    found = background(np.stack([facts_of(scene(colour=rgb)) for rgb in shades.values()]))
    assert [COLOURS[i] if i >= 0 else None for i in found] == list(shades)


@pytest.fixture(scope="module")
def written():
    """Some hundred captions of scenes with none to three objects, their claims, and the facts."""
    rng = np.random.default_rng(0)
    facts = np.stack([facts_of(make_scene(i, i % 4, 64, split="train")) for i in range(80)])
    return [(*caption(rng, of_one), i) for i, of_one in enumerate(facts) for _ in range(10)], facts


def test_every_caption_is_true_of_its_own_scene(written):
    texts, facts = written
    true = truth([claims for _, claims, _ in texts], facts)
    for j, (text, claims, i) in enumerate(texts):
        only_unknown = UNKNOWN in text and not any(claim[0] == "there" for claim in claims)
        assert true[i, j] != only_unknown, text
    assert 0.02 < true.mean() < 0.4  # a caption says something: it is false of most scenes


def test_captions_name_what_they_claim(written):
    for text, claims, _ in written[0]:
        for kind, *about in claims:
            if kind == "background":
                assert f"{about[0]} background" in text
            if kind in ("left", "right", "small", "large", "above", "below"):
                words = {"small": "small|little|tiny", "large": "large|big|huge", "above": "above|over"}
                assert re.search(words.get(kind, {"below": "below|under"}.get(kind, kind)), text), (text, claims)
    assert len({text for text, _, _ in written[0]}) > 300


def test_every_word_of_a_caption_has_a_token(written):
    words = tokenizer()
    for text, _, _ in written[0]:
        ids = words(text)["input_ids"]
        assert ids[0] == words.bos_token_id and ids[-1] == words.eos_token_id
        assert ids.count(words.unk_token_id) == text.count(UNKNOWN), text
    assert len(words) == len(vocabulary()) + 4 and words.eos_token_id != 2


def test_upper_case_and_other_quotes_do_not_matter():
    words = tokenizer()
    assert words("A Photo of a CAT.")["input_ids"] == words("a photo of a cat.")["input_ids"]
    zebra = words("a zebra")["input_ids"]
    assert zebra[2] == words.unk_token_id and zebra == words("a quagga")["input_ids"]
