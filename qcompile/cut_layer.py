"""A model cut in front of one layer: what stands before it is computed once, what follows runs again for any weights of it.

The layer's weights (and bias) are inputs of the session, so that none is built anew for others, and late layers cost little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from onnx import ModelProto

from qcompile.graph import Array, Graph, Node, Tensor, Value
from qcompile.runtime import Feeds
from qcompile.sessions import segment_model, segment_session

_READ = "qcompile_layer_input"  # the layer's own input where it is fed apart from its other readers


@dataclass(frozen=True)
class LayerSpec:
    """A layer that may have its own width: `node` by name, its weight and bias constants, and how its weights lie.

    kind: linear (Conv, Gemm, MatMul; `axis` of its output channels) | table (rows that Gather looks up). weights: how many, in
    `channels` that each have a scale. paired: the pair rule of `--target any` holds for it.
    """

    node: str
    op: str
    kind: str
    weight: str
    bias: str | None
    axis: int
    weights: int
    channels: int
    paired: bool = False


class CutLayer:
    """One layer of `graph` (not changed) with the samples brought up to it. Raises ModelError where a part cannot be run."""

    def __init__(self, graph: Graph, spec: LayerSpec, feeds: Sequence[Feeds]) -> None:
        self.spec = spec
        own = graph.copy()
        self.weight = own.constants[spec.weight].array()
        self.bias = None if spec.bias is None else own.constants[spec.bias].array()
        self.node = next(n for n in own.nodes if n.name == spec.node)
        moved: list[Tensor] = []
        for name in (spec.weight, spec.bias):
            if name is not None:
                moved.append(Value(name))
                own.replace_uses(own.constants[name], moved[-1])
        nodes = behind(own, moved)
        made = {o for n in nodes for o in n.outputs}
        before = [t for t in read_by(nodes) if t not in made and t not in moved]
        outputs = [t for t in own.outputs if isinstance(t, Value)]
        self._cut = values_of(own, before, feeds)
        self._clean = values_of(own, [t for t in outputs if t not in made], feeds)
        entries = [(v, self._cut[0][v.name].dtype) for v in before]
        entries += [(v, own.constants[v.name].array().dtype) for v in moved if isinstance(v, Value)]
        self.inputs: list[Array] = []
        source = self.node.inputs[0]
        if spec.kind == "linear" and isinstance(source, Value):
            self.inputs = [cut[source.name] for cut in self._cut]
            apart = Value(_READ)
            own.replace_uses(source, apart, only=lambda n: n is self.node)
            entries = [e for e in entries if e[0] is not source or source in read_by(nodes)]
            entries.append((apart, self.inputs[0].dtype))
        self.entries = [v.name for v, _ in entries]
        ends = [t for t in outputs if t in made]
        self.made = [t.name for t in ends]
        self._part = partial(segment_model, own, nodes, entries, ends)
        self._session = segment_session(own, nodes, entries, ends, threads=1)

    def model(self) -> ModelProto:
        """What follows the layer, the layer with it: inputs `entries`, its weight and bias among them, and outputs `made`."""
        return self._part()

    def run(
        self, index: int, weight: Array | None = None, bias: Array | None = None, source: Array | None = None
    ) -> dict[str, Array]:
        """The model's outputs for sample `index` with this weight, bias and layer input in place of its own."""
        return {**self._clean[index], **self._session.run(self.feed(index, weight, bias, source))}

    def feed(
        self, index: int, weight: Array | None = None, bias: Array | None = None, source: Array | None = None
    ) -> dict[str, Array]:
        """What the part that follows reads for sample `index`, by name."""
        feed = {name: value for name, value in self._cut[index].items() if name in self.entries}
        feed[self.spec.weight] = self.weight if weight is None else weight
        if self.spec.bias is not None and self.bias is not None:
            feed[self.spec.bias] = self.bias if bias is None else bias
        if _READ in self.entries:
            feed[_READ] = self.inputs[index] if source is None else source
        return feed


def behind(graph: Graph, moved: Sequence[Tensor]) -> list[Node]:
    """Nodes that depend on `moved`, in order."""
    graph.sort()
    found = []
    touched: set[Tensor] = set(moved)
    for node in graph.nodes:
        if any(t in touched for t in (*node.inputs, *node.captured)):
            found.append(node)
            touched.update(node.outputs)
    return found


def read_by(nodes: Sequence[Node]) -> list[Value]:
    """Computed tensors and inputs that `nodes` read, each once."""
    read = dict.fromkeys(t for n in nodes for t in (*n.inputs, *n.captured))
    return [t for t in read if isinstance(t, Value) and t.name]


def values_of(graph: Graph, wanted: Sequence[Value], feeds: Sequence[Feeds]) -> list[dict[str, Array]]:
    """`wanted` of every sample, by name."""
    given = {v.name for v in graph.inputs}
    computed = [v for v in wanted if v.name not in given]
    found: list[dict[str, Array]] = [{v.name: np.asarray(f[v.name]) for v in wanted if v.name in given} for f in feeds]
    if not computed:
        return found
    needed: set[Node] = set()
    stack: list[Tensor] = list(computed)
    while stack:
        producer = stack.pop().producer
        if producer is not None and producer not in needed:
            needed.add(producer)
            stack.extend((*producer.inputs, *producer.captured))
    nodes = [n for n in graph.nodes if n in needed]
    ends = [v for v in graph.inputs if any(v in (*n.inputs, *n.captured) for n in nodes)]
    entries = [(v, np.asarray(feeds[0][v.name]).dtype) for v in ends]
    session = segment_session(graph, nodes, entries, computed, threads=1)
    for row, feed in zip(found, feeds, strict=True):
        row.update(session.run({v.name: np.asarray(feed[v.name]) for v in ends}))
    return found
