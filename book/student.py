"""Write the student edition: a copy of each chapter that has tasks, with holes where the solutions stand.

    python book/student.py [FOLDER]

FOLDER is notebooks/student unless another one is given; what is there of an earlier edition goes away.
"""

import json
import re
import shutil
import sys
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
STUDENT = NOTEBOOKS / "student"

STUB = 'raise NotImplementedError("Replace this line by your answer.")'
#: Lines between these marks, as nbgrader has them.
SOLUTION, HIDDEN = (
    re.compile(rf"^(?P<indent>[ \t]*)### BEGIN {name}\n.*?^[ \t]*### END {name}\n?", re.MULTILINE | re.DOTALL)
    for name in ("SOLUTION", "HIDDEN TESTS")
)


def sources(folder=NOTEBOOKS):
    """The chapters, without the student edition."""
    for path in sorted(folder.rglob("*.ipynb")):
        if not {"student", ".ipynb_checkpoints"} & set(path.relative_to(folder).parts):
            yield path


def has_tasks(notebook):
    return any("### BEGIN SOLUTION" in "".join(cell["source"]) for cell in notebook["cells"])


def with_holes(notebook):
    """A notebook, as json reads it, in which each solution is replaced by a stub, and hidden tests are left out.

    Raises:
        ValueError: a mark without its other end.
    """
    cells = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        text = HIDDEN.sub("", SOLUTION.sub(rf"\g<indent>{STUB}\n", text)).rstrip("\n")
        if re.search("### (BEGIN|END) (SOLUTION|HIDDEN TESTS)", text):
            raise ValueError(f"a mark without its other end in the cell\n{text}")
        cells.append({**cell, "source": text.splitlines(keepends=True)})
    return {**notebook, "cells": cells}


def write(target=STUDENT):
    """Write the edition and return its files."""
    shutil.rmtree(target, ignore_errors=True)
    written = []
    for path in sources():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if has_tasks(notebook):
            copy = target / path.relative_to(NOTEBOOKS)
            copy.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(with_holes(notebook), indent=1, ensure_ascii=False) + "\n"
            copy.write_text(text, encoding="utf-8", newline="\n")
            written.append(copy)
    return written


if __name__ == "__main__":
    print(*write(*map(Path, sys.argv[1:])), sep="\n")
