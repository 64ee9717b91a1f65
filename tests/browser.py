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
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

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
        # A picture that is replaced before it has come, or the icon of a page that is left, is given up by the page
        # itself; whether the pictures that stay are there is seen by their widths.
        given_up = request.resource_type in ("image", "other") and request.failure == "net::ERR_ABORTED"
        if request.url.startswith(address) and not given_up:
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
    links = page.eval_on_selector_all("a[href*='colab.']:not(article *)", "found => found.map(a => a.href)")
    assert set(links) == {f"https://colab.research.google.com/github/{path}"}
    assert (ROOT / f"{name}.ipynb").is_file()


@pytest.mark.parametrize("name", CHAPTERS)
def test_search_finds_the_chapter_by_its_title(page, address, name):
    page.goto(f"{address}/{name}.html")
    title = page.inner_text("article h1").rstrip("#").strip()
    page.goto(f"{address}/search.html?q={quote_plus(title)}")
    page.wait_for_selector(f"#search-results a[href*='{name}.html']")
    page.wait_for_selector("#search-results p.context")
    assert ".pdf" not in page.inner_text("#search-results"), "an excerpt is of the text, not of the page's buttons"
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


# ---- the explorer ---------------------------------------------------------------------------------------------------

EXPLORER = "book/explorer"
WHAT = ["xe-picture", "xe-model", "xe-category"]
PANELS = {panel: [f"xe-{panel}-method", f"xe-{panel}-setting"] for panel in "ab"}
CONTROLS = WHAT + PANELS["a"] + PANELS["b"]


@pytest.fixture
def explorer(page, address):
    def opened(choice=""):
        page.goto("about:blank")
        page.goto(f"{address}/{EXPLORER}.html{choice}", wait_until="load")
        return page

    return opened


def loaded(page, panel):
    """A panel's map: the file that is shown, its alternative text, and its bytes."""
    image = page.locator(f"#xe-{panel}-map")
    page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=image.element_handle())
    path = urlsplit(image.evaluate("image => image.src")).path
    return path, image.get_attribute("alt"), (BUILT / path.lstrip("/")).read_bytes()


def chosen(page, control):
    return page.locator(f"#{control} option:checked").inner_text()


@pytest.mark.parametrize("control", CONTROLS)
def test_each_control_of_the_explorer_changes_what_is_shown(explorer, control):
    page = explorer()
    moved = [panel for panel in PANELS if control in WHAT + PANELS[panel]]
    seen = {panel: {loaded(page, panel)} for panel in PANELS}
    sentences = {page.inner_text("#xe-status")}
    options = page.eval_on_selector_all(f"#{control} option:enabled", "found => found.map(o => o.value)")
    for value in set(options) - {page.input_value(f"#{control}")}:
        page.select_option(f"#{control}", value)
        for panel in PANELS:
            seen[panel].add(loaded(page, panel))
        sentences.add(page.inner_text("#xe-status"))
    assert len(options) >= 2
    for panel, kept in seen.items():
        expected = len(options) if panel in moved else 1
        files, texts, pictures = (len(set(column)) for column in zip(*kept, strict=True))
        assert files == texts == expected, panel
        # At the last stage of a ResNet, Grad-CAM and HiResCAM are the same map.
        assert expected >= pictures >= expected - (control == f"xe-{panel}-method"), panel
    assert len(sentences) == len(options)
    assert page.faults == [] and page.other_hosts == set()


def test_alternative_texts_and_scores_of_the_explorer_follow(explorer):
    page = explorer()
    page.select_option("#xe-picture", label="Scene: a flower and a motorcycle")
    page.select_option("#xe-model", label="Swin")
    page.select_option("#xe-category", label="motorcycle")
    page.select_option("#xe-a-method", label="occlusion")
    page.select_option("#xe-a-setting", label="an eighth")
    page.select_option("#xe-b-method", label="edges")
    status = page.inner_text("#xe-status")
    for panel, words in {"a": "occlusion (window: an eighth)", "b": "edges"}.items():
        verdict = f"{page.inner_text(f'#xe-{panel}-verdict')}, {page.inner_text(f'#xe-{panel}-inside')}"
        assert page.get_attribute(f"#xe-{panel}-map", "alt") == f"{words} of Swin for motorcycle: {verdict}"
        assert f"{panel.upper()}, {words}: {verdict}." in status
    assert (
        page.get_attribute("#xe-seen", "alt") == "Scene: a flower and a motorcycle, with the outline of the motorcycle"
    )
    assert page.get_attribute("#xe-status", "role") == "status"  # read out when it changes
    assert page.locator("#xe-b-setting").is_disabled()


