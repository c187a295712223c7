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
from qcompile.moments import input_covariance
from qcompile.passes._linear_rounding import LinearRounding, reduction
from qcompile.passes.quantise_embeddings import round_rows
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
        self.layer, spec = layer, layer.spec
        self.means = mean_of(inputs)
        covariance = None
        if reduction(layer.weight, spec.op, spec.axis) <= WIDEST:
            covariance = input_covariance(layer.node, layer.weight.shape, inputs, len(inputs), seed)
        groups = int(layer.node.attr("group", 1)) if spec.op == "Conv" else 1
        self.rounding = LinearRounding(layer.weight, spec.op, spec.axis, groups, covariance, candidates, paired=spec.paired)

    def narrow(self, bits: int) -> Narrowed:
        layer, rounded = self.layer, self.rounding.round(bits)
        weight, bias = rounded.dequantised(), layer.bias
        if bias is not None:
            lost = linear_mean(layer.node, layer.weight, self.means) - linear_mean(layer.node, weight, self.means)
            bias = (bias.astype(np.float64) + lost.reshape(bias.shape)).astype(np.float32)
        return Narrowed(bits, weight, bias, rounded.squared)
