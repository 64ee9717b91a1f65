"""Draw the picture of the README: `.venv/bin/python book/readme_picture.py`."""

from pathlib import Path

import matplotlib

from xai_helpers.cam import explain
from xai_helpers.checkpoints import load
from xai_helpers.plots import show_maps
from xai_helpers.scenes import as_seen, natural

BOOK = Path(__file__).parent
CATEGORIES = ["football helmet", "space shuttle"]

matplotlib.rc_file(BOOK / "matplotlibrc")
model, processor = load("efficientnet-lite", "bundled", device="cpu")
photo = natural("astronaut")
pixel_values = processor(photo.image, return_tensors="pt")["pixel_values"]
maps = explain(model, pixel_values, CATEGORIES)
show_maps(as_seen(photo, processor).image, maps, CATEGORIES).savefig(BOOK / "_static" / "first_maps.png")
