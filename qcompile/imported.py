"""What is known of a model that already holds Q/DQ: scales of its tensors, integers of its weights, and what became of both."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qcompile.graph import Array
from qcompile.plan import ScaleClass

KEPT = 2.0**-9  # a channel keeps its integers where its multiplier moves by no larger part than this (DESIGN section 2)


@dataclass(frozen=True)
class Mark:
    """Scale and zero point of one activation tensor, with the integers counted from 0 to 255 whatever their type is.

    scale: float32. zero: the integer of 0.0; low, high: the integers that its QuantizeLinear, and a Clip on integers behind it,
    can give. A signed tensor is taken 128 higher: integer minus zero point stays the same, and so do weights and biases.
    """

    scale: np.float32
    zero: int
    low: int = 0
    high: int = 255

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest value that the integers reach."""
        return (self.low - self.zero) * float(self.scale), (self.high - self.zero) * float(self.scale)

    @property
    def span(self) -> tuple[float, float]:
        """The values at 0 and at 255: what decides scale and zero point."""
        return -self.zero * float(self.scale), (255 - self.zero) * float(self.scale)

    @property
    def narrowed(self) -> bool:
        """Whether a Clip on integers takes away part of the 8 bits."""
        return (self.low, self.high) != (0, 255)


@dataclass(frozen=True)
class StoredWeight:
    """Integers [channels, K] of one linear node, zero points subtracted, and their scale [channels].

    `scale` is None where the scales are not one a channel. K runs in the order of the node's own tensor: (kh, kw, channel of the
    group) for a convolution, the rows of the product for Gemm and MatMul.
    """

    values: Array
    scale: Array | None


@dataclass
class Imported:
    """One imported model.

    marks: name of the Clip that stands for a Q/DQ pair -> its scale. weights: node -> its stored integers; float_weights: nodes
    whose weights the source holds in float. unusable: node -> why its weights cannot be taken over.
    classes: tensors that share a scale, and the source's. scales_kept, scales_moved: how many of those stayed; largest_move: by
    which part of itself a scale moved. channels_kept, channels_rounded: output channels whose integers are the source's, and
    others; channels_far: of those kept, with a multiplier further off than 2^-9; reasons: why the others were rounded again.
    changed: what else differs from the source, counted.
    """

    marks: dict[str, Mark] = field(default_factory=dict)
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    float_weights: set[str] = field(default_factory=set)
    unusable: dict[str, str] = field(default_factory=dict)
    classes: list[tuple[ScaleClass, Mark]] = field(default_factory=list)
    scales_kept: int = 0
    scales_moved: int = 0
    largest_move: float = 0.0
    channels_kept: int = 0
    channels_far: int = 0
    channels_rounded: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    def as_json(self, left_float: dict[str, int], sqnr_db: float | None, least_db: float | None) -> dict[str, Any]:
        """The report's `imported`. left_float: reason -> linear nodes that stay float; sqnr_db: against the imported model."""
        return {
            "sqnr_db": sqnr_db,
            "max_requant_loss_db": least_db,
            "scales": {"kept": self.scales_kept, "moved": self.scales_moved, "largest_move": self.largest_move},
            "channels": {
                "kept": self.channels_kept,
                "kept_beyond_2^-9": self.channels_far,
                "rounded": self.channels_rounded,
                "reasons": dict(sorted(self.reasons.items())),
            },
            "left_float": dict(sorted(left_float.items())),
            "changed": dict(sorted(self.changed.items())),
        }
