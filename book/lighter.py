"""Make the built book lighter: `python book/lighter.py FOLDER`, which `make book` runs on _build/html.

Pages show WebP in place of PNG, which stays behind the link of a figure and for previews. Each image has its width and
height, so that nothing jumps, and all but a page's first figure are loaded when they come into view. The typefaces are
asked for first, so that they are there when text is drawn. The icons' script goes: their fonts, which are loaded
anyway, draw the same. The empty corners of pandas' tables are no headers, which a screen reader would read out, and
what folds a part of the contents has a name.
"""

import re
import sys
from pathlib import Path

from PIL import Image

QUALITY = 88
IMAGE = re.compile(r"<img\b[^>]*>")
ICONS = re.compile(r'\s*<script src="[^"]*/fontawesome/[^"]*\.js[^"]*"></script>')
CORNER = re.compile(r"<th\b([^>]*)>(?:&nbsp;|\s)*</th>")
TOGGLE = re.compile(r'<summary>(?=<span class="toctree-toggle")')
STYLES = re.compile(r'<link href="([^"]*_static/)styles/theme\.css')
TYPEFACES = ["source-serif-4-latin-wght-normal", "source-serif-4-latin-wght-italic", "source-sans-3-latin-wght-normal"]
PRELOAD = '<link rel="preload" as="font" type="font/woff2" crossorigin href="{}fonts/{}.woff2" />\n'


def attribute(tag, name):
    found = re.search(rf'\s{name}="([^"]*)"', tag)
    return found and found[1]


def as_webp(path):
    target = path.with_suffix(".webp")
    if not target.exists():
        with Image.open(path) as picture:
            picture.convert("RGBA" if picture.has_transparency_data else "RGB").save(target, quality=QUALITY, method=4)
    return target


def preloads(found):
    return "".join(PRELOAD.format(found[1], name) for name in TYPEFACES) + found[0]


def lighten(page):
    """Writes a page anew; returns how many images it has."""
    seen = 0

    def lighter(match):
        nonlocal seen
        tag, source = match[0], attribute(match[0], "src")
        path = page.parent / source if source and not re.match(r"[a-z]+:|//|#", source) else None
        if path is None or not path.is_file() or path.suffix not in (".png", ".jpg", ".webp"):
            return tag
        is_figure = path.parent.name == "_images"
        if path.suffix == ".png" and is_figure:
            tag = tag.replace(f'src="{source}"', f'src="{source.removesuffix(".png")}.webp"')
            path = as_webp(path)
        with Image.open(path) as picture:
            width, height = picture.size
        more = "" if attribute(tag, "width") else f' width="{width}" height="{height}"'
        more += ' loading="lazy"' if seen and not attribute(tag, "loading") else ""
        seen += is_figure
        return re.sub(r"\s*/?>$", f"{more} />", tag)

    text = page.read_text(encoding="utf-8")
    text = TOGGLE.sub('<summary aria-label="Pages of this part">', text)
    text = STYLES.sub(preloads, CORNER.sub(r"<td\1></td>", ICONS.sub("", IMAGE.sub(lighter, text))))
    page.write_text(text, encoding="utf-8", newline="\n")
    return seen


def main(folder):
    counts = [lighten(page) for page in sorted(Path(folder).rglob("*.html")) if "_static" not in page.parts]
    made = list((Path(folder) / "_images").glob("*.webp"))
    before = sum(path.with_suffix(".png").stat().st_size for path in made if path.with_suffix(".png").exists())
    after = sum(path.stat().st_size for path in made)
    print(f"{sum(counts)} images on {len(counts)} pages: {before / 1e6:.1f} MB of PNG, {after / 1e6:.1f} MB of WebP")


if __name__ == "__main__":
    main(*sys.argv[1:])
