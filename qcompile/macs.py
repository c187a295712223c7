"""Multiply-accumulates of a model, node by node: from the shapes that one run at the given feeds really has.

A run, and not shape inference: it knows dynamic dimensions and operators outside the standard. Convolutions count one product
for each weight of a filter and output value, matrix products one for each term of a dot product; padding counts. Other operators
count nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx

from qcompile.errors import ModelError
from qcompile.runtime import Array, Feeds, Optimisation, Session
from qcompile.samples import InputInfo

_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3, "FusedConv": 1, "ConvTranspose": 1}
_PRODUCTS = ("MatMul", "Gemm", "MatMulInteger", "QLinearMatMul", "QGemm", "MatMulNBits", "FusedMatMul", "DynamicQuantizeMatMul")
_MOST_BYTES = 2**31 - 2**24


@dataclass(frozen=True)
class LayerMacs:
    """One linear node: its multiply-accumulates, and the shapes of its weight (second operand) and output."""

    node: str
    op: str
    macs: int
    weight_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def count_macs(path: str | Path, feeds: Feeds) -> list[LayerMacs]:
    """Linear nodes of the main graph, in the file's order, at the shapes of `feeds`. Raises ModelError where it cannot be run."""
    path = Path(path)
    try:
        model = onnx.load(path)
    except (OSError, onnx.checker.ValidationError) as error:
        raise ModelError(f"{path}: cannot be read with its external data: {error}") from error
    nodes = [n for n in model.graph.node if n.op_type in _CONVOLUTIONS or n.op_type in _PRODUCTS]
    shapes: dict[str, tuple[int, ...]] = {t.name: tuple(t.dims) for t in model.graph.initializer}
    shapes |= {name: array.shape for name, array in feeds.items()}
    wanted = {n for node in nodes for n in (node.input[0], node.input[_weight_at(node)], node.output[0])} - set(shapes)
    wanted -= {o.name for o in model.graph.output}
    if model.ByteSize() > _MOST_BYTES:
        raise ModelError(f"{path}: over 2 GiB; multiply-accumulates are counted in memory")
    order = [o for node in model.graph.node for o in node.output if o in wanted]
    for name in order:
        model.graph.output.add(name=name)
    session = Session(model, optimisation=Optimisation.OFF, label=str(path), fuse_qdq=False)
    ran = session.run({name: feeds[name] for name in session.input_names if name in feeds})
    shapes |= {name: array.shape for name, array in ran.items()}
    return [_layer(node, shapes) for node in nodes]


def sized_feeds(inputs: list[InputInfo], sizes: dict[str, int]) -> dict[str, Array]:
    """Zeros for each input; symbolic dimensions have their size of `sizes`, else 1. Raises ModelError for an unknown rank."""
    feeds = {}
    for info in inputs:
        if info.shape is None:
            raise ModelError(f"input '{info.name}' has no shape; multiply-accumulates cannot be counted")
        shape = [d if isinstance(d, int) else sizes.get(d or "", 1) for d in info.shape]
        feeds[info.name] = np.zeros(shape, info.dtype)
    return feeds


def _weight_at(node: onnx.NodeProto) -> int:
    if node.op_type in _CONVOLUTIONS:
        return _CONVOLUTIONS[node.op_type]
    return 3 if node.op_type in ("QLinearMatMul", "QGemm") else 1


def _layer(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> LayerMacs:
    first, weight, output = (shapes[n] for n in (node.input[0], node.input[_weight_at(node)], node.output[0]))
    attributes = {a.name: a.i for a in node.attribute}
    if node.op_type in _CONVOLUTIONS:
        macs = prod(first if node.op_type == "ConvTranspose" else output) * prod(weight[1:])
    elif node.op_type == "MatMulNBits":
        macs = prod(output) * attributes["K"]
    else:
        macs = prod(output) * (first[0] if attributes.get("transA") else first[-1])
    return LayerMacs(node.name or node.output[0], node.op_type, macs, weight, output)
