"""How the interpreter is compared with onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from integer_models import Array

from qcompile.interpret import Interpreter
from qcompile.runtime import Optimisation, Session

SX, ZX = 0.0374, 121
SY, ZY = 0.0525, 118
BOTH = pytest.mark.parametrize("layout", ["qdq", "qoperator"])

# Powers of two make ties frequent: 1/2, 1/4, 3/8 ... of an integer; the last two are ordinary.
TIES = [(1, 1), (1, 2), (3, 3), (1, 4), (5, 5), (1, 3), (311, 16), (1207, 16)]


def levels(layout: str) -> list[Optimisation]:
    return [Optimisation.EXTENDED, Optimisation.ALL] + ([Optimisation.OFF] if layout == "qoperator" else [])


def samples(shape: tuple[int, ...], scale: float = SX, zero: int = ZX) -> list[Array]:
    """Random, saturating, and tie-heavy inputs: the last lie exactly between two integers."""
    rng = np.random.default_rng(3)
    ties = (rng.integers(-128, 128, shape) + 0.5).astype(np.float32) * np.float32(scale)
    extremes = rng.choice(np.array([-1e9, -zero * scale, 0.0, (255 - zero) * scale, 1e9]), shape)
    return [
        np.asarray(v, np.float32)
        for v in (rng.standard_normal(shape), ties, extremes, rng.uniform(-5, 5, shape), np.zeros(shape))
    ]


def same(model: onnx.ModelProto, feeds: list[dict[str, Array]], layout: str, exact: bool = True) -> Interpreter:
    """Assert equality with onnxruntime at every promised level, types and shapes included."""
    interpreter = Interpreter(model)
    sessions = [Session(model, optimisation=level) for level in levels(layout)]
    for feed in feeds:
        got = interpreter.run(feed)
        for session in sessions:
            expected = session.run(feed)
            assert list(got) == list(expected)
            for name, value in expected.items():
                assert got[name].dtype == value.dtype
                assert got[name].shape == value.shape
                assert np.array_equal(got[name], value), f"{np.sum(got[name] != value)} of {value.size} differ"
    if exact:
        assert interpreter.float_nodes == []
    return interpreter


def weights(shape: tuple[int, ...], limit: int = 63) -> Array:
    """|w| <= 63: products do not saturate in pairs on a machine without VNNI either."""
    return np.random.default_rng(5).integers(-limit, limit + 1, shape).astype(np.int8)


def bias(channels: int, spread: int = 3000) -> Array:
    return np.random.default_rng(6).integers(-spread, spread, channels).astype(np.int32)
