"""What each onnxruntime can load: newest opset and IR, and forms of int8. Prints what `qcompile/portable_versions.py` holds.

    python benchmarks/edge/read_limits.py build/edge/versions 1.20.1 1.23.2 1.32.0

Every version's wheel is downloaded by pip into the folder and asked in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

_ASK = """
import json, sys
import onnxruntime as ort
ort.set_default_logger_severity(4)
def loads(path, kept=None):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if kept:
        options.optimized_model_filepath = kept
    try:
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True
folder = sys.argv[1]
found = {}
for kind in ("opset", "ir"):
    found[kind] = max((n for n in range(7, 30) if loads(f"{folder}/{kind}{n}.onnx")), default=0)
found["conv_integer_s8"] = loads(f"{folder}/conv_integer.onnx")
for kind in ("conv", "matmul"):
    found[f"s8_{kind}"] = loads(f"{folder}/{kind}.onnx", f"{folder}/{kind}.optimised.onnx")
print(json.dumps(found))
"""


def _identity(opset: int, ir_version: int) -> ModelProto:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def _between(op: str, x_shape: str, y_shape: str, weight: np.ndarray) -> ModelProto:
    """`op` between Q/DQ of int8."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[{x_shape}] x) => (float[{y_shape}] y) {{
            q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  v = DequantizeLinear(w, s, z)
            c = {op}(d, v)
            r = QuantizeLinear(c, s, z)  y = DequantizeLinear(r, s, z)
        }}"""
    )
    stored = {"w": weight, "s": np.float32(0.5), "z": np.int8(0)}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in stored.items())
    return model


def _conv_integer() -> ModelProto:
    ends = [("x", TensorProto.UINT8), ("w", TensorProto.INT8), ("y", TensorProto.INT32)]
    x, w, y = (helper.make_tensor_value_info(n, t, [1, 1, 1, 1]) for n, t in ends)
    graph = helper.make_graph([helper.make_node("ConvInteger", ["x", "w"], ["y"])], "g", [x, w], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def probe_files(folder: Path) -> None:
    """Write every file that is asked about."""
    for version in range(7, 30):
        (folder / f"opset{version}.onnx").write_bytes(_identity(version, 4).SerializeToString())
        (folder / f"ir{version}.onnx").write_bytes(_identity(13, version).SerializeToString())
    (folder / "conv_integer.onnx").write_bytes(_conv_integer().SerializeToString())
    conv = _between("Conv", "1, 4, 8, 8", "1, 4, 8, 8", np.ones((4, 4, 1, 1), np.int8))
    (folder / "conv.onnx").write_bytes(conv.SerializeToString())
    (folder / "matmul.onnx").write_bytes(_between("MatMul", "4, 8", "4, 8", np.ones((8, 8), np.int8)).SerializeToString())


def limits(version: str, cache: Path) -> dict[str, object]:
    """What onnxruntime `version` answers; raises CalledProcessError where pip or that version fails."""
    site = cache / version
    if not (site / "onnxruntime").is_dir():
        numpy = "numpy<2" if tuple(map(int, version.split("."))) < (1, 19) else "numpy"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(site), "--only-binary=:all:"]
        subprocess.run([*pip, f"onnxruntime=={version}", numpy], check=True)
    with tempfile.TemporaryDirectory(prefix="read-limits-") as name:
        folder = Path(name)
        probe_files(folder)
        command = [sys.executable, "-c", _ASK, name]
        done = subprocess.run(command, env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=True)
        found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
        for kind, fused in (("conv", "QLinearConv"), ("matmul", "QLinearMatMul")):
            path = folder / f"{kind}.optimised.onnx"
            ops = {n.op_type for n in onnx.load(path).graph.node} if path.exists() else set()
            found[f"s8_{kind}"] = fused in ops
    return found


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for wanted in sys.argv[2:]:
        try:
            print(wanted, json.dumps(limits(wanted, place)), flush=True)
        except subprocess.CalledProcessError as error:
            print(wanted, "failed:", (error.stderr or "").strip().splitlines()[-1:], flush=True)
