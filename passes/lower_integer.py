"""Quantised operators to plain integer arithmetic: every operator integer, every rescale written out.

    QLinearConv                   ->  ConvInteger + int32 bias, DyadicRescale
    QGemm, QLinearMatMul          ->  MatMulInteger + int32 bias, DyadicRescale; without a rescale: DequantizeLinear of int32
    QLinearAdd                    ->  (a - za) * ba + (b - zb) * bb, DyadicRescale by 1/2^20
    QLinearMul                    ->  (a - za) * (b - zb), RatioRescale
    QLinearGlobalAveragePool      ->  sum in int32, DyadicRescale

It reads what `lower_qoperator` wrote, and derives b and c, or p and q, again from the scales there. Equal integers: the
runtime's float32 rescale is exact for these multipliers (`qcompile.dyadic`). Of a sum p/q the dyadic shadow b = round(2^20 p/q)
gives the same integers: it is off by less than 2 * 255 * 2^-21 < 1/(2q), the distance of an exact sum to the next tie.

What cannot be made integer is refused with the node's name: a rescale that is not exact, a sum that could leave int32, and
every float tensor between the two ends of the graph (`qcompile.certificate`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias

import numpy as np
from onnx import helper

from qcompile.certificate import COMPUTES, certify
from qcompile.context import Context
from qcompile.dyadic import (
    Array,
    is_exact_dyadic,
    linear_multiplier,
    pool_multiplier,
    product_ratio,
    sum_ratio,
)
from qcompile.errors import ModelError
from qcompile.graph import Const, Graph, Node, Tensor, Value
from qcompile.interpret_values import why_not_dyadic, why_not_tie_free
from qcompile.passes._integer_sums import become, centred, int32_value, plumb, sum_of_positions
from qcompile.passes._rescale import common_shift, dyadic_rescale, ratio_rescale
from qcompile.rewrite import Exact, Promise, Report
from qcompile.runtime import runs_signed_conv_integer

_MICROSOFT = "com.microsoft"
_INT32_MAX = 2**31 - 1
_LARGEST = 255  # of |integer - zero point| in 8 bits
_SUM_SHIFT = 20
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class LowerInteger:
    """Only for `format == "integer"`, behind `lower_qoperator`. Same bits."""

    name: str = "lower_integer"
    keeps: Promise = field(default_factory=lambda: Exact(fused=True))

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a quantised operator. Raises ModelError naming the first node that stays float between the ends."""
        report = Report()
        if context.settings.format != "integer":
            return report
        for node in list(graph.nodes):
            form = _FORMS.get((node.domain or "", node.op))
            if form is not None:
                form(graph, node)
                report.rewrites += 1
        graph.cleanup()
        graph.sort()
        used = {n.domain or "" for n in graph.nodes}
        imports = [o for o in graph.shell.opset_import if o.domain != _MICROSOFT or _MICROSOFT in used]
        del graph.shell.opset_import[:]
        graph.shell.opset_import.extend(imports)
        found = certify(graph.to_proto())
        if found.floats:
            computing = [f for f in found.floats if f.reason == COMPUTES] or [f for f in found.floats if f.op not in _CONVERSIONS]
            first = (computing or found.floats)[0]
            raise ModelError(
                f"node '{first.node}' ({first.op}): {first.reason}, and --format integer leaves no float between the ends "
                f"({len(found.floats)} such tensors); use --format qoperator or qdq"
            )
        return report


def _refusal(node: Node, why: str) -> ModelError:
    return ModelError(f"node '{node.label}' ({node.op}): {why}; use --format qoperator or qdq")


# --- reading a quantised operator -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Quantised:
    """One operand: its integers, float32 scale (0-d or one a channel) and zero point as stored."""

    integers: Tensor
    scale: Array
    zero: Array
    elem_type: int

    @property
    def zero_point(self) -> int:
        """The zero point, one for all."""
        return int(self.zero.reshape(-1)[0])


def _constant(node: Node, index: int) -> Array:
    const = node.constant(index)
    if const is None:
        raise _refusal(node, "a scale or zero point is computed at run time")
    value = const.array()
    return value.reshape(()) if value.size == 1 else value


