"""Which channel of a producer stands at each place of a tensor: numbers carried along data movement, on real shapes.

Scaling output channel k of LayerNormalization, Gemm or Conv by r[k] scales what is made of it in the same way as long as every
node in between is positively homogeneous and mixes no two channels: data movement, Relu, LeakyRelu, a scalar factor, and MatMul
as its right operand (softmax(Q K^T) V is linear in each channel of V). Splitting and joining heads permutes channels; how is not
derived by hand: channel numbers are sent through the very nodes, in the shapes that samples have, and read off at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from qcompile.graph import Array, Const, Graph, Node, Tensor, Value
from qcompile.passes._match import is_op, scalar_of, split_operands
from qcompile.runtime import Feeds
from qcompile.sessions import graph_session, segment_session

SOURCES = ("LayerNormalization", "Gemm", "Conv")
_MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Slice", "Split", "Gather")
_HOMOGENEOUS = ("Relu", "LeakyRelu")


@dataclass(frozen=True)
class Reach:
    """Where the output of a source goes: channel numbers of each tensor on the way, and the nodes where the way ends."""

    labels: dict[Tensor, Array]
    ends: list[tuple[Node | None, Tensor]]  # None: the tensor is an output of the graph or read inside a body

    def columns(self, tensor: Tensor) -> Array | None:
        """The channel at each place of the last axis, where it is the same in every row; else None."""
        labels = self.labels.get(tensor)
        if labels is None or labels.size == 0 or labels.ndim == 0:
            return None
        rows = labels.reshape(-1, labels.shape[-1])
        return rows[0] if np.array_equal(np.broadcast_to(rows[:1], rows.shape), rows) else None


def source_of(tensor: Tensor) -> Node | None:
    """The LayerNormalization, Gemm or Conv whose channels `tensor` may be made of, going back along homogeneous nodes."""
    current: Tensor = tensor
    while True:
        node = current.producer
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op in SOURCES:
            return node if node.outputs[0] is current else None
        following = _carried_input(node)
        if following is None:
            return None
        current = following


def behind_moves(tensor: Tensor) -> Tensor:
    """The tensor that data movement made `tensor` from."""
    while tensor.producer is not None and is_op(tensor.producer, *_MOVES):
        tensor = tensor.producer.inputs[0]
    return tensor


def _carried_input(node: Node) -> Tensor | None:
    """The input whose channels `node` hands on; None where it does anything else."""
    if node.op in _MOVES:
        constant = node.op != "Gather" or node.constant(1) is not None
        return node.inputs[0] if constant and isinstance(node.inputs[0], Value) else None
    if node.op in _HOMOGENEOUS:
        return node.inputs[0]
    if node.op in ("Mul", "Div"):
        operands = split_operands(node)
        if operands is None or (node.op == "Div" and operands[0] is not node.inputs[0]) or len(operands[1].dims) > 1:
            return None
        factor = scalar_of(operands[1])
        return operands[0] if factor is not None and np.isfinite(factor) and factor != 0 else None
    return node.inputs[1] if node.op == "MatMul" and isinstance(node.inputs[1], Value) else None


class Tracer:
    """Follows channels forward from any of `sources`, in the shapes that `feeds` (one or two suffice) give the tensors."""

    def __init__(self, graph: Graph, sources: Iterable[Node], feeds: Sequence[Feeds]) -> None:
        self.graph = graph
        self.feeds = list(feeds)
        graph.sort()
        self._known = self._run(list(dict.fromkeys(sources)))

    def reach(self, source: Node) -> list[Reach]:
        """Where the channels of `source` go, once for each of the feeds."""
        return [self._follow(source, known) for known in self._known]

    def _run(self, sources: list[Node]) -> list[dict[Tensor, Array]]:
        """Values, on each of the feeds, of the sources' outputs and of whatever else the nodes behind them read."""
        near: set[Tensor] = {n.outputs[0] for n in sources}
        wanted: dict[Tensor, None] = dict.fromkeys(near)
        for node in self.graph.nodes:
            if any(t in near for t in node.inputs) and _carried_input(node) in near:
                near.update(node.outputs)
                wanted.update(dict.fromkeys(t for t in node.inputs if isinstance(t, Value) and t.name and t not in near))
        by_name = {t.name: t for t in wanted}
        watched = self.graph.copy()
        inputs = {v.name for v in watched.inputs}
        present = {o.name for o in watched.outputs}
        watched.outputs += [v for v in watched.values() if v.name in by_name and v.name not in present | inputs]
        session = graph_session(watched, label="tracing channels")
        found: list[dict[Tensor, Array]] = []
        for feed in self.feeds:
            values = {**feed, **session.run(feed, [n for n in session.output_names if n in by_name])}
            found.append({tensor: np.asarray(values[name]) for name, tensor in by_name.items()})
        return found

    def _follow(self, source: Node, known: dict[Tensor, Array]) -> Reach:
        output = source.outputs[0]
        shape = known[output].shape
        axis = 1 if source.op == "Conv" else len(shape) - 1
        numbers = np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        labels: dict[Tensor, Array] = {output: np.broadcast_to(numbers, shape)}
        ends: list[tuple[Node | None, Tensor]] = []
        for node in self.graph.nodes:
            hit = [t for t in dict.fromkeys([*node.inputs, *node.captured]) if t in labels]
            if not hit or node is source:
                continue
            made = self._through(node, labels, known) if len(hit) == 1 and _carried_input(node) is hit[0] else None
            if made is None:
                ends += [(node, t) for t in hit]
            else:
                labels.update(zip(node.outputs, made, strict=True))
        ends += [(None, t) for t in labels if self.graph.is_pinned(t)]
        return Reach(labels, ends)

    def _through(self, node: Node, labels: dict[Tensor, Array], known: dict[Tensor, Array]) -> list[Array] | None:
        """Channel numbers of the node's outputs; None where it would mix channels."""
        carried = _carried_input(node)
        assert carried is not None
        given = labels[carried]
        if node.op == "MatMul":
            return _product(given, known.get(node.inputs[0]))
        if node.op not in _MOVES:
            return [given]
        others = {t: known[t] for t in node.inputs if isinstance(t, Value) and t.name and t is not carried}
        assert isinstance(carried, Value)
        inputs = [(carried, np.dtype(np.int64)), *((t, a.dtype) for t, a in others.items() if isinstance(t, Value))]
        session = segment_session(self.graph, [node], inputs, node.outputs)
        feed = {carried.name: np.ascontiguousarray(given, np.int64), **{t.name: a for t, a in others.items()}}
        ran = session.run(feed)
        return [ran[o.name] for o in node.outputs]


