"""The rescale of the integer format, written out: model-local functions of the domain `qcompile` in int32 and uint32 alone.

    DyadicRescale(x, b, c, zero) = clip(round_half_even(x * b / 2^c) + zero, low, high)
    RatioRescale(x, p, q, zero)  = clip(round(x * p / q) + zero, low, high), q odd: there are no ties

`x` is any int32 tensor, the result 8-bit. `b` or `p` is int32, one or one a channel, and broadcasts to `x`; the others are
scalars.

No step leaves int32. Dyadic, with 1 <= c <= 20 and b <= 2^(c+8): x is first held within +-ceil(2^(c+8)/b). What is cut off is
beyond +-256 after the rescale, as is the bound itself, so it saturates alike. Then |x*b| < 2^(c+8) + b <= 2^(c+9), and
x*b + 512 * 2^c lies in 0 .. 2^(c+10) <= 2^30: unsigned, so that a shift is a floor. 512 is even, so parity and ties are those
of x*b. Ratio, with p <= 256 q and q <= 1023: x is held within +-ceil(256 q/p); |2xp| <= 512 q + 2p <= 1024 q, so
2xp + 1025 q lies in 0 .. 2^22 and a truncating division is a floor.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import FunctionProto, NodeProto, TensorProto, helper

from qcompile.dyadic import Array, as_dyadic
from qcompile.graph import Graph, Node, Tensor, Value

DOMAIN = "qcompile"
_RANGES: dict[int, tuple[int, int]] = {TensorProto.UINT8: (0, 255), TensorProto.INT8: (-128, 127)}
_MAX_SHIFT = 20
_MAX_DENOMINATOR = 1023

_DYADIC = """
<domain: "qcompile", opset_import: ["" : 21]>
DyadicRescale <to, low, high> (x, b, c, zero) => (y)
{
  bit = Constant <value = uint32 {1}> ()
  sign = Constant <value = uint32 {31}> ()
  one = Constant <value = int32 {1}> ()
  reach = Constant <value = int32 {256}> ()
  offset = Constant <value = int32 {512}> ()
  unit_bits = BitShift <direction = "LEFT"> (bit, c)
  unit = Cast <to = 6> (unit_bits)
  end = Mul (unit, reach)
  above = Add (end, b)
  up = Sub (above, one)
  limit = Div (up, b)
  least = Neg (limit)
  at_most = Min (x, limit)
  bounded = Max (at_most, least)
  product = Mul (bounded, b)
  lift = Mul (unit, offset)
  lifted = Add (product, lift)
  bits = Cast <to = 12> (lifted)
  floor = BitShift <direction = "RIGHT"> (bits, c)
  lowest = BitShift <direction = "LEFT"> (floor, sign)
  odd = BitShift <direction = "RIGHT"> (lowest, sign)
  half = BitShift <direction = "RIGHT"> (unit_bits, bit)
  above_half = Add (bits, half)
  nudged = Add (above_half, odd)
  below = Sub (nudged, bit)
  rounded = BitShift <direction = "RIGHT"> (below, c)
  signed = Cast <to = 6> (rounded)
  shift = Sub (zero, offset)
  moved = Add (signed, shift)
  low_long = Constant <value_int: int = @low> ()
  high_long = Constant <value_int: int = @high> ()
  lowest_value = Cast <to = 6> (low_long)
  highest_value = Cast <to = 6> (high_long)
  capped = Min (moved, highest_value)
  saturated = Max (capped, lowest_value)
  y = Cast <to: int = @to> (saturated)
}
"""

_RATIO = """
<domain: "qcompile", opset_import: ["" : 21]>
RatioRescale <to, low, high> (x, p, q, zero) => (y)
{
  one = Constant <value = int32 {1}> ()
  two = Constant <value = int32 {2}> ()
  reach = Constant <value = int32 {256}> ()
  offset = Constant <value = int32 {512}> ()
  steps = Constant <value = int32 {1025}> ()
  end = Mul (q, reach)
  above = Add (end, p)
  up = Sub (above, one)
  limit = Div (up, p)
  least = Neg (limit)
  at_most = Min (x, limit)
  bounded = Max (at_most, least)
  double_p = Mul (p, two)
  product = Mul (bounded, double_p)
  lift = Mul (q, steps)
  lifted = Add (product, lift)
  double_q = Mul (q, two)
  rounded = Div (lifted, double_q)
  shift = Sub (zero, offset)
  moved = Add (rounded, shift)
  low_long = Constant <value_int: int = @low> ()
  high_long = Constant <value_int: int = @high> ()
  lowest_value = Cast <to = 6> (low_long)
  highest_value = Cast <to = 6> (high_long)
  capped = Min (moved, highest_value)
  saturated = Max (capped, lowest_value)
  y = Cast <to: int = @to> (saturated)
}
"""

_BODIES = {
    "DyadicRescale": (_DYADIC, "clip(round_half_even(x * b / 2^c) + zero, low, high), in int32 and uint32 alone"),
    "RatioRescale": (_RATIO, "clip(round(x * p / q) + zero, low, high) for odd q, in int32 alone"),
}


def common_shift(multiplier: Array) -> tuple[Array, int]:
    """`M = b / 2^c` of exactly dyadic multipliers with one c >= 1 for all: (b as int32 of M's shape, c).

    An M beyond 256 becomes 256: every accumulator but 0 saturates 8 bits either way.
    """
    b, c = as_dyadic(multiplier)
    shift = max(1, int(c.max(initial=1)))
    return np.minimum(b << (shift - c), 1 << (shift + 8)).astype(np.int32), shift  # b < 2^24 and shift <= 16: below 2^40


def dyadic_rescale(
    graph: Graph, x: Tensor, b: Array, c: int, zero: int, result: Value, elem_type: int, name: str, notes: Mapping[str, str]
) -> Node:
    """Append `result = DyadicRescale(x, b, c, zero)`; `b` must broadcast to `x`. notes: the node's metadata."""
    assert 1 <= c <= _MAX_SHIFT and b.dtype == np.int32 and int(b.min(initial=1)) >= 1 and int(b.max(initial=1)) <= 1 << (c + 8)
    constants = [graph.constant(f"{name}_b", b), graph.constant(f"{name}_c", np.asarray(c, np.uint32))]
    return _call(graph, "DyadicRescale", [x, *constants], zero, result, elem_type, name, notes)


def ratio_rescale(
    graph: Graph, x: Tensor, p: int, q: int, zero: int, result: Value, elem_type: int, name: str, notes: Mapping[str, str]
) -> Node:
    """Append `result = RatioRescale(x, p, q, zero)`; a p beyond 256 q becomes 256 q, which saturates alike."""
    assert p >= 1 and q % 2 == 1 and 1 <= q <= _MAX_DENOMINATOR
    p = min(p, 256 * q)
    constants = [graph.constant(f"{name}_p", np.asarray(p, np.int32)), graph.constant(f"{name}_q", np.asarray(q, np.int32))]
    return _call(graph, "RatioRescale", [x, *constants], zero, result, elem_type, name, notes)


def _call(
    graph: Graph,
    function: str,
    inputs: list[Tensor],
    zero: int,
    result: Value,
    elem_type: int,
    name: str,
    notes: Mapping[str, str],
) -> Node:
    declare(graph, function)
    low, high = _RANGES[elem_type]
    ends = graph.constant(f"{name}_zero", np.asarray(zero, np.int32))
    node = graph.node(function, [*inputs, ends], [result], domain=DOMAIN, to=elem_type, low=low, high=high)
    node.name = ""  # the metadata say whose rescale it is
    node.source = NodeProto()
    for key, value in notes.items():
        node.source.metadata_props.add(key=f"qcompile.{key}", value=value)
    return node


def declare(graph: Graph, function: str) -> None:
    """Let the model hold `function`; once however often it is called."""
    if any(f.name == function and f.domain == DOMAIN for f in graph.shell.functions):
        return
    graph.shell.functions.append(body(function, graph.opset() or 21))
    graph.shell.ir_version = max(graph.shell.ir_version, 8)  # the first with local functions


def body(function: str, opset: int) -> FunctionProto:
    """The function as ONNX at `opset` (13 or later: its operators mean the same in all of them)."""
    text, meaning = _BODIES[function]
    proto: FunctionProto = onnx.parser.parse_function(text)
    del proto.opset_import[:]
    proto.opset_import.append(helper.make_opsetid("", opset))
    proto.doc_string = meaning
    return proto
