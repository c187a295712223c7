"""Models with uneven channels for the tests of equalisation, and how the pass is run on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from onnx import ModelProto
from passes_helpers import check_pass, floats, parse

from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph
from qcompile.passes.calibrate import Calibrate
from qcompile.passes.equalise import Equalise
from qcompile.passes.quantise import scale_sources
from qcompile.placement import place
from qcompile.rewrite import Close, Promise, Report

C = 8

# Channels that differ a hundredfold, as outputs of a Conv; what reads them is level, so that moving the spread pays.
SPREAD = np.array([30, 0.3, 1, 0.5, 12, 0.3, 4, 0.4], np.float32)


@dataclass(frozen=True)
class Calibrated:
    """Equalise on what calibration saw: a pass for `check_pass`, which knows no data."""

    feeds: Sequence[dict[str, Array]]
    settings: Settings = field(default_factory=Settings)
    step: Equalise = field(default_factory=Equalise)
    contexts: list[Context] = field(default_factory=list)
    name: str = "equalise"
    keeps: Promise = field(default_factory=Close)

    def run(self, graph: Graph, context: Context) -> Report:
        if not self.contexts:
            self.contexts.append(Context(self.settings, calibration=lambda: self.feeds))
            Calibrate().run(graph, self.contexts[0])
        return self.step.run(graph, self.contexts[0])


def equalised(
    model: ModelProto, feeds: Sequence[dict[str, Array]], settings: Settings | None = None, **options: object
) -> tuple[Report, Graph, Context]:
    """Run the pass under `check_pass`; asserts that the statistics are those of a fresh calibration too."""
    pass_ = Calibrated(feeds, settings or Settings(), Equalise(**options))  # type: ignore[arg-type]
    report, graph = check_pass(pass_, model, feeds)
    context = pass_.contexts[0]
    fresh = Context(context.settings, calibration=lambda: feeds)
    Calibrate().run(graph, fresh)
    assert list(context.observers) == list(fresh.observers) == scale_sources(graph, place(graph, context.settings))
    for name, observer in fresh.observers.items():
        kept = context.observers[name]
        size = max(abs(observer.low), abs(observer.high))
        np.testing.assert_allclose(kept.lows, observer.lows, rtol=1e-4, atol=1e-5 * size, err_msg=name)
        np.testing.assert_allclose(kept.highs, observer.highs, rtol=1e-4, atol=1e-5 * size, err_msg=name)
        if not kept.fixed:
            np.testing.assert_allclose([kept.low, kept.high], [observer.low, observer.high], rtol=2e-5, err_msg=name)
        else:  # one part of both ends is kept
            assert kept.low == pytest.approx(observer.low * kept.high / observer.high, rel=1e-4, abs=1e-6 * size)
            assert 0.69 < kept.high / observer.high < 1.0001
    return report, graph, context


def images(count: int = 16, channels: int = 3, size: int = 8) -> list[dict[str, Array]]:
    return [{"x": floats(1, channels, size, size, seed=i)} for i in range(count)]


def uneven(*shape: int, seed: int = 0) -> Array:
    """Weights whose output channels differ as SPREAD does."""
    return floats(*shape, seed=seed) * np.resize(SPREAD, shape[0]).reshape(-1, *[1] * (len(shape) - 1))


IMAGE = "g (float[1,3,8,8] x) => (float[n,m,h,w] y)"
HEAD = "u = Conv(y0, t) y = Sigmoid(u)"  # the last stream ends in what is not homogeneous
COMMON = {"a": uneven(C, 3, 3, 3, seed=1), "b": uneven(C, seed=2), "v": floats(6, C, 1, 1, seed=3)}

RESIDUAL = """{IMAGE} {{
    p0 = Conv(x, a, b) h1 = Conv(p0, e1) r1 = Clip(h1, zero, six) p1 = Conv(r1, f1, b) s1 = Add(p0, p1)
    h2 = Conv(s1, e2) r2 = Clip(h2, zero, six) p2 = Conv(r2, f2) s2 = Add(s1, p2) y = Conv(s2, v, g)
}}"""


def residual(**changes: Array) -> ModelProto:
    values: dict[str, Array] = {
        **COMMON,
        "b": uneven(C, seed=2) * 3,
        "e1": floats(12, C, 1, 1, seed=5) / 9,
        "e2": floats(12, C, 1, 1, seed=6) / 9,
        "f1": uneven(C, 12, 1, 1, seed=7) / 4,
        "f2": uneven(C, 12, 1, 1, seed=8) / 4,
        "g": floats(6, seed=9),
        "zero": np.float32(0),
        "six": np.float32(6),
    }
    return parse(RESIDUAL.format(IMAGE=IMAGE), **{**values, **changes})
