"""Pictures with known answers: real objects pasted on varied backgrounds, with the exact mask of each object.

    scene = make_scene(seed=7, objects=["cat", "coffee cup"])
    scene.image, scene.categories, scene.masks, scene.boxes

The objects are cut out of photos that scikit-image and scikit-learn ship. Distractors are pasted beside them in the
same way, so that a pasted edge is no evidence for any category.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image

from xai_helpers.pictures import SEEN, seen_box
from xai_helpers.scenes import cutouts
from xai_helpers.scenes.backgrounds import backdrop
from xai_helpers.scenes.photos import mask, photo

SPLITS = ("train", "validation", "test")
SIZES = (64, 512)

#: Photos left as they are, name -> the categories in them, each with its mask in the photo.
PHOTOS = {
    "astronaut": {"astronaut": "astronaut", "rocket": "rocket"},
    "chelsea": {"cat": "cat"},
    "china": {"pagoda": "pagoda"},
    "coffee": {"coffee cup": "coffee cup"},
    "coins": {"coin": "coin"},
    "flower": {"flower": "flower"},
    "motorcycle": {"motorcycle": "motorcycle"},
}


@dataclass
class Scene:
    """A picture with known answers.

    Attributes:
        image: RGB picture (PIL).
        categories: one name an object, in the order of the masks.
        masks: bool, (n_objects, height, width): the pixels in which each object is visible.
        distractors: bool, (n_distractors, height, width): the same of each thing without a category; None where nobody
            knows, as in a photo.
    """

    image: Image.Image
    categories: list[str]
    masks: np.ndarray
    distractors: np.ndarray | None = None

    @property
    def boxes(self) -> np.ndarray:
        """The masks' boxes in pixels: int, (n_objects, 4) as left, top, right, bottom, the last two exclusive."""
        boxes = np.zeros((len(self.masks), 4), int)
        for box, seen in zip(boxes, self.masks, strict=True):
            if seen.any():
                rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
                box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return boxes


def labels() -> list[str]:
    """The categories of the scenes, in the order of the bundled checkpoints' outputs."""
    return list(cutouts.OBJECTS)


