// node time.mjs RUNTIME MODULES JOB.json: times models in turn; used by `qcompile bench --runtime`. Prints one JSON object.
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

const ARRAYS = {
  bool: Uint8Array, float32: Float32Array, float64: Float64Array, int8: Int8Array, int32: Int32Array, int64: BigInt64Array,
  uint8: Uint8Array, uint32: Uint32Array,
};
const WARM_RUNS = 200, WARM_MS = 1000;
const [runtime, modules, file] = process.argv.slice(2);
const job = JSON.parse(await readFile(file, "utf8"));
const require = createRequire(join(modules, "package.json"));
let ort;
if (runtime === "web") {
  ort = await import(pathToFileURL(join(modules, "node_modules", "onnxruntime-web", "dist", "ort.node.min.mjs")).href);
  ort.env.wasm.numThreads = job.threads;
} else ort = require("onnxruntime-node");
const name = `onnxruntime-${runtime}`;
const { version } = JSON.parse(await readFile(join(modules, "node_modules", name, "package.json"), "utf8"));

const providers = [runtime === "web" ? "wasm" : "cpu"];
const options = { intraOpNumThreads: job.threads, interOpNumThreads: 1, logSeverityLevel: 4, executionProviders: providers };
const runs = [];
for (const model of job.models) {
  const session = await ort.InferenceSession.create(await readFile(model.path), options);
  const feeds = {};
  for (const input of model.inputs) {
    const bytes = await readFile(join(dirname(file), input.file));
    const array = new ARRAYS[input.type](bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
    feeds[input.name] = new ort.Tensor(input.type, array, input.dims);
  }
  // the engine compiles hot WebAssembly functions anew, in the background
  const begin = performance.now();
  for (let i = 0; i < WARM_RUNS && performance.now() - begin < WARM_MS; i++) await session.run(feeds);
  runs.push({ session, feeds, rounds: [] });
}
for (let round = 0; round < job.rounds; round++) {
  for (const run of runs) {
    const begin = performance.now(), times = [];
    do {
      const start = performance.now();
      await run.session.run(run.feeds);
      times.push(performance.now() - start);
    } while (performance.now() - begin < job.slot_ms);
    times.sort((a, b) => a - b);
    run.rounds.push(times[times.length >> 1]);
  }
}
console.log(JSON.stringify({ version, round_ms: runs.map((run) => run.rounds) }));
