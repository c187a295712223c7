"""The default criterion of channel pruning: what a unit's loss makes of the model's outputs, counted again after every chunk.

    score(unit) = sum over the layers that read it of  gain * loss

loss: squared error of that layer's output once its other inputs have made up for the unit, fitted on one half of the samples and
measured on the other, and the other way round (`_held_out`). It is in the layer's own units, and what it is worth to the model
differs from layer to layer by orders of magnitude.

gain: squared error of the model's float outputs over it, measured: the layer gets its weights without its cheapest units,
`_PROBE` of its output's energy together, as fitted on one half, and the model runs on samples of the other. Random noise in
their place misleads: it moves the mean, which a bias takes back, and weak channels as much as strong ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from qcompile.compensation import WIDEST
from qcompile.cut_layer import CutLayer, LayerSpec
from qcompile.divergence import noise
from qcompile.graph import Array, Const, Graph, Node, Value
from qcompile.moments import covariance_and_mean, variance_and_mean
from qcompile.passes._held_out import Fitted, Plain, fitted_pair
from qcompile.passes._linear import bias_of, output_axis, with_bias, write
from qcompile.passes._prune_scores import columns_of, weight_of_node, weight_rows
from qcompile.passes._prune_trace import Trace
from qcompile.passes.round_weights import weight_tensor
from qcompile.walk import Stream

_T = TypeVar("_T")
_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # of damping
_TRIALS = 8  # samples of each half on which the probe is followed to the outputs
_PROBE = 0.03  # about what a chunk costs; results hardly differ from 0.003 to 0.1
_LEAST = 1e-6  # of a layer's energy: float32 tells nothing finer


class SecondOrder:
    """The layers that read units which may go, each with its weights as they go."""

    def __init__(self, trace: Trace, graph: Graph, samples: Sequence[dict[str, Array]], seed: int) -> None:
        self.readers: list[_Reader] = []
        stream = Stream(graph.copy(), samples)
        nodes = {n.outputs[0].name: n for n in stream.graph.nodes}
        trials = [part[:_TRIALS] for part in _halves(samples)[::-1]]
        for slot in trace.of_role("in"):
            roots = trace.roots(slot.ids)
            free = [int(r) for r in np.unique(roots) if trace.frozen(int(r)) is None]
            if not free:
                continue
            node = nodes[slot.node.outputs[0].name]
            source = node.inputs[0]
            assert isinstance(source, Value)
            linear = with_bias(graph, slot.node)
            biased = linear is not None and bias_of(linear) is not None
            columns = roots[columns_of(slot, weight_of_node(slot.node))]
            reader = _Reader(slot.node, columns, node, stream.values(source), seed, biased=biased)
            reader.gain = reader.measured_gain(graph, free, trials)
            self.readers.append(reader)

    def scores(self) -> Mapping[int, float]:
        """The sum of what its readers lose."""
        found: dict[int, float] = {}
        for reader in self.readers:
            for root, loss in reader.losses().items():
                found[root] = found.get(root, 0.0) + reader.gain * loss
        return found

    def remove(self, units: Sequence[int]) -> None:
        """The readers' other weights make up for `units` as far as they can."""
        for reader in self.readers:
            reader.remove(set(units))


def _halves(samples: Sequence[_T]) -> list[Sequence[_T]]:
    """Every other sample; one alone stands for both."""
    return [samples[0::2], samples[1::2]] if len(samples) > 1 else [samples, samples]


