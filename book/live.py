"""Prepare the book's live page, which explains a reader's photo in the browser.

    python book/live.py FOLDER RUNTIME

writes FOLDER/extra/live, which html_extra_path publishes: the network with its explanation as one ONNX file, what runs
it (onnxruntime-web, installed in the folder RUNTIME), scripts and photos; and FOLDER/fragment.html, which book/live.md
includes. The network is exported anew only where the package or the versions of what exports it have changed.
"""

import gzip
import hashlib
import inspect
import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from xai_helpers.cam import explain
from xai_helpers.checkpoints import load
from xai_helpers.export import to_onnx
from xai_helpers.imagenet import SHA256
from xai_helpers.plots import DIM, HEAT, HEAT_AGAINST, OPACITY, overlay
from xai_helpers.scenes import as_seen, natural

PAGE = Path(__file__).with_suffix("")
NETWORK = "efficientnet-lite"
PHOTOS = {
    "astronaut": "An astronaut",
    "chelsea": "A cat",
    "coffee": "A cup of coffee",
    "china": "A pagoda by a lake",
    "motorcycle": "A motorcycle in a garage",
    "flower": "A flower",
}
EXAMPLE = "astronaut", "football helmet"  # what is to be seen before a photo is chosen
THUMBNAIL = 124
FILES = {"runtime": "runtime.wasm.gz", "model": f"{NETWORK}.onnx.gz"}


def state():
    """A word that changes when the network would be exported differently."""
    package = Path(inspect.getfile(to_onnx)).parent
    sources = [path.read_text(encoding="utf-8") for path in (*sorted(package.glob("*.py")), Path(__file__))]
    versions = [version(name) for name in ("torch", "onnx", "onnxscript", "timm", "transformers")]
    return hashlib.sha256("\n".join([SHA256, *versions, *sources]).encode()).hexdigest()


def export(model, processor, path):
    """The network, its balanced gradients and Grad-CAM at its last layer; the file takes pixels."""
    pixel_values = processor(natural("astronaut").image, return_tensors="pt")["pixel_values"]
    made = to_onnx(
        model, pixel_values, path, processor=processor, half=True, signed=True, grad_cam_at=model.timm_model.bn2
    )
    print(f"{path.name}: {made.nodes} nodes, {made.megabytes:.1f} MB, differences to torch {made.differences}")


def pack(source, target):
    """A file, compressed; the same bytes whenever the source is the same."""
    target.write_bytes(gzip.compress(source.read_bytes(), mtime=0))


def photos(folder):
    """Writes the photos and their thumbnails, and returns what the page has to know about them."""
    found = []
    for name, title in PHOTOS.items():
        picture = natural(name).image
        picture.save(folder / f"{name}.jpg", quality=90)
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side)).resize((THUMBNAIL, THUMBNAIL), Image.LANCZOS)
        square.save(folder / f"{name}.webp", quality=80)
        found.append({"title": title, "photo": f"{name}.jpg", "thumbnail": f"{name}.webp"})
    return found


def example(model, processor, path):
    """A photo with its map, as the page will draw them."""
    photo, category = EXAMPLE
    pixel_values = processor(natural(photo).image, return_tensors="pt")["pixel_values"]
    heat = explain(model, pixel_values, category)[0]
    width, height = (2 * length for length in heat.shape[::-1])
    picture = as_seen(natural(photo), processor).image.resize((width, height), Image.BICUBIC)
    Image.fromarray(overlay(picture, heat)).save(path, quality=80)


def fragment(files, about, model, processor):
    """The template with the data."""
    sizes = {what: (files / name).stat().st_size for what, name in FILES.items()}
    side = processor.data_config["input_size"][1]
    data = FILES | {
        "bytes": sum(sizes.values()),
        "labels": [model.config.id2label[i] for i in range(model.config.num_labels)],
        "side": side,
        "resized": int(side / processor.data_config["crop_pct"]),
        "photos": about,
        "dim": DIM,
        "heat": HEAT.round(3).tolist(),
        "against": HEAT_AGAINST.round(3).tolist(),
        "opacity": OPACITY.round(3).tolist(),
    }
    text = (PAGE / "page.html").read_text(encoding="utf-8")
    for mark, value in {
        "DOWNLOAD": f"{data['bytes'] / 1e6:.1f}",
        "N_CATEGORIES": f"{len(data['labels']):,}",
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }.items():
        text = text.replace(mark, value, 1)
    return text


def main(folder, runtime):
    folder, runtime = Path(folder), Path(runtime) / "node_modules" / "onnxruntime-web" / "dist"
    files, model, key = folder / "extra" / "live", folder / f"{NETWORK}.onnx", folder / "exported.txt"
    folder.mkdir(parents=True, exist_ok=True)
    network = load(NETWORK, "bundled", device="cpu")
    if not (model.is_file() and key.is_file() and key.read_text() == state()):
        export(*network, model)
        key.write_text(state())
    shutil.rmtree(files, ignore_errors=True)
    files.mkdir(parents=True)
    pack(model, files / FILES["model"])
    pack(runtime / "ort-wasm-simd-threaded.wasm", files / FILES["runtime"])
    shutil.copy(runtime / "ort.wasm.bundle.min.mjs", files / "ort.js")
    for script in ("live.js", "worker.js"):
        shutil.copy(PAGE / script, files)
    example(*network, files / "example.webp")
    (folder / "fragment.html").write_text(fragment(files, photos(files), *network), encoding="utf-8", newline="\n")
    print(f"{sum(path.stat().st_size for path in files.iterdir()) / 1e6:.1f} MB in {files}")


if __name__ == "__main__":
    main(*sys.argv[1:])
