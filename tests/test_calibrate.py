"""The calibration pass: exact extremes of the right tensors, from one sweep, and the graph untouched."""

from __future__ import annotations

import numpy as np
import pytest
from core_models import core_context, floats, images, model
from test_walk import whole_run

from qcompile.context import Context
from qcompile.errors import DataError
from qcompile.graph import Graph
from qcompile.passes.calibrate import Calibrate

CONV = "Conv <pads = [1, 1, 1, 1]>"
TEXT = f"""g (float[1, 3, 8, 8] x) => (float[n, 4] y) {{
    a = {CONV} (x, w)  r = Relu(a)  m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
    p = GlobalAveragePool(m)  f = Flatten(p)  y = Gemm(f, k) }}"""


def linked() -> Graph:
    return Graph.from_proto(model(TEXT, w=floats(3, 3, 3, 3), k=floats(3, 4)))


def test_the_extremes_of_every_scale_source() -> None:
    graph, feeds = linked(), images(5)
    before = graph.to_proto()
    context = core_context(feeds)
    assert Calibrate().run(graph, context).rewrites == 0
    assert set(context.observers) == {"x", "r", "p"}  # m and f share a scale with what they move
    assert context.calibrated == 5
    values = whole_run(graph, feeds) | {"x": [f["x"] for f in feeds]}
    for name, observer in context.observers.items():
        # The Conv may run in another kernel here; the extremes agree to a few ulp.
        assert observer.low == pytest.approx(float(np.min(values[name])), rel=1e-5, abs=1e-7)
        assert observer.high == pytest.approx(float(np.max(values[name])), rel=1e-5)
    after = graph.to_proto()
    assert [n.SerializeToString() for n in after.graph.node] == [n.SerializeToString() for n in before.graph.node]
    assert [o.name for o in after.graph.output] == ["y"]


def test_samples_are_kept_in_order_and_bounded() -> None:
    feeds = images(300)
    context = core_context(feeds)
    Calibrate().run(linked(), context)
    assert len(context.samples) == 75  # every fourth of 300; 128 at most
    for index, sample in enumerate(context.samples):
        np.testing.assert_array_equal(sample["x"], feeds[4 * index]["x"])


def test_a_second_run_sweeps_no_more() -> None:
    graph, sweeps = linked(), []

    def sweep() -> list[dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]]:
        sweeps.append(1)
        return images(2)

    context = Context(calibration=sweep)
    for _ in range(2):
        assert Calibrate().run(graph, context).rewrites == 0
    assert len(sweeps) == 1


def test_percentiles_keep_a_sample_others_do_not() -> None:
    for ranges, kept in (("percentile", True), ("minmax", False), ("mse", False)):
        context = core_context(images(2), ranges=ranges)
        Calibrate().run(linked(), context)
        assert bool(context.observers["x"].sample().size) is kept


def test_an_output_that_is_quantised_is_watched_once() -> None:
    text = f"g (float[1, 3, 8, 8] x) => (float[n, 3, p, q] y) {{ a = {CONV} (x, w)  y = {CONV} (a, w) }}"
    context = core_context(images(2))
    Calibrate().run(Graph.from_proto(model(text, w=floats(3, 3, 3, 3))), context)
    assert set(context.observers) == {"x", "a", "y"}


def test_nothing_to_quantise_asks_for_no_data() -> None:
    graph = Graph.from_proto(model("g (float[2] x) => (float[2] y) { y = Relu(x) }"))

    def sweep() -> list[dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]]:
        raise AssertionError("no sweep is needed")

    context = Context(calibration=sweep)
    Calibrate().run(graph, context)
    assert context.observers == {}


def test_progress_ticks_once_a_feed() -> None:
    stages: list[str] = []
    context = core_context(images(3))
    context.progress = stages.append
    Calibrate().run(linked(), context)
    assert stages == ["calibrating"] * 3


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        pytest.param([], "calibration data are empty", id="empty"),
        pytest.param([{"x": np.full((1, 3, 8, 8), np.nan, np.float32)}], "tensor 'x' became NaN", id="nan"),
        pytest.param([{"x": np.full((1, 3, 8, 8), 1e35, np.float32)}], "tensor 'x' became", id="absurd"),
    ],
)
def test_data_that_cannot_be_used(feeds: list[dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Calibrate().run(linked(), core_context(feeds))
