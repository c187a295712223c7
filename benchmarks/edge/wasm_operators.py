"""Times operators in float and in int8 in WebAssembly, and writes `qcompile/wasm_table.json`, by which `--target wasm` decides.

    python benchmarks/edge/wasm_operators.py build/edge/node

Each row is one operator at one size, the float and the int8 model timed in turn on one thread: microseconds of both. The int8
model takes and gives uint8; a row `boundary` is QuantizeLinear and DequantizeLinear of so many elements.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

from qcompile.bench_node import time_in_node

OUTPUT = Path(__file__).resolve().parents[2] / "qcompile" / "wasm_table.json"
_HEAD = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>\n'
#: kernel, group (0: depthwise), stride, channels in, channels out, size of the picture.
_CONVOLUTIONS = [
    (1, 1, 1, 16, 96, 56), (1, 1, 1, 32, 192, 28), (1, 1, 1, 96, 24, 56), (1, 1, 1, 192, 32, 28), (1, 1, 1, 384, 64, 14),
    (1, 1, 1, 64, 384, 14), (1, 1, 1, 960, 160, 7), (1, 1, 1, 160, 960, 7), (1, 1, 1, 320, 1280, 7),
    (3, 0, 1, 32, 32, 112), (3, 0, 1, 144, 144, 56), (3, 0, 1, 192, 192, 28), (3, 0, 1, 384, 384, 14), (3, 0, 1, 960, 960, 7),
    (3, 0, 2, 96, 96, 112), (3, 0, 2, 192, 192, 28),
    (3, 1, 1, 16, 16, 32), (3, 1, 1, 32, 32, 16), (3, 1, 1, 64, 64, 8), (3, 1, 1, 64, 64, 56), (3, 1, 2, 3, 32, 224),
]  # fmt: skip
_PRODUCTS = [(32, 384, 384), (32, 384, 1536), (32, 1536, 384), (1, 1280, 1000), (128, 384, 384)]


def _model(text: str, **constants: Any) -> ModelProto:
    model = onnx.parser.parse_model(_HEAD + text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    return model


_ENDS = {"s": np.float32(0.02), "z": np.uint8(128), "zw": np.int8(0)}


def convolution(kernel: int, group: int, stride: int, inputs: int, outputs: int, size: int) -> tuple[ModelProto, ModelProto]:
    """(float, int8)."""
    rng, groups, pad = np.random.default_rng(0), group or inputs, kernel // 2
    shape = (outputs, inputs // groups, kernel, kernel)
    weight = rng.integers(-60, 61, shape, dtype=np.int8)
    made = f"<group: int = {groups}, strides: ints = [{stride}, {stride}], pads: ints = [{pad}, {pad}, {pad}, {pad}]>"
    ends = f"[1, {inputs}, {size}, {size}] x) => ({{}}[1, {outputs}, p, q] y)"
    plain = f"g (float{ends.format('float')} {{ c = Conv{made}(x, w, b) y = Relu(c) }}"
    bias = np.zeros(outputs, np.int32)
    integer = f"g (uint8{ends.format('uint8')} {{ y = QLinearConv{made}(x, s, z, w, sw, zw, s, z, b) }}"
    return (
        _model(plain, w=weight.astype(np.float32), b=bias.astype(np.float32)),
        _model(integer, w=weight, b=bias, sw=np.float32(0.001), **_ENDS),
    )


def product(rows: int, inner: int, columns: int) -> tuple[ModelProto, ModelProto]:
    """(float, int8)."""
    weight = np.random.default_rng(0).integers(-60, 61, (inner, columns), dtype=np.int8)
    bias = np.zeros(columns, np.int32)
    plain = f"g (float[{rows}, {inner}] x) => (float[{rows}, {columns}] y) {{ y = Gemm(x, w, b) }}"
    integer = f"""g (uint8[{rows}, {inner}] x) => (uint8[{rows}, {columns}] y) {{
        y = com.microsoft.QGemm(x, s, z, w, sw, zw, b, s, z)
    }}"""
    return (
        _model(plain, w=weight.astype(np.float32), b=bias.astype(np.float32)),
        _model(integer, w=weight, b=bias, sw=np.float32(0.001), **_ENDS),
    )


def boundary(elements: int) -> tuple[ModelProto, ModelProto]:
    """(QuantizeLinear, DequantizeLinear)."""
    one = f"g (float[{elements}] x) => (uint8[{elements}] y) {{ y = QuantizeLinear(x, s, z) }}"
    other = f"g (uint8[{elements}] x) => (float[{elements}] y) {{ y = DequantizeLinear(x, s, z) }}"
    ends = {k: _ENDS[k] for k in "sz"}
    return _model(one, **ends), _model(other, **ends)


def measure(pair: tuple[ModelProto, ModelProto], modules: Path) -> tuple[list[float], str]:
    """Microseconds of both, timed in turn, and the version of the runtime."""
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory(prefix="wasm-operators-") as name:
        paths, feeds = [], []
        for index, model in enumerate(pair):
            path = Path(name) / f"{index}.onnx"
            onnx.save(model, path)
            paths.append(path)
            dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
            floating = model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
            values = rng.normal(size=dims).astype(np.float32) if floating else rng.integers(0, 256, dims, dtype=np.uint8)
            feeds.append({"x": values})
        version, rounds = time_in_node(paths, feeds, "web", modules, rounds=7, slot_seconds=0.02, threads=1)
    return [round(1e3 * float(np.median(r)), 1) for r in rounds], version


def main() -> None:
    """Measure and write."""
    modules, rows, version = Path(sys.argv[1]).resolve(), [], ""
    for case in _CONVOLUTIONS:
        times, version = measure(convolution(*case), modules)
        kernel, group, stride, inputs, outputs, size = case
        kind = "depthwise" if group == 0 else "pointwise" if kernel == 1 else "spatial"
        row = {"kind": kind, "kernel": kernel, "stride": stride, "inputs": inputs, "outputs": outputs, "size": size}
        rows.append({**row, "float_us": times[0], "int8_us": times[1]})
    for shape in _PRODUCTS:
        times, version = measure(product(*shape), modules)
        row = {"kind": "product", "rows": shape[0], "inputs": shape[1], "outputs": shape[2]}
        rows.append({**row, "float_us": times[0], "int8_us": times[1]})
    ends = []
    for elements in (10_000, 100_000, 1_000_000):
        times, version = measure(boundary(elements), modules)
        ends.append({"elements": elements, "quantise_us": times[0], "dequantise_us": times[1]})
    table = {"runtime": f"onnxruntime-web {version}, one thread", "operators": rows, "boundary": ends}
    OUTPUT.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for row in rows + ends:
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
