"""Train a bundled detector on scenes with boxes: `python -m training.detector yolos`, or `faster-rcnn`.

Writes xai_helpers/bundled/<name>/ in the hub's folder format with a model card. A run that was stopped goes on from its
last epoch (training/runs/<name>/). It uses a GPU where there is one.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import batched_nms, box_convert, generalized_box_iou_loss
from transformers import (
    AutoModelForImageClassification,
    ViTImageProcessor,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from training.fit import arguments, fit
from training.recorded import DEVICE, RUNS, Scenes, placed_scene
from training.report import INSTANCES, MEAN, SIDE, STD, made_by, normalised
from xai_helpers.checkpoints import BUNDLED
from xai_helpers.detectors import SceneFasterRCNN
from xai_helpers.scenes import labels, make_scene

TOKENS = 4  # a YOLOS has detection tokens for 4 x 4 spots of the picture
SMALLEST = 16  # visible pixels of an object that has to be found


@dataclass
class Recipe:
    epochs: int
    rate: float
    decay: float
    batch: int
    what: str


RECIPES = {
    "yolos": Recipe(
        epochs=10,
        rate=8e-4,
        decay=0.02,
        batch=64,
        what="YOLOS with 6 blocks of width 128 and 4 heads, patches of 16 x 16 pixels and 16 detection tokens. "
        "It started from the bundled vit",
    ),
    "faster-rcnn": Recipe(
        epochs=1,
        rate=1e-3,
        decay=0.02,
        batch=32,
        what="torchvision's Faster R-CNN around a feature pyramid of 64 channels on a ResNet with 3 stages of 2 basic "
        "blocks. The ResNet started from the bundled resnet",
    ),
}


def new_yolos():
    """A YOLOS that begins with the blocks, the patches and their positions of the bundled ViT."""
    config = YolosConfig(
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=[SIDE, SIDE],
        patch_size=16,
        num_detection_tokens=TOKENS**2,
        use_mid_position_embeddings=False,
        initializer_range=0.1,
        id2label=dict(enumerate(labels())),
        label2id={c: i for i, c in enumerate(labels())},
    )
    # The files of both have the same names, save for the positions of the tokens that a ViT does not have.
    model = YolosForObjectDetection.from_pretrained(
        BUNDLED / "vit", config=config, dtype=torch.float32, ignore_mismatched_sizes=True
    )
    vit = AutoModelForImageClassification.from_pretrained(BUNDLED / "vit", dtype=torch.float32)
    old, new = vit.vit.embeddings, model.vit.embeddings
    # A detection token begins as a grey patch in the middle of 2 x 2 others: the tokens share out the picture.
    cls, seen = old.position_embeddings.data.split([1, (SIDE // 16) ** 2], dim=1)
    grid = seen.unflatten(1, (SIDE // 16, SIDE // 16)).permute(0, 3, 1, 2)
    spots = torch.nn.functional.avg_pool2d(grid, SIDE // 16 // TOKENS).flatten(2).transpose(1, 2)
    new.position_embeddings.data = torch.cat([cls, seen, spots], dim=1)
    new.detection_tokens.data = old.patch_embeddings.projection.bias.data.expand(1, TOKENS**2, -1).clone()
    return model


def new_faster_rcnn():
    """A Faster R-CNN that begins with the bundled ResNet."""
    resnet = AutoModelForImageClassification.from_pretrained(BUNDLED / "resnet", dtype=torch.float32)
    config = resnet.config
    model = SceneFasterRCNN(
        categories=labels(), hidden_sizes=config.hidden_sizes, depths=config.depths, side=SIDE, channels=64
    )
    missing, unexpected = model.backbone.body.load_state_dict(resnet.resnet.state_dict(), strict=False)
    if missing or unexpected:
        raise RuntimeError(f"the bundled resnet does not fit: {missing} {unexpected}")
    return model


def targets_of(places, categories):
    """What has to be found in each picture.

    Args:
        places: (n, side, side), the number of the object that each pixel shows, from 1, or 0.
        categories: (n, most), those of the objects, from 1, or 0.

    Returns:
        A list of dicts: "boxes", float (k, 4) as left, top, right, bottom in pixels, and "labels", int (k,), from 1.
    """
    targets = []
    for seen, names in zip(places, categories, strict=True):
        boxes, found = [], []
        for number, name in enumerate(names, start=1):
            rows, columns = np.nonzero(seen == number)
            if len(rows) >= SMALLEST:
                boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
                found.append(int(name))
        boxes = torch.tensor(np.array(boxes, np.float32).reshape(-1, 4), device=DEVICE)
        targets.append({"boxes": boxes, "labels": torch.tensor(found, dtype=torch.int64, device=DEVICE)})
    return targets


def yolos_loss(model, pictures, targets):
    """Each detection token answers for one object or for none (Hungarian matching; Fang et al., NeurIPS 2021).

    Two additions make it learn in ten epochs: the tokens have to know it after each of the last four blocks (as in
    DETR, ECCV 2020), and every patch has to know the object at its place, so that there is something for them to
    read. The patches matter most: without them the tokens settled on a box each, whatever there was, and had an
    AP50 of 0.15 on scenes with one object after 80,000 scenes, with them 0.31.
    """
    wanted = []
    for target in targets:
        boxes = box_convert(target["boxes"] / SIDE, "xyxy", "cxcywh")
        wanted.append({"boxes": boxes, "class_labels": target["labels"] - 1})
    blocks = model(pixel_values=pictures, output_hidden_states=True).hidden_states[-4:]
    loss = 0
    for tokens in map(model.vit.layernorm, blocks):
        seen = tokens[:, -(TOKENS**2) :]
        logits, boxes = model.class_labels_classifier(seen), model.bbox_predictor(seen).sigmoid()
        loss = loss + model.loss_function(logits, wanted, model.device, boxes, model.config, None, None)[0] / len(
            blocks
        )
    patches = tokens[:, 1 : -(TOKENS**2)]
    return loss + patch_loss(model.class_labels_classifier(patches), model.bbox_predictor(patches).sigmoid(), wanted)


def patch_loss(logits, boxes, wanted):
    """Each patch answers for the smallest box that its centre lies in, or for none.

    Args:
        logits, boxes: of the patches of each picture, (n, patches, categories + 1) and (n, patches, 4).
        wanted: a dict a picture with "boxes" (k, 4), centre and size as shares of the picture, and "class_labels".
    """
    n, rows = len(logits), int(logits.shape[1] ** 0.5)
    ticks = (torch.arange(rows, device=logits.device) + 0.5) / rows
    y, x = (axis.flatten() for axis in torch.meshgrid(ticks, ticks, indexing="ij"))
    labels_of = torch.full(logits.shape[:2], logits.shape[2] - 1, device=logits.device)  # the last one: no object
    boxes_of = torch.zeros_like(boxes)
    for i in range(n):
        areas = wanted[i]["boxes"][:, 2:].prod(dim=1)
        for k in areas.argsort(descending=True).tolist():
            left, top, right, bottom = box_convert(wanted[i]["boxes"][k], "cxcywh", "xyxy")
            inside = (left <= x) & (x < right) & (top <= y) & (y < bottom)
            labels_of[i, inside], boxes_of[i, inside] = wanted[i]["class_labels"][k], wanted[i]["boxes"][k]
    there = labels_of < logits.shape[2] - 1
    found, right = boxes[there], boxes_of[there]
    overlap = generalized_box_iou_loss(box_convert(found, "cxcywh", "xyxy"), box_convert(right, "cxcywh", "xyxy"))
    named = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels_of.flatten())
    n_there = max(1, len(found))
    return named + (5 * (found - right).abs().sum() + 2 * overlap.sum()) / n_there


def faster_rcnn_loss(model, pictures, targets):
    """The four losses of its two stages, summed."""
    return sum(model(pictures * STD + MEAN, targets).values())


def detections(name, model, pictures, overlap=0.5):
    """Boxes in pixels, labels (from 1) and scores for pictures, uint8 (n, side, side, 3): a list of dicts.

    Of boxes of one category that overlap by more than `overlap`, the most probable is kept (non-maximum suppression; a
    Faster R-CNN has it inside). Published YOLOS models learn to claim each object once and do without; the bundled one,
    which saw a fraction of their pictures, claims some objects twice. With an overlap of 1 all its boxes are kept.
    """
    device = next(model.parameters()).device
    model.eval()
    found = []
    for start in range(0, len(pictures), 100):
        pixels = normalised(pictures[start : start + 100], device)
        with torch.no_grad():
            if name == "yolos":
                output = model(pixel_values=pixels)
                answers = YolosImageProcessor().post_process_object_detection(
                    output, threshold=0.0, target_sizes=[(SIDE, SIDE)] * len(pixels)
                )
                for answer in answers:
                    kept = batched_nms(answer["boxes"], answer["scores"], answer["labels"], overlap)
                    found.append({key: value[kept] for key, value in answer.items()})
                    found[-1]["labels"] += 1
            else:
                found += model(pixels * STD + MEAN)
    return [{key: value.cpu() for key, value in one.items()} for one in found]


def average_precision(name, model, split, n=1000, **options):
    """AP50 by kind of scene: n scenes each with one object, with two, and with the same category twice."""
    found = {}
    rng = np.random.default_rng(0)
    kinds = {
        "one object": (100_000, lambda: 1),
        "two objects": (200_000, lambda: 2),
        "two of the same category": (300_000, lambda: [labels()[rng.integers(len(labels()))]] * 2),
    }
    for kind, (seed, objects) in kinds.items():
        scenes = [make_scene(seed + i, objects(), SIDE, split=split) for i in range(n)]
        metric = MeanAveragePrecision(iou_thresholds=[0.5])
        metric.update(
            detections(name, model, np.stack([np.asarray(scene.image) for scene in scenes]), **options),
            [
                {
                    "boxes": torch.tensor(scene.boxes, dtype=torch.float32),
                    "labels": torch.tensor([labels().index(c) + 1 for c in scene.categories]),
                }
                for scene in scenes
            ],
        )
        found[f"AP50, {kind}"] = metric.compute()["map_50"].item()
    return found


LOSSES = {"yolos": yolos_loss, "faster-rcnn": faster_rcnn_loss}


def train(name, n_scenes, epochs=None, seed=0):
    """Train, resuming where a run was stopped. Returns the model and the seconds that training took."""
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    model = {"yolos": new_yolos, "faster-rcnn": new_faster_rcnn}[name]().to(DEVICE)
    print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")

    def batches(rng):
        scenes = Scenes(n_scenes, one=placed_scene).make()
        return (
            (pictures, targets_of(move(scenes.places[rows]), scenes.categories[rows]))
            for pictures, rows, _, move in scenes.batches(recipe.batch, rng)
        )

    seconds = fit(
        model,
        RUNS / name / "state.pt",
        batches,
        LOSSES[name],
        lambda model: average_precision(name, model, "validation", n=200),
        epochs=epochs or recipe.epochs,
        steps=n_scenes // recipe.batch,
        rate=recipe.rate,
        decay=recipe.decay,
        seed=seed,
    )
    return model, seconds


def save(name, model, folder):
    """Write the checkpoint in the hub's format: fp16 safetensors, config, processor."""
    model.half().save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    if name == "yolos":
        processor = YolosImageProcessor(size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3, do_pad=False)
    else:
        processor = ViTImageProcessor(size=size, do_normalize=False)  # the model does it
    processor.save_pretrained(folder)


