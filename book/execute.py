"""Executes chapters, two at a time, and keeps their outputs for the book and for the tests.

    python book/execute.py [--record] [CHAPTER ...]

Without names, all chapters. One is executed again only if something that it runs has changed: its code cells, the
package, the requirements, matplotlibrc, XAI_WEIGHTS, XAI_DEVICE or XAI_EXAMPLES. Executed copies are kept in
_build/chapters, each beside a .json with the hashes of all that and its seconds. The book's pages take outputs from
_build/.jupyter_cache, and the page "status" its table from _build/status.md; both are written anew each time. With
--record, what the chapters cost is written to book/seconds.csv, too, where a test compares it with a page's budget.
"""

import csv
import datetime
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
import psutil
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
WORKERS = 2  # with a thread each; on two cores that is faster than two workers that fight for both
TIMEOUT = 600  # seconds a cell


class Failed(Exception):
    """A cell that stopped a chapter."""


def chapters():
    """All of them, in the order of their paths."""
    skipped = {".ipynb_checkpoints", "student"}
    return sorted(path for path in NOTEBOOKS.rglob("*.ipynb") if not skipped & set(path.parts))


def name_of(chapter):
    return chapter.relative_to(NOTEBOOKS).with_suffix("").as_posix()


def hash_of(*parts):
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def surroundings(root=ROOT):
    """Hashes of what all chapters run with, by name."""
    package = [path for path in sorted((root / "xai_helpers").rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    contents = (part for path in package for part in (str(path.relative_to(root)).encode(), path.read_bytes()))
    return {
        "the package": hash_of(*contents),
        "the requirements": hash_of((root / "requirements.txt").read_bytes(), sys.version.encode()),
        "matplotlibrc": hash_of((root / "book" / "matplotlibrc").read_bytes()),
        **{name: os.environ.get(name, "") for name in ("XAI_WEIGHTS", "XAI_DEVICE", "XAI_EXAMPLES")},
    }


def code_of(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


class Store:
    """Executed chapters in a folder."""

    def __init__(self, folder, around):
        self.folder = Path(folder)
        self.around = around

    def hashes(self, chapter):
        code = code_of(nbformat.read(chapter, as_version=4))
        return {"its code": hash_of(*(source.encode() for source in code)), **self.around}

    def record(self, chapter):
        """What is known of its last execution; empty if there was none."""
        path = self.folder / f"{name_of(chapter)}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def changed(self, chapter):
        """What has changed since it was executed."""
        before = self.record(chapter).get("hashes", {})
        return [name for name, value in self.hashes(chapter).items() if before.get(name) != value]

    def keep(self, chapter, notebook, hashes, times):
        path = self.folder / f"{name_of(chapter)}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
        made = datetime.datetime.now().isoformat(" ", "minutes")
        record = {"hashes": hashes, "made": made, **times}
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def shown(self, chapter):
        """The chapter as it is written now, with the outputs of its last execution."""
        notebook = nbformat.read(chapter, as_version=4)
        executed = nbformat.read(self.folder / f"{name_of(chapter)}.ipynb", as_version=4)
        done = [cell for cell in executed.cells if cell.cell_type == "code"]
        for cell, other in zip((c for c in notebook.cells if c.cell_type == "code"), done, strict=True):
            cell.outputs, cell.execution_count = other.outputs, other.execution_count
        return notebook


def execute(chapter):
    """Runs a chapter in a kernel of its own, in an empty folder.

    Returns:
        The executed notebook, and its times in seconds: "seconds" of the clock, "CPU seconds" of the kernel.

    Raises:
        Failed: a cell raised an error or ran out of time; it says which.
    """
    notebook = nbformat.read(chapter, as_version=4)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT,
            resources={"metadata": {"path": folder}},
            extra_arguments=["--log-level=ERROR"],  # not that it talks to us without encryption
        )
        client.record_timing = False
        with client.setup_kernel():
            kernel = psutil.Process(client.km.provisioner.pid)
            for number, cell in enumerate(notebook.cells):
                try:
                    client.execute_cell(cell, number)
                except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                    said = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()  # without colours
                    raise Failed(f"{name_of(chapter)}, cell {number}:\n{said}") from error
            used = sum(kernel.cpu_times()[:2])
    return notebook, {"seconds": round(time.monotonic() - start, 1), "CPU seconds": round(used, 1)}


def run(some, store):
    """Executes those of some chapters that have to be, the longest first, and prints a line for each.

    Returns:
        The names of those that failed.
    """
    reasons = {chapter: store.changed(chapter) for chapter in some}
    waiting = [chapter for chapter in some if reasons[chapter]]
    waiting.sort(key=lambda chapter: -store.record(chapter).get("seconds", 1e9))
    print(f"{len(some) - len(waiting)} of {len(some)} chapters are as they were executed.", flush=True)
    failed = []
    with ThreadPoolExecutor(WORKERS) as pool:
        jobs = {}
        for chapter in waiting:
            hashes = store.hashes(chapter)
            jobs[pool.submit(execute, chapter)] = chapter, hashes
        for number, job in enumerate(as_completed(jobs), start=1):
            chapter, hashes = jobs[job]
            where = f"{number}/{len(waiting)} {name_of(chapter)}"
            try:
                notebook, times = job.result()
            except Failed as error:
                failed.append(name_of(chapter))
                print(f"{where} FAILED\n{error}\n", flush=True)
            else:
                store.keep(chapter, notebook, hashes, times)
                print(f"{where} {times['seconds']:.0f} s", flush=True)
    return failed


def hand_over(some, store, cache):
    """Gives the outputs to the book. Its cache tells chapters apart by all of their cells' metadata, too."""
    shutil.rmtree(cache, ignore_errors=True)
    cache = get_cache(cache)
    for chapter in some:
        bundle = CacheBundleIn(
            store.shown(chapter), str(chapter), data={"execution_seconds": store.record(chapter)["seconds"]}
        )
        cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def table(some, store):
    """The page "status": what each chapter took."""
    records = {name_of(chapter): store.record(chapter) for chapter in some}
    lines = ["| chapter | executed | seconds | CPU seconds |", "|:--|:--|--:|--:|"]
    for name, record in records.items():
        values = f"{record['seconds']:.0f} | {record['CPU seconds']:.0f}"
        lines.append(f"| [](../notebooks/{name}.ipynb) | {record['made']} | {values} |")
    total, used = (sum(record[key] for record in records.values()) for key in ("seconds", "CPU seconds"))
    lines.append(f"| **all {len(records)}** | | **{total:.0f}** | **{used:.0f}** |")
    return "\n".join(lines) + "\n"


def write_seconds(some, store, path):
    """What each chapter costs, in seconds of one core, and the hash of the code that cost it, as CSV."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["chapter", "CPU seconds", "its code"])
        for chapter in some:
            record = store.record(chapter)
            writer.writerow([name_of(chapter), round(record["CPU seconds"]), record["hashes"]["its code"]])


def main(names, build=ROOT / "_build"):
    record, names = "--record" in names, [name for name in names if name != "--record"]
    some = [Path(name).resolve() for name in names] or chapters()
    strange = [str(chapter) for chapter in some if chapter not in chapters()]
    if strange:
        sys.exit(f"{', '.join(strange)}: no chapter; give paths such as notebooks/recipes/vit.ipynb.")
    os.environ["OMP_NUM_THREADS"] = "1"
    # A map of nothing is a result on a page, whose numbers count it as a miss.
    os.environ["PYTHONWARNINGS"] = "ignore:the map of category number:UserWarning"
    store = Store(build / "chapters", surroundings())
    failed = run(some, store)
    if failed:
        sys.exit(f"{len(failed)} failed: {', '.join(failed)}.")
    hand_over(some, store, build / ".jupyter_cache")
    (build / "status.md").write_text(table(some, store), encoding="utf-8")
    if record:
        write_seconds(chapters(), store, ROOT / "book" / "seconds.csv")


if __name__ == "__main__":
    main(sys.argv[1:])