def _quantised(node: Node, tensor: int, scale: int) -> _Quantised:
    """The operand whose integers are input `tensor` (-1: the output), with scale and zero point at `scale`."""
    zero = node.constant(scale + 1)
    if zero is None:
        raise _refusal(node, "a zero point is missing or computed at run time")
    integers: Tensor = node.outputs[0] if tensor < 0 else node.inputs[tensor]
    value = _constant(node, scale + 1)
    if value.size > 1 and (value == value.reshape(-1)[0]).all():
        value = np.asarray(value.reshape(-1)[0])
    return _Quantised(integers, _constant(node, scale), value, zero.elem_type)


def _per_tensor(node: Node, *operands: _Quantised) -> None:
    if any(o.scale.ndim or o.zero.ndim for o in operands):
        raise _refusal(node, "a scale is per channel where only per tensor works")


def _int(graph: Graph, node: Node, role: str, value: object) -> Const:
    return graph.constant(f"{node.outputs[0].name if node.outputs else node.name}_{role}", np.asarray(value, np.int32))


def _notes(node: Node, **operands: _Quantised) -> dict[str, str]:
    """Metadata of a rescale: the node it belongs to and the scales it was derived from (of many: the ends of their range)."""
    notes = {"source": node.name}
    for role, operand in operands.items():
        scale = np.atleast_1d(operand.scale)
        text = str(scale[0]) if scale.size == 1 else f"{scale.min()}..{scale.max()} ({scale.size} channels)"
        notes[f"scale_{role}"] = text
    return notes


# --- products ---------------------------------------------------------------------------------------------------


def _product(graph: Graph, node: Node, op: str, x: _Quantised, w: _Quantised, weight: Tensor) -> Value:
    """Turn `node` into `op` (ConvInteger or MatMulInteger); returns the accumulator without bias. The output is detached."""
    result = node.outputs[0]
    node.outputs.clear()
    acc = int32_value(graph, result.name + "_acc", result)
    zeros: list[Tensor] = []
    for operand in (x, w):
        stored = operand.zero.astype(helper.tensor_dtype_to_np_dtype(operand.elem_type))
        zeros.append(graph.constant(f"{result.name}_zero", stored) if operand.zero.any() else Value(""))
    while zeros and not zeros[-1].name:
        zeros.pop()
    node.op, node.domain = op, ""
    node.inputs.clear()
    node.inputs.extend([x.integers, weight, *zeros])
    node.outputs.append(acc)
    return acc


def _check_sum(node: Node, weight: Const | None, w: _Quantised, axes: tuple[int, ...], bias: Array | None) -> None:
    """Refuse weights with which an int32 accumulator could wrap: 255 * sum|w| + |bias| per channel, at any input."""
    if weight is None:
        return
    total = np.abs(weight.array().astype(np.int64) - w.zero.reshape(-1)[0].astype(np.int64)).sum(axis=axes) * _LARGEST
    if bias is not None:
        total = total + np.abs(bias.reshape(-1).astype(np.int64))
    if int(total.max(initial=0)) > _INT32_MAX:
        raise _refusal(node, "its sum can leave int32")


def _multiplier(node: Node, multiplier: Array) -> Array:
    """`multiplier` where it is dyadic; else the node is refused."""
    if not is_exact_dyadic(multiplier).all():
        raise _refusal(node, why_not_dyadic(multiplier))
    return multiplier


def _rescaled(
    graph: Graph, node: Node, acc: Tensor, multiplier: Array, y: _Quantised, notes: dict[str, str], bias: Array | None = None
) -> None:
    """End `node` in 8 bits; `multiplier` and the int32 `bias` broadcast to `acc`."""
    b, c = common_shift(multiplier)
    assert isinstance(y.integers, Value)
    dyadic_rescale(graph, acc, b, c, y.zero_point, y.integers, y.elem_type, node.name, notes, bias)