def report(name, folder, model, how, seconds):
    """Score the checkpoint, write its card, and print it."""
    test = average_precision(name, model.float(), "test")
    if name == "yolos":
        every_box = average_precision(name, model, "test", overlap=1.0)
        test |= {f"{kind}, without non-maximum suppression": value for kind, value in every_box.items()}
    parameters = sum(p.numel() for p in model.parameters())
    size = (folder / "model.safetensors").stat().st_size
    scores = "".join(f"| {kind} | {value:.3f} |\n" for kind, value in test.items())
    card = f"""# {name}

{RECIPES[name].what}; {parameters / 1e6:.2f} million parameters, {size / 1e6:.1f} MB in half precision.
Input: {SIDE} x {SIDE} pixels.

{INSTANCES}

Recipe: {how} The boxes are those of the objects' visible parts.
{made_by("detector", name, seconds)}

Average precision at an overlap (IoU) of 0.5 on 1,000 test scenes of each kind, after non-maximum suppression. Test
scenes have distractors of kinds that training never shows.

| score | value |
|---|---|
{scores}"""
    (folder / "README.md").write_text(card)
    print(card)


def main():
    given = arguments(__doc__, RECIPES)
    recipe, folder = RECIPES[given.name], BUNDLED / given.name
    model, seconds = train(given.name, given.scenes, given.epochs)
    save(given.name, model, folder)
    how = (
        f"{given.scenes} training scenes of {SIDE} x {SIDE} pixels, epochs: {given.epochs or recipe.epochs}, "
        f"flips and shifts of up to 8 pixels; AdamW, rate {recipe.rate:g}, one cycle, weight decay {recipe.decay:g} "
        f"on matrices, batch {recipe.batch}, seed 0."
    )
    report(given.name, folder, model, how, seconds)


if __name__ == "__main__":
    main()
