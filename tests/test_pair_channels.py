"""Channels in the order that the pair rule likes: the float model stays the same, and the rule forbids less."""

from __future__ import annotations

import numpy as np
import pytest
from core_models import core_context, images, model, run_registry
from passes_helpers import check_pass, floats, parse

from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph
from qcompile.pairing import matching_cost, pair_costs
from qcompile.passes._orders import GROUPED, permutable_streams, places, slot_classes
from qcompile.passes.calibrate import Calibrate
from qcompile.passes.pair_channels import PairChannels

OUTPUT = "its channels are an output of the graph"
READ = "read by an operator that is not homogeneous"


def network(body: str, outputs: str = "float[n, 8, p, q] y", **constants: Array) -> Graph:
    """x [n, 4, 9, 9] -> Conv to 16 channels `a`, then `body`, which ends in `y`."""
    weights = {"wa": floats(16, 4, 1, 1), "ba": floats(16, seed=1), "wy": floats(8, 16, 1, 1, seed=2), **constants}
    return Graph.from_proto(parse(f"g (float[n, 4, 9, 9] x) => ({outputs}) {{ a = Conv(x, wa, ba)  {body} }}", **weights))


def reader_costs(graph: Graph) -> list[float]:
    """What the rule forbids at each dense Conv and Gemm that reads no input of the model, in graph order."""
    found = []
    for node in graph.nodes:
        const = node.constant(1) if node.op in ("Conv", "Gemm") else None
        if const is None or node.attr("group", 1) != 1 or node.inputs[0].producer is None:
            continue
        weight = const.array()
        if node.op == "Gemm":
            rows = (weight if node.attr("transB", 0) else weight.T)[:, None, :]
        else:
            rows = np.moveaxis(weight, 1, -1).reshape(weight.shape[0], -1, weight.shape[1])
        found.append(matching_cost(pair_costs(rows), np.arange(rows.shape[2])) if rows.shape[2] % 2 == 0 else 0.0)
    return found


DEPTHWISE = "Conv <group = 16, pads = [1, 1, 1, 1]>"
BODIES = [
    pytest.param("y = Conv(a, wy)", {}, id="bare"),
    pytest.param("r = Relu(a)  y = Conv(r, wy)", {}, id="relu"),
    pytest.param("r = Clip(a, low, high)  y = Conv(r, wy)", {"low": np.float32(0), "high": np.float32(6)}, id="relu6"),
    pytest.param("s = HardSwish(a)  t = Sigmoid(s)  y = Conv(t, wy)", {}, id="not-homogeneous"),
    pytest.param(
        f"d = {DEPTHWISE} (a, wd, bd)  y = Conv(d, wy)",
        {"wd": floats(16, 1, 3, 3, seed=3), "bd": floats(16, seed=4)},
        id="depthwise",
    ),
    pytest.param(
        f"d = {DEPTHWISE} (a, wd)  s = Add(a, d)  t = Add(s, k)  y = Conv(t, wy)",
        {"wd": floats(16, 1, 3, 3, seed=3), "k": floats(16, 1, 1, seed=5)},
        id="residual-and-a-constant-a-channel",
    ),
    pytest.param(
        "b = Conv(a, wb)  r = Relu(b)  c = Conv <pads = [1, 1, 1, 1]> (r, wc)  s = Add(a, c)  y = Conv(s, wy)",
        {"wb": floats(12, 16, 1, 1, seed=6), "wc": floats(16, 12, 3, 3, seed=7)},
        id="residual-block",
    ),
    pytest.param(
        "b = Conv(x, wb)  j = Concat <axis = 1> (a, b)  m = MaxPool <kernel_shape = [2, 2]> (j)  y = Conv(m, wj)",
        {"wb": floats(6, 4, 1, 1, seed=8), "wj": floats(8, 22, 1, 1, seed=9)},
        id="concat",
    ),
    pytest.param(
        "p = Pad(a, pads)  b = Conv(a, wb)  s = Add(p, b)  y = Conv(s, wj)",
        {
            "pads": np.array([0, 4, 0, 0, 0, 4, 0, 0]),
            "wb": floats(24, 16, 1, 1, seed=8),
            "wj": floats(8, 24, 1, 1, seed=9),
        },
        id="channels-padded-for-a-shortcut",
    ),
]


