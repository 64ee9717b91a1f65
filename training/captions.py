"""What can be said about a scene, and of which scenes it is true.

A caption is put together from claims, each of which can be looked up in a scene's facts. So for any picture and any
caption of a batch it is known whether the caption is true, whichever picture it was written for.
"""

import re

import numpy as np

from xai_helpers.scenes import labels, with_article

#: category -> other names for it
SYNONYMS = {
    "astronaut": ["person in a space suit"],
    "cat": ["kitty", "ginger cat"],
    "coffee cup": ["cup of coffee", "cup"],
    "coin": ["old coin"],
    "flower": ["dahlia"],
    "motorcycle": ["motorbike"],
    "pagoda": ["temple"],
    "rocket": ["space shuttle", "shuttle"],
}
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "white", "grey", "black"]
UNKNOWN = "<|unknown|>"  # stands in for a word that no caption has

PHOTO = ["a photo of {}.", "a photo of {}", "a picture of {}.", "an image of {}.", "{}", "{}.", "this is {}."]
THERE = ["there is {} in the photo.", "the photo shows {}.", "a scene with {}.", "i see {}.", "look at {}."]
NEUTRAL = ["", "a photo.", "a picture.", "an image", "a photo of something."]
NOTHING = ["an empty scene.", "nothing but background.", "a photo without any object.", "a photo of nothing."]
SMALL, LARGE = ["small", "little", "tiny"], ["large", "big", "huge"]
PLACES = {
    "left": ["on the left", "at the left"],
    "right": ["on the right", "at the right"],
    "top": ["at the top", "in the upper part"],
    "bottom": ["at the bottom", "in the lower part"],
    "middle": ["in the middle", "in the centre"],
}
BESIDE = ["{} and {}", "{} with {}", "{} next to {}", "{} beside {}", "both {} and {}"]
RELATIONS = {
    "left of": ["{} to the left of {}", "{} left of {}"],
    "right of": ["{} to the right of {}", "{} right of {}"],
    "above": ["{} above {}", "{} over {}"],
    "below": ["{} below {}", "{} under {}"],
}

AREA, X, Y = range(3)


def facts_of(scene):
    """float32 (n_categories + 1, 3): each category's share of the picture and its centre (0 to 1, zero if it is not
    there), and in the last row the mean colour of what is no object, red, green, blue in 0 to 1."""
    facts = np.zeros((len(labels()) + 1, 3), np.float32)
    for name, mask in zip(scene.categories, scene.masks, strict=True):
        rows, columns = np.nonzero(mask)
        if len(rows):
            facts[labels().index(name)] = mask.mean(), columns.mean() / mask.shape[1], rows.mean() / mask.shape[0]
    pixels = np.asarray(scene.image)[~scene.masks.any(axis=0)]
    facts[-1] = pixels.mean(axis=0) / 255 if len(pixels) else 0.5
    return facts


def flipped(facts, flip):
    """Facts (n, n_categories + 1, 3) of scenes of which those marked in `flip`, bool (n,), are mirrored."""
    facts = facts.copy()
    there = facts[:, :-1, AREA] > 0
    facts[:, :-1, X] = np.where(flip[:, None] & there, 1 - facts[:, :-1, X], facts[:, :-1, X])
    return facts


def background(facts):
    """The colour of each background: an index into COLOURS, or -1 where none is clear. int, (n,)."""
    rgb = facts[:, -1]
    value, chroma = rgb.max(axis=1), np.ptp(rgb, axis=1)
    red, green, blue = rgb.T
    hue = np.select(
        [value == red, value == green],
        [(green - blue) / np.maximum(chroma, 1e-6) % 6, (blue - red) / np.maximum(chroma, 1e-6) + 2],
        (red - green) / np.maximum(chroma, 1e-6) + 4,
    )
    middles = {"red": 0, "orange": 0.5, "yellow": 1, "green": 2, "blue": 3.8, "purple": 4.9}
    found = np.full(len(facts), -1)
    loud = (chroma > 0.3 * value) & (value > 0.25)
    for name, middle in middles.items():
        away = np.abs((hue - middle + 3) % 6 - 3)
        found[loud & (away < {"green": 0.7, "blue": 0.7}.get(name, 0.2))] = COLOURS.index(name)
    pale = chroma < 0.12 * np.maximum(value, 0.2)
    for name, (low, high) in {"black": (0, 0.2), "grey": (0.3, 0.65), "white": (0.75, 2)}.items():
        found[pale & (low <= value) & (value < high)] = COLOURS.index(name)
    return found


