"""The book's own rules: what every chapter looks like, and that settings, chapters and address are in step."""

import ast
import csv
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import nbformat
import pytest
import yaml
from jupyter_cache import get_cache
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
NO_CHAPTERS = {".ipynb_checkpoints", "student"}
CHAPTERS = sorted(p for p in (ROOT / "notebooks").rglob("*.ipynb") if not NO_CHAPTERS & set(p.parts))
#: The page of errors, which begins with no answer.
OTHER_SHAPE = {"anatomy"}
BUDGET = 30  # seconds on one core
MAX_LINES = 12  # ten, and two for a call that is easier to read over several lines

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
ADDRESS = PYPROJECT["project"]["urls"]["Repository"]

COLAB_CELL = f"""\
import importlib.util

if importlib.util.find_spec("xai_helpers") is None:  # in Colab
    %pip install -q "git+{ADDRESS}"
"""

each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.relative_to(ROOT / "notebooks").as_posix())


def cells(path, kind=None):
    all_cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in all_cells if kind in (None, cell["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def bullets(cell):
    """The list items of a Markdown cell, each on one line."""
    return [" ".join(item.split()) for item in re.findall(r"^[-*] (.+(?:\n  .+)*)", source(cell), flags=re.MULTILINE)]


REFERENCE = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "book" / "api").glob("*.md")))


def pages(toc):
    """The pages of the table of contents, or of a part of it, in its order."""
    for page in [part for kind in ("parts", "chapters", "sections") for part in toc.get(kind, [])]:
        yield from [page["file"]] if "file" in page else []
        yield from pages(page)


