"""What a map costs on the live page: `make book`, then `python -m benchmarks.live`.

In a real browser, with the page's own runtime on one thread (onnxruntime-web, WebAssembly), the network with its
explanation and the plain network run by turns on the same pixels. It prints the least seconds of each and the ratio of
a map to the plain network's scores. Another model, which `to_onnx` wrote with a processor, can be given by its path.
"""

import argparse
import functools
import json
import os
import shutil
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import onnx
from playwright.sync_api import sync_playwright

BUILT = Path(__file__).parents[1] / "_build"
RUN = """async ([models, side, n, repeats]) => {
  const started = models.map((model) => {
    const worker = new Worker("worker.js", { type: "module" });
    return (what, given) => new Promise((resolve, reject) => {
      worker.onmessage = ({ data: { result, error, id } }) => id && (error ? reject(error) : resolve(result));
      worker.postMessage({ id: 1, what, ...given });
    });
  });
  for (const [i, model] of models.entries()) await started[i]("load", { runtime: "runtime.wasm.gz", model });
  const pixels = new Uint8Array(3 * side * side).map((_, i) => (i * 7919) % 256), weights = new Float32Array(n);
  weights[0] = 1;
  const seconds = models.map(() => []);
  for (let turn = 0; turn <= repeats; turn++)
    for (const [i, run] of started.entries()) {
      const { seconds: taken } = await run("run", { pixels, side, weights });
      if (turn) seconds[i].push(taken);  // the first one warms up
    }
  return seconds;
}"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=BUILT / "live" / "efficientnet-lite.onnx")
    parser.add_argument("--repeats", type=int, default=10, help="default: %(default)s")
    given = parser.parse_args()
    about = {one.key: one.value for one in onnx.load(given.model).metadata_props}
    side, n = json.loads(about["size"])[0], len(json.loads(about["labels"]))
    browser = os.environ.get("BROWSER_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("ort.js", "worker.js", "runtime.wasm.gz"):
            shutil.copy(BUILT / "live" / "extra" / "live" / file, folder)
        shutil.copy(given.model, folder / "explained.onnx")
        onnx.utils.extract_model(given.model, folder / "plain.onnx", ["image", "weights"], ["scores"])
        (folder / "index.html").write_text("<!doctype html>")
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with sync_playwright() as playwright:
            page = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
            plain, explained = map(min, page.evaluate(RUN, [["plain.onnx", "explained.onnx"], side, n, given.repeats]))
        server.shutdown()
    print(f"scores {plain:.3f} s, with maps {explained:.3f} s: {explained / plain:.1f} times")


if __name__ == "__main__":
    main()
