"""Papers are cited by plain links, which a reader sees in Colab as on the page: the links and references.bib agree."""

import json
import re
from pathlib import Path

import pytest
from pybtex.database import parse_file

ROOT = Path(__file__).resolve().parents[1]
NO_CHAPTERS = {".ipynb_checkpoints", "student"}
CHAPTERS = sorted(p for p in (ROOT / "notebooks").rglob("*.ipynb") if not NO_CHAPTERS & set(p.parts))
PAGES = CHAPTERS + sorted((ROOT / "book").glob("*.md"))
ENTRIES = parse_file(str(ROOT / "book" / "references.bib"), bib_format="bibtex").entries

LINK = re.compile(r"\[([^][]*)\]\((https?://[^\s()]+)\)")
CITATION = re.compile(r"(?P<names>.*\w\.?), (?P<year>\d{4})|(?P<names_>.*\w\.?) \((?P<year_>\d{4})\)")


def prose(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    return "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")


def target(entry):
    """Where an entry's links lead: to the published paper, else to the preprint."""
    if "doi" in entry.fields:
        return "https://doi.org/" + entry.fields["doi"]
    return entry.fields.get("url") or "https://arxiv.org/abs/" + entry.fields.get("eprint", "")


def who(entry):
    """Its authors as a text names them."""
    first, *others = (" ".join(person.prelast_names + person.last_names) for person in entry.persons["author"])
    return first + (" et al." if others[1:] else "".join(f" and {other}" for other in others))


def citations(text):
    """(names, year, link, whether in parentheses) of all links that look like a citation."""
    for link in LINK.finditer(text):
        if match := CITATION.fullmatch(link[1]):
            names, year = match["names"] or match["names_"], match["year"] or match["year_"]
            yield names, year, link[2], match["names"] is not None


PAPERS = {target(entry): (who(entry), entry.fields["year"]) for entry in ENTRIES.values()}


def test_authors_are_named_as_usual():
    names = {key: who(ENTRIES[key]) for key in ("efron1979bootstrap", "abnar2020rollout", "chefer2021generic")}
    assert names == {
        "efron1979bootstrap": "Efron",
        "abnar2020rollout": "Abnar and Zuidema",
        "chefer2021generic": "Chefer et al.",
    }


@pytest.mark.parametrize("key", ENTRIES)
def test_entry_is_complete(key):
    entry = ENTRIES[key]
    assert entry.persons["author"] and {"title", "year"} <= set(entry.fields)
    links = {"doi": r"10\.\d{4,}/\S+", "eprint": r"\d{4}\.\d{4,5}", "url": r"https://\S+"}
    assert set(links) & set(entry.fields), "say where to find it: doi, url or eprint"
    for name in set(links) & set(entry.fields):
        assert re.fullmatch(links[name], entry.fields[name]), entry.fields[name]
    assert "\\" not in "".join(map(str, entry.persons["author"])), "write the letter: á, not {\\'a}"


def test_no_two_entries_lead_to_the_same_place():
    assert len(PAPERS) == len(ENTRIES)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_page_cites_as_the_references_say(path):
    text = prose(path)
    assert "{cite" not in text, "a link, not a role: Colab shows the role as it stands"
    cited = list(citations(text))
    for names, year, link, _ in cited:
        assert link in PAPERS, f"{names}, {year}: {link} is not in book/references.bib"
        assert (names, year) == PAPERS[link], link
    links = [link for _, link in LINK.findall(text) if link in PAPERS and not link.startswith("https://github.com/")]
    assert sorted(links) == sorted(link for _, _, link, _ in cited if link in links), "name authors and year"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_citations_stand_in_one_pair_of_parentheses(path):
    text = prose(path)
    group = r"\(LINK(?:; LINK)*\)"  # (Efron, 1979) or (Lundberg and Lee, 2017; Erion et al., 2021)
    marked = LINK.sub(lambda link: "LINK" if re.search(r", \d{4}$", link[1]) else "", text)
    assert "LINK" not in re.sub(group, "", marked), "a link 'Names, year' stands in parentheses of its own"
    assert not re.search(rf"\([^()]*{group}", marked), "parentheses in parentheses: write 'Names (year)'"


def test_every_entry_is_cited():
    cited = {link for path in PAGES for _, _, link, _ in citations(prose(path))}
    assert not [key for key, entry in ENTRIES.items() if target(entry) not in cited]