PAGES = ["book/index", *pages(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")))]


def test_the_reference_has_every_module_once_and_its_overview_every_page():
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "xai_helpers").rglob("*.py")]
    modules = {".".join(file.parts).removesuffix(".__init__") for file in files}
    inside = {name for name in modules if re.search(r"\._|^xai_helpers\.scenes\.", name)}
    assert sorted(re.findall(r"automodule:: (\S+)", REFERENCE)) == sorted(modules - inside - {"xai_helpers"})
    linked = re.findall(r"^{doc}`[^<]+<(api/\w+)>`$", (ROOT / "book/api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [f"book/{page}" for page in linked] == [page for page in PAGES if page.startswith("book/api/")]


def test_every_function_of_the_reference_has_types():
    modules = re.findall(r"automodule:: (\S+)", REFERENCE)
    assert "xai_helpers.cam" in modules
    without = []
    for module in map(importlib.import_module, modules):
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        of_classes = [value for kind in own if inspect.isclass(kind) for value in vars(kind).values()]
        for function in filter(inspect.isfunction, own + of_classes):
            parameters = set(inspect.signature(function).parameters) - {"self", "cls"}
            typed = set(inspect.unwrap(function).__annotations__)
            if not re.search(r"\b_", function.__qualname__) and (parameters | {"return"}) - typed:
                without.append(f"{module.__name__}.{function.__qualname__}")
    assert not without


def test_there_are_chapters():
    assert CHAPTERS


def test_every_notebook_is_in_the_table_of_contents():
    notebooks = [page for page in PAGES if page.startswith("notebooks/")]
    assert sorted(notebooks) == sorted(p.relative_to(ROOT).with_suffix("").as_posix() for p in CHAPTERS)
    for page in set(PAGES) - set(notebooks):
        assert (ROOT / f"{page}.md").is_file(), page


def test_links_to_the_glossary_lead_to_its_terms():
    glossary = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8")
    terms = re.search(r"```{glossary}\n:sorted:\n(.+?)```", glossary, flags=re.DOTALL)[1]
    there = {f"term-{term.replace(' ', '-')}" for term in re.findall(r"^\S.*$", terms, flags=re.MULTILINE)}
    entries = [entry for entry in re.split(r"\n\n", terms.strip()) if entry]
    assert len(there) >= 30 and all(re.search(r"\]\(|{doc}`|{term}`", entry) for entry in entries)
    for path in CHAPTERS:
        prose = "\n".join(source(cell) for cell in cells(path, "markdown"))
        linked = re.findall(r"\]\(\.\./\.\./book/glossary\.md#([^)]*)\)", prose)
        assert set(linked) <= there, "the book's build does not look these up"
        assert len(linked) == len(set(linked)), "a term is linked where it is used first"
        assert "{term}" not in prose, "Colab would show it as it stands"


@pytest.fixture
def moved(monkeypatch):
    """book/moved.py"""
    monkeypatch.syspath_prepend(ROOT / "book")
    return importlib.import_module("moved")


def test_addresses_without_a_page_lead_on(moved, tmp_path):
    assert set(moved.LEADS_TO.values()) <= set(PAGES) and not set(moved.LEADS_TO) & set(PAGES)
    for page in {*moved.LEADS_TO.values(), "book/new"}:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{page}.html").write_text("<title>A page</title>")
    for path in moved.write(tmp_path) + moved.write(tmp_path, {"notebooks/old/page": "book/new"}):
        text = path.read_text(encoding="utf-8")
        [address] = re.findall(r'http-equiv="refresh" content="0; url=([^"]+)"', text)
        goal = (path.parent / address).resolve()
        assert goal.read_text() == "<title>A page</title>"
        canonical = f"{CONFIG['html']['baseurl']}{goal.relative_to(tmp_path.resolve()).as_posix()}"
        assert f'<link rel="canonical" href="{canonical}">' in text
    with pytest.raises(ValueError, match="no such page"):
        moved.write(tmp_path, {"book/old": "book/none"})
    with pytest.raises(ValueError, match="a page of its own"):
        moved.write(tmp_path, {"book/new": "book/api"})
    assert not (tmp_path / "book/old.html").exists()


def test_no_page_that_was_published_is_gone(moved):
    """As far as the history reaches that is there."""
    log = subprocess.run(["git", "log", "-p", "--format=", "--", "_toc.yml"], cwd=ROOT, capture_output=True, text=True)
    published = set(re.findall(r"^[-+] +- file: (\S+)", log.stdout, flags=re.MULTILINE))
    assert not published - set(PAGES) - set(moved.LEADS_TO), "tell book/moved.py where they lead to"


@each_chapter
def test_chapter_is_stored_without_outputs(path):
    assert json.loads(path.read_text(encoding="utf-8"))["metadata"]["kernelspec"]["name"] == "python3"
    for cell in cells(path, "code"):
        assert not cell["outputs"] and cell["execution_count"] is None, "run: make strip"


def answers_first(path):
    """Whether a chapter begins with the shortest code that does it; labs begin with a picture, too, and have tasks."""
    return path.parent.name != "labs" and path.stem not in OTHER_SHAPE


@each_chapter
def test_chapter_has_goals_and_findings(path):
    first, *_, last = cells(path)
    assert first["cell_type"] == last["cell_type"] == "markdown"
    assert source(first).startswith("# ")
    assert not bullets(first), "the goals are one line"
    assert len(source(first).split("\n\n")) == 2 and len(source(first)) < 330, "a title, and a line of goals"
    *_, heading, findings, last = cells(path)
    assert source(heading).endswith("## Three findings") and "findings" in findings["metadata"]["tags"]
    assert len(re.findall(r"^- ", source(findings), flags=re.MULTILINE)) == 3
    assert source(findings).count("{") >= 3, "findings have numbers of this page"
    assert "Where to go next" in source(last)


@each_chapter
def test_the_answer_comes_first(path):
    """The shortest code that does it, with its picture; then the numbers."""
    if not answers_first(path):
        return
    answer, numbers = cells(path)[2:4]
    assert answer["cell_type"] == numbers["cell_type"] == "code"
    assert "figure" in answer["metadata"]["mystnb"] and "hide-input" not in answer["metadata"].get("tags", [])
    assert "claims" not in numbers["metadata"].get("tags", [])


@each_chapter
def test_claims_are_shown_as_a_table(path):
    claims = [source(cell) for cell in cells(path, "code") if "claims" in cell["metadata"].get("tags", [])]
    if answers_first(path):
        assert len(claims) == 1 and "check_claims(" in claims[0].splitlines()[-1]
        assert not re.search(r"^ *assert ", claims[0], flags=re.MULTILINE)


@each_chapter
def test_no_line_of_code_is_wrapped(path):
    if answers_first(path):
        for cell in cells(path, "code"):
            if not {"remove-cell", "hide-input"} & set(cell["metadata"].get("tags", [])):
                assert max(map(len, source(cell).splitlines()), default=0) <= 88, source(cell)


@each_chapter
def test_second_cell_installs_the_package_in_colab(path):
    cell = cells(path)[1]
    assert source(cell) == COLAB_CELL.rstrip("\n")
    assert "remove-cell" in cell["metadata"].get("tags", []), "the page does not show it"


@each_chapter
def test_code_cells_are_short(path):
    for cell in cells(path, "code"):
        tags = set(cell["metadata"].get("tags", []))
        if {"claims", "findings"} & tags or ("hide-input" in tags and answers_first(path)):
            continue  # folded
        lines = [line for line in source(cell).splitlines() if not line.lstrip().startswith(("###", "# Hint:"))]
        assert len(lines) <= MAX_LINES, source(cell)


@each_chapter
def test_page_keeps_to_its_budget(path, execution):
    """What a page costs was written down when its code was as it is now: no clock runs here."""
    with open(ROOT / "book" / "seconds.csv", newline="", encoding="utf-8") as file:
        recorded = {row["chapter"]: row for row in csv.DictReader(file)}
    row = recorded.get(execution.name_of(path), {})
    assert row.get("its code") == execution.Store("", {}).hashes(path)["its code"], "run: make seconds"
    assert int(row["CPU seconds"]) <= BUDGET, "CONTRIBUTING.md says what to do"


@each_chapter
def test_described_figures_have_words(path):
    for cell in cells(path, "code"):
        options = cell["metadata"].get("mystnb", {})
        if "figure" in options or "image" in options:  # a figure with a title may do without a caption, not without alt
            assert len(options["image"]["alt"].split()) >= 4, source(cell)
            assert "figure" not in options or len(options["figure"]["caption"].split()) >= 4, source(cell)
        if re.search(r"^(step_through|before_after)\(", source(cell), flags=re.MULTILINE):
            assert "image" not in options, "a slider describes its pictures itself"


def test_no_function_or_class_is_defined_in_two_chapters():
    names = Counter()
    for path in CHAPTERS:
        code = "\n".join(source(cell) for cell in cells(path, "code"))
        tree = ast.parse(re.sub(r"^( *)[%!].*", r"\1pass", code, flags=re.MULTILINE))
        for node in list(ast.walk(tree)):
            if isinstance(node, ast.ClassDef):  # a method's name belongs to its class
                node.body = []
        names.update({node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))})
    assert not [name for name, count in names.items() if count > 1], "move them to xai_helpers"


