"""What ScoreCAM and AblationCAM cost for several categories: `python -m benchmarks.masked_passes`.

The smallest published MobileViT (apple/mobilevit-xx-small) with random weights, one picture of 256 x 256, and a target
layer of 32 channels in place of 80, so that a category takes seconds: 32 masked images, or 32 ablated channels.
"grad-cam" is its own ScoreCAM or AblationCAM as its tutorials call it: the image repeated for each category. Batches
are grad-cam's in both.
"""

import argparse
import contextlib
import functools
import io

import numpy as np
import torch
from pytorch_grad_cam import AblationCAM, ScoreCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from transformers import MobileViTConfig, MobileViTForImageClassification

from benchmarks.explain_cost import measure
from xai_helpers.cam import explain
from xai_helpers.wrappers import LogitsModel


def mobilevit():
    """A random MobileViT whose norms have met pictures; without that its signal fades into numbers slow to compute."""
    config = MobileViTConfig(
        hidden_sizes=[64, 80, 96], neck_hidden_sizes=[16, 16, 24, 48, 64, 32, 320], expand_ratio=2.0, num_labels=1000
    )
    model = MobileViTForImageClassification(config).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over the pictures it has met
    with torch.no_grad():
        model(torch.randn(4, 3, 256, 256))
    return model.eval()


def plain(method, model, pixel_values, categories, target_layer):
    with contextlib.redirect_stderr(io.StringIO()), method(LogitsModel(model), [target_layer]) as cam:
        images = pixel_values.repeat(len(categories), 1, 1, 1)
        return cam(images, [ClassifierOutputTarget(category) for category in categories])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    model, pixel_values = mobilevit(), torch.randn(1, 3, 256, 256)
    target_layer = model.mobilevit.encoder.layer[-1]
    print(f"medians of {repeats} runs on {torch.get_num_threads()} threads; in brackets: times explain's one category")
    for method in (ScoreCAM, AblationCAM):
        calls = {}
        for n_categories in (1, 2, 5):
            arguments = (pixel_values, list(range(n_categories)), target_layer)
            calls[f"explain {n_categories}"] = functools.partial(explain, model, *arguments, method=method)
        for n_categories in (1, 2):
            arguments = (pixel_values, list(range(n_categories)), target_layer)
            calls[f"grad-cam {n_categories}"] = functools.partial(plain, method, model, *arguments)
        difference = abs(calls["explain 2"]() - calls["grad-cam 2"]()).max()
        results = zip(calls, measure(calls, repeats), strict=True)
        cells = [f"{call} {seconds:.2f} s ({ratio:.2f})" for call, (seconds, ratio) in results]
        print(f"{method.__name__}: {', '.join(cells)}; the maps differ by {np.float32(difference):.0e}", flush=True)


if __name__ == "__main__":
    main()
