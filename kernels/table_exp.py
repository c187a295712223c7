"""exp(score - max of the row) as u8, from a table that the int32 distance itself indexes: no rescale comes before it.

    y = table[min(max - x, last)],   table[d] = round(255 exp(-d S)),   table[last] = 0

The table ends where 255 exp(-d S) falls below one half, at ln(510) / S = 6.23 / S. Every masked score has distance `last`, so it
is exactly 0; a row with nothing kept is all 0. Made for the product with V, which is then divided by the row sum (`inormalise`).
Fine, for S below 2^-14: distances are divided by 2^k first, to keep the table within 2^17 entries; its entries are those of the
middles of the 2^k distances that they stand for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, log, log2
from typing import ClassVar

import numpy as np
from onnx import FunctionProto, TensorProto

from qcompile.kernels._protocol import Array, Float64, Kernel, function, within
from qcompile.kernels._rows import NEAR_BOUND, distance, distance_text, exponentials, near_text
from qcompile.kernels.table import lookup_text

_FINEST, _COARSEST = 2.0**-26, 1.0
_PLAIN_LOW = 2.0**-14
_TOP = 255


@dataclass(frozen=True)
class TableExp(Kernel):
    """u8 of int32 scores [..., keys]; with `masked`, of them and bool `keep`, which broadcasts to them.

    bound: what is known of the scores, |x| <= bound; 2^31 holds for any.
    """

    scale: float
    masked: bool = False
    bound: int = 2**31
    entries: Array = field(init=False, repr=False, compare=False)

    source: ClassVar[str] = "exact by definition"
    domain: ClassVar[str] = "int32 scores, any (masked: the promised bound); scale 2^-26..1"
    TOLERANCE: ClassVar[float] = 0.5 / _TOP + 2.0**-15  # half a step, and half of 2^k distances of 2^-14 or less together

    def __post_init__(self) -> None:
        within("table of exp: scale of the scores", self.scale, _FINEST, _COARSEST, "rescale the scores first")
        within("table of exp: bound of the scores", self.bound, 0, 2**31, "int32 holds no more")
        inner = self.scale * self.step
        last = ceil(log(2 * _TOP) / inner)
        distances = np.arange(last + 1, dtype=np.float64) + (0.5 if self.step > 1 else 0)
        entries = np.rint(_TOP * np.exp(-distances * inner)).astype(np.uint8)
        entries[0], entries[last] = _TOP, 0
        object.__setattr__(self, "entries", entries)

    @property
    def name(self) -> str:
        """TableExp or TableMaskedExp; Near where scores are within 2^28; Fine where distances are divided first."""
        return f"Table{'Masked' if self.masked else ''}Exp{'Near' if self._near else ''}{'Fine' if self.step > 1 else ''}"

    @property
    def _near(self) -> bool:
        return self.masked and max(self.bound, self.limit) <= NEAR_BOUND

    @property
    def output_scale(self) -> float:
        """1/255."""
        return 1 / _TOP

    @property
    def step(self) -> int:
        """2^k: scale * 2^k is in (2^-15, 2^-14] where the scale is below 2^-14, else k = 0."""
        return 1 << max(0, int(log2(_PLAIN_LOW)) - ceil(log2(self.scale)))

    @property
    def limit(self) -> int:
        """The largest distance: it has the last entry. At most 6.24 * 2^15 * 2^12 < 2^31."""
        return (len(self.entries) - 1) * self.step

    def attributes(self) -> dict[str, int]:
        """limit; step where it is not 1."""
        return {"limit": self.limit, "step": self.step} if self.step > 1 else {"limit": self.limit}

    def constants(self) -> dict[str, Array]:
        """table: u8, one entry for each distance."""
        return {"table": self.entries}

    def reference(self, *inputs: Array) -> Array:
        """u8 [..., keys] of int32 scores [..., keys] and, where masked, bool keep. Raises ValueError beyond `bound`."""
        largest = int(np.abs(inputs[0].astype(np.int64)).max(initial=0))
        if largest > self.bound:
            raise ValueError(f"table of exp: a score of {largest}, made for {self.bound}")
        return np.asarray(self.entries[distance(inputs[0], inputs[1] if self.masked else None, self.limit) // self.step])

    def lower(self) -> FunctionProto:
        """One function for each name."""
        index = "index = Div (distance, step_)" if self.step > 1 else "index = Identity (distance)"
        text = f"""{self.name} <{", ".join(self.attributes())}> (x, {"keep, " if self.masked else ""}table) => (y) {{
            {near_text() if self._near else distance_text(self.masked)}
            {index}
            {lookup_text("table", "index", "y")}
        }}"""
        return function(text, dict.fromkeys(self.attributes(), TensorProto.INT32))

    def oracle(self, *inputs: Array) -> Float64:
        """exp((x - max) * scale), 0 where masked."""
        return exponentials(inputs[0], inputs[1] if self.masked else None, self.scale)