def _conv(graph: Graph, node: Node) -> None:
    x, w, y = _quantised(node, 0, 1), _quantised(node, 3, 4), _quantised(node, -1, 6)
    _per_tensor(node, x, y)
    if w.zero.ndim:
        raise _refusal(node, "its weights have unequal zero points")
    if not runs_signed_conv_integer():
        raise _refusal(node, "this onnxruntime has no ConvInteger for int8 weights, a newer one has")
    weight, bias = node.constant(3), node.constant(8)
    if weight is None or (node.input(8) is not None and bias is None):
        raise _refusal(node, "its weights or bias are computed at run time")
    rank = len(weight.dims)
    column = None if bias is None else bias.array().reshape(-1, *[1] * (rank - 2))
    _check_sum(node, weight, w, tuple(range(1, rank)), column)
    multiplier = _multiplier(node, linear_multiplier(x.scale, w.scale, y.scale))
    notes = _notes(node, x=x, w=w, y=y)
    if multiplier.ndim:
        multiplier = multiplier.reshape(-1, *[1] * (rank - 2))
    acc = _product(graph, node, "ConvInteger", x, w, weight)
    _rescaled(graph, node, acc, multiplier, y, notes, column)


def _gemm(graph: Graph, node: Node) -> None:
    x, w = _quantised(node, 0, 1), _quantised(node, 3, 4)
    _per_tensor(node, x)
    if node.attr("alpha", 1.0) != 1.0 or node.attr("transA", 0):
        raise _refusal(node, "alpha or transA")
    weight, bias = node.constant(3), node.constant(6)
    if weight is None or (node.input(6) is not None and bias is None):
        raise _refusal(node, "its weights or bias are computed at run time")
    y = _quantised(node, -1, 7) if node.input(7) is not None else None
    column = 0 if node.attr("transB", 0) else 1
    _check_sum(node, weight, w, (1 - column,), None if bias is None else bias.array())
    multiplier = None
    if y is not None:
        _per_tensor(node, y)
        multiplier = _multiplier(node, linear_multiplier(x.scale, w.scale, y.scale))
    if column == 0:
        weight = _transposed(graph, weight)
    notes = _notes(node, x=x, w=w) if y is None else _notes(node, x=x, w=w, y=y)
    result = node.outputs[0]
    node.attrs.clear()
    acc = _product(graph, node, "MatMulInteger", x, w, weight)
    if y is not None and multiplier is not None:
        _rescaled(graph, node, acc, multiplier, y, notes, None if bias is None else bias.array())
        return
    if bias is not None:
        total = int32_value(graph, result.name + "_sum", result)
        plumb(graph, "Add", [acc, bias], total)
        acc = total
    # The float end. fl(acc) * fl(Sx*Sw), as the fused operator computes it.
    scale = graph.constant(f"{result.name}_scale", np.asarray(x.scale * w.scale, np.float32))
    attrs = {"axis": 1} if w.scale.ndim else {}
    plumb(graph, "DequantizeLinear", [acc, scale], result, **attrs)


def _transposed(graph: Graph, weight: Const) -> Const:
    """The weights the other way round, in place where nobody else reads them."""
    turned = np.ascontiguousarray(weight.array().T)
    if len(weight.outputs) == 1 and not graph.is_pinned(weight):
        weight.assign(turned)
        return weight
    return graph.constant(weight.name + "_transposed", turned)


def _matmul(graph: Graph, node: Node) -> None:
    x, w, y = _quantised(node, 0, 1), _quantised(node, 3, 4), _quantised(node, -1, 6)
    _per_tensor(node, x, y)
    weight = node.constant(3)
    _check_sum(node, weight, w, (-2,), None)
    notes = _notes(node, x=x, w=w, y=y)
    multiplier = _multiplier(node, linear_multiplier(x.scale, w.scale, y.scale))
    acc = _product(graph, node, "MatMulInteger", x, w, node.inputs[3])
    _rescaled(graph, node, acc, multiplier, y, notes)


# --- sums and products of two tensors ----------------------------------------------------------------------------


