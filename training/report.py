"""What a bundled classifier scores, and the model card that says so.

A training writes the card; `python -m training.report resnet vit` measures the scores of bundled checkpoints anew.
"""

import argparse
import platform

import numpy as np
import pandas as pd
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from xai_helpers.checkpoints import BUNDLED, default_device
from xai_helpers.leaderboard import effects_of_hiding
from xai_helpers.scenes import PHOTOS, labels, make_scene, natural

DEVICE = default_device()
SIDE, MEAN, STD = 128, 0.5, 0.5
FALSE_ALARMS = 0.02  # share of object-free validation scenes in which the chosen threshold finds an object

INSTANCES = f"""**It knows instances, not categories.** Every training scene shows the same few cut-outs
({", ".join(labels())}),
so the model recognises this cat and this cup, not cats and cups. It is for learning how explanations work, and for
nothing else."""


def made_by(module, name, seconds):
    """Which command made a checkpoint, in what time and on what machine."""
    cores = torch.get_num_threads()
    machine = f"{cores} CPU core{'s' * (cores > 1)}" if DEVICE.type == "cpu" else f"an accelerator ({DEVICE.type})"
    if DEVICE.type == "cuda":
        machine = torch.cuda.get_device_name()
    return f"""Made by `python -m training.{module} {name}` in {seconds / 60:.0f} minutes on {machine}
({platform.machine()}), shared with other work; the making of the scenes is not counted."""


def normalised(pictures, device="cpu"):
    """uint8 (n, side, side, 3) -> float32 (n, 3, side, side) as the processor gives it."""
    return (torch.tensor(pictures, device=device).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def logits(model, images, batch=100):
    """Scores of PIL pictures of the model's size: float32 (n, n_categories)."""
    device = next(model.parameters()).device
    model.eval()
    rows = []
    for start in range(0, len(images), batch):
        pictures = np.stack([np.asarray(image) for image in images[start : start + batch]])
        with torch.no_grad():
            rows.append(model(pixel_values=normalised(pictures, device)).logits.float().cpu())
    return torch.cat(rows).numpy()


def scored(model, split, n):
    """The model's scores for n scenes each with no, one and two objects, and what is in them.

    Returns:
        Two dicts from the number of objects to an array (n, n_categories): the scores, and which categories are there.
    """
    outputs, targets = {}, {}
    for objects in (0, 1, 2):
        # Seeds of a kind of scene begin at their own hundred thousand.
        made = [make_scene(100_000 * objects + i, objects, SIDE, 2 if objects == 0 else None, split) for i in range(n)]
        outputs[objects] = logits(model, [scene.image for scene in made])
        targets[objects] = np.array([np.isin(labels(), scene.categories) for scene in made])
    return outputs, targets


def score(model, split, n=1000):
    """Scores over n scenes each with no, one and two objects, with a threshold that is set for 2 % false alarms."""
    return rates(*scored(model, split, n))


def rates(outputs, targets, threshold=None):
    """The scores of what `scored` returned. Without a threshold, it is set for 2 % false alarms."""
    found, n = {}, len(outputs[0])
    found["one object, top-1"] = targets[1][np.arange(n), outputs[1].argmax(axis=1)].mean()
    top2 = np.argsort(-outputs[2], axis=1)[:, :2]
    found["two objects, both in top 2"] = np.take_along_axis(targets[2], top2, axis=1).all(axis=1).mean()
    if threshold is None:
        threshold = float(1 / (1 + np.exp(-np.quantile(outputs[0].max(axis=1), 1 - FALSE_ALARMS))))
    level = np.log(threshold / (1 - threshold))
    found["no object, two distractors, one is called an object"] = (outputs[0] > level).any(axis=1).mean()
    found["one and two objects, every label right"] = np.mean(
        [((outputs[k] > level) == targets[k]).all(axis=1).mean() for k in (1, 2)]
    )
    found["threshold"] = threshold
    return found


def natural_photos(model, processor):
    """The first category of each untouched photo, squashed and cropped at the centre, and whether it is right."""
    rows = []
    for name, answers in PHOTOS.items():
        image = natural(name).image
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        for how, picture in (("squashed", image), ("cropped", image.crop((left, top, left + side, top + side)))):
            with torch.no_grad():
                first = model(**processor(picture, return_tensors="pt").to(model.device)).logits[0].argmax().item()
            rows.append((name, how, labels()[first], labels()[first] in answers))
    return rows


def by_category(outputs, targets, threshold, falls):
    """What `scored` returned and `effects_of_hiding`, by category.

    Returns:
        A pandas DataFrame. "recall": in how many of the scenes with the object it is called; "false alarms": in how
        many of the others; "effect of hiding": how far its score falls, on the mean, when it is left out of the scene.
    """
    outputs, there = (np.concatenate(list(by_objects.values())) for by_objects in (outputs, targets))
    called = outputs > np.log(threshold / (1 - threshold))
    falls = falls["left out"].groupby("category").mean()
    rows = {
        category: (called[there[:, k], k].mean(), called[~there[:, k], k].mean(), falls[category])
        for k, category in enumerate(labels())
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["recall", "false alarms", "effect of hiding"])


SCORES = "Scores on 2,000 test scenes"


def scores(folder):
    """The part of a card that says what the checkpoint in `folder`, as it was saved, scores."""
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
    processor = AutoImageProcessor.from_pretrained(folder)
    threshold = score(model, "validation")["threshold"]
    on_test = scored(model, "test", 1000)
    test = rates(*on_test, threshold)
    photos = natural_photos(model, processor)
    right = sum(row[-1] for row in photos)
    text = f"""{SCORES} (1,000 with one object, 1,000 with two) and 1,000 more without an object. Test scenes have
distractors of kinds that training never shows. An object counts as called where its probability is above
{threshold:.2f}, the threshold at which {FALSE_ALARMS:.0%} of the object-free validation scenes have a false alarm.

| score | value |
|---|---|
"""
    text += "".join(f"| {name} | {value:.3f} |\n" for name, value in test.items() if name != "threshold")
    text += f"| untouched photos whose first category is right, squashed and cropped | {right} of {len(photos)} |\n"
    wrong = [f"{name} {way} gives {first}" for name, way, first, good in photos if not good]
    text += f"""
Wrong on untouched photos: {", ".join(wrong) or "none"}.

By category: in how many of these scenes with the object it is called, in how many of the others, and how far its score
(a logit) falls when it is left out of the scene, the mean over 500 test scenes with two objects.

| category | recall | false alarms | effect of hiding |
|---|---|---|---|
"""
    for category, row in by_category(*on_test, threshold, effects_of_hiding(model, processor, 500)).iterrows():
        text += f"| {category} | {row['recall']:.3f} | {row['false alarms']:.3f} | {row['effect of hiding']:.2f} |\n"
    return text


def report(folder, what, how, seconds):
    """Score the checkpoint in `folder` as it was saved, write its card, and print it."""
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    size = (folder / "model.safetensors").stat().st_size
    card = f"""# {folder.name}

{what}; {parameters / 1e6:.2f} million parameters, {size / 1e6:.1f} MB in half precision. Input: {SIDE} x {SIDE} pixels.

{INSTANCES}

Recipe: {how} Masks were never shown to it.
{made_by("classifier", folder.name, seconds)}

{scores(folder)}"""
    (folder / "README.md").write_text(card)
    print(card)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", help="bundled classifiers")
    for name in parser.parse_args().names:
        card = BUNDLED / name / "README.md"
        how, _, _ = card.read_text().partition(SCORES)
        card.write_text(how + scores(card.parent))


if __name__ == "__main__":
    main()
