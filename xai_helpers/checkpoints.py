"""A name -> model and processor, from the bundled weights or from the hub; and pictures that go with them."""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xai_helpers import hub
from xai_helpers.imagenet import RIGHT, efficientnet_lite
from xai_helpers.pictures import read_picture
from xai_helpers.scenes import PHOTOS, Scene, as_seen, labels, make_scene, natural
from xai_helpers.scoring import Example
from xai_helpers.wrappers import device_of, matching_categories

BUNDLED = Path(__file__).parent / "bundled"

@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Something that `load` can load.

    Attributes:
        hub: the published checkpoint of the same family; None if nobody published one.
        task: "classification" (of the scenes' categories), "imagenet" (of ImageNet's), "prompts" (a CLIP, which
            `PromptClassifier` makes a classifier of), "detection" or "segmentation".
        model_class: the class of transformers that loads it; None for torchvision's Faster R-CNN.
        trained_by: the module of `training` that made the bundled one; "" if another package brings it.
        fault_of: the family of a model with a fault that is to be found; "" for a model without.
    """

    hub: str | None
    task: str = "classification"
    model_class: str | None = "AutoModelForImageClassification"
    trained_by: str = "classifier"
    fault_of: str = ""


#: name -> what `load` can load
CHECKPOINTS = {
    "resnet": Checkpoint("microsoft/resnet-50"),
    "vit": Checkpoint("google/vit-large-patch32-384"),
    "convnext": Checkpoint("facebook/convnext-tiny-224"),
    "regnet": Checkpoint("facebook/regnet-y-040"),
    "mobilevit": Checkpoint("apple/mobilevit-small"),
    "swin": Checkpoint("microsoft/swin-large-patch4-window12-384-in22k"),
    "segformer": Checkpoint("nvidia/mit-b0"),
    "cvt": Checkpoint("microsoft/cvt-13"),
    "efficientnet-lite": Checkpoint("timm/tf_efficientnet_lite0.in1k", "imagenet", trained_by=""),
    "clip-base": Checkpoint("openai/clip-vit-base-patch32", "prompts", "AutoModel", "clip"),
    "clip-large": Checkpoint("openai/clip-vit-large-patch14", "prompts", "AutoModel", "clip"),
    "yolos": Checkpoint("hustvl/yolos-tiny", "detection", "AutoModelForObjectDetection", "detector"),
    "faster-rcnn": Checkpoint("fasterrcnn_resnet50_fpn", "detection", None, "detector"),
    "segmenter": Checkpoint(
        "nvidia/segformer-b0-finetuned-ade-512-512", "segmentation", "AutoModelForSemanticSegmentation", "segmenter"
    ),
    "resnet-shortcut": Checkpoint(None, fault_of="resnet"),
    "mobilevit-default": Checkpoint(None, fault_of="mobilevit"),
}


def names_of(*tasks: str, faulty: bool = False) -> list[str]:
    """The names in `CHECKPOINTS` of some tasks, or of all: those of models without a fault, or with one.

    Example:
        >>> names_of("prompts"), names_of(faulty=True)
        (['clip-base', 'clip-large'], ['resnet-shortcut', 'mobilevit-default'])
    """
    return [
        name for name, one in CHECKPOINTS.items() if bool(one.fault_of) == faulty and (not tasks or one.task in tasks)
    ]


#: Category of the scenes -> its name among ImageNet's 1000. They have no coin, astronaut or pagoda. The label set of
#: ImageNet-22k writes underscores for blanks, and `category_index` finds these names in it all the same.
IMAGENET_NAMES = {
    "cat": "Egyptian cat",
    "coffee cup": "espresso",
    "flower": "daisy",
    "motorcycle": "moped",
    "rocket": "space shuttle",
}

#: The same for COCO's 80 categories, which detectors know, and for ADE20K's 150, which segmenters know.
COCO_NAMES = {"cat": "cat", "coffee cup": "cup", "motorcycle": "motorcycle"}
ADE_NAMES = {"flower": "flower", "motorcycle": "minibike"}

HUB_PICTURE = "huggingface/cats-image"
#: Left, top, right, bottom in pixels of that 640 x 480 picture, from the card of facebook/detr-resnet-50.
HUB_BOXES = {
    "Egyptian cat": [(13, 52, 314, 471), (345, 24, 640, 369)],
    "remote control, remote": [(40, 71, 176, 118), (333, 73, 368, 188)],
}


def chosen_weights(weights: str | Path | None = None) -> str | Path:
    """Which weights a call uses: `weights`, else the environment's XAI_WEIGHTS, else "bundled".

    Raises:
        ValueError: a word that is none of "bundled" and "hub", and no folder.
    """
    chosen = weights or os.environ.get("XAI_WEIGHTS") or "bundled"
    if chosen in ("bundled", "hub") or isinstance(chosen, Path) or "/" in chosen or Path(chosen).is_dir():
        return chosen
    raise ValueError(
        f'{"weights" if weights else "XAI_WEIGHTS"} is "bundled", "hub", a folder, or an id of the hub such as '
        f'"microsoft/resnet-50", not {chosen!r}.'
    )


def default_device() -> torch.device:
    """Where `load` puts a model: the environment's XAI_DEVICE, else the accelerator, if there is one, else the CPU."""
    if name := os.environ.get("XAI_DEVICE"):
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load(name: str, weights: str | Path | None = None, device: torch.device | str | None = None) -> tuple[Any, Any]:
    """Load a model, in eval mode, and its processor.

    Args:
        name: a key of `CHECKPOINTS`, such as "resnet" or "vit".
        weights: "bundled", "hub", or a folder or hub id of your own. None: the environment's XAI_WEIGHTS, else
            "bundled".
        device: where the model goes, as in `torch.device`. None: the environment's XAI_DEVICE, else the accelerator, if
            there is one, else the CPU.

    Returns:
        (model, processor): a transformers model for image classification in float32, and its image processor; for a
        CLIP a CLIPModel, and a processor of pictures and texts; else a model for object detection or semantic
        segmentation. "faster-rcnn" is torchvision's, with a `config.id2label` beside.

    Nothing that a checkpoint brings is run: no code of its own, no pickle. What the hub's cache has is taken as it is,
    without a network.

    Raises:
        ValueError: an unknown name or word for `weights`, published weights of a model with a fault, or a checkpoint
            that is none for this name: of another kind or size, with code of its own, or without a part of the model,
            such as its head.
        OSError: the checkpoint is not there, cannot be fetched, or has a file that cannot be read. The first sentence
            says why, the second what to do.

    Example:
        >>> model, processor = load("resnet", weights="bundled", device="cpu")
        >>> type(model).__name__, model.training, model.device
        ('ResNetForImageClassification', False, device(type='cpu'))
    """
    if name not in CHECKPOINTS:
        raise ValueError(f"There is no checkpoint {name!r}. There are: {', '.join(CHECKPOINTS)}.")
    known, weights = CHECKPOINTS[name], chosen_weights(weights)
    source = {"bundled": BUNDLED / name, "hub": known.hub}.get(str(weights), weights)
    if source is None:
        raise ValueError(f"{name!r} has a fault that is to be found; it is bundled only: load({name!r}, 'bundled').")
    if weights == "bundled" and not known.trained_by:
        model, processor = efficientnet_lite()
        return model.to(device or default_device()), processor
    if weights == "bundled" and not Path(source).is_dir():
        elsewhere = f'; or use the published one: load({name!r}, weights="hub")' if known.hub else ""
        raise OSError(
            f"The checkpoint {name!r} is not bundled yet. In a clone of the project, train it: python -m "
            f"training.{known.trained_by} {name}{elsewhere}."
        )
    try:
        if weights == "hub" and known.model_class is None:
            from xai_helpers.detectors import published_faster_rcnn

            model, processor = published_faster_rcnn(str(source))
        else:
            model, processor = _read(_folder(source, known.task == "prompts"), source, known)
    except OSError as error:
        raise OSError(f"{error}, or use what is bundled: {_bundled(f'load({name!r}, weights=')}.") from error
    return model.to(device or default_device()).eval(), processor


