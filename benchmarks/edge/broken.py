"""Deliberately broken files: one for each rule of `qcompile inspect --portable`, with the machine on which it goes wrong.

Each is as small as the fault allows, spelt as text, and fed so that the fault shows. The tests ask that the rule names the file,
the matrix of `make edge` that the machine gives other bits than the file interpreter (or does not load it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

#: The file interpreter itself, which computes in integers and refuses what has no exact rescale.
STRICT = "integers"

_SCALES: dict[str, Any] = {
    "one": np.float32(1),
    "small": np.float32(2.0**-14),
    "half": np.float32(0.5),
    "zero": np.uint8(0),
    "middle": np.uint8(128),
    "signed_zero": np.int8(0),
}


@dataclass(frozen=True)
class Broken:
    """A file that breaks `rule`; `differs` names a machine of the matrix on which it shows, `same` one on which it does not.

    Names of machines are those of `machines.py`. `feeds`: what makes it show.
    """

    rule: str
    model: ModelProto
    feeds: Mapping[str, Any]
    differs: str
    same: str | None = None


def _model(text: str, opset: int = 21, ir_version: int = 10, **constants: Any) -> ModelProto:
    head = f'<ir_version: {ir_version}, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
    model = onnx.parser.parse_model(head + text)
    used = {name for node in model.graph.node for name in node.input}
    for name, value in {**_SCALES, **constants}.items():
        if name in used:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return model


def broken_files() -> dict[str, Broken]:
    """{rule: file}."""
    rng = np.random.default_rng(9)
    high = np.full((4, 64), 255, np.uint8)
    every = np.arange(256, dtype=np.uint8)
    found = [
        # 255 * (127 + 127) = 64770 leaves int16
        Broken(
            "pair-saturation",
            _model(
                "g (uint8[4, 64] x) => (uint8[4, 16] y) { y = QLinearMatMul(x, one, zero, w, small, signed_zero, one, zero) }",
                w=np.full((64, 16), 127, np.int8),
            ),
            {"x": rng.integers(0, 16, (4, 64), dtype=np.uint8) + np.uint8(120)},
            "x86 AVX2",
            "native",
        ),
        Broken(
            "dynamic-s8",
            _model(
                """g (uint8[4, 64] x, int8[64, 16] k) => (uint8[4, 16] y) {
                    y = QLinearMatMul(x, one, zero, k, small, signed_zero, one, zero)
                }"""
            ),
            {"x": high, "k": np.full((64, 16), 120, np.int8)},
            "x86 AVX2",
            "native",
        ),
        # (-128) * (-128) * 2 = 32768 leaves int16
        Broken(
            "minus-128",
            _model(
                """g (int8[4, 64] x) => (int8[4, 16] y) {
                    y = QLinearMatMul(x, one, signed_zero, w, small, signed_zero, one, signed_zero)
                }""",
                w=np.full((64, 16), -128, np.int8),
            ),
            {"x": np.full((4, 64), -128, np.int8)},
            "ARM64 cortex-a72",
            "native",
        ),
        # a/2 + b/2: half of all sums are ties
        Broken(
            "add-ties",
            _model(
                """g (uint8[256, 256] a, uint8[256, 256] b) => (uint8[256, 256] y) {
                    y = com.microsoft.QLinearAdd(a, half, middle, b, half, middle, one, middle)
                }"""
            ),
            {"a": np.repeat(every, 256).reshape(256, 256), "b": np.tile(every, 256).reshape(256, 256)},
            "ARM64 cortex-a72",
            "native",
        ),
        Broken(
            "s8-qdq",
            _model(
                """g (int8[1, 4, 64, 64] q) => (int8[1, 4, 64, 64] y) {
                    d = DequantizeLinear(q, sx, signed_zero)
                    v = DequantizeLinear(w, sw, signed_zero)
                    c = Conv<pads: ints = [1, 1, 1, 1]>(d, v)
                    y = QuantizeLinear(c, sy, signed_zero)
                }""",
                sx=np.float32(0.1),
                sw=np.float32(0.3),
                sy=np.float32(np.float32(0.1) * np.float32(0.3) * np.float32(64)),  # M = 1/64: many ties
                w=rng.integers(-60, 61, (4, 4, 3, 3), dtype=np.int8),
            ),
            {"q": rng.integers(-20, 21, (1, 4, 64, 64), dtype=np.int8)},
            "native",
            "ARM64 cortex-a72",
        ),
        Broken(
            "float",
            _model("g (float[8, 64] x) => (float[8, 64] y) { e = Erf(x) y = Softmax(e) }"),
            {"x": rng.normal(size=(8, 64)).astype(np.float32)},
            "ARM64 cortex-a72",
        ),
        Broken(
            "inexact-rescale",
            _model(
                "g (uint8[4, 64] x) => (uint8[4, 16] y) { y = QLinearMatMul(x, one, zero, w, free, signed_zero, one, zero) }",
                w=rng.integers(-60, 61, (64, 16), dtype=np.int8),
                free=np.float32(0.0123),
            ),
            {"x": high},
            STRICT,
            "native",
        ),
        Broken(
            "only-onnxruntime",
            _model(
                """g (uint8[4, 64] a, uint8[4, 64] b) => (uint8[4, 64] y) {
                    y = com.microsoft.QLinearAdd(a, one, zero, b, one, zero, odd, zero)
                }""",
                odd=np.float32(3),
            ),
            {"a": high, "b": high // 2},
            "tract",
            "native",
        ),
        Broken(
            "opset",
            _model("g (uint8[4, 64] x) => (uint8[64, 4] y) { y = Transpose(x) }", opset=28, ir_version=14),
            {"x": high},
            "wasm in Node",
        ),
        Broken(
            "no-kernel",
            _model(
                """g (int8[4, 64] x) => (uint8[4, 16] y) {
                    y = QLinearMatMul(x, one, signed_zero, w, small, zero, one, zero)
                }""",
                w=np.ones((64, 16), np.uint8),
            ),
            {"x": np.ones((4, 64), np.int8)},
            "native",
        ),
    ]
    return {b.rule: b for b in found}
