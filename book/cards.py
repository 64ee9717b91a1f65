"""Prepare the pictures of the landing page: `python book/cards.py FOLDER`.

It writes FOLDER/a.webp and b.webp, of which one is wrong, and for each family of models a scene with its map.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from xai_helpers.cam import explain
from xai_helpers.checkpoints import examples, load
from xai_helpers.leaderboard import classifier
from xai_helpers.plots import overlay
from xai_helpers.scenes import as_seen, natural
from xai_helpers.scoring import edge_maps

ASKED = "football helmet"
SIDE = 448
#: Model -> the number of the test scene on its card.
SCENES = {
    "resnet": 0, "vit": 11, "convnext": 2, "regnet": 3, "mobilevit": 4, "swin": 5, "segformer": 6, "cvt": 7,
    "clip-base": 8,
}  # fmt: skip


def save(image, heat, path, side=SIDE):
    height = round(side * image.height / image.width)
    picture = Image.fromarray(overlay(image.resize((side, height), Image.LANCZOS), heat))
    picture.save(path, quality=80, method=6)


def which_to_trust(folder):
    """A map of a network, b.webp; and one that never saw it, a.webp: edges, more of them towards the middle."""
    model, processor = load("efficientnet-lite", "bundled", device="cpu")
    photo = as_seen(natural("astronaut"), processor).image
    pixel_values = processor(natural("astronaut").image, return_tensors="pt")["pixel_values"]
    edges = gaussian_filter(edge_maps(1, pixel_values)[0], 7)
    rows, columns = np.mgrid[: edges.shape[0], : edges.shape[1]]
    middle = (edges.shape[0] - 1) / 2
    edges *= np.exp(-((rows - middle) ** 2 + (columns - middle) ** 2) / (2 * (0.28 * len(edges)) ** 2))
    save(photo, edges / edges.max(), folder / "a.webp")
    save(photo, explain(model, pixel_values, ASKED)[0], folder / "b.webp")


def families(folder):
    """A test scene for each model, another one each time, with the map of its first category."""
    for name, number in SCENES.items():
        model, processor = classifier(name, "cpu")
        example = examples(model, processor, number + 1)[number]
        (heat,) = explain(model, example.pixel_values, example.categories[0])
        save(example.image, heat, folder / f"{name}.webp", 240)


def main(folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    which_to_trust(folder)
    families(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
