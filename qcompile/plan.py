"""What the quantising passes decide and hand on: which tensors share a scale, which nodes are integer, which were refused."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.graph import Const, Node


@dataclass(eq=False)
class ScaleClass:
    """Tensors that share one scale and zero point.

    tensors: their names in the float graph. low, high: the calibrated range. ceiling, floor: bounds that the range carries in
    place of a folded Relu/Clip (None: none); where the scale reaches past them all the same, Clips on integers stand (`clamped`).
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
class LinearSite:
    """An integer Conv or Gemm. `result` is None where it ends in float. Its weights' channel axis is `axis`;
    `weight_scale` and `stored`, its scales and integers, are there from `round_weights` on."""

    node: Node
    source: ScaleClass
    result: ScaleClass | None
    axis: int
    depthwise: bool
    weight_scale: np.ndarray[tuple[int], np.dtype[np.float32]] | None = None
    stored: Const | None = None


@dataclass(eq=False)
class ClampSite:
    """A Relu or Clip done on integers (`node` is a Clip) where the class's range reaches past its bounds."""

    node: Node
    place: ScaleClass
    floor: float
    ceiling: float


@dataclass
class Plan:
    """All decisions of one compilation, in graph order."""

    classes: list[ScaleClass] = field(default_factory=list)
    linears: list[LinearSite] = field(default_factory=list)
    adds: list[AddSite] = field(default_factory=list)
    pools: list[PoolSite] = field(default_factory=list)
    clamps: list[ClampSite] = field(default_factory=list)
    searched: bool = False
    refined: bool = False
