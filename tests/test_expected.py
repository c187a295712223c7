"""BatchNormalization statistics: bn_statistics, expected, input_statistics, and the passes that use them without data."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from passes_helpers import floats, parse
from scipy import integrate, stats

from qcompile.bn_statistics import BatchNormRecord, ChannelStatistics, batch_norm_records, resolve
from qcompile.context import Context
from qcompile.expected import clipped_moments, expected_values, propagate
from qcompile.graph import Array, Graph
from qcompile.input_statistics import input_moments, vocabularies
from qcompile.passes.expect_ranges import ExpectRanges
from qcompile.passes.fold_bn import FoldBatchNorm
from qcompile.passes.fuse_linear import FuseLinear
from qcompile.passes.record_bn import RecordBatchNorm
from qcompile.ranges import Observer
from qcompile.runtime import Session

INF = float("inf")
NET = """agraph (float[N, 3, 6, 6] x) => (float[N, 4, 6, 6] y)
{ c = Conv<pads: ints = [1, 1, 1, 1]>(x, w)  n = BatchNormalization(c, g, b, m, v)  r = Relu(n)
  d = Conv(r, w2)  o = BatchNormalization(d, g, b, m, v)  s = Add(o, r)  y = Relu(s) }"""


def net(**other: Array) -> Graph:
    constants = {
        "w": floats(4, 3, 3, 3), "w2": floats(4, 4, 1, 1, seed=1), "g": np.array([1, -2, 0.5, 0], np.float32),
        "b": np.array([0, 1, -1, 3], np.float32), "m": floats(4, seed=2), "v": np.abs(floats(4, seed=3)) + 0.1,
    }  # fmt: skip
    return Graph.from_proto(parse(NET, 21, **{**constants, **other}))


@pytest.mark.parametrize(("low", "high"), [(0, INF), (0, 6), (-INF, INF), (-1, 1), (-INF, 2), (3, 3)], ids=str)
def test_clipped_moments_against_integration(low: float, high: float) -> None:
    mean, deviation = np.array([0.0, 1.5, -4.0, 7.0, 0.3]), np.array([1.0, 0.2, 2.0, 3.0, 10.0])
    got = clipped_moments(ChannelStatistics(mean, deviation), low, high)
    for index, (mu, sd) in enumerate(zip(mean, deviation, strict=True)):
        density = stats.norm(mu, sd).pdf
        ends = sorted({mu - 12 * sd, mu + 12 * sd, *(e for e in (low, high) if abs(e - mu) < 12 * sd)})

        def moment(power: int, density: object = density, ends: list[float] = ends) -> float:
            parts = (
                integrate.quad(lambda y: min(max(y, low), high) ** power * density(y), a, b)[0]  # type: ignore[operator]
                for a, b in pairwise(ends)
            )
            return float(sum(parts))

        assert got.mean[index] == pytest.approx(moment(1), abs=1e-6)
        assert got.deviation[index] == pytest.approx(np.sqrt(max(moment(2) - moment(1) ** 2, 0)), abs=2e-5)


def test_a_constant_channel_is_clipped_as_a_number() -> None:
    got = clipped_moments(ChannelStatistics(np.array([-1.0, 2.0]), np.zeros(2)), 0, INF)
    np.testing.assert_allclose(got.mean, [0, 2], atol=1e-9)
    np.testing.assert_allclose(got.deviation, 0, atol=1e-9)


def test_ranges_and_means_follow_relu_and_add() -> None:
    graph = net()
    found = propagate(graph, resolve(graph, batch_norm_records(graph)))
    assert set(found) == {"n", "r", "o", "s", "y"}
    assert (found["n"].low, found["n"].high) == (-11, 13)  # channel 1: 1 -+ 6 * 2
    assert (found["r"].low, found["r"].high) == (0, 13)
    np.testing.assert_allclose(found["r"].statistics.mean[0], 1 / np.sqrt(2 * np.pi))
    np.testing.assert_allclose(found["s"].statistics.mean, found["o"].statistics.mean + found["r"].statistics.mean)
    np.testing.assert_allclose(found["s"].statistics.deviation ** 2,
                               found["o"].statistics.deviation ** 2 + found["r"].statistics.deviation ** 2)  # fmt: skip
    assert found["s"].low >= -11
    assert found["s"].high <= 26
    assert found["y"].low == 0


def test_names_survive_folding() -> None:
    graph = net()
    records = batch_norm_records(graph)
    FoldBatchNorm().run(graph, Context())
    found = resolve(graph, records)
    assert set(found) == {"c", "d"}
    np.testing.assert_array_equal(found["c"].mean, [0, 1, -1, 3])
    np.testing.assert_array_equal(found["c"].deviation, [1, 2, 0.5, 0])


def test_a_fused_factor_drops_the_renamed_tensor() -> None:
    text = """agraph (float[N, 3, 6, 6] x) => (float[N, 4, 6, 6] y)
    { c = Conv(x, w)  n = BatchNormalization(c, g, b, m, v)  p = Mul(n, f)  y = Relu(p) }"""
    four = np.ones(4, np.float32)
    graph = Graph.from_proto(parse(text, w=floats(4, 3, 1, 1), g=four, b=four, m=four, v=four, f=np.float32(9)))
    records = batch_norm_records(graph)
    assert set(resolve(graph, records)) == {"n"}
    FoldBatchNorm().run(graph, Context())
    FuseLinear().run(graph, Context())
    assert [n.op for n in graph.nodes] == ["Conv", "Relu"]
    assert resolve(graph, records) == {}


@pytest.mark.parametrize(
    ("text", "constants"),
    [
        ("y, p, q = BatchNormalization<training_mode: int = 1>(x, g, b, m, v)", {}),
        ("h = Identity(s) y = BatchNormalization(x, h, b, m, v)", {}),
        ("y = BatchNormalization(x, g, i, m, v)", {"i": np.full(3, np.inf, np.float32)}),
    ],
    ids=["training", "computed", "infinite"],
)
def test_no_record(text: str, constants: dict[str, Array]) -> None:
    three = {n: np.ones(3, np.float32) for n in "gbmv"}
    graph = Graph.from_proto(
        parse(f"agraph (float[N, 3, 2, 2] x, float[3] s) => (float[N, 3, 2, 2] y) {{ {text} }}", 21, **three, **constants)
    )
    assert batch_norm_records(graph) == []


def test_an_add_of_other_channels_is_left_alone() -> None:
    text = "agraph (float[N, 3] x, float[N, 1] z) => (float[N, 3] y) { y = Add(x, z) }"
    graph = Graph.from_proto(parse(text))
    known = {"x": ChannelStatistics(np.zeros(3), np.ones(3)), "z": ChannelStatistics(np.zeros(1), np.ones(1))}
    assert "y" not in propagate(graph, known)


def test_the_passes_set_ranges_only_without_data() -> None:
    for synthetic in (True, False):
        graph, context = net(), Context(synthetic=synthetic)
        RecordBatchNorm().run(graph, context)
        FoldBatchNorm().run(graph, context)
        context.observers = {n: Observer(low=-99.0, high=99.0) for n in ("x", "r", "y")}
        report = ExpectRanges().run(graph, context)
        ranges = {n: (o.low, o.high) for n, o in context.observers.items()}
        assert ranges["x"] == (-99, 99)
        assert ranges["r"] == ((0, 13) if synthetic else (-99, 99))
        assert dict(report.skipped) == ({"no statistics: range from synthetic inputs": 1} if synthetic else {})


def test_nothing_known_of_a_model_without_batch_normalization() -> None:
    graph = Graph.from_proto(parse("agraph (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }"))
    assert expected_values(graph, [BatchNormRecord(("gone",), ChannelStatistics(np.zeros(3), np.ones(3)))]) == {}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_input_moments_are_found_again(bias: bool) -> None:
    """Statistics of a convolution's output, taken from data of known moments, lead back to those moments."""
    random = np.random.default_rng(0)
    mean, deviation = np.array([10.0, -5.0, 2.0]), 4.0
    weight, shift = floats(16, 3, 3, 3), floats(16, seed=9) * (10 if bias else 0)
    data = (random.standard_normal((64, 3, 12, 12)) * deviation + mean[:, None, None]).astype(np.float32)
    conv = parse("agraph (float[N, 3, 12, 12] x) => (float[N, 16, 10, 10] y) { y = Conv(x, w, b) }", w=weight, b=shift)
    y = Session(conv).run({"x": data})["y"].astype(np.float64)
    text = """agraph (float[N, 3, 12, 12] x) => (float[N, 16, 10, 10] y)
    { c = Conv(x, w TAIL)  y = BatchNormalization(c, g, g, m, v) }""".replace("TAIL", ", b" if bias else "")
    model = parse(text, 21, w=weight, g=np.ones(16, np.float32), m=y.mean((0, 2, 3)).astype(np.float32),
                  v=y.var((0, 2, 3)).astype(np.float32), **({"b": shift} if bias else {}))  # fmt: skip
    unit = [{"x": random.standard_normal((8, 3, 12, 12)).astype(np.float32)} for _ in range(4)]
    found = input_moments(Graph.from_proto(model), unit)["x"]
    np.testing.assert_allclose(found.mean, mean, atol=0.05)
    assert found.deviation == pytest.approx(deviation, rel=0.03)