def _text(error):
    """An error's message on one line."""
    return " ".join(str(error).split()).removesuffix(".") or type(error).__name__


def _bundled(call):
    return f'{call}"bundled"), or leave XAI_WEIGHTS unset'


def _folder(source, texts):
    """The folder with a checkpoint: a folder itself, or the hub's cache."""
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise OSError(f"The checkpoint {source} is not on this machine: there is no such folder. Give another one")
    return hub.checkpoint(source, texts)


def _read(folder, source, known):
    """Model and processor from a folder, in which transformers finds all that it asks for."""
    import transformers  # late, as its classes: they take a second

    texts = known.task == "prompts"
    here = {"local_files_only": True, "trust_remote_code": False}
    try:
        if known.model_class is None:
            from xai_helpers.detectors import SceneFasterRCNN

            processor = transformers.AutoImageProcessor.from_pretrained(folder, **here)
            with contextlib.redirect_stdout(None):  # it prints where it reads from
                return SceneFasterRCNN.from_pretrained(folder, strict=True), processor
        processor = (transformers.AutoProcessor if texts else transformers.AutoImageProcessor).from_pretrained(
            folder, **here
        )
        model, found = getattr(transformers, known.model_class).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **here
        )
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # each library has its own
        if fault := hub.damaged(folder):
            raise OSError(fault) from error
        if missing := hub.lacks(folder, texts):
            raise OSError(
                f"The folder {folder} is no whole checkpoint: it has no {missing}. Save the model and its processor "
                "there, each by its save_pretrained"
            ) from error
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"The checkpoint {source} has code of its own, which is not run here. Choose another one."
            ) from error
        raise ValueError(
            f"The checkpoint {source} cannot be read as {known.model_class or 'a Faster R-CNN of this project'}, which "
            f"is for {known.task}: {_text(error)}. Choose another one."
        ) from error
    kind = type(model).__name__
    if texts and not hasattr(model, "get_text_features"):
        raise ValueError(f"The checkpoint {source} is a {kind}, and no CLIP: it knows no texts. Choose another one.")
    if found["mismatched_keys"]:
        key, there, wanted = sorted(found["mismatched_keys"])[0]
        raise ValueError(
            f"The weights in {source} have other sizes than its config.json says: {key} is {tuple(there)}, and not "
            f"{tuple(wanted)}. Save the model and its config anew, with the names of all categories in id2label."
        )
    missing = sorted(key for key in found["missing_keys"] if not key.endswith("num_batches_tracked"))  # not read
    if missing:
        raise ValueError(
            f"The weights in {source} are not those of a {kind}: {len(missing)} of its parameters are not there and "
            f"would be random, such as {missing[0]}. Train the model with its head, or give another folder."
        )
    return model, processor


