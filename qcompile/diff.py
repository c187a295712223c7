"""`qcompile diff A B`: the first layer where two models part, and the layer that adds most, by one walk over both.

At every tensor that both compute (`matching`) two numbers are taken over all samples, with a the value in A and b in B:

    sqnr = |a|^2 / |a - b|^2                       how far they are apart there, with everything before
    own  = |a|^2 / |a - B's part on A's values|^2  what the part of B that leads there adds by itself

"By itself" means: from the last tensors before it that were compared, with A's values. A corrupted scale shows in `own` at its
layer alone, however far its error is carried. Integers are compared as what they stand for, where the file says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.check import Progress, paired_inputs
from qcompile.context import Context
from qcompile.data import Dataset, load_dataset
from qcompile.errors import ModelError
from qcompile.graph import Array, Const, Graph, Node, Tensor, Value
from qcompile.matching import QUANTISING, Matching
from qcompile.passes.fold_bn import FoldBatchNorm
from qcompile.sessions import segment_session
from qcompile.walk import Stream

SAMPLES = 8
# Where an operator of integers has the scale and zero point of its result.
_SCALES = {
    "QLinearConv": 6, "QLinearMatMul": 6, "QLinearAdd": 6, "QLinearMul": 6, "QGemm": 7, "QLinearGlobalAveragePool": 3,
    "QLinearAveragePool": 3, "QLinearLeakyRelu": 3, "QLinearSigmoid": 3, "QLinearConcat": 0, "QuantizeLinear": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One tensor that both models compute. layer: the node that it comes from, quantisation skipped; None stands for no error.

    A difference that is not finite (NaN or Inf in one model only) is -inf dB.
    constants: names of constants of B on the way here that differ from A's, with their largest relative change.
    """

    layer: str
    op: str
    tensor: str
    other_tensor: str
    identical: bool
    sqnr_db: float | None
    own_db: float | None
    constants: tuple[tuple[str, float], ...]

    def as_json(self) -> dict[str, Any]:
        """One entry of the result's `points`; `finite` is false, and the number null, where it is -inf dB."""
        levels = {"sqnr_db": self.sqnr_db, "own_db": self.own_db}
        plain = {key: None if value == -math.inf else value for key, value in levels.items()}
        return {**asdict(self), **plain, "finite": self.finite}

    @property
    def finite(self) -> bool:
        """Whether both numbers are."""
        return -math.inf not in (self.sqnr_db, self.own_db)


@dataclass(frozen=True)
class Difference:
    """All points in the order of A; first: where they part first (None: nowhere), worst: the one with the least `own_db`."""

    points: tuple[Point, ...]
    first: Point | None
    worst: Point | None
    samples: int
    nodes: tuple[int, int]
    within_db: float | None

    def as_json(self) -> dict[str, Any]:
        """The result as plain JSON."""
        return {
            "samples": self.samples,
            "nodes": list(self.nodes),
            "within_db": self.within_db,
            "first": None if self.first is None else self.first.as_json(),
            "worst": None if self.worst is None else self.worst.as_json(),
            "points": [point.as_json() for point in self.points],
        }


