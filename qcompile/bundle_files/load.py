"""Load the model of this folder and check it against its sample: python load.py [--ort]. Needs numpy and onnxruntime.

From your own code: `session = load(folder)`; it raises RuntimeError where this machine gives other results than were promised.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


def _read(folder, record):
    return np.fromfile(folder / "sample" / record["file"], record["type"]).reshape(record["dims"])


def load(folder=Path(__file__).parent, ort_format=False, threads=1):
    """An InferenceSession that gave the expected outputs for the sample."""
    folder = Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    name = "model.ort" if ort_format else "model.onnx"
    session = ort.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
    results = session.run([o["name"] for o in manifest["outputs"]], {i["name"]: _read(folder, i) for i in manifest["inputs"]})
    for record, got in zip(manifest["outputs"], results, strict=True):
        expected = _read(folder, record)
        if got.dtype != expected.dtype or got.shape != expected.shape:
            wanted = f"{expected.dtype} {expected.shape}"
            raise RuntimeError(f"{name}: output {record['name']} is {got.dtype} {got.shape}, not {wanted}")
        differ = int((got != expected).sum())
        if manifest["promise"] != "bits" and differ:
            off = np.abs(got.astype(np.float64) - expected).max()
            differ = differ if off > manifest["close"] * (float(np.ptp(expected.astype(np.float64))) or 1.0) else 0
        if differ:
            raise RuntimeError(f"{name}: {differ} of {got.size} values of output {record['name']} are not those expected")
    return session


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ort", action="store_true", help="load model.ort")
    try:
        load(ort_format=parser.parse_args().ort)
    except RuntimeError as error:
        sys.exit(f"FAILED: {error}")
    print("same: the sample gives the expected outputs")