def example_scene(weights: str | Path | None = None) -> Scene:
    """A picture with two categories and their answers, for the weights that `load` would use.

    Bundled: a test scene with a cat and a coffee cup. Hub: the picture huggingface/cats-image with the boxes of its
    cats and of its remote controls.

    Returns:
        A `Scene`: image, categories (names that `category_index` finds in each model of these weights) and masks, bool
        (n_categories, height, width).

    Raises:
        ValueError: XAI_WEIGHTS or `weights` is a word that it cannot be.
        OSError: the picture is not there and cannot be fetched, or cannot be read.
    """
    if chosen_weights(weights) == "bundled":
        return make_scene(seed=52, objects=["cat", "coffee cup"])  # one that all the models recognise
    try:
        image = _hub_picture()
    except OSError as error:
        raise OSError(f"{error}, or use what is bundled: {_bundled('example_scene(')}.") from error
    masks = np.zeros((len(HUB_BOXES), image.height, image.width), bool)
    for mask, boxes in zip(masks, HUB_BOXES.values(), strict=True):
        for left, top, right, bottom in boxes:
            mask[top:bottom, left:right] = True
    return Scene(image, list(HUB_BOXES), masks)


def _hub_picture():
    from datasets import load_dataset

    folder = hub.dataset(HUB_PICTURE)
    try:
        return read_picture(load_dataset(str(folder), split="test")[0]["image"])
    except Exception as error:  # datasets, pyarrow and PIL have their own
        cure = f"Delete {folder.parents[1]}, and it is fetched anew"
        cause, cure = hub.unwritable(error, "the cache of datasets") or (_text(error), cure)
        raise OSError(f"The picture {HUB_PICTURE} cannot be read: {cause}. {cure}") from error


def scene_categories(model: Any) -> dict[str, str]:
    """The categories of the scenes that a model knows: scene category -> the model's own name for it."""
    return dict(_scene_categories(tuple(model.config.id2label.values())))


@functools.lru_cache(maxsize=16)  # of label sets, which may have 21,841 names, and no model
def _scene_categories(names):
    if set(labels()) <= set(names):
        return {name: name for name in labels()}
    found = {}
    for known in (IMAGENET_NAMES, COCO_NAMES, ADE_NAMES):
        for category, name in known.items():
            indices = matching_categories(dict(enumerate(names)), name)
            if len(indices) == 1:
                found.setdefault(category, names[indices[0]])
    return found


