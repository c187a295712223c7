"""Functions of one 8-bit tensor: by a table of 256 entries, or GELU by I-BERT's polynomial."""

from __future__ import annotations

from math import frexp

import numpy as np
from onnx import TensorProto

from qcompile.graph import Node, Tensor, Value
from qcompile.kernels._functions import Function
from qcompile.kernels.igelu import IGelu
from qcompile.kernels.table import Table
from qcompile.passes._functions_of import function_of
from qcompile.passes._kernel_call import kernel_call
from qcompile.passes._wide import Narrow, Refusal, Wide, Wides

_TYPES: dict[int, type[np.uint8] | type[np.int8]] = {TensorProto.UINT8: np.uint8, TensorProto.INT8: np.int8}
_BITS = 15


def tabulated(wides: Wides, node: Node) -> str | None:
    """A function of a dequantised tensor. Returns what is worth a note in the report, None as a rule."""
    f = function_of(node)
    if f is None:
        raise Refusal("no table is made of this function")
    return by_table(wides, node, node.inputs[0], f)


def by_table(wides: Wides, node: Node, source: Tensor, f: Function) -> str | None:
    """`node` computes f of `source`: its 8 bits straight, where one QuantizeLinear alone reads it, else 15 bits."""
    x, output = wides.narrow(source), node.outputs[0]
    if x is None:
        raise Refusal("its input is not quantised")
    quantisers = [n for n in output.consumers if n.op == "QuantizeLinear"]
    y = wides.written(quantisers[0]) if len(output.consumers) == 1 and quantisers and not wides.graph.is_pinned(output) else None
    note = None
    if node.op == "Gelu" and wides.context.settings.kernels == "ibert":
        try:
            kernel = IGelu(float(x.scale), tanh=node.attr("approximate", "none") == "tanh")
        except ValueError:
            note = "a scale outside i-GELU's domain: computed by table"
        else:
            _polynomial(wides, node, kernel)
            return None
    kind = _TYPES[x.elem_type]
    if y is not None:
        wides.graph.remove(quantisers[0])
        made = Table(f, float(x.scale), x.zero_point, float(y.scale), y.zero_point, kind, _TYPES[y.elem_type])
        assert isinstance(y.integers, Value)
        kernel_call(wides.graph, made, [x.integers], y.integers, output.name)
        return note
    step = _step(wides, output, f, x, kind)
    made = Table(f, float(x.scale), x.zero_point, step, 0, kind, np.int32)
    result = wides.value(output.name + "_table", output)
    kernel_call(wides.graph, made, [x.integers], result, output.name)
    wides.set(node, Wide(result, step, max(1, int(np.abs(made.entries.astype(np.int64)).max()))))
    return note


def _step(wides: Wides, output: Value, f: Function, x: Narrow, kind: type[np.uint8] | type[np.int8]) -> float:
    """The unit of the sum that reads it, else a power of two that leaves the largest entry 15 bits."""
    integers = np.arange(256, dtype=np.uint8).view(kind).astype(np.float64)
    with np.errstate(all="ignore"):
        values = np.asarray(f((integers - x.zero_point) * float(x.scale)), np.float64)
    if not np.isfinite(values).all():
        raise Refusal("its function is not finite over the range of its input")
    peak = float(np.abs(values).max())
    unit = wides.unit(output)
    if unit is not None and peak < unit * 2**30:
        return unit
    return 2.0 ** (frexp(peak)[1] - _BITS) if peak > 0 else 1.0


def _polynomial(wides: Wides, node: Node, kernel: IGelu) -> None:
    """i-GELU of the centred integers."""
    output = node.outputs[0]
    wide = wides.read(node.inputs[0])
    result = wides.value(output.name + "_gelu", output)
    kernel_call(wides.graph, kernel, [wide.integers], result, output.name)
    bound = int(np.abs(kernel.reference(np.arange(-255, 256, dtype=np.int32))).max())
    wides.set(node, Wide(result, kernel.output_scale, bound))
