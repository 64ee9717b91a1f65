"""Write the notebooks as Colab opens them: their install cell takes the package as it was at one commit.

    python book/colab.py FOLDER COMMIT

FOLDER is new or empty; the copies have the same paths in it. COMMIT is a full hash, or a tag such as v0.2.0. The
notebooks cannot hold their own commit, so the workflow that publishes the pages writes these copies for that commit and
pushes them as the branch `colab`, to which the pages' buttons link.
"""

import re
import sys
from pathlib import Path

from fork import ROOT, repository


def pinned(text, address, commit):
    """The text of a notebook file, with the commit in the cell that installs the package.

    Raises:
        ValueError: there is not exactly one such cell.
    """
    latest, at_commit = (rf'"    %pip install -q \"git+{address}{version}\""' for version in ("", f"@{commit}"))
    if (count := text.count(latest)) != 1:
        raise ValueError(f"{count} cells have the line {latest} instead of one: copy it from another chapter")
    return text.replace(latest, at_commit)


def write(folder, commit, root=ROOT):
    """Write the copies of the chapters and of the student edition, and return their paths.

    Raises:
        ValueError: `commit` is neither a full hash nor a tag, `folder` is in use, or a notebook has no install cell.
            Nothing has been written then.
    """
    if not re.fullmatch(r"[0-9a-f]{40}|v\d+(\.\d+)+", commit):
        raise ValueError(f"{commit!r} is neither a full commit hash (git rev-parse HEAD) nor a tag such as v0.2.0")
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is in use: choose a new folder")
    address = repository(root)
    copies = {}
    for path in sorted((root / "notebooks").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        try:
            copies[folder / path.relative_to(root)] = pinned(path.read_text(encoding="utf-8"), address, commit)
        except ValueError as error:
            raise ValueError(f"{path.relative_to(root)}: {error}") from None
    for path, text in copies.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    return list(copies)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(*write(*sys.argv[1:]), sep="\n")
    except ValueError as error:
        sys.exit(str(error))
