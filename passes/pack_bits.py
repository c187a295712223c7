"""Weights of 2, 3, 5 or 6 bits stored as that many bits, read at int8 speed.

    w int8 [..], |w| <= 2^(b-1) - 1    ->    UnpackBits(planes uint8 [b, ceil(n / 8)]) = w

Plane p holds bit p of every weight in two's complement, eight weights a byte, the first in the lowest bit:
w = sum_p 2^p bit_p, the top plane counting negative. `UnpackBits` is a model-local function of standard operators on constants;
onnxruntime folds it when it loads the model, so that the same fused int8 kernel runs on the same integers. 4 bits have a type of
their own (`pack_int4`). Runs last, for every format; needs opset 18 (BitwiseAnd).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.bit_planes import bit_planes, place_values
from qcompile.context import Context
from qcompile.graph import Const, Graph, Value
from qcompile.kernels._protocol import DOMAIN
from qcompile.passes._kernel_call import declare_storage
from qcompile.passes._narrow import narrow_weights
from qcompile.rewrite import Exact, Promise, Report

_MEANING = "int8 weights of `shape` from their bits: byte k of plane p holds bit p of the weights 8 k to 8 k + 7."
FUNCTION = "UnpackBits"
_BODY = """
<domain: "qcompile", opset_import: ["" : 21]>
UnpackBits <places, shape, ends> (planes) => (y)
{
  last = Constant <value = int64[1] {2}> ()
  behind = Constant <value = int64[2] {1, 2}> ()
  first = Constant <value = int64[1] {0}> ()
  row = Constant <value = int64[1] {-1}> ()
  shifts = Constant <value = uint8[8] {0, 1, 2, 3, 4, 5, 6, 7}> ()
  one = Constant <value = uint8 {1}> ()
  column = Unsqueeze (planes, last)
  moved = BitShift <direction = "RIGHT"> (column, shifts)
  bits = BitwiseAnd (moved, one)
  wide = Cast <to = 6> (bits)
  values = Constant <value_ints: ints = @places> ()
  values_int32 = Cast <to = 6> (values)
  place = Unsqueeze (values_int32, behind)
  terms = Mul (wide, place)
  sums = ReduceSum <keepdims = 0> (terms, first)
  flat = Reshape (sums, row)
  end = Constant <value_ints: ints = @ends> ()
  whole = Slice (flat, first, end)
  narrow = Cast <to = 3> (whole)
  size = Constant <value_ints: ints = @shape> ()
  y = Reshape (narrow, size)
}
"""


@dataclass(frozen=True)
class PackBits:
    """Pack weights and embedding tables of 2, 3, 5 and 6 bits."""

    name: str = "pack_bits"
    keeps: Promise = field(default_factory=lambda: Exact(fused=True))

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a weight tensor. A weight outside its width, and any for TensorRT, stays int8."""
        report = Report()
        for const, bits in narrow_weights(graph, context).items():
            if bits == 4:
                continue
            values = const.array()
            top = 2 ** (bits - 1) - 1
            if np.abs(values.astype(np.int16)).max(initial=0) > top:
                report.refuse(const.name, f"a weight needs more than {bits} bits")
            elif context.settings.target == "tensorrt":
                report.refuse(const.name, "TensorRT's builder wants plain int8 weights")
            else:
                _pack(graph, const, bits)
                report.rewrites += 1
        if report.rewrites:
            graph.cleanup()
            graph.sort()
        return report


def _pack(graph: Graph, const: Const, bits: int) -> None:
    declare_storage(graph, FUNCTION, _BODY, _MEANING)
    values = const.array()
    stored = graph.constant(const.name.removesuffix("_int8") + f"_int{bits}", bit_planes(values, bits))
    unpacked = Value(graph.fresh_name(const.name + "_unpacked"))
    graph.replace_uses(const, unpacked)
    places = place_values(bits).tolist()
    graph.node(FUNCTION, [stored], [unpacked], domain=DOMAIN, places=places, shape=list(values.shape), ends=[values.size])
