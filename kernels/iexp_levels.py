"""i-exp once for each distance that there is, then looked up: the integers of `isoftmax.IExp`, for a fraction of its operators.

    table = i-exp(0, 1, .., limit),   y = table[min(max - x, limit)]

A row's distances are cut off at `limit`, 9 ln2 / S, so [heads, queries, keys] scores take few thousand values. The arithmetic is
that of I-BERT, written out in the body; it depends on constants alone, so that a runtime that folds them does it when it loads
the model, and any other on the levels instead of on every score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from onnx import FunctionProto

from qcompile.kernels._protocol import Array, within
from qcompile.kernels._rows import NEAR_BOUND, distance_text, near_text
from qcompile.kernels.isoftmax import VALUE, IExp
from qcompile.kernels.table import lookup_text

# `reached`: the level of a distance; `t`: the distance of a level.
_LEVEL = {
    "": ("reached = Identity (distance)", "last = Identity (limit_)", "t = Identity (level)"),
    "Coarse": ("reached = Identity (distance)", "last = Identity (limit_)", "t = Mul (level, step_)"),
    "Fine": ("reached = Div (distance, step_)", "last = Div (limit_, step_)", "t = Identity (level)"),
}


@dataclass(frozen=True)
class IExpLevels(IExp):
    """What IExp gives. bound: what is known of the scores, |x| <= bound; 2^31 holds for any."""

    bound: int = 2**31

    domain: ClassVar[str] = "int32 scores, any (masked: the promised bound); scale 2^-26..1"

    def __post_init__(self) -> None:
        super().__post_init__()
        within("i-exp by levels: bound of the scores", self.bound, 0, 2**31, "int32 holds no more")

    @property
    def name(self) -> str:
        """IExpLevels, IMaskedExpLevels; Near where scores are within 2^28; and the form."""
        return self._name(f"ExpLevels{'Near' if self._near else ''}")

    @property
    def _near(self) -> bool:
        return self.masked and max(self.bound, self.attributes()["limit"]) <= NEAR_BOUND

    def reference(self, *inputs: Array) -> Array:
        """u8 [..., keys] as IExp's. Raises ValueError beyond `bound`."""
        largest = int(np.abs(inputs[0].astype(np.int64)).max(initial=0))
        if largest > self.bound:
            raise ValueError(f"i-exp by levels: a score of {largest}, made for {self.bound}")
        return super().reference(*inputs)

    def lower(self) -> FunctionProto:
        """One function for each name. There are at most 156,000 levels: 9 ln2 / S for S >= 4e-5, less in the other forms."""
        reached, last, t = _LEVEL[self.polynomial.form]
        text = f"""{self.name} <{", ".join(self.attributes())}> ({self._inputs}) => (y) {{
            {near_text() if self._near else distance_text(self.masked)}
            {reached}
            {last}
            first_level = Sub (limit_, limit_)
            level_step = Constant <value = int32 {{1}}> ()
            levels = Add (last, level_step)
            level = Range (first_level, levels, level_step)
            {t}
            {VALUE}
            {self._result("table")}
            {lookup_text("table", "reached", "y")}
        }}"""
        return self._function(text)
