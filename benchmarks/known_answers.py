"""The full leaderboard: `python -m benchmarks.known_answers` writes xai_helpers/known_answers.csv.

Every method of `xai_helpers.leaderboard` on its models and on the same 100 test scenes with two objects. Each CAM is
made at the layer that is best for it on 12 validation scenes, by the sum of pointing and energy. ROAD and deletion are
measured in the first 20 scenes, for the first category. A squared Grad-CAM is there to show what sharpening does to a
score. The table is written anew after each model; all of them take about three and a half hours on one core, the
larger CLIP half an hour of it and EfficientNet-Lite0 an hour and a half. Names of models after the command do only
these, and keep the others' rows. With a folder to keep what is done, method by method, a run that was stopped goes on
where it was. Seconds are those of all maps of a scene on this machine; "x Grad-CAM" in the printed tables is their
ratio to those of Grad-CAM on the same model and in the same run.
"""

import argparse
import datetime
import functools
import re
import sys
import warnings
from pathlib import Path

import pandas as pd
import torch

from xai_helpers.checkpoints import examples
from xai_helpers.leaderboard import (
    MODELS,
    RESULTS,
    best_layers,
    classifier,
    effects_of_hiding,
    hiding_matters,
    layers_to_try,
    measure,
    methods_for,
    summarise,
)


def done_before(folder, name, make, index):
    """The table that make returns, with these columns as its index, from a file if an earlier run kept it there."""
    if folder is None:
        return make()
    path = folder / f"{re.sub('[^a-z0-9]+', '_', name.lower().replace('+', 'p'))}.csv"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        make().to_csv(path)
        print(f"{datetime.datetime.now():%H:%M} {name}", flush=True)
    return pd.read_csv(path).set_index(index)


def board_of(name, n_scenes, n_faithful, n_validation, folder=None):
    """The table of one model."""
    folder = folder and folder / name
    model, processor = classifier(name)
    made = examples(model, processor, n_scenes)
    layers = layers_to_try(name, model, made[0].pixel_values)
    validation = functools.partial(examples, model, processor, n_validation, "validation")
    best = done_before(
        folder,
        "layers",
        lambda: pd.Series(best_layers(model, layers, validation()), name="layer").rename_axis("method").to_frame(),
        ["method"],
    )["layer"].to_dict()
    methods = methods_for(name, model, made[0].pixel_values, {cam: layers[path] for cam, path in best.items()})
    grad_cam = methods["Grad-CAM"]
    methods["Grad-CAM, squared"] = lambda x, names: grad_cam(x, names) ** 2
    best["Grad-CAM, squared"] = best["Grad-CAM"]
    matters = hiding_matters(effects_of_hiding(model, processor, n_scenes))
    agree = (matters["left out"] == matters["blurred"]).mean()
    print(f"{name}: hiding matters for {matters['left out'].mean():.3f}; both ways of hiding agree for {agree:.3f}")
    parts = [
        done_before(
            folder,
            method,
            lambda method=method: measure(
                model, {method: methods[method]}, made, n_faithful, matters=matters["left out"]
            ),
            ["method", "scene", "category"],
        )
        for method in methods
    ]
    scores = pd.concat(parts)
    table = summarise(scores[~scores.index.duplicated()])  # each part has the baselines that know nothing
    return table.assign(layer=table["method"].map(best))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=MODELS, help="default: all")
    parser.add_argument("--scenes", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--faithful", type=int, default=20, help="scenes for ROAD and deletion (%(default)s)")
    parser.add_argument("--validation", type=int, default=12, help="scenes for the choice of layers (%(default)s)")
    parser.add_argument("--keep", type=Path, help="folder for what is done; default: nothing is kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", "the model cannot be forked")
    command, cores = " ".join(["python -m benchmarks.known_answers", *sys.argv[1:]]), torch.get_num_threads()
    tables = {}
    if given.out.exists() and set(given.names) < set(MODELS):
        tables = {
            name: rows.drop(columns="model") for name, rows in pd.read_csv(given.out, comment="#").groupby("model")
        }
    for name in given.names:
        tables[name] = board_of(name, given.scenes, given.faithful, given.validation, given.keep)
        wide = tables[name].pivot_table(index="method", columns="score", values="mean", sort=False)
        wide["x Grad-CAM"] = wide["seconds"] / wide.loc["Grad-CAM", "seconds"]
        print(f"{name}\n{wide.round(3).to_string()}\n", flush=True)
        ordered = {model: tables[model] for model in MODELS if model in tables}
        table = pd.concat(ordered, names=["model"]).reset_index("model").reset_index(drop=True)
        with open(given.out, "w") as file:
            file.write(f"# {datetime.date.today()}, {command}, {cores} CPU thread{'s' * (cores > 1)}\n")
            table.round(4).to_csv(file, index=False)


if __name__ == "__main__":
    main()
