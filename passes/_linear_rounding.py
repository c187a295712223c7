"""A linear layer's weights rounded by themselves, on any scale: no neighbour asks for a dyadic one.

Scales by weighted squared error, then second-order rounding on the input's covariance with other scales tried beside
(`qcompile.lattice`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.graph import Array
from qcompile.lattice import Grid, round_on_lattice
from qcompile.passes.round_weights import weight_matrix, weight_tensor
from qcompile.qparams import quantise_weight


@dataclass(frozen=True)
class RoundedLinear:
    """integers: int8, in the tensor's own layout; scale: float32 [channels] along `axis`. squared: |W - Q(W)|^2 of plain rounding
    to nearest."""

    integers: Array
    scale: Array
    axis: int
    squared: float

    def dequantised(self) -> Array:
        """What DequantizeLinear makes of them, float32."""
        shape = [1] * self.integers.ndim
        shape[self.axis] = -1
        return np.asarray(self.integers.astype(np.float32) * self.scale.reshape(shape))

    def transposed(self) -> RoundedLinear:
        """The same of a matrix stored the other way round."""
        return RoundedLinear(np.ascontiguousarray(self.integers.T), self.scale, 1 - self.axis, self.squared)


def reduction(weight: Array, op: str, axis: int) -> int:
    """How many products each output is a sum of."""
    return int(weight.size // weight.shape[0 if op == "Conv" else axis])


class LinearRounding:
    """The weights of Conv, Gemm or MatMul `op`, output channels along `axis`, at any width.

    covariance: of what it reads, [groups, K, K]; None: round to nearest. candidates: scales tried beside the first below 8 bits.
    paired: neighbouring weights keep the pair rule.
    """

    def __init__(
        self, weight: Array, op: str, axis: int, groups: int, covariance: Array | None, candidates: int, *, paired: bool
    ) -> None:
        self.weight, self.op, self.axis = weight, op, axis
        self.covariance, self.candidates, self.paired = covariance, candidates, paired
        self.matrix = weight_matrix(weight, op, axis).astype(np.float64)
        self.grouped = self.matrix.reshape(groups, -1, self.matrix.shape[1])

    def round(self, bits: int) -> RoundedLinear:
        """The weights within +-(2^(bits-1) - 1)."""
        top, covariance, importance = 2 ** (bits - 1) - 1, self.covariance, None
        if covariance is not None:
            variance = np.einsum("gkk->gk", covariance)
            repeats = self.grouped.shape[1]
            # A weight whose input never varied still gets a small say: new data may move it.
            importance = np.repeat(variance + 1e-3 * max(float(variance.mean()), 1e-30), repeats, axis=0)
        plain = quantise_weight(self.matrix, np.float32(1), None, pair_rule=self.paired, importance=importance, top=top)
        integers, scale = plain.values, plain.scale
        nearest = integers * scale[:, None].astype(np.float64)
        if covariance is not None:
            grid = Grid(np.float32(1), None, self.paired, top, candidates=self.candidates if bits < 8 else 0)
            steps = scale.reshape(self.grouped.shape[:2])
            least = np.zeros(steps.shape) + 2.0**-80
            better, steps = round_on_lattice(self.grouped, steps, covariance, least, grid)
            integers, scale = better.reshape(integers.shape), steps.reshape(-1)
        tensor = np.ascontiguousarray(weight_tensor(integers, self.weight.shape, self.op, self.axis).astype(np.int8))
        return RoundedLinear(tensor, scale.astype(np.float32), self.axis, float(np.square(nearest - self.matrix).sum()))