def examples(
    model: Any,
    processor: Any,
    n: int,
    split: str = "test",
    objects: int = 2,
    size: int = 256,
    leave_out: int | None = None,
) -> list[Example]:
    """Scenes as a model gets them, with their answers: what `scoring.score_table` scores methods on.

    Args:
        model, processor: as `load` gives them. Only objects that the model has a category for are drawn.
        n: how many. They are the scenes of `make_scene` with the seeds 0, 1, 2 and so on; one is left out if the
            processor crops an object away. The environment's XAI_EXAMPLES, a whole number, caps it: for a quick try.
        split: "test" to score; "validation" to choose, a layer for example.
        objects: how many objects a scene has.
        size: at which resolution the scenes are made, in pixels.
        leave_out: the number of an object that the pictures lack, as in `make_scene`; the rest is the same.

    Returns:
        A list of `Example` objects.

    Raises:
        ValueError: the model knows fewer than `objects` of the scenes' categories, or XAI_EXAMPLES is no whole number
            of at least 1.

    Example:
        >>> model, processor = load("resnet", weights="bundled")
        >>> [example] = examples(model, processor, 1)
        >>> len(example.categories), example.masks.shape
        (2, (2, 256, 256))
    """
    names = scene_categories(model)
    if len(names) < objects:
        raise ValueError(
            f"The model knows {len(names)} of the categories {', '.join(labels())}: too few for {objects} objects."
        )
    if cap := os.environ.get("XAI_EXAMPLES"):
        if not cap.isdecimal() or int(cap) < 1:
            raise ValueError(f"XAI_EXAMPLES is a whole number of at least 1, not {cap!r}: set another, or unset it.")
        n = min(n, int(cap))
    made: list[Example] = []
    seeds = itertools.count()
    while len(made) < n:
        scene = make_scene(next(seeds), objects, size, split=split, among=list(names), leave_out=leave_out)
        example = as_example(scene, model, processor)
        if example.masks.any(axis=(1, 2)).all():
            made.append(example)
    return made


def as_example(scene: Scene, model: Any, processor: Any) -> Example:
    """A scene as a model gets it.

    Args:
        scene: a `Scene` whose categories the model knows, such as from `make_scene` or `natural`. Its picture may be
            of any mode.
        model, processor: as `load` gives them.

    Returns:
        An `Example`. Its image and masks are the part of the scene that the processor shows to the model, and its
        categories are named as the model names them.

    Raises:
        ValueError: the model has no category for one of the scene's.
    """
    names = scene_categories(model)
    unknown = [category for category in scene.categories if category not in names]
    if unknown:
        raise ValueError(f"The model has no category for {', '.join(unknown)}; it has one for {', '.join(names)}.")
    scene = dataclasses.replace(scene, image=read_picture(scene.image))
    seen = as_seen(scene, processor)
    pixel_values = processor(images=scene.image, return_tensors="pt")["pixel_values"].to(device_of(model))
    return Example(pixel_values, [names[category] for category in scene.categories], seen.masks, seen.image)


def photos(model: Any, processor: Any) -> list[Example]:
    """The shipped photos with an object that a model has a category for, as the model gets them.

    Args:
        model, processor: as `load` gives them, for a model with the scenes' categories or with ImageNet's.

    Returns:
        A list of `Example` objects, one a photo, with the masks of these objects. Each is named by that category to
        which the model gives the highest score of those that count as right (`imagenet.RIGHT`).

    Raises:
        ValueError: the model has no category for any of them.

    Example:
        >>> model, processor = load("efficientnet-lite", weights="bundled")
        >>> [example.categories[0] for example in photos(model, processor)]
        ['missile', 'tiger cat', 'palace', 'espresso', 'daisy', 'moped']
    """
    names, found = model.config.id2label, []
    for photo in PHOTOS:
        scene = natural(photo)
        pixel_values = processor(images=scene.image, return_tensors="pt")["pixel_values"].to(device_of(model))
        with torch.no_grad():
            scores = model(pixel_values).logits[0]
        best = []  # for each object, or None
        for category in scene.categories:
            right = [category, *RIGHT.get(category, ())]
            indices = [index for name in right for index in matching_categories(names, name)]
            best.append(max(indices, key=lambda index: scores[index], default=None))
        known = [i for i, index in enumerate(best) if index is not None]
        if known:
            seen = as_seen(scene, processor)
            categories = [names[best[i]] for i in known]
            found.append(Example(pixel_values, categories, seen.masks[known], seen.image))
    if not found:
        raise ValueError("The model has no category for any object of the shipped photos.")
    return found


def scores_of(model: Any, processor: Any, scenes: Sequence[Scene]) -> torch.Tensor:
    """What a classifier says of several scenes: float tensor (n_scenes, n_categories), on the CPU.

    Args:
        model, processor: as `load` gives them.
        scenes: `Scene` objects.
    """
    inputs = processor(images=[scene.image for scene in scenes], return_tensors="pt").to(device_of(model))
    with torch.no_grad():
        return model(**inputs).logits.float().cpu()
