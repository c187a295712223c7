"""Rules of portability that scales decide, and what is computed in float: ties, int8 Q/DQ, multipliers, float operators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto

from qcompile.certificate import certify
from qcompile.inspection import between_quantised, rescales
from qcompile.inspection_scales import Scales
from qcompile.portable import ARM64, WASM, X86, Finding
from qcompile.wiring import MOVES, Node

_EVERY = ("every other machine",)
_QUANTISING = ("QuantizeLinear", "DequantizeLinear")


def of_rescales(scales: Scales, model: onnx.ModelProto | str | Path) -> Iterator[Finding]:
    """The findings on rescales and on float operators. Raises ModelError where the file cannot be read."""
    floats = {node.label: node for node in _float_nodes(scales, model)}
    for node in floats.values():
        yield Finding("float", "other bits", _EVERY, node.label, node.op, "computed in float at run time")
    for found in rescales(model):
        if found.exact or found.node in floats:
            continue
        if found.kind in ("add", "mul"):
            yield Finding("add-ties", "other bits", (ARM64, WASM), found.node, found.op, found.reason)
        elif found.multiplier is not None:
            yield Finding("inexact-rescale", "other bits", ("integer hardware",), found.node, found.op, found.reason)
        else:
            yield Finding("float", "other bits", _EVERY, found.node, found.op, found.reason)
    for node in scales.wiring.nodes:
        if node.op in ("Conv", "MatMul") and not node.proto.domain:
            link = scales.dequantised(node.inputs[0])
            if link is not None and link.elem_type == TensorProto.INT8:
                detail = "int8 activations: fused on ARM64; on x86 made uint8 or left in float"
                yield Finding("s8-qdq", "other bits", (X86,), node.label, node.op, detail)


def _float_nodes(scales: Scales, model: onnx.ModelProto | str | Path) -> Iterator[Node]:
    """Nodes that compute in float at run time, in every graph; DequantizeLinear (or Cast and Mul) of results is no such."""
    ends = {end.node for end in certify(model).ends if end.kind == "dequantise output"}
    for wiring in scales.wiring.scopes():
        for node in wiring.nodes:
            if node.op == "Constant" or node.op in _QUANTISING or node.op in MOVES or node.label in ends:
                continue
            if node.op.startswith("QLinear") or node.op == "QGemm":
                continue
            if all(wiring.root(name) is not None for name in node.outputs if name):
                continue
            touched = any(wiring.is_float(name) for name in (*node.inputs, *node.outputs))
            if touched and not (wiring is scales.wiring and between_quantised(scales, node)):
                yield node
