"""Q/DQ to quantised operators: what onnxruntime's fusion would make of the graph at load, written into the file.

    DQ(x), DQ(w), DQ(b) -> Conv -> Q                ->  QLinearConv
    DQ(a), DQ(b), DQ(c) -> Gemm [-> Q]              ->  QGemm, with float output where no Q follows
    DQ(a), DQ(b) -> MatMul | Add | Mul -> Q         ->  QLinearMatMul | QLinearAdd | QLinearMul
    DQ(x) -> GlobalAveragePool -> Q                 ->  QLinearGlobalAveragePool
    DQ(x) -> MaxPool, Reshape, Concat ... -> Q      ->  the same on integers, where the scale stays the same

Scales and zero points are the same constants, so the integers are the same: with onnxruntime's optimisation every output keeps
its bits, and without it they are those of the optimised Q/DQ model. A DequantizeLinear that float nodes read too stays for them;
Q at the graph's inputs, DQ at its ends and both around float nodes stay. (`quantise` lets data movement and Clip work on integers
from the start; what it moved needs no lowering.)

It must not fire, and counts the reason, where an operand is float, not 8-bit, quantised along another axis than the output
channels, or of a type pair without a kernel; where a scale is computed at run time; where the float result of a node that is to
end in integers is read elsewhere; where the bias is not int32 at fl(Sx*Sw); and where the operator has no quantised form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from onnx import TensorProto, helper

from qcompile.context import Context
from qcompile.graph import Const, Graph, Node, Tensor, Value
from qcompile.placement import data_inputs, shares_scale
from qcompile.rewrite import Exact, Promise, Report

_MICROSOFT = "com.microsoft"
_BIAS_TOLERANCE = 2.0**-22  # a stored bias scale may differ from fl(Sx*Sw) by its own rounding
_EIGHT_BIT = (TensorProto.UINT8, TensorProto.INT8)


@dataclass(frozen=True)
class LowerQOperator:
    """For the formats qoperator and integer (which `lower_integer` makes of it). Same bits at onnxruntime's level ALL."""

    name: str = "lower_qoperator"
    keeps: Promise = field(default_factory=lambda: Exact(fused=True))

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one an operator that became its quantised form."""
        report = Report()
        if context.settings.format not in ("qoperator", "integer"):
            return report
        for node in list(graph.nodes):
            if node.domain not in ("", "ai.onnx") or not _between(node):
                continue
            try:
                _lower(graph, node)
            except _Refusal as refusal:
                report.refuse(node.label, str(refusal))
            else:
                report.rewrites += 1
        graph.cleanup()
        graph.sort()
        return report


class _Refusal(Exception):
    """Why one node stays as it is; never leaves this file."""


@dataclass(frozen=True)
class _Quantised:
    """Integers with their scale and zero point; `axis` None where both are per tensor."""

    integers: Tensor
    scale: Const
    zero: Const
    axis: int | None

    @property
    def ends(self) -> list[Tensor]:
        return [self.scale, self.zero]

    @property
    def elem_type(self) -> int:
        return self.zero.elem_type


def _between(node: Node) -> bool:
    """Whether `node` computes on dequantised tensors only and ends in integers, or has dequantised weights."""
    if node.op in ("QuantizeLinear", "DequantizeLinear") or not node.outputs:
        return False
    reads = [_is(t, "DequantizeLinear") for t in node.inputs[: _OPERANDS.get(node.op, 1)]]
    if not any(reads):
        return False
    if node.op in ("Conv", "Gemm") and len(reads) == 2 and reads[1]:
        return True
    return any(_is_op(reader, "QuantizeLinear") for reader in node.outputs[0].consumers)


def _is_op(node: Node | None, op: str) -> bool:
    return node is not None and node.op == op and node.domain in ("", "ai.onnx")


def _is(tensor: Tensor, op: str) -> bool:
    return _is_op(tensor.producer, op)


def _lower(graph: Graph, node: Node) -> None:
    """Rewrite `node` in place (its name stays); everything is checked before anything is changed."""
    form = _move if shares_scale(node) else _FORMS.get(node.op)
    if form is None:
        raise _Refusal(f"{node.op} has no quantised form with the same bits everywhere")
    quantise = _quantiser(graph, node)
    if quantise is None and node.op != "Gemm":
        raise _Refusal(f"{node.op} without a quantised output")
    result = None if quantise is None else _result(graph, quantise)
    operator, inputs = form(graph, node, result)
    if quantise is not None and result is not None:
        integers, base = quantise.outputs[0], node.outputs[0]
        graph.remove(quantise)
        node.outputs[0] = integers
        _set_type(integers, result.elem_type, base)
    node.op, node.domain = operator
    if node.domain:
        graph.require_opset(node.domain)
    node.inputs.clear()
    node.inputs.extend(inputs)


def _set_type(integers: Value, elem_type: int, like: Value) -> None:
    """Declare the type: onnx cannot infer it behind an operator of com.microsoft. A graph output keeps its own."""
    if integers.type is None:
        integers.type = helper.make_tensor_type_proto(elem_type, like.dims)


def _quantiser(graph: Graph, node: Node) -> Node | None:
    """The QuantizeLinear that takes the result; None where nobody quantises it."""
    output = node.outputs[0]
    readers = [n for n in output.consumers if _is_op(n, "QuantizeLinear")]
    if not readers:
        return None
    if len(output.consumers) > 1 or graph.is_pinned(output):
        raise _Refusal("its float result is read elsewhere too")
    return readers[0]


def _result(graph: Graph, quantise: Node) -> _Quantised:
    result = _quantised(graph, quantise)
    if result.elem_type not in _EIGHT_BIT:
        raise _Refusal("its result is not 8-bit")
    if result.axis is not None:
        raise _Refusal("its result is quantised per channel")
    return result


def _operand(graph: Graph, node: Node, index: int, axis: int | None = None) -> _Quantised:
    """Input `index` through its DequantizeLinear, 8-bit; per channel only along `axis`."""
    tensor = node.input(index)
    dequantise = tensor.producer if tensor is not None else None
    if dequantise is None or not _is_op(dequantise, "DequantizeLinear"):
        raise _Refusal("an operand is float")
    operand = _quantised(graph, dequantise)
    if operand.elem_type not in _EIGHT_BIT:
        raise _Refusal("an operand is not 8-bit")
    if operand.axis is not None and operand.axis != axis:
        raise _Refusal("an operand is quantised along another axis than the output channels")
    return operand


def _quantised(graph: Graph, node: Node) -> _Quantised:
    """The integers, scale and zero point of a QuantizeLinear or DequantizeLinear."""
    scale, zero = node.constant(1), node.constant(2)
    if scale is None or (node.input(2) is not None and zero is None):
        raise _Refusal("a scale or zero point is computed at run time")
    if scale.elem_type != TensorProto.FLOAT:
        raise _Refusal("a scale is not float32")
    if node.attr("block_size", 0):
        raise _Refusal("an operand is quantised in blocks")
    integers = node.inputs[0] if node.op == "DequantizeLinear" else node.outputs[0]
    per_tensor = int(np.prod(scale.dims, dtype=np.int64)) == 1
    if zero is None:
        zero = _zero(graph, node, scale)
    rank = None if integers.dims is None else len(integers.dims)
    axis = int(node.attr("axis", 1))
    if not per_tensor and axis < 0:
        if rank is None:
            raise _Refusal("an operand is quantised along an unknown axis")
        axis += rank
    return _Quantised(integers, scale, zero, None if per_tensor else axis)


def _zero(graph: Graph, node: Node, scale: Const) -> Const:
    """The zero point that ONNX implies: 0 in the type of the integers."""
    declared = node.attr("output_dtype", 0) or TensorProto.UINT8
    kind = declared if node.op == "QuantizeLinear" else node.inputs[0].elem_type
    if kind not in (*_EIGHT_BIT, TensorProto.INT32):
        raise _Refusal("a zero point is not stored")
    return graph.constant(scale.name + "_zero_point", np.zeros(scale.dims, helper.tensor_dtype_to_np_dtype(kind)))


def _bias(graph: Graph, node: Node, source: _Quantised, weight: _Quantised) -> Tensor | None:
    """The int32 bias; the runtime takes fl(Sx*Sw) for its scale, whatever the file says."""
    tensor = node.input(2)
    if tensor is None:
        return None
    if not _is(tensor, "DequantizeLinear"):
        raise _Refusal("the bias is float")
    assert tensor.producer is not None
    bias = _quantised(graph, tensor.producer)
    if bias.elem_type != TensorProto.INT32 or bias.zero.array().any():
        raise _Refusal("the bias is not int32 with zero point 0")
    stored, expected = bias.scale.array().reshape(-1), source.scale.array().reshape(()) * weight.scale.array().reshape(-1)
    if stored.size != expected.size and 1 not in (stored.size, expected.size):
        raise _Refusal("the bias has another number of scales than the weights")
    if not (np.abs(stored.astype(np.float64) / expected - 1) <= _BIAS_TOLERANCE).all():
        raise _Refusal("the bias's scale is not fl(Sx*Sw)")
    return bias.integers


# --- one function an operator: (graph, node, result) -> ((operator, domain), inputs) --------------------------

_Form: TypeAlias = Callable[[Graph, Node, "_Quantised | None"], "tuple[tuple[str, str], list[Tensor]]"]


def _conv(graph: Graph, node: Node, result: _Quantised | None) -> tuple[tuple[str, str], list[Tensor]]:
    assert result is not None
    source, weight = _operand(graph, node, 0), _operand(graph, node, 1, axis=0)
    _check_kernel(source, weight, result)
    bias = _bias(graph, node, source, weight)
    return ("QLinearConv", ""), [*_inputs(source, weight), *result.ends, *([] if bias is None else [bias])]


def _matmul(graph: Graph, node: Node, result: _Quantised | None) -> tuple[tuple[str, str], list[Tensor]]:
    assert result is not None
    right = node.inputs[1].producer
    dims = right.inputs[0].dims if right is not None and right.inputs else None
    left, weight = _operand(graph, node, 0), _operand(graph, node, 1, axis=None if dims is None else len(dims) - 1)
    _check_kernel(left, weight, result)
    return ("QLinearMatMul", ""), [*_inputs(left, weight), *result.ends]


def _gemm(graph: Graph, node: Node, result: _Quantised | None) -> tuple[tuple[str, str], list[Tensor]]:
    if node.attr("alpha", 1.0) != 1.0 or node.attr("beta", 1.0) != 1.0:
        raise _Refusal("Gemm with alpha or beta")
    left, weight = _operand(graph, node, 0), _operand(graph, node, 1, axis=0 if node.attr("transB", 0) else 1)
    _check_kernel(left, weight, result)
    bias = _bias(graph, node, left, weight)
    inputs = [*_inputs(left, weight), *([] if bias is None else [bias])]
    if result is not None:
        inputs += [*([Value("")] if bias is None else []), *result.ends]
    node.attrs.pop("beta", None)  # QGemm has none
    return ("QGemm", _MICROSOFT), inputs


def _pair(graph: Graph, node: Node, result: _Quantised | None) -> tuple[tuple[str, str], list[Tensor]]:
    assert result is not None
    left, right = _operand(graph, node, 0), _operand(graph, node, 1)
    if len({left.elem_type, right.elem_type, result.elem_type}) > 1:
        raise _Refusal("operands and result are not of one integer type")
    return (f"QLinear{node.op}", _MICROSOFT), [*_inputs(left, right), *result.ends]


def _pool(graph: Graph, node: Node, result: _Quantised | None) -> tuple[tuple[str, str], list[Tensor]]:
    assert result is not None
    source = _operand(graph, node, 0)
    if source.elem_type != result.elem_type:
        raise _Refusal("operands and result are not of one integer type")
    node.set_attr("channels_last", 0)
    return ("QLinearGlobalAveragePool", _MICROSOFT), [*_inputs(source), *result.ends]


def _move(graph: Graph, node: Node, result: _Quantised | None) -> tuple[tuple[str, str], list[Tensor]]:
    """Data movement of another tool's Q/DQ model: on the integers themselves, where the scale stays the same."""
    assert result is not None
    if node.op == "Pad" or len(node.outputs) > 1:
        raise _Refusal(f"{node.op} between DequantizeLinear and QuantizeLinear")
    count = len(data_inputs(node))
    operands = [_operand(graph, node, index) for index in range(count)]
    for operand in operands:
        if operand.elem_type != result.elem_type:
            raise _Refusal("operands and result are not of one integer type")
        if any(a.array().reshape(()) != b.array().reshape(()) for a, b in zip(operand.ends, result.ends, strict=True)):
            raise _Refusal("data movement between unequal scales")
    return (node.op, node.domain), [*(o.integers for o in operands), *node.inputs[count:]]


def _inputs(*operands: _Quantised) -> list[Tensor]:
    return [tensor for operand in operands for tensor in (operand.integers, *operand.ends)]


def _check_kernel(source: _Quantised, weight: _Quantised, result: _Quantised | None) -> None:
    """onnxruntime has kernels for u8 x u8, u8 x s8 and s8 x s8, and the result has the input's type."""
    if source.elem_type == TensorProto.INT8 and weight.elem_type == TensorProto.UINT8:
        raise _Refusal("int8 activations with uint8 weights have no kernel")
    if result is not None and result.elem_type != source.elem_type:
        raise _Refusal("operands and result are not of one integer type")


_FORMS: dict[str, _Form] = {
    "Add": _pair,
    "Conv": _conv,
    "Gemm": _gemm,
    "GlobalAveragePool": _pool,
    "MatMul": _matmul,
    "Mul": _pair,
}
_OPERANDS = {"Add": 2, "Conv": 2, "Gemm": 2, "MatMul": 2, "Mul": 2}
