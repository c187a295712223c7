// node run_node.mjs onnxruntime-node|onnxruntime-web MODULES CASES [NAME...]: one JSON line a case; MODULES holds node_modules.
import { readFile, readdir } from "node:fs/promises";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { runAll } from "./run_cases.mjs";

const [kind, modules, cases, ...wanted] = process.argv.slice(2);
const require = createRequire(join(resolve(modules), "package.json"));
let ort;
if (kind === "onnxruntime-web") {
  const folder = join(resolve(modules), "node_modules", "onnxruntime-web", "dist");
  ort = { ...(await import(pathToFileURL(join(folder, "ort.node.min.mjs")).href)) };
  ort.env.wasm.numThreads = 1;
  ort.qcompileProvider = "wasm";
} else {
  ort = { ...require(kind) };
  ort.qcompileProvider = "cpu";
}
ort.env.logLevel = "fatal";
const described = JSON.parse(await readFile(join(resolve(modules), "node_modules", kind, "package.json"), "utf8"));
console.log(JSON.stringify({ ready: described.version }));
const names = wanted.length ? wanted : (await readdir(cases)).sort();
await runAll(ort, names, (name) => (file) => readFile(join(cases, name, file)), (found) => console.log(JSON.stringify(found)));
