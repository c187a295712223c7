"""The walk: what goes in and out of each node, in the float world and in the quantised one, segment by segment.

A `Stream` runs one graph over a bounded list of samples. Asked for a tensor, it runs just the nodes that lead from what it holds
to that tensor, as one onnxruntime session used for all samples, and frees what no later node reads. A sweep over all layers thus
costs about one pass over the sample, whatever their number, and memory is the widest cut of the graph, not its sum.
DequantizeLinear is never held: it is run again where it is read, so that quantised tensors are held as integers and fuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.graph import Graph, Node, Tensor, Value
from qcompile.runtime import Feeds
from qcompile.sessions import segment_session

Array = npt.NDArray[Any]


class Stream:
    """One graph, run forward over `feeds` as far as is asked for. Constants may be changed ahead of the front."""

    def __init__(self, graph: Graph, feeds: Sequence[Feeds]) -> None:
        graph.sort()
        self.graph = graph
        self._done: set[Node] = set()
        self._held: dict[Tensor, list[Array]] = {v: [np.asarray(f[v.name]) for f in feeds] for v in graph.inputs}
        self._count = len(feeds)

    def values(self, tensor: Value) -> list[Array]:
        """The tensor's value for each sample, in order. Tensors are asked for in graph order, each while it is still read."""
        if tensor not in self._held:
            self._advance([tensor])
        return self._held[tensor]

    def passed(self, tensor: Value) -> bool:
        """Whether it was computed, or is an input, and is held no more."""
        return tensor not in self._held and (tensor.producer is None or tensor.producer in self._done)

    def _advance(self, targets: Iterable[Value]) -> None:
        targets = list(targets)
        segment = self._leading_to(targets)
        fresh = {n for n in segment if not _free(n)}
        self._done |= fresh
        made = [o for n in self.graph.nodes if n in fresh for o in n.outputs if o.name]
        outputs = [v for v in made if v in targets or self._read_later(v)]
        outputs += [t for t in targets if t not in outputs]
        nodes = [n for n in self.graph.nodes if n in segment]
        inside = {o for n in nodes for o in n.outputs}
        inputs = [
            t
            for t in dict.fromkeys(t for n in nodes for t in [*n.inputs, *n.captured])
            if isinstance(t, Value) and t.name and t not in inside
        ]
        session = segment_session(self.graph, nodes, [(v, self._held[v][0].dtype) for v in inputs], outputs)
        results: dict[Tensor, list[Array]] = {v: [] for v in outputs}
        for index in range(self._count):
            ran = session.run({v.name: self._held[v][index] for v in inputs})
            for value in outputs:
                results[value].append(ran[value.name])
        self._held.update(results)
        keep = set(targets)
        self._held = {v: a for v, a in self._held.items() if v in keep or self._read_later(v)}

    def _leading_to(self, targets: Sequence[Value]) -> set[Node]:
        """Nodes not run yet that compute `targets`, DequantizeLinear in between included."""
        segment: set[Node] = set()
        stack: list[Tensor] = list(targets)
        while stack:
            tensor = stack.pop()
            node = tensor.producer
            if node is None or node in segment or tensor in self._held:
                continue
            segment.add(node)
            stack.extend([*node.inputs, *node.captured])
        return segment

    def _read_later(self, value: Tensor) -> bool:
        """Whether a node that has not run yet reads it, directly or through a DequantizeLinear."""
        for node in value.outputs:
            if _free(node):
                if self._read_later(node.outputs[0]):
                    return True
            elif node not in self._done:
                return True
        return any(value in n.captured for n in self.graph.nodes if n.captured and n not in self._done)


def _free(node: Node) -> bool:
    """Nodes that are run again wherever they are read: their output would be held four times larger than their input."""
    return node.op == "DequantizeLinear"


def mean_of(arrays: Iterable[Array]) -> list[tuple[Array, int]]:
    """(mean over samples in float64, number of samples) for each distinct shape: linear nodes commute with it."""
    sums: dict[tuple[int, ...], tuple[Array, int]] = {}
    for array in arrays:
        total, count = sums.get(array.shape, (0.0, 0))
        sums[array.shape] = (total + array.astype(np.float64), count + 1)
    return [(total / count, count) for total, count in sums.values()]


def linear_mean(node: Node, weight: Array, means: Sequence[tuple[Array, int]]) -> Array:
    """Per-channel mean, without bias, of Conv, Gemm or MatMul `node` with float `weight`, from the means of its inputs.

    A linear node's mean output is its output for the mean input: one evaluation for each shape, however many samples.
    Returns float64 [channels].
    """
    total: Array = np.zeros(1)
    positions = 0
    for mean, count in means:
        if node.op in ("Gemm", "MatMul"):
            rows = mean.reshape(-1, mean.shape[-1])
            matrix = weight.T if node.attr("transB", 0) else weight
            total = total + count * (rows.sum(axis=0) @ matrix.astype(np.float64))
            positions += count * rows.shape[0]
            continue
        output = _convolve(node, mean, weight).astype(np.float64)
        total = total + count * output.sum(axis=(0, *range(2, output.ndim)))
        positions += count * (output.size // output.shape[1])
    return total / max(positions, 1)


def _convolve(node: Node, x: Array, weight: Array) -> Array:
    source, kernel, result = Value("x"), Value("w"), Value("y")
    copy = Node("Conv", "conv", [source, kernel], [result], attrs=dict(node.attrs))
    session = segment_session(None, [copy], [(source, np.dtype(np.float32)), (kernel, np.dtype(np.float32))], [result])
    return session.run({"x": x.astype(np.float32), "w": weight.astype(np.float32)})["y"]


def dequantise(integers: Array, scale: np.float32, zero_point: int) -> Array:
    """float32 values of an integer activation tensor."""
    return np.multiply((integers.astype(np.int32) - zero_point).astype(np.float32), scale, dtype=np.float32)
