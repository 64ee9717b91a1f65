"""Labs that undo what a processor does run on the other network, too, whose processor has no `image_mean`."""

import json
import re
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import TimmWrapperForImageClassification

from xai_helpers import checkpoints
from xai_helpers.imagenet import ARCHITECTURE, TAG, efficientnet_lite

LABS = Path(__file__).resolve().parents[1] / "notebooks" / "labs"
SWITCH = re.compile(r'^NAME = "resnet"', re.MULTILINE)


def code_of(lab):
    """The code cells, without Colab's and without the claims, which two scenes do not support."""
    for cell in json.loads((LABS / f"{lab}.ipynb").read_text(encoding="utf-8"))["cells"]:
        code, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code" and "claims" not in tags and "%pip" not in code:
            yield code


@pytest.fixture
def smaller(monkeypatch):
    """The network with pictures of 96 x 96 pixels, which take a fifth of the time."""

    def load():
        model, processor = efficientnet_lite()
        known = {**timm.get_pretrained_cfg(f"{ARCHITECTURE}.{TAG}").to_dict(), "input_size": (3, 96, 96)}
        return model, type(processor)(known, ARCHITECTURE)

    monkeypatch.setattr(checkpoints, "efficientnet_lite", load)
    monkeypatch.setenv("XAI_EXAMPLES", "2")


@pytest.mark.slow
@pytest.mark.parametrize("lab", ["gradients", "perturbation"])
def test_the_lab_runs_on_the_other_network(lab, smaller):
    code, names = list(code_of(lab)), {"__name__": lab}
    assert sum(len(SWITCH.findall(cell)) for cell in code) == 1, "one name at the top"
    states = torch.get_rng_state(), np.random.get_state()
    with warnings.catch_warnings(), plt.rc_context({"backend": "agg"}):
        for cell in code:
            exec(SWITCH.sub('NAME = "efficientnet-lite"', cell), names)
            plt.close("all")
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    assert isinstance(names["model"], TimmWrapperForImageClassification) and names["x"].shape == (1, 3, 96, 96)
    black = names["processor"](Image.new("RGB", (96, 96)), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(names["black"].expand(1, 3, 96, 96), black)
    example = names["photo" if lab == "gradients" else "scene"]
    shown = names["undone"][0] if lab == "gradients" else names["in_colours"](names["x"])[0]
    seen = np.asarray(example.image.resize((96, 96))) / 255
    assert np.abs(np.asarray(shown) - seen).mean() < 0.03, "drawn in the photo's own colours"
