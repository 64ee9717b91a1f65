/* Explains a photo in the reader's browser. Nothing leaves it. */
const root = document.getElementById("live");
const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
const part = (id) => root.querySelector("#xl-" + id);
const { labels, side, resized, heat, against, opacity, dim } = data;
const SHOWN = 2 * side;       // pixels of a map as it is drawn
const LARGEST = 1024;         // of a photo's longer side, beyond which the browser makes it smaller first

// ---- the network, in its thread -------------------------------------------------------------------------------------

let worker, loading, number = 0;
const waiting = new Map();

function ask(what, given) {
  return new Promise((resolve, reject) => {
    waiting.set(++number, { resolve, reject });
    worker.postMessage({ id: number, what, ...given });
  });
}

function load() {
  if (loading) return loading;
  const bar = part("progress");
  bar.hidden = false;
  worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  worker.onmessage = ({ data: { id, loaded, result, error } }) => {
    if (loaded !== undefined) {
      bar.value = loaded / data.bytes;
      const megabytes = (n) => (n / 1e6).toFixed(1);
      if (loaded < data.bytes) say(`Loading the network: ${megabytes(loaded)} of ${megabytes(data.bytes)} MB`);
      else say("Starting the network …");
      return;
    }
    const { resolve, reject } = waiting.get(id);
    waiting.delete(id);
    error === undefined ? resolve(result) : reject(new Error(error));
  };
  worker.onerror = () => {
    for (const { reject } of waiting.values()) reject(new Error("the network could not be started"));
    waiting.clear();
  };
  loading = ask("load", { runtime: data.runtime, model: data.model }).finally(() => { bar.hidden = true; });
  loading.catch(() => { loading = null; worker.terminate(); });  // so that the next photo tries again
  return loading;
}

// ---- from a photo to what the network sees ---------------------------------------------------------------------------

function say(text) {
  part("status").textContent = text;
}

