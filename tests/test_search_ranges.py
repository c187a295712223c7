"""Ranges by the readers' error: narrower where that helps, wider for evenly spaced inputs alone, and by the sum that it says."""

from __future__ import annotations

import numpy as np
from core_models import CORE, core_context, float_outputs, floats, images, model, outputs, run_core, sqnr
from scipy.special import ndtr

from qcompile.graph import Array, Graph
from qcompile.passes.search_ranges import FACTORS, WIDENINGS, SearchRanges

CONV = "Conv <pads = [1, 1, 1, 1]>"
W = floats(3, 3, 3, 3) * 0.3


def outlier_images() -> list[dict[str, Array]]:
    """Standard normal but for one value twice as large as any other: many values gain by clipping it, one loses."""
    feeds = images(6, size=64)
    feeds[0]["x"][0, 0, 4, 4] = 8
    return feeds


def source() -> Graph:
    return Graph.from_proto(model(f"g (float[1, 3, h, v] x) => (float[n, 3, p, q] y) {{ y = {CONV} (x, w) }}", w=W))


def test_an_outlier_is_clipped_where_that_lowers_the_readers_error() -> None:
    proto = source().to_proto()
    feeds = outlier_images()
    before, context, _ = run_core(proto, feeds, until="quantise", ranges="mse")
    plain = sqnr(float_outputs(proto, feeds), outputs(before, feeds))
    assert context.plan is not None
    place = next(c for c in context.plan.classes if c.tensors == ["x"])
    low, high = place.low, place.high
    report = SearchRanges().run(before, context)
    assert report.rewrites >= 1
    assert low <= place.low <= 0 <= place.high <= high
    assert place.high in [high * f for f in FACTORS]
    assert place.scale_const is not None and place.zero_const is not None
    assert place.scale_const.array() == place.scale
    assert int(place.zero_const.array()) == place.zero_point
    assert sqnr(float_outputs(proto, feeds), outputs(before, feeds)) >= plain