def with_article(name: str) -> str:
    """A category's name with its indefinite article, as a caption or a prompt has it: "a cat", "an astronaut"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def natural(name: str) -> Scene:
    """A shipped photo as it is, with the masks of the objects in it. Names: the keys of `PHOTOS`.

    Raises:
        ValueError: there is no such photo.
    """
    if name not in PHOTOS:
        raise ValueError(f"There is no photo {name!r}. The photos are {', '.join(PHOTOS)}.")
    answers = PHOTOS[name]
    return Scene(Image.fromarray(photo(name)), list(answers), np.stack([mask(m) for m in answers.values()]))


def make_scene(
    seed: int,
    objects: int | Sequence[str] | None = None,
    size: int = 384,
    distractors: int | None = None,
    split: str = "test",
    among: Sequence[str] | None = None,
    leave_out: int | None = None,
) -> Scene:
    """Make a scene. The same arguments always give the same scene, and sizes differ in their resolution only.

    Args:
        seed: a non-negative integer. A seed gives different scenes in different splits: no split has a scene of
            another.
        objects: category names (one an object; a name may repeat), or how many different ones to draw, 0 to 4.
            None draws one or two.
        size: height and width in pixels, 64 to 512.
        distractors: how many things without a category to paste beside the objects, 0 to 4. None draws 0 to 2.
        split: "train", "validation" or "test". Only test scenes have distractors of kinds that training never shows.
        among: the categories to draw from; None: all.
        leave_out: the number of an object, counted from 0 as in the masks. The picture is the one in which it was
            never pasted, with all else as it is with it; the categories and masks are still those with it.

    Returns:
        A `Scene`. Each object is visible by about half at least, and lies by about two thirds inside the picture.

    Raises:
        ValueError: an unknown category or split, no category to draw from, or what is no whole number in its range.

    Example:
        >>> scene = make_scene(seed=7, objects=["cat", "coffee cup"])
        >>> scene.image.size, scene.categories, scene.masks.shape
        ((384, 384), ['cat', 'coffee cup'], (2, 384, 384))
    """
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}, not {split!r}.")
    if not _is_whole(size) or not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(f"size is {SIZES[0]} to {SIZES[1]} pixels, not {size!r}.")
    if not _is_whole(seed) or seed < 0:
        raise ValueError(f"seed is 0 or more, not {seed!r}.")
    # One stream of random numbers each for layout, appearance and noise: how many the noise takes depends on the size.
    layout, appearance, grain = map(np.random.default_rng, np.random.SeedSequence([SPLITS.index(split), seed]).spawn(3))
    categories = _draw_categories(layout, objects, labels() if among is None else among)
    if distractors is None:
        distractors = int(layout.integers(3))
    if not _is_whole(distractors) or not 0 <= distractors <= 4:
        raise ValueError(f"distractors is 0 to 4, not {distractors!r}.")
    if leave_out is not None and not (_is_whole(leave_out) and 0 <= leave_out < len(categories)):
        raise ValueError(f"leave_out is the number of one of {len(categories)} objects, from 0, not {leave_out!r}.")
    pastes = _lay_out(layout, categories, distractors, split)

    canvas = backdrop(appearance, size)
    alphas = []
    for paste in pastes:  # what is left out goes onto a copy, so that the others draw the same random numbers
        left_out = leave_out is not None and paste.object == leave_out
        alphas.append(_paste(canvas.copy() if left_out else canvas, paste, appearance))
    canvas = canvas * appearance.uniform(0.8, 1.15) + grain.normal(0, appearance.uniform(0, 9), canvas.shape)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    seen = _visible(alphas)
    ranked = sorted((paste.object, i) for i, paste in enumerate(pastes) if paste.object is not None)
    masks, others = (
        np.array([seen[i] for i in order], bool).reshape(-1, size, size)
        for order in ([i for _, i in ranked], [i for i, paste in enumerate(pastes) if paste.object is None])
    )
    return Scene(image, categories, masks, others)


def as_seen(scene: Scene, processor: Any) -> Scene:
    """The part of a scene that a processor shows to the model, at the scene's own resolution, masks and all.

    Maps have the coordinates of the tensor that was explained: draw and score them on this part, or a crop shifts them.

    Args:
        scene: a `Scene`. For a picture without answers: `Scene(image, [], np.zeros((0, image.height, image.width),
            bool))`.
        processor: an image processor of transformers, or a processor that has one.

    Returns:
        A `Scene`. Where the processor pads the picture, it is padded with black here.
    """
    left, top, right, bottom = (round(edge) for edge in seen_box(processor, scene.image.size))
    left, top = min(left, scene.image.width - 1), min(top, scene.image.height - 1)
    right, bottom = max(right, left + 1), max(bottom, top + 1)  # a picture may be a single pixel

    def cropped(masks):
        masks = [np.asarray(Image.fromarray(seen).crop((left, top, right, bottom))) for seen in masks]
        return np.array(masks, bool).reshape(-1, bottom - top, right - left)

    distractors = None if scene.distractors is None else cropped(scene.distractors)
    image = scene.image.crop((left, top, right, bottom))
    image.info[SEEN] = True  # even if the model saw it squashed
    return Scene(image, scene.categories, cropped(scene.masks), distractors)


@dataclass
class _Paste:
    """A cut-out and where it goes, in shares of the picture's side."""

    object: int | None  # its place among the categories; None for a distractor
    levels: list
    scale: float
    centre: np.ndarray
    angle: float
    flip: bool

    def warp(self, side):
        """The cut-out at its place: its box (left, top, right, bottom) and its pixels; None if it lies outside."""
        height, width = self.levels[0].shape[:2]
        zoom = self.scale * side / max(height, width)
        depth = int(np.clip(np.floor(-np.log2(zoom)), 0, len(self.levels) - 1))
        source = self.levels[depth]
        zoom = self.scale * side / max(source.shape[:2])
        turn = np.array([[np.cos(self.angle), -np.sin(self.angle)], [np.sin(self.angle), np.cos(self.angle)]])
        turn = zoom * turn @ np.diag([-1.0 if self.flip else 1.0, 1.0])
        half = np.array([source.shape[1], source.shape[0]]) / 2
        reach = np.abs(turn) @ half + 1
        low = np.clip(np.floor(self.centre * side - reach), 0, side).astype(int)
        high = np.clip(np.ceil(self.centre * side + reach), 0, side).astype(int)
        if (high <= low).any():
            return None
        # Pixel centres lie at half integers in the formulas and at integers in OpenCV.
        shift = self.centre * side - low - 0.5 - turn @ (half - 0.5)
        matrix = np.column_stack([turn, shift])
        return (*low, *high), cv2.warpAffine(source, matrix, tuple(int(n) for n in high - low), flags=cv2.INTER_LINEAR)


def _is_whole(number):
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)


def _draw_categories(rng, objects, among):
    drawn = objects is None or _is_whole(objects)
    named = among if drawn else objects
    is_list = isinstance(named, Iterable) and not isinstance(named, str)
    names = [str(name) for name in named] if is_list else []
    if not is_list or not set(names) <= set(cutouts.OBJECTS) or (drawn and objects != 0 and not names):
        raise ValueError(f"A list of names out of {', '.join(labels())} is wanted, not {named!r}.")
    if not drawn:
        return names
    among = names
    if objects is None:
        objects = min(int(rng.integers(1, 3)), len(among))
    most = min(4, len(among))
    if not 0 <= objects <= most:
        raise ValueError(f"objects is 0 to {most}, or a list of names, not {objects}.")
    return [among[i] for i in rng.permutation(len(among))[:objects]]


