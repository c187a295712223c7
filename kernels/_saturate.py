"""Rescaling kernels: what their outputs mean, and how they end, int32 clipped to the output's type."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import FunctionProto, TensorProto, helper

from qcompile.kernels._protocol import Kernel, function

# Clip takes scalars; `moved` is what the body makes.
_SATURATE = """
    clipped = Clip (moved, low_, high_)
    y = Cast <to : int = @to> (clipped)
"""


@dataclass(frozen=True)
class Rescale(Kernel):
    """int32 x times a number, plus a zero point, as integers of `dtype`."""

    @property
    @abstractmethod
    def _output(self) -> tuple[int, str]:
        """Zero point and type."""

    @property
    def output_scale(self) -> float:
        """1: one step of the output."""
        return 1.0

    @property
    def output_zero_point(self) -> int:
        """As given."""
        return self._output[0]

    @property
    def _limits(self) -> np.iinfo[Any]:
        return np.iinfo(self._output[1])

    def attributes(self) -> dict[str, int]:
        """low and high of the output, and its type."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self._output[1]))
        return {"low": int(self._limits.min), "high": int(self._limits.max), "to": kind}

    def _function(self, body: str, meaning: str) -> FunctionProto:
        """The function from x and the constants: `body` makes int32 `moved`, which is clipped to low..high and cast."""
        return self._ended(body + _SATURATE, meaning)

    def _ended(self, body: str, meaning: str) -> FunctionProto:
        """The same of a body that makes `y` itself."""
        head = f"{self.name} <{', '.join(Rescale.attributes(self))}> (x, {', '.join(self.constants())}) => (y)"
        made = function(f"{head} {{ {body} }}", {"low": TensorProto.INT32, "high": TensorProto.INT32})
        made.doc_string = meaning
        return made
