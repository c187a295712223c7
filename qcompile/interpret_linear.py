"""Operators that multiply: from quantised tensors to an exact accumulator (Q/DQ), or straight to integers (QLinear...)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from qcompile.dyadic import Array, Float32, Int64, along_axis
from qcompile.integer_windows import Window, convolve, exact_matmul
from qcompile.interpret_nodes import Step
from qcompile.interpret_values import INT8, Linear, Pair, Pending, Pooled, Quantised, QuantParams

# A stored bias scale may differ from fl(Sx*Sw) by its own rounding, no more: the runtime ignores it and takes fl(Sx*Sw).
_BIAS_TOLERANCE = 2.0**-22


def params_of(step: Step, scale: Array, zero_point: Array | None, axis: int, dtype: np.dtype[np.generic]) -> QuantParams:
    """Scale and zero point as stored; one element means per tensor. Raises ModelError where they are unusable."""
    scale = np.asarray(scale, np.float32)
    if not bool(np.all(np.isfinite(scale) & (scale > 0))):
        raise step.error("a scale is zero, negative or not finite")
    zero = np.zeros((), dtype) if zero_point is None else np.asarray(zero_point)
    if scale.size == 1:
        return QuantParams(scale.reshape(()), zero.reshape(-1)[:1].reshape(()), dtype)
    if scale.ndim != 1:
        raise step.error(f"a scale of shape {list(scale.shape)} is neither per tensor nor per axis")
    return QuantParams(scale, np.broadcast_to(zero.reshape(-1), scale.shape), dtype, axis)


def conv(step: Step, inputs: Sequence[Quantised | None]) -> Linear | None:
    """Conv of an 8-bit per-tensor input and 8-bit weights; None where onnxruntime would not run it in integers."""
    x, w, bias = (*inputs, None)[:3]
    if x is None or w is None or not _eight_bit(x, w) or x.params.axis is not None or w.params.axis not in (None, 0):
        return None
    acc = convolve_quantised(step, x, w)
    scale = _weight_scale(x, w)
    if bias is not None:
        _check_bias(step, bias, scale)
        acc += along_axis(bias.centred(), acc.ndim, 1)
    return _linear(step, acc, along_axis(scale, acc.ndim, 1 if scale.ndim else None))


def convolve_quantised(step: Step, x: Quantised, w: Quantised) -> Int64:
    """Accumulator of a convolution without bias."""
    centred = w.centred()
    window = Window.from_attributes(step.attributes, centred.shape[2:], x.data.shape[2:])
    return convolve(x.centred(), centred, window, step.attributes.get("group", 1))


def gemm(step: Step, inputs: Sequence[Quantised | None]) -> Linear | None:
    """Gemm with alpha = beta = 1; None where onnxruntime would not run it in integers."""
    a, b, bias = (*inputs, None)[:3]
    if a is None or b is None or not _eight_bit(a, b) or a.params.axis is not None:
        return None
    if step.attributes.get("alpha", 1.0) != 1.0 or step.attributes.get("beta", 1.0) != 1.0:
        return None
    column = 0 if step.attributes.get("transB", 0) else 1
    if b.params.axis is not None and b.params.axis % 2 != column:
        return None
    left = a.centred().T if step.attributes.get("transA", 0) else a.centred()
    right = b.centred().T if column == 0 else b.centred()
    acc = exact_matmul(left, right)
    scale = _weight_scale(a, b)
    if bias is not None:
        _check_bias(step, bias, scale)
        acc = acc + bias.centred()
    return _linear(step, acc, scale)


def matmul(step: Step, inputs: Sequence[Quantised | None]) -> Linear | None:
    """MatMul of two 8-bit tensors; None where onnxruntime would not run it in integers."""
    a, b = inputs
    if a is None or b is None or not _eight_bit(a, b) or a.params.axis is not None:
        return None
    if b.params.axis is not None and b.params.axis % b.data.ndim != b.data.ndim - 1:
        return None
    return _linear(step, exact_matmul(a.centred(), b.centred()), _weight_scale(a, b))


def pair(step: Step, inputs: Sequence[Quantised | None]) -> Pair | None:
    """Add or Mul of two 8-bit per-tensor tensors of one type."""
    a, b = inputs
    if a is None or b is None or a.data.dtype != b.data.dtype or not _eight_bit(a, b):
        return None
    if a.params.axis is not None or b.params.axis is not None:
        return None
    return Pair(step.name, step.op, None, None, a, b)


def global_average(step: Step, inputs: Sequence[Quantised | None]) -> Pooled | None:
    """GlobalAveragePool of an 8-bit per-tensor tensor."""
    x = inputs[0]
    if x is None or x.data.dtype not in INT8 or x.params.axis is not None:
        return None
    return _pooled(step, x, tuple(range(2, x.data.ndim)))


def _pooled(step: Step, x: Quantised, axes: tuple[int, ...]) -> Pooled:
    acc = x.centred().sum(axis=axes, keepdims=True, dtype=np.int64)
    count = int(np.prod([x.data.shape[a] for a in axes], dtype=np.int64))
    return Pooled(step.name, step.op, None, None, acc, x.params.scale, count)


Compute: TypeAlias = Callable[[Step, Sequence[Quantised | None]], Pending | None]
COMPUTE: dict[str, Compute] = {
    "Add": pair,
    "Conv": conv,
    "Gemm": gemm,
    "GlobalAveragePool": global_average,
    "MatMul": matmul,
    "Mul": pair,
}


def _eight_bit(*tensors: Quantised) -> bool:
    return all(t.data.dtype in INT8 for t in tensors)


def _weight_scale(x: Quantised, w: Quantised) -> Float32:
    return np.asarray(np.multiply(x.params.scale, w.params.scale, dtype=np.float32))


def _check_bias(step: Step, bias: Quantised, scale: Float32) -> None:
    if bias.data.dtype != np.int32 or bool(np.any(bias.params.zero_point)):
        raise step.error("the quantised bias is not int32 with zero point 0")
    if not bool(np.all(np.abs(bias.params.scale / scale.astype(np.float64) - 1) <= _BIAS_TOLERANCE)):
        raise step.error("the scale of the bias is not input scale * weight scale, which the runtime assumes")


def _linear(step: Step, acc: Int64, scale: Float32) -> Linear:
    # Wrap-around in int32 on the way is harmless (modular); the sum itself must fit.
    if acc.size and (int(acc.min()) < -(1 << 31) or int(acc.max()) >= 1 << 31):
        raise step.error(f"the accumulator leaves int32: {int(acc.min())} .. {int(acc.max())}")
    return Linear(step.name, step.op, None, None, acc, scale)


# --- operators that carry their own scales -------------------------------------------------------------------

Inputs: TypeAlias = Sequence[Array | None]
QLinear: TypeAlias = Callable[[Step, Inputs, bool], tuple[Array, bool]]


def _need(step: Step, inputs: Inputs, index: int) -> Array:
    value = inputs[index] if index < len(inputs) else None
    if value is None:
        raise step.error(f"input {index} is missing")
    return value


def _operand(step: Step, inputs: Inputs, first: int, axis: int = 0) -> Quantised:
    """The tensor, scale and zero point at inputs `first`, `first + 1`, `first + 2`."""
    data, scale = _need(step, inputs, first), _need(step, inputs, first + 1)
    zero = inputs[first + 2] if first + 2 < len(inputs) else None
    if data.dtype not in INT8:
        raise step.error(f"input {first} is {data.dtype}, not int8 or uint8")
    return Quantised(data, params_of(step, scale, zero, axis, data.dtype))


def _output(step: Step, inputs: Inputs, scale: int, default: np.dtype[np.generic]) -> QuantParams:
    zero = inputs[scale + 1] if scale + 1 < len(inputs) else None
    return params_of(step, _need(step, inputs, scale), zero, 0, default if zero is None else zero.dtype)


def _finish(step: Step, result: Pending | None, params: QuantParams, strict: bool) -> tuple[Array, bool]:
    if result is None:
        raise step.error("its scales are per axis where only per tensor works")
    return result.requantize(params, strict)


def _qlinear_conv(step: Step, inputs: Inputs, strict: bool) -> tuple[Array, bool]:
    x, w = _operand(step, inputs, 0), _operand(step, inputs, 3)
    result = conv(step, [x, w])
    bias = inputs[8] if len(inputs) > 8 else None
    if result is not None and bias is not None:
        acc = result.acc + along_axis(bias.astype(np.int64), result.acc.ndim, 1)
        result = _linear(step, acc, result.scale)
    return _finish(step, result, _output(step, inputs, 6, x.data.dtype), strict)


def _qlinear_matmul(step: Step, inputs: Inputs, strict: bool) -> tuple[Array, bool]:
    a, b = _operand(step, inputs, 0), _operand(step, inputs, 3, -1)
    return _finish(step, matmul(step, [a, b]), _output(step, inputs, 6, a.data.dtype), strict)


def _qgemm(step: Step, inputs: Inputs, strict: bool) -> tuple[Array, bool]:
    """com.microsoft QGemm; without an output scale it ends in float32, `fl(acc) * fl(Sa*Sb)`."""
    column = 0 if step.attributes.get("transB", 0) else 1
    a, b = _operand(step, inputs, 0), _operand(step, inputs, 3, column)
    result = gemm(step, [a, b])
    if result is None:
        raise step.error("alpha is not 1, or a scale is per axis where only per tensor works")
    bias = inputs[6] if len(inputs) > 6 else None
    if bias is not None:
        result = _linear(step, result.acc + bias.astype(np.int64), result.scale)
    if len(inputs) < 8 or inputs[7] is None:
        return result.to_float(), True
    return _finish(step, result, _output(step, inputs, 7, a.data.dtype), strict)


def _qlinear_pair(step: Step, inputs: Inputs, strict: bool) -> tuple[Array, bool]:
    a, b = _operand(step, inputs, 0), _operand(step, inputs, 3)
    result = pair(step, [a, b])
    if result is not None:
        result = Pair(step.name, step.op.removeprefix("QLinear"), None, None, a, b)
    return _finish(step, result, _output(step, inputs, 6, a.data.dtype), strict)


def _qlinear_global_average(step: Step, inputs: Inputs, strict: bool) -> tuple[Array, bool]:
    x = _operand(step, inputs, 0)
    first = 1 if step.attributes.get("channels_last", 0) else 2
    axes = tuple(range(first, first + x.data.ndim - 2))
    return _finish(step, _pooled(step, x, axes), _output(step, inputs, 3, x.data.dtype), strict)


def _qlinear_concat(step: Step, inputs: Inputs, strict: bool) -> tuple[Array, bool]:
    scale, zero = _need(step, inputs, 0), _need(step, inputs, 1)
    params = params_of(step, scale, zero, 0, zero.dtype)
    parts = [_operand(step, inputs, i) for i in range(2, len(inputs), 3)]
    if any(p.params.axis is not None or p.params.scale != params.scale for p in parts):
        raise step.error("QLinearConcat with unequal scales is not exact and not supported: share one scale")
    moved = [p.centred() + int(params.zero_point) for p in parts]
    joined = np.concatenate(moved, axis=step.attributes["axis"])
    return np.clip(joined, params.low, params.high).astype(params.dtype), True


QLINEAR: dict[tuple[str, str], QLinear] = {
    ("", "QLinearConv"): _qlinear_conv,
    ("", "QLinearMatMul"): _qlinear_matmul,
    ("com.microsoft", "QGemm"): _qgemm,
    ("com.microsoft", "QLinearAdd"): _qlinear_pair,
    ("com.microsoft", "QLinearConcat"): _qlinear_concat,
    ("com.microsoft", "QLinearGlobalAveragePool"): _qlinear_global_average,
    ("com.microsoft", "QLinearMul"): _qlinear_pair,
}
