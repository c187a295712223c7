"""Operators on plain integer tensors, as onnxruntime computes them: results keep the type and wrap around in it.

Where onnxruntime saturates, wraps in a sum, or stops (division by zero), an error names the node instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
from onnx import helper

from qcompile.dyadic import Array
from qcompile.integer_windows import Window, convolve, exact_matmul
from qcompile.interpret_nodes import Step

Inputs: TypeAlias = Sequence[Array | None]
IntegerOp: TypeAlias = Callable[[Step, list[Array]], Array]


def is_integer(x: Array) -> bool:
    """Whether `x` holds integers or booleans."""
    return np.issubdtype(x.dtype, np.integer) or x.dtype == np.bool_


def _fold(function: Callable[[Array, Array], Array]) -> IntegerOp:
    return lambda step, x: np.asarray(reduce(function, x))


def _map(function: Callable[[Array], Array]) -> IntegerOp:
    return lambda step, x: np.asarray(function(x[0]))


def _div(step: Step, x: list[Array]) -> Array:
    """Truncating division."""
    a, b = x
    if not bool(np.all(b)):
        raise step.error("integer division by zero, which stops onnxruntime")
    floor = a // b
    return np.asarray(floor + ((a % b != 0) & ((a < 0) != (b < 0))).astype(floor.dtype))


def _mod(step: Step, x: list[Array]) -> Array:
    if not bool(np.all(x[1])):
        raise step.error("integer division by zero, which stops onnxruntime")
    return np.asarray((np.fmod if step.attributes.get("fmod", 0) else np.mod)(x[0], x[1]))


def _shift(step: Step, x: list[Array]) -> Array:
    left = step.attributes["direction"] == b"LEFT"
    bits = 8 * x[0].dtype.itemsize
    inside = x[1] < bits  # a shift by the width or more is undefined in C
    if not bool(np.all(inside)):
        raise step.error(f"a shift by {bits} bits or more is undefined")
    return np.asarray((np.left_shift if left else np.right_shift)(x[0], x[1]))


def clip(x: Array, low: Array | None, high: Array | None) -> Array:
    """Clip with optional bounds; where they cross, the upper one wins, as ONNX says."""
    x = x if low is None else np.maximum(x, low)
    return np.asarray(x if high is None else np.minimum(x, high))


def reduce_integers(step: Step, x: Array, axes: Array | None) -> Array:
    """ReduceSum, ReduceMax, ReduceMin over `axes` (attribute before opset 13/18, input after)."""
    chosen = axes if axes is not None else step.attributes.get("axes")
    if chosen is None or len(np.ravel(chosen)) == 0:
        if step.attributes.get("noop_with_empty_axes", 0):
            return x
        where = None
    else:
        where = tuple(int(a) for a in np.ravel(chosen))
    keep = bool(step.attributes.get("keepdims", 1))
    if step.op != "ReduceSum":
        return np.asarray((np.max if step.op == "ReduceMax" else np.min)(x, axis=where, keepdims=keep))
    return _narrow(step, np.asarray(np.sum(x.astype(np.int64), axis=where, keepdims=keep)), x.dtype)


def _matmul(step: Step, x: list[Array]) -> Array:
    return _narrow(step, exact_matmul(x[0], x[1]), x[0].dtype)


def matmul_integer(step: Step, inputs: Inputs) -> Array:
    """MatMulInteger: int32 product of 8-bit matrices, zero points per tensor, per row of A or per column of B."""
    a, b = _centre(step, inputs, 0, 2, -2), _centre(step, inputs, 1, 3, -1)
    return _narrow(step, exact_matmul(a, b), np.dtype(np.int32))


def conv_integer(step: Step, inputs: Inputs) -> Array:
    """ConvInteger: int32 convolution of 8-bit tensors, the weights' zero point per tensor or per output channel."""
    x, w = _centre(step, inputs, 0, 2, None), _centre(step, inputs, 1, 3, 0)
    window = Window.from_attributes(step.attributes, w.shape[2:], x.shape[2:])
    acc = convolve(x, w, window, step.attributes.get("group", 1))
    return _narrow(step, acc, np.dtype(np.int32))


def _centre(step: Step, inputs: Inputs, index: int, zero_index: int, axis: int | None) -> Array:
    x = inputs[index]
    if x is None:
        raise step.error(f"input {index} is missing")
    zero = inputs[zero_index] if zero_index < len(inputs) else None
    if zero is None:
        return x.astype(np.int32)
    if zero.size > 1 and zero.ndim == 1 and axis is not None and x.ndim > 1:
        shape = [1] * x.ndim
        shape[axis] = zero.size
        zero = zero.reshape(shape)
    elif zero.size == 1:
        zero = zero.reshape(())
    return np.asarray(x.astype(np.int32) - zero.astype(np.int32))


def _narrow(step: Step, value: Array, dtype: np.dtype[Any]) -> Array:
    limits = np.iinfo(dtype)
    if value.size and (int(value.min()) < limits.min or int(value.max()) > limits.max):
        raise step.error(f"a sum leaves {dtype}: {int(value.min())} .. {int(value.max())}")
    return np.asarray(value.astype(dtype))


def cast(step: Step, x: Array) -> Array | None:
    """Cast between integers, to bool, or from integers to float32/float64; None for any other cast."""
    target = helper.tensor_dtype_to_np_dtype(step.attributes["to"])
    small = x.dtype.name in ("int4", "uint4")
    if not (small or is_integer(x)) or target.name in ("int4", "uint4") or target.kind not in "iubf":
        return None
    return np.asarray(x.astype(target))


def _where(step: Step, x: list[Array]) -> Array:
    return np.where(x[0], x[1], x[2])


# Operators whose every input is an integer tensor; anything else with these names is float work.
INTEGER_OPS: dict[str, IntegerOp] = {
    "Abs": _map(np.abs),
    "Add": _fold(np.add),
    "And": _fold(np.logical_and),
    "BitShift": _shift,
    "BitwiseAnd": _fold(np.bitwise_and),
    "BitwiseOr": _fold(np.bitwise_or),
    "BitwiseXor": _fold(np.bitwise_xor),
    "Div": _div,
    "Equal": _fold(np.equal),
    "Greater": _fold(np.greater),
    "GreaterOrEqual": _fold(np.greater_equal),
    "Less": _fold(np.less),
    "LessOrEqual": _fold(np.less_equal),
    "MatMul": _matmul,
    "Max": _fold(np.maximum),
    "Min": _fold(np.minimum),
    "Mod": _mod,
    "Mul": _fold(np.multiply),
    "Neg": _map(np.negative),
    "Not": _map(np.logical_not),
    "Or": _fold(np.logical_or),
    "Relu": _map(lambda x: np.maximum(x, 0).astype(x.dtype)),
    "Sign": _map(np.sign),
    "Sub": _fold(np.subtract),
    "Where": _where,
    "Xor": _fold(np.logical_xor),
}
REDUCTIONS = ("ReduceSum", "ReduceMax", "ReduceMin")
