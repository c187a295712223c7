"""How channels go through operators, one rule an operator; see `_prune_trace`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from qcompile.graph import Const, Graph, Node, Tensor
from qcompile.passes._match import ints_of
from qcompile.passes._prune_reshape import flatten, reshape
from qcompile.passes._prune_trace import Label, Trace, is_shared, own_constant

Keep = npt.NDArray[np.bool_]

_UNKNOWN = "an operator reads its channels that pruning does not know"
_SHARED = "weights are computed at run time, or shared by several nodes"


def trace(graph: Graph, keep: Callable[[Node], bool]) -> Trace:
    """Follow all channels of the sorted `graph`, whose shapes must have been inferred. keep: layers that stay as they are."""
    found = Trace(graph)
    for node in graph.nodes:
        rule = _RULES.get(node.op) if node.domain in ("", "ai.onnx") and not node.captured else None
        if rule is None:
            found.freeze_inputs(node, _UNKNOWN)
            continue
        rule(found, node)
        if keep(node):
            found.freeze_inputs(node, "kept by --keep")
            for output in node.outputs:
                label = found.label(output)
                if label is not None:
                    found.freeze(label.ids, "kept by --keep")
    for output in graph.outputs:
        label = found.label(output)
        if label is not None:
            found.freeze(label.ids, "its channels are an output of the model")
    return found


def _same(t: Trace, node: Node) -> None:
    """Channels go on as they are."""
    label = t.label(node.inputs[0])
    if label is not None:
        t.mark(node.outputs[0], label.axis, label.ids)


def _pool(t: Trace, node: Node) -> None:
    if len(node.outputs) > 1:
        t.freeze_inputs(node, _UNKNOWN)
        return
    label = t.label(node.inputs[0])
    if label is not None and label.axis != 1:
        t.freeze(label.ids, _UNKNOWN)
    else:
        _same(t, node)


def _conv(t: Trace, node: Node) -> None:
    weight, label = node.constant(1), t.label(node.inputs[0])
    if weight is None or is_shared(weight) or (node.input(2) is not None and node.constant(2) is None):
        t.freeze_inputs(node, _SHARED)
        return
    groups = int(node.attr("group", 1))
    if label is not None and label.axis != 1:
        t.freeze(label.ids, _UNKNOWN)
        label = None
    if groups == 1:
        if label is not None:
            t.slot(node, 1, 1, label.ids, "in")
        ids = t.fresh(weight.dims[0])
        t.slot(node, 1, 0, ids, "out")
    elif weight.dims[1] == 1 and label is not None and len(label.ids) == groups:
        ids = np.repeat(label.ids, weight.dims[0] // groups)
        t.slot(node, 1, 0, ids, "through")
        t.resize(label.ids, lambda keep: node.set_attr("group", int(keep.sum())))
    else:
        t.freeze_inputs(node, "grouped convolution: its groups would become unequal")
        return
    if node.input(2) is not None:
        t.slot(node, 2, 0, ids, "other")
    t.mark(node.outputs[0], 1, ids)


def _product(t: Trace, node: Node) -> None:
    weight, label = node.constant(1), t.label(node.inputs[0])
    if weight is None:
        _activations(t, node)
        return
    rank = _rank(node.inputs[0])
    if is_shared(weight) or len(weight.dims) != 2 or rank is None or node.attr("transA", 0):
        t.freeze_inputs(node, _SHARED)
        return
    turned = int(bool(node.attr("transB", 0)))
    if label is not None and label.axis == rank - 1:
        t.slot(node, 1, turned, label.ids, "in")
    elif label is not None:
        t.freeze(label.ids, _UNKNOWN)
    ids = t.fresh(weight.dims[1 - turned])
    t.slot(node, 1, 1 - turned, ids, "out")
    bias = node.input(2)
    if bias is not None:
        if not isinstance(bias, Const) or (bias.dims and any(d != 1 for d in bias.dims[:-1])):
            t.freeze(ids, "its bias is no row of numbers")
        elif bias.dims and bias.dims[-1] == len(ids):
            t.slot(node, 2, len(bias.dims) - 1, ids, "other")
    t.mark(node.outputs[0], rank - 1, ids)


def _activations(t: Trace, node: Node) -> None:
    """A product of two activations: axes before the last two (heads) go on."""
    labels = [t.label(x) for x in node.inputs[:2]]
    ranks = [_rank(x) for x in node.inputs[:2]]
    a, b = labels
    if a is None and b is None:
        return
    alike = a is not None and b is not None and a.axis == b.axis and len(a.ids) == len(b.ids)
    if node.op != "MatMul" or not alike or ranks[0] is None or ranks[0] != ranks[1] or a is None or a.axis >= ranks[0] - 2:
        t.freeze_inputs(node, "a product of activations sums over its channels")
        return
    assert b is not None
    t.unite(a.ids, b.ids)
    t.mark(node.outputs[0], a.axis, a.ids)


def _binary(t: Trace, node: Node) -> None:
    left, right = node.inputs[:2]
    labels = [(x, label) for x in (left, right) if (label := t.label(x)) is not None]
    if not labels:
        return
    out_rank = max((r for r in (_rank(left), _rank(right)) if r is not None), default=0)
    tensor, label = labels[0]
    behind = label.axis - (_rank(tensor) or 0)  # from the right
    if len(labels) == 2:
        other = labels[1][1]
        if other.axis - (_rank(right) or 0) != behind or len(other.ids) != len(label.ids):
            t.freeze_inputs(node, _UNKNOWN)
            return
        t.unite(label.ids, other.ids)
    elif not _broadcasts(t, node, right if tensor is left else left, behind, label):
        t.freeze_inputs(node, _UNKNOWN)
        return
    t.mark(node.outputs[0], out_rank + behind, label.ids)


def _broadcasts(t: Trace, node: Node, other: Tensor, behind: int, label: Label) -> bool:
    """Whether an operand without channels fits whatever stays; a constant that runs over them is cut with them."""
    dims = other.dims
    if dims is None:
        return False
    size = dims[behind] if len(dims) >= -behind else 1
    if size == 1:
        return True
    if not isinstance(other, Const) or size != len(label.ids):
        return False
    index = next(i for i, x in enumerate(node.inputs) if x is other)
    t.slot(node, index, len(dims) + behind, label.ids, "other")
    return True


def _batch_norm(t: Trace, node: Node) -> None:
    label = t.label(node.inputs[0])
    if label is None:
        return
    if label.axis != 1 or any(node.constant(i) is None for i in range(1, len(node.inputs))):
        t.freeze_inputs(node, _UNKNOWN)
        return
    for index in range(1, len(node.inputs)):
        t.slot(node, index, 0, label.ids, "other")
    _same(t, node)


def _concat(t: Trace, node: Node) -> None:
    labels = [t.label(x) for x in node.inputs]
    rank = _rank(node.outputs[0])
    if not any(labels):
        return
    axis = int(node.attr("axis", 0)) + (rank or 0) * (node.attr("axis", 0) < 0)
    if all(label is None or label.axis == axis for label in labels):
        parts = []
        for tensor, label in zip(node.inputs, labels, strict=True):
            size = None if tensor.dims is None else tensor.dims[axis]
            if label is None and not isinstance(size, int):
                t.freeze_inputs(node, _UNKNOWN)
                return
            part = t.fresh(int(size)) if label is None else label.ids  # type: ignore[arg-type]
            if label is None:
                t.freeze(part, _UNKNOWN)
            parts.append(part)
        t.mark(node.outputs[0], axis, np.concatenate(parts))
        return
    first = labels[0]
    if first is None or any(x is None or x.axis != first.axis or len(x.ids) != len(first.ids) for x in labels):
        t.freeze_inputs(node, _UNKNOWN)
        return
    for label in labels[1:]:
        assert label is not None
        t.unite(first.ids, label.ids)
    t.mark(node.outputs[0], first.axis, first.ids)


def _split(t: Trace, node: Node) -> None:
    label, rank = t.label(node.inputs[0]), _rank(node.inputs[0])
    if label is None or rank is None:
        return
    axis = int(node.attr("axis", 0)) % rank
    if axis != label.axis:
        for output in node.outputs:
            t.mark(output, label.axis, label.ids)
        return
    sizes = ints_of(node, "split", 1) or [-(-len(label.ids) // len(node.outputs))] * len(node.outputs)
    if sum(sizes) != len(label.ids):
        t.freeze_inputs(node, _UNKNOWN)
        return
    ends = np.cumsum([0, *sizes])
    for output, (begin, end) in zip(node.outputs, pairwise(ends), strict=True):
        t.mark(output, axis, label.ids[begin:end])
        t.parts.append(label.ids[begin:end])

    def change(keep: Keep) -> None:
        now = [int(keep[a:b].sum()) for a, b in pairwise(ends)]
        node.attrs.pop("num_outputs", None)
        const = t.graph.constant(node.label + "_split", np.asarray(now, np.int64))
        if len(node.inputs) > 1:
            node.inputs[1] = const
        else:
            node.inputs.append(const)

    t.resize(label.ids, change)


def _slice(t: Trace, node: Node) -> None:
    label, rank = t.label(node.inputs[0]), _rank(node.inputs[0])
    if label is None:
        return
    axes = ints_of(node, "axes", 3)
    if rank is None or axes is None or label.axis in [a % rank for a in axes]:
        t.freeze_inputs(node, "its channels are sliced")
        return
    _same(t, node)


def _gather(t: Trace, node: Node) -> None:
    label, rank = t.label(node.inputs[0]), _rank(node.inputs[0])
    indices = node.constant(1)
    if label is None and t.label(node.inputs[1]) is None:
        return
    axis = int(node.attr("axis", 0)) % (rank or 1)
    if label is None or rank is None or indices is None or axis == label.axis:
        t.freeze_inputs(node, _UNKNOWN)
        return
    t.mark(node.outputs[0], label.axis + (len(indices.dims) - 1) * (axis < label.axis), label.ids)


def _pad(t: Trace, node: Node) -> None:
    label, rank = t.label(node.inputs[0]), _rank(node.inputs[0])
    pads = ints_of(node, "pads", 1)
    if label is None:
        return
    if rank is None or pads is None or len(pads) != 2 * rank or node.input(3) is not None:
        t.freeze_inputs(node, _UNKNOWN)
        return
    begin, end = pads[label.axis], pads[label.axis + rank]
    if begin == 0 == end:
        _same(t, node)
        return
    if begin < 0 or end < 0 or node.attr("mode", "constant") != "constant" or node.constant(1) is None:
        t.freeze_inputs(node, _UNKNOWN)
        return
    before, after = t.fresh(begin), t.fresh(end)
    axis = label.axis

    def change(keep: Keep) -> None:
        now = list(pads)
        now[axis], now[axis + rank] = int(keep[:begin].sum()), int(keep[begin:].sum())
        own_constant(t.graph, node, 1, np.asarray(now, np.int64))

    t.resize(np.concatenate([before, after]), change)
    t.mark(node.outputs[0], axis, np.concatenate([before, label.ids, after]))


def _transpose(t: Trace, node: Node) -> None:
    label, rank = t.label(node.inputs[0]), _rank(node.inputs[0])
    if label is None:
        return
    perm = node.attr("perm", None) or (list(range(rank))[::-1] if rank is not None else None)
    if perm is None:
        t.freeze_inputs(node, _UNKNOWN)
        return
    t.mark(node.outputs[0], list(perm).index(label.axis), label.ids)


def _normalised(t: Trace, node: Node) -> None:
    """Softmax and LayerNormalization: what is summed over stays whole."""
    label, rank = t.label(node.inputs[0]), _rank(node.inputs[0])
    if label is None:
        return
    axis = None if rank is None else int(node.attr("axis", -1)) % rank
    summed = axis is None or (label.axis == axis if node.op != "LayerNormalization" else label.axis >= axis)
    if summed or any(t.label(x) for x in node.inputs[1:]):
        t.freeze_inputs(node, f"{node.op} runs over its channels")
        return
    _same(t, node)


def _reduce(t: Trace, node: Node) -> None:
    label, rank = t.label(node.inputs[0]), _rank(node.inputs[0])
    if label is None:
        return
    axes = ints_of(node, "axes", 1)
    if rank is None or not axes or label.axis in [a % rank for a in axes]:
        t.freeze_inputs(node, f"{node.op} runs over its channels")
        return
    gone = 0 if node.attr("keepdims", 1) else sum(a % rank < label.axis for a in axes)
    t.mark(node.outputs[0], label.axis - gone, label.ids)


def _squeeze(t: Trace, node: Node) -> None:
    label, rank = t.label(node.inputs[0]), _rank(node.inputs[0])
    if label is None:
        return
    axes = ints_of(node, "axes", 1)
    if rank is None or axes is None:
        t.freeze_inputs(node, _UNKNOWN)
        return
    if node.op == "Squeeze":
        if label.axis in [a % rank for a in axes]:
            t.freeze_inputs(node, "its only channel is squeezed away")
            return
        t.mark(node.outputs[0], label.axis - sum(a % rank < label.axis for a in axes), label.ids)
        return
    wide = rank + len(axes)
    added = {a % wide for a in axes}
    places = [a for a in range(wide) if a not in added]
    t.mark(node.outputs[0], places[label.axis], label.ids)


def _shape(t: Trace, node: Node) -> None:
    label, rank = t.label(node.inputs[0]), _rank(node.inputs[0])
    if label is None:
        return
    start, end = int(node.attr("start", 0)), node.attr("end", None)
    if rank is None or label.axis in range(rank)[start:end]:
        t.freeze_inputs(node, "a shape is computed from the number of its channels")


def _resize(t: Trace, node: Node) -> None:
    label, scales = t.label(node.inputs[0]), node.constant(2)
    if label is None:
        return
    if scales is None or node.input(3) is not None or scales.array().reshape(-1)[label.axis : label.axis + 1].tolist() != [1.0]:
        t.freeze_inputs(node, _UNKNOWN)
        return
    _same(t, node)


def _rank(tensor: Tensor) -> int | None:
    return None if tensor.dims is None else len(tensor.dims)


_ELEMENTWISE = (
    "Relu", "Clip", "LeakyRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Mish", "Gelu", "Erf", "Tanh",
    "Softplus", "Softsign", "Exp", "Sqrt", "Neg", "Abs", "Identity", "Dropout", "Cast",
)  # fmt: skip
_RULES: dict[str, Callable[[Trace, Node], None]] = {
    **dict.fromkeys(_ELEMENTWISE, _same),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _pool),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow"), _binary),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax"), _reduce),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), _squeeze),
    **dict.fromkeys(("Softmax", "LogSoftmax", "LayerNormalization"), _normalised),
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    "Conv": _conv,
    "Flatten": flatten,
    "Gather": _gather,
    "Gemm": _product,
    "MatMul": _product,
    "Pad": _pad,
    "Reshape": reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Transpose": _transpose,
}
