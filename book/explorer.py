"""Prepare the book's explorer, a page that works without a kernel: make all its maps, and the HTML that shows them.

    python book/explorer.py FOLDER

writes FOLDER/extra/explorer, the pictures, which html_extra_path publishes, and FOLDER/fragment.html, which
book/explorer.md includes. The models are the bundled ones.
"""

import html
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from matplotlib.colors import to_hex

from xai_helpers.checkpoints import load
from xai_helpers.explorer import (
    as_question,
    covers,
    make_maps,
    methods_with_settings,
    pictures,
    shown,
    view,
    with_outline,
)
from xai_helpers.plots import HEAT_OVER_GREY

TEMPLATE = Path(__file__).with_suffix(".html")
MODELS = {"resnet": "ResNet", "vit": "ViT", "swin": "Swin"}
PICTURES = [
    "Scene: a cat and a coffee cup",
    "Scene: a flower and a motorcycle",
    "Scene: a cat and a rocket",
    "Photo: an astronaut and a rocket",
    "Photo: a cat",
]
#: Method -> how many of its settings, None: all; the page has no room for everything.
METHODS = {
    "balanced gradients": None,
    "Grad-CAM": None,
    "HiResCAM": None,
    "Eigen-CAM": 2,
    "gradient": None,
    "SmoothGrad": 2,
    "integrated gradients": None,
    "guided backprop": None,
    "rollout": None,
    "relevance": None,
    "occlusion": None,
    "RISE": 2,
    "edges": None,
}
#: What the page begins with. A panel, a or b, has a method and the number of its setting.
FIRST = {
    "picture": "scene-a-cat-and-a-coffee-cup",
    "model": "resnet",
    "category": "cat",
    "a": "grad-cam.0",
    "b": "integrated-gradients.0",
}
QUALITY = 65


def slug(name):
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def prepare(files, models=MODELS, names=PICTURES, methods=METHODS):
    """Write the pictures into a folder, and return what the page has to know about them."""
    data = {
        "first": FIRST,
        "pictures": {},
        "models": {},
        "methods": {slug(name): name for name in methods},
        "scores": {},
    }
    for key, name in models.items():
        model, processor = load(key, "bundled")
        for title in names:
            question = as_question(pictures()[title], model, processor)
            table = methods_with_settings(model, processor, question.pixel_values)
            table = {method: table[method] for method in methods if method in table}
            kept = {method: list(table[method].settings)[: methods[method]] for method in table}
            data["models"][key] = {
                "name": name,
                "methods": {slug(method): described(method, table[method], kept[method]) for method in table},
            }
            data["pictures"].setdefault(slug(title), answered(files / slug(title), title, question))
            scores = data["scores"].setdefault(slug(title), {})[key] = {slug(c): {} for c in question.categories}
            for method, settings in kept.items():
                maps = [make_maps(table[method], setting, question) for setting in settings]
                for i, category in enumerate(question.categories):
                    folder = files / slug(title) / slug(category)
                    views = [view(question, i, heats[i]) for heats in maps]
                    for number, one in enumerate(views):
                        save(one.picture, folder / f"{key}-{slug(method)}-{number}.webp")
                    scores[slug(category)][slug(method)] = [[int(one.hit), percent(one.inside)] for one in views]
    return data


def described(name, method, settings):
    return {
        "name": name,
        "parameter": (method.parameter or "setting").capitalize(),
        "settings": settings,
        "words": [method.words(name, setting) for setting in settings],
        "first": settings.index(method.default) if method.default in settings else 0,
    }


def answered(folder, title, question):
    """A picture as the page has it. It is written once for each category, with the outline of the answer."""
    picture = shown(question.image)
    for category, mask in zip(question.categories, question.masks, strict=True):
        save(with_outline(picture, mask), folder / f"{slug(category)}.webp")
    categories = {
        slug(category): {"name": category, "covers": percent(covers(question, i))}
        for i, category in enumerate(question.categories)
    }
    return {"name": title, "size": picture.size, "categories": categories}


def percent(share):
    return int(f"{share:.0%}".removesuffix("%"))


def save(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=QUALITY, method=4)


def fragment(data):
    """The template with the data, and with the first pair of maps for browsers without script."""
    first = data["first"]
    picture, model = data["pictures"][first["picture"]], data["models"][first["model"]]
    category, figures = picture["categories"][first["category"]]["name"], []
    for panel in ("a", "b"):
        key, number = first[panel].split(".")
        hit, inside = data["scores"][first["picture"]][first["model"]][first["category"]][key][int(number)]
        words = f"{model['methods'][key]['words'][int(number)]} of {model['name']} for {category}"
        alt = html.escape(f"{words}: {'hit' if hit else 'miss'}, {inside}% inside")
        source = f"../explorer/{first['picture']}/{first['category']}/{first['model']}-{key}-{number}.webp"
        figures.append(f'<figure><img src="{source}" alt="{alt}"><figcaption>{alt}</figcaption></figure>')
    text = TEMPLATE.read_text(encoding="utf-8")
    for mark, value in {
        "COLOURS": ", ".join(map(to_hex, HEAT_OVER_GREY(np.linspace(0, 1, 9)))),
        "WITHOUT_SCRIPT": "".join(figures),
        "DATA": json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"),
    }.items():
        text = text.replace(mark, value, 1)
    return text


def main(folder):
    folder = Path(folder)
    files = folder / "extra" / "explorer"
    shutil.rmtree(files, ignore_errors=True)
    data = prepare(files)
    (folder / "fragment.html").write_text(fragment(data), encoding="utf-8", newline="\n")
    size = sum(path.stat().st_size for path in files.rglob("*.webp"))
    print(f"{len(list(files.rglob('*.webp')))} pictures, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
