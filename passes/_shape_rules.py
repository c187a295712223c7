"""What the operators do to symbolic dimensions (`DIMS`) and to the contents of shape tensors (`VALUES`): two tables of rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import numpy_helper

from qcompile.graph import Node
from qcompile.passes._dims import ONE, Dim, Dims, broadcast, volume
from qcompile.passes._match import array_of, ints_of, producer_of

if TYPE_CHECKING:
    from qcompile.passes._shape_values import Shapes

INTEGERS = frozenset({6, 7, 9})  # TensorProto INT32, INT64, BOOL
LARGEST = 64  # elements of a tensor that is followed by value


def _words(text: str) -> list[str]:
    return text.split()


# ---- shapes: what an operator makes of its inputs' dimensions, None for an axis that the rule does not know ----
_Proposal = Sequence["Dim | None"]
_SAME = _words(
    "Abs Acos Acosh Asin Asinh Atan Atanh BatchNormalization Cast Ceil Celu Clip Cos Cosh CumSum DequantizeLinear "
    "Dropout Elu Erf Exp Floor Gelu GroupNormalization HardSigmoid HardSwish Hardmax Identity InstanceNormalization "
    "LRN LayerNormalization LeakyRelu Log LogSoftmax LpNormalization MeanVarianceNormalization Mish Neg Not "
    "QuantizeLinear Reciprocal Relu RMSNormalization Round ScatterND ScatterElements Selu Shrink Sigmoid Sign Sin "
    "Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Trilu"
)
_BROADCAST = _words(
    "Add And BitShift Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or Pow PRelu Sub Sum Where Xor"
)
_BATCH = _words("Conv ConvTranspose MaxPool AveragePool GlobalAveragePool GlobalMaxPool LpPool Resize Upsample")


def propose(node: Node, shapes: Shapes) -> list[_Proposal | None]:
    if node.domain not in ("", "ai.onnx"):
        return []
    if node.op == "Split":
        return [_all_but(shapes.dims(node.input(0)), [int(node.attr("axis", 0))])] * len(node.outputs)
    rule = DIMS.get(node.op)
    return [rule(node, shapes)] if rule is not None else []


def _all_but(dims: Dims | None, axes: Sequence[int]) -> _Proposal | None:
    if dims is None:
        return None
    lost = {a % len(dims) for a in axes if -len(dims) <= a < len(dims)}
    return [None if i in lost else d for i, d in enumerate(dims)]


def _broadcast_rule(node: Node, shapes: Shapes) -> _Proposal | None:
    known = [shapes.dims(t) for t in node.inputs]
    return None if any(k is None for k in known) else broadcast([k for k in known if k is not None])


def _matmul(node: Node, shapes: Shapes) -> _Proposal | None:
    a, b = shapes.dims(node.input(0)), shapes.dims(node.input(1))
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    return [*broadcast([a[:-2], b[:-2]]), a[-2], b[-1]]


def _gemm(node: Node, shapes: Shapes) -> _Proposal | None:
    a, b = shapes.dims(node.input(0)), shapes.dims(node.input(1))
    if a is None or b is None:
        return None
    return [a[1 if node.attr("transA", 0) else 0], b[0 if node.attr("transB", 0) else 1]]


def _transpose(node: Node, shapes: Shapes) -> _Proposal | None:
    dims = shapes.dims(node.input(0))
    return None if dims is None else [dims[i] for i in node.attr("perm", list(range(len(dims)))[::-1])]


def reshaped(dims: Dims | None, target: Dims, allowzero: bool, shapes: Shapes) -> list[Dim | None]:
    """Dimensions after Reshape to `target`, which may hold 0 (copy) and -1 (the rest)."""
    result: list[Dim | None] = []
    for axis, goal in enumerate(target):
        if goal == Dim(0) and not allowzero:
            result.append(dims[axis] if dims is not None and axis < len(dims) else None)
        else:
            result.append(goal if shapes.is_size(goal) else None)
    if target.count(Dim(-1)) == 1 and dims is not None:
        rest = [d for d, goal in zip(result, target, strict=True) if goal != Dim(-1)]
        if all(d is not None for d in rest):
            result[target.index(Dim(-1))] = volume(dims).over(volume([d for d in rest if d is not None]))
    return result


def _reshape(node: Node, shapes: Shapes) -> _Proposal | None:
    target = shapes.values(node.input(1))
    return None if target is None else reshaped(shapes.dims(node.input(0)), target, bool(node.attr("allowzero", 0)), shapes)


def _flatten(node: Node, shapes: Shapes) -> _Proposal | None:
    dims = shapes.dims(node.input(0))
    if dims is None:
        return None
    axis = int(node.attr("axis", 1))
    axis += len(dims) if axis < 0 else 0
    return [volume(dims[:axis]), volume(dims[axis:])]


def _unsqueeze(node: Node, shapes: Shapes) -> _Proposal | None:
    dims, axes = shapes.dims(node.input(0)), ints_of(node, "axes", 1)
    if dims is None or axes is None:
        return None
    rank = len(dims) + len(axes)
    places, rest = {a % rank for a in axes}, iter(dims)
    return [ONE if i in places else next(rest) for i in range(rank)]


def _squeeze(node: Node, shapes: Shapes) -> _Proposal | None:
    dims, axes = shapes.dims(node.input(0)), ints_of(node, "axes", 1)
    if dims is None or axes is None:
        return None
    lost = {a % len(dims) for a in axes}
    return [d for i, d in enumerate(dims) if i not in lost]


def _gather(node: Node, shapes: Shapes) -> _Proposal | None:
    data, indices = shapes.dims(node.input(0)), shapes.dims(node.input(1))
    if data is None or indices is None:
        return None
    axis = int(node.attr("axis", 0)) % max(len(data), 1)
    return [*data[:axis], *indices, *data[axis + 1 :]]


def _concat(node: Node, shapes: Shapes) -> _Proposal | None:
    known = [shapes.dims(t) for t in node.inputs]
    first = known[0]
    if first is None or any(k is None or len(k) != len(first) for k in known) or not first:
        return None
    axis = int(node.attr("axis", 0)) % len(first)
    result: list[Dim | None] = list(first)
    parts = [k[axis] for k in known if k is not None]
    result[axis] = Dim(sum(d.factor for d in parts)) if all(d.static for d in parts) else None
    return result


def _slice(node: Node, shapes: Shapes) -> _Proposal | None:
    dims = shapes.dims(node.input(0))
    starts = shapes.dims(node.input(1)) if node.attr("starts") is None else (Dim(len(node.attr("starts"))),)
    axes = ints_of(node, "axes", 3)
    if axes is None and (starts is None or not starts[0].static or node.input(3) is not None):
        return None
    return _all_but(dims, axes if axes is not None else list(range(starts[0].factor if starts else 0)))


def _expand(node: Node, shapes: Shapes) -> _Proposal | None:
    dims, target = shapes.dims(node.input(0)), shapes.values(node.input(1))
    return None if dims is None or target is None or not all(map(shapes.is_size, target)) else broadcast([dims, target])


def _same(node: Node, shapes: Shapes) -> _Proposal | None:
    return shapes.dims(node.input(0))


def _batch(node: Node, shapes: Shapes) -> _Proposal | None:
    dims = shapes.dims(node.input(0))
    return None if not dims else [dims[0], *[None] * (len(dims) - 1)]


def _reduce(node: Node, shapes: Shapes) -> _Proposal | None:
    dims, axes = shapes.dims(node.input(0)), ints_of(node, "axes", 1)
    if dims is None or axes is None or not axes:
        return None
    lost = {a % len(dims) for a in axes}
    if node.attr("keepdims", 1):
        return [ONE if i in lost else d for i, d in enumerate(dims)]
    return [d for i, d in enumerate(dims) if i not in lost]


_REDUCTIONS = _words("ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSumExp ReduceSumSquare")
DIMS: dict[str, Callable[[Node, Shapes], _Proposal | None]] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_BROADCAST, _broadcast_rule),
    **dict.fromkeys(_BATCH, _batch),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Gather": _gather,
    "Concat": _concat,
    "Slice": _slice,
    "Expand": _expand,
}


# ---- contents of shape tensors ----
def _shape_value(node: Node, shapes: Shapes) -> Dims | None:
    dims = shapes.dims(node.input(0))
    return None if dims is None else dims[slice(node.attr("start", 0), node.attr("end"))]


def _gather_value(node: Node, shapes: Shapes) -> Dims | None:
    indices = array_of(node, 1)
    if indices is None or int(node.attr("axis", 0)) != 0:
        return None
    data = shapes.values(node.input(0))
    shape = producer_of(node.input(0), "Shape")
    picked: list[Dim | None] = []
    for index in indices.reshape(-1).tolist():
        if data is not None:
            picked.append(data[index] if -len(data) <= index < len(data) else None)
        elif shape is not None and not shape.attrs:
            picked.append(shapes.dim(shape.inputs[0], index))
        else:
            return None
    return None if None in picked else tuple(d for d in picked if d is not None)


def _slice_value(node: Node, shapes: Shapes) -> Dims | None:
    data = shapes.values(node.input(0))
    starts, ends = ints_of(node, "starts", 1), ints_of(node, "ends", 2)
    steps = [1] if node.input(4) is None else ints_of(node, "steps", 4)
    if data is None or starts is None or ends is None or steps is None or len(starts) != 1:
        return None
    return data[starts[0] : ends[0] : steps[0]] if steps[0] > 0 else None


def _same_value(node: Node, shapes: Shapes) -> Dims | None:
    return shapes.values(node.input(0)) if node.inputs[0].elem_type in INTEGERS else None


def _concat_value(node: Node, shapes: Shapes) -> Dims | None:
    parts = [shapes.values(t) for t in node.inputs]
    return None if any(p is None for p in parts) else tuple(d for p in parts if p is not None for d in p)


def _pairs(node: Node, shapes: Shapes) -> list[tuple[Dim, Dim]] | None:
    a, b = shapes.values(node.input(0)), shapes.values(node.input(1))
    if a is None or b is None or (len(a) != len(b) and 1 not in (len(a), len(b))):
        return None
    count = max(len(a), len(b)) if a and b else 0
    return list(zip(a * count if len(a) == 1 else a, b * count if len(b) == 1 else b, strict=False))[:count]


def _arithmetic(node: Node, shapes: Shapes) -> Dims | None:
    pairs = _pairs(node, shapes)
    if pairs is None:
        return None
    found = [_ARITHMETIC[node.op](a, b) for a, b in pairs]
    return None if None in found else tuple(d for d in found if d is not None)


def _sum(a: Dim, b: Dim, sign: int) -> Dim | None:
    if a.symbols == b.symbols:
        factor = a.factor + sign * b.factor
        return Dim(factor, a.symbols if factor else ())
    return a if b == Dim(0) else None


_ARITHMETIC: dict[str, Callable[[Dim, Dim], Dim | None]] = {
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a.over(b),  # only where exact, so rounding does not matter
    "Add": lambda a, b: _sum(a, b, 1) or _sum(b, a, 1),
    "Sub": lambda a, b: _sum(a, b, -1),
}


def _equal_value(node: Node, shapes: Shapes) -> Dims | None:
    found: list[Dim] = []
    for a, b in _pairs(node, shapes) or [(Dim(1, ("?",)), Dim(0))]:
        if a == b or (a.static and b.static):
            found.append(Dim(int(a == b)))
        elif (a.static and a.factor < 0 and shapes.is_size(b)) or (b.static and b.factor < 0 and shapes.is_size(a)):
            found.append(Dim(0))  # a size is never negative
        else:
            return None
    return tuple(found)


def _where_value(node: Node, shapes: Shapes) -> Dims | None:
    parts = [shapes.values(t) for t in node.inputs]
    known = [p for p in parts if p is not None]
    if len(known) != 3 or not all(d.static for d in known[0]):
        return None
    count = max(len(p) for p in known)
    if any(len(p) not in (1, count) for p in known):
        return None
    condition, yes, no = (p * count if len(p) == 1 else p for p in known)
    return tuple(y if c.factor else n for c, y, n in zip(condition, yes, no, strict=True))


def _fill_value(node: Node, shapes: Shapes) -> Dims | None:
    length = shapes.values(node.input(0))
    value = node.attr("value")
    if length is None or len(length) != 1 or not length[0].static or length[0].factor > LARGEST or value is None:
        return None
    return (Dim(int(np.asarray(numpy_helper.to_array(value)).reshape(-1)[0])),) * length[0].factor


def _product_value(node: Node, shapes: Shapes) -> Dims | None:
    if node.op == "Size":
        dims = shapes.dims(node.input(0))
        return None if dims is None else (volume(dims),)
    values = shapes.values(node.input(0))
    return None if values is None else (volume(values),)


VALUES: dict[str, Callable[[Node, Shapes], Dims | None]] = {
    "Shape": _shape_value,
    "Gather": _gather_value,
    "Slice": _slice_value,
    **dict.fromkeys(("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"), _same_value),
    "Concat": _concat_value,
    **dict.fromkeys(_ARITHMETIC, _arithmetic),
    "Equal": _equal_value,
    "Where": _where_value,
    "ConstantOfShape": _fill_value,
    **dict.fromkeys(("ReduceProd", "Size"), _product_value),
}
