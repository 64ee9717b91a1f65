"""Overlays, grids and legends. Every heat map has the same colours and scale: [0, 1], from nothing to a bright glow."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from pandas.io.formats.style import Styler
from PIL import Image

from xai_helpers.pictures import ORIENTATION, on_photo
from xai_helpers.scoring import energy_inside, hits, resize_masks, without_device

if TYPE_CHECKING:
    from xai_helpers.concepts import Concepts

DIM = 0.04, 0.4  # from black to white, the greys of a picture under a map: all are darker than the map's colours
#: So that over a middling grey each step of a map is as much lighter as any other.
_AT, _OPACITY = [0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1], [0, 0.12, 0.22, 0.37, 0.48, 0.58, 0.65, 0.77, 0.9]
OPACITY = np.interp(np.linspace(0, 1, 256), _AT, _OPACITY)


def _glow(*colours):
    return LinearSegmentedColormap.from_list("glow", colours)(np.linspace(0, 1, 256))[:, :3]


#: What speaks for a category, and what against it, (256, 3) each, told apart and in order for the colour-blind, too.
HEAT = _glow("#d849a0", "#ff587a", "#ff8055", "#ffac42", "#ffd44e", "#f7f770")
HEAT_AGAINST = _glow("#6a76e9", "#2699ff", "#00b8ff", "#00d3ff", "#4cebff", "#85ffff")
_FOR, _AGAINST = (
    OPACITY[:, None] * colours + (1 - OPACITY[:, None]) * np.mean(DIM) for colours in (HEAT, HEAT_AGAINST)
)
HEAT_OVER_GREY = ListedColormap(_FOR)
#: For signed values without a picture, of equal limits on both sides: what speaks against, nothing, what speaks for.
SIGNED = ListedColormap(np.concatenate([_AGAINST[::-1], _FOR]))
HIGH, LOW = ["pointing", "energy", "average precision"], ["on the other"]  # where a map's score is best
#: Far from each other and from any grey for everybody, the first four farther than all eight.
CONCEPT_COLOURS = np.array(
    [to_rgb(c) for c in ("#d14646", "#e8e800", "#b917ff", "#46e8ff", "#d12eb9", "#b9e8a2", "#d18b17", "#74a2ff")]
)


def overlay(image: Image.Image, heat: np.ndarray, full_at: float = 1.0, seen: Any = None) -> np.ndarray:
    """Lay a map over a dimmed grey version of the image: the higher the value, the brighter and the less transparent.

    Args:
        image: a picture, any mode; the whole photo if `seen` is given, else the part of it that the model saw. What an
            EXIF rotation does to a PIL image is done to the map, too, since processors do not read EXIF data.
        heat: (height, width) in [0, 1], of any resolution; without `seen` it is stretched to the picture. A signed map,
            in [-1, 1], is drawn in two scales: what speaks against the category has the cold one.
        full_at: the quantile of the map that has the full colour, and all above it. Maps of single pixels look empty
            up to their maximum, so give 0.99 for them.
        seen: the processor that made the model's input from this photo, or the box that the model saw (left, top,
            right, bottom in pixels of the photo as it was given to the processor): the map is drawn within it.

    Returns:
        uint8 (height, width, 3) at the picture's resolution.

    Raises:
        ValueError: `heat` is not a single map in [-1, 1], or `full_at` is no quantile; no box.

    Warns:
        UserWarning: without `seen`, the map has other proportions than the picture, which `scenes.as_seen` did not cut
            out.
    """
    picture, (heat,) = on_photo(image, [np.asarray(without_device(heat))], seen)
    return _laid_over(picture, heat, full_at)


def _laid_over(image, heat, full_at):
    if not 0 < full_at <= 1:
        raise ValueError(f"full_at is a quantile, above 0 and at most 1, not {full_at}.")
    heat = np.asarray(heat, np.float32)
    if heat.ndim != 2 or not (np.isfinite(heat).all() and abs(heat).max() <= 1):
        raise ValueError(
            "A map is wanted as (height, width) in [0, 1], or signed in [-1, 1], "
            f"not {heat.shape} in [{heat.min():.3g}, {heat.max():.3g}]."
        )
    if full_at < 1:
        full = np.quantile(abs(heat), full_at) or 1  # of a map of hardly anything it is 0
        heat = np.clip(heat / full, -1, 1)
    heat = np.clip(cv2.resize(heat, image.size, interpolation=cv2.INTER_LINEAR), -1, 1)
    index = (abs(heat) * 255).round().astype(int)
    colours = np.where((heat < 0)[..., None], HEAT_AGAINST[index], HEAT[index])
    opacity = OPACITY[index][..., None]
    low, high = DIM
    grey = low + (high - low) * np.asarray(image.convert("L"), np.float32)[..., None] / 255
    return ((opacity * colours + (1 - opacity) * grey) * 255).round().astype(np.uint8)


def show_maps(
    image: Image.Image,
    maps: np.ndarray | Sequence[np.ndarray],
    titles: str | Sequence[str],
    answers: np.ndarray | Sequence[np.ndarray] | None = None,
    full_at: float = 1.0,
    seen: Any = None,
) -> Figure:
    """Show the image and each map over it, all on one scale. With answers, their outlines and the scores are drawn too.

    Args:
        image: the picture that the model saw (see `scenes.as_seen`), at any resolution; with `seen` the whole photo.
        maps: (n, height, width) in [0, 1], or signed in [-1, 1], or n maps that have sizes of their own, such as those
            of several models; arrays, or tensors on any device.
        titles: one a map.
        answers: bool masks, one a map: drawn as outlines, and the title says whether the map's maximum lies inside
            ("hit" or "miss", see `scoring.hits`) and which share of the map does ("inside"); of a signed map these are
            the scores of what speaks for the category.
        full_at: as in `overlay`. The cross and the scores are those of the whole map.
        seen: as in `overlay`; answers are of the part that the model saw, as maps are.

    Returns:
        The matplotlib figure. With `seen`, a dotted line is around what the model saw. A cross marks each map's
        maximum. Where several pixels reach it, it is the one nearest to their centre; with answers, of those inside for
        a hit and of those outside for a miss.

    Raises:
        ValueError: the numbers of maps, titles and answers differ, or `full_at` is no quantile.

    Warns:
        UserWarning: as in `overlay`.

    Example:
        >>> heat = np.eye(4)[None, :1].repeat(4, axis=1)  # the left column of four
        >>> figure = show_maps(Image.new("RGB", (64, 64)), heat, ["cat"], answers=heat > 0)
        >>> print(figure.axes[1].get_title())
        cat
        hit, 100% inside
        >>> plt.close(figure)
    """
    maps = [np.asarray(without_device(one)) for one in maps]
    titles = [titles] if isinstance(titles, str) else list(titles)
    answers = None if answers is None else [np.asarray(without_device(answer)) for answer in answers]
    if len(maps) != len(titles) or (answers is not None and len(answers) != len(maps)):
        raise ValueError(
            f"{len(maps)} maps need as many titles and answers, "
            f"not {len(titles)} and {'none' if answers is None else len(answers)}."
        )
    frame = _frame(image, maps, seen)
    image, maps, answers = _placed(image, maps, answers, seen)
    panels = len(maps) + 1
    columns = 3 if panels in (5, 6, 9) else min(panels, 4)  # few empty places
    rows = -(-panels // columns)
    height = 2.7 * image.height / image.width
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.7 * columns + 0.6, (height + 0.55) * rows), layout="constrained", squeeze=False
    )
    for ax in axes.flat:
        ax.axis("off")
    axes.flat[0].imshow(image)
    axes.flat[0].set_title("what the model saw" if seen is None else "the photo")
    for i, (ax, heat, title) in enumerate(zip(axes.flat[1:], maps, titles, strict=False)):
        words = _map_panel(ax, image, heat, None if answers is None else answers[i], full_at)
        ax.set_title(f"{title}\n{words}" if words else title)
    for ax in axes.flat[:panels]:
        _draw_frame(ax, frame)
    _colour_bar(figure, axes, full_at, maps)
    return figure


def compare_maps(
    images: Image.Image | Sequence[Image.Image],
    maps: Mapping[str, np.ndarray | Sequence[np.ndarray]],
    rows: str | Sequence[str],
    answers: np.ndarray | Sequence[np.ndarray] | None = None,
    full_at: float = 1.0,
    seen: Any = None,
) -> Figure:
    """A matrix of maps: a row for each question, a column for each method, one scale for all.

    Args:
        images: the picture of each row, or one for all; as in `show_maps`.
        maps: method -> its maps, one a row, as in `show_maps`.
        rows: what is asked in each row, such as the category.
        answers: bool masks, one a row: drawn as outlines, with the scores of each map in its cell.
        full_at: as in `overlay`.
        seen: as in `show_maps`, for all rows.

    Returns:
        The matplotlib figure, with the pictures in its first column.

    Raises:
        ValueError: the numbers of images, maps, rows and answers differ; there is no method.

    Example:
        >>> heat = np.eye(4)[None, :1].repeat(4, axis=1)
        >>> figure = compare_maps(Image.new("RGB", (64, 64)), {"one": heat, "two": 1 - heat}, "cat", heat > 0)
        >>> [ax.get_title() for ax in figure.axes[:3]], figure.axes[1].get_xlabel()
        (['picture', 'one', 'two'], 'hit, 100% inside')
        >>> plt.close(figure)
    """
    rows = [rows] if isinstance(rows, str) else list(rows)
    images = [images] * len(rows) if isinstance(images, Image.Image) else list(images)
    columns = {name: [np.asarray(without_device(one)) for one in found] for name, found in maps.items()}
    answers = None if answers is None else [np.asarray(without_device(answer)) for answer in answers]
    counts = {len(images), *map(len, columns.values()), *([] if answers is None else [len(answers)])}
    if not columns or counts != {len(rows)}:
        raise ValueError(f"{len(rows)} rows need as many images, maps of each method, and answers; and a method.")
    frames = [_frame(image, [found[i] for found in columns.values()], seen) for i, image in enumerate(images)]
    placed = []
    for i, image in enumerate(images):
        answer = None if answers is None else answers[i : i + 1]
        placed.append(_placed(image, [found[i] for found in columns.values()], answer, seen))
    images = [image for image, _, _ in placed]
    width = max(1.2, min(2.4, 10 / (len(columns) + 1)))
    heights = [width * image.height / image.width for image in images]
    figure, axes = plt.subplots(
        len(rows),
        len(columns) + 1,
        figsize=(width * (len(columns) + 1) + 0.9, sum(heights) + 0.35 * len(rows) + 0.35),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for ax, title in zip(axes[0], ["picture", *columns], strict=True):
        ax.set_title(title)
    for i, (image, row) in enumerate(zip(images, rows, strict=True)):
        axes[i, 0].imshow(image)
        for ax in axes[i]:
            _draw_frame(ax, frames[i])
        axes[i, 0].set_ylabel(row)
        _, found, answer = placed[i]
        for ax, heat in zip(axes[i, 1:], found, strict=True):
            ax.set_xlabel(_map_panel(ax, image, heat, answer and answer[0], full_at))
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    _colour_bar(figure, axes, full_at, [heat for found in columns.values() for heat in found])
    return figure


def _placed(image, maps, answers, seen):
    """A picture, and its maps and answers where they belong on it."""
    masks = [] if answers is None else [np.asarray(answer, np.float32) for answer in answers]
    n, turned = len(maps), isinstance(image, Image.Image) and image.getexif().get(ORIENTATION, 1) != 1
    picture, found = on_photo(image, [*maps, *(masks if seen is not None or turned else [])], seen)
    if len(found) > n:
        answers = [mask >= 0.5 for mask in found[n:]]
    return picture, found[:n], answers


def _frame(image, maps, seen):
    """Where on a photo the model looked; None if it looked everywhere."""
    if seen is None or not maps:
        return None
    _, (inside,) = on_photo(image, [np.ones(maps[0].shape)], seen)
    return None if inside.all() else inside


def _draw_frame(ax, frame):
    """A dotted line around the part of a photo that the model saw."""
    if frame is not None:
        padded = np.pad(frame, 1)
        at = [np.arange(-1, length + 1) for length in frame.shape[::-1]]
        ax.contour(*at, padded, levels=[0.5], colors="white", linewidths=1, linestyles="dotted")
        ax.set(xlim=(-0.5, frame.shape[1] - 0.5), ylim=(frame.shape[0] - 0.5, -0.5))


def _map_panel(ax, image, heat, answer, full_at):
    """Draws a map with its cross, and with an answer its outline; returns the scores in words, "" without an answer."""
    ax.imshow(_laid_over(image, heat, full_at))
    heat = heat.clip(min=0)
    at_maximum, words = heat == heat.max(), ""
    scale = np.array([image.height, image.width]) / heat.shape
    if answer is not None:
        outline(ax, answer, image)
        hit, inside = hits(heat[None], answer[None])[0], energy_inside(heat[None], answer[None])[0]
        words = f"{'hit' if hit else 'miss'}, {inside:.0%} inside"
        at_maximum &= resize_masks(answer[None], *heat.shape)[0] == hit  # the cross and the words agree
    if heat.max() > 0:
        peaks = np.argwhere(at_maximum)
        peak = peaks[((peaks - peaks.mean(axis=0)) ** 2).sum(axis=1).argmin()]
        ax.plot(
            *(peak + 0.5)[::-1] * scale[::-1] - 0.5,
            "+",
            color="black",
            markersize=11,
            markeredgewidth=1.8,
            path_effects=[withStroke(linewidth=4.2, foreground="white")],  # seen on any ground
            clip_on=False,  # at an edge half of it would be lost
        )
    return words


def map_picture(
    image: Image.Image,
    heat: np.ndarray,
    width: int,
    answer: np.ndarray | None = None,
    full_at: float = 1.0,
    seen: Any = None,
) -> tuple[Image.Image, str]:
    """A single map as `show_maps` draws it, without a title around it.

    Args:
        image: the picture that the model saw, at any resolution.
        heat: (height, width), as in `overlay`.
        width: of what is drawn, in pixels.
        answer: bool mask, drawn as an outline.
        full_at, seen: as in `show_maps`.

    Returns:
        What is drawn, `width` pixels wide and of the picture's proportions; and with an answer the scores in words,
        such as "hit, 63% inside", without one "".

    Raises:
        ValueError: as in `overlay`.
    """
    answers = None if answer is None else [np.asarray(without_device(answer))]
    image, (heat,), answers = _placed(image, [np.asarray(without_device(heat))], answers, seen)
    image = image.resize((width, max(1, round(width * image.height / image.width))), Image.Resampling.LANCZOS)
    figure = Figure(figsize=(image.width / 80, image.height / 80), dpi=80, layout="none")  # type: ignore[arg-type]
    canvas = FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.axis("off")
    words = _map_panel(ax, image, heat, answers and answers[0], full_at)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]), words


def _colour_bar(figure, axes, full_at, maps):
    if min((heat.min() for heat in maps), default=0) < 0:
        colours, words = ScalarMappable(Normalize(-1, 1), SIGNED), "against it (below 0), for it"
    else:
        share = "maximum" if full_at == 1 else f"{full_at:.3g} quantile"
        colours, words = ScalarMappable(cmap=HEAT_OVER_GREY), f"share of the {share}"
    figure.colorbar(colours, ax=axes, shrink=0.8, aspect=30, pad=0.02, label=words)


def outline(ax: plt.Axes, answer: np.ndarray, image: Image.Image) -> None:
    """Draw the outline of a mask on an axis that shows the image: white, with a dark edge to be seen on any ground."""
    for width, colour in ((3.2, "black"), (1.6, "white")):
        mask = np.pad(answer, 1).astype(np.float32)
        scale = np.array([image.width / answer.shape[1], image.height / answer.shape[0]])
        x, y = (
            (np.arange(-1, length + 1) + 0.5) * s - 0.5 for length, s in zip(answer.shape[::-1], scale, strict=True)
        )
        ax.contour(x, y, mask, levels=[0.5], colors=colour, linewidths=width)
    ax.set(xlim=(-0.5, image.width - 0.5), ylim=(image.height - 0.5, -0.5))


def outline_boxes(ax: plt.Axes, boxes: Any, labels: Sequence[str]) -> None:
    """Draw boxes on an axis that shows a picture, as `outline` draws masks, each with its label at the top.

    Args:
        ax: the axis.
        boxes: (n, 4), an array or a tensor on any device: left, top, right and bottom in pixels of the picture shown.
        labels: one a box.
    """
    for (left, top, right, bottom), label in zip(without_device(boxes), labels, strict=True):
        for width, colour in ((3.2, "black"), (1.6, "white")):
            ax.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour, lw=width))
        ax.text(left, top, label, color="white", backgroundcolor="black", size=9, va="bottom")


def show_scores(table: pd.DataFrame) -> Styler:
    """Shows the table of `scoring.score_table` with two digits, and the best scores of a map in bold.

    "on the other" is best where it is low. What is equal with two digits is equally good. Columns that are no scores,
    such as passes, have nothing in bold.
    """
    bold = {"props": "font-weight: bold", "axis": 0}
    styled = table.round(2).style.format(precision=2)
    styled = styled.highlight_max(subset=[column for column in table if column in HIGH], **bold)
    return styled.highlight_min(subset=[column for column in table if column in LOW], **bold)


def show_concepts(image: Image.Image, concepts: "Concepts", labels: Sequence[str], seen: Any = None) -> Figure:
    """Show each concept of `factorize` over the image in a colour of its own, and all of them together with a legend.

    A pixel of the joint picture has the colour of the concept that is strongest there, the stronger the more opaque.

    Args:
        image: the picture that the model saw, at any resolution; or the whole photo, with `seen`.
        concepts: what `factorize` returned: its `maps` are (n_concepts, height, width) in [0, 1].
        labels: one a concept.
        seen: as in `overlay`.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: the numbers of concepts and labels differ, or there are more than 8 concepts.
    """
    n = len(concepts.maps)
    if n != len(labels) or n > len(CONCEPT_COLOURS):
        raise ValueError(
            f"{n} concepts need as many labels, not {len(labels)}; at most {len(CONCEPT_COLOURS)} can be told apart."
        )
    image, found = on_photo(image, list(concepts.maps), seen)
    grey = np.asarray(image.convert("L"), np.float32)[..., None] / 255
    maps = np.stack([cv2.resize(m, image.size, interpolation=cv2.INTER_LINEAR) for m in found])
    strongest = maps.argmax(axis=0)
    joint = _tint(grey, maps.max(axis=0), CONCEPT_COLOURS[strongest])
    pictures = [np.asarray(image), joint] + [_tint(grey, m, CONCEPT_COLOURS[i]) for i, m in enumerate(maps)]
    columns = min(len(pictures), 3)
    rows = -(-len(pictures) // columns)
    height = 2.9 * image.height / image.width
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.9 * columns, (height + 0.5) * rows), layout="constrained", squeeze=False
    )
    titles = ["what the model saw" if seen is None else "the photo", "strongest concept"] + [
        f"concept {i + 1}: {label}" for i, label in enumerate(labels)
    ]
    for ax in axes.flat:
        ax.axis("off")
    for ax, picture, title in zip(axes.flat, pictures, titles, strict=False):
        ax.imshow(picture)
        ax.set_title(title)
    handles = [plt.Line2D([], [], marker="s", linestyle="", markersize=11, color=CONCEPT_COLOURS[i]) for i in range(n)]
    figure.legend(handles, titles[2:], loc="outside lower center", ncols=2, frameon=False)
    return figure


def _tint(grey, strength, colour):
    strength = 0.85 * np.clip(strength, 0, 1)[..., None]
    return np.clip(strength * colour + (1 - strength) * grey, 0, 1)