def test_the_choice_is_the_least_sum_of_rounding_and_clipping() -> None:
    """The Gemm's squared output error, bias-corrected, computed here in float64 for every pair of factors."""
    w = floats(4, 5, seed=3)
    feeds = [{"x": floats(16, 4, seed=s)} for s in range(4)]
    feeds[1]["x"][3, 2] = 9.0
    proto = model("g (float[n, 4] x) => (float[n, 5] y) { y = Gemm(x, w) }", w=w)
    graph, context, _ = run_core(proto, feeds, until="quantise", ranges="mse")
    assert context.plan is not None
    place = context.plan.classes[0]
    low, high = place.low, place.high
    SearchRanges().run(graph, context)
    x = np.concatenate([f["x"] for f in feeds]).astype(np.float64)

    def energy(error: Array) -> float:
        y = error @ w.astype(np.float64)
        return float(np.square(y - y.mean(axis=0)).sum())

    step = np.float64(np.float32((high - low) / 255))
    zero = np.rint(-low / step)
    rounding = energy((np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step - x)
    costs = {
        (i, j): rounding * ((high * fj - low * fi) / (high - low)) ** 2
        + energy(np.maximum(x, low * fi) - x)
        + energy(np.minimum(x, high * fj) - x)
        for i, fi in enumerate(FACTORS)
        for j, fj in enumerate(FACTORS)
    }
    i, j = min(costs, key=lambda k: costs[k])
    assert (place.low, place.high) == (low * FACTORS[i], high * FACTORS[j])


def test_gaussian_data_without_outliers_keep_nearly_all_of_their_range() -> None:
    graph, context, _ = run_core(source().to_proto(), images(6), until="quantise", ranges="mse")
    assert context.plan is not None
    ranges = [(c.low, c.high) for c in context.plan.classes]
    SearchRanges().run(graph, context)
    for place, (low, high) in zip(context.plan.classes, ranges, strict=True):
        assert place.high - place.low >= 0.7 * (high - low)


def test_it_runs_once_and_only_where_asked() -> None:
    proto = source().to_proto()
    for settings in ({"ranges": "minmax"}, {"ranges": "percentile"}, {"ranges": "mse", "effort": "fast"}):
        graph, context, _ = run_core(proto, outlier_images(), until="quantise", **settings)
        assert SearchRanges().run(graph, context).rewrites == 0
    graph, context, _ = run_core(proto, outlier_images(), until="search_ranges", ranges="mse")
    before = graph.to_proto().SerializeToString(deterministic=True)
    assert SearchRanges().run(graph, context).rewrites == 0
    assert graph.to_proto().SerializeToString(deterministic=True) == before


def test_without_a_plan_nothing_happens() -> None:
    graph = source()
    for step in CORE[2:]:
        assert step.run(graph, core_context([])).rewrites == 0


def test_the_float_model_is_left_as_it_was() -> None:
    """The readers run as copies; the weights must not remember them."""
    graph, context, _ = run_core(source().to_proto(), outlier_images(), until="quantise", ranges="mse")
    assert context.float_graph is not None
    before = [len(c.outputs) for c in context.float_graph.constants.values()]
    SearchRanges().run(graph, context)
    assert [len(c.outputs) for c in context.float_graph.constants.values()] == before


def test_dead_tensors_and_sums_are_no_trouble() -> None:
    body = f"a = {CONV} (x, zero)  d = {CONV} (x, w)  s = Add(a, d)  y = {CONV} (s, w)"
    proto = model(f"g (float[1, 3, h, v] x) => (float[n, 3, p, q] y) {{ {body} }}", w=W, zero=np.zeros_like(W))
    graph, _, _ = run_core(proto, outlier_images(), until="search_ranges", ranges="mse")
    assert np.isfinite(outputs(graph, images())).all()


def _pixels(offset: float, count: int = 3) -> list[dict[str, Array]]:
    """Pictures of whole pixels 0..255 less `offset`, both ends included."""
    rng = np.random.default_rng(5)
    feeds = [rng.integers(0, 256, (1, 3, 16, 16)) for _ in range(count)]
    feeds[0][0, 0, 0, :2] = 0, 255
    return [{"x": (f - offset).astype(np.float32)} for f in feeds]


def test_pixels_half_way_between_two_steps_get_a_slightly_wider_range() -> None:
    """x = n - 127.5 over 255 steps of 1 lies at a tie everywhere: the squared error is 1/4, three times that of other data."""
    feeds = _pixels(127.5)
    graph, context, _ = run_core(source().to_proto(), feeds, until="quantise", ranges="mse")
    assert context.plan is not None
    place = next(c for c in context.plan.classes if c.tensors == ["x"])
    assert (place.low, place.high) == (-127.5, 127.5)
    before = sqnr(float_outputs(source().to_proto(), feeds), outputs(graph, feeds))
    SearchRanges().run(graph, context)
    assert place.high > 127.5
    assert (place.low / -127.5, place.high / 127.5) in [(w, w) for w in WIDENINGS]
    assert sqnr(float_outputs(source().to_proto(), feeds), outputs(graph, feeds)) > before + 1


def test_pixels_on_the_steps_keep_their_range() -> None:
    graph, context, _ = run_core(source().to_proto(), _pixels(100.0), until="quantise", ranges="mse")
    assert context.plan is not None
    place = next(c for c in context.plan.classes if c.tensors == ["x"])
    SearchRanges().run(graph, context)
    assert (place.low, place.high, float(place.scale)) == (-100.0, 155.0, 1.0)


def test_only_inputs_of_the_model_may_become_wider() -> None:
    """The Relu's output holds the same pixels, half a step off."""
    shift = {"one": np.full((1, 1, 1, 1), 1, np.float32), "half": np.full(1, 0.5, np.float32)}
    body = "a = Conv(x, one, half)  r = Relu(a)  y = Conv(r, two)"
    proto = model(
        f"g (float[1, 1, h, v] x) => (float[n, 1, p, q] y) {{ {body} }}", two=np.full((1, 1, 1, 1), 2, np.float32), **shift
    )
    feeds = [{"x": f["x"][:, :1]} for f in _pixels(0.0)]
    graph, context, _ = run_core(proto, feeds, until="quantise", ranges="mse")
    assert context.plan is not None
    ranges = {tuple(c.tensors): (c.low, c.high) for c in context.plan.classes if "x" not in c.tensors}
    SearchRanges().run(graph, context)
    for place in context.plan.classes:
        if "x" not in place.tensors:
            assert place.high <= ranges[tuple(place.tensors)][1]


def test_what_a_function_reads_is_judged_by_what_the_layer_behind_it_makes_of_the_error() -> None:
    """GELU in 8 bits: the Gemm's squared output error, bias-corrected, here in float64 for every pair of factors."""
    w, v, t = floats(4, 6, seed=3), floats(6, 5, seed=4), np.array([0.5, 2, 1, 1, 4, 0.25], np.float32)
    feeds = [{"x": floats(16, 4, seed=s)} for s in range(4)]
    feeds[2]["x"][5] *= 6
    text = "g (float[n, 4] x) => (float[n, 5] y) { h = Gemm(x, w) f = Gelu(h) s = Mul(f, t) y = Gemm(s, v) }"
    proto = model(text, w=w, v=v, t=t)
    graph, context, _ = run_core(proto, feeds, until="quantise", ranges="mse", format="qoperator")
    assert context.plan is not None
    place = next(c for c in context.plan.classes if c.tensors == ["h"])
    low, high = place.low, place.high
    SearchRanges().run(graph, context)
    h = np.concatenate([f["x"] for f in feeds]).astype(np.float64) @ w

    def energy(changed: Array) -> float:
        y = ((changed * ndtr(changed) - h * ndtr(h)) * t) @ v.astype(np.float64)
        return float(np.square(y - y.mean(axis=0)).sum())

    step = np.float64(np.float32((high - low) / 255))
    zero = np.rint(-low / step)
    rounding = energy((np.clip(np.rint(h / step) + zero, 0, 255) - zero) * step)
    flat = energy(np.maximum(h, low))  # below the range, which leaves out where GELU is flat: part of the rounding
    costs = {
        (i, j): rounding * ((high * fj - low * fi) / (high - low)) ** 2
        + max(energy(np.maximum(h, low * fi)) - flat, 0)
        + energy(np.minimum(h, high * fj))
        for i, fi in enumerate(FACTORS)
        for j, fj in enumerate(FACTORS)
    }
    i, j = min(costs, key=lambda k: costs[k])
    assert (i, j) != (0, 0)
    assert (place.low, place.high) == (low * FACTORS[i], high * FACTORS[j])