def test_one_address():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert CONFIG["repository"]["url"] == citation["repository-code"] == ADDRESS
    assert ADDRESS.removeprefix("https://") in (ROOT / "README.md").read_text(encoding="utf-8")


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PYPROJECT["project"]["version"]


def test_fork_rewrites_the_address_everywhere(tmp_path):
    for name in (
        "pyproject.toml",
        "_config.yml",
        "CITATION.cff",
        "README.md",
        "book/404.html",
        "book/fork.py",
        "book/index.md",
        "book/install.md",
        "book/lecturers.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")

    def fork(address):
        command = [sys.executable, tmp_path / "book/fork.py", address]
        return subprocess.run(command, capture_output=True, text=True)

    before = {p: p.read_text(encoding="utf-8") for p in tmp_path.rglob("*") if p.is_file()}
    for wrong in ("", "me/my-fork", "https://example.org/me/my-fork"):
        assert fork(wrong).returncode == 1
        assert "https://github.com/owner/name" in fork(wrong).stderr
    assert before == {p: p.read_text(encoding="utf-8") for p in before}

    assert fork("https://github.com/me/my.fork.git").returncode == 0
    after = {p: p.read_text(encoding="utf-8") for p in before}
    old_name = ADDRESS.removeprefix("https://github.com/")
    for path, text in after.items():
        assert old_name not in text, path
        assert before[path].count(old_name) == text.count("me/my.fork"), path
    published = yaml.safe_load(after[tmp_path / "_config.yml"])
    assert published["html"]["baseurl"] == published["sphinx"]["config"]["ogp_site_url"] == "https://me.github.io/my.fork/"
    assert '<base href="https://me.github.io/my.fork/">' in after[tmp_path / "book" / "404.html"]
    assert fork(ADDRESS).returncode == 0
    assert before == {p: p.read_text(encoding="utf-8") for p in before}


