"""Reading the Q/DQ of another tool: parameters of one QuantizeLinear or DequantizeLinear, and integers behind constants.

Refused with the node's name (ModelError): what cannot be taken over and cannot be left as it is either. See docs/import.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from qcompile.errors import ModelError
from qcompile.graph import Array, Const, Node, Tensor
from qcompile.imported import Mark

DOMAINS = ("", "ai.onnx", "com.microsoft")  # onnxruntime's own Q/DQ means the same, with more types
EIGHT_BIT = (TensorProto.UINT8, TensorProto.INT8)
NARROW = (TensorProto.UINT4, TensorProto.INT4, TensorProto.UINT2, TensorProto.INT2)
WIDE = (TensorProto.UINT16, TensorProto.INT16)
_LIMITS: dict[int, tuple[int, int]] = {
    TensorProto.UINT8: (0, 255),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT4: (-8, 7),
    TensorProto.UINT2: (0, 3),
    TensorProto.INT2: (-2, 1),
    TensorProto.UINT16: (0, 65535),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.INT32: (-(2**31), 2**31 - 1),
}
_LEAST_SCALE = 2.0**-60  # below, products of three scales leave float32


def is_quantise(node: Node | None) -> bool:
    """Whether `node` is a QuantizeLinear."""
    return node is not None and node.op == "QuantizeLinear" and node.domain in DOMAINS


def is_dequantise(node: Node | None) -> bool:
    """Whether `node` is a DequantizeLinear."""
    return node is not None and node.op == "DequantizeLinear" and node.domain in DOMAINS


@dataclass(frozen=True)
class Quantiser:
    """Parameters of one node. scale: float32 array, of one element or one an `axis` entry, in blocks where `block` is not 0."""

    node: Node
    scale: Array
    zero: Array
    elem_type: int
    axis: int
    block: int

    @property
    def limits(self) -> tuple[int, int]:
        """Least and largest integer of its type."""
        return _LIMITS[self.elem_type]

    @property
    def per_tensor(self) -> bool:
        """Whether there is one scale."""
        return self.scale.size == 1 and not self.block

    def broadcast(self, parameter: Array, shape: tuple[int, ...]) -> Array:
        """`parameter` (its scale or zero point) in a shape that broadcasts against an array of `shape`."""
        if parameter.size == 1 and not self.block:
            return parameter.reshape((1,) * len(shape))
        axis = self.axis + len(shape) if self.axis < 0 else self.axis
        if not 0 <= axis < len(shape) or (not self.block and parameter.size != shape[axis]):
            raise ModelError(
                f"node '{self.node.label}': {parameter.size} scales do not fit axis {self.axis} of shape {list(shape)}; "
                "export the model again"
            )
        if self.block:
            repeated = np.repeat(parameter, self.block, axis=axis)
            return np.take(repeated, range(shape[axis]), axis=axis)
        return parameter.reshape([-1 if a == axis else 1 for a in range(len(shape))])

    def mark(self) -> Mark:
        """As the scale of an activation tensor. Only for per-tensor integers of at most 8 bits."""
        low, high = self.limits
        shift = 128 if low < 0 else 0
        zero = int(self.zero.reshape(-1)[0])
        return Mark(np.float32(self.scale.reshape(-1)[0]), zero + shift, low + shift, high + shift)


def read(node: Node) -> Quantiser:
    """The parameters of QuantizeLinear or DequantizeLinear `node`. Raises ModelError where they are computed or make no sense."""
    scale, zero = node.constant(1), node.constant(2)
    if scale is None or (node.input(2) is not None and zero is None):
        raise ModelError(
            f"node '{node.label}': its scale or zero point is computed at run time (dynamic quantisation); "
            "export the model with fixed scales"
        )
    factors = scale.array().astype(np.float32)
    if zero is not None:
        kind = zero.elem_type
    elif node.op == "DequantizeLinear":
        kind = node.inputs[0].elem_type
    else:
        kind = node.attr("output_dtype", 0) or TensorProto.UINT8
    if kind not in _LIMITS:
        name = TensorProto.DataType.Name(kind)
        raise ModelError(f"node '{node.label}': {node.op} of type {name} is not imported; quantise to 8-bit integers")
    if not (np.isfinite(factors).all() and (factors >= _LEAST_SCALE).all()):
        raise ModelError(f"node '{node.label}': a scale in '{scale.name}' is not a positive number; export the model again")
    points = np.zeros(factors.shape, np.int64) if zero is None else zero.array().astype(np.int64)
    if points.size not in (1, factors.size):
        raise ModelError(f"node '{node.label}': {points.size} zero points for {factors.size} scales; export the model again")
    block = int(node.attr("block_size", 0))
    return Quantiser(node, factors, points, kind, int(node.attr("axis", 1)), block)


def same_parameters(one: Quantiser, other: Quantiser) -> bool:
    """Whether both map the same integers to the same numbers."""
    return (
        one.elem_type == other.elem_type
        and one.scale.size == other.scale.size
        and np.array_equal(one.scale.reshape(-1), other.scale.reshape(-1))
        and np.array_equal(one.zero.reshape(-1), other.zero.reshape(-1))
    )


@dataclass(frozen=True)
class Integers:
    """A constant as integers: values with zero points subtracted, and the scale, which broadcasts against them."""

    values: Array
    scale: Array
    elem_type: int
    blocked: bool

    def floats(self) -> Array:
        """The numbers that they stand for, in float32, as DequantizeLinear computes them."""
        return np.asarray(self.values.astype(np.float32) * self.scale, np.float32)


_MOVES = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")


def stored_integers(tensor: Tensor | None) -> Integers | None:
    """The integers that `tensor` is dequantised from, where it depends on constants alone; None where it is anything else.

    Understood: DequantizeLinear of integers, of QuantizeLinear of a float constant, with a Clip on the integers between, and
    Transpose, Reshape and the like behind it.
    """
    node = tensor.producer if tensor is not None else None
    if node is None:
        return None
    if node.op in _MOVES and node.domain in ("", "ai.onnx"):
        inner = stored_integers(node.inputs[0])
        return None if inner is None else _moved(node, inner)
    if not is_dequantise(node):
        return None
    values = _raw(node.inputs[0])
    if values is None:
        return None
    found = read(node)
    zero = found.broadcast(found.zero, values.shape)
    scale = found.broadcast(found.scale, values.shape)
    return Integers(values - zero, scale, found.elem_type, bool(found.block))


def _raw(tensor: Tensor) -> Array | None:
    """The integers themselves: a constant, or a float constant through QuantizeLinear, clipped or not; as int64."""
    if isinstance(tensor, Const):
        return tensor.array().astype(np.int64)
    node = tensor.producer
    if node is None:
        return None
    if node.op == "Clip" and node.domain in ("", "ai.onnx"):
        inner = _raw(node.inputs[0])
        bounds = [node.constant(i) for i in (1, 2)]
        if inner is None or any(node.input(i) is not None and b is None for i, b in zip((1, 2), bounds, strict=True)):
            return None
        low, high = (None if b is None else b.array().astype(np.int64).reshape(()) for b in bounds)
        return inner if low is None and high is None else np.clip(inner, low, high)
    if node.op in _MOVES and node.domain in ("", "ai.onnx"):
        inner = _raw(node.inputs[0])
        return None if inner is None else _move(node, inner)
    source = node.constant(0) if is_quantise(node) else None
    if source is None:
        return None
    found = read(node)
    values = source.array().astype(np.float32)
    scaled = np.rint(values / found.broadcast(found.scale, values.shape)) + found.broadcast(found.zero, values.shape)
    return np.asarray(np.clip(scaled, *found.limits), np.int64)


def _moved(node: Node, inner: Integers) -> Integers | None:
    scale = np.broadcast_to(inner.scale, inner.values.shape)
    values, factors = _move(node, inner.values), _move(node, scale)
    return None if values is None or factors is None else Integers(values, factors, inner.elem_type, inner.blocked)


def _move(node: Node, values: Array) -> Array | None:
    """What a Transpose, Reshape ... with constant parameters makes of `values`."""
    if node.op == "Identity":
        return values
    if node.op == "Transpose":
        return np.asarray(np.transpose(values, node.attr("perm")))
    if node.op == "Flatten":
        axis = int(node.attr("axis", 1))
        axis += values.ndim if axis < 0 else 0
        return values.reshape(int(np.prod(values.shape[:axis])), -1)
    target = node.constant(1)
    if target is None:
        return None
    numbers = [int(n) for n in target.array()]
    if node.op == "Reshape":
        return (
            None
            if node.attr("allowzero", 0)
            else values.reshape([values.shape[i] if n == 0 else n for i, n in enumerate(numbers)])
        )
    if node.op == "Squeeze":
        return np.asarray(np.squeeze(values, tuple(numbers)))
    return np.asarray(np.expand_dims(values, tuple(numbers)))
