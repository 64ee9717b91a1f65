"""Prepare the book's explorer, a page that works without a kernel: make all its maps, and the HTML that shows them.

    python book/explorer.py FOLDER

writes FOLDER/extra/explorer, the pictures and maps, which html_extra_path publishes, and FOLDER/fragment.html, which
book/explorer.md includes. The models are the bundled ones. A file has the maps of a method in shades of grey, a row for
each setting and a column for each category; the page lays them over the picture as `plots.overlay` does.
"""

import html
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from matplotlib.colors import to_hex
from PIL import Image, ImageOps
from skimage.measure import approximate_polygon, find_contours

from xai_helpers.checkpoints import scene_categories
from xai_helpers.explorer import (
    FULL_AT,
    as_question,
    cam_layers,
    covers,
    make_maps,
    methods_with_settings,
    peak,
    pictures,
    shown,
    view,
)
from xai_helpers.leaderboard import SLOW, classifier
from xai_helpers.plots import DIM, HEAT, HEAT_OVER_GREY, OPACITY
from xai_helpers.scoring import energy_inside, hits

TEMPLATE = Path(__file__).with_suffix(".html")
MODELS = {
    "resnet": "ResNet",
    "vit": "ViT",
    "swin": "Swin",
    "convnext": "ConvNeXt",
    "regnet": "RegNet",
    "segformer": "SegFormer",
    "cvt": "CvT",
    "mobilevit": "MobileViT",
    "clip-base": "CLIP",
    "efficientnet-lite": "EfficientNet-Lite (ImageNet)",
}
#: Of the others, methods that take long have their default setting only.
IN_FULL = ["resnet", "vit", "swin"]
#: It sees larger pictures, for which these would take minutes.
LEFT_OUT = {"efficientnet-lite": ["SmoothGrad", "RISE"]}
PICTURES = [
    "Scene: a cat and a coffee cup",
    "Scene: a flower and a motorcycle",
    "Scene: a cat and a rocket",
    "Photo: an astronaut and a rocket",
    "Photo: a cat",
]
#: Method -> how many of its settings, None: all.
METHODS = {
    "balanced gradients": None,
    "Grad-CAM": None,
    "HiResCAM": None,
    "Eigen-CAM": None,
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
QUALITY = 80
THUMBNAIL = 112


def slug(name):
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def prepare(files, models=MODELS, names=PICTURES, methods=METHODS):
    """Write pictures and maps into a folder, and return what the page has to know about them."""
    data = {
        "first": FIRST,
        "pictures": {slug(title): {"name": title, "seen": [], "by": {}} for title in names},
        "models": {},
        "methods": {slug(name): name for name in methods},
        "scores": {slug(title): {} for title in names},
        "fullAt": FULL_AT,
        "dim": DIM,
        "heat": HEAT.round(3).tolist(),
        "opacity": OPACITY.round(3).tolist(),
    }
    choice = [FIRST[what] for what in ("picture", "model", "category")]
    for title in names:
        picture = ImageOps.fit(pictures()[title].image.convert("RGB"), (THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        save(picture, files / slug(title) / "thumbnail.webp", quality=QUALITY)
    for key, name in models.items():
        model, processor = classifier(key, "cpu")
        questions = {title: as_question(pictures()[title], model, processor) for title in names}
        pixel_values = questions[names[0]].pixel_values
        table = methods_with_settings(model, processor, pixel_values)
        here = [method for method in methods if method in table and method not in LEFT_OUT.get(key, [])]
        table = {method: table[method] for method in here}
        kept = {
            method: [one.default] if method in SLOW and key not in IN_FULL else list(one.settings)[: methods[method]]
            for method, one in table.items()
        }
        depth = depths(model, cam_layers(model, pixel_values))
        data["models"][key] = {
            "name": name,
            "methods": {slug(method): described(method, table[method], kept[method], depth) for method in table},
        }
        for title, question in questions.items():
            keys = [slug(one) for one in pictures()[title].categories if one in scene_categories(model)]
            about = data["pictures"][slug(title)]
            about["by"][key] = as_seen(files / slug(title), about["seen"], keys, question)
            scores = data["scores"][slug(title)][key] = {category: {} for category in keys}
            for method, settings in kept.items():
                maps = np.stack([make_maps(table[method], setting, question) for setting in settings])
                store(maps, files / slug(title) / key / f"{slug(method)}.webp")
                for i, category in enumerate(keys):
                    scores[category][slug(method)] = [scored(heats[i], question.masks[i]) for heats in maps]
                    for panel in "ab":
                        first, number = FIRST[panel].split(".")
                        if (slug(title), key, category, slug(method)) == (*choice, first):
                            picture = view(question, i, maps[int(number)][i]).picture
                            save(picture, files / f"first-{panel}.webp", quality=QUALITY)
    return data


def depths(model, layers):
    """Label of a layer -> where in the model its output lies, to sort by: that of a stage lies behind its blocks'."""
    paths = [path for path, _ in model.named_modules()]

    def depth(path):
        inside = [i for i, other in enumerate(paths) if f"{other}.".startswith(f"{path}.")]
        return max(inside), -min(inside)

    return {label: depth(layer.path) for label, layer in layers.items()}


def described(name, method, settings, depth):
    found = {
        "name": name,
        "parameter": (method.parameter or "setting").capitalize(),
        "settings": settings,
        "words": [method.words(name, setting) for setting in settings],
        "first": settings.index(method.default) if method.default in settings else 0,
    }
    if method.parameter == "layer":
        found["order"] = sorted(range(len(settings)), key=lambda number: depth[settings[number]])
    return found


def as_seen(folder, views, keys, question):
    """Which of the `views` of a picture is what a model sees and can be asked. A new one is added, and written."""
    picture = shown(question.image)
    one = {
        "size": list(picture.size),
        "categories": {
            key: {"name": category, "covers": percent(covers(question, i)), "outline": outline(mask, picture.size)}
            for i, (key, category, mask) in enumerate(zip(keys, question.categories, question.masks, strict=True))
        },
    }
    path = folder / f"seen-{len(views)}.webp"
    save(picture, path, quality=QUALITY)
    for number, other in enumerate(views):
        if other == one and (folder / f"seen-{number}.webp").read_bytes() == path.read_bytes():
            path.unlink()
            return number
    views.append(one)
    return len(views) - 1


def outline(mask, size):
    """The outline of a mask in a picture of that size, as the path of an SVG."""
    parts = []
    for line in find_contours(np.pad(mask, 1).astype(float), 0.5):
        points = (line[:, ::-1] - 0.5) * np.divide(size, mask.shape[::-1])
        points = approximate_polygon(points, 0.4)[:-1]  # the last is the first again
        if len(points) > 2:
            parts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z")
    return "".join(parts)


def scored(heat, mask):
    """A map's scores and its maximum, in thousandths of its width and height; one of zeros has none."""
    hit, inside = hits(heat[None], mask[None])[0], energy_inside(heat[None], mask[None])[0]
    top = [round(1000 * at) for at in peak(heat)] if heat.max() > 0 else []
    return [int(hit), percent(inside), *top]


def store(maps, path):
    """Write maps, (n_settings, n_categories, height, width) in [0, 1], side by side in shades of grey."""
    rows = [np.hstack(list(heats)) for heats in maps]
    save(Image.fromarray(np.round(255 * np.vstack(rows)).astype(np.uint8)).convert("RGB"), path, lossless=True)


def percent(share):
    return int(f"{share:.0%}".removesuffix("%"))


def save(picture, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, method=4, **options)


def fragment(data):
    """The template with the data, and with the first pair of maps for browsers without script."""
    first = data["first"]
    seen = data["pictures"][first["picture"]]["seen"][data["pictures"][first["picture"]]["by"][first["model"]]]
    model, category, figures = data["models"][first["model"]], seen["categories"][first["category"]]["name"], []
    for panel in ("a", "b"):
        key, number = first[panel].split(".")
        hit, inside, *_ = data["scores"][first["picture"]][first["model"]][first["category"]][key][int(number)]
        words = f"{model['methods'][key]['words'][int(number)]} of {model['name']} for {category}"
        alt = html.escape(f"{words}: {'hit' if hit else 'miss'}, {inside}% inside")
        width, height = seen["size"]
        image = f'<img src="../explorer/first-{panel}.webp" width="{width}" height="{height}" alt="{alt}">'
        figures.append(f"<figure>{image}<figcaption>{alt}</figcaption></figure>")
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
