"""Small Q/DQ models for the audit's tests: each rule of onnxruntime's fusion kept, or broken in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SCALE = 2.0**-4
MIDDLE = np.uint8(128)


@dataclass
class Build:
    """A small Q/DQ model, node by node; tensors are named after the node that makes them."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, name: str, values: object, elem_type: int | None = None) -> str:
        array = np.asarray(values)
        tensor = numpy_helper.from_array(array, name)
        if elem_type is not None:
            tensor = helper.make_tensor(name, elem_type, array.shape, array.ravel().tolist())
        self.constants.append(tensor)
        return name

    def node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{name}_node", **attributes))
        return name

    def _scale(self, name: str, channels: int | None, zero: np.generic) -> list[str]:
        value = SCALE**2 if isinstance(zero, np.int32) else SCALE  # a bias has the scale of the products it is added to
        scale = np.float32(value) if channels is None else np.full(channels, value, np.float32)
        return [
            self.constant(f"{name}_scale", scale),
            self.constant(f"{name}_zero", np.full(np.shape(scale), zero)),
        ]

    def dequantize(self, x: str, zero: np.generic, channels: int | None = None, axis: int = 0) -> str:
        name = f"{x}_dq"
        return self.node("DequantizeLinear", [x, *self._scale(name, channels, zero)], name, axis=axis)

    def qdq(self, x: str, zero: np.generic = MIDDLE) -> str:
        name = f"{x}_q"
        self.node("QuantizeLinear", [x, *self._scale(name, None, zero)], name)
        return self.dequantize(name, zero)

    def weight(self, shape: tuple[int, ...], axis: int = 0, dtype: type[np.generic] = np.int8) -> str:
        values = np.random.default_rng(0).integers(1, 100, shape).astype(dtype)
        return self.dequantize(self.constant("W", values), dtype(0), shape[axis], axis)

    def bias(self, channels: int) -> str:
        return self.dequantize(self.constant("B", np.arange(channels, dtype=np.int32)), np.int32(0), channels)

    def model(self, inputs: dict[str, list[int | str]], outputs: list[str]) -> onnx.ModelProto:
        made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
        given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
        graph = helper.make_graph(self.nodes, "g", made, given, self.constants)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def conv(
    *,
    zero: np.generic = MIDDLE,
    output_zero: np.generic | None = None,
    output: bool = True,
    weight: Callable[[Build], str] = lambda b: b.weight((4, 4, 3, 3)),
    bias: Callable[[Build], str] = lambda b: b.bias(4),
    op: str = "Conv",
    then: Callable[[Build, str], str] = lambda b, y: y,
    also: Callable[[Build, str], list[str]] = lambda b, y: [],
) -> onnx.ModelProto:
    b = Build()
    y = b.node(op, [b.qdq("x", zero), weight(b), bias(b)], "y", pads=[1, 1, 1, 1])
    extra = also(b, y)
    last = then(b, y)
    if output:
        last = b.qdq(last, zero if output_zero is None else output_zero)
    return b.model({"x": [1, 4, 8, 8]}, [last, *extra])


def linear(
    op: str = "MatMul",
    *,
    shape: tuple[int | str, ...] = (3, 16),
    zero: np.generic = MIDDLE,
    quantised_input: bool = True,
    output: bool = True,
    weight: Callable[[Build], str] = lambda b: b.weight((16, 8), 1),
    then: Callable[[Build, str], str] = lambda b, y: y,
    bias: Callable[[Build], str] | None = None,
    **attributes: float,
) -> onnx.ModelProto:
    b = Build()
    inputs = [b.qdq("x", zero) if quantised_input else "x", weight(b), *([bias(b)] if bias else [])]
    last = then(b, b.node(op, inputs, "y", **attributes))
    return b.model({"x": list(shape)}, [b.qdq(last, zero) if output else last])


def between(op: str, *, zero: np.generic = MIDDLE, two: bool = False, **attributes: Any) -> onnx.ModelProto:
    """Q/DQ -> op -> Q/DQ, with another scale behind the op than before it."""
    b = Build()
    inputs = [b.qdq("x", zero), *([b.qdq("x2", zero)] if two else [])]
    y = b.node(op, inputs, "y", **attributes)
    q = b.node("QuantizeLinear", [y, b.constant("s", np.float32(0.1)), b.constant("z", zero)], "y_q")
    last = b.node("DequantizeLinear", [q, "s", "z"], "y_dq")
    return b.model({"x": [1, 4, 8, 8], **({"x2": [1, 4, 8, 8]} if two else {})}, [last])


def clip(b: Build, y: str, high: float) -> str:
    return b.node("Clip", [y, b.constant("low", np.float32(0)), b.constant("high", np.float32(high))], "clip")


def int4(b: Build, *, cast: bool) -> str:
    w = b.constant("W", np.ones((4, 4, 3, 3), np.int8), TensorProto.INT4)
    if cast:
        return b.dequantize(b.node("Cast", [w], "W8", to=TensorProto.INT8), np.int8(0), 4)
    inputs = [w, b.constant("Ws", np.full(4, SCALE, np.float32))]
    return b.node("DequantizeLinear", inputs, "W_dq", axis=0)


def blocked(b: Build) -> str:
    inputs = [b.constant("W", np.ones((16, 8), np.int8)), b.constant("Ws", np.ones((2, 8), np.float32))]
    return b.node("DequantizeLinear", inputs, "W_dq", axis=0, block_size=8)


def no_zero_point(b: Build) -> str:
    inputs = [b.constant("W", np.ones((16, 8), np.int8)), b.constant("Ws", np.float32(SCALE))]
    return b.node("DequantizeLinear", inputs, "W_dq")


def widened(b: Build) -> str:
    wide = b.node("Cast", [b.constant("W", np.ones((4, 4, 3, 3), np.int8))], "W32", to=TensorProto.FLOAT)
    return b.node("Mul", [wide, b.constant("Ws", np.float32(SCALE))], "W_dq")


def misscaled_bias(b: Build) -> str:
    inputs = [
        b.constant("B", np.arange(4, dtype=np.int32)),
        b.constant("Bs", np.full(4, 2 * SCALE**2, np.float32)),
    ]
    return b.node("DequantizeLinear", inputs, "B_dq", axis=0)


def float_bias(b: Build, channels: int = 8) -> str:
    return b.constant("B", np.linspace(-1, 1, channels, dtype=np.float32))


def add_bias(b: Build, y: str) -> str:
    return b.node("Add", [y, float_bias(b)], "sum")


def softmax_too(b: Build, y: str) -> list[str]:
    return [b.node("Softmax", [y], "softmax")]
