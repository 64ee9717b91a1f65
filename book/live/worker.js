/* The network and its explanation, in a thread of their own: the page stays responsive. */
import * as ort from "./ort.js";

ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";

let session;

/** The bytes of a file that is stored compressed; some servers unpack it on the way. */
async function fetched(name, onBytes) {
  const response = await fetch(new URL(name, import.meta.url));
  if (!response.ok) throw new Error(`${name}: the server answers ${response.status}`);
  const reader = response.body.getReader(), parts = [];
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    onBytes(part.value.length);
  }
  const packed = new Blob(parts);
  const [first, second] = new Uint8Array(await packed.slice(0, 2).arrayBuffer());
  if (first !== 0x1f || second !== 0x8b) return new Uint8Array(await packed.arrayBuffer());
  const stream = packed.stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function load({ runtime, model }) {
  let loaded = 0;
  const onBytes = (n) => postMessage({ loaded: (loaded += n) });
  const [wasm, network] = await Promise.all([fetched(runtime, onBytes), fetched(model, onBytes)]);
  ort.env.wasm.wasmBinary = wasm;
  session = await ort.InferenceSession.create(network, { logSeverityLevel: 3 });
}

async function run({ pixels, side, weights }) {
  const start = performance.now();
  const outputs = await session.run({
    image: new ort.Tensor("uint8", pixels, [1, side, side, 3]),
    weights: new ort.Tensor("float32", weights, [1, weights.length]),
  });
  const values = Object.fromEntries(Object.entries(outputs).map(([name, tensor]) => [name, tensor.data]));
  return { ...values, seconds: (performance.now() - start) / 1000 };
}

onmessage = async ({ data: { id, what, ...given } }) => {
  try {
    postMessage({ id, result: await { load, run }[what](given) });
  } catch (error) {
    postMessage({ id, error: String(error?.message ?? error) });
  }
};
