"""Run cases with onnxruntime and compare bit for bit; needs numpy and onnxruntime only, so that it runs on any emulated machine.

    python run_onnxruntime.py CASES [NAME...]

Prints one JSON line a case: {"case", "differ", "of", "largest"} or {"case", "error"}; a "ready" line first.
"""

import json
import os
import sys

import numpy as np
import onnxruntime as ort


def read(folder, record):
    """One tensor of a case."""
    return np.fromfile(os.path.join(folder, record["file"]), record["type"]).reshape(record["dims"])


def compare(expected, got):
    """{"differ", "of", "largest"}; other shapes or types differ everywhere."""
    if expected.dtype != got.dtype or expected.shape != got.shape:
        return {"differ": int(expected.size), "of": int(expected.size), "largest": float("inf")}
    off = np.abs(expected.astype(np.float64) - got.astype(np.float64))
    return {"differ": int((expected != got).sum()), "of": int(expected.size), "largest": float(off.max(initial=0))}


def run(folder, path):
    """All outputs of one case against what is expected."""
    with open(os.path.join(folder, "case.json"), encoding="utf-8") as stream:
        case = json.load(stream)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = session.run([o["name"] for o in case["outputs"]] or None, {i["name"]: read(folder, i) for i in case["inputs"]})
    found = [compare(read(folder, record), got) for record, got in zip(case["outputs"], outputs, strict=True)]
    return {
        "differ": sum(f["differ"] for f in found),
        "of": sum(f["of"] for f in found),
        "largest": max((f["largest"] for f in found), default=0.0),
    }


def main(root, names):
    """Every case under `root`, or those named."""
    print(json.dumps({"ready": ort.__version__}), flush=True)
    for name in names or sorted(os.listdir(root)):
        folder = os.path.join(root, name)
        try:
            found = run(folder, os.path.join(folder, "model.onnx"))
        except Exception as error:  # whatever the runtime raises is the answer
            found = {"error": " ".join(str(error).split())[:200]}
        print(json.dumps({"case": name, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
