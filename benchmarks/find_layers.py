"""What finding the target layers costs, in forward passes of one image: `python -m benchmarks.find_layers`.

The published shapes of `explain_cost`, with random weights.
"""

import argparse

import torch

from benchmarks.explain_cost import cases, forward, measure
from xai_helpers.layers import find_target_layers


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="turns to measure (default: %(default)s)")
    repeats = parser.parse_args().repeats
    pixel_values = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    seen = set()
    for name, model, *_ in cases():
        if model in seen:  # the same model with another layer
            continue
        seen.add(model)
        results = measure(
            {
                "forward": lambda model=model: forward(model, pixel_values),
                "finder": lambda model=model: find_target_layers(model, pixel_values),
            },
            repeats,
        )
        (seconds, _), (_, ratio) = results
        print(f"{name.split(',')[0]}: a forward pass takes {1000 * seconds:.0f} ms, the finder {ratio:.1f} times that")


if __name__ == "__main__":
    main()