/** A canvas with the photo on white, upright, at most LARGEST wide and high. */
async function opened(source) {
  const image = new Image();
  const address = source instanceof Blob ? URL.createObjectURL(source) : source;
  try {
    image.src = address;
    await image.decode();
    const { naturalWidth: width, naturalHeight: height } = image;
    const scale = Math.min(1, LARGEST / Math.max(width, height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(width * scale));
    canvas.height = Math.max(1, Math.round(height * scale));
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingQuality = "high";
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    return canvas;
  } finally {
    if (address !== source) URL.revokeObjectURL(address);
  }
}

/** Which square of a photo the network sees: its shorter side to `resized`, then `side` pixels of the middle. */
function seenBox({ width, height }) {
  const shorter = Math.min(width, height);
  const halfToEven = (n) => (n % 1 === 0.5 ? 2 * Math.round(n / 2) : Math.round(n));
  return [width, height].map((length) => {
    const small = length === shorter ? resized : Math.trunc((resized * length) / shorter);
    return { length, scale: length / small, first: halfToEven((small - side) / 2) };
  });
}

/** For each of `side` positions: the first pixel that it is made of, and the weights, by a bicubic filter. */
function taps({ length, scale, first }) {
  const stretch = Math.max(scale, 1);
  const bicubic = (x) => {
    x = Math.abs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
  };
  return Array.from({ length: side }, (_, i) => {
    const centre = (i + first + 0.5) * scale;
    const from = Math.max(0, Math.trunc(centre - 2 * stretch + 0.5));
    const to = Math.min(length, Math.trunc(centre + 2 * stretch + 0.5));
    const weights = Array.from({ length: to - from }, (_, k) => bicubic((k + from - centre + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b, 0);
    return { from, weights: weights.map((w) => w / sum) };
  });
}

/** The pixels that the network sees, red, green and blue: resized as the model's processor does it, then cropped. */
function asSeen(canvas) {
  const { width, height } = canvas;
  const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  const [across, down] = seenBox(canvas).map(taps);
  const rows = new Float32Array(height * side * 3), seen = new Uint8Array(side * side * 3);
  const rounded = (value) => Math.min(255, Math.max(0, Math.round(value)));
  for (let y = 0; y < height; y++)
    across.forEach(({ from, weights }, x) => {
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        for (let k = 0; k < weights.length; k++) sum += weights[k] * pixels[4 * (y * width + from + k) + c];
        rows[(y * side + x) * 3 + c] = rounded(sum);
      }
    });
  down.forEach(({ from, weights }, y) => {
    for (let x = 0; x < 3 * side; x++) {
      let sum = 0;
      for (let k = 0; k < weights.length; k++) sum += weights[k] * rows[(from + k) * 3 * side + x];
      seen[y * 3 * side + x] = rounded(sum);
    }
  });
  return seen;
}

// ---- maps ------------------------------------------------------------------------------------------------------------

/** What speaks for it, in [0, 1]; of a map in [-1, 1]. */
function positive(map) {
  const most = map.reduce((a, b) => Math.max(a, b), 0);
  return map.map((value) => (most > 0 && value > 0 ? value / most : 0));
}

/** A heat map that has never seen the network: blurred edges of the photo, more of them towards its middle. */
function edgesOf(seen) {
  const grey = new Float32Array(side * side).map((_, i) => 0.3 * seen[3 * i] + 0.59 * seen[3 * i + 1] + 0.11 * seen[3 * i + 2]);
  let map = grey.map((value, i) => {
    const x = i % side, y = (i - x) / side;
    return x && y ? Math.hypot(value - grey[i - 1], value - grey[i - side]) : 0;
  });
  const reach = 18, sigma = 7;
  for (const step of [1, side])
    map = map.map((_, i) => {
      const at = step === 1 ? i % side : Math.floor(i / side);
      let sum = 0;
      for (let k = Math.max(-reach, -at); k <= Math.min(reach, side - 1 - at); k++)
        sum += Math.exp(-((k / sigma) ** 2) / 2) * map[i + k * step];
      return sum;
    });
  const middle = (side - 1) / 2, spread = 0.28 * side;
  return positive(map.map((value, i) => {
    const x = i % side, y = (i - x) / side;
    return value * Math.exp(-((x - middle) ** 2 + (y - middle) ** 2) / (2 * spread ** 2));
  }));
}

/** Draws a map in [-1, 1] over the square that the network saw; what speaks against has colours of its own. */
function draw(canvas, map, share = 1) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  canvas.width = canvas.height = SHOWN;
  const [across, down] = seenBox(state.photo);
  context.imageSmoothingQuality = "high";
  context.drawImage(state.photo, across.first * across.scale, down.first * down.scale, side * across.scale,
                    side * down.scale, 0, 0, SHOWN, SHOWN);
  const image = context.getImageData(0, 0, SHOWN, SHOWN), pixels = image.data;
  const [low, high] = dim;
  for (let y = 0; y < SHOWN; y++) {
    const v = Math.min(side - 1, Math.max(0, (y + 0.5) / 2 - 0.5)), top = Math.min(side - 2, Math.floor(v));
    for (let x = 0; x < SHOWN; x++) {
      const u = Math.min(side - 1, Math.max(0, (x + 0.5) / 2 - 0.5)), left = Math.min(side - 2, Math.floor(u));
      const i = top * side + left, a = v - top, b = u - left;
      const value = (1 - a) * ((1 - b) * map[i] + b * map[i + 1]) + a * ((1 - b) * map[i + side] + b * map[i + side + 1]);
      const index = Math.min(255, Math.round(255 * Math.abs(value))), colours = value < 0 ? against : heat;
      const p = 4 * (y * SHOWN + x), o = opacity[index];
      const grey = 255 * low + (high - low) * (0.299 * pixels[p] + 0.587 * pixels[p + 1] + 0.114 * pixels[p + 2]);
      for (let c = 0; c < 3; c++)
        pixels[p + c] = (1 - share) * pixels[p + c] + share * (255 * o * colours[index][c] + (1 - o) * grey);
    }
  }
  context.putImageData(image, 0, 0);
}

/** The photo, with a white line around what the network saw. */
function drawPhoto(canvas) {
  const { width, height } = state.photo, scale = SHOWN / Math.max(width, height);
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(state.photo, 0, 0, canvas.width, canvas.height);
  const [across, down] = seenBox(state.photo);
  const box = [across.first * across.scale, down.first * down.scale, side * across.scale, side * down.scale];
  for (const [line, colour] of [[6, "black"], [3, "white"]]) {
    context.lineWidth = line;
    context.strokeStyle = colour;
    context.strokeRect(...box.map((value) => value * scale));
  }
}

/** The colour bar over a middling grey. */
function drawBar(canvas, signed) {
  const context = canvas.getContext("2d"), ground = (dim[0] + dim[1]) / 2;
  for (let x = 0; x < 256; x++) {
    const value = signed ? (x - 127.5) / 127.5 : x / 255;
    const index = Math.round(255 * Math.abs(value)), colours = value < 0 ? against : heat;
    const mixed = [0, 1, 2].map((c) => 255 * (opacity[index] * colours[index][c] + (1 - opacity[index]) * ground));
    context.fillStyle = `rgb(${mixed.map(Math.round)})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
}

/** In words: where a map is brightest. */
function place(map) {
  const at = map.reduce((best, value, i) => (value > map[best] ? i : best), 0);
  if (!(map[at] > 0)) return "zero everywhere";
  const third = (n) => Math.min(2, Math.floor((3 * n) / side));
  const row = ["at the top", "in the middle", "at the bottom"][third(Math.floor(at / side))];
  const column = [" on the left", "", " on the right"][third(at % side)];
  return `brightest ${row === "in the middle" && column ? "in the middle row," : row}${column}`;
}

// ---- what is shown ---------------------------------------------------------------------------------------------------

const state = { photo: null, seen: null, scores: null, category: 0, other: -1, maps: {}, real: "a" };
let latest = 0;  // of several photos or choices one after the other, the last one is shown

const name = (category) => labels[category];
const both = () => root.querySelector("[name='xl-view']:checked").value === "both";
const question = () => (state.other < 0 ? name(state.category) : `${name(state.category)}, and not ${name(state.other)}`);

function probabilities() {
  const most = Math.max(...state.scores), powers = Array.from(state.scores, (score) => Math.exp(score - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

const percent = (p) => (p >= 0.995 ? "over 99 %" : p < 0.005 ? "under 1 %" : `${Math.round(100 * p)} %`);

function topFive() {
  return Array.from(state.scores.keys()).sort((a, b) => state.scores[b] - state.scores[a]).slice(0, 5);
}

function explanation(category, other) {
  const weights = new Float32Array(labels.length);
  if (category >= 0) weights[category] = 1;
  if (other >= 0) weights[other] = -1;
  return ask("run", { pixels: state.seen, side, weights });
}

function showCategories() {
  const shown = topFive(), p = probabilities();
  if (!shown.includes(state.category)) shown.push(state.category);
  const focused = part("categories").contains(document.activeElement);
  part("categories").replaceChildren(...shown.map((category) => {
    const label = document.createElement("label"), choice = document.createElement("input");
    Object.assign(choice, { type: "radio", name: "xl-category", value: category, checked: category === state.category });
    const words = document.createElement("span"), share = document.createElement("span");
    words.textContent = name(category);
    share.textContent = percent(p[category]);
    const bar = document.createElement("i"), filled = document.createElement("span");
    filled.style.width = `${100 * p[category]}%`;
    bar.append(filled);
    label.append(choice, words, share, bar);
    return label;
  }));
  if (focused) part("categories").querySelector(":checked").focus();
  const rivals = [...topFive(), ...(state.other >= 0 ? [state.other] : [])].filter((c) => c !== state.category);
  part("contrast").replaceChildren(
    new Option("no contrast", -1, false, state.other < 0),
    ...[...new Set(rivals)].map((c) => new Option(name(c), c, false, c === state.other)));
}

function showMaps() {
  const { map, grad_cam_map: second, seconds } = state.explained, shown = positive(map);
  const share = part("opacity").value / 100;
  draw(part("map"), both() ? map : shown, share);
  drawBar(part("bar"), both());
  part("low").textContent = both() ? "most against" : "nothing";
  part("bar").nextElementSibling.textContent = both() ? "most for" : "most";
  const words = `What speaks ${both() ? "for and against" : "for"} ${question()}`;
  const little = both() && state.other < 0 && map.every((value) => value > -0.05);
  part("map-caption").textContent = `${words}: balanced gradients, ${place(shown)}. ` +
    (little ? "Hardly anything speaks against it; a contrast has both. " : "") + `${seconds.toFixed(2)} s on your device.`;
  part("map").setAttribute("aria-label", `Heat map. ${words}: ${place(shown)}`);
  draw(part("second"), second, share);
  part("second-caption").textContent = `Grad-CAM at the last layer, for ${question()}: ${place(second)}.`;
  part("second").setAttribute("aria-label", `Heat map. ${part("second-caption").textContent}`);
  drawPhoto(part("photo"));
  part("photo").setAttribute("aria-label", "Your photo, with a square around what the network saw");
  for (const panel of ["a", "b"]) {
    draw(part(panel), panel === state.real ? shown : state.edges);
    part(panel).setAttribute("aria-label", `Map ${panel.toUpperCase()}: ${place(panel === state.real ? shown : state.edges)}`);
  }
  part("question").textContent =
    `Two maps for ${question()}. One is the network's; the other was made without it.`;
}

/** Forgets the answer to the question, and may change sides. */
function askAgain() {
  state.real = Math.random() < 0.5 ? "a" : "b";
  part("verdict").textContent = "";
  for (const panel of ["a", "b"]) part("told-" + panel).textContent = "";
}

function trust(panel) {
  for (const one of ["a", "b"])
    part("told-" + one).textContent = one === state.real ? "the network's" : "edges of your photo, without the network";
  part("verdict").textContent =
    (panel === state.real ? "You chose the network's map. " : "That one has never seen the network. ") +
    "The other map is made of your photo's edges, brighter towards the middle, and looks like an explanation. " +
    "Choose another category above: the network's map changes with the question, and that one cannot. " +
    "Looks prove nothing; a map that ignores the question explains nothing.";
}

async function explain(category, other) {
  const mine = ++latest;
  say(`Explaining ${name(category)} …`);
  const found = await explanation(category, other);
  if (mine !== latest) return;
  Object.assign(state, { category, other, explained: found });
  showCategories();
  showMaps();
  say(`${question()}: ${place(positive(found.map))}.`);
  root.dispatchEvent(new CustomEvent("explained", { detail: { ...state, map: positive(found.map) } }));
}

async function take(source, title) {
  const mine = ++latest;
  for (const button of root.querySelectorAll(".xl-photos button"))
    button.setAttribute("aria-pressed", button.title === title);
  try {
    say("Opening the photo …");
    const photo = await opened(source).catch(() => {
      throw new Error("This is no picture that your browser can read. Try a JPEG, PNG or WebP.");
    });
    const seen = asSeen(photo);
    await load().catch((error) => {
      throw new Error(`The network could not be loaded (${error.message}). Choose the photo again to try once more.`);
    });
    if (mine !== latest) return;
    say("Looking at the photo …");
    Object.assign(state, { photo, seen, edges: edgesOf(seen) });
    const { scores } = await explanation(-1, -1);
    if (mine !== latest) return;
    Object.assign(state, { scores, other: -1 });
    const [first] = topFive();
    askAgain();
    part("preview").hidden = true;
    part("results").hidden = false;
    await explain(first, -1);
  } catch (error) {
    if (mine === latest) say(error.message);
  }
}

// ---- controls --------------------------------------------------------------------------------------------------------

function failed(error) {
  say(error.message);
}

function save() {
  const text = 64, bar = 40, canvas = document.createElement("canvas");
  canvas.width = SHOWN;
  canvas.height = SHOWN + text + bar;
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = "black";
  context.font = "600 20px sans-serif";
  context.fillText(part("map-caption").textContent.split(":")[0], 8, 26, SHOWN - 16);
  context.font = "15px sans-serif";
  context.fillText("EfficientNet-Lite0, balanced gradients. XAI Recipes", 8, 50, SHOWN - 16);
  context.drawImage(part("map"), 0, text);
  context.drawImage(part("bar"), 100, SHOWN + text + 12, SHOWN - 200, 16);
  context.fillText(part("low").textContent, 8, SHOWN + text + 26, 88);
  context.fillText(part("bar").nextElementSibling.textContent, SHOWN - 92, SHOWN + text + 26, 84);
  const link = document.createElement("a");
  link.download = `what speaks for ${name(state.category).split(",")[0]}.png`;
  link.href = canvas.toDataURL("image/png");
  link.click();
}

function begin() {
  const missing = [
    [typeof WebAssembly !== "object", "WebAssembly"],
    [typeof Worker !== "function", "web workers"],
    [typeof DecompressionStream !== "function", "DecompressionStream"],
  ].filter(([absent]) => absent).map(([, what]) => what);
  if (missing.length) {
    part("cannot").textContent =
      `The network can't run in this browser: it has no ${missing.join(" and no ")}. A current one has; some have it ` +
      "switched off. The other pages of this book need none of it.";
    part("cannot").hidden = false;
    part("tool").hidden = true;
    return;
  }
  root.querySelector(".xl-photos").append(...data.photos.map(({ title, photo, thumbnail }) => {
    const button = document.createElement("button"), image = new Image(62, 62);
    Object.assign(button, { type: "button", title });
    Object.assign(image, { src: root.dataset.files + thumbnail, alt: title });
    button.setAttribute("aria-pressed", false);
    button.append(image);
    button.addEventListener("click", () => take(root.dataset.files + photo, title));
    return button;
  }));
  part("names").append(...labels.map((label) => new Option(label)));
  part("camera-button").hidden = !matchMedia("(pointer: coarse)").matches;
  for (const id of ["file", "camera"])
    part(id).addEventListener("change", ({ target }) => {
      if (target.files[0]) take(target.files[0]);
      target.value = "";  // so that the same file can be chosen again
    });
  root.addEventListener("dragover", (event) => { event.preventDefault(); root.dataset.over = true; });
  for (const kind of ["dragleave", "drop"]) root.addEventListener(kind, () => { root.dataset.over = false; });
  root.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
    if (file) take(file);
  });
  part("categories").addEventListener("change", ({ target }) =>
    explain(Number(target.value), Number(target.value) === state.other ? -1 : state.other).catch(failed));
  part("contrast").addEventListener("change", ({ target }) => explain(state.category, Number(target.value)).catch(failed));
  part("search").addEventListener("change", ({ target }) => {
    const wanted = target.value.trim().toLowerCase();
    if (!wanted) return;
    const names = labels.map((label) => label.toLowerCase());
    const exact = names.findIndex((label) => label === wanted || label.split(", ").includes(wanted));
    const category = exact >= 0 ? exact : names.findIndex((label) => label.includes(wanted));
    if (category < 0) say(`There is no category with “${target.value}” in its name.`);
    else explain(category, category === state.other ? -1 : state.other).catch(failed);
    target.value = "";
  });
  part("views").addEventListener("change", showMaps);
  part("opacity").addEventListener("input", showMaps);
  part("save").addEventListener("click", save);
  for (const panel of ["a", "b"]) part("trust-" + panel).addEventListener("click", () => trust(panel));
}

begin();