def _lay_out(rng, categories, n_distractors, split):
    """Choose cut-outs, sizes and places, again and again until every object is visible enough."""
    n = len(categories)
    low, high = {0: (0.2, 0.5), 1: (0.3, 0.75), 2: (0.28, 0.55)}.get(n, (0.22, 0.38))
    kinds = cutouts.DISTRACTORS if split != "test" else cutouts.DISTRACTORS + cutouts.HELD_OUT_DISTRACTORS
    pastes = []
    for i in range(n + n_distractors):
        if i < n:
            choice = cutouts.objects(categories[i])
            levels, scale = (
                choice[rng.integers(len(choice))],
                rng.uniform(low, high) * cutouts.OBJECTS[categories[i]][2],
            )
            if n == 1 and rng.random() < 0.15:  # as near as in a photo of the object
                scale *= 1.6
        else:
            kind = kinds[rng.integers(len(kinds))]
            levels = cutouts.fragment(rng) if kind == "fragment" else cutouts.thing(kind)
            scale = rng.uniform(0.18, 0.45)
        turn = rng.normal(0, 0.3) if rng.random() < 0.85 else rng.uniform(-np.pi, np.pi)
        pastes.append(_Paste(i if i < n else None, levels, scale, np.zeros(2), turn, rng.random() < 0.5))
    for attempt in range(200):
        for paste in pastes:
            paste.centre = rng.uniform(0.08, 0.92, 2) if paste.scale < 0.6 else rng.uniform(0.3, 0.7, 2)
            if attempt >= 100:  # crowded: make room
                paste.scale *= 0.99
        order = [pastes[i] for i in rng.permutation(len(pastes))]
        if _clear(order):
            break
    return order


def _clear(pastes, side=64):
    """Whether every object is visible by half and two thirds inside, judged at one size whatever the scene's."""
    alphas = [_alpha(paste.warp(side), side) for paste in pastes]
    for paste, alpha, seen in zip(pastes, alphas, _visible(alphas), strict=True):
        if paste.object is None:
            continue
        zoom = paste.scale * side / max(paste.levels[-1].shape[:2])
        whole = (paste.levels[-1][..., 3] / 255).sum() * zoom**2
        if alpha.sum() < max(2, 0.67 * whole) or seen.sum() < 0.5 * whole:
            return False
    return True


def _alpha(warped, side):
    alpha = np.zeros((side, side), np.float32)
    if warped:
        (left, top, right, bottom), pixels = warped
        alpha[top:bottom, left:right] = pixels[..., 3] / np.float32(255)
    return alpha


def _visible(alphas):
    """The masks of pastes given from bottom to top: where each covers a pixel by half and nothing above it does."""
    covered, seen = np.zeros(alphas[0].shape, bool) if alphas else None, []
    for alpha in reversed(alphas):
        solid = alpha >= 0.5
        seen.append(solid & ~covered)
        covered |= solid
    return seen[::-1]


def _paste(canvas, paste, rng):
    """Paste onto the canvas in place, in a light of its own, at times blurred or with a shadow. Returns the alpha."""
    side = len(canvas)
    gain = rng.uniform(0.7, 1.2) * rng.uniform(0.85, 1.15, 3)
    saturation = rng.uniform(0.5, 1.15)
    blur = rng.uniform(0, 0.005) * side if rng.random() < 0.3 else 0
    shadow, offset = rng.random() < 0.5, rng.uniform(-0.02, 0.02, 2) * side
    warped = paste.warp(side)
    alpha = _alpha(warped, side)
    if not warped:
        return alpha
    (left, top, right, bottom), pixels = warped
    pixels = pixels.astype(np.float32)
    if blur > 0.3:
        pixels = cv2.GaussianBlur(pixels, (0, 0), blur)
    if shadow:
        _shade(canvas, alpha, offset)
    grey = np.array([0.299, 0.587, 0.114])
    light = np.diag(gain) @ (saturation * np.eye(3) + (1 - saturation) * grey)
    colours = cv2.transform(np.ascontiguousarray(pixels[..., :3]), light)
    under = canvas[top:bottom, left:right]
    under *= 1 - pixels[..., 3:] / 255
    under += np.clip(colours, 0, 255)
    return _alpha(((left, top, right, bottom), pixels), side)


def _shade(canvas, alpha, offset):
    """A soft shadow, worked out at a quarter of the resolution."""
    side, small = len(canvas), max(16, len(canvas) // 4)
    soft = cv2.resize(alpha, (small, small), interpolation=cv2.INTER_AREA)
    soft = cv2.GaussianBlur(soft, (0, 0), 0.015 * small)
    move = np.array([[1, 0, offset[0] * small / side], [0, 1, offset[1] * small / side]])
    soft = cv2.resize(cv2.warpAffine(soft, move, (small, small)), (side, side), interpolation=cv2.INTER_LINEAR)
    canvas *= 1 - 0.45 * soft[..., None]
