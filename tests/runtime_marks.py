"""What the least onnxruntime that is tested cannot do: marks for tests that need a newer one."""

from __future__ import annotations

import onnxruntime
import pytest

from qcompile.runtime import runs_signed_conv_integer

_OLD = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < (1, 24)

needs_conv_integer = pytest.mark.skipif(
    not runs_signed_conv_integer(),
    reason="this onnxruntime has no ConvInteger for int8 weights: --format integer refuses convolutions",
)
needs_epsilon_first = pytest.mark.skipif(_OLD, reason="onnxruntime 1.23 loses an epsilon that stands first")
needs_empty_products = pytest.mark.skipif(_OLD, reason="MatMul of no rows fails in onnxruntime 1.23")
