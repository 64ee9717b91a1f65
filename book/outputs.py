"""Gives chapters that were executed elsewhere to the book, which then shows their outputs and need not run them again.

    python book/outputs.py FOLDER [CACHE]

FOLDER has executed copies of the notebooks, as `make test` leaves them (one that was not
run to its end is an error); CACHE is the book's, _build/.jupyter_cache.
"""

import sys
from datetime import datetime
from pathlib import Path

import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn

ROOT = Path(__file__).resolve().parents[1]


def main(folder, cache=ROOT / "_build" / ".jupyter_cache"):
    cache = get_cache(cache)
    for path in sorted(Path(folder).rglob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        # Notes of when a cell ran. They have to go: the cache tells notebooks apart by their cells' metadata, too.
        notes = [cell.metadata.pop("execution", {}) for cell in notebook.cells]
        times = [datetime.fromisoformat(time) for note in notes for time in note.values()]
        data = {"execution_seconds": (max(times) - min(times)).total_seconds()}
        cache.cache_notebook_bundle(CacheBundleIn(notebook, str(path), data=data), overwrite=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
