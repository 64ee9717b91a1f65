"""What a scene costs: `python -m benchmarks.scene_rate`, on one core.

The reference is what a training step of the bundled ResNet takes for one picture, forward and backward.
"""

import time

import cv2
import torch
from transformers import AutoModelForImageClassification

from training.classifier import recipes
from xai_helpers.scenes import make_scene


def seconds(call, n):
    """Mean seconds of a call over n calls, after as many to warm up: the first ones read photos and cut objects out."""
    for i in range(n):
        call(i)
    start = time.perf_counter()
    for i in range(n):
        call(i)
    return (time.perf_counter() - start) / n


def main():
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    model = AutoModelForImageClassification.from_config(recipes()["resnet"].config)
    pictures = torch.randn(16, 3, 128, 128)
    step = seconds(lambda i: model(pixel_values=pictures).logits.sum().backward(), 10) / len(pictures)
    print(f"training step of the ResNet: {1e3 * step:.1f} ms a picture")
    for size in (128, 256, 384):
        scene = seconds(lambda i, size=size: make_scene(i, size=size, split="train"), 300)
        print(f"scene of {size} x {size}: {1e3 * scene:.1f} ms, {1 / scene:.0f} scenes/s, {scene / step:.2f} steps")


if __name__ == "__main__":
    main()
