"""Q/DQ insertion: who reads integers, who reads floats, what folds, and that the numbers are those of the ONNX standard."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from core_models import core_context, float_outputs, floats, images, model, node, only, outputs, run_core, sqnr
from onnx import ModelProto

from qcompile.context import Context
from qcompile.errors import ModelError
from qcompile.graph import Array, Graph, Node, Value
from qcompile.passes.calibrate import Calibrate
from qcompile.passes.quantise import Quantise, scale_sources
from qcompile.placement import place
from qcompile.qparams import ACTIVATIONS
from qcompile.runtime import Optimisation, Session

CONV = "Conv <pads = [1, 1, 1, 1]>"
W = floats(3, 3, 3, 3) * 0.3


def conv_model(body: str, result: str = "float[n, 3, p, q] y", **constants: Array) -> ModelProto:
    text = "g (float[1, 3, 8, 8] x) => (" + result + ") { " + body + " }"
    return model(text, w=W, **constants)


def quantised(source: ModelProto, feeds: Sequence[dict[str, Array]] | None = None, **settings: object) -> tuple[Graph, Context]:
    graph, context, _ = run_core(source, images() if feeds is None else feeds, until="quantise", **settings)
    return graph, context


def source_of(consumer: Node, index: int = 0) -> str:
    """The operator that computes what `consumer` reads."""
    producer = consumer.inputs[index].producer
    return producer.op if producer is not None else "input"


def fake_quantised(x: Array, low: float, high: float) -> Array:
    """x through uint8, by the definition of QuantizeLinear in float64 with the float32 scale."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / float(scale)), 0, 255)
    return (np.clip(np.rint(x.astype(np.float64) / float(scale)) + zero, 0, 255) - zero) * float(scale)


def test_the_graph_says_what_is_integer() -> None:
    graph, context = quantised(conv_model(f"a = {CONV} (x, w)  r = Relu(a)  y = {CONV} (r, w)"))
    assert [n.op for n in graph.nodes].count("QuantizeLinear") == 3
    assert [n.op for n in graph.nodes].count("DequantizeLinear") == 3
    assert not [n for n in graph.nodes if n.op == "Relu"]
    for name in ("conv_0", "conv_2"):
        assert source_of(node(graph, name)) == "DequantizeLinear"
        assert node(graph, name).constant(1) is not None  # weights stay float
        assert node(graph, name).constant(2) is not None  # and each has a bias of its own
    assert context.plan is not None and context.float_graph is not None
    assert [n.op for n in context.float_graph.nodes] == ["Conv", "Relu", "Conv"]
    assert [s.node.name for s in context.plan.linears] == ["conv_0", "conv_2"]


@pytest.mark.parametrize("level", [Optimisation.OFF, Optimisation.ALL])
def test_a_gemm_against_the_definition(level: Optimisation) -> None:
    w, b = floats(6, 4, seed=2), floats(4, seed=3)
    feeds = [{"x": floats(5, 6, seed=s)} for s in range(4)]
    graph, _ = quantised(model("g (float[n, 6] x) => (float[n, 4] y) { y = Gemm(x, w, b) }", w=w, b=b), feeds)
    data = np.concatenate([f["x"] for f in feeds])
    low, high = float(data.min()), float(data.max())
    for feed, got in zip(feeds, outputs(graph, feeds, level), strict=True):
        expected = fake_quantised(feed["x"], low, high) @ w.astype(np.float64) + b
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", sorted(ACTIVATIONS))
@pytest.mark.parametrize("level", [Optimisation.OFF, Optimisation.ALL])
def test_relu_and_clip_keep_their_bounds_on_every_target(target: str, level: Optimisation) -> None:
    """Folded, on integers or left float: what comes out lies within the bounds, and near the float model."""
    body = f"a = {CONV} (x, w)  r = Relu(a)  d = {CONV} (r, w)  k = Clip(d, low, high)  e = {CONV} (k, w)  y = Relu(e)"
    source = conv_model(body, low=np.float32(-0.2), high=np.float32(0.7))
    feeds = images()
    graph, _ = quantised(source, feeds, target=target)
    results = outputs(graph, feeds, level)
    assert min(float(r.min()) for r in results) >= 0
    assert sqnr(float_outputs(source, feeds), results) > 30
    watched = graph.copy()
    bounded = [v for v in watched.values() if v.name in ("r", "k")]
    assert len(bounded) == 2
    watched.outputs += bounded
    session = Session(watched.to_proto(), fuse_qdq=False)
    for feed in feeds:
        ran = session.run(feed)
        step = 0.7 / 255
        assert ran["r"].min() >= 0
        assert -0.2 - step <= ran["k"].min()
        assert ran["k"].max() <= 0.7 + step


