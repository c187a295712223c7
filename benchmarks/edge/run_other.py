"""Run one case with OpenVINO or tract: python run_other.py openvino|tract CASES NAME. Prints the line of `run_onnxruntime.py`.

Here `largest` is a share of the output's range."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def openvino(path: Path, feeds: dict[str, Any]) -> list[Any]:
    """All outputs by OpenVINO's CPU plugin, in float32 where it computes in float."""
    import openvino as ov

    core = ov.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(feeds)
    return [np.asarray(found[output]) for output in compiled.outputs]


def tract(path: Path, feeds: dict[str, Any]) -> list[Any]:
    """All outputs by tract, input shapes made fixed."""
    import tract as tr

    model = tr.onnx().load(str(path))
    names = [model.input_name(i) for i in range(model.input_count())]
    for index, name in enumerate(names):
        array = feeds[name]
        kind = {"float32": "f32", "uint8": "u8", "int8": "i8", "int64": "i64"}[array.dtype.name]
        model.set_input_fact(index, ",".join([*map(str, array.shape), kind]))
    runnable = model.into_model().into_runnable()
    return [value.to_numpy() for value in runnable.run([feeds[name] for name in names])]


def main(kind: str, root: Path, name: str) -> None:
    """Print the line of one case."""
    folder = root / name
    case = json.loads((folder / "case.json").read_text())
    read = {r["file"]: np.fromfile(folder / r["file"], r["type"]).reshape(r["dims"]) for r in case["inputs"] + case["outputs"]}
    inlined = folder / "inlined.onnx"
    feeds = {r["name"]: read[r["file"]] for r in case["inputs"]}
    try:
        outputs = {"openvino": openvino, "tract": tract}[kind](inlined if inlined.exists() else folder / "model.onnx", feeds)
    except Exception as error:
        print(json.dumps({"case": name, "error": " ".join(str(error).split())[:200]}))
        return
    differ = of = 0
    largest = 0.0
    for record, got in zip(case["outputs"], outputs, strict=True):
        expected = read[record["file"]].astype(np.float64)
        off = np.abs(expected - np.asarray(got, np.float64).reshape(expected.shape))
        differ, of = differ + int((off != 0).sum()), of + expected.size
        span = float(expected.max() - expected.min()) or 1.0
        largest = max(largest, float(off.max(initial=0)) / span)
    print(json.dumps({"case": name, "differ": differ, "of": of, "largest": largest}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
