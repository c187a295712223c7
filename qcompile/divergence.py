"""How far a model's outputs are from a reference's, as one number that is 0 where they agree and quadratic near there.

kl      mean over rows of KL(softmax f || softmax q), over the classes of the first output that has any; nats
noise   sum (f - q)^2 / sum f^2 over all float outputs: the inverse of the SQNR
labels  mean over rows of -log softmax(q)[label]: not 0, but the loss that was trained

KL and noise have their minimum at the reference itself, so their curvature there needs no labels and is never negative: it is the
Gauss-Newton (Fisher) matrix, with softmax and with squared error for a loss (Martens 2020, section 9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompile.errors import DataError
from qcompile.runtime import Array

FloatArray = npt.NDArray[np.float64]
Outputs = Mapping[str, Array]
LOSSES = ("kl", "noise", "labels")
_SUM = 1e-3  # by which rows of probabilities may miss 1
_LEAST = 1e-30  # a probability of 0 in float32


@dataclass(frozen=True)
class Divergence:
    """What is measured of one sample's outputs, summed over samples by `total`.

    classes: the output that holds classes (None: there is none); probabilities: it holds them, and not logits.
    """

    classes: str | None
    probabilities: bool

    @staticmethod
    def of(reference: Sequence[Outputs]) -> Divergence:
        """Found from a reference's outputs: the first float output with two classes or more on its last axis.

        Rows that are positive and sum to 1 in every sample are probabilities.
        """
        first = reference[0]
        for name, value in first.items():
            if value.dtype.kind == "f" and value.ndim >= 1 and _rows(value).shape[1] >= 2:
                rows = [_rows(r[name]) for r in reference]
                sums_to_one = all((x >= 0).all() and np.abs(x.sum(axis=1) - 1).max(initial=0) < _SUM for x in rows)
                return Divergence(name, sums_to_one)
        return Divergence(None, False)

    def kl(self, reference: Outputs, outputs: Outputs) -> tuple[float, int]:
        """(sum over rows of KL(reference || outputs) in nats, rows) of one sample."""
        if self.classes is None:
            return 0.0, 0
        exact, other = self._log(reference[self.classes]), self._log(outputs[self.classes])
        return float((np.exp(exact) * (exact - other)).sum()), len(exact)

    def loss(self, outputs: Outputs, label: int | Array | None) -> tuple[float, int]:
        """(sum over rows of the cross-entropy with `label`, rows) of one sample. Raises DataError where labels do not fit."""
        if self.classes is None or label is None:
            raise DataError("loss 'labels' needs a model with classes and labelled samples; give labels, or use loss 'kl'")
        logs = self._log(outputs[self.classes])
        wanted = np.asarray(label).reshape(-1)
        if wanted.dtype.kind not in "iu" or len(wanted) != len(logs) or not ((wanted >= 0) & (wanted < logs.shape[1])).all():
            raise DataError(f"labels do not fit output '{self.classes}' of {len(logs)} rows and {logs.shape[1]} classes")
        return float(-logs[np.arange(len(logs)), wanted].sum()), len(logs)

    def _log(self, value: Array) -> FloatArray:
        """log softmax [rows, classes] in float64."""
        rows = _rows(value).astype(np.float64)
        if self.probabilities:
            logs: FloatArray = np.log(np.maximum(rows, _LEAST))
            return logs
        shifted = rows - rows.max(axis=1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def noise(reference: Outputs, outputs: Outputs) -> tuple[float, float]:
    """(sum of squared differences, sum of squares of the reference) over the float outputs of one sample."""
    energy = signal = 0.0
    for name, value in reference.items():
        if value.dtype.kind == "f":
            exact = value.astype(np.float64)
            energy += float(np.square(exact - outputs[name]).sum())
            signal += float(np.square(exact).sum())
    return energy, signal


def _rows(value: Array) -> Array:
    """[rows, classes], trailing axes of length 1 dropped."""
    while value.ndim > 2 and value.shape[-1] == 1:
        value = value[..., 0]
    return value.reshape(-1, value.shape[-1]) if value.ndim else value.reshape(1, 1)
