"""What a written file says about itself: b and c of every rescale, and what is stored and computed in which type.

`rescales` reads the scales from the file alone (Q/DQ or QLinear operators) and derives each multiplier again; it runs
nothing. `summary` counts. Both are plain data for `qcompile inspect`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto

from qcompile.dyadic import (
    Float32,
    Int64,
    as_dyadic,
    is_exact_dyadic,
    linear_multiplier,
    pool_multiplier,
    product_ratio,
    sum_ratio,
)
from qcompile.inspection_scales import Link, Scales, integer, real
from qcompile.interpret_values import why_not_dyadic, why_not_tie_free
from qcompile.wiring import BYTES, CARRIES, FLOATS, Node, bits

Kind: TypeAlias = Literal["linear", "add", "mul", "pool", "other"]

_BIAS_TOLERANCE = 2.0**-22
_CLAMPS = ("Relu", "Clip")
_MOVING = CARRIES | {"MaxPool", "Resize", "Upsample", "Max", "Min"}
_JOINING = ("Concat", "Max", "Min")
_ENDS = ("QuantizeLinear", "DequantizeLinear")
_WRITTEN = ("DyadicRescale", "RatioRescale")  # and what is behind that name, but for these
_NOT_WRITTEN = ("DyadicRescaleFused", "DyadicRescaleWide")
_MOST_WRITTEN = 1 << 25  # b of a written-out rescale: its sums then stay below 2^32


@dataclass(frozen=True, eq=False)
class Rescale:
    """One change of scale in the file.

    linear and pool: `multiplier` M and its exact decomposition `b / 2^c`, per channel or 0-d (None where a scale is not
    stored in the file). add and mul: the ratios `p / q`. other: anything that is computed in float between two quantised
    tensors. `reason` says why it is not exact, and is empty where it is.
    """

    node: str
    op: str
    kind: Kind
    exact: bool
    reason: str = ""
    multiplier: Float32 | None = None
    b: Int64 | None = None
    c: Int64 | None = None
    p: tuple[int, ...] | None = None
    q: int | None = None


@dataclass(frozen=True)
class Summary:
    """What a file holds.

    formats: which of "qdq", "qoperator", "integer", "weight-only", "float" occur. integer_ops and float_ops count nodes by
    operator (between Q and DQ counts as integer, and so does a product or look-up of weights in blocks of 4 bits;
    QuantizeLinear, DequantizeLinear and constants are not counted). weight_bytes: stored bytes by element type.
    activation_quantisers: QuantizeLinear nodes on tensors that depend on the input.
    """

    formats: tuple[str, ...]
    integer_ops: dict[str, int]
    float_ops: dict[str, int]
    weight_bytes: dict[str, int]
    activation_quantisers: int


def rescales(model: onnx.ModelProto | str | Path) -> list[Rescale]:
    """Every rescale of the file, in node order. Raises ModelError where the file cannot be read."""
    scales = Scales(model)
    found: list[Rescale] = []
    for node in scales.wiring.nodes:
        if node.op == "QuantizeLinear":
            rescale = _behind_quantise(scales, node)
        elif node.op.startswith("QLinear") or node.op == "QGemm":
            rescale = _of_operator(scales, node)
        else:
            rescale = None
        if rescale is not None:
            found.append(rescale)
    return found + [_written_out(scales, call) for call in scales.calls if _is_written(call.op_type)]


def _is_written(op: str) -> bool:
    return op.startswith(_WRITTEN) and not op.startswith(_NOT_WRITTEN)


def _written_out(scales: Scales, call: onnx.NodeProto) -> Rescale:
    """A rescale of the integer format, which states its integers: exact within the bounds in which its body cannot wrap."""
    label = call.name or call.output[0]
    first, second = (scales.constant(name) for name in call.input[1:3])
    if first is None or second is None:
        return Rescale(label, call.op_type, "linear", False, "its integers are not stored in the file")
    top, below = first.astype(np.int64), second.astype(np.int64)
    if call.op_type == "RatioRescale":
        divisor = int(below.reshape(-1)[0])
        fits = divisor % 2 == 1 and 1 <= divisor <= 1023 and bool(((top >= 1) & (top <= 256 * divisor)).all())
        reason = "" if fits else f"p/{divisor} is not a ratio with one odd q <= 1023"
        return Rescale(label, call.op_type, "add", fits, reason, p=tuple(int(p) for p in top.reshape(-1)), q=divisor)
    b, c = (v.reshape(-1) for v in np.broadcast_arrays(top, below))
    ends = {a.name: a.i for a in call.attribute}
    # 2^(c+w), w the bits of the output: from there on it saturates, and so far |x*b| goes before x is clipped.
    reach = np.left_shift(np.int64(ends.get("high", 255) - ends.get("low", 0) + 1), np.clip(c, 0, 31))
    fits = bool(((c >= 1) & (c < 32) & (reach <= 1 << 30) & (b >= 1) & (b <= np.minimum(reach, _MOST_WRITTEN))).all())
    if not call.op_type.startswith("DyadicRescaleSteep"):
        fits = fits and bool((b <= np.left_shift(np.int64(1), np.clip(c, 0, 31))).all())
    reason = "" if fits else f"b = {b.min()}..{b.max()} or c = {c.min()}..{c.max()} is outside what int32 can rescale"
    zero = scales.constant(call.input[3])
    if fits and "Untied" in call.op_type and (zero is None or _has_ties(b, c, int(zero.reshape(-1)[0]), ends)):
        reason = "its body rounds no ties, and its multiplier has some"
        return Rescale(label, call.op_type, "linear", False, reason, b=b, c=c)
    return Rescale(label, call.op_type, "linear", fits, reason, b=b, c=c)


def _has_ties(b: Int64, c: Int64, zero: int, ends: Mapping[str, int]) -> bool:
    """Whether some sum whose result does not saturate lies half-way between two integers: a multiple of the least x with
    x * b = 2^(c-1) (mod 2^c), which is 2^(c-1) over the greatest power of two in b."""
    unit = np.left_shift(np.int64(1), c)
    power = np.gcd(b, unit)
    room = max(ends.get("high", 255) - zero, zero - ends.get("low", 0)) + 0.5
    return bool(((power < unit) & (unit // 2 // power * b < room * unit)).any())


# --- judgements on scales -------------------------------------------------------------------------------------


def _refused(node: Node, kind: Kind, reason: str) -> Rescale:
    return Rescale(node.label, node.op, kind, False, reason)


def _dyadic(node: Node, kind: Kind, multiplier: Float32, objection: str = "") -> Rescale:
    positive = bool(np.all(np.isfinite(multiplier) & (multiplier > 0) & (multiplier < 2.0**62)))
    b, c = as_dyadic(multiplier) if positive else (None, None)
    reason = objection or ("" if is_exact_dyadic(multiplier).all() else why_not_dyadic(multiplier))
    return Rescale(node.label, node.op, kind, not reason, reason, multiplier, b, c)


def _tie_free(node: Node, op: str, a: Float32, b: Float32, out: Float32) -> Rescale:
    kind: Kind = "add" if op == "Add" else "mul"
    if max(s.ndim for s in (a, b, out)) > 0:
        return _refused(node, kind, "a scale is per axis")
    ratio = (sum_ratio if op == "Add" else product_ratio)(a, b, out)
    if ratio is None:
        return _refused(node, kind, why_not_tie_free(op, a, b, out))
    return Rescale(node.label, node.op, kind, True, p=tuple(ratio[1]), q=ratio[0])


def _pooled(scales: Scales, node: Node, tensor: str, x: Float32, out: Float32, channels_last: bool) -> Rescale:
    if max(x.ndim, out.ndim) > 0:
        return _refused(node, "pool", "a scale is per axis")
    count = scales.spatial_size(tensor, channels_last)
    if count is None:
        return _refused(node, "pool", "the spatial size is not static, and the multiplier depends on it")
    return _dyadic(node, "pool", pool_multiplier(x, out, count))


# --- QLinear operators ----------------------------------------------------------------------------------------


def _of_operator(scales: Scales, node: Node) -> Rescale | None:
    op = node.op
    if op in ("QLinearConv", "QLinearMatMul", "QGemm"):
        at = 7 if op == "QGemm" else 6
        if op == "QGemm" and (len(node.inputs) <= at or not node.inputs[at]):
            return None  # ends in float: nothing is rescaled
        x, w, out = (scales.scale(node.inputs[i]) for i in (1, 4, at))
        if x is None or w is None or out is None:
            return _refused(node, "linear", "a scale is not stored in the file")
        alpha = real(node, "alpha", 1.0)
        return _dyadic(node, "linear", linear_multiplier(x, w, out), "" if alpha == 1.0 else f"alpha is {alpha}")
    if op in ("QLinearAdd", "QLinearMul"):
        a, b, out = (scales.scale(node.inputs[i]) for i in (1, 4, 6))
        if a is None or b is None or out is None:
            return _refused(node, "add" if op == "QLinearAdd" else "mul", "a scale is not stored in the file")
        return _tie_free(node, op.removeprefix("QLinear"), a, b, out)
    if op == "QLinearGlobalAveragePool":
        x, out = scales.scale(node.inputs[1]), scales.scale(node.inputs[3])
        if x is None or out is None:
            return _refused(node, "pool", "a scale is not stored in the file")
        return _pooled(scales, node, node.inputs[0], x, out, bool(integer(node, "channels_last", 0)))
    if op == "QLinearConcat":
        given = [scales.scale(n) for n in (node.inputs[0], *node.inputs[3::3])]
        if all(s is not None and s == given[0] for s in given):
            return None
        return _refused(node, "other", "it joins tensors of unequal scales, which is not rounded half to even")
    return _refused(node, "other", f"{op} is computed in float inside the runtime")


# --- Q/DQ -----------------------------------------------------------------------------------------------------


def _behind_quantise(scales: Scales, quantise: Node) -> Rescale | None:
    """The rescale of the operator whose result this QuantizeLinear takes; None where nothing is rescaled."""
    maker = _maker(scales, quantise)
    if maker is None or scales.wiring.root(quantise.inputs[0]) is not None:
        return None
    out = scales.scale(quantise.inputs[1])
    if maker.op in _JUDGES:
        operands = [scales.dequantised(n) for n in maker.inputs if n]
        links = [link for link in operands if link is not None]
        kind = _KINDS[maker.op]
        if len(links) < len(operands):
            return _refused(maker, "other", "an operand is not behind DequantizeLinear: it is computed in float")
        if any(not scales.is_eight_bit(link) for link in links[:2]):
            return _refused(maker, "other", "an operand is not 8-bit: it is computed in float")
        if scales.wiring.elem_type(quantise.outputs[0]) not in BYTES:
            return _refused(maker, "other", "its output is not 8-bit: it is computed in float")
        if out is None or any(link.scale is None for link in links):
            return _refused(maker, kind, "a scale is not stored in the file")
        return _JUDGES[maker.op](scales, maker, links, out)
    if maker.op == "DequantizeLinear" or maker.op in _MOVING:
        return _moved(scales, maker, out)
    if scales.source(quantise.inputs[0]) is None:
        return None  # a graph input
    return _refused(maker, "other", f"{maker.op} is computed in float between two quantised tensors")


def _maker(scales: Scales, quantise: Node) -> Node | None:
    """The operator before a QuantizeLinear, Relu and Clip skipped: they become the ends of the range."""
    maker = scales.wiring.producer(quantise.inputs[0])
    while maker is not None and maker.op in _CLAMPS:
        before = scales.wiring.producer(maker.inputs[0])
        if before is None or before.op not in (*_JUDGES, *_CLAMPS, "DequantizeLinear"):
            break
        maker = before
    return maker


def _moved(scales: Scales, maker: Node, out: Float32 | None) -> Rescale | None:
    """Movement between DequantizeLinear and QuantizeLinear keeps the integers where the scale stays."""
    if maker.op == "DequantizeLinear":
        links: list[Link | None] = [scales.dequantised(maker.outputs[0])]
    else:
        names = maker.inputs if maker.op in _JOINING else maker.inputs[:1]
        if all(scales.source(n) is None for n in names):
            return None  # graph inputs and constants only
        links = [scales.dequantised(n) for n in names]
    for link in links:
        if link is None:
            return _refused(maker, "other", f"{maker.op} moves a float tensor to a quantised one")
        if link.scale is None or out is None:
            return _refused(maker, "other", "a scale is not stored in the file")
        if link.scale.shape != out.shape or not bool(np.all(link.scale == out)):
            return _refused(maker, "other", "the scale changes on the way, which is computed in float")
    return None


def _judge_linear(scales: Scales, node: Node, links: list[Link], out: Float32) -> Rescale:
    x, w = links[0], links[1]
    assert x.scale is not None
    assert w.scale is not None
    objection = _axis_objection(scales, node, x, w)
    if not objection and node.op == "Gemm" and (real(node, "alpha", 1.0) != 1.0 or real(node, "beta", 1.0) != 1.0):
        objection = "alpha or beta is not 1: it is computed in float"
    if not objection and len(links) > 2:
        objection = _bias_objection(links[2], np.asarray(x.scale * w.scale))
    return _dyadic(node, "linear", linear_multiplier(x.scale, w.scale, out), objection)


def _axis_objection(scales: Scales, node: Node, x: Link, w: Link) -> str:
    if x.axis is not None:
        return "the input's scale is per axis: it is computed in float"
    if w.axis is None:
        return ""
    if node.op == "Conv":
        good = w.axis == 0
    elif node.op == "Gemm":
        good = w.axis % 2 == (0 if integer(node, "transB", 0) else 1)
    else:
        shape = scales.shape(node.inputs[1])
        good = w.axis == (-1 if shape is None else len(shape) - 1) or w.axis == -1
    return "" if good else f"the weights' scale lies along axis {w.axis}, not along the output channels"


def _bias_objection(bias: Link, expected: Float32) -> str:
    if bias.elem_type != TensorProto.INT32:
        return "the bias is not int32: it is computed in float"
    assert bias.scale is not None
    off = np.abs(bias.scale.astype(np.float64) / expected - 1)
    return "" if bool(np.all(off <= _BIAS_TOLERANCE)) else "the bias's scale is not input scale * weight scale"


def _judge_pair(scales: Scales, node: Node, links: list[Link], out: Float32) -> Rescale:
    a, b = links[0].scale, links[1].scale
    assert a is not None
    assert b is not None
    return _tie_free(node, node.op, a, b, out)


def _judge_pool(scales: Scales, node: Node, links: list[Link], out: Float32) -> Rescale:
    assert links[0].scale is not None
    return _pooled(scales, node, node.inputs[0], links[0].scale, out, channels_last=False)


_JUDGES: dict[str, Callable[[Scales, Node, list[Link], Float32], Rescale]] = {
    "Add": _judge_pair,
    "Conv": _judge_linear,
    "Gemm": _judge_linear,
    "GlobalAveragePool": _judge_pool,
    "MatMul": _judge_linear,
    "Mul": _judge_pair,
}
_KINDS: dict[str, Kind] = {
    "Add": "add",
    "Conv": "linear",
    "Gemm": "linear",
    "GlobalAveragePool": "pool",
    "MatMul": "linear",
    "Mul": "mul",
}


# --- summary --------------------------------------------------------------------------------------------------


def summary(model: onnx.ModelProto | str | Path) -> Summary:
    """Count what the file holds. Raises ModelError where it cannot be read."""
    scales = Scales(model)
    wiring = scales.wiring
    integers: Counter[str] = Counter()
    floats: Counter[str] = Counter()
    formats: set[str] = set()
    quantisers = 0
    for node in wiring.nodes:
        if node.op == "Constant" or all(wiring.root(o) is not None for o in node.outputs if o):
            continue
        if node.op == "QuantizeLinear":
            quantisers += 1
        if node.op in _ENDS:
            continue
        touches_float = any(wiring.is_float(n) for n in (*node.inputs, *node.outputs))
        if node.op.startswith("QLinear") or node.op == "QGemm":
            formats.add("qoperator")
            integers[node.op] += 1
        elif _is_weight_only(scales, node):
            formats.add("weight-only")
            integers[node.op] += 1
        elif not touches_float:
            if node.op in ("ConvInteger", "MatMulInteger"):
                formats.add("integer")
            integers[node.op] += 1
        elif between_quantised(scales, node):
            formats.add("qdq")
            integers[node.op] += 1
        else:
            if any(wiring.elem_type(o) in FLOATS for o in node.outputs):
                formats.add("float")
            floats[node.op] += 1
    weights: Counter[str] = Counter()
    for tensor in scales.model.graph.initializer:
        width = bits(tensor.data_type)
        weights[TensorProto.DataType.Name(tensor.data_type).lower()] += -(-prod(tensor.dims) * width // 8)
    ordered = tuple(f for f in ("qdq", "qoperator", "integer", "weight-only", "float") if f in formats)
    return Summary(ordered, _sorted(integers), _sorted(floats), _sorted(weights), quantisers)


def _is_weight_only(scales: Scales, node: Node) -> bool:
    """Whether floats are multiplied by integer weights in blocks, by an operator for that or behind a DequantizeLinear."""
    if node.op in ("MatMulNBits", "GatherBlockQuantized"):
        return True
    before = scales.wiring.producer(node.inputs[1]) if node.op == "MatMul" else None
    block = before.attribute("block_size") if before is not None and before.op == "DequantizeLinear" else None
    return block is not None and block.i > 0


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def between_quantised(scales: Scales, node: Node) -> bool:
    """Whether a float-typed node stands between DequantizeLinear and QuantizeLinear in a form that runs in integers."""
    if node.op in _CLAMPS:
        before = scales.wiring.producer(node.inputs[0])
        behind = before is not None and (before.op == "DequantizeLinear" or before.op in _JUDGES)
        return behind and _ends_in_quantise(scales, node)
    if node.op not in _JUDGES and node.op not in _MOVING:
        return False
    names = [n for n in node.inputs if n] if node.op in (*_JUDGES, *_JOINING) else node.inputs[:1]
    links = [scales.dequantised(n) for n in names]
    if any(link is None for link in links):
        return False
    if node.op in _JUDGES and any(link is None or not scales.is_eight_bit(link) for link in links[:2]):
        return False
    # Gemm and MatMul may end in float: the runtime scales their integer sum once.
    return node.op in ("Gemm", "MatMul") or _ends_in_quantise(scales, node)


def _ends_in_quantise(scales: Scales, node: Node) -> bool:
    for name in (o for o in node.outputs if o):
        readers = scales.quantisers(name)
        if not readers or name in scales.wiring.outputs:
            return False
        for reader in readers:
            clamped = reader.op in _CLAMPS and _ends_in_quantise(scales, reader)
            if reader.op != "QuantizeLinear" and not clamped:
                return False
    return True