@pytest.mark.parametrize(("body", "constants"), BODIES)
def test_the_function_stays_and_the_rule_forbids_less(body: str, constants: dict[str, Array]) -> None:
    source = network(body, **constants)
    before = reader_costs(source)
    report, graph = check_pass(PairChannels(), source.to_proto(), [{"x": floats(2, 4, 9, 9, seed=s)} for s in (11, 12)])
    assert report.rewrites >= 1
    assert sum(reader_costs(graph)) < 0.7 * sum(before)


@pytest.mark.parametrize("transposed", [0, 1], ids=["gemm", "transB"])
def test_a_flattened_image_is_followed_to_the_gemm(transposed: int) -> None:
    """Its columns come in runs of one channel: nothing pairs there, but they move along with what the Conv wants."""
    matrix = floats(16 * 81, 5, seed=3)
    body = (
        "b = Conv(a, wb)  r = Relu(b)  s = Add(a, r)  f = Flatten <axis = 1> (s)  "
        f"z = Gemm <transB = {transposed}> (f, m)  c = Conv(s, wy)  y = Relu(c)"
    )
    source = network(
        body, "float[n, 5] z, float[n, 8, p, q] y", wb=floats(16, 16, 1, 1, seed=2), m=matrix.T.copy() if transposed else matrix
    )
    report, _ = check_pass(PairChannels(), source.to_proto(), {"x": floats(2, 4, 9, 9, seed=8)})
    assert report.rewrites == 1


def test_pooled_channels_pair_in_the_gemm() -> None:
    source = network("g = GlobalAveragePool(a)  f = Flatten <axis = 1> (g)  y = Gemm(f, m)", "float[n, 5] y", m=floats(16, 5))
    before = reader_costs(source)
    report, graph = check_pass(PairChannels(), source.to_proto(), {"x": floats(2, 4, 9, 9, seed=8)})
    assert report.rewrites == 1
    assert reader_costs(graph)[0] < before[0]


@pytest.mark.parametrize(
    ("body", "ends", "reason"),
    [
        pytest.param("y = Conv(a, wy)", "float[n, 16, p, q] a, float[n, 8, p, q] y", OUTPUT, id="an-output"),
        pytest.param("s = Softmax <axis = 1> (a)  y = Conv(s, wy)", "float[n, 8, p, q] y", READ, id="softmax"),
        pytest.param("s = Conv <group = 2> (a, wg)  y = Relu(s)", "float[n, 8, p, q] y", READ, id="grouped-convolution"),
        pytest.param("t = Transpose <perm = [0, 2, 3, 1]> (a)  y = Relu(t)", "float[n, p, q, 16] y", READ, id="transpose"),
    ],
)
def test_channels_that_are_told_apart_stay(body: str, ends: str, reason: str) -> None:
    source = network(body, ends, wg=floats(8, 8, 1, 1, seed=3))
    report, _ = check_pass(PairChannels(), source.to_proto(), {"x": floats(1, 4, 9, 9)})
    assert report.rewrites == 0
    assert report.skipped[reason] >= 1


@pytest.mark.parametrize(
    ("groups", "width"),
    [pytest.param(16, 1, id="depthwise"), pytest.param(4, 4, id="grouped"), pytest.param(8, 2, id="grouped by two")],
)
def test_a_grouped_convolution_that_starts_a_stream_keeps_its_order(groups: int, width: int) -> None:
    """Nothing is known of the order of what it reads: its outputs would be made of other inputs."""
    text = f"""g (float[n, 16, 9, 9] x) => (float[n, 8, p, q] y) {{
        a = Conv <group = {groups}, pads = [1, 1, 1, 1]> (x, w)  r = Relu(a)  y = Conv(r, v) }}"""
    proto = parse(text, w=floats(16, width, 3, 3), v=floats(8, 16, 1, 1))
    report, _ = check_pass(PairChannels(), proto, {"x": floats(2, 16, 9, 9)})
    assert report.rewrites == 0
    assert report.skipped[GROUPED] == 1