def test_a_shared_scale_that_reaches_past_a_folded_bound_gets_a_clip() -> None:
    """Relu6 and a plain Conv meet in a Concat: the class reaches further than 6, so the Relu6 stays, on integers."""
    body = f"a = {CONV} (x, w)  r = Relu(a)  d = {CONV} (x, big)  k = Concat <axis = 1> (r, d)  y = {CONV} (k, w6)"
    source = conv_model(body, big=W * 3, w6=floats(3, 6, 3, 3))
    graph, context = quantised(source)
    clip = only(graph, "Clip")
    assert source_of(clip) == "QuantizeLinear"
    assert context.plan is not None
    assert len(context.plan.clamps) == 1
    site = context.plan.clamps[0]
    low, high = (clip.constant(i) for i in (1, 2))
    assert low is not None and high is not None
    assert int(low.array()) == site.place.zero_point
    assert int(high.array()) == 255
    for level in (Optimisation.OFF, Optimisation.ALL):
        assert sqnr(float_outputs(source, images()), outputs(graph, images(), level)) > 30


def test_float_readers_of_an_integer_tensor_read_its_dequantised_form_under_its_name() -> None:
    body = f"a = {CONV} (x, w)  s = Sigmoid(a)  d = {CONV} (a, w)  e = Sigmoid(d)  y = Mul(s, e)"
    graph, _ = quantised(conv_model(body))
    sigmoids = [n for n in graph.nodes if n.op == "Sigmoid"]
    assert [n.inputs[0].name for n in sigmoids] == ["a", "d"]
    assert all(source_of(n) == "DequantizeLinear" for n in sigmoids)


def test_float_readers_of_a_float_tensor_keep_reading_it() -> None:
    body = f"f = Sigmoid(x)  g2 = Tanh(f)  d = {CONV} (f, w)  y = Mul(g2, d)"
    graph, _ = quantised(conv_model(body, "float[n, 3, 8, 8] y"))
    tanh = only(graph, "Tanh")
    assert source_of(tanh) == "Sigmoid"
    assert source_of(node(graph, "conv_2")) == "DequantizeLinear"


def test_a_graph_input_keeps_its_float_readers() -> None:
    graph, _ = quantised(conv_model(f"d = {CONV} (x, w)  y = Mul(x, d)", "float[n, 3, 8, 8] y"))
    assert source_of(node(graph, "mul_1")) == "input"


@pytest.mark.parametrize(
    ("body", "names"),
    [
        pytest.param(f"y = {CONV} (x, w)", ["y"], id="last-conv"),
        pytest.param(f"a = {CONV} (x, w)  y = Relu(a)", ["y", "a"], id="before-and-after-relu"),
        pytest.param(f"a = {CONV} (x, w)  y = {CONV} (a, w)", ["a", "y"], id="in-the-middle"),
        pytest.param(f"a = {CONV} (x, w)  y = MaxPool <kernel_shape = [2, 2]> (a)  z = {CONV} (y, w)", ["y", "z"], id="moved"),
        pytest.param(f"y = Sigmoid(x)  z = {CONV} (y, w)", ["y", "z"], id="float-born"),
    ],
)
def test_outputs_keep_name_type_and_value(body: str, names: list[str]) -> None:
    source = conv_model(body, ", ".join(f"float[n{i}, 3, p{i}, q{i}] {name}" for i, name in enumerate(names)))
    feeds = images()
    graph, _ = quantised(source, feeds)  # asserts names and types
    session = Session(graph.to_proto(), fuse_qdq=False)
    plain = Session(source)
    for name in names:
        assert sqnr([plain.run(f)[name] for f in feeds], [session.run(f)[name] for f in feeds]) > 30


