"""Write another repository address into every file that names ours: python book/fork.py https://github.com/you/your-fork."""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = re.compile(r"https://github\.com/([\w-]+/[\w.-]+)")


def files_with_address(root: Path) -> list[Path]:
    """The files that name the repository: settings, README, four pages and every notebook."""
    names = ["pyproject.toml", "_config.yml", "CITATION.cff", "README.md"]
    names += ["book/404.html", "book/index.md", "book/install.md", "book/lecturers.md"]
    return [root / name for name in names] + sorted((root / "notebooks").rglob("*.ipynb"))


def repository(root: Path = ROOT) -> str:
    """The address in pyproject.toml, the one that all others have to equal."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


def rewrite(new: str, root: Path = ROOT) -> list[Path]:
    """Replace the old address by `new` and return the changed files.

    Raises:
        ValueError: if `new` is not of the form https://github.com/owner/name.
    """
    new = new.strip().removesuffix("/").removesuffix(".git")
    if not (match := ADDRESS.fullmatch(new)):
        raise ValueError(f"{new!r} is not an address like https://github.com/owner/name")
    old_name, new_name = ADDRESS.fullmatch(repository(root)).group(1), match.group(1)
    (old_owner, old_folder), (owner, folder) = old_name.split("/"), new_name.split("/")
    replacements = {
        # also matches colab.research.google.com/github/owner/name
        rf"(github(?:\.com)?/){re.escape(old_name)}(?![\w-])": rf"\g<1>{new_name}",
        # where the built book is published
        rf"https://{re.escape(old_owner)}\.github\.io/{re.escape(old_folder)}/": f"https://{owner}.github.io/{folder}/",
    }
    changed = []
    for path in files_with_address(root):
        old_text = new_text = path.read_text(encoding="utf-8")
        for pattern, new_words in replacements.items():
            new_text = re.sub(pattern, new_words, new_text)
        if new_text != old_text:
            path.write_text(new_text, encoding="utf-8", newline="\n")
            changed.append(path)
    return changed


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        print(*(path.relative_to(ROOT) for path in rewrite(sys.argv[1])), sep="\n")
    except ValueError as error:
        sys.exit(str(error))
