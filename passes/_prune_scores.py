"""What the loss of a unit of channels would cost: a number for each, comparable across layers.

l1             mean |w| of the filters that make it, over the mean of its layer (Li et al. 2017)
hrank          mean rank of its feature maps, over the largest rank they could have (HRank, Lin et al. 2020)
second-order   sum over its readers of  gain * w_P ([H^-1]_PP)^-1 w_P^T / (w H w^T): what the output of each loses once the
               other inputs have made up for it (OBS, Hassibi 1993, for a block of weights), as a share of the output's
               energy, times the part of such noise that reaches the model's outputs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qcompile.graph import Array, Graph, Node, Value
from qcompile.moments import input_covariance, input_variance
from qcompile.passes._linear import output_axis
from qcompile.passes._prune_trace import Slot, Trace
from qcompile.passes.round_weights import weight_matrix, weight_tensor
from qcompile.rounding import WIDEST, damped_factor
from qcompile.sessions import graph_session
from qcompile.walk import Stream

_DAMPING = 0.01
_TRIALS = 16  # samples on which noise is followed to the outputs
_NOISE = 0.01
_MAPS = 16  # samples whose feature maps are looked at: ranks hardly differ from sample to sample (HRank, section 3)


def weight_rows(node: Node, weight: Array) -> Array:
    """[channels, K] of a Conv, Gemm or MatMul in the kernel's order."""
    axis = output_axis(node)
    return weight_matrix(np.asarray(weight, np.float64), node.op, axis)


def columns_of(slot: Slot, weight: Array) -> Array:
    """Which channel of `slot` each of the K columns of `weight_rows` reads."""
    if slot.node.op != "Conv":
        return np.arange(len(slot.ids))
    return np.tile(np.arange(len(slot.ids)), int(np.prod(weight.shape[2:])))


def l1(trace: Trace) -> dict[int, float]:
    """By root."""
    found: dict[int, list[float]] = {}
    for slot in trace.of_role("out"):
        size = np.abs(weight_rows(slot.node, _weight(slot.node))).mean(axis=1)
        size = size / max(float(size.mean()), 1e-30)
        for root, value in zip(trace.roots(slot.ids).tolist(), size.tolist(), strict=True):
            found.setdefault(root, []).append(value)
    return {root: float(np.mean(values)) for root, values in found.items()}


def hrank(trace: Trace, graph: Graph, samples: Sequence[Mapping[str, Array]]) -> dict[int, float]:
    """By root; units without feature maps are left out."""
    found: dict[int, list[float]] = {}
    stream = Stream(graph.copy(), samples[:_MAPS])
    nodes = {n.outputs[0].name: n for n in stream.graph.nodes}
    for slot in trace.of_role("in"):
        source = nodes[slot.node.outputs[0].name].inputs[0]
        assert isinstance(source, Value)
        maps = stream.values(source)
        if maps[0].ndim != 4:
            continue
        ranks = np.mean([np.linalg.matrix_rank(m.astype(np.float64)).mean(axis=0) for m in maps], axis=0)
        share = ranks / max(min(maps[0].shape[2:]), 1)
        for root, value in zip(trace.roots(slot.ids).tolist(), share.tolist(), strict=True):
            found.setdefault(root, []).append(float(value))
    return {root: float(np.mean(values)) for root, values in found.items()}


class SecondOrder:
    """The layers that read units, each with its weights and inverse moment as units go.

    A layer's loss counts by how much noise at its output reaches the model's outputs (`gains`).
    """

    def __init__(self, trace: Trace, graph: Graph, samples: Sequence[dict[str, Array]], seed: int) -> None:
        self.readers: list[_Reader] = []
        stream = Stream(graph.copy(), samples)
        nodes = {n.outputs[0].name: n for n in stream.graph.nodes}
        for slot in trace.of_role("in"):
            node = nodes[slot.node.outputs[0].name]
            source, weight = node.inputs[0], _weight(slot.node)
            assert isinstance(source, Value)
            values = stream.values(source)
            roots = trace.roots(slot.ids)[columns_of(slot, weight)]
            self.readers.append(_Reader(slot.node, weight, roots, node, values, seed))
        for reader, gain in zip(self.readers, _gains(graph, self.readers, samples[:_TRIALS], seed), strict=True):
            reader.gain = gain

    def scores(self) -> Mapping[int, float]:
        """The sum of what each reader loses."""
        found: dict[int, float] = {}
        for reader in self.readers:
            for root, loss in reader.losses().items():
                found[root] = found.get(root, 0.0) + loss
        return found

    def remove(self, units: Sequence[int]) -> None:
        """The readers' other weights make up for `units` as far as they can."""
        for reader in self.readers:
            reader.remove(set(units))


