"""Draw the picture of the README: `.venv/bin/python book/readme_picture.py`."""

from pathlib import Path

import matplotlib

from xai_helpers.cam import explain
from xai_helpers.checkpoints import example_scene, load
from xai_helpers.plots import show_maps
from xai_helpers.scenes import as_seen

BOOK = Path(__file__).parent

matplotlib.rc_file(BOOK / "matplotlibrc")
model, processor = load("resnet", "bundled")
scene = as_seen(example_scene("bundled"), processor)
pixel_values = processor(scene.image, return_tensors="pt")["pixel_values"]
maps = explain(model, pixel_values, scene.categories)
show_maps(scene.image, maps, scene.categories, answers=scene.masks).savefig(BOOK / "_static" / "first_maps.png")
