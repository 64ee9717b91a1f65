"""What it takes to open each page of the built book: `make book`, then `python -m benchmarks.pages`.

In a real browser with nothing cached, for every page: the seconds until its largest part is painted (LCP), and how many
times that is what an empty page of the same theme takes, in the same run; how far its contents jump while it loads and
is scrolled to its end (CLS, summed up; below 0.05 is wanted); the megabytes that it takes before a click, without the
scripts, styles and typefaces that all pages share; and the number of requests. Names of pages after the command do only
these, --width 390 is a phone.

On 2026-11-27, 66 pages, 1280 wide: jumps of at most 0.020, 0.84 MB (the lab on gradients; most have 0.2 to 0.4), and
1.8 times what an empty page takes, 0.26 s.
"""

import argparse
import functools
import os
import re
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import yaml
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "_build" / "html"
EMPTY = "book/empty"
WATCH = """
window.seen = { largest: 0, shifts: 0 };
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.seen.largest = entry.startTime;
}).observe({ type: "largest-contentful-paint", buffered: true });
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.seen.shifts += entry.value;
}).observe({ type: "layout-shift", buffered: true });
"""
SCROLL = """async () => {
  const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)));
  for (let y = 0; y < document.documentElement.scrollHeight; y += innerHeight) {
    scrollTo({ top: y, behavior: "instant" });
    await frame();
  }
}"""
LOADED = """() => performance.getEntries().filter(({ entryType }) => ["navigation", "resource"].includes(entryType))
  .map(({ name, decodedBodySize }) => [name, decodedBodySize])"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def names():
    """All pages in the order of the table of contents."""
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [chapter for part in contents["parts"] for chapter in part["chapters"]]
    return [contents["root"], *(page["file"] for one in listed for page in (one, *one.get("sections", [])))]


def empty():
    """A page of the theme with nothing in it but a title."""
    page = (BUILT / "book" / "credits.html").read_text(encoding="utf-8")
    return re.sub(r"(<article.*?>).*(</article>)", r"\1<h1>Empty</h1>\2", page, flags=re.DOTALL)


def measure(browser, address, name, width):
    """Seconds, shifts, megabytes and requests of one page."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.add_init_script(WATCH)
    page.route(f"**/{EMPTY}.html", lambda route: route.fulfill(body=empty(), content_type="text/html"))
    page.goto(f"{address}/{name}.html", wait_until="load", timeout=120_000)
    page.wait_for_load_state("networkidle", timeout=120_000)
    seconds = page.evaluate("window.seen.largest") / 1e3
    page.evaluate(SCROLL)
    page.wait_for_load_state("networkidle", timeout=120_000)
    loaded, shifts = page.evaluate(LOADED), page.evaluate("window.seen.shifts")
    page.close()
    return seconds, shifts, sum(size for url, size in loaded if "/_static/" not in url) / 1e6, len(loaded)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", default=names(), metavar="page", help="for example notebooks/recipes/vit")
    parser.add_argument("--width", type=int, default=1280, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="of which the fastest counts; default: %(default)s")
    given = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=BUILT))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    found = {}
    with sync_playwright() as playwright:
        path = os.environ.get("BROWSER_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        for name in (EMPTY, *given.pages):
            runs = [measure(browser, address, name, given.width) for _ in range(given.repeats)]
            seconds, shifts, megabytes, requests = zip(*runs, strict=True)
            found[name] = min(seconds), max(shifts), max(megabytes), max(requests)
        browser.close()
    server.shutdown()
    table = pd.DataFrame.from_dict(found, orient="index", columns=["LCP, s", "CLS", "MB", "requests"])
    table.insert(1, "times empty", table["LCP, s"] / table.loc[EMPTY, "LCP, s"])
    print(table.round({"LCP, s": 2, "times empty": 1, "CLS": 3, "MB": 2}).to_string())
    most = table.max()
    print(f"at most: CLS {most['CLS']:.3f}, {most['MB']:.2f} MB, {most['times empty']:.1f} times empty")


if __name__ == "__main__":
    main()
