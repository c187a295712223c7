"""A dimension as a monomial: factor * symbol * symbol ..., enough to follow batch and length through Reshape and heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Dim:
    """factor * product of symbols (sorted)."""

    factor: int
    symbols: tuple[str, ...] = ()

    @property
    def static(self) -> bool:
        """Whether it is a plain number."""
        return not self.symbols

    def __mul__(self, other: Dim) -> Dim:
        if self.factor == 0 or other.factor == 0:
            return Dim(0)
        return Dim(self.factor * other.factor, tuple(sorted(self.symbols + other.symbols)))

    def over(self, other: Dim) -> Dim | None:
        """self / other where that is a monomial again."""
        rest = Counter(self.symbols)
        rest.subtract(other.symbols)
        if other.factor == 0 or self.factor % other.factor or min(rest.values(), default=0) < 0:
            return None
        return Dim(self.factor // other.factor, tuple(sorted(rest.elements())))


Dims = tuple[Dim, ...]
ONE = Dim(1)


def volume(dims: Sequence[Dim]) -> Dim:
    """Number of elements."""
    return prod(dims, start=ONE)


def broadcast(shapes: Sequence[Dims]) -> list[Dim | None]:
    """Dimensions of the broadcast result. A number above 1 wins; two different symbols leave the axis unknown."""
    rank = max((len(s) for s in shapes), default=0)
    result: list[Dim | None] = []
    for axis in range(-rank, 0):
        found = {s[axis] for s in shapes if len(s) >= -axis} - {ONE}
        fixed = {d for d in found if d.static}
        choice = fixed or found or {ONE}
        result.append(next(iter(choice)) if len(choice) == 1 else None)
    return result
