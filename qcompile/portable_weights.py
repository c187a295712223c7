"""Rules of portability that the operands of linear operators decide: pairs that saturate, -128, signed right operands.

Measured with onnxruntime 1.32 (`make edge`): on x86 with AVX2 and without VNNI, u8 x s8 products of QLinearConv, QLinearMatMul,
QGemm, MatMulInteger and DynamicQuantizeMatMul are added in pairs that saturate at int16; depthwise convolutions and ConvInteger
are exact, and so is SSE. On ARM64 without dot products a weight of -128 overflows (two products of -128 with -128; unsigned
activations are shifted to signed ones first); the depthwise kernel of every ARM64 does with int8 ones, ConvInteger never.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from qcompile.dyadic import Array
from qcompile.inspection_scales import Scales, integer
from qcompile.portable import ARM64, ARM_OLD, AVX2, Finding
from qcompile.qparams import PAIR_LIMIT
from qcompile.runtime import Optimisation, Session
from qcompile.tensors import read_tensor
from qcompile.wiring import BYTES, CARRIES, Node

#: Operators with integer operands: inputs of the left and right one. `DynamicQuantizeMatMul` makes uint8 of its left one.
_PLACES = {
    "DynamicQuantizeMatMul": (0, 1), "MatMulInteger": (0, 1), "MatMulIntegerToFloat": (0, 1), "QGemm": (0, 3),
    "QLinearConv": (0, 3), "QLinearMatMul": (0, 3),
}  # fmt: skip
_BETWEEN = ("Conv", "Gemm", "MatMul")
_INT8, _UINT8 = int(TensorProto.INT8), int(TensorProto.UINT8)


@dataclass(frozen=True, eq=False)
class Product:
    """A linear operator on 8-bit integers: element types of its operands; `right`: constants (None: computed at run time).

    `qdq`: it is spelt between DequantizeLinear. `bound`: what no magnitude in the right operand exceeds.
    """

    node: Node
    left_type: int
    right_type: int
    right: Array | None
    qdq: bool
    bound: int

    @property
    def convolution(self) -> bool:
        """Whether it slides over positions."""
        return self.node.op.endswith("Conv")

    @property
    def depthwise(self) -> bool:
        """Whether each channel has a kernel of its own and one output: then products are not added in pairs."""
        group = integer(self.node, "group", 1)
        shape = () if self.right is None else self.right.shape
        return self.convolution and group > 1 and len(shape) > 2 and shape[1] == 1 and shape[0] == group

    def matrix(self) -> Array:
        """The right operand as [rows, K], K as kernels walk it: kernel height, width, channel of the group."""
        assert self.right is not None
        if self.convolution:
            return np.moveaxis(self.right, 1, -1).reshape(self.right.shape[0], -1)
        kept = integer(self.node, "transB", 0) and self.node.op in ("Gemm", "QGemm")
        columns = self.right if kept else np.swapaxes(self.right, -1, -2)
        return columns.reshape(-1, columns.shape[-1])


def of_weights(scales: Scales, folder: Path) -> Iterator[Finding]:
    """The findings on operands; weights outside the file are looked for in `folder`. Raises ModelError where they are missing."""
    for product in products(scales, folder):
        node, signed = product.node, product.left_type == _INT8
        where: tuple[str, ...]
        if signed and product.right_type == _UINT8 and node.op.startswith("QLinear"):
            where = ("every machine",)
            yield Finding("no-kernel", "does not load", where, node.label, node.op, "s8 x u8 has no kernel in onnxruntime")
            continue
        if product.right_type != _INT8:
            continue
        if product.right is None and product.bound > PAIR_LIMIT // 2:
            where = (AVX2, ARM_OLD) if signed else (AVX2,)
            detail = "its right operand is int8 and computed at run time; u8 x u8 is exact everywhere"
            yield Finding("dynamic-s8", "other bits", where, node.label, node.op, detail)
        if product.right is None:
            continue
        matrix = product.matrix().astype(np.int32)
        over = _pairs_over(matrix)
        # int8 activations of Q/DQ are made uint8 on x86; those of QLinear operators are multiplied as they are, exactly
        if over and not product.depthwise and (not signed or product.qdq):
            total = matrix.shape[0] * (matrix.shape[1] // 2)
            detail = f"{over} of {total} pairs of neighbouring weights exceed {PAIR_LIMIT}"
            yield Finding("pair-saturation", "other bits", (AVX2,), node.label, node.op, detail)
        lowest = int((matrix == -128).sum())
        if lowest and not (product.depthwise and not signed):
            where = (ARM64,) if product.depthwise else (ARM_OLD,)
            detail = f"{lowest} of {matrix.size} weights are -128; keep them at -127"
            yield Finding("minus-128", "other bits", where, node.label, node.op, detail)


def products(scales: Scales, folder: Path) -> Iterator[Product]:
    """Every linear operator on 8-bit integers, in node order, but for ConvInteger, which is exact everywhere."""
    wiring = scales.wiring
    for node in wiring.nodes:
        moved = False
        if node.op in _PLACES:
            left, right = (node.inputs[i] for i in _PLACES[node.op])
            left_type = _UINT8 if node.op == "DynamicQuantizeMatMul" else wiring.elem_type(left)
            right_type = wiring.elem_type(right)
        elif node.op in _BETWEEN and not node.proto.domain:
            links = [scales.dequantised(name) for name in node.inputs[:2]]
            if links[0] is None or links[1] is None:
                continue
            left_type, right_type, right = links[0].elem_type, links[1].elem_type, links[1].tensor
            between = wiring.producer(node.inputs[1])
            moved = between is not None and between is not links[1].node
        else:
            continue
        if left_type not in BYTES or right_type not in BYTES:
            continue
        values = constant(scales, right, folder)
        if values is not None and moved:  # a Transpose between DequantizeLinear and the operator
            values = values.transpose(_perm(wiring.producer(node.inputs[1]), values.ndim))
        bound = _bound(scales, right) if values is None else int(np.abs(values.astype(np.int32)).max(initial=0))
        yield Product(node, left_type, right_type, values, node.op in _BETWEEN, bound)


def _bound(scales: Scales, name: str) -> int:
    """The largest magnitude that a tensor of run time can hold: 128, or less where constants are only moved and repeated."""
    maker = scales.wiring.behind_moves(name)
    if maker is not None and maker.op == "ConstantOfShape":
        value = maker.attribute("value")
        return 0 if value is None else int(np.abs(numpy_helper.to_array(value.t).astype(np.int32)).max(initial=0))
    while (moved := scales.wiring.producer(name)) is not None and moved.op in CARRIES:
        name = moved.inputs[0]
    stored = scales.wiring.value(name)
    return 128 if stored is None or moved is not None else int(np.abs(stored.astype(np.int32)).max(initial=0))


def _perm(node: Node | None, rank: int) -> tuple[int, ...]:
    """The order of axes that a Transpose makes."""
    attribute = None if node is None else node.attribute("perm")
    return tuple(range(rank))[::-1] if attribute is None else tuple(attribute.ints)


def constant(scales: Scales, name: str, folder: Path) -> Array | None:
    """The integers of a constant, computed where it is unpacked or decompressed at load; None where inputs take part."""
    wiring = scales.wiring
    if wiring.root(name) is None:
        return None
    stored = wiring.stored.get(name)
    if stored is not None:
        return np.asarray(read_tensor(stored, folder))
    wanted, makers = {name}, []
    for node in reversed(wiring.nodes):
        if wanted & set(node.outputs):
            makers.append(node.proto)
            wanted.update(n for n in node.inputs if n)
    stores = [s for n in sorted(wanted) if (s := wiring.stored.get(n)) is not None and wiring.producer(n) is None]
    graph = helper.make_graph(makers[::-1], "constant", [], [helper.make_tensor_value_info(name, wiring.elem_type(name), None)])
    graph.initializer.extend(stores)
    model = helper.make_model(graph, opset_imports=scales.model.opset_import, ir_version=scales.model.ir_version)
    return Session(model, optimisation=Optimisation.OFF, threads=1, label=f"constant '{name}'").run({})[name]


def _pairs_over(matrix: Array) -> int:
    """How many neighbours (2i, 2i+1) of [rows, K] have |sum| above the limit; of opposite signs they never do."""
    even = matrix.shape[1] // 2 * 2
    return int((np.abs(matrix[:, 0:even:2] + matrix[:, 1:even:2]) > PAIR_LIMIT).sum())
