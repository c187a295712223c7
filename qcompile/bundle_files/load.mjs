// Load the model of this folder and check it against its sample:
//     node load.mjs [onnxruntime-node|onnxruntime-web]
// From your own code: `const { session, ort } = await load(ort)`; it throws where this machine gives other results than promised.
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import process from "node:process";

const ARRAYS = {
  bool: Uint8Array, float32: Float32Array, float64: Float64Array, int8: Int8Array, int32: Int32Array, int64: BigInt64Array,
  uint8: Uint8Array, uint32: Uint32Array,
};
const here = dirname(fileURLToPath(import.meta.url));

async function read(folder, record) {
  const bytes = await readFile(join(folder, "sample", record.file));
  return new ARRAYS[record.type](bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
}

function differing(expected, got, manifest) {
  let differ = 0, off = 0, low = Infinity, high = -Infinity;
  for (let i = 0; i < expected.length; i++) {
    const value = Number(expected[i]);
    low = Math.min(low, value);
    high = Math.max(high, value);
    if (expected[i] !== got[i]) {
      differ++;
      const gap = Math.abs(value - Number(got[i]));
      off = Number.isNaN(gap) ? Infinity : Math.max(off, gap);
    }
  }
  return manifest.promise !== "bits" && off <= manifest.close * (high - low || 1) ? 0 : differ;
}

export async function load(ort, folder = here, file = "model.onnx") {
  const manifest = JSON.parse(await readFile(join(folder, "manifest.json"), "utf8"));
  const session = await ort.InferenceSession.create(await readFile(join(folder, file)), { intraOpNumThreads: 1 });
  const feeds = {};
  for (const input of manifest.inputs) feeds[input.name] = new ort.Tensor(input.type, await read(folder, input), input.dims);
  const results = await session.run(feeds);
  for (const output of manifest.outputs) {
    const got = results[output.name];
    if (got.type !== output.type || got.dims.join() !== output.dims.join())
      throw new Error(`output ${output.name} is ${got.type} [${got.dims}], not ${output.type} [${output.dims}]`);
    const differ = differing(await read(folder, output), got.data, manifest);
    if (differ) throw new Error(`${differ} of ${got.data.length} values of output ${output.name} are not those expected`);
  }
  return { session, ort, manifest };
}

async function runtime(kind) {
  // looked for where the command is run, then beside this file
  for (const place of [process.cwd(), here]) {
    const require = createRequire(join(place, "package.json"));
    try {
      if (kind !== "onnxruntime-web") return require(kind);
      const ort = await import(pathToFileURL(join(dirname(require.resolve(kind)), "ort.node.min.mjs")).href);
      ort.env.wasm.numThreads = 1;
      return ort;
    } catch (error) {
      if (error.code !== "MODULE_NOT_FOUND") throw error;
    }
  }
  throw new Error(`${kind} is not installed here: npm install ${kind}`);
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  try {
    await load(await runtime(process.argv[2] ?? "onnxruntime-node"));
    console.log("same: the sample gives the expected outputs");
  } catch (error) {
    console.error(`FAILED: ${error.message}`);
    process.exitCode = 1;
  }
}