def _add(graph: Graph, node: Node) -> None:
    a, b, y = _quantised(node, 0, 1), _quantised(node, 3, 4), _quantised(node, -1, 6)
    _per_tensor(node, a, b, y)
    ratio = sum_ratio(a.scale, b.scale, y.scale)
    if ratio is None:
        raise _refusal(node, why_not_tie_free("Add", a.scale, b.scale, y.scale))
    q, p = ratio
    factors = shadow(p, q)
    notes = _notes(node, a=a, b=b, y=y)
    if factors is None and _LARGEST * sum(p) > _INT32_MAX:
        raise _refusal(node, "its operands' scales are too far from its result's for int32")
    base = node.outputs[0].name
    terms: list[Tensor] = []
    for role, operand, factor in zip("ab", (a, b), factors or p, strict=True):
        term = int32_value(graph, f"{base}_{role}", operand.integers)
        inside = centred(graph, operand.integers, operand.zero_point, f"{base}_{role}")
        plumb(graph, "Mul", [inside, _int(graph, node, f"{role}_factor", factor)], term)
        terms.append(term)
    total = become(graph, node, "Add", terms)
    assert isinstance(y.integers, Value)
    if factors is not None:
        one = np.asarray(1, np.int32)
        dyadic_rescale(graph, total, one, _SUM_SHIFT, y.zero_point, y.integers, y.elem_type, node.name, notes)
    else:
        ratio_rescale(graph, total, 1, q, y.zero_point, y.integers, y.elem_type, node.name, notes)


def shadow(p: list[int], q: int) -> list[int] | None:
    """b = round(2^20 p/q) of each p, where `sum(b * x) / 2^20` rounds as `sum(p * x) / q` does for all |x| <= 255.

    None where it would not, or where the sum could leave int32: then the sum is divided by q itself.
    """
    factors = [round(Fraction(v << _SUM_SHIFT, q)) for v in p]
    error = sum(abs(Fraction(b, 1 << _SUM_SHIFT) - Fraction(v, q)) for b, v in zip(factors, p, strict=True)) * _LARGEST
    fits = _LARGEST * sum(factors) <= _INT32_MAX
    return factors if fits and min(factors) >= 1 and error < Fraction(1, 2 * q) else None


def _mul(graph: Graph, node: Node) -> None:
    a, b, y = _quantised(node, 0, 1), _quantised(node, 3, 4), _quantised(node, -1, 6)
    _per_tensor(node, a, b, y)
    ratio = product_ratio(a.scale, b.scale, y.scale)
    if ratio is None:
        raise _refusal(node, why_not_tie_free("Mul", a.scale, b.scale, y.scale))
    q, (p,) = ratio
    notes = _notes(node, a=a, b=b, y=y)
    base = node.outputs[0].name
    inside: list[Tensor] = [centred(graph, o.integers, o.zero_point, f"{base}_{r}") for o, r in ((a, "a"), (b, "b"))]
    total = become(graph, node, "Mul", inside)
    assert isinstance(y.integers, Value)
    ratio_rescale(graph, total, p, q, y.zero_point, y.integers, y.elem_type, node.name, notes)


def _pool(graph: Graph, node: Node) -> None:
    x, y = _quantised(node, 0, 1), _quantised(node, -1, 3)
    _per_tensor(node, x, y)
    if node.attr("channels_last", 0):
        raise _refusal(node, "channels_last")
    dims = x.integers.dims or ()
    spatial = [d for d in dims[2:] if isinstance(d, int)]
    if len(dims) < 3 or len(spatial) < len(dims) - 2:
        raise _refusal(node, "the size of its input is not static, and the multiplier depends on it")
    count = int(np.prod(spatial))
    if _LARGEST * count > _INT32_MAX:
        raise _refusal(node, "its sum can leave int32")
    notes, multiplier = _notes(node, x=x, y=y), _multiplier(node, pool_multiplier(x.scale, y.scale, count))
    total = sum_of_positions(graph, node, x.integers, x.zero_point, count, len(dims))
    _rescaled(graph, node, total, multiplier, y, notes)


_Form: TypeAlias = Callable[[Graph, Node], None]
_FORMS: dict[tuple[str, str], _Form] = {
    ("", "QLinearConv"): _conv,
    ("", "QLinearMatMul"): _matmul,
    (_MICROSOFT, "QGemm"): _gemm,
    (_MICROSOFT, "QLinearAdd"): _add,
    (_MICROSOFT, "QLinearGlobalAveragePool"): _pool,
    (_MICROSOFT, "QLinearMul"): _mul,
}
