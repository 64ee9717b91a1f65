"""Backgrounds of scenes: tinted textures, parts of photos that show no object of any category, and noise."""

import cv2
import numpy as np

from xai_helpers.scenes.photos import photo

#: photo, and the part of it without an object: left, top, right, bottom
PARTS = [
    ("immunohistochemistry", (0, 0, 512, 512)),
    ("hubble_deep_field", (0, 0, 1000, 872)),
    ("coffee", (450, 230, 600, 400)),
    ("motorcycle", (345, 0, 490, 105)),
    ("motorcycle", (0, 390, 330, 500)),
    ("china", (390, 240, 640, 427)),
    ("flower", (470, 0, 640, 427)),
    ("rocket", (70, 0, 270, 240)),
    ("astronaut", (0, 0, 110, 150)),
]
TEXTURES = ["brick", "grass", "gravel", "cell", "moon", "page", "text"]


def crop(rng, pixels, side):
    """A random square part of `pixels`, flipped and turned at random, as (side, side, 3)."""
    height, width = pixels.shape[:2]
    length = rng.uniform(0.45, 1) * min(height, width)
    top, left = rng.random(2) * (np.array([height, width]) - length)
    turn, flip = rng.integers(4), rng.random() < 0.5
    part = pixels[int(top) : int(top + length) + 1, int(left) : int(left + length) + 1]
    part = cv2.resize(part, (side, side), interpolation=cv2.INTER_AREA if length > side else cv2.INTER_CUBIC)
    return np.rot90(part[:, ::-1] if flip else part, turn)


def colour(rng, brightness):
    """A colour of the given brightness, seldom a loud one."""
    return np.clip(brightness + rng.uniform(-1, 1, 3) * rng.choice([15, 40, 80], p=[0.4, 0.4, 0.2]), 0, 255)


def noise(rng, side):
    """Smooth noise of several octaves between random colours."""
    field = np.zeros((side, side, 3), np.float32)
    roughness = rng.uniform(0.35, 0.8)
    for octave, cells in enumerate((3, 6, 12, 24, 48)):
        grid = rng.normal(size=(cells, cells, 1)) + 0.4 * rng.normal(size=(cells, cells, 3))
        field += roughness**octave * cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC)
    return colour(rng, rng.uniform(50, 200)) + rng.uniform(8, 28) * field


def backdrop(rng, side):
    """A random background: float32 in [0, 255], (side, side, 3)."""
    kind = rng.random()
    if kind < 0.4:
        grey = crop(rng, photo(TEXTURES[rng.integers(len(TEXTURES))]), side)[..., :1] / 255
        dark, light = colour(rng, rng.uniform(0, 110)), colour(rng, rng.uniform(130, 255))
        pixels = dark + grey * (light - dark)
    elif kind < 0.7:
        name, (left, top, right, bottom) = PARTS[rng.integers(len(PARTS))]
        pixels = crop(rng, photo(name)[top:bottom, left:right], side) * rng.uniform(0.75, 1.2, 3)
    else:
        pixels = noise(rng, side)
    return np.clip(pixels, 0, 255).astype(np.float32)
