"""Which models export with their explanation, and what the files cost: `python -m benchmarks.exports`.

It writes xai_helpers/exports.csv, which the page "Ship it" shows: all bundled classifiers, both CLIPs with prompts,
EfficientNet-Lite0, and four of torchvision and timm with random weights. "times plain" is the time of a map divided by
that of the plain model's scores, both in onnxruntime on one thread and in the same run. Names of models after the
command do only these. All of them take about ten minutes.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import timm
import torch
import torchvision

from benchmarks.explain_cost import measure
from xai_helpers.checkpoints import examples, names_of
from xai_helpers.export import to_onnx
from xai_helpers.leaderboard import classifier

RESULTS = Path(__file__).parents[1] / "xai_helpers" / "exports.csv"
OTHERS = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(),
    "torchvision swin_t": lambda: torchvision.models.swin_t(),
    "timm convnext_atto": lambda: timm.create_model("convnext_atto", pretrained=False),
    "timm vit_tiny_patch16_224": lambda: timm.create_model("vit_tiny_patch16_224", pretrained=False),
}
MODELS = [*names_of("classification", "prompts", "imagenet"), *OTHERS]


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(path, options)


def row(name, folder):
    if name in OTHERS:
        torch.manual_seed(0)
        model, pixel_values = OTHERS[name]().eval(), torch.randn(1, 3, 224, 224)
    else:
        model, processor = classifier(name, "cpu")
        pixel_values = examples(model, processor, 1)[0].pixel_values
    start = time.perf_counter()
    made = to_onnx(model, pixel_values, folder / "explained.onnx")
    took = time.perf_counter() - start
    halved = to_onnx(model, pixel_values, folder / "half.onnx", half=True)
    onnx.utils.extract_model(folder / "explained.onnx", folder / "plain.onnx", ["image"], ["scores"])
    image, n = pixel_values.numpy(), made.inputs["weights"][1][1]
    weights = np.eye(n, dtype=np.float32)[:1]
    plain, explained = session(folder / "plain.onnx"), session(folder / "explained.onnx")
    _, (of_map, times_plain) = measure(
        {
            "plain": lambda: plain.run(None, {"image": image}),
            "map": lambda: explained.run(None, {"image": image, "weights": weights}),
        },
        repeats=5,
    )
    return {
        "nodes": made.nodes,
        "weights, MB": sum(p.numel() for p in model.parameters()) * 4 / 1e6,
        "file, MB": made.megabytes,
        "in half precision": halved.megabytes,
        "export, s": took,
        "map, ms": 1000 * of_map,
        "times plain": times_plain,
        "largest difference": max(made.differences.values()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=MODELS, help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.names:
            rows[name] = row(name, Path(folder))
            print(name, {key: float(f"{value:.3g}") for key, value in rows[name].items()}, flush=True)
            table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
            table.map(lambda value: float(f"{value:.3g}")).to_csv(given.out)


if __name__ == "__main__":
    main()
