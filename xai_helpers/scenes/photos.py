"""The photos that scikit-image and scikit-learn ship, and the masks that training/masks.py cut from them."""

import importlib.resources
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

MASKS = Path(__file__).parent / "masks"


@cache
def photo(name):
    """The pixels of a shipped photo: uint8, (height, width, 3)."""
    if name in ("flower", "china"):  # CC BY 2.0, see the page of credits
        path = importlib.resources.files("sklearn.datasets.images") / f"{name}.jpg"
        return np.asarray(Image.open(path).convert("RGB"))
    from skimage import color, data

    pixels = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    return np.ascontiguousarray((color.gray2rgb(pixels) if pixels.ndim == 2 else pixels)[..., :3])


@cache
def mask(name):
    """The mask of an object in its photo: bool, (height, width)."""
    return np.asarray(Image.open(MASKS / f"{name.replace(' ', '_')}.png").convert("1"))
