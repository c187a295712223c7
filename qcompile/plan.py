"""What the quantising passes decide and hand on: which tensors share a scale, which nodes are integer, which were refused."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np

from qcompile.graph import Const, Node
from qcompile.qparams import ActivationType


@dataclass(eq=False)
class ScaleClass:
    """Tensors that share one scale and zero point.

    tensors: their names in the float graph. low, high: the calibrated range. ceiling, floor: bounds that the range carries in
    place of a folded Relu/Clip (None: none); where the scale reaches past them all the same, Clips on integers stand (`clamped`).
    given: the range is a user's. bits: how many of the 8 its integers use; below 8 a Clip stands behind every QuantizeLinear.
    """

    index: int
    tensors: list[str] = field(default_factory=list)
    low: float = 0.0
    high: float = 0.0
    floor: float | None = None
    ceiling: float | None = None
    scale: np.float32 = field(default_factory=lambda: np.float32(1.0))
    zero_point: int = 0
    scale_const: Const | None = None
    zero_const: Const | None = None
    clamped: bool = False
    given: bool = False
    bits: int = 8

    def kind(self, whole: ActivationType) -> ActivationType:
        """The integers that this class uses of `whole`, the target's type."""
        return whole.narrowed(self.bits)


@dataclass(eq=False)
class AddSite:
    """An integer Add: its two operands' classes and its result's."""

    node: Node
    left: ScaleClass
    right: ScaleClass
    result: ScaleClass


@dataclass(eq=False)
class PoolSite:
    """An integer GlobalAveragePool over `area` positions."""

    node: Node
    source: ScaleClass
    result: ScaleClass
    area: int


@dataclass(eq=False)
class ProductSite:
    """An integer MatMul or Mul of two activations; no Add and no pool decides the scale of its result."""

    node: Node
    left: ScaleClass
    right: ScaleClass
    result: ScaleClass


@dataclass(eq=False)
class LinearSite:
    """An integer Conv or Gemm. `result` is None where it ends in float. Its weights' channel axis is `axis`;
    `weight_scale` and `stored`, its scales and integers, are there from `round_weights` on. `output` names the float model's
    tensor that it computes, folded Relu/Clip included. `method`: how its weights were rounded; `gain_db`: what that gained over
    round to nearest on the layer's own output, where it was measured. `unit`: where the result is added to others in wide
    integers, what one step of those is worth; every Sx*Sw is then a whole multiple of it."""

    node: Node
    source: ScaleClass
    result: ScaleClass | None
    axis: int
    depthwise: bool
    weight_scale: np.ndarray[tuple[int], np.dtype[np.float32]] | None = None
    stored: Const | None = None
    output: str = ""
    method: str = "nearest"
    gain_db: float | None = None
    unit: np.float32 | None = None

    @property
    def grid_scale(self) -> np.float32 | None:
        """The output scale Sy for which every channel's Sx*Sw/Sy must be b/2^16; None where any Sw will do."""
        if self.result is not None:
            return self.result.scale
        return None if self.unit is None else np.float32(self.unit * np.float32(2.0**16))


@dataclass(eq=False)
class WidthGroup:
    """Classes whose activations have one width, because Adds join them, and the integer nodes that read them (by name).

    fixed: why they keep 8 bits whatever is asked for; None where they do not.
    """

    classes: list[ScaleClass]
    readers: list[str] = field(default_factory=list)
    fixed: str | None = None


@dataclass(eq=False)
class ClampSite:
    """A Relu or Clip done on integers (`node` is a Clip) where the class's range reaches past its bounds."""

    node: Node
    place: ScaleClass
    floor: float
    ceiling: float


@dataclass(frozen=True)
class LayerRecord:
    """What the diagnosis found of one integer Conv or Gemm `node`.

    bits, weights: the width and the number of its weights; activation_bits: the width of what it reads. sqnr_in_db, sqnr_out_db:
    its input and output in the quantised model against the float model's same tensors; own_db: its output where everything before
    it is float, so what this layer alone costs. None stands for no error at all. low, high: the range of its input. saturation:
    the share of its output's integers (its input's where it ends in float) at an end of the range that clips. method, gain_db:
    see `LinearSite`.
    """

    node: str
    op: str
    bits: int
    weights: int
    sqnr_in_db: float | None
    sqnr_out_db: float | None
    own_db: float | None
    method: str
    gain_db: float | None
    low: float
    high: float
    saturation: float
    activation_bits: int = 8

    def as_json(self) -> dict[str, object]:
        """One entry of the report's `layers`."""
        entry = asdict(self)
        entry["range"] = [entry.pop("low"), entry.pop("high")]
        return entry


@dataclass
class Plan:
    """All decisions of one compilation, in graph order."""

    classes: list[ScaleClass] = field(default_factory=list)
    linears: list[LinearSite] = field(default_factory=list)
    adds: list[AddSite] = field(default_factory=list)
    pools: list[PoolSite] = field(default_factory=list)
    products: list[ProductSite] = field(default_factory=list)
    clamps: list[ClampSite] = field(default_factory=list)
    groups: list[WidthGroup] = field(default_factory=list)
    stored: dict[str, int] = field(default_factory=dict)  # bits of integers, by name, that are dequantised for float layers
    units: dict[str, float] = field(default_factory=dict)  # of tensors in wide sums, what one step is worth
    searched: bool = False
    refined: bool = False
    layers: list[LayerRecord] | None = None  # the diagnosis, where it was asked for
