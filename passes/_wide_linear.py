"""Linear nodes that end in wide integers: acc * b, whole multiples of the step of the sum that they enter."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from qcompile.graph import Const, Node, Tensor, Value
from qcompile.passes._integer_sums import plumb
from qcompile.passes._wide import INT32_MAX, Narrow, Refusal, Wide, Wides

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[Any]

_LARGEST = 255  # of |integer - zero point|
_OFF_GRID = 1e-3


def gemm(wides: Wides, node: Node) -> None:
    """Gemm of dequantised operands without a quantised result: MatMulInteger, bias, times b[channel]."""
    x = wides.narrow(node.inputs[0])
    right = node.inputs[1].producer
    if x is None or right is None or right.op != "DequantizeLinear":
        raise Refusal("an operand is float")
    weight, scales = right.constant(0), right.constant(1)
    transposed = bool(node.attr("transB", 0))
    if weight is None or scales is None or weight.elem_type != TensorProto.INT8 or node.attr("transA", 0):
        raise Refusal("its weights are not stored in 8 bits")
    bias = _bias(node)
    integers = weight.array().astype(np.int64)
    sums = np.abs(integers).sum(axis=1 if transposed else 0) * _LARGEST
    reach = sums + (0 if bias is None else np.abs(bias.array().astype(np.int64)))
    if int(reach.max(initial=0)) > INT32_MAX:
        raise Refusal("its sum can leave int32")
    steps = np.float64(x.scale) * scales.array().astype(np.float64).reshape(-1)
    name, output = node.outputs[0].name, node.outputs[0]
    unit, factors = _factors(steps, reach, wides.unit(output))
    bound = int((reach * factors).max(initial=1))
    acc = _product(wides, x, _turned(wides, weight) if transposed else weight, name, output)
    if bias is not None:
        acc = wides.binary("Add", acc, bias, name, output)
    if (factors != 1).any():
        acc = wides.times(acc, factors, f"{name}_channel")
    wides.set(node, Wide(acc, unit, bound))


def _factors(steps: Float64, reach: Int64, unit: float | None) -> tuple[float, Int64]:
    """(u, b): steps = b * u for whole b. u is `unit` where scales were chosen for it, else the finest that int32 has room for."""
    if steps.size == 1:
        return float(steps[0]), np.ones(1, np.int64)
    if unit is not None:
        factors = np.rint(steps / unit)
        on_grid = factors.min(initial=1) >= 1 and (np.abs(steps / (np.maximum(factors, 1) * unit) - 1) <= _OFF_GRID).all()
        if on_grid and (reach * factors).max(initial=1) <= INT32_MAX:
            return unit, factors.astype(np.int64)
    unit = float((steps * np.maximum(reach, 1)).max(initial=0.0)) / 2.0**30
    return unit, np.maximum(np.rint(steps / unit), 1).astype(np.int64)


def _bias(node: Node) -> Const | None:
    tensor = node.input(2)
    if tensor is None:
        return None
    producer = tensor.producer
    bias = producer.constant(0) if producer is not None and producer.op == "DequantizeLinear" else None
    if bias is None or bias.elem_type != TensorProto.INT32:
        raise Refusal("the bias is float")
    return bias


def _turned(wides: Wides, weight: Const) -> Const:
    turned = np.ascontiguousarray(weight.array().T)
    if len(weight.outputs) == 1:
        weight.assign(turned)
        return weight
    return wides.graph.constant(weight.name + "_transposed", turned)


def _product(wides: Wides, x: Narrow, weight: Tensor, name: str, like: Tensor) -> Value:
    """MatMulInteger of u8 (or s8) with stored s8 weights."""
    result = wides.value(name + "_acc", like)
    inputs = [x.integers, weight]
    if x.zero_point:
        inputs.append(wides.graph.constant(name + "_zero", np.asarray(x.zero_point, np.int8 if x.signed else np.uint8)))
    plumb(wides.graph, "MatMulInteger", inputs, result)
    return result
