"""Train a bundled classifier on scenes: `python -m training.classifier resnet`, then the families that it teaches.

Writes xai_helpers/bundled/<name>/ in the hub's folder format with a model card. A run that was stopped goes on from its
last epoch (training/runs/<name>/). It uses a GPU where there is one.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    CvtConfig,
    MobileViTConfig,
    RegNetConfig,
    ResNetConfig,
    SegformerConfig,
    SwinConfig,
    ViTConfig,
    ViTImageProcessor,
)

from training.fit import arguments, fit
from training.recorded import DEVICE, RUNS, Scenes, bare_scene, coin_scene, training_scene
from training.report import MEAN, SIDE, STD, normalised, report, score
from xai_helpers.checkpoints import BUNDLED
from xai_helpers.scenes import labels


@dataclass
class Recipe:
    """How a family is trained.

    `teacher`: the bundled checkpoint whose outputs for a scene are half of the target. `on_coins`: how many more epochs
    follow on scenes with more coins, for a network that never looks at a coin after the first ones.
    """

    config: object
    epochs: int
    rate: float
    decay: float
    what: str
    teacher: str | None = None
    scene: Callable = training_scene
    on_coins: int = 0


def recipes():
    """The described families by name, and two with a fault.

    `resnet-shortcut` learns a shortcut; `mobilevit-default` is `mobilevit` without its scenes with more coins.
    """
    common = {
        "id2label": dict(enumerate(labels())),
        "label2id": {c: i for i, c in enumerate(labels())},
        "problem_type": "multi_label_classification",
    }
    # So narrow a network starts from larger weights than the usual 0.02, which suits a width of some hundreds: with
    # 0.02 a SegFormer was still guessing after 40,000 scenes.
    narrow = {"initializer_range": 0.1}
    resnet = Recipe(
        ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic", **common),
        epochs=3,
        rate=2e-3,
        decay=0.02,
        what="ResNet with 3 stages of 2 basic blocks, stride 16",
    )
    mobilevit = Recipe(
        MobileViTConfig(
            image_size=SIDE,
            hidden_sizes=[48, 64, 80],
            neck_hidden_sizes=[16, 24, 32, 48, 64, 80, 256],
            expand_ratio=2.0,
            output_stride=16,
            **common,
            **narrow,
        ),
        epochs=5,
        rate=2e-3,
        decay=0.02,
        teacher="resnet",
        on_coins=2,
        what="MobileViT, narrower than the smallest published one, with stride 16",
    )
    shortcut = "The same as the bundled resnet, but trained on scenes in which whatever is pasted is an object"
    unseen = "The same as the bundled mobilevit, but without its epochs on scenes with more coins"
    return {
        "resnet": resnet,
        "resnet-shortcut": replace(resnet, scene=bare_scene, what=shortcut),
        "vit": Recipe(
            ViTConfig(
                hidden_size=128,
                num_hidden_layers=6,
                num_attention_heads=4,
                intermediate_size=256,
                image_size=SIDE,
                patch_size=16,
                **common,
            ),
            epochs=16,
            rate=1.5e-3,
            decay=0.05,
            teacher="resnet",
            what="ViT with 6 blocks of width 128 and 4 heads, patches of 16 x 16 pixels",
        ),
        "convnext": Recipe(
            # Larger weights still, and layer scales of 1, not 1e-6: with smaller ones it was guessing for longer.
            ConvNextConfig(
                num_stages=3,
                hidden_sizes=[32, 64, 128],
                depths=[2, 2, 4],
                layer_scale_init_value=1.0,
                initializer_range=0.2,
                **common,
            ),
            epochs=9,
            rate=3e-3,
            decay=0.02,
            teacher="resnet",
            what="ConvNeXt with 3 stages of 2, 2 and 4 blocks, stride 16",
        ),
        "regnet": Recipe(
            RegNetConfig(
                embedding_size=32,
                hidden_sizes=[32, 64, 128],
                depths=[1, 2, 4],
                groups_width=16,
                layer_type="y",
                **common,
            ),
            epochs=3,
            rate=2e-3,
            decay=0.02,
            teacher="resnet",
            what="RegNetY with 3 stages of 1, 2 and 4 blocks, groups of 16 channels, stride 16",
        ),
        "mobilevit": mobilevit,
        "mobilevit-default": replace(mobilevit, on_coins=0, what=unseen),
        "swin": Recipe(
            SwinConfig(
                image_size=SIDE,
                embed_dim=32,
                depths=[2, 2, 4],
                num_heads=[1, 2, 4],
                window_size=4,
                mlp_ratio=2.0,
                drop_path_rate=0.0,
                **common,
                **narrow,
            ),
            epochs=5,
            rate=1.5e-3,
            decay=0.05,
            teacher="resnet",
            on_coins=2,
            what="Swin with 3 stages of 2, 2 and 4 blocks, windows of 4 x 4 tokens, stride 16",
        ),
        "segformer": Recipe(
            # Four stages, as everywhere; the last does not halve the grid again.
            SegformerConfig(
                hidden_sizes=[24, 48, 96, 128],
                patch_sizes=[7, 3, 3, 3],
                strides=[4, 2, 2, 1],
                sr_ratios=[8, 4, 2, 1],
                num_attention_heads=[1, 2, 4, 4],
                mlp_ratios=[2, 2, 2, 2],
                drop_path_rate=0.0,
                **common,
                **narrow,
            ),
            epochs=6,
            rate=1.5e-3,
            decay=0.05,
            teacher="resnet",
            on_coins=2,
            what="SegFormer's encoder with 4 stages of 2 blocks and a classifier, stride 16",
        ),
        "cvt": Recipe(
            CvtConfig(
                embed_dim=[32, 64, 128],
                num_heads=[1, 2, 4],
                depth=[1, 2, 4],
                mlp_ratio=[2.0, 2.0, 2.0],
                drop_path_rate=[0.0, 0.0, 0.0],
                **common,
                **narrow,
            ),
            epochs=3,
            rate=1.5e-3,
            decay=0.05,
            teacher="resnet",
            on_coins=4,
            what="CvT with 3 stages of 1, 2 and 4 blocks, stride 16, a CLS token in the last stage",
        ),
    }


def taught(teacher, scenes, batch=100):
    """The teacher's probabilities for each training scene, asked for once: float32 (n, n_categories)."""
    weights = hashlib.sha256((BUNDLED / teacher / "model.safetensors").read_bytes()).hexdigest()
    file = RUNS / f"taught-{scenes.one.__name__}s-{scenes.n}-{weights[:16]}.npy"
    if not file.exists():
        model = AutoModelForImageClassification.from_pretrained(BUNDLED / teacher, dtype=torch.float32)
        model.to(DEVICE).eval()
        starts = tqdm(range(0, scenes.n, batch), desc=f"asking the {teacher}", mininterval=10)
        with torch.no_grad():
            answers = [
                model(pixel_values=normalised(scenes.pictures[i : i + batch], DEVICE)).logits.sigmoid().cpu()
                for i in starts
            ]
        np.save(file, np.concatenate(answers))
    return np.load(file)


