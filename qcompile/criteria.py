"""Criteria: what the loss of each weight would cost. A criterion is a name, a score, and what it needs to know of the input.

    magnitude   w^2                       Han et al. 2015
    wanda       w^2 E[x^2], row by row    Sun et al. 2023
    obd         w^2 E[x^2] / 2            Optimal Brain Damage, LeCun et al. 1989: the diagonal of the layer's Hessian
    obs         w^2 / (2 [H^-1]_ww)       Optimal Brain Surgeon, Hassibi 1993; the others are fitted anew (`qcompile.obs`)

The loss is the layer's own: E|W x - V x|^2, whose Hessian is the second moment of its input. Inside N:M blocks the first two
second-order scores rank alike; of a share of the layer, wanda takes as much from every row, obd where it costs least.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np

from qcompile.sparsity import Array


class Criterion(Protocol):
    """One way to judge weights."""

    @property
    def name(self) -> str:
        """As `--criterion` takes it."""

    @property
    def needs_data(self) -> bool:
        """Whether `power` is the layer's input; else it is not looked at."""

    @property
    def by_row(self) -> bool:
        """Whether a share is taken from every output channel alike."""

    @property
    def refits(self) -> bool:
        """Whether the remaining weights move; then the whole second moment is wanted, not its diagonal alone."""

    def scores(self, weight: Array, power: Array | None) -> Array:
        """[groups, channels, K] for `weight` of that shape and E[x^2] [groups, K] of its input; the larger the more it costs."""


@dataclass(frozen=True)
class Magnitude:
    """Small weights go."""

    name: str = "magnitude"
    needs_data: bool = False
    by_row: bool = False
    refits: bool = False

    def scores(self, weight: Array, power: Array | None) -> Array:
        """w^2."""
        return np.square(np.asarray(weight, np.float64))


@dataclass(frozen=True)
class Diagonal:
    """Weights go whose product with a typical input is small."""

    name: str
    by_row: bool
    needs_data: bool = True
    refits: bool = False

    def scores(self, weight: Array, power: Array | None) -> Array:
        """w^2 E[x^2] / 2."""
        if power is None:
            raise ValueError(f"criterion {self.name} needs the power of the layer's input")
        return np.square(np.asarray(weight, np.float64)) * np.asarray(power, np.float64)[:, None, :] / 2


@dataclass(frozen=True)
class Surgeon(Diagonal):
    """Weights go whose loss the others can make up for; `qcompile.obs` does it. Its score is for layers too wide for that."""

    name: str = "obs"
    by_row: bool = False
    refits: bool = True


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {c.name: c for c in (Magnitude(), Diagonal("wanda", by_row=True), Diagonal("obd", by_row=False), Surgeon())}
)
