"""The walk gives the values of a whole run, holds no more than the widest cut, and takes means exactly."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from core_models import floats, images, model, run_core
from onnx import helper, numpy_helper

from qcompile.graph import Array, Graph, Value
from qcompile.runtime import Session
from qcompile.sessions import graph_session
from qcompile.walk import Stream, dequantise, linear_mean, mean_of

CONV = "Conv <pads = [1, 1, 1, 1]>"


def whole_run(graph: Graph, feeds: list[dict[str, Array]]) -> dict[str, list[Array]]:
    """Every computed tensor for each feed, from one session with all of them as outputs."""
    watched = graph.copy()
    made = [v for v in watched.values() if v.producer is not None and not watched.is_output(v)]
    watched.outputs += made
    session = graph_session(watched, fuse_qdq=False)
    runs = [session.run(feed) for feed in feeds]
    return {name: [r[name] for r in runs] for name in runs[0]}


def held(stream: Stream) -> set[str]:
    return {v.name for v in stream._held}


DIAMOND = f"""g (float[1, 3, 8, 8] x) => (float[n, 3, 8, 8] y, float[n, 3, 1, 1] p) {{
    a = {CONV} (x, w)  b = Relu(a)  c = {CONV} (b, w)  s = Add(b, c)  u, v = Split <axis = 1, split = [1, 2]> (s)
    t = Concat <axis = 1> (v, u)  d = Sigmoid(t)  y = Mul(d, x)  p = GlobalAveragePool(s) }}"""


def diamond() -> Graph:
    text = DIAMOND.replace(", split = [1, 2]> (s)", "> (s, parts)")
    return Graph.from_proto(model(text, w=floats(3, 3, 3, 3), parts=np.array([1, 2])))


def test_the_values_of_a_whole_run_in_graph_order() -> None:
    graph, feeds = diamond(), images(3)
    expected = whole_run(graph, feeds)
    stream = Stream(graph, feeds)
    for value in list(graph.values()):
        got = stream.values(value)
        assert len(got) == 3
        for index, array in enumerate(got):
            wanted = feeds[index]["x"] if value.name == "x" else expected[value.name][index]
            np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-6, err_msg=value.name)


def test_one_request_runs_all_that_leads_to_it_and_nothing_else() -> None:
    graph, feeds = diamond(), images(2)
    stream = Stream(graph, feeds)
    target = next(v for v in graph.values() if v.name == "s")
    np.testing.assert_allclose(stream.values(target)[1], whole_run(graph, feeds)["s"][1], rtol=1e-5, atol=1e-6)
    assert held(stream) == {"x", "s"}  # x is read again by the last Mul; a, b and c are gone


def test_memory_is_a_cut_of_the_graph() -> None:
    body = "  ".join(f"t{i} = Relu(t{i - 1})" for i in range(1, 40))
    graph = Graph.from_proto(model(f"g (float[4] t0) => (float[4] y) {{ {body}  y = Relu(t39) }}"))
    stream = Stream(graph, [{"t0": floats(4)}])
    for value in list(graph.values()):
        stream.values(value)
        assert len(held(stream)) <= 2


def test_dequantised_tensors_are_never_held() -> None:
    graph, context, _ = run_core(
        model(
            f"g (float[1, 3, 8, 8] x) => (float[n, 3, 8, 8] y) {{ a = {CONV} (x, w)  y = {CONV} (a, w) }}", w=floats(3, 3, 3, 3)
        ),
        images(),
        until="integer_bias",
    )
    plan = context.plan
    assert plan is not None
    stream = Stream(graph, context.samples)
    for site in plan.linears:
        reader = site.node.inputs[0].producer
        assert reader is not None
        source = reader.inputs[0]
        assert isinstance(source, Value)
        integers = stream.values(source)
        assert integers[0].dtype == np.uint8
        assert all(a.dtype == np.uint8 or n.name == "x" for n, (a, *_) in stream._held.items())


def test_constants_may_change_ahead_of_the_front() -> None:
    graph = Graph.from_proto(
        model("g (float[2] x) => (float[2] y) { a = Mul(x, k)  y = Mul(a, j) }", k=np.float32(2), j=np.float32(3))
    )
    stream = Stream(graph, [{"x": np.ones(2, np.float32)}])
    values = {v.name: v for v in graph.values()}
    np.testing.assert_array_equal(stream.values(values["a"])[0], [2, 2])
    graph.constants["k"].assign(np.asarray(7, np.float32))  # behind the front: has no effect any more
    graph.constants["j"].assign(np.asarray(5, np.float32))
    np.testing.assert_array_equal(stream.values(values["y"])[0], [10, 10])


def test_bodies_read_tensors_of_the_outer_graph() -> None:
    inner = helper.make_graph(
        [helper.make_node("Add", ["a", "one"], ["r"])], "then", [], [helper.make_tensor_value_info("r", 1, [2])]
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["a"], ["q"])], "else", [], [helper.make_tensor_value_info("q", 1, [2])]
    )
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["a"], name="relu"),
            helper.make_node("Neg", ["x"], ["b"], name="neg"),
            helper.make_node("If", ["flag"], ["c"], name="if", then_branch=inner, else_branch=other),
            helper.make_node("Add", ["b", "c"], ["y"], name="add"),
        ],
        "g",
        [helper.make_tensor_value_info("x", 1, [2]), helper.make_tensor_value_info("flag", 9, [])],
        [helper.make_tensor_value_info("y", 1, [2])],
        [numpy_helper.from_array(np.ones(2, np.float32), "one")],
    )
    source = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(source, full_check=True)
    linked = Graph.from_proto(source)
    feeds = [{"x": floats(2, seed=s), "flag": np.asarray(bool(s % 2))} for s in range(4)]
    stream = Stream(linked, feeds)
    values = {v.name: v for v in linked.values()}
    stream.values(values["b"])  # Neg alone: the body's operand is not computed yet
    got = stream.values(values["y"])
    session = Session(source)
    for array, feed in zip(got, feeds, strict=True):
        np.testing.assert_array_equal(array, session.run(feed)["y"])


# ---- means ----
def test_mean_of_by_shape() -> None:
    arrays = [np.full((1, 2), v, np.float32) for v in (1, 2, 6)] + [np.full((3, 2), 4, np.float32)]
    means = mean_of(arrays)
    assert [(m.shape, c) for m, c in means] == [((1, 2), 3), ((3, 2), 1)]
    assert means[0][0].dtype == np.float64
    np.testing.assert_array_equal(means[0][0], [[3, 3]])


CASES = [
    pytest.param("Conv <pads = [1, 1, 1, 1]>", (4, 3, 3, 3), (3, 6, 5), id="conv"),
    pytest.param("Conv <strides = [2, 2], dilations = [1, 2]>", (4, 3, 2, 2), (3, 7, 8), id="strides-dilations"),
    pytest.param("Conv <group = 3, pads = [2, 0, 1, 0]>", (6, 1, 2, 1), (3, 6, 6), id="groups"),
    pytest.param('Conv <auto_pad = "SAME_UPPER", strides = [2, 2]>', (4, 3, 3, 3), (3, 7, 7), id="auto-pad"),
    pytest.param("Conv", (4, 3, 3), (3, 9), id="one-dimension"),
    pytest.param("Gemm", (5, 4), (5,), id="gemm"),
    pytest.param("Gemm <transB = 1>", (4, 5), (5,), id="gemm-transposed"),
]


@pytest.mark.parametrize(("op", "shape", "size"), CASES)
def test_the_mean_output_is_the_output_of_the_mean(op: str, shape: tuple[int, ...], size: tuple[int, ...]) -> None:
    weight = floats(*shape, seed=9)
    ends = ", ".join(f"d{i}" for i in range(len(size) + 1)), ", ".join(f"e{i}" for i in range(len(size) + 1))
    source = model(f"g (float[{ends[0]}] x) => (float[{ends[1]}] y) {{ y = {op} (x, w) }}", w=weight)
    node = Graph.from_proto(source).nodes[0]
    arrays = [floats(n, *size, seed=n) + 1 for n in (2, 2, 3)]  # two shapes, so two means
    session = Session(source)
    results = [session.run({"x": x})["y"].astype(np.float64) for x in arrays]
    channels = results[0].shape[1]
    flat = np.concatenate([np.moveaxis(y, 1, 0).reshape(channels, -1) for y in results], axis=1)
    got = linear_mean(node, weight, mean_of(arrays))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, flat.mean(axis=1), rtol=1e-5, atol=1e-6)


def test_dequantise() -> None:
    got = dequantise(np.array([0, 5, 255], np.uint8), np.float32(0.5), 5)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, [-2.5, 0, 125])
    np.testing.assert_array_equal(dequantise(np.array([-128, 127], np.int8), np.float32(2), -128), [0, 510])
