"""Functions of one 8-bit tensor: by a table of 256 entries, or GELU by I-BERT's polynomial."""

from __future__ import annotations

from dataclasses import replace
from math import frexp

import numpy as np
from onnx import TensorProto

from qcompile.graph import Node, Tensor, Value
from qcompile.kernels._functions import Function
from qcompile.kernels.channel_table import MOST_KINDS, ChannelTable
from qcompile.kernels.igelu import IGelu
from qcompile.kernels.table import Table
from qcompile.levelled import Levelled, levelled
from qcompile.passes._functions_of import function_of
from qcompile.passes._gelu_levels import behind_factors, gelu_bound, gelu_by_levels
from qcompile.passes._kernel_call import kernel_call
from qcompile.passes._match import scalar_of
from qcompile.passes._wide import Narrow, Refusal, Wide, Wides, in_domain

_TYPES: dict[int, type[np.uint8] | type[np.int8]] = {TensorProto.UINT8: np.uint8, TensorProto.INT8: np.int8}
_BITS = 15


def tabulated(wides: Wides, node: Node) -> str | None:
    """A function of a dequantised tensor. Returns what is worth a note in the report, None as a rule."""
    f = function_of(node)
    if f is None:
        raise Refusal("no table is made of this function")
    found = levelled(wides.graph, node)
    if found is not None and wides.narrow(found.x) is not None:
        by_channel_table(wides, node, found, f)
        return None
    return by_table(wides, node, node.inputs[0], f)


def by_table(wides: Wides, node: Node, source: Tensor, f: Function) -> str | None:
    """`node` computes f of `source`: its 8 bits straight, where one QuantizeLinear alone reads it, else 15 bits."""
    x, output = wides.narrow(source) or _times_number(wides, source), node.outputs[0]
    if x is None:
        raise Refusal("its input is not quantised")
    quantiser = wides.sole_quantiser(output)
    y = None if quantiser is None else wides.written(quantiser)
    note = None
    if node.op == "Gelu" and wides.context.settings.kernels == "ibert":
        try:
            kernel = in_domain(lambda: IGelu(float(x.scale), tanh=node.attr("approximate", "none") == "tanh"))
        except Refusal:
            note = "a scale outside i-GELU's domain: computed by table"
        else:
            if wides.context.settings.format != "qoperator" or not gelu_by_levels(wides, node, kernel, x):
                _polynomial(wides, node, kernel)
            return None
    kind = _TYPES[x.elem_type]
    if y is not None and quantiser is not None:
        scales = (float(x.scale), x.zero_point, float(y.scale), y.zero_point)
        made = in_domain(lambda: Table(f, *scales, kind, _TYPES[y.elem_type]))
        wides.graph.remove(quantiser)
        assert isinstance(y.integers, Value)
        kernel_call(wides.graph, made, [x.integers], y.integers, output.name)
        return note
    step = _unit(wides, output, _peak(f, x))
    made = in_domain(lambda: Table(f, float(x.scale), x.zero_point, step, 0, kind, np.int32))
    result = wides.value(output.name + "_table", output)
    kernel_call(wides.graph, made, [x.integers], result, output.name)
    wides.set(node, Wide(result, step, max(1, int(np.abs(made.entries.astype(np.int64)).max()))))
    return note


def _times_number(wides: Wides, source: Tensor) -> Narrow | None:
    """A dequantised tensor times or by a positive number: its integers, the number in the scale. Erf(x / sqrt 2), written out."""
    node = source.producer
    if node is None or node.op not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    number, x = scalar_of(node.inputs[1]), wides.narrow(node.inputs[0])
    if node.op == "Mul" and number is None:
        number, x = scalar_of(node.inputs[0]), wides.narrow(node.inputs[1])
    if x is None or number is None or not number > 0 or not np.isfinite(number):
        return None
    return replace(x, scale=np.float32(x.scale * np.float32(number) if node.op == "Mul" else x.scale / np.float32(number)))


def by_channel_table(wides: Wides, node: Node, operand: Levelled, f: Function) -> None:
    """`node` computes f(x * factor + shift), numbers a channel: straight to 8 bits, past a Mul by others, where those follow.

    Else to 15 bits.
    """
    graph, x, output = wides.graph, wides.narrow(operand.x), node.outputs[0]
    assert x is not None
    last, after = node, np.ones(operand.factor.size)
    multiplied = behind_factors(graph, node)
    if multiplied is not None and multiplied[2] == operand.axis and wides.sole_quantiser(multiplied[0].outputs[0]) is not None:
        last, after, _ = multiplied
    numbers = np.stack([operand.factor, operand.shift, after], axis=1)
    kinds, kind = np.unique(numbers, axis=0, return_inverse=True)
    if len(kinds) > MOST_KINDS:
        raise Refusal("its channels are of more kinds than a table has room for")
    quantiser = wides.sole_quantiser(last.outputs[0])
    y = None if quantiser is None else wides.written(quantiser)
    peak = 0.0 if y is not None else max(_peak(lambda v, k=k: k[2] * f(v * k[0] + k[1]), x) for k in kinds)
    step = float(y.scale) if y is not None else _unit(wides, output, peak)
    made = in_domain(
        lambda: ChannelTable(
            f,
            float(x.scale),
            x.zero_point,
            step,
            0 if y is None else y.zero_point,
            tuple((float(a), float(m), float(c)) for a, m, c in kinds),
            tuple(int(k) for k in kind.reshape(-1)),
            operand.axis,
            _TYPES[x.elem_type],
            np.int32 if y is None else _TYPES[y.elem_type],
        )
    )
    if y is not None and quantiser is not None:
        graph.remove(quantiser)
        assert isinstance(y.integers, Value)
        kernel_call(graph, made, [x.integers], y.integers, output.name)
        return
    result = wides.value(output.name + "_table", output)
    kernel_call(graph, made, [x.integers], result, output.name)
    wides.set(node, Wide(result, step, max(1, int(np.abs(made.entries.astype(np.int64)).max()))))


def _unit(wides: Wides, output: Value, peak: float) -> float:
    """The unit of the sum that reads it, else a power of two that leaves the largest entry 15 bits."""
    unit = wides.unit(output)
    if unit is not None and peak < unit * 2**30:
        return unit
    return 2.0 ** (frexp(peak)[1] - _BITS) if peak > 0 else 1.0


def _peak(f: Function, x: Narrow) -> float:
    """The largest |f| over the range of the integers."""
    integers = np.arange(256, dtype=np.uint8).view(_TYPES[x.elem_type]).astype(np.float64)
    with np.errstate(all="ignore"):
        values = np.asarray(f((integers - x.zero_point) * float(x.scale)), np.float64)
    if not np.isfinite(values).all():
        raise Refusal("its function is not finite over the range of its input")
    return float(np.abs(values).max())


def _polynomial(wides: Wides, node: Node, kernel: IGelu) -> None:
    """i-GELU of the centred integers."""
    output = node.outputs[0]
    wide = wides.read(node.inputs[0])
    result = wides.value(output.name + "_gelu", output)
    kernel_call(wides.graph, kernel, [wide.integers], result, output.name)
    wides.set(node, Wide(result, kernel.output_scale, gelu_bound(kernel)))
