"""LayerNormalization and RMSNorm of wide integers."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, frexp, log2, sqrt

import numpy as np

from qcompile.graph import Array, Node, Tensor, Value
from qcompile.kernels.ilayernorm import ILayerNorm, IRmsNorm
from qcompile.kernels.lean_norm import INPUT_BITS, ILayerNormLean, IRmsNormLean
from qcompile.passes._integer_sums import int32_value, plumb
from qcompile.passes._kernel_call import kernel_call
from qcompile.passes._wide import INT32_MAX, Refusal, Wide, Wides
from qcompile.passes._wide_sums import MOVES

_FINER = 16  # steps of the stream in one step of the 8 bits that are read from it: 12 bits
_MOST_GAIN = 2.0**13


def layer_norm(wides: Wides, node: Node) -> None:
    """LayerNormalization and RMSNormalization as operators."""
    dims, axis = node.inputs[0].dims, node.attr("axis", -1)
    if dims is None or axis not in (-1, len(dims) - 1):
        raise Refusal("it normalises over more than the last axis")
    gamma, beta = node.constant(1), node.constant(2)
    if gamma is None or (node.input(2) is not None and beta is None):
        raise Refusal("its scale or bias is computed at run time")
    kernel = ILayerNorm if node.op == "LayerNormalization" else IRmsNorm
    epsilon = float(node.attr("epsilon", 1e-5))
    normalise(wides, node.inputs[0], node.outputs[0], gamma.array(), None if beta is None else beta.array(), epsilon, kernel)


def normalise(
    wides: Wides,
    source: Tensor,
    output: Value,
    gamma: Array,
    beta: Array | None,
    epsilon: float,
    kernel: type[ILayerNorm] | type[IRmsNorm],
) -> None:
    """One kernel call. Read by one QuantizeLinear alone: straight to 8 bits; else in a step that the next sum can take."""
    name = output.name
    wide = _coarser(wides, wides.read(source), name)
    factors = gamma.astype(np.float64).reshape(-1)
    offsets = np.zeros_like(factors) if beta is None else beta.astype(np.float64).reshape(-1)
    options = {
        "scale": wide.scale,
        "gamma": tuple(factors),
        "beta": tuple(offsets) if offsets.any() else (),
        "epsilon": epsilon,
        "input_bits": min(32, wide.bound.bit_length() + 1),
    }
    quantiser = wides.sole_quantiser(output)
    if quantiser is not None:
        y = wides.written(quantiser)
        kind = "int8" if y.signed else "uint8"
        made = _make(kernel, {**options, "y_scale": float(y.scale), "y_zero_point": y.zero_point, "dtype": kind})
        wides.graph.remove(quantiser)
        assert isinstance(y.integers, Value)
        kernel_call(wides.graph, made, [wide.integers], y.integers, name)
        return
    step = _step(wides, output, float(np.abs(factors).max(initial=0.0)))
    made = _make(kernel, {**options, "y_scale": step, "dtype": "int32"})
    reach = sqrt(factors.size) * float(np.abs(factors).max(initial=0.0)) + float(np.abs(offsets).max(initial=0.0))
    bound = ceil(reach / step * (1 + 1e-6)) + 2 + ceil(made.tolerance / step)
    if bound > INT32_MAX:
        raise Refusal("its result needs more than 32 bits")
    result = wides.value(name + "_normalised", output)
    kernel_call(wides.graph, made, [wide.integers], result, name)
    wides.of[output] = Wide(result, step, bound)


def _make(kernel: type[ILayerNorm] | type[IRmsNorm], options: dict[str, object]) -> ILayerNorm | IRmsNorm:
    """The lean form; where the row is outside its domain, the one for any row."""
    reason = ""
    for form in (ILayerNormLean if kernel is ILayerNorm else IRmsNormLean, kernel):
        try:
            return form(**options)  # type: ignore[arg-type]
        except ValueError as error:
            reason = str(error)
    raise Refusal(f"outside the kernel's domain ({reason})")


def _coarser(wides: Wides, wide: Wide, name: str) -> Wide:
    """At most 30 bits, as the lean form takes them: in steps two or four times as coarse where the bound needs more.

    Truncated: a step of the new ones is below 2^-28 of the bound.
    """
    factor = 1
    while wide.bound // factor >= 1 << (INPUT_BITS - 1):
        factor *= 2
    if factor == 1:
        return wide
    result = int32_value(wides.graph, name + "_coarser", wide.integers)
    plumb(wides.graph, "Div", [wide.integers, wides.graph.constant(name + "_factor", np.asarray(factor, np.int32))], result)
    return Wide(result, wide.scale * factor, wide.bound // factor)


def _step(wides: Wides, output: Value, gain: float) -> float:
    """A power of two times the unit of the sum that reads it, near 1/16 of the finest 8-bit step, gamma within 2^13 steps."""
    wanted = max(min(_read_steps(wides, output), default=gain / 64) / _FINER, gain / _MOST_GAIN)
    unit = wides.unit(output)
    if unit is None:
        return 2.0 ** (frexp(wanted)[1] - 1)
    return float(unit) * 2.0 ** max(0, round(log2(wanted / unit)))


def _read_steps(wides: Wides, tensor: Value) -> Iterator[float]:
    """The 8-bit steps that `tensor` is quantised to, through movement and factors a channel."""
    for reader in tensor.consumers:
        if reader.op == "QuantizeLinear":
            yield float(wides.written(reader).scale)
        elif reader.op == "Mul" and len(reader.outputs[0].consumers) == 1:
            factor = reader.constant(1) if reader.inputs[0] is tensor else reader.constant(0)
            peak = 0.0 if factor is None else float(np.abs(factor.array()).max(initial=0.0))
            if peak > 0:
                yield from (step / peak for step in _read_steps(wides, reader.outputs[0]))
        elif reader.op in MOVES:
            for moved in reader.outputs:
                yield from _read_steps(wides, moved)
