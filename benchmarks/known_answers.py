"""The full leaderboard: `python -m benchmarks.known_answers` writes xai_helpers/known_answers.csv.

Every method of `xai_helpers.leaderboard` on its models and on test scenes with two objects: 500 scenes, 50 for methods
that take many times as long as Grad-CAM. ROAD and deletion are measured in the first 50, for the first category. The
table is written anew after each model; all of them take about an hour on one core. Seconds are those of all maps of a
scene on this machine; "x Grad-CAM" in the printed tables is their ratio to those of Grad-CAM on the same model and in
the same run.
"""

import argparse
import datetime
import sys

import pandas as pd
import torch

from xai_helpers.checkpoints import examples, load
from xai_helpers.leaderboard import (
    MODELS,
    RESULTS,
    SLOW,
    effects_of_hiding,
    hiding_matters,
    measure,
    methods_for,
    summarise,
)


def board_of(name, n_scenes, n_slow):
    """The table of one model."""
    model, processor = load(name, weights="bundled")
    made = examples(model, processor, n_scenes)
    parts = []
    methods = methods_for(name, model, made[0].pixel_values)
    matters = hiding_matters(effects_of_hiding(model, processor, n_scenes))
    agree = (matters["left out"] == matters["blurred"]).mean()
    print(f"{name}: hiding matters for {matters['left out'].mean():.3f}; both ways of hiding agree for {agree:.3f}")
    for slow, scenes in ((False, made), (True, made[:n_slow])):
        some = {key: method for key, method in methods.items() if (key in SLOW) == slow}
        scores = measure(model, some, scenes, n_faithful=n_slow, matters=matters["left out"])
        if slow:  # the baselines are in the first part
            scores = scores[scores.index.get_level_values("method").isin(list(some))]
        parts.append(scores)
    return summarise(pd.concat(parts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--slow", type=int, default=50, help="scenes for slow methods, ROAD and deletion (%(default)s)")
    parser.add_argument("--out", default=RESULTS, help="default: %(default)s")
    arguments = parser.parse_args()
    command, cores = " ".join(["python -m benchmarks.known_answers", *sys.argv[1:]]), torch.get_num_threads()
    tables = {}
    for name in MODELS:
        tables[name] = board_of(name, arguments.scenes, arguments.slow)
        wide = tables[name].pivot_table(index="method", columns="score", values="mean", sort=False)
        wide["x Grad-CAM"] = wide["seconds"] / wide.loc["Grad-CAM", "seconds"]
        print(f"{name}\n{wide.round(3).to_string()}\n", flush=True)
        table = pd.concat(tables, names=["model"]).reset_index("model").reset_index(drop=True)
        with open(arguments.out, "w") as file:
            file.write(f"# {datetime.date.today()}, {command}, {cores} CPU thread{'s' * (cores > 1)}\n")
            table.round(4).to_csv(file, index=False)


if __name__ == "__main__":
    main()
