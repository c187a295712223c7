"""Q/DQ to quantised operators: one operator at a time, against the same network written by hand, and every refusal."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from integer_models import Net
from onnx import ModelProto, TensorProto, helper
from passes_helpers import ops
from qoperator_cases import (
    CASES,
    FLOAT,
    bias,
    conv,
    lower,
    weights,
)

from qcompile.graph import Array
from qcompile.interpret import Interpreter
from qcompile.runtime import Optimisation, Session


def same_bits(model: ModelProto, lowered: ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    """Q/DQ fused, lowered with optimisation on and off, and the interpreter on both files: all the same; returns the outputs."""
    expected = Session(model).run(feeds)
    others = [
        Session(lowered).run(feeds),
        Session(lowered, optimisation=Optimisation.OFF).run(feeds),
        Interpreter(lowered).run(feeds),
        Interpreter(model).run(feeds),
    ]
    for other in others:
        for name, value in expected.items():
            assert other[name].dtype == value.dtype
            np.testing.assert_array_equal(other[name], value)
    return expected


# --- the operators --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("case", list(CASES))
def test_each_operator_keeps_its_bits(case: str, opset: int) -> None:
    build, expected = CASES[case]
    models = {}
    for layout in ("qdq", "qoperator"):
        net = Net(layout, opset=opset)
        output = build(net)
        kind = {output: int(FLOAT)} if "float" in case or case == "chain" else None
        models[layout] = net.model(output, types=kind)
    report, graph = lower(models["qdq"])
    counts = ops(graph)
    assert counts.pop("QuantizeLinear") == len(graph.inputs), "only the inputs are quantised at run time"
    assert counts == expected
    assert report.rewrites == sum(expected.values())
    assert not report.skipped
    rng = np.random.default_rng(3)
    feeds = {
        i.name: rng.normal(0, 4, [d if isinstance(d, int) else 3 for d in i.dims or ()]).astype(np.float32) for i in graph.inputs
    }
    outputs = same_bits(models["qdq"], graph.to_proto(), feeds)
    by_hand = Session(models["qoperator"]).run(feeds)
    for got, value in zip(outputs.values(), by_hand.values(), strict=True):
        np.testing.assert_array_equal(got, value)
        assert len(np.unique(value)) > min(8, value.size // 3), "nearly constant output: the test says nothing"


def test_names_attributes_and_types_are_kept() -> None:
    net = Net("qdq", opset=21)
    model = net.model(conv(net))
    before = next(n for n in model.graph.node if n.op_type == "Conv")
    _, graph = lower(model)
    node = next(n for n in graph.nodes if n.op == "QLinearConv")
    assert node.name == before.name
    assert {k: node.attr(k) for k in node.attrs} == {a.name: helper.get_attribute_value(a) for a in before.attribute}
    assert graph.outputs[0].name == model.graph.output[0].name
    assert node.outputs[0].elem_type == TensorProto.UINT8


def test_other_formats_are_left_alone() -> None:
    net = Net("qdq")
    model = net.model(conv(net))
    report, graph = lower(model, format="qdq")
    assert report.rewrites == 0 and not report.skipped
    assert ops(graph)["Conv"] == 1


def test_dequantised_tensor_stays_for_its_float_readers() -> None:
    net = Net("qdq")
    x = net.input([1, 4, 7, 7], 0.05, 120)
    shared = net.dq(x)
    weight = [net.const(weights(3, 4, 3, 3), np.int8), net.const(0.01), net.const(0, np.int8)]
    other = net.node("Sigmoid", [shared])
    y = net.node("Conv", [shared, net.node("DequantizeLinear", weight)])
    scale = float(np.float32(np.float32(0.05) * np.float32(0.01)) * np.float32(64))  # M = 1/64
    result = net.q(y, scale, 9)
    model = net.model(result.name, other, types={other: FLOAT})
    report, graph = lower(model)
    assert report.rewrites == 1
    assert ops(graph) == {"QuantizeLinear": 1, "DequantizeLinear": 1, "Sigmoid": 1, "QLinearConv": 1}
    feeds = {"x0": np.random.default_rng(0).normal(0, 4, (1, 4, 7, 7)).astype(np.float32)}
    expected = Session(model).run(feeds)
    for level in (Optimisation.ALL, Optimisation.OFF):
        got = Session(graph.to_proto(), optimisation=level).run(feeds)
        np.testing.assert_array_equal(got[result.name], expected[result.name])
    np.testing.assert_array_equal(Session(graph.to_proto()).run(feeds)[other], expected[other])


def test_implied_zero_points_and_negative_axes() -> None:
    net = Net("qdq", opset=21)
    scale = np.asarray([2.0**-6, 2.0**-7, 2.0**-8], np.float32)
    x = net.node("DequantizeLinear", [net.node("QuantizeLinear", ["x0", net.const(0.25)]), net.const(0.25)])
    net.inputs.append(helper.make_tensor_value_info("x0", FLOAT, [2, 8]))
    w = net.node("DequantizeLinear", [net.const(weights(8, 3), np.int8), net.const(scale)], axis=-1)
    b = net.node("DequantizeLinear", [net.const(bias(3), np.int32), net.const(scale * np.float32(0.25))], axis=0)
    y = net.node("Gemm", [x, w, b])
    result = net.node("QuantizeLinear", [y, net.const(0.5)])
    model = onnx.shape_inference.infer_shapes(net.model(result))  # the integers' type, from which the zero point's follows
    report, graph = lower(model)
    assert (report.rewrites, dict(report.skipped)) == (1, {})
    node = next(n for n in graph.nodes if n.op == "QGemm")
    zeros = [node.constant(i) for i in (2, 5, 8)]
    assert [None if z is None else (z.array().dtype.name, z.dims) for z in zeros] == [
        ("uint8", ()),
        ("int8", (3,)),
        ("uint8", ()),
    ]
    same_bits(model, graph.to_proto(), {"x0": np.random.default_rng(0).normal(0, 20, (2, 8)).astype(np.float32)})
