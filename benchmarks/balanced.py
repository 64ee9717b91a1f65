"""Where maps without a layer point, on scenes with known answers: `python -m benchmarks.balanced`.

All bundled classifiers and CLIPs; test scenes with two objects, the same for all. Beside `explain` without a layer:
gradient x input, which has no rules, Grad-CAM at the layer that others name first, the CAM and layer that point best in
validation scenes, relevance where a model has attention from CLS, and two baselines. In brackets the 95 % bootstrap
interval over scenes of the pointing game; behind it, pointing where hiding the object matters.
"""

import argparse
import functools
import warnings

import pytorch_grad_cam
from captum.attr import InputXGradient

from xai_helpers.attention import relevance
from xai_helpers.attribution import attribute
from xai_helpers.cam import explain
from xai_helpers.checkpoints import examples, names_of
from xai_helpers.leaderboard import MODELS, WHERE_HIDING_MATTERS, classifier, effects_of_hiding, hiding_matters, measure
from xai_helpers.recipes import RECIPES
from xai_helpers.scoring import bootstrap_interval


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=MODELS)
    parser.add_argument("--scenes", type=int, default=120)
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    given = parser.parse_args()
    warnings.filterwarnings("ignore", "the model cannot be forked")
    for name in given.names:
        model, processor = classifier(name)
        methods = {"balanced": functools.partial(explain, model)}
        methods["gradient x input"] = functools.partial(attribute, model, method=InputXGradient)
        if name == "vit" or name in names_of("prompts"):
            methods["relevance"] = functools.partial(relevance, model)
        scenes = examples(model, processor, given.scenes, given.split)
        if name in RECIPES:
            recipe, layers = RECIPES[name], RECIPES[name].sweep(model, scenes[0].pixel_values)
            published = next(path for path in layers if recipe.layers[path].source)
            best = functools.partial(explain, method=getattr(pytorch_grad_cam, recipe.method))
            methods["published layer"] = functools.partial(explain, model, target_layer=layers[published])
            methods["best layer"] = functools.partial(best, model, target_layer=layers[recipe.best])
        matters = hiding_matters(effects_of_hiding(model, processor, given.scenes, given.split))
        agree = (matters["left out"] == matters["blurred"]).mean()
        scores = measure(model, methods, scenes, matters=matters["left out"])
        share = matters["left out"].mean()
        print(f"{name}, {given.scenes} {given.split} scenes; hiding matters for {share:.3f} of the objects,")
        print(f"  both ways of hiding agree for {agree:.3f} of them")
        for method, of_method in scores.groupby("method", sort=False):
            low, high = bootstrap_interval(of_method["pointing"].groupby("scene").mean())
            means = of_method.mean()
            pointing = f"pointing {means['pointing']:.3f} [{low:.3f}, {high:.3f}]"
            where = f"where hiding matters {means[WHERE_HIDING_MATTERS]:.3f}"
            others = f"energy {means['energy']:.3f}  on the other {means['on the other']:.3f}"
            print(f"  {method:17}{pointing}  {where}  {others}", flush=True)


if __name__ == "__main__":
    main()
