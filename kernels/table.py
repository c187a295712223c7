"""Any function of one 8-bit tensor: its 256 values, computed at compile time.

    y = table[x],   table[q] = saturate( round_half_even( f((q - zx) Sx) / Sy ) + zy )

Exact by definition: the error is that of rounding, half a step, where the output does not saturate. The output may be wider than
the input (int16, int32). GatherElements takes 1.5 ns for an element in onnxruntime, Gather 12. An int8 input indexes with its
sign: negative indices count from the end, so entry 128 is that of -128. Functions of several nodes in a row are one table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from onnx import FunctionProto

from qcompile.kernels._functions import Function
from qcompile.kernels._protocol import Array, Float64, Kernel, function, within

_LOWEST, _HIGHEST = 2.0**-100, 2.0**100  # float32 scales, with room for products in float64
_INPUTS = (np.uint8, np.int8)
_OUTPUTS = (np.uint8, np.int8, np.uint16, np.int16, np.int32)


def lookup_text(table: str, index: str, output: str) -> str:
    """Lines that read the 1-d `table` at every element of the int32 `index`; they hold for tensors without elements too."""
    return f"""
        shape = Shape ({index})
        all_of_it = Constant <value_ints = [1, -1]> ()
        row = Flatten <axis = 0> ({index})
        one_row = Reshape ({table}, all_of_it)
        found = GatherElements <axis = 1> (one_row, row)
        {output} = Reshape <allowzero = 1> (found, shape)
    """


class Tabulated(Kernel):
    """A look-up whose output has the scale and zero point that it is given."""

    scale: float
    zero_point: int

    @property
    def output_scale(self) -> float:
        """As given."""
        return self.scale

    @property
    def output_zero_point(self) -> int:
        """As given."""
        return self.zero_point


@dataclass(frozen=True)
class Table(Tabulated):
    """`f` of an 8-bit tensor as one look-up. Raises ValueError for scales outside 2^-100..2^100, and where f is NaN anywhere."""

    f: Function
    input_scale: float
    input_zero_point: int
    scale: float
    zero_point: int
    input_type: type[np.generic] = np.uint8
    output_type: type[np.generic] = np.uint8
    entries: Array = field(init=False, repr=False, compare=False)

    source: ClassVar[str] = "exact by definition"
    domain: ClassVar[str] = "uint8 or int8, all 256 values; outputs of 8, 16 or 32 bits"
    TOLERANCE: ClassVar[float] = 0.5  # steps of the output

    def __post_init__(self) -> None:
        if self.input_type not in _INPUTS or self.output_type not in _OUTPUTS:
            raise ValueError(f"table: {self.input_type.__name__} to {self.output_type.__name__}: 8 bits in; 8, 16 or 32 out")
        within("table: input scale", self.input_scale, _LOWEST, _HIGHEST, "check the calibration")
        within("table: output scale", self.scale, _LOWEST, _HIGHEST, "check the calibration")
        for what, zero, kind in (
            ("input", self.input_zero_point, self.input_type),
            ("output", self.zero_point, self.output_type),
        ):
            low, high = _range(kind)
            within(f"table: {what} zero point", zero, low, high, f"it must be a {kind.__name__}")
        inputs = np.arange(256, dtype=np.uint8).view(self.input_type)
        # rint(real / Sy) in float64: rounding is off by one only where real / Sy is within 2^-52 relative of a tie.
        low, high = _range(self.output_type)
        steps = np.rint(self.oracle(inputs) / np.float64(self.scale)) + self.zero_point
        object.__setattr__(self, "entries", np.clip(steps, low, high).astype(self.output_type))

    @property
    def name(self) -> str:
        """Table."""
        return "Table"

    @property
    def tolerance(self) -> float:
        """Half a step, and what float64 rounds in `real` and `oracle`."""
        return self.TOLERANCE * self.scale * (1 + 1e-9)

    def constants(self) -> dict[str, Array]:
        """table: the 256 entries, in the order of the input's bits."""
        return {"table": self.entries}

    def reference(self, *inputs: Array) -> Array:
        """The entry of each element, of the same shape."""
        return np.asarray(self.entries[inputs[0].astype(np.int64)])

    def lower(self) -> FunctionProto:
        """The same function for all tables."""
        return function(f"Table (x, table) => (y) {{\n wide = Cast <to = 6> (x)\n {lookup_text('table', 'wide', 'y')} }}")

    def oracle(self, *inputs: Array) -> Float64:
        """f in float64, at the ends of what the output can hold."""
        x = (inputs[0].astype(np.float64) - self.input_zero_point) * np.float64(self.input_scale)
        with np.errstate(all="ignore"):  # exp may overflow to inf, which saturates; nan is refused below
            y = np.asarray(self.f(x), np.float64)
        bad = np.isnan(y)
        if bad.any():
            raise ValueError(f"table: the function is NaN at {x[bad].flat[0]:g}, which the input's range holds: clip it before")
        low, high = _range(self.output_type)
        return np.asarray(np.clip(y, (low - self.zero_point) * self.scale, (high - self.zero_point) * self.scale))


def _range(kind: type[Any]) -> tuple[int, int]:
    info = np.iinfo(kind)
    return int(info.min), int(info.max)
