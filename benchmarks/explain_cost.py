"""What an explanation costs, in forward passes: `python -m benchmarks.explain_cost`.

ResNet-50 and ViT-B/16 with random weights, one picture of 224 x 224. "plain" is grad-cam as its tutorials call it: the
image repeated for each category, and parameters that require gradients. "without a layer" is balanced gradients.
"""

import argparse
import functools
import statistics
import time

import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from xai_helpers.cam import explain
from xai_helpers.reshape import tokens_to_map
from xai_helpers.wrappers import LogitsModel


def forward(model, pixel_values):
    with torch.inference_mode():
        model(pixel_values)


def plain(model, pixel_values, categories, target_layer, reshape_transform):
    with GradCAM(LogitsModel(model), [target_layer], reshape_transform) as cam:
        images = pixel_values.repeat(len(categories), 1, 1, 1)
        return cam(images, [ClassifierOutputTarget(category) for category in categories])


def measure(calls, repeats):
    """Times calls that take turns, so that a slow spell of the machine meets all of them.

    Returns:
        Per call the median of its seconds, and the median of its ratios to the first call of the same turn.
    """
    turns = []
    for _ in range(repeats + 1):
        seconds = []
        for call in calls.values():
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        turns.append(seconds)
    columns = list(zip(*turns[1:], strict=True))  # the first turn warms up
    ratios = [[value / first for value, first in zip(column, columns[0], strict=True)] for column in columns]
    return list(zip(map(statistics.median, columns), map(statistics.median, ratios), strict=True))


def cases():
    """Yields a name, a model, a target layer and a reshape transform."""
    resnet = ResNetForImageClassification(ResNetConfig(num_labels=1000)).eval()
    yield "ResNet-50, last stage", resnet, resnet.resnet.encoder.stages[-1], None
    vit = ViTForImageClassification(ViTConfig(num_labels=1000)).eval()
    reshape = functools.partial(tokens_to_map, grid=(14, 14))
    yield "ViT-B/16, layers[-2]", vit, vit.vit.layers[-2], reshape
    yield "ViT-B/16, layers[-1].layernorm_before", vit, vit.vit.layers[-1].layernorm_before, reshape


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    pixel_values = torch.randn(1, 3, 224, 224)
    print(f"medians of {repeats} runs on {torch.get_num_threads()} threads; in brackets: forward passes")
    for name, model, layer, reshape in cases():
        for n_categories in (1, 2, 5):
            arguments = (model, pixel_values, list(range(n_categories)), layer, reshape)
            calls = {
                "forward": functools.partial(forward, model, pixel_values),
                "plain": functools.partial(plain, *arguments),
                "explain": functools.partial(explain, *arguments),
                "without a layer": functools.partial(explain, *arguments[:3]),
            }
            results = zip(calls, measure(calls, repeats), strict=True)
            cells = [f"{call} {seconds:.3f} s ({ratio:.2f})" for call, (seconds, ratio) in results]
            print(f"{name}, {n_categories} categories: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