MOVES = [
    pytest.param("m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)", "MaxPool", {}, id="maxpool"),
    pytest.param("m = Pad(a, pads)", "Pad", {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}, id="pad"),
    pytest.param("m = Pad(a, pads, v)", "Pad", {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "v": np.float32(0)}, id="pad-value"),
    pytest.param('m = Pad <mode = "reflect"> (a, pads)', "Pad", {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}, id="pad-reflect"),
    pytest.param("m = Transpose <perm = [0, 1, 3, 2]> (a)", "Transpose", {}, id="transpose"),
    pytest.param(
        "m = Slice(a, from, to, on)",
        "Slice",
        {"from": np.array([1]), "to": np.array([7]), "on": np.array([2])},
        id="slice",
    ),
    pytest.param("m = Concat <axis = 0> (a, a)", "Concat", {}, id="concat"),
    pytest.param('m = Resize <mode = "nearest"> (a, , s)', "Resize", {"s": np.float32([1, 1, 2, 2])}, id="resize"),
    pytest.param("h = Sigmoid(a)  m = Identity(a)", "Identity", {}, id="identity"),
]


@pytest.mark.parametrize(("body", "op", "constants"), MOVES)
@pytest.mark.parametrize("target", ["any", "arm"])
def test_movement_happens_on_integers(body: str, op: str, constants: dict[str, Array], target: str) -> None:
    source = conv_model(f"a = {CONV} (x, w)  {body}  y = {CONV} (m, w)", **constants)
    feeds = images()
    graph, context = quantised(source, feeds, target=target)
    moved = only(graph, op)
    assert source_of(moved) in ("QuantizeLinear", "Clip")
    assert moved.outputs[0].consumers[0].op == "DequantizeLinear"
    assert context.plan is not None
    assert any({"a", "m"} <= set(c.tensors) for c in context.plan.classes)
    if op == "Pad" and "reflect" not in body:
        value = moved.constant(2)
        assert value is not None
        assert int(value.array()) == next(c for c in context.plan.classes if "a" in c.tensors).zero_point
    for level in (Optimisation.OFF, Optimisation.ALL):
        assert sqnr(float_outputs(source, feeds), outputs(graph, feeds, level)) > 30


def test_an_unfolded_relu_runs_on_integers() -> None:
    source = conv_model(f"a = {CONV} (x, w)  r = Relu(a)  d = {CONV} (r, w)  e = {CONV} (a, w)  y = Concat <axis = 0> (d, e)")
    feeds = images()
    graph, _ = quantised(source, feeds)
    clip = only(graph, "Clip")
    assert source_of(clip) == "QuantizeLinear"
    assert sqnr(float_outputs(source, feeds), outputs(graph, feeds)) > 30


def test_split_parts_are_read_as_integers_and_floats() -> None:
    body = f"a = {CONV} (x, w)  u, v = Split <axis = 2, num_outputs = 2> (a)  d = {CONV} (u, w)  s = Sigmoid(v)  y = Mul(d, s)"
    source = conv_model(body, "float[n, 3, p, q] y")
    graph, _ = quantised(source)
    assert source_of(only(graph, "Split")) == "QuantizeLinear"
    assert source_of(only(graph, "Sigmoid")) == "DequantizeLinear"
    assert sqnr(float_outputs(source, images()), outputs(graph, images())) > 30


def test_adds_and_pools_are_planned() -> None:
    body = f"a = {CONV} (x, w)  d = {CONV} (a, w)  s = Add(a, d)  r = Relu(s)  p = GlobalAveragePool(r)  y = {CONV} (p, w)"
    _, context = quantised(conv_model(body))
    plan = context.plan
    assert plan is not None
    assert [(s.left.tensors, s.right.tensors, s.result.tensors) for s in plan.adds] == [(["a"], ["d"], ["r"])]
    assert [(s.source.tensors, s.result.tensors, s.area) for s in plan.pools] == [(["r"], ["p"], 64)]