def _product(right: Array, left: Array | None) -> list[Array] | None:
    """Numbers of left @ right: those of the right operand's columns, where each column is one channel."""
    if (
        left is None
        or left.ndim < 2
        or right.ndim < 2
        or not np.array_equal(np.broadcast_to(right[..., :1, :], right.shape), right)
    ):
        return None
    lead = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    shape = (*lead, left.shape[-2], right.shape[-1])
    return [np.broadcast_to(right[..., :1, :], shape)]


def same_columns(reaches: Sequence[Reach], tensor: Tensor) -> Array | None:
    """The channel at each place of the last axis of `tensor`, where all of `reaches` agree on it; else None."""
    found = [r.columns(tensor) for r in reaches]
    first = found[0] if found else None
    if first is None or any(f is None or not np.array_equal(f, first) for f in found):
        return None
    return first


def is_const_vector(tensor: Tensor | None, size: int) -> bool:
    """Whether `tensor` is a constant of shape [size]."""
    return isinstance(tensor, Const) and tensor.dims == (size,)


def is_layer_norm(node: Node) -> bool:
    """Whether `node` normalises the last axis alone, with a constant scale vector (and bias, if any)."""
    if not is_op(node, "LayerNormalization"):
        return False
    scale, bias = node.constant(1), node.input(2)
    if scale is None or len(scale.dims) != 1:
        return False
    rank = None if node.inputs[0].dims is None else len(node.inputs[0].dims)
    last = node.attr("axis", -1) in (-1, *([rank - 1] if rank is not None else []))
    return last and (bias is None or is_const_vector(bias, scale.dims[0]))
