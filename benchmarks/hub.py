"""What the maps of published checkpoints score: `python -m benchmarks.hub` writes xai_helpers/hub_results.csv.

For each recipe, the published checkpoint is downloaded, and the ways to explain it that its page shows are scored on
scenes with two objects of which the checkpoint has a category, beside the baselines. The weekly run of the project
does it; the pages of the recipes say what it found. Names of recipes after the command do only these, and keep the
others' rows. A checkpoint that can't be had is named at the end, and keeps its rows, too.
"""

import argparse
import datetime
import warnings
from pathlib import Path

import pandas as pd

from xai_helpers.checkpoints import CHECKPOINTS, examples, load
from xai_helpers.leaderboard import HUB_RESULTS
from xai_helpers.recipes import RECIPES
from xai_helpers.scoring import score_table

FAMILIES = [name for name in RECIPES if CHECKPOINTS[name].task == "classification"]
SCORES = ["pointing", "energy", "on the other"]


def scores_of(name, weights, n):
    """The rows of one checkpoint."""
    model, processor = load(name, weights)
    scenes = examples(model, processor, n)
    table = score_table(RECIPES[name].ways(model, scenes[0].pixel_values), scenes)[SCORES].round(4)
    about = {
        "model": name,
        "checkpoint": CHECKPOINTS[name].hub if weights == "hub" else weights,
        "scenes": n,
        "made": datetime.date.today(),
        "device": model.device.type,
    }
    return table.rename_axis("method").reset_index().assign(**about)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=FAMILIES, help="default: all")
    parser.add_argument("--weights", default="hub", help="default: %(default)s")
    parser.add_argument("--scenes", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=HUB_RESULTS, help="default: %(default)s")
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "the model cannot be forked")
    before = pd.read_csv(given.out)
    rows, failed = {name: some for name, some in before.groupby("model")}, []
    for name in given.names:
        try:
            rows[name] = scores_of(name, given.weights, given.scenes)
        except OSError as error:
            failed.append(f"{name}: {error}")
            continue
        print(rows[name].to_string(index=False), flush=True)
        ordered = [rows[known] for known in FAMILIES if known in rows]
        pd.concat(ordered)[before.columns].to_csv(given.out, index=False)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