def test_a_batch_normalization_at_the_input_tells_directly() -> None:
    text = "agraph (float[N, 2, 4, 4] x) => (float[N, 2, 4, 4] y) { y = BatchNormalization(x, g, g, m, v) }"
    two = np.ones(2, np.float32)
    model = parse(text, g=two, m=np.array([120, 90], np.float32), v=np.array([3600, 3600], np.float32))
    found = input_moments(Graph.from_proto(model), [])["x"]
    np.testing.assert_array_equal(found.mean, [120, 90])
    assert found.deviation == pytest.approx(60)


@pytest.mark.parametrize(
    "text",
    [
        "c = Conv(x, w) y = Relu(c)",
        "c = Conv<group: int = 2>(x, u) y = BatchNormalization(c, g, g, g, g)",
        "r = Relu(x) c = Conv(r, w) y = BatchNormalization(c, g, g, g, g)",
        "c = Conv(x, w) y = BatchNormalization(c, g, g, g, z)",
        "c = Conv(k, x) y = Relu(c)",
    ],
    ids=["no statistics", "groups", "relu before", "dead", "as weights"],
)
def test_no_input_moments(text: str) -> None:
    model = parse(f"agraph (float[2, 2, 1, 1] x) => (float[2, 2, 1, 1] y) {{ {text} }}", w=floats(2, 2, 1, 1),
                  u=floats(2, 1, 1, 1), g=np.ones(2, np.float32), z=np.zeros(2, np.float32), k=floats(2, 2, 1, 1))  # fmt: skip
    assert input_moments(Graph.from_proto(model), [{"x": floats(2, 2, 1, 1)}]) == {}


def test_vocabularies() -> None:
    text = """agraph (int64[N, L] ids, int32[N, L] kind, int64[N, L] free, int64[N, L] two)
    => (float[N, L, 2] y, float[N, L, 3] z)
    { i = Unsqueeze(ids, axes) s = Squeeze(i, axes) a = Gather(words, s) k = Cast<to: int = 7>(kind) b = Gather(kinds, k)
      f = Cast<to: int = 1>(free) c = Gather<axis: int = 1>(wide, two) t = Transpose<perm: ints = [1, 2, 0]>(c)
      g = Gather(few, two) h = Add(a, b) e = Unsqueeze(f, last) j = Add(h, e) y = Add(j, g) z = Identity(t) }"""
    model = parse(text, words=floats(50, 2), kinds=floats(2, 2), wide=floats(3, 9), few=floats(7, 2), axes=np.array([1]),
                  last=np.array([2]))  # fmt: skip
    assert vocabularies(Graph.from_proto(model)) == {"ids": 50, "kind": 2, "two": 7}
