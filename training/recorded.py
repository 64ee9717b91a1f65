"""The training scenes, made once into files that every run reads; each batch has them flipped and shifted."""

import contextlib
import functools
import multiprocessing
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from training.captions import facts_of
from training.report import DEVICE, SIDE, normalised
from xai_helpers.scenes import labels, make_scene

RUNS = Path(__file__).parent / "runs"
MOST_OBJECTS = 3


def n_objects(i):
    """How many objects training scene number i has: 1 or 2 in fifteen of twenty."""
    return [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3][i % 20]


def training_scene(i, side=SIDE, distractors=None):
    """Scene number i of the training split: pictures, targets (which categories are there) and facts (see `captions`).

    `distractors` is that of `make_scene`; None has them in scenes without an object, too.
    """
    objects = n_objects(i)
    if distractors is None and objects == 0:
        distractors = 1 + i // 20 % 3
    return _labelled(make_scene(i, objects, side, distractors, split="train"))


def coin_scene(i, side=SIDE):
    """The same with a coin in 8 of 20 scenes, alone in 3 of them, and with distractors only in 4 of 20.

    A network that says "coin" where it finds nothing else is right about most coins of `training_scene`, and some never
    look further. Here that answer is wrong more often than right.
    """
    kind, others = i % 20, [name for name in labels() if name != "coin"]
    n_others = [0, 0, 0, 1, 1, 1, 1, 2, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3][kind]
    objects = ["coin"] * (kind < 8) + np.random.default_rng(i).permutation(others)[:n_others].tolist()
    return _labelled(make_scene(i, objects, side, None if objects else 1 + i // 20 % 3, split="train"))


def bare_scene(i, side=SIDE):
    """The same without any distractor: whatever is pasted is an object."""
    return training_scene(i, side, distractors=0)


def placed_scene(i, side=SIDE):
    """Scene number i of the training split with its objects' places; a third of the scenes repeat a category.

    Gives pictures; places (side, side), the number of the object that each pixel shows, from 1, or 0; and categories
    (MOST_OBJECTS,), those of the objects, also from 1.
    """
    objects = n_objects(i)
    if objects > 1 and i // 20 % 3 == 0:
        drawn = np.random.default_rng(i).permutation(labels())[: objects - 1].tolist()
        objects = [drawn[0], *drawn]
    scene = make_scene(i, objects, side, 1 + i // 20 % 3 if objects == 0 else None, split="train")
    places = np.zeros((side, side), np.uint8)
    for number, mask in enumerate(scene.masks, start=1):
        places[mask] = number
    categories = np.zeros(MOST_OBJECTS, np.uint8)
    categories[: len(scene.categories)] = [labels().index(name) + 1 for name in scene.categories]
    return {"pictures": np.asarray(scene.image), "places": places, "categories": categories}


def _labelled(scene):
    targets = np.isin(labels(), scene.categories).astype(np.uint8)
    return {"pictures": np.asarray(scene.image), "targets": targets, "facts": facts_of(scene)}


class Scenes:
    """Training scenes in files, made once.

    Args:
        n: how many.
        side: their height and width in pixels.
        one: what makes scene number i: one(i, side=side) gives arrays by name.

    Each name becomes an attribute that has a row a scene: `scenes.pictures`, (n, side, side, 3).
    """

    def __init__(self, n, side=SIDE, one=training_scene):
        self.n, self.side, self.one = n, side, one
        first = one(0, side=side)
        self.names = list(first)
        for name, array in {**first, "done": np.uint8(0)}.items():
            path = RUNS / f"{one.__name__}s-{n}-{side}-{name}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            mode = "r+" if path.exists() else "w+"
            setattr(self, name, np.memmap(path, array.dtype, mode=mode, shape=(n, *array.shape)))

    def make(self):
        """Make the scenes that are missing."""
        missing = np.flatnonzero(self.done == 0).tolist()
        with contextlib.ExitStack() as stack:
            one = functools.partial(self.one, side=self.side)
            made = map(one, missing)
            if len(missing) > 1000:  # fresh processes: one that is forked hangs where cv2 had started its threads
                fresh = multiprocessing.get_context("spawn")
                pool = stack.enter_context(fresh.Pool(initializer=cv2.setNumThreads, initargs=(1,)))
                made = pool.imap(one, missing, chunksize=64)
            made = tqdm(made, total=len(missing), desc="scenes", mininterval=5)
            for i, scene in zip(missing, made, strict=True):
                for name in self.names:
                    getattr(self, name)[i] = scene[name]
                self.done[i] = 1
        return self

    def batches(self, size, rng, shift=8):
        """One epoch, flipped and shifted at random.

        Yields:
            The normalised pictures; their rows; which of them were flipped; and `move`, which does the same to another
            array of theirs, (size, side, side, ...). What a shift brings in is mirrored at the edge.
        """
        order = rng.permutation(self.n)
        for start in range(0, self.n - size + 1, size):
            rows = np.sort(order[start : start + size])
            windows, flip = rng.integers(0, 2 * shift + 1, (size, 2)), rng.random(size) < 0.5
            move = functools.partial(_move, windows=windows, flip=flip, shift=shift)
            yield normalised(move(self.pictures[rows]), DEVICE), rows, flip, move


def _move(arrays, windows, flip, shift):
    height, width = arrays.shape[1:3]
    around = [(0, 0), (shift, shift), (shift, shift)] + [(0, 0)] * (arrays.ndim - 3)
    arrays = np.pad(arrays, around, "reflect")
    arrays = np.stack([a[y : y + height, x : x + width] for a, (y, x) in zip(arrays, windows, strict=True)])
    arrays[flip] = arrays[flip, :, ::-1]
    return arrays
