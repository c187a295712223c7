"""Models with outlier channels for the tests of smoothing."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto

from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph
from qcompile.passes.calibrate import Calibrate
from qcompile.passes.quantise import scale_sources
from qcompile.passes.smooth import Smooth
from qcompile.placement import place
from qcompile.rewrite import Report
from qcompile.runtime import Optimisation, Session


def calibrated(model: ModelProto, feeds: list[dict[str, Array]], settings: Settings | None = None) -> tuple[Graph, Context]:
    graph = Graph.from_proto(model)
    context = Context(settings or Settings(), calibration=lambda: feeds)
    Calibrate().run(graph, context)
    return graph, context


def smoothed(
    model: ModelProto, feeds: list[dict[str, Array]], settings: Settings | None = None, **options: object
) -> tuple[Report, Graph, Context]:
    """Run the pass; asserts a valid model, equal outputs, exact statistics and an idle second run."""
    graph, context = calibrated(model, feeds, settings)
    pass_ = Smooth(**options)  # type: ignore[arg-type]
    report = pass_.run(graph, context)
    result = graph.to_proto()
    onnx.checker.check_model(result, full_check=True)
    for level in (Optimisation.OFF, Optimisation.ALL):
        before, after = Session(model, optimisation=level), Session(result, optimisation=level)
        for feed in feeds:
            for name, value in before.run(feed).items():
                scale = float(np.abs(value).max())
                np.testing.assert_allclose(after.run(feed)[name], value, rtol=0, atol=1e-5 * scale, err_msg=name)
    assert pass_.run(graph, context).rewrites == 0, "a second run rewrote something"
    fresh = Context(context.settings, calibration=lambda: feeds)
    Calibrate().run(graph, fresh)
    assert list(context.observers) == list(fresh.observers) == scale_sources(graph, place(graph, context.settings))
    for name, observer in fresh.observers.items():
        kept = context.observers[name]
        np.testing.assert_allclose([kept.low, kept.high], [observer.low, observer.high], rtol=2e-5, err_msg=name)
        if kept.lows is not None:
            np.testing.assert_allclose(kept.lows, observer.lows, rtol=1e-4, atol=1e-5 * observer.high, err_msg=name)
            np.testing.assert_allclose(kept.highs, observer.highs, rtol=1e-4, atol=1e-5 * observer.high, err_msg=name)
    return report, graph, context