class _Reader:
    """One layer, fitted on each half of the samples (of its inputs `values`) and judged by the other."""

    def __init__(self, node: Node, roots: Array, original: Node, values: list[Array], seed: int, *, biased: bool) -> None:
        self.node, self.gain = node, 1.0
        weight = weight_of_node(node)
        self.matrix = weight_rows(node, weight)
        wide = self.matrix.shape[1] > WIDEST
        look = variance_and_mean if wide else covariance_and_mean
        found = [look(original, weight.shape, part, len(part), seed) for part in _halves(values)]
        moments, self.means = [m[0] for m, _ in found], [mean[0] for _, mean in found]
        if wide or not biased:  # no refit, or none with a bias, takes the mean of what is lost
            squares = [np.square(mean) if wide else np.outer(mean, mean) for mean in self.means]
            moments = [m + square for m, square in zip(moments, squares, strict=True)]
            self.means = [np.zeros_like(mean) for mean in self.means]
        mean_moment = (moments[0] + moments[1]) / 2
        self.energy = float((np.square(self.matrix) @ mean_moment if wide else self.matrix @ mean_moment * self.matrix).sum())
        self.halves: Sequence[Fitted | Plain] = (
            [Plain(self.matrix, roots, power) for power in moments[::-1]]
            if wide
            else fitted_pair(self.matrix, roots, (moments[0], moments[1]), _STRENGTHS)
        )
        self._known: dict[int, float] | None = None

    def losses(self) -> dict[int, float]:
        """Of each unit that is left, the mean of both halves. Samples may agree that less is better by chance: not below 0."""
        if self._known is None:
            first, second = (half.losses() for half in self.halves)
            self._known = {root: max((loss + second[root]) / 2, 0.0) for root, loss in first.items()}
        return self._known

    def remove(self, units: set[int]) -> None:
        """Take them out."""
        if np.isin(self.halves[0].roots, sorted(units)).any():
            self._known = None
            for half in self.halves:
                half.remove(units)

    def measured_gain(self, graph: Graph, free: Sequence[int], trials: Sequence[Sequence[dict[str, Array]]]) -> float:
        """Squared error of the outputs over that of this layer, for units of `free` gone, the cheapest first.

        trials: for each half, samples of the other.
        """
        gone, sizes = [], self.losses()
        for root in sorted(free, key=lambda root: sizes[root]):
            gone.append(root)
            if sum(sizes[r] for r in gone) >= _PROBE * self.energy:
                break
        error = loss = 0.0
        for half, mean, samples in zip(self.halves, self.means, trials, strict=True):
            probe = copy.copy(half)
            stays = ~np.isin(half.roots, gone)
            loss += probe.remove(gone)
            matrix = np.zeros_like(self.matrix)
            matrix[:, stays] = probe.matrix
            error += _Behind(graph, self.node, samples).error(matrix, (self.matrix - matrix) @ mean)
        return error / max(loss, _LEAST * self.energy, 1e-30)


class _Behind:
    """What follows one layer, for any weights of it, on a few samples."""

    def __init__(self, graph: Graph, node: Node, samples: Sequence[dict[str, Array]]) -> None:
        own = graph.copy()
        self.node = next(n for n in own.nodes if n.outputs[0].name == node.outputs[0].name)
        weight, linear = weight_of_node(node), with_bias(own, self.node)
        self.bias = None if linear is None else bias_of(linear)
        name = None
        if linear is not None and self.bias is not None:
            write(own, linear, weight, self.bias)  # constants of its own
            name = next(t.name for t in reversed((linear.add or self.node).inputs) if isinstance(t, Const))
        self.dims, self.dtype = weight.shape, weight.dtype
        self.node.name = own.fresh_name("probe")
        axis = output_axis(node)
        spec = LayerSpec(self.node.name, node.op, "linear", self.node.inputs[1].name, name, axis, weight.size, weight.shape[axis])
        self.model = CutLayer(own, spec, samples)
        self.count = len(samples)

    def error(self, matrix: Array, shift: Array) -> float:
        """Mean over samples of the float outputs' squared change with weights `matrix` [rows, K], `shift` added to the bias."""
        weight = weight_tensor(matrix, self.dims, self.node.op, output_axis(self.node)).astype(self.dtype)
        bias = None if self.bias is None else (self.bias + shift).astype(self.dtype)
        changed = [noise(self.model.run(i), self.model.run(i, weight, bias))[0] for i in range(self.count)]
        return float(np.mean(changed))
