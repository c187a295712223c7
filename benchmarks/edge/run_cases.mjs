// Run cases with onnxruntime for JavaScript and compare bit for bit. Used by Node (run_node.mjs) and by the browser (page.html).

const ARRAYS = {
  bool: Uint8Array, float32: Float32Array, float64: Float64Array, int8: Int8Array, int32: Int32Array, int64: BigInt64Array,
  uint8: Uint8Array, uint32: Uint32Array,
};

function typed(record, bytes) {
  return new ARRAYS[record.type](bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
}

function compare(record, expected, tensor) {
  const got = tensor.data;
  const same_form = tensor.type === record.type && tensor.dims.join() === record.dims.join();
  if (!same_form) return { differ: expected.length, of: expected.length, largest: null };
  let differ = 0, largest = 0;
  for (let i = 0; i < expected.length; i++) {
    if (expected[i] !== got[i]) {
      differ++;
      largest = Math.max(largest, Math.abs(Number(expected[i]) - Number(got[i])));
    }
  }
  return { differ, of: expected.length, largest };
}

/** Runs one case; `read(file)` gives the bytes of a file of its folder. */
export async function runCase(ort, read) {
  const record = JSON.parse(new TextDecoder().decode(await read("case.json")));
  const session = await ort.InferenceSession.create(await read("model.onnx"), {
    intraOpNumThreads: 1, interOpNumThreads: 1, logSeverityLevel: 4, executionProviders: [ort.qcompileProvider],
  });
  try {
    const feeds = {};
    for (const input of record.inputs) feeds[input.name] = new ort.Tensor(input.type, typed(input, await read(input.file)), input.dims);
    const results = await session.run(feeds);
    const total = { differ: 0, of: 0, largest: 0 };
    for (const output of record.outputs) {
      const found = compare(output, typed(output, await read(output.file)), results[output.name]);
      total.differ += found.differ;
      total.of += found.of;
      total.largest = found.largest === null ? null : Math.max(total.largest, found.largest);
    }
    return total;
  } finally {
    await session.release();
  }
}

export async function runAll(ort, names, reader, tell) {
  for (const name of names) {
    let found;
    try {
      found = await runCase(ort, reader(name));
    } catch (error) {
      found = { error: String(error && error.message ? error.message : error).replace(/\s+/g, " ").slice(0, 200) };
    }
    await tell({ case: name, ...found });
  }
}
