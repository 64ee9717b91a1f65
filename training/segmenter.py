"""Train the bundled segmenter on the scenes' masks: `python -m training.segmenter segmenter`.

Writes xai_helpers/bundled/segmenter/ in the hub's folder format with a model card. A run that was stopped goes on from
its last epoch (training/runs/segmenter/). It uses a GPU where there is one.
"""

import numpy as np
import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from training.fit import arguments, fit
from training.recorded import DEVICE, RUNS, Scenes, placed_scene
from training.report import INSTANCES, MEAN, SIDE, STD, made_by, normalised
from xai_helpers.checkpoints import BUNDLED
from xai_helpers.scenes import labels, make_scene

EPOCHS, RATE, DECAY, BATCH = 2, 1.5e-3, 0.02, 64


def new_segmenter():
    """A SegFormer with a decoder, that begins with the encoder of the bundled classifier."""
    names = dict(enumerate(["background", *labels()]))
    config = SegformerConfig.from_pretrained(
        BUNDLED / "segformer",
        id2label=names,
        label2id={name: i for i, name in names.items()},
        problem_type=None,
        decoder_hidden_size=64,
    )
    return SegformerForSemanticSegmentation.from_pretrained(BUNDLED / "segformer", config=config, dtype=torch.float32)


def category_of_each_pixel(places, categories):
    """places (n, side, side) and categories (n, most), as `placed_scene` gives them -> int (n, side, side): each
    pixel's category from 1, or 0."""
    by_number = np.pad(categories.astype(np.int64), ((0, 0), (1, 0)))
    return np.take_along_axis(by_number, places.reshape(len(places), -1).astype(np.int64), axis=1).reshape(places.shape)


def intersection_over_union(model, split, n=1000):
    """The share of pixels that scene and model agree on, of those that either gives a category: a category each.

    Over n scenes each with one object and with two; the last entry, "mean", has the background in it.
    """
    model.eval()
    names = list(model.config.id2label.values())
    counts = np.zeros((len(names), len(names)), np.int64)
    for objects in (1, 2):
        for start in range(0, n, 50):
            seeds = range(100_000 * objects + start, 100_000 * objects + min(start + 50, n))
            scenes = [make_scene(seed, objects, SIDE, split=split) for seed in seeds]
            wanted = np.zeros((len(scenes), SIDE, SIDE), np.int64)
            for answer, scene in zip(wanted, scenes, strict=True):
                for name, mask in zip(scene.categories, scene.masks, strict=True):
                    answer[mask] = names.index(name)
            pixels = normalised(np.stack([np.asarray(scene.image) for scene in scenes]), model.device)
            with torch.no_grad():
                logits = model(pixel_values=pixels).logits
            found = torch.nn.functional.interpolate(logits, size=(SIDE, SIDE), mode="bilinear").argmax(dim=1).cpu()
            pairs = wanted.ravel() * len(names) + found.numpy().ravel()
            counts += np.bincount(pairs, minlength=counts.size).reshape(counts.shape)
    both = np.diag(counts)
    shares = both / (counts.sum(axis=0) + counts.sum(axis=1) - both)
    return {**dict(zip(names, shares.tolist(), strict=True)), "mean": shares.mean().item()}


def train(n_scenes, epochs=EPOCHS, seed=0):
    """Train, resuming where a run was stopped. Returns the model and the seconds that training took."""
    torch.manual_seed(seed)
    model = new_segmenter().to(DEVICE)
    print(f"segmenter: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")

    def batches(rng):
        scenes = Scenes(n_scenes, one=placed_scene).make()
        for pictures, rows, _, move in scenes.batches(BATCH, rng):
            answers = category_of_each_pixel(move(scenes.places[rows]), scenes.categories[rows])
            yield pictures, torch.from_numpy(answers).to(DEVICE)

    seconds = fit(
        model,
        RUNS / "segmenter" / "state.pt",
        batches,
        lambda model, pictures, answers: model(pixel_values=pictures, labels=answers).loss,
        lambda model: intersection_over_union(model, "validation", n=200),
        epochs=epochs,
        steps=n_scenes // BATCH,
        rate=RATE,
        decay=DECAY,
        seed=seed,
    )
    return model, seconds


def report(folder, how, seconds):
    """Score the checkpoint in `folder` as it was saved, write its card, and print it."""
    model = SegformerForSemanticSegmentation.from_pretrained(folder, dtype=torch.float32)
    test = intersection_over_union(model, "test")
    parameters = sum(p.numel() for p in model.parameters())
    size = (folder / "model.safetensors").stat().st_size
    scores = "".join(f"| {name} | {value:.3f} |\n" for name, value in test.items())
    card = f"""# segmenter

SegFormer for semantic segmentation: the encoder and the size of the bundled segformer, from which it started, and a
decoder of width 64; {parameters / 1e6:.2f} million parameters, {size / 1e6:.1f} MB in half precision.
Input: {SIDE} x {SIDE} pixels; output: a score a category and 4 x 4 pixels.

{INSTANCES}

**It was shown the masks**, as a segmenter is: its maps cannot be scored against them as if it had found them itself.

Recipe: {how}
{made_by("segmenter", "segmenter", seconds)}

Intersection over union on 2,000 test scenes (1,000 with one object, 1,000 with two), a pixel's category being the one
with the highest score. Test scenes have distractors of kinds that training never shows.

| score | value |
|---|---|
{scores}"""
    (folder / "README.md").write_text(card)
    print(card)


def main():
    given = arguments(__doc__, ["segmenter"])
    epochs, folder = given.epochs or EPOCHS, BUNDLED / "segmenter"
    model, seconds = train(given.scenes, epochs)
    model.half().save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    SegformerImageProcessor(size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3).save_pretrained(folder)
    how = (
        f"{given.scenes} training scenes of {SIDE} x {SIDE} pixels with the category of each pixel, "
        f"{epochs} epochs, flips and shifts of up to 8 pixels; cross-entropy; AdamW, rate {RATE:g}, one "
        f"cycle, weight decay {DECAY:g} on matrices, batch {BATCH}, seed 0."
    )
    report(folder, how, seconds)


if __name__ == "__main__":
    main()
