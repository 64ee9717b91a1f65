"""Looks at every page of the built book in a real browser: `make book`, then `make pages`.

The name keeps it out of `make test`, which needs neither a built book nor a browser.
"""

import functools
import json
import os
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote_plus, urlsplit

import pytest
import yaml
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "_build" / "html"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
PAGES = [TOC["root"]] + [chapter["file"] for part in TOC["parts"] for chapter in part["chapters"]]
CHAPTERS = [page for page in PAGES if page.startswith("notebooks/")]

BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
MAC_CHROME = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
OPTIONS = """--no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync"""

# Pages with formulas load MathJax from here; the check neither has nor needs a network.
ALLOWED_HOSTS = {"cdn.jsdelivr.net"}


@pytest.fixture(scope="module")
def address():
    """Where a local server shows the built book."""
    assert (BUILT / "index.html").is_file(), "nothing built: run make book first"

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=BUILT))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    found = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)), MAC_CHROME)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=OPTIONS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """A page that notes script errors, failed local requests and requests to other hosts."""
    page = browser.new_page()
    page.set_default_timeout(20_000)
    page.faults, page.other_hosts = [], set()

    def keep_local(route):
        if route.request.url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            page.other_hosts.add(urlsplit(route.request.url).hostname)
            route.abort()

    def failed(request):
        if request.url.startswith(address):
            page.faults.append(f"{request.failure}: {request.url}")

    def answered(response):
        if response.status >= 400:
            page.faults.append(f"{response.status}: {response.url}")

    page.route("**/*", keep_local)
    page.on("pageerror", lambda error: page.faults.append(f"script error: {error}"))
    page.on("requestfailed", failed)
    page.on("response", answered)
    yield page
    page.close()


@pytest.mark.parametrize("name", ["index", *PAGES, "search", "genindex"])
def test_page_loads(page, address, name):
    page.goto(f"{address}/{name}.html", wait_until="networkidle")
    assert page.locator("article h1").count() >= (name != "search")
    assert page.faults == []
    assert page.other_hosts <= ALLOWED_HOSTS
    assert page.locator(".cell_output .stderr").all_inner_texts() == [], "warnings do not belong on a page"


@pytest.mark.parametrize("name", PAGES)
def test_images_are_there_and_described(page, address, name):
    page.goto(f"{address}/{name}.html", wait_until="load")
    images = page.eval_on_selector_all(
        "article img", "found => found.map(i => ({src: i.src, alt: i.alt.trim(), width: i.naturalWidth}))"
    )
    for image in images:
        assert image["width"] > 0, image
        # without a text of its own an image has its path as alternative text
        assert image["alt"] and "/" not in image["alt"] and not image["alt"].endswith((".png", ".svg")), image
    if name in CHAPTERS:
        notebook = json.loads((ROOT / f"{name}.ipynb").read_text(encoding="utf-8"))
        options = [cell["metadata"].get("mystnb", {}) for cell in notebook["cells"]]
        figures = [option["image"]["alt"] for option in options if "image" in option]
        assert figures, "a chapter has at least one figure"
        assert set(figures) <= {image["alt"] for image in images}


@pytest.mark.parametrize("name", CHAPTERS)
def test_colab_button_opens_the_notebook(page, address, name):
    page.goto(f"{address}/{name}.html")
    repository = CONFIG["repository"]
    path = f"{repository['url'].removeprefix('https://github.com/')}/blob/{repository['branch']}/{name}.ipynb"
    links = page.eval_on_selector_all("a[href*='colab.']", "found => found.map(a => a.href)")
    assert set(links) == {f"https://colab.research.google.com/github/{path}"}
    assert (ROOT / f"{name}.ipynb").is_file()


@pytest.mark.parametrize("name", CHAPTERS)
def test_search_finds_the_chapter_by_its_title(page, address, name):
    page.goto(f"{address}/{name}.html")
    title = page.inner_text("article h1").rstrip("#").strip()
    page.goto(f"{address}/search.html?q={quote_plus(title)}")
    page.wait_for_selector(f"#search-results a[href*='{name}.html']")
    assert page.faults == []


@pytest.mark.parametrize("name", PAGES)
def test_page_fits_on_a_phone(page, address, name):
    page.set_viewport_size({"width": 375, "height": 700})
    page.goto(f"{address}/{name}.html", wait_until="load")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


@pytest.mark.parametrize("name", CHAPTERS)
def test_dark_mode_keeps_the_colours_of_figures(page, address, name):
    page.emulate_media(color_scheme="dark")
    page.goto(f"{address}/{name}.html", wait_until="load")
    assert page.get_attribute("html", "data-theme") == "dark"
    filters = page.eval_on_selector_all("article img", "found => found.map(i => getComputedStyle(i).filter)")
    assert set(filters) == {"none"}
