"""The photos that scikit-image and scikit-learn ship, and the masks that training/masks.py cut from them."""

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from xai_helpers.pictures import read_picture

MASKS = Path(__file__).parent / "masks"

#: Photos whose file is not skimage/data/NAME.png. "china" and "flower" are CC BY 2.0, see the page of credits.
FILES = {
    "china": "sklearn/datasets/images/china.jpg",
    "colorwheel": "skimage/data/color.png",
    "flower": "sklearn/datasets/images/flower.jpg",
    "hubble_deep_field": "skimage/data/hubble_deep_field.jpg",
    "immunohistochemistry": "skimage/data/ihc.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
    "shepp_logan_phantom": "skimage/data/phantom.png",
}


@cache
def photo(name: str) -> np.ndarray:
    """The pixels of a shipped photo, (height, width, 3): uint8, but the phantom's are in [0, 1] and paste as black.

    The file is read without importing its package, which would take seconds.
    """
    package, file = FILES.get(name, f"skimage/data/{name}.png").split("/", 1)
    spec = importlib.util.find_spec(package)
    assert spec and spec.origin, f"{package} is not installed"
    path = Path(spec.origin).parent / file
    if name == "horse":  # a silhouette on a transparent ground
        return np.where(np.asarray(read_picture(path)) > 127, 255, 0).astype(np.uint8)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return pixels / 255 if name == "shepp_logan_phantom" else pixels


@cache
def mask(name: str) -> np.ndarray:
    """The mask of an object in its photo: bool, (height, width)."""
    return np.asarray(Image.open(MASKS / f"{name.replace(' ', '_')}.png").convert("1"))