def diff_models(
    first: str | Path,
    second: str | Path,
    eval_data: str | Path | Dataset,
    *,
    samples: int = SAMPLES,
    within_db: float | None = None,
    preprocess: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Difference:
    """Where two models with the same inputs part, on at most `samples` samples.

    within_db: how far (sqnr) two tensors may be apart to count as equal; None: bit for bit.
    Raises ModelError where the models do not pair up, or have no tensor in common, and DataError.
    """
    paths = Path(first), Path(second)
    inputs, convert = paired_inputs(*paths)
    dataset = eval_data if isinstance(eval_data, Dataset) else None
    if dataset is None:
        dataset = load_dataset(str(eval_data), inputs, preprocess=preprocess, samples=samples, seed=seed)
    feeds = [sample.feeds for sample in islice(dataset, samples)]
    graphs = _load(paths[0]), _load(paths[1])
    walk = _Walk(*graphs, feeds, [convert(f) for f in feeds] if convert is not None else feeds)
    points = []
    for done, tensor in enumerate(walk.order):
        if progress is not None:
            progress("comparing", done, len(walk.order))
        point = walk.compare(tensor)
        if point is not None:
            points.append(point)
    if not points:
        raise ModelError(f"{paths[0]}, {paths[1]}: no tensor of the one was found in the other; are they of one origin?")
    apart = [
        p for p in points if not p.identical and (within_db is None or (math.inf if p.sqnr_db is None else p.sqnr_db) < within_db)
    ]
    adding = [p for p in points if p.own_db is not None]
    worst = min(adding, key=lambda p: p.own_db or 0.0) if adding else None
    counts = len(graphs[0].nodes), len(graphs[1].nodes)
    return Difference(tuple(points), next(iter(apart), None), worst, len(feeds), counts, within_db)


class _Walk:
    """Both models in step. order: A's tensors that are compared, in A's order."""

    def __init__(self, first: Graph, second: Graph, feeds: Sequence[Any], other_feeds: Sequence[Any]) -> None:
        self.matching = Matching(first, second)
        self.first, self.second = first, second
        self.worlds = Stream(first, feeds), Stream(second, other_feeds)
        tensors = self.matching.tensors
        reached = _reached(first)
        self.order = [
            o for n in first.nodes if n in self.matching.nodes and n in reached for o in n.outputs if _compared(o, tensors)
        ]
        self.other_type: set[Tensor] = set()  # B's tensors whose values are of another type than A's
        self.back: dict[Tensor, Value] = {tensors[t]: t for t in (*first.inputs, *self.order) if t in tensors}

    def compare(self, tensor: Value) -> Point | None:
        """The point at `tensor`; None where the two cannot be compared there (other shapes, or one has passed it already)."""
        other = self.matching.tensors[tensor]
        assert isinstance(other, Value)
        if any(world.passed(t) for world, t in zip(self.worlds, (tensor, other), strict=True)):
            return None
        segment, bounds = _segment(other, self.back)
        given = {bound: self._given(bound) for bound in bounds}
        here, there = self.worlds[0].values(tensor), self.worlds[1].values(other)
        if any(a.shape != b.shape for a, b in zip(here, there, strict=True)) or here[0].dtype.kind not in "fiub":
            self.back.pop(other, None)
            return None
        real, real_other = _real(tensor), _real(other)
        if here[0].dtype != there[0].dtype:
            self.other_type.add(other)
            if real(here[0]).dtype.kind != real_other(there[0]).dtype.kind:
                return None  # integers that move on in one model only, and nothing says what they stand for
        identical = all(np.array_equal(real(a), real_other(b), equal_nan=True) for a, b in zip(here, there, strict=True))
        known = {bound: values for bound, values in given.items() if values is not None}
        own = self._alone(segment, known, other) if len(known) == len(given) else None
        node = tensor.producer
        assert node is not None
        layer = _layer(node)
        return Point(
            layer=layer.label,
            op=layer.op,
            tensor=tensor.name,
            other_tensor=other.name,
            identical=identical,
            sqnr_db=decibels([real(a) for a in here], [real_other(b) for b in there]),
            own_db=None if own is None else decibels([real(a) for a in here], [real_other(b) for b in own]),
            constants=tuple(self._changed(segment)),
        )

    def _given(self, bound: Value) -> list[Array] | None:
        """What B's part is run on at `bound`: A's values where type and shape are B's, else B's; None where all are gone."""
        theirs = None if self.worlds[1].passed(bound) else self.worlds[1].values(bound)
        source = self.back.get(bound)
        if source is None or self.worlds[0].passed(source):
            return theirs
        ours = self.worlds[0].values(source)
        if theirs is None:
            return ours if bound not in self.other_type else None
        alike = all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(ours, theirs, strict=True))
        return ours if alike else theirs

    def _alone(self, segment: Sequence[Node], given: dict[Value, list[Array]], target: Value) -> list[Array] | None:
        """The part of B that leads to `target`, run on `given`."""
        if not given:
            return None
        session = segment_session(self.second, segment, [(b, arrays[0].dtype) for b, arrays in given.items()], [target])
        count = len(next(iter(given.values())))
        return [session.run({b.name: arrays[i] for b, arrays in given.items()})[target.name] for i in range(count)]

    def _changed(self, segment: Sequence[Node]) -> Iterator[tuple[str, float]]:
        """Constants of a segment of B that differ from those of the nodes of A that they match."""
        back = {theirs: ours for ours, theirs in self.matching.nodes.items()}
        for theirs in segment:
            ours = back.get(theirs)
            if ours is None:
                continue
            for a, b in zip(ours.inputs, theirs.inputs, strict=False):
                if isinstance(a, Const) and isinstance(b, Const):
                    change = _change(a.array(), b.array())
                    if change:
                        yield b.name, change


