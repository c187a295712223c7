"""Quantised operators to integer arithmetic: one operator at a time, every refusal, and whole models as files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx.reference
import pytest
from integer_models import Net
from onnx import ModelProto, TensorProto
from passes_helpers import ops, parse
from qoperator_cases import CASES
from runtime_marks import needs_conv_integer

from qcompile.certificate import certify
from qcompile.context import Context, Settings
from qcompile.errors import ModelError
from qcompile.graph import Graph
from qcompile.interpret import Interpreter
from qcompile.passes.integer_head import IntegerHead
from qcompile.passes.lower_integer import LowerInteger
from qcompile.rewrite import Report
from qcompile.runtime import Optimisation, Session

pytestmark = needs_conv_integer

INTEGER = Context(Settings(format="integer"))


def lower(model: ModelProto) -> tuple[Report, Graph]:
    graph = Graph.from_proto(model)
    report = LowerInteger().run(graph, INTEGER)
    assert LowerInteger().run(graph, INTEGER).rewrites == 0, "a second run rewrote something"
    return report, graph


# --- the operators --------------------------------------------------------------------------------------------

EXPECTED: dict[str, dict[str, int]] = {
    "conv": {"ConvInteger": 1, "DyadicRescale": 1},
    "conv_without_bias": {"ConvInteger": 1, "DyadicRescale": 1},
    "conv_grouped": {"ConvInteger": 1, "DyadicRescale": 1},
    "conv_1d": {"ConvInteger": 1, "DyadicRescale": 1},
    "gemm": {"MatMulInteger": 1, "DyadicRescale": 1},
    "gemm_transposed": {"MatMulInteger": 1, "DyadicRescale": 1},
    "gemm_float": {"MatMulInteger": 1, "Add": 1, "DequantizeLinear": 1},
    "gemm_float_without_bias": {"MatMulInteger": 1, "DequantizeLinear": 1},
    "matmul": {"MatMulInteger": 1, "DyadicRescale": 1},
    "add": {"Cast": 2, "Sub": 2, "Mul": 2, "Add": 1, "DyadicRescale": 1},
    "add_broadcast": {"Cast": 2, "Sub": 2, "Mul": 2, "Add": 1, "DyadicRescale": 1},
    "mul": {"Cast": 2, "Sub": 1, "Mul": 1, "RatioRescale": 1},
    "pool": {"Cast": 1, "ReduceSum": 1, "Sub": 1, "DyadicRescale": 1},
    "concat": {"Concat": 1},
    "movements": {"MaxPool": 1, "Transpose": 1, "Reshape": 1},
}


def counted(graph: Graph) -> Counter[str]:
    """Nodes of each operator; the forms of a rescale as one."""
    return Counter("DyadicRescale" if n.op.startswith("DyadicRescale") else n.op for n in graph.nodes)


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("case", list(EXPECTED))
def test_each_operator_keeps_its_bits(case: str, opset: int) -> None:
    build, _ = CASES[case]
    net = Net("qoperator", opset=opset)
    output = build(net)
    model = onnx.shape_inference.infer_shapes(net.model(output, types={output: TensorProto.FLOAT} if "float" in case else None))
    report, graph = lower(model)
    counts = counted(graph)
    assert counts.pop("QuantizeLinear") == len(graph.inputs)
    assert counts == EXPECTED[case]
    assert report.rewrites == (0 if case in ("concat", "movements") else 1)
    lowered = graph.to_proto()
    rng = np.random.default_rng(3)
    feeds = {
        i.name: rng.normal(0, 4, [d if isinstance(d, int) else 3 for d in i.dims or ()]).astype(np.float32) for i in graph.inputs
    }
    expected = Session(model).run(feeds)
    interpreter = Interpreter(lowered)
    runs = [Session(lowered), Session(lowered, optimisation=Optimisation.OFF), interpreter]
    for run in runs:
        got = run.run(feeds)
        for name, value in expected.items():
            assert got[name].dtype == value.dtype
            np.testing.assert_array_equal(got[name], value)
    assert interpreter.float_nodes == []


@pytest.mark.parametrize("scale", [0.05 * 255 / 32, 0.05 / 255], ids=["small", "huge"])
def test_an_add_of_scales_far_apart(scale: float) -> None:
    """A ratio above 8 leaves the dyadic shadow no room in int32: the sum is divided by q itself."""
    net = Net("qoperator", opset=21)
    a, b = net.input([1, 3, 64, 64], 0.05, 77), net.input([1, 3, 64, 64], 0.05, 12)
    model = net.model(net.pair("Add", a, b, scale, 128).name)
    _, graph = lower(model)
    assert counted(graph)["DyadicRescale" if scale > 0.1 else "RatioRescale"] == 1
    rng = np.random.default_rng(0)
    feeds = {n: rng.normal(0, scale, (1, 3, 64, 64)).astype(np.float32) for n in ("x0", "x1")}
    expected = next(iter(Session(model).run(feeds).values()))
    for level in (Optimisation.OFF, Optimisation.ALL):
        got = next(iter(Session(graph.to_proto(), optimisation=level).run(feeds).values()))
        np.testing.assert_array_equal(got, expected)


def test_unsigned_weights_keep_their_zero_point() -> None:
    net = Net("qoperator", opset=21)
    x = net.input([1, 4, 7, 7], 0.05, 120)
    stored = np.random.default_rng(1).integers(0, 256, (3, 4, 3, 3))
    inputs = [x.name, *net.ends(x), net.const(stored, np.uint8), net.const(0.01), net.const(99, np.uint8)]
    y = net.node("QLinearConv", [*inputs, net.const(float(np.float32(0.05) * np.float32(0.01)) * 64), net.const(3, np.uint8)])
    model = net.model(y)
    _, graph = lower(model)
    feeds = {"x0": np.random.default_rng(0).normal(0, 4, (1, 4, 7, 7)).astype(np.float32)}
    np.testing.assert_array_equal(Session(graph.to_proto()).run(feeds)[y], Session(model).run(feeds)[y])


def test_metadata_name_the_source_and_the_scales() -> None:
    net = Net("qoperator", opset=21)
    output = CASES["conv"][0](net)
    model = net.model(output)
    name = next(n.name for n in model.graph.node if n.op_type == "QLinearConv")
    _, graph = lower(model)
    node = next(n for n in graph.to_proto().graph.node if n.op_type.startswith("DyadicRescale"))
    notes = {p.key: p.value for p in node.metadata_props}
    assert notes["qcompile.source"] == name
    assert (notes["qcompile.scale_x"], notes["qcompile.scale_y"]) == ("0.05", "0.02")  # the shortest that read back as float32
    assert notes["qcompile.scale_w"].endswith("(3 channels)")


# --- refusals -------------------------------------------------------------------------------------------------


def inexact(net: Net) -> str:
    x = net.input([2, 4], 0.05, 3)
    inputs = [x.name, *net.ends(x), net.const(np.ones((4, 4)), np.int8), net.const(0.013), net.const(0, np.int8)]
    return net.node("QLinearMatMul", [*inputs, net.const(0.07), net.const(3, np.uint8)])


def can_tie(net: Net) -> str:
    a, b = net.input([2, 4], 0.05, 3), net.input([2, 4], 0.0777, 3)
    return net.pair("Add", a, b, 0.1, 3).name


def product_can_tie(net: Net) -> str:
    a, b = net.input([2, 4], 0.05, 3), net.input([2, 4], 0.0777, 3)
    return net.pair("Mul", a, b, 0.1, 3).name


def dynamic_pool(net: Net) -> str:
    return net.pool(net.input([1, 3, "h", "w"], 0.05, 77), 0.05, 80).name


def overflow(net: Net) -> str:
    x = net.input([1, 70000], 0.05, 0)
    return net.linear("Gemm", x, np.full((70000, 1), 127, np.int8), [(1, 16)], (0.02, 3)).name


def computed_weights(net: Net) -> str:
    x, w = net.input([1, 4, 5, 5], 0.05, 3), net.input([3, 4, 1, 1], 0.01, 0)
    ends = [net.const(0.05 * 0.01 * 64), net.const(3, np.uint8)]
    return net.node("QLinearConv", [x.name, *net.ends(x), w.name, *net.ends(w), *ends])


def float_between(net: Net) -> str:
    x = net.input([2, 4], 0.05, 3)
    return net.q(net.node("Sigmoid", [net.dq(x)], name="gate"), 1 / 256, 0).name


REFUSALS: dict[str, tuple[Callable[[Net], str], str]] = {
    "inexact": (inexact, r"'QLinearMatMul_\d+' \(QLinearMatMul\): 1 of 1 rescale multipliers are not b/2\^c"),
    "can_tie": (can_tie, r"\(QLinearAdd\): scale ratio .* can tie"),
    "product_can_tie": (product_can_tie, r"\(QLinearMul\): scale ratio"),
    "dynamic_pool": (dynamic_pool, r"\(QLinearGlobalAveragePool\): the size of its input is not static"),
    "overflow": (overflow, r"\(QGemm\): its sum can leave int32"),
    "computed_weights": (computed_weights, r"\(QLinearConv\): its weights or bias are computed at run time"),
    "float_between": (
        float_between,
        r"node 'gate' \(Sigmoid\): computes in float.* \(2 such tensors\); use --format",
    ),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_what_cannot_be_integer_is_refused_with_its_name(case: str) -> None:
    build, message = REFUSALS[case]
    net = Net("qoperator", opset=21)
    model = net.model(build(net))
    with pytest.raises(ModelError, match=message):
        LowerInteger().run(Graph.from_proto(model), INTEGER)


def test_other_formats_are_left_alone() -> None:
    net = Net("qoperator", opset=21)
    model = net.model(CASES["conv"][0](net))
    for layout in ("qdq", "qoperator"):
        graph, context = Graph.from_proto(model), Context(Settings(format=layout))
        assert LowerInteger().run(graph, context).rewrites == 0
        assert IntegerHead().run(graph, context).rewrites == 0
        assert ops(graph)["QLinearConv"] == 1


# --- an average at the end ------------------------------------------------------------------------------------


def head(text: str = "GlobalAveragePool(f)", shape: str = "float[2, 3, 5, 7]") -> Graph:
    model = parse(
        f"""g ({shape} x) => (float[a, b, c, d] y) {{
            q = QuantizeLinear(x, s, z)
            f = DequantizeLinear(q, s, z)
            y = {text}
        }}""",
        s=np.float32(0.07),
        z=np.uint8(31),
    )
    return Graph.from_proto(onnx.shape_inference.infer_shapes(model))


def test_an_average_at_the_end_is_a_sum() -> None:
    graph = head()
    before = graph.to_proto()
    assert IntegerHead().run(graph, INTEGER).rewrites == 1
    assert IntegerHead().run(graph, INTEGER).rewrites == 0
    assert ops(graph) == {"QuantizeLinear": 1, "Cast": 1, "ReduceSum": 1, "Sub": 1, "DequantizeLinear": 1}
    assert certify(graph.to_proto()).integer_only
    x = np.random.default_rng(0).normal(3, 4, (2, 3, 5, 7)).astype(np.float32)
    q = np.clip(np.rint(x / np.float32(0.07)) + 31, 0, 255).astype(np.int64)
    expected = (q - 31).sum((2, 3), keepdims=True).astype(np.float32) * (np.float32(0.07) / np.float32(35))
    got = Session(graph.to_proto()).run({"x": x})["y"]
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(Session(before).run({"x": x})["y"], got, rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "shape", "reason"),
    [
        ("GlobalAveragePool(x)", "float[2, 3, 5, 7]", "its input is float"),
        ("GlobalAveragePool(f)", "float[2, 3, h, 7]", "the size of its input is not static"),
        ("GlobalAveragePool(f)", "float[2, 3, 4000, 4000]", "its sum can leave int32"),
    ],
    ids=["float", "dynamic", "large"],
)
def test_averages_that_stay(text: str, shape: str, reason: str) -> None:
    report = IntegerHead().run(head(text, shape), INTEGER)
    assert (report.rewrites, dict(report.skipped)) == (0, {reason: 1})


def test_an_average_of_other_scales_stays() -> None:
    model = parse(
        """g (int32[2, 3, 5, 7] q) => (float[a, b, c, d] y) {
            f = DequantizeLinear(q, s, z)
            y = GlobalAveragePool(f)
        }""",
        s=np.float32(0.07),
        z=np.int32(0),
    )
    report = IntegerHead().run(Graph.from_proto(onnx.shape_inference.infer_shapes(model)), INTEGER)
    assert dict(report.skipped) == {"its input is not 8-bit with one stored scale": 1}
