"""What is pasted into a scene: the objects, and distractors pasted in the same way."""

from functools import cache

import cv2
import numpy as np

from xai_helpers.scenes.backgrounds import backdrop
from xai_helpers.scenes.photos import mask, photo

#: category -> (photo, mask, largest side relative to that of the other categories)
OBJECTS = {
    "astronaut": ("astronaut", "astronaut", 1.0),
    "cat": ("chelsea", "cat face", 0.9),
    "coffee cup": ("coffee", "coffee cup", 0.95),
    "coin": ("coins", "coin", 0.65),
    "flower": ("flower", "flower", 0.85),
    "motorcycle": ("motorcycle", "motorcycle", 1.15),
    "pagoda": ("china", "pagoda", 1.0),
    "rocket": ("astronaut", "rocket", 1.1),
}

#: Distractors that are things. Training never shows the held-out ones: they test what a model does with the unknown.
DISTRACTORS = ("horse", "colour wheel", "crater", "phantom", "fragment", "fragment", "fragment", "fragment")
HELD_OUT_DISTRACTORS = ("photographer", "retina", "logo")

LARGEST = 512  # a cut-out's longest side at most, in pixels


def pyramid(pixels, alpha):
    """A cut-out as premultiplied uint8 (height, width, 4) pictures, each half as large as the one before."""
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    alpha = np.pad(alpha[box].astype(np.float32), 1)[..., None]
    pixels = np.pad(pixels[box], ((1, 1), (1, 1), (0, 0))).astype(np.float32)
    level = np.concatenate([pixels * alpha, 255 * alpha], axis=2)
    shrink = LARGEST / max(level.shape[:2])
    if shrink < 1:
        level = cv2.resize(level, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    levels = [cv2.GaussianBlur(level, (0, 0), 0.7)]  # a mask has hard edges; a camera has none
    while max(levels[-1].shape) > 24:
        levels.append(cv2.resize(levels[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
    return [level.round().astype(np.uint8) for level in levels]


@cache
def objects(category):
    """The cut-outs of a category, a pyramid each. Only the coin has more than one."""
    source, name, _ = OBJECTS[category]
    parts, labelled = cv2.connectedComponents(mask(name).astype(np.uint8))
    large = [part for part in range(1, parts) if (labelled == part).sum() > 1000]
    if category != "coin":
        return [pyramid(photo(source), mask(name))]
    return [pyramid(photo(source), labelled == part) for part in large]


def ellipse(shape, centre, axes):
    return cv2.ellipse(np.zeros(shape[:2], np.uint8), centre, axes, 0, 0, 360, 1, -1).astype(bool)


@cache
def thing(name):
    """A distractor that is a thing, as a pyramid."""
    if name == "photographer":
        return pyramid(photo("camera"), mask("photographer"))
    if name == "horse":
        return pyramid(photo("horse"), photo("horse")[..., 0] < 128)
    source, centre, axes = {
        "colour wheel": ("colorwheel", (185, 185), (178, 178)),
        "crater": ("moon", (355, 120), (60, 60)),
        "phantom": ("shepp_logan_phantom", (200, 200), (137, 183)),
        "retina": ("retina", (705, 705), (670, 670)),
        "logo": ("logo", (250, 250), (240, 240)),
    }[name]
    return pyramid(photo(source), ellipse(photo(source).shape, centre, axes))


def fragment(rng, side=160):
    """A random shape cut out of a background: an ellipse, a polygon, a star or a blob."""
    shape = np.zeros((side, side), np.uint8)
    middle, kind = side / 2, rng.integers(4)
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8))) if kind == 1 else np.linspace(0, 2 * np.pi, 49)[:-1]
    radius = {
        0: np.ones(48),
        1: np.ones(len(angles)),
        2: 1 - 0.5 * (np.arange(48) // 4 % 2),
        3: 1 - 0.4 * rng.random(),
    }[int(kind)]
    if kind == 3:
        waves = rng.uniform(-0.12, 0.12, (3, 2))
        radius = 0.7 + sum(a * np.cos(k * angles) + b * np.sin(k * angles) for k, (a, b) in enumerate(waves, start=2))
    stretch = np.array([1, rng.uniform(0.35, 1)])
    points = middle + 0.96 * middle * stretch * np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.reshape(
        radius, (-1, 1)
    )
    cv2.fillPoly(shape, [points.astype(np.int32)], 1)
    if shape.sum() < 0.12 * side * side:  # a sliver of a polygon
        shape = ellipse(shape.shape, (side // 2, side // 2), (side // 2 - 2, side // 3))
    return pyramid(backdrop(rng, side), shape.astype(bool))