def test_an_add_of_a_tensor_to_itself() -> None:
    source = conv_model(f"a = {CONV} (x, w)  s = Add(a, a)  y = {CONV} (s, w)")
    graph, context = quantised(source)
    assert context.plan is not None
    assert context.plan.adds[0].left is context.plan.adds[0].right
    assert sqnr(float_outputs(source, images()), outputs(graph, images())) > 30


def test_weights_that_two_nodes_share_are_quantised_for_each() -> None:
    source = conv_model(f"a = {CONV} (x, w, b)  y = {CONV} (a, w, b)", b=floats(3))
    feeds = images()
    graph, context, _ = run_core(source, feeds)
    assert context.plan is not None
    stored = [s.node.inputs[i].producer.inputs[0].name for s in context.plan.linears for i in (1, 2)]  # type: ignore[union-attr]
    assert len(set(stored)) == 4
    assert sqnr(float_outputs(source, feeds), outputs(graph, feeds, fuse=True)) > 25


def runs_in(graph: Graph) -> list[str]:
    """Operators of the graph that onnxruntime really runs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        Session(graph.to_proto(), optimised_path=path, optimisation=Optimisation.EXTENDED)
        return [n.op_type for n in onnx.load(path).graph.node]


@pytest.mark.parametrize(
    ("body", "excluded"),
    [
        pytest.param(f"a = {CONV} (x, w)  d = {CONV} (a, w)  y = {CONV} (d, w)", "conv_1", id="direct"),
        pytest.param(f"a = {CONV} (x, w)  d = {CONV} (a, w)  r = Relu(d)  y = {CONV} (r, w)", "conv_1", id="relu-behind"),
        pytest.param(
            f"a = {CONV} (x, w)  m = MaxPool <kernel_shape = [2, 2]> (a)  d = {CONV} (m, w)  y = {CONV} (d, w)",
            "conv_2",
            id="pool-before",
        ),
    ],
)
def test_an_excluded_conv_is_really_float_in_onnxruntime(body: str, excluded: str) -> None:
    """onnxruntime rounds the float weights of a Conv that it finds between DQ and Q, whatever was asked for."""
    source = conv_model(body)
    feeds = images()
    graph, _, reports = run_core(source, feeds, exclude=(excluded,))
    assert reports["quantise"].skipped == {"excluded by --exclude": 1}
    assert reports["quantise"].refusals == [(excluded, "excluded by --exclude")]
    ran = runs_in(graph)
    assert ran.count("QLinearConv") == 2
    assert sum(ran.count(op) for op in ("Conv", "FusedConv")) == 1


def test_a_refused_conv_transpose_stays_float_in_onnxruntime() -> None:
    source = conv_model(f"a = {CONV} (x, w)  d = ConvTranspose (a, w)  y = {CONV} (d, w)")
    graph, _, _ = run_core(source, images())
    ran = runs_in(graph)
    assert ran.count("QLinearConv") == 2
    assert ran.count("ConvTranspose") == 1
    assert ran.count("DequantizeLinear") == 2  # before it and at the end: its weights are no integers


def test_the_residual_stream_of_a_transformer_stays_float() -> None:
    text = """g (float[n, 4] x) => (float[n, 4] y) {
        a = LayerNormalization(x, g1, g0)  m = Gemm(a, w1)  s = Add(x, m)
        c = LayerNormalization(s, g1, g0)  o = Gemm(c, w1)  y = Add(s, o) }"""
    source = model(text, g1=np.ones(4, np.float32), g0=np.zeros(4, np.float32), w1=floats(4, 4))
    graph, _ = quantised(source, [{"x": floats(3, 4, seed=s)} for s in range(3)])
    assert [n.op for n in graph.nodes].count("QuantizeLinear") == 2
    adds = [n for n in graph.nodes if n.op == "Add"]
    assert [source_of(n, 1) for n in adds] == ["Gemm", "Gemm"]


def test_an_attention_mask_is_never_quantised() -> None:
    text = """g (float[n, 4] x, float[n, n] mask) => (float[n, 4] y) {
        q = Gemm(x, wq)  k = Gemm(x, wk)  kt = Transpose(k)  s = MatMul(q, kt)  m = Add(s, mask)
        p = Softmax(m)  o = MatMul(p, x)  y = Gemm(o, wq) }"""
    source = model(text, wq=floats(4, 4), wk=floats(4, 4, seed=1))
    lowest = np.float32(-3.4e38)
    feeds = [{"x": floats(5, 4, seed=s), "mask": np.where(np.tri(5) > 0, 0, lowest).astype(np.float32)} for s in range(3)]
    graph, context = quantised(source, feeds)
    assert context.plan is not None
    assert not {"mask", "m", "s"} & {t for c in context.plan.classes for t in c.tensors}
    assert all(max(abs(c.low), abs(c.high)) < 1e3 for c in context.plan.classes)
    assert sqnr(float_outputs(source, feeds), outputs(graph, feeds)) > 25


@pytest.mark.parametrize(
    ("text", "exclude"),
    [
        pytest.param("g (float[2] x) => (float[2] y) { y = Relu(x) }", (), id="no-weights"),
        pytest.param("g (float[2, 2] x) => (float[2, 2] y) { y = MatMul(x, x) }", (), id="two-activations"),
        pytest.param("g (float[2, 3] x) => (float[2, 3] y) { y = Gemm(x, k) }", ("gemm_*",), id="all-excluded"),
    ],
)
def test_nothing_to_quantise_is_an_error(text: str, exclude: tuple[str, ...]) -> None:
    constants = {"k": floats(3, 3)} if "(x, k)" in text else {}
    graph = Graph.from_proto(model(text, **constants))
    with pytest.raises(ModelError, match="no node can be quantised"):
        Quantise().run(graph, core_context([], exclude=exclude))


def test_a_second_run_inserts_nothing() -> None:
    source = conv_model(f"a = {CONV} (x, w)  y = {CONV} (a, w)")
    graph, context = quantised(source)
    before = graph.to_proto().SerializeToString(deterministic=True)
    assert Quantise().run(graph, context).rewrites == 0
    assert Calibrate().run(graph, context).rewrites == 0
    assert graph.to_proto().SerializeToString(deterministic=True) == before


def test_scale_sources_are_what_no_movement_computes() -> None:
    graph = Graph.from_proto(conv_model(f"a = {CONV} (x, w)  m = MaxPool <kernel_shape = [2, 2]> (a)  y = {CONV} (m, w)"))
    graph.infer_shapes()
    assert scale_sources(graph, place(graph, core_context([]).settings)) == ["x", "a", "y"]


@pytest.mark.parametrize(
    ("group", "outputs_", "expected"), [(3, 3, True), (3, 6, False), (1, 3, False)], ids=["depthwise", "multiplier", "dense"]
)
def test_only_a_depthwise_conv_without_multiplier_is_exempt_from_the_pair_rule(group: int, outputs_: int, expected: bool) -> None:
    text = f"g (float[1, 3, 8, 8] x) => (float[n, {outputs_}, p, q] y) {{ y = Conv <group = {group}> (x, w) }}"
    _, context = quantised(model(text, w=floats(outputs_, 3 // group, 3, 3)))
    assert context.plan is not None
    assert context.plan.linears[0].depthwise is expected


def test_names_do_not_collide_with_those_of_the_model() -> None:
    text = f"""g (float[1, 3, 8, 8] x) => (float[n, 3, p, q] y) {{
        a_quantized = Sigmoid(x)  a = {CONV} (a_quantized, w)  a_scale = Mul(a, a_quantized)  y = {CONV} (a_scale, w) }}"""
    source = model(text.replace("(float[n, 3, p, q] y)", "(float[n, 3, p, q] y)"), w=W)
    graph, _ = quantised(source)
    assert sqnr(float_outputs(source, images()), outputs(graph, images())) > 30
    assert isinstance(next(v for v in graph.values() if v.name == "a_quantized"), Value)
