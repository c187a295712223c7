"""One layer's weights at several widths, rounded as the compiler rounds them, with every other layer float.

The same steps as a compilation, on the float input of the layer: scales by weighted squared error, second-order rounding on the
input's covariance, bias correction. The dyadic grid of the scales, which costs little, is left out: it depends on the neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qcompile.context import FLOAT_BITS
from qcompile.cut_layer import CutLayer
from qcompile.graph import Array
from qcompile.lattice import Grid, round_on_lattice
from qcompile.moments import input_covariance
from qcompile.passes.quantise_embeddings import round_rows
from qcompile.passes.round_weights import weight_matrix, weight_tensor
from qcompile.qparams import quantise_weight
from qcompile.rounding import WIDEST
from qcompile.walk import linear_mean, mean_of


@dataclass(frozen=True)
class Narrowed:
    """Dequantised float32 `weight` and `bias` of one width; squared: |W - Q(W)|^2 of plain rounding to nearest."""

    bits: int
    weight: Array
    bias: Array | None
    squared: float


def narrow_layer(
    layer: CutLayer, widths: Sequence[int], seed: int, candidates: int, samples: Sequence[int]
) -> Iterator[Narrowed]:
    """The layer's weights at each of `widths`, learned on the inputs of `samples`; `candidates`: scales tried beside the first
    (`lattice.Grid`)."""
    inputs = [layer.inputs[i] for i in samples] if layer.inputs else []
    rounding = _Table(layer) if layer.spec.kind == "table" else _Linear(layer, inputs, seed, candidates)
    for bits in widths:
        if bits == FLOAT_BITS:
            yield Narrowed(bits, layer.weight, layer.bias, 0.0)
        else:
            yield rounding.narrow(bits)


def narrow_source(inputs: Sequence[Array], bits: int) -> list[Array]:
    """Activations of all samples rounded to `bits`, one scale and zero point over their extremes."""
    if bits == FLOAT_BITS:
        return list(inputs)
    low = min(0.0, *(float(x.min(initial=0)) for x in inputs))
    high = max(0.0, *(float(x.max(initial=0)) for x in inputs))
    levels = 2**bits - 1
    scale = np.float32((high - low) / levels) if high > low else np.float32(1)
    zero = np.rint(-low / float(scale))
    return [((np.clip(np.rint(x / scale) + zero, 0, levels) - zero) * scale).astype(np.float32) for x in inputs]


class _Table:
    """Rows that Gather looks up."""

    def __init__(self, layer: CutLayer) -> None:
        self.layer = layer

    def narrow(self, bits: int) -> Narrowed:
        values = self.layer.weight
        integers, scale = round_rows(values, 2 ** (bits - 1) - 1)
        rounded = (integers * scale).astype(np.float32)
        return Narrowed(bits, rounded, None, float(np.square(rounded.astype(np.float64) - values).sum()))


class _Linear:
    """Conv, Gemm or MatMul: its matrix, and the covariance of what it reads."""

    def __init__(self, layer: CutLayer, inputs: Sequence[Array], seed: int, candidates: int) -> None:
        self.layer, self.candidates = layer, candidates
        spec, node, weight = layer.spec, layer.node, layer.weight
        self.matrix = weight_matrix(weight, spec.op, spec.axis).astype(np.float64)
        groups = int(node.attr("group", 1)) if spec.op == "Conv" else 1
        self.grouped = self.matrix.reshape(groups, -1, self.matrix.shape[1])
        self.means = mean_of(inputs)
        self.covariance = None
        if self.matrix.shape[1] <= WIDEST:
            self.covariance = input_covariance(node, weight.shape, inputs, len(inputs), seed)

    def narrow(self, bits: int) -> Narrowed:
        spec, layer, top = self.layer.spec, self.layer, 2 ** (bits - 1) - 1
        paired = spec.paired
        importance = None
        if self.covariance is not None:
            variance = np.einsum("gkk->gk", self.covariance)
            repeats = self.grouped.shape[1]
            importance = np.repeat(variance + 1e-3 * max(float(variance.mean()), 1e-30), repeats, axis=0)
        plain = quantise_weight(self.matrix, np.float32(1), None, pair_rule=paired, importance=importance, top=top)
        integers, scale = plain.values, plain.scale
        nearest = integers * scale[:, None].astype(np.float64)
        if self.covariance is not None:
            grid = Grid(np.float32(1), None, paired, top, candidates=self.candidates if bits < 8 else 0)
            steps = scale.reshape(self.grouped.shape[:2])
            least = np.zeros(steps.shape) + 2.0**-80
            better, steps = round_on_lattice(self.grouped, steps, self.covariance, least, grid)
            integers, scale = better.reshape(integers.shape), steps.reshape(-1)
        matrix = integers * scale[:, None].astype(np.float64)
        weight = weight_tensor(matrix, layer.weight.shape, spec.op, spec.axis).astype(np.float32)
        bias = layer.bias
        if bias is not None:
            lost = linear_mean(layer.node, layer.weight, self.means) - linear_mean(layer.node, weight, self.means)
            bias = (bias.astype(np.float64) + lost.reshape(bias.shape)).astype(np.float32)
        return Narrowed(bits, weight, bias, float(np.square(nearest - self.matrix).sum()))