class _Reader:
    """One layer: W [rows, K], the inverse of its damped moment, and which unit each column belongs to."""

    def __init__(self, node: Node, weight: Array, roots: Array, original: Node, values: list[Array], seed: int) -> None:
        self.node, self.roots, self.gain = node, roots, 1.0
        self.matrix = weight_rows(node, weight)
        self.known: dict[int, float] | None = None
        if self.matrix.shape[1] > WIDEST:
            power = input_variance(original, weight.shape, values, len(values), seed)[0]
            self.inverse = 1 / np.maximum(power, 1e-12 * max(float(power.max()), 1e-18))
            self.deviation = np.sqrt(power)
            self.energy = max(float((np.square(self.matrix) * power).sum()), 1e-30)
            return
        moment = input_covariance(original, weight.shape, values, len(values), seed)
        level = max(float(np.einsum("gkk->gk", moment).mean()), 1e-30)
        factor, _ = damped_factor(moment, np.array([_DAMPING * level]))
        self.inverse = factor[0].T @ factor[0]
        self.deviation = np.sqrt(np.maximum(np.einsum("kk->k", moment[0]), 1e-12 * level))
        self.energy = max(float(np.einsum("ck,ck->", self.matrix @ moment[0], self.matrix)), 1e-30)

    def losses(self) -> dict[int, float]:
        """Of each unit that is left: w_P ([H^-1]_PP)^-1 w_P^T over the output's energy, times the gain."""
        if self.known is not None:
            return self.known
        units, counts = np.unique(self.roots, return_counts=True)
        found: dict[int, float] = {}
        for size in np.unique(counts):
            alike = units[counts == size]
            columns = np.argsort(self.roots, kind="stable")[np.isin(np.sort(self.roots), alike)].reshape(len(alike), size)
            rows = np.moveaxis(self.matrix[:, columns], 0, 1)  # [units, rows, p]
            if self.inverse.ndim == 1:
                losses = np.einsum("ucp,up->u", np.square(rows), 1 / self.inverse[columns])
            else:
                blocks = np.linalg.inv(self.inverse[columns[:, :, None], columns[:, None, :]])
                losses = np.einsum("ucp,ucp->u", rows @ blocks, rows)
            found.update(zip(alike.tolist(), (self.gain / self.energy * losses).tolist(), strict=True))
        self.known = found
        return found

    def remove(self, units: set[int]) -> None:
        gone = np.isin(self.roots, list(units))
        if not gone.any():
            return
        stays, self.known = ~gone, None
        if self.inverse.ndim == 1:
            self.matrix, self.inverse = self.matrix[:, stays], self.inverse[stays]
        else:
            across = self.inverse[np.ix_(gone, stays)]
            share = np.linalg.solve(self.inverse[np.ix_(gone, gone)], across)  # [p, K']
            self.matrix = self.matrix[:, stays] - self.matrix[:, gone] @ share
            self.inverse = self.inverse[np.ix_(stays, stays)] - across.T @ share
        self.roots = self.roots[stays]


def _gains(graph: Graph, readers: Sequence[_Reader], samples: Sequence[dict[str, Array]], seed: int) -> list[float]:
    """Noise at the model's float outputs over that at each reader's output, both as a share of the signal."""
    clean = _outputs(graph, samples)
    random = np.random.default_rng(seed)
    gains = []
    for reader in readers:
        const = reader.node.constant(1)
        assert const is not None
        noise = random.normal(size=reader.matrix.shape)
        # Columns count by what they read, so that the noise is _NOISE of the output's energy where inputs are independent.
        noise /= reader.deviation
        noise *= np.sqrt(_NOISE * reader.energy / noise.size)
        axis = output_axis(reader.node)
        copy = graph.copy()
        moved = weight_tensor(reader.matrix + noise, const.dims, reader.node.op, axis)
        copy.constants[const.name].assign(moved.astype(np.float32))
        reached = _outputs(copy, samples)
        signal = sum(float(np.square(a - a.mean(axis=0)).sum()) for a in clean)
        change = sum(float(np.square(a - b).sum()) for a, b in zip(clean, reached, strict=True))
        gains.append(change / max(signal, 1e-30) / _NOISE)
    return gains


def _outputs(graph: Graph, samples: Sequence[dict[str, Array]]) -> list[Array]:
    """Every float output of all samples, flattened, in float64."""
    session = graph_session(graph)
    ran = [session.run(feeds) for feeds in samples]
    names = [name for name, value in ran[0].items() if value.dtype.kind == "f"]
    return [np.stack([r[name].astype(np.float64).reshape(-1) for r in ran]) for name in names if _stack(ran, name)]


def _stack(ran: Sequence[Mapping[str, Array]], name: str) -> bool:
    return len({r[name].shape for r in ran}) == 1


def _weight(node: Node) -> Array:
    const = node.constant(1)
    assert const is not None
    return const.array()