def test_the_explorer_offers_no_method_that_a_model_does_not_have(explorer):
    page = explorer()
    page.select_option("#xe-a-method", label="guided backprop")
    page.select_option("#xe-model", label="ViT")
    assert page.locator("#xe-a-method option", has_text="guided backprop").is_disabled()
    assert chosen(page, "xe-a-method") == "balanced gradients"
    assert "For ViT there is no guided backprop" in page.inner_text("#xe-status")
    page.select_option("#xe-a-method", label="relevance")
    page.select_option("#xe-model", label="ResNet")
    assert page.locator("#xe-a-method option", has_text="relevance").is_disabled()
    assert page.faults == []


def test_the_explorer_works_by_keyboard(explorer):
    page = explorer()
    page.locator(f"#{CONTROLS[0]}").focus()
    for control in CONTROLS:
        assert page.evaluate("document.activeElement.id") == control
        before, sentence = page.input_value(f"#{control}"), page.inner_text("#xe-status")
        page.keyboard.press("ArrowUp" if control in PANELS["b"] else "ArrowDown")
        assert page.input_value(f"#{control}") != before
        assert page.inner_text("#xe-status") != sentence
        assert page.evaluate("document.activeElement.id") == control, "the choice is kept in focus"
        page.keyboard.press("Tab")


def test_the_address_keeps_a_comparison_of_the_explorer(explorer):
    page = explorer()
    page.select_option("#xe-model", label="ViT")
    page.select_option("#xe-b-method", label="relevance")
    kept, choice = [chosen(page, control) for control in CONTROLS], page.evaluate("location.hash")
    assert [chosen(explorer(choice), control) for control in CONTROLS] == kept
    page = explorer("#picture=nonsense&model=&a=grad-cam.99&b=.&constructor=1")
    assert "balanced gradients" in page.inner_text("#xe-status")
    assert page.faults == []


def test_links_to_comparisons_open_them(explorer):
    page = explorer()
    links = page.locator("article a[href^='#picture=']")
    assert links.count() == 3
    for i in range(links.count()):
        links.nth(i).click()
        asked = page.evaluate("Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")
        found = {key: page.input_value(f"#xe-{key}") for key in ("picture", "model", "category")}
        for panel, (method, setting) in PANELS.items():
            found[panel] = f"{page.input_value(f'#{method}')}.{page.input_value(f'#{setting}')}"
        assert found == asked
        expect(page.locator("#xe-picture")).to_be_in_viewport()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_explorer_has_no_barriers(explorer, page, scheme):
    page.emulate_media(color_scheme=scheme)
    explorer()
    page.select_option("#xe-b-method", label="edges")
    assert page.get_attribute("html", "data-theme") == scheme
    # The theme's title in the side bar stands in no landmark, on any page.
    found = Axe().run(page, options={"rules": {"region": {"enabled": False}}})
    assert found.violations_count == 0, found.generate_report()


def test_the_panels_of_the_explorer_stack_on_a_phone(explorer, page):
    def boxes():
        return [page.locator(f"#xe-{panel}-map").bounding_box() for panel in PANELS]

    page.set_viewport_size({"width": 1200, "height": 900})
    explorer()
    a, b = boxes()
    assert a["y"] == b["y"] and a["x"] + a["width"] < b["x"] and a["width"] == pytest.approx(b["width"])
    page.set_viewport_size({"width": 375, "height": 700})
    a, b = boxes()
    assert a["x"] == b["x"] and a["y"] + a["height"] < b["y"] and a["width"] > 250
    for label in ("ViT", "Swin"):  # long names of layers
        page.select_option("#xe-model", label=label)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_the_explorer_shows_a_pair_without_script(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}/{EXPLORER}.html", wait_until="load")
    assert page.locator("noscript strong").inner_text() == "The controls need JavaScript."
    images = page.locator("noscript img")
    assert images.count() == 2 and not page.locator("#xe-picture").is_visible()
    for i in range(2):
        assert images.nth(i).is_visible() and "inside" in images.nth(i).get_attribute("alt")
    context.close()
