"""Which layer points best: `python -m benchmarks.best_layers`, the sweep behind `RECIPES`.

Each of a recipe's layers, by Grad-CAM and by HiResCAM, on validation scenes with two objects; layers that are published
elsewhere by Grad-CAM alone, as they are published. The choice is that with the highest sum of pointing and energy, or a
published one that the scenes can't tell from it ("from" at most 0). The recipe's own is marked, and the sources. Then
Deep Feature Factorization: how often the concept that rules an object is named right by the recipe's layer and head,
and by the classifier at the last layer.
"""

import argparse
import functools
import warnings

from pytorch_grad_cam import GradCAM, HiResCAM

from xai_helpers.cam import explain
from xai_helpers.checkpoints import examples, load, names_of
from xai_helpers.concepts import named_right
from xai_helpers.layers import find_target_layers
from xai_helpers.recipes import RECIPES
from xai_helpers.scoring import behind_best, score_maps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=names_of("classification", "imagenet"))
    parser.add_argument("--scenes", type=int, default=50)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", "the model cannot be forked")
    for name in given.names:
        recipe, (model, processor) = RECIPES[name], load(name, "bundled")
        scenes = examples(model, processor, given.scenes, "validation")
        first = scenes[0].pixel_values
        choices = {
            f"{method.__name__} at {path}": functools.partial(explain, model, target_layer=layer, method=method)
            for path, layer in recipe.sweep(model, first).items()
            for method in (GradCAM, HiResCAM)
            if not (recipe.layers[path].source and method is HiResCAM)
        }
        scores = score_maps(choices, scenes)
        means = scores.groupby("method").mean()[["pointing", "energy", "on the other"]]
        means["sum"] = means["pointing"] + means["energy"]
        best = means["sum"].drop(["random map", "centre dot"]).idxmax()
        behind = behind_best(scores, list(choices))
        for choice, row in means.sort_values("sum", ascending=False).iterrows():
            path = choice.partition(" at ")[2]
            marks = [
                "best" * (choice == best),
                "recipe" * (choice == f"{recipe.method} at {recipe.best}"),
                recipe.layers[path].source if path in recipe.layers else "",
            ]
            gap = f"behind {behind.loc[choice, 'behind']:.3f}, from {behind.loc[choice, 'from']:.3f}" if path else ""
            print(
                f"{name:10}{row['pointing']:.3f}  {row['energy']:.3f}  {row['on the other']:.3f}  {choice:55}"
                f"{gap:28}{', '.join(filter(None, marks))}",
                flush=True,
            )
        layer, head = recipe.dff(model, first), recipe.concept_head(model, first)
        found = find_target_layers(model, first).dff
        right = named_right(model, scenes, layer, head)
        try:
            bare = f"{named_right(model, scenes, found, getattr(model, 'classifier', head)):.2f}"
        except ValueError:
            bare = "-"
        print(f"{name:10}concepts named right: {right:.2f} by the recipe; {bare} by the classifier at {found.path}\n")


if __name__ == "__main__":
    main()
