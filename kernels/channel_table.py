"""A function of an 8-bit tensor whose channels have ranges of their own: 256 entries for each kind of channel.

    y = table[kind[channel], x],   table[k, q] = saturate( round_half_even( c_k f((q - zx) Sx a_k + m_k) / Sy ) + zy )

Channels of one kind (a, m, c) share a table: a few dozen kinds stay in the nearest cache. The layer before it writes x of every
channel over the full 8 bits, and c takes in what smoothing multiplies by: one look-up in place of a look-up, a product and a
requantisation. Exact by definition, as `Table` is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Any, ClassVar

import numpy as np
from onnx import FunctionProto

from qcompile.kernels._functions import Function
from qcompile.kernels._protocol import Array, Float64, function, within
from qcompile.kernels.table import Table, Tabulated, lookup_text

MOST_KINDS = 4096


@dataclass(frozen=True)
class ChannelTable(Tabulated):
    """`c f(x a + m)` of an 8-bit tensor as one look-up, with (a, m, c) of each channel along `axis` (negative).

    kinds: the distinct (a, m, c); kind: the index of each channel's. Raises ValueError where a table of one kind is refused.
    """

    f: Function
    input_scale: float
    input_zero_point: int
    scale: float
    zero_point: int
    kinds: tuple[tuple[float, float, float], ...]
    kind: tuple[int, ...]
    axis: int = -1
    input_type: type[Any] = np.uint8
    output_type: type[Any] = np.uint8
    tables: tuple[Table, ...] = field(init=False, repr=False, compare=False)

    source: ClassVar[str] = "exact by definition"
    domain: ClassVar[str] = "uint8 or int8, all 256 values; outputs of 8, 16 or 32 bits; up to 4096 kinds of channels"
    TOLERANCE: ClassVar[float] = 0.5  # steps of the output

    def __post_init__(self) -> None:
        within("channel table: kinds of channels", len(self.kinds), 1, MOST_KINDS, "round the factors of the channels")
        if self.axis >= 0:
            raise ValueError(f"channel table: axis {self.axis}: count it from the end, -1 is the last")
        if not self.kind or min(self.kind) < 0 or max(self.kind) >= len(self.kinds):
            raise ValueError("channel table: a channel is of a kind that there is not")
        if not all(isfinite(number) for kind in self.kinds for number in kind):
            raise ValueError("channel table: a factor or shift is not finite")
        tables = tuple(
            Table(
                lambda x, a=a, m=m, c=c: c * self.f(x * a + m),
                self.input_scale,
                self.input_zero_point,
                self.scale,
                self.zero_point,
                self.input_type,
                self.output_type,
            )
            for a, m, c in self.kinds
        )
        object.__setattr__(self, "tables", tables)

    @property
    def name(self) -> str:
        """ChannelTable."""
        return "ChannelTable"

    @property
    def tolerance(self) -> float:
        """Half a step, and what float64 rounds in `real` and `oracle`."""
        return self.tables[0].tolerance

    @property
    def entries(self) -> Array:
        """[kinds, 256], in the order of the values: from 0, or from -128."""
        stacked = np.stack([table.entries for table in self.tables])
        return stacked if self.input_type is np.uint8 else np.roll(stacked, 128, axis=1)

    @property
    def _channels(self) -> Array:
        """`kind` in the shape that broadcasts along `axis`."""
        return np.asarray(self.kind, np.int64).reshape(-1, *[1] * (-self.axis - 1))

    @property
    def _lowest(self) -> int:
        return int(np.iinfo(self.input_type).min)

    def constants(self) -> dict[str, Array]:
        """table: one row a kind behind the other; offset: of each channel's row, at most 4096 * 256."""
        return {"table": self.entries.reshape(-1), "offset": (self._channels * 256 - self._lowest).astype(np.int32)}

    def reference(self, *inputs: Array) -> Array:
        """The entry of each element, of the same shape."""
        return np.asarray(self.entries[self._channels, inputs[0].astype(np.int64) - self._lowest])

    def lower(self) -> FunctionProto:
        """One index for both: 0 <= offset + x < 256 kinds."""
        body = f"wide = Cast <to = 6> (x)\n place = Add (wide, offset)\n {lookup_text('table', 'place', 'y')}"
        return function(f"ChannelTable (x, table, offset) => (y) {{ {body} }}")

    def oracle(self, *inputs: Array) -> Float64:
        """c f(x a + m) in float64, at the ends of what the output can hold."""
        a, m, c = (np.asarray(column)[self._channels] for column in zip(*self.kinds, strict=True))
        x = (inputs[0].astype(np.float64) - self.input_zero_point) * np.float64(self.input_scale)
        limits = np.iinfo(self.output_type)
        ends = ((limits.min - self.zero_point) * self.scale, (limits.max - self.zero_point) * self.scale)
        return np.asarray(np.clip(c * self.f(x * a + m), *ends))