def train(name, n_scenes, epochs=None, seed=0, batch=64):
    """Train, resuming where a run was stopped. Returns the model and the seconds that training took."""
    recipe = recipes()[name]
    torch.manual_seed(seed)
    model = AutoModelForImageClassification.from_config(recipe.config).to(DEVICE, memory_format=torch.channels_last)
    print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")

    @functools.cache
    def scenes_and_targets(one):
        scenes = Scenes(n_scenes, one=one).make()
        return scenes, (scenes.targets + taught(recipe.teacher, scenes)) / 2 if recipe.teacher else scenes.targets

    def batches(one, rng):
        scenes, targets = scenes_and_targets(one)
        return (
            (pictures, torch.from_numpy(targets[rows].astype(np.float32)).to(DEVICE))
            for pictures, rows, *_ in scenes.batches(batch, rng)
        )

    seconds = 0
    cycles = {"state.pt": (recipe.scene, epochs or recipe.epochs)}
    if recipe.on_coins:
        cycles["on_coins.pt"] = coin_scene, recipe.on_coins
    for state, (one, n_epochs) in cycles.items():
        seconds += fit(
            model,
            RUNS / name / state,
            functools.partial(batches, one),
            lambda model, pictures, targets: F.binary_cross_entropy_with_logits(
                model(pixel_values=pictures).logits, targets
            ),
            lambda model: score(model, "validation", n=300),
            epochs=n_epochs,
            steps=n_scenes // batch,
            rate=recipe.rate,
            decay=recipe.decay,
            seed=seed,
        )
    return model, seconds


def save(model, folder):
    """Write the checkpoint in the hub's format: fp16 safetensors, config, processor."""
    model.half().save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessor(size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3).save_pretrained(folder)


def main():
    given = arguments(__doc__, recipes())
    recipe, folder = recipes()[given.name], BUNDLED / given.name
    model, seconds = train(given.name, given.scenes, given.epochs)
    save(model, folder)
    teacher = f", half of the loss against the outputs of the bundled {recipe.teacher}" if recipe.teacher else ""
    coins = f", then {recipe.on_coins} on as many with more coins and a cycle of its own" if recipe.on_coins else ""
    how = (
        f"{given.scenes} training scenes of {SIDE} x {SIDE} pixels, {given.epochs or recipe.epochs} epochs{coins}, "
        f"flips and shifts of up to 8 pixels; binary cross-entropy, several labels a picture{teacher}; "
        f"AdamW, rate {recipe.rate:g}, one cycle, weight decay {recipe.decay:g} on matrices, batch 64, seed 0."
    )
    report(folder, recipe.what, how, seconds)


if __name__ == "__main__":
    main()