@pytest.mark.parametrize(
    "settings",
    [Settings(target="vnni"), Settings(target="arm"), Settings(bits=4), Settings(exclude=("*",))],
    ids=["vnni", "arm", "4-bits", "excluded"],
)
def test_it_is_idle_where_no_pair_is_bounded(settings: Settings) -> None:
    proto = model("g (float[n, 4, 9, 9] x) => (float[n, 8, p, q] y) { a = Conv(x, w)  y = Conv(a, v) }",
                  w=floats(16, 4, 1, 1), v=floats(8, 16, 1, 1))  # fmt: skip
    graph = Graph.from_proto(proto)
    assert PairChannels().run(graph, Context(settings)).rewrites == 0


def test_an_odd_number_of_channels_stays() -> None:
    proto = parse("g (float[n, 4, 9, 9] x) => (float[n, 8, p, q] y) { a = Conv(x, w)  y = Conv(a, v) }",
                  w=floats(15, 4, 1, 1), v=floats(8, 15, 1, 1))  # fmt: skip
    assert PairChannels().run(Graph.from_proto(proto), Context()).rewrites == 0


def test_weights_used_twice_are_not_changed_for_the_other_reader() -> None:
    body = "b = Conv(x, wa, ba)  c = Relu(b)  y = Conv(a, wy)"
    check_pass(PairChannels(), network(body, "float[n, 16, p, q] c, float[n, 8, p, q] y").to_proto(), {"x": floats(1, 4, 9, 9)})


def test_the_extremes_of_each_channel_follow() -> None:
    proto = network("r = Relu(a)  y = Conv(r, wy)").to_proto()
    feeds = images(3, channels=4, size=9)
    graph, context = Graph.from_proto(proto), core_context(feeds)
    Calibrate().run(graph, context)
    assert PairChannels().run(graph, context).rewrites == 1
    again = core_context(feeds)
    Calibrate().run(graph, again)
    followed = 0
    for name, observer in context.observers.items():
        if observer.lows is not None and observer.highs is not None:
            other = again.observers[name]
            assert other.lows is not None
            assert other.highs is not None
            np.testing.assert_allclose(observer.lows, other.lows, atol=1e-5)
            np.testing.assert_allclose(observer.highs, other.highs, atol=1e-5)
            followed += observer.lows.size == 16
    assert followed


def test_places_undo_a_permutation_of_slots() -> None:
    numbers, moved = np.array([0, 0, 2, 2, 1, 1]), np.array([2, 0, 1])
    assert places(numbers, moved).tolist() == [2, 3, 4, 5, 0, 1]


def test_slots_that_a_slice_leaves_out_are_a_class_of_their_own() -> None:
    slice_ = "s = Slice(a, starts, ends, axes)  z = Conv(s, ws)  y = Conv(a, wy)"
    numbers = {name: np.array([value]) for name, value in {"starts": 4, "ends": 12, "axes": 1}.items()}
    graph = network(slice_, "float[n, 2, p, q] z, float[n, 8, p, q] y", ws=floats(2, 8, 1, 1, seed=5), **numbers)
    graph.infer_shapes()
    stream = next(s for s in permutable_streams(graph) if s.size == 16)
    classes = slot_classes(stream)
    assert len(set(classes[4:12])) == 1
    assert set(classes[:4]) == set(classes[12:]) != set(classes[4:12])
    check_pass(PairChannels(), graph.to_proto(), {"x": floats(1, 4, 9, 9)})


def test_the_registry_runs_it_and_the_written_pairs_obey_the_rule() -> None:
    proto = model("g (float[1, 4, 9, 9] x) => (float[1, 8, p, q] y) { a = Conv(x, w)  r = Relu(a)  y = Conv(r, v) }",
                  w=floats(16, 4, 1, 1), v=floats(8, 16, 1, 1))  # fmt: skip
    graph, context = run_registry(proto, images(3, channels=4, size=9), ranges="mse")
    assert context.paired
    weights = [c.array() for c in graph.constants.values() if c.array().dtype == np.int8 and c.array().size >= 64]
    assert weights
    for weight in weights:
        sums = weight.reshape(weight.shape[0], -1, 2).astype(np.int64).sum(axis=-1)
        assert np.abs(sums).max() <= 128