def test_requirements_hold_every_direct_requirement():
    pins = {}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line.split("#")[0])
            pins.setdefault(requirement.name, []).append(next(iter(requirement.specifier)).version)
    project = PYPROJECT["project"]
    for requirement in map(Requirement, project["dependencies"] + sum(project["optional-dependencies"].values(), [])):
        assert requirement.name in pins, f"{requirement.name}: run make requirements"
        assert all(requirement.specifier.contains(pin) for pin in pins[requirement.name]), requirement


@pytest.fixture
def execution(monkeypatch):
    """book/execute.py, for chapters of one's own."""
    monkeypatch.syspath_prepend(ROOT / "book")
    return importlib.import_module("execute")


def a_chapter(folder, *code, prose="Six times seven"):
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(prose), *map(nbformat.v4.new_code_cell, code)])
    page.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    folder.mkdir(exist_ok=True)
    nbformat.write(page, folder / "page.ipynb")
    return folder / "page.ipynb"


def test_a_chapter_is_executed_again_only_if_what_it_runs_has_changed(execution, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(execution, "NOTEBOOKS", tmp_path / "notebooks")
    chapter = a_chapter(tmp_path / "notebooks", "x = 6", "print(x * 7)")
    store = execution.Store(tmp_path / "kept", {"the package": "a"})
    assert execution.run([chapter], store) == []
    assert re.search(r"^1/1 page \d+ s$", capsys.readouterr().out, flags=re.MULTILINE)
    assert store.record(chapter)["seconds"] > 0

    a_chapter(tmp_path / "notebooks", "x = 6", "print(x * 7)", prose="Other words")
    assert store.changed(chapter) == []
    shown = store.shown(chapter)
    assert shown.cells[0].source == "Other words" and shown.cells[2].outputs[0]["text"] == "42\n"
    execution.hand_over([chapter], store, tmp_path / "cache")
    _, page = get_cache(tmp_path / "cache").merge_match_into_notebook(nbformat.read(chapter, as_version=4))
    assert page.cells[2].outputs[0]["text"] == "42\n"

    assert execution.Store(tmp_path / "kept", {"the package": "b"}).changed(chapter) == ["the package"]
    a_chapter(tmp_path / "notebooks", "x = 7", "print(x * 7)")
    assert store.changed(chapter) == ["its code"]


def test_a_failing_cell_is_named_and_its_chapter_not_kept(execution, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(execution, "NOTEBOOKS", tmp_path / "notebooks")
    chapter = a_chapter(tmp_path / "notebooks", "x = 6", "x / 0")
    store = execution.Store(tmp_path / "kept", {})
    assert execution.run([chapter], store) == ["page"]
    said = capsys.readouterr().out
    assert "page, cell 2:" in said and "ZeroDivisionError" in said
    assert store.record(chapter) == {}
