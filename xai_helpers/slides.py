"""Maps that a reader moves through, in a notebook and on a page, without a kernel and without a network.

Without script, and on paper, all pictures stand beside each other.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from IPython.display import HTML
from PIL import Image

from xai_helpers.pictures import read_picture
from xai_helpers.plots import map_picture

WIDTH, SMALL = 384, 224  # of a picture, in pixels: of one or two beside each other, of more
QUALITY = 80

#: All pictures beside each other; where the script runs, a slider and what it shows.
STYLE = """
.xai-slides { margin: 1rem 0; }
.xai-slides p { margin: 0 0 0.3rem; }
.xai-slides ol { display: flex; flex-wrap: wrap; gap: 0.5rem; list-style: none; margin: 0; padding: 0; }
.xai-slides li { flex: 0 1 calc(var(--columns) * 9rem); margin: 0; min-width: 0; }
.xai-slides-row { display: grid; gap: 0.5rem; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); }
.xai-slides-row, .xai-slides > input { max-width: calc(var(--columns) * (var(--width) + 0.5rem)); }
.xai-slides-row > div { font-size: 0.9em; line-height: 1.35; }
.xai-slides img { display: block; height: auto; max-width: 100%; min-width: 0; }
.xai-slides input, .xai-slides-pair > span { display: none; }
@media screen {
  .xai-slides[data-ready] ol { display: block; }
  .xai-slides[data-ready] li:not([data-shown]) { display: none; }
  .xai-slides[data-ready] input { accent-color: currentColor; display: block; margin: 0.3rem 0 0.6rem; width: 100%; }
  .xai-slides > input:focus-visible, .xai-slides-pair:focus-within { outline: 3px solid; outline-offset: 2px; }
  .xai-slides[data-ready] .xai-slides-pair { display: block; margin: 0 0.5rem; position: relative; width: fit-content; }
  .xai-slides[data-ready] .xai-slides-pair > * + * { display: block; inset: 0; position: absolute; }
  .xai-slides[data-ready] .xai-slides-pair > img + img { clip-path: inset(0 0 0 var(--at)); }
  .xai-slides[data-ready] .xai-slides-pair > span {
    background: #fff; left: calc(var(--at) - 1.5px); outline: 1px solid #000; width: 3px;
  }
  .xai-slides-pair > span::after {
    background: #fff; border-radius: 50%; color: #000; content: "\\2194"; left: calc(1.5px - 0.8rem);
    line-height: 1.6rem; outline: 1px solid; position: absolute; text-align: center; top: calc(50% - 0.8rem);
    width: 1.6rem;
  }
  .xai-slides[data-ready] .xai-slides-pair > input {
    cursor: ew-resize; height: 100%; left: -0.5rem; margin: 0; opacity: 0; touch-action: pan-y;
    width: calc(100% + 1rem);
  }
}
"""

#: Makes all sliders ready that are not, so it need not know where it stands: not every notebook tells a script that.
SCRIPT = """
for (const root of document.querySelectorAll(".xai-slides:not([data-ready])")) {
  const input = root.querySelector("input"), steps = root.querySelectorAll("li");
  const show = () => {
    const at = Number(input.value);
    steps.forEach((step, i) => step.toggleAttribute("data-shown", i === at));
    root.style.setProperty("--at", `${at}%`);
    const said = steps.length ? steps[at].dataset.said : `${at}% photo, ${100 - at}% map`;
    input.setAttribute("aria-valuetext", said);
  };
  input.addEventListener("input", show);
  root.dataset.ready = "";
  show();
}
"""


def step_through(
    image: Image.Image,
    maps: Mapping[str, Sequence[np.ndarray]],
    labels: Sequence[str],
    title: str,
    answer: np.ndarray | None = None,
    full_at: float = 1.0,
) -> HTML:
    """A slider through the steps of something, such as the depth of a model: at each step a map of each method.

    Args:
        image: the picture that the model saw, at any resolution.
        maps: method -> its maps, one a step: (height, width) in [0, 1], arrays or tensors on any device.
        labels: one a step.
        title: what the slider moves through, and what the maps are asked for.
        answer: bool mask, the known answer of all maps: drawn as an outline, with the scores below each map.
        full_at: as in `plots.overlay`.

    Returns:
        What a notebook shows.

    Raises:
        ValueError: the numbers of maps and labels differ; there is no method, no step or no title.

    Example:
        >>> heat = np.eye(4)[:, :1].repeat(4, axis=1)
        >>> slider = step_through(Image.new("RGB", (64, 64)), {"one": [heat, 1 - heat]}, ["early", "late"], "By layer")
        >>> slider.data.count("<img")
        2
    """
    if not maps or not len(labels) or {len(labels)} != {len(found) for found in maps.values()}:
        raise ValueError(f"{len(labels)} labels need as many maps of each method; and a step, and a method.")
    width = WIDTH if len(maps) < 3 else SMALL
    steps = []
    for i, label in enumerate(labels):
        drawn = {name: map_picture(image, found[i], width, answer, full_at) for name, found in maps.items()}
        panels = "".join(
            f"<div>{_img(picture, ', '.join(filter(None, (name, label, words))))}"
            f"<div>{'<br>'.join(filter(None, (escape(name), words)))}</div></div>"
            for name, (picture, words) in drawn.items()
        )
        said = "; ".join([label, *(f"{name}: {words}" for name, (_, words) in drawn.items() if words)])
        steps.append(
            f'<li data-said="{escape(said)}"><p>{escape(label)} ({i + 1} of {len(labels)})</p>'
            f'<div class="xai-slides-row">{panels}</div></li>'
        )
    slider = _slider(title, last=len(labels) - 1, at=0)
    return _slides(title, f"{slider}<ol>{''.join(steps)}</ol>", width, columns=len(maps))


def before_after(
    image: Image.Image,
    heat: np.ndarray,
    title: str,
    answer: np.ndarray | None = None,
    full_at: float = 1.0,
) -> HTML:
    """A picture under a map of it, with a border between them that is moved by mouse, finger or keys.

    Args:
        image: the picture that the model saw, at any resolution.
        heat: (height, width) in [0, 1], an array or a tensor on any device.
        title: what the map is asked for.
        answer: bool mask, the known answer: drawn as an outline on the map, with the scores behind the title.
        full_at: as in `plots.overlay`.

    Returns:
        What a notebook shows.

    Raises:
        ValueError: `heat` is not a single map in [0, 1]; there is no title.
    """
    over, words = map_picture(image, heat, WIDTH, answer, full_at)
    photo = read_picture(image).resize(over.size, Image.Resampling.LANCZOS)
    pair = _img(photo, "The picture") + _img(over, f"The map over it: {title}")
    slider = _slider(title, last=100, at=50)
    heading = ": ".join(filter(None, (title, words)))
    body = f'<div class="xai-slides-row xai-slides-pair">{pair}<span></span>{slider}</div>'
    return _slides(heading, body, WIDTH, columns=2)


def _img(picture, words):
    file = io.BytesIO()
    picture.save(file, "webp", quality=QUALITY, method=6)
    data = base64.b64encode(file.getvalue()).decode()
    width, height = picture.size
    return f'<img src="data:image/webp;base64,{data}" width="{width}" height="{height}" alt="{escape(words)}">'


def _slider(title, last, at):
    if not title.strip():
        raise ValueError("A title is wanted: it says what the slider is for.")
    return f'<input type="range" aria-label="{escape(title)}" max="{last}" value="{at}" autocomplete="off">'


def _slides(heading, body, width, columns):
    # The attribute keeps the arrow keys from JupyterLab, which would go to another cell.
    return HTML(
        f'<div class="xai-slides" data-lm-suppress-shortcuts="true" style="--width: {width}px; --columns: {columns}">'
        f"<style>{STYLE}</style>"
        f"<p><strong>{escape(heading)}</strong></p>{body}<script>{SCRIPT}</script></div>"
    )