def is_true(claim, facts):
    """Of which scenes a claim is true. bool, (n,)."""
    kind, *about = claim
    if kind == "never":
        return np.zeros(len(facts), bool)
    if kind == "background":
        return background(facts) == COLOURS.index(about[0])
    if kind == "empty":
        return (facts[:, :-1, AREA] == 0).all(axis=1)
    places = [facts[:, labels().index(name)] for name in about]
    there = np.all([place[:, AREA] > 0 for place in places], axis=0)
    area, x, y = places[0].T
    if len(places) == 2:
        _, other_x, other_y = places[1].T
        holds = {
            "left of": x < other_x - 0.15,
            "right of": x > other_x + 0.15,
            "above": y < other_y - 0.15,
            "below": y > other_y + 0.15,
        }[kind]
    else:
        holds = {
            "there": area > 0,
            "small": area < 0.06,
            "large": area > 0.16,
            "left": x < 0.4,
            "right": x > 0.6,
            "top": y < 0.4,
            "bottom": y > 0.6,
            "middle": (abs(x - 0.5) < 0.12) & (abs(y - 0.5) < 0.12),
        }[kind]
    return there & holds


def truth(claims, facts):
    """Which captions are true of which scenes.

    Args:
        claims: for each caption its claims, all of which have to hold.
        facts: (n, n_categories + 1, 3), as `facts_of` gives them for a scene.

    Returns:
        bool, (n, n_captions).
    """
    return np.stack(
        [np.all([is_true(claim, facts) for claim in of_one] or [[True] * len(facts)], axis=0) for of_one in claims],
        axis=1,
    )


def caption(rng, facts):
    """A caption for one scene, and its claims. It need not name everything that is there.

    Args:
        rng: numpy's generator.
        facts: (n_categories + 1, 3), as `facts_of` gives them.
    """

    def one(choices):
        return choices[rng.integers(len(choices))]

    def holds(*claim):
        return is_true(claim, facts[None])[0]

    kind = rng.random()
    present = [name for name in labels() if holds("there", name)]
    if kind < 0.03:
        return one(NEUTRAL), []
    if kind < 0.07:
        return one(PHOTO + THERE).format(f"a {UNKNOWN}"), [("never",)]
    claims = []
    if present:
        named = [present[i] for i in rng.permutation(len(present))]
        named = named[: 1 if rng.random() < 0.4 else 2]
        phrases = []
        for name in named:
            phrase = name if rng.random() < 0.8 else one(SYNONYMS[name])
            claims.append(("there", name))
            if rng.random() < 0.1:
                sizes = [(size, word) for size, word in (("small", SMALL), ("large", LARGE)) if holds(size, name)]
                for size, words in sizes:
                    phrase = f"{one(words)} {phrase}"
                    claims.append((size, name))
            if rng.random() < 0.04:
                phrase = f"{UNKNOWN} {phrase}"
            phrases.append(with_article(phrase))
        what = phrases[0]
        places = [place for place in PLACES if holds(place, named[0])]
        if len(named) == 2:
            relations = [relation for relation in RELATIONS if holds(relation, *named)]
            if relations and rng.random() < 0.25:
                relation = one(relations)
                claims.append((relation, *named))
                what = one(RELATIONS[relation]).format(*phrases)
            else:
                what = one(BESIDE).format(*phrases)
        elif places and rng.random() < 0.2:
            place = one(places)
            claims.append((place, named[0]))
            what = f"{what} {one(PLACES[place])}"
    else:
        claims.append(("empty",))
        what = None
    colour = background(facts[None])[0]
    if colour >= 0 and rng.random() < (0.15 if present else 0.5):
        claims.append(("background", COLOURS[colour]))
        behind = f"a {COLOURS[colour]} background".replace("a orange", "an orange")
        what = behind if what is None else f"{what} {one(['on', 'in front of'])} {behind}"
    if what is None:
        return one(NOTHING), claims
    return one(PHOTO + THERE).format(what), claims


def vocabulary():
    """Every word and mark that a caption can have, sorted."""
    texts = [*labels(), *sum(SYNONYMS.values(), []), *COLOURS, *PHOTO, *THERE, *NEUTRAL, *NOTHING, *SMALL, *LARGE]
    texts += [*sum(PLACES.values(), []), *BESIDE, *sum(RELATIONS.values(), []), "on in front of a an background"]
    return sorted(set(re.findall(r"\w+|[^\w\s{}]", " ".join(texts))))