def decibels(wanted: Sequence[Array], got: Sequence[Array]) -> float | None:
    """10 log10(|a|^2 / |a - b|^2) over all samples, equal infinities and common NaN left out; None for no error."""
    signal = noise = 0.0
    for a, b in zip(wanted, got, strict=True):
        x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        unequal = ~((np.isinf(x) & (x == y)) | (np.isnan(x) & np.isnan(y)))
        x, y = x[unequal], y[unequal]
        with np.errstate(invalid="ignore"):  # Inf - Inf, which the noise shows
            signal += float(x @ x)
            noise += float(np.square(x - y).sum())
    if noise == 0:
        return None
    return 10 * math.log10(max(signal, 1e-30) / noise) if math.isfinite(noise) else -math.inf


def _load(path: Path) -> Graph:
    """The graph with BatchNormalization folded into the layers before it, as a quantised model has it."""
    graph = Graph.load(path)
    if any(node.op == "BatchNormalization" for node in graph.nodes):
        FoldBatchNorm().run(graph, Context())
    return graph


def _compared(tensor: Value, tensors: dict[Tensor, Tensor]) -> bool:
    """What is compared: results of nodes, Q left to the DQ behind it."""
    node = tensor.producer
    if not tensor.name or tensor not in tensors or node is None:
        return False
    behind = tensor.consumers
    return not (node.op == "QuantizeLinear" and behind and all(n.op == "DequantizeLinear" for n in behind))


def _reached(graph: Graph) -> set[Node]:
    """Nodes that depend on an input of the graph."""
    reached: set[Node] = set()
    inputs = set(graph.inputs)
    for node in graph.nodes:
        sources = [*node.inputs, *node.captured]
        if any(t in inputs or t.producer in reached for t in sources if isinstance(t, Value)):
            reached.add(node)
    return reached


def _segment(target: Value, known: dict[Tensor, Value]) -> tuple[list[Node], list[Value]]:
    """(nodes in order, tensors they start from) of what leads to `target` from tensors that were compared before."""
    nodes: list[Node] = []
    bounds: dict[Value, None] = {}
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        stack: list[tuple[Node, bool]] = [(node, False)]
        while stack:
            current, ready = stack.pop()
            if ready:
                nodes.append(current)
                continue
            if current in seen:
                continue
            seen.add(current)
            stack.append((current, True))
            for tensor in (*current.inputs, *current.captured):
                if not isinstance(tensor, Value) or not tensor.name:
                    continue
                if tensor in known or tensor.producer is None:
                    bounds[tensor] = None
                else:
                    stack.append((tensor.producer, False))

    producer = target.producer
    assert producer is not None
    visit(producer)
    return nodes, list(bounds)


def _layer(node: Node) -> Node:
    """The node that is named: before quantisation, where the tensor comes from it."""
    while node.op in QUANTISING:
        before = node.inputs[0].producer
        if before is None:
            return node
        node = before
    return node


def _real(tensor: Value) -> Any:
    """What integers of a tensor stand for, where its producer says so; else the numbers as they are."""
    node = tensor.producer
    place = None if node is None else _SCALES.get(node.op)
    if node is None or place is None or len(node.inputs) <= place + 1:
        return lambda array: array
    scale, zero = node.inputs[place], node.inputs[place + 1]
    if not isinstance(scale, Const) or not isinstance(zero, Const) or scale.array().size != 1:
        return lambda array: array
    s, z = float(scale.array().reshape(-1)[0]), int(zero.array().reshape(-1)[0])
    return lambda array: (array.astype(np.float64) - z) * s if array.dtype.kind in "iu" else array


def _change(a: Array, b: Array) -> float:
    """Largest change relative to the largest magnitude; infinite for other shapes or types, and where it is no number."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if a.dtype.kind not in "fiub" or np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
        return 0.0
    largest = float(np.abs(a.astype(np.float64)).max(initial=0.0)) or 1.0
    with np.errstate(invalid="ignore"):
        change = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()) / largest
    return change if math.isfinite(change) else math.inf
