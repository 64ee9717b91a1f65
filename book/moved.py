"""Write pages that lead on from addresses without one: `python book/moved.py FOLDER`.

A page that gets another name or goes away leaves its address here, since others have links to it. `make book` runs
this on _build/html.
"""

import html
import os
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]

#: Address -> the page that it leads to, both without .html.
LEADS_TO = {
    "book/api/index": "book/api",  # what is left of the address of one of its pages whose end was cut off
}

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Moved</title>
<meta name="robots" content="noindex">
<link rel="canonical" href="{canonical}">
<script>location.replace("{link}" + location.hash)</script>
<meta http-equiv="refresh" content="0; url={link}">
<p>This page is <a href="{link}">here</a> now.</p>
</html>
"""


def write(folder, leads_to=LEADS_TO):
    """Write one page an address into the built book and return their paths.

    Raises:
        ValueError: there is a page at the address, or none where it leads to. Nothing has been written then.
    """
    folder = Path(folder)
    base = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["html"]["baseurl"]
    pages = {}
    for address, target in leads_to.items():
        path, goal = folder / f"{address}.html", folder / f"{target}.html"
        if not goal.is_file():
            raise ValueError(f"{address} leads to {target}, and there is no such page")
        if path.exists() and PAGE.splitlines()[3] not in path.read_text(encoding="utf-8"):
            raise ValueError(f"{address} leads to {target}, but it is a page of its own")
        link = os.path.relpath(goal, path.parent).replace(os.sep, "/")
        pages[path] = PAGE.format(canonical=html.escape(f"{base}{target}.html"), link=html.escape(link))
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    return list(pages)


if __name__ == "__main__":
    print(*write(*sys.argv[1:]), sep="\n")
