"""Q/DQ to quantised operators: one operator at a time, against the same network written by hand, and every refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from integer_models import Net
from onnx import ModelProto, TensorProto, helper
from passes_helpers import ops

from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph
from qcompile.interpret import Interpreter
from qcompile.passes.lower_qoperator import LowerQOperator
from qcompile.rewrite import Report
from qcompile.runtime import Optimisation, Session

FLOAT = TensorProto.FLOAT
Build = Callable[[Net], str]


def lower(model: ModelProto, **settings: str) -> tuple[Report, Graph]:
    graph = Graph.from_proto(model)
    context = Context(Settings(**{"format": "qoperator", **settings}))  # type: ignore[arg-type]
    report = LowerQOperator().run(graph, context)
    checked = graph.to_proto()
    for output in checked.graph.output:
        output.type.tensor_type.shape.SetInParent()  # the checker asks for a shape, which these models leave open
    onnx.checker.check_model(checked)
    assert LowerQOperator().run(graph, context).rewrites == 0, "a second run rewrote something"
    return report, graph


def weights(*shape: int, seed: int = 1) -> Array:
    """int8 weights that no kernel saturates on: |w| <= 64."""
    return np.random.default_rng(seed).integers(-64, 65, shape).astype(np.int8)


def bias(count: int, seed: int = 2) -> Array:
    return np.random.default_rng(seed).integers(-3000, 3000, count).astype(np.int32)


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

HALVES = [(1 << 15, 16), (3, 10), (1, 9)]  # M of three channels


def conv(net: Net) -> str:
    x = net.input([1, 4, 7, 7], 0.05, 120)
    attributes: dict[str, Any] = {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2], "kernel_shape": [3, 3]}
    return net.linear("Conv", x, weights(3, 4, 3, 3), HALVES, (0.02, 3), bias(3), **attributes).name


def conv_without_bias(net: Net) -> str:
    x = net.input([2, 4, 6, 6], 0.05, 0)
    return net.linear("Conv", x, weights(3, 4, 1, 1), [(5, 8)], (0.02, 130)).name


def conv_grouped(net: Net) -> str:
    x = net.input([1, 6, 5, 5], 0.05, 9)
    return net.linear("Conv", x, weights(3, 2, 3, 3), HALVES, (0.02, 3), bias(3), group=3, auto_pad="SAME_UPPER").name


def conv_1d(net: Net) -> str:
    x = net.input([1, 3, 20], 0.05, 9)
    return net.linear("Conv", x, weights(3, 3, 5), HALVES, (0.02, 3), bias(3)).name


def gemm(net: Net) -> str:
    x = net.input([5, 8], 0.05, 77)
    return net.linear("Gemm", x, weights(8, 3), HALVES, (0.02, 3), bias(3)).name


def gemm_transposed(net: Net) -> str:
    x = net.input(["N", 8], 0.05, 77)
    return net.linear("Gemm", x, weights(3, 8), HALVES, (0.02, 3), transB=1).name


def gemm_float(net: Net) -> str:
    x = net.input(["N", 8], 0.05, 77)
    return net.linear("Gemm", x, weights(3, 8), HALVES, None, bias(3), transB=1).name


def gemm_float_without_bias(net: Net) -> str:
    x = net.input([5, 8], 0.05, 77)
    return net.linear("Gemm", x, weights(8, 3), [(5, 12)], None).name


def matmul(net: Net) -> str:
    x = net.input([2, 5, 8], 0.05, 77)
    return net.linear("MatMul", x, weights(8, 3), HALVES, (0.02, 3)).name


def add(net: Net) -> str:
    a, b = net.input([1, 3, 4, 4], 0.05, 77), net.input([1, 3, 4, 4], 0.05 * 100 / 255, 12)
    return net.pair("Add", a, b, 0.05, 128).name


def add_broadcast(net: Net) -> str:
    a, b = net.input([1, 3, 4, 4], 0.05, 77), net.input([3, 1, 1], 0.05, 12)
    return net.pair("Add", a, b, 0.05 * 255 / 300, 128).name


def multiply(net: Net) -> str:
    a, b = net.input([1, 3, 4, 4], 0.05, 77), net.input([1, 3, 1, 1], 1 / 255, 0)
    return net.pair("Mul", a, b, 0.05, 128).name


def pool(net: Net) -> str:
    x = net.input([2, 3, 4, 4], 0.05, 77)
    return net.pool(x, 0.05, 80).name


def concat(net: Net) -> str:
    a, b = net.input([1, 3, 4, 4], 0.05, 77), net.input([1, 2, 4, 4], 0.05, 77)
    if net.layout == "qdq":
        return net.q(net.node("Concat", [net.dq(a), net.dq(b)], axis=1), 0.05, 77).name
    return net.node("Concat", [a.name, b.name], axis=1)


def movements(net: Net) -> str:
    x = net.input([1, 3, 6, 6], 0.05, 77)
    pooled = net.move("MaxPool", x, kernel_shape=[2, 2])
    turned = net.move("Transpose", pooled, perm=[0, 2, 1, 3])
    return net.move("Reshape", turned, net.const([0, -1], np.int64)).name


def chain(net: Net) -> str:
    x = net.input(["N", 3, 8, 8], 0.05, 77)
    left = net.linear("Conv", x, weights(3, 3, 3, 3), HALVES, (0.02, 3), bias(3), pads=[1, 1, 1, 1])
    right = net.linear("Conv", x, weights(3, 3, 1, 1, seed=5), [(7, 12)], (0.02, 128), bias(3))
    total = net.pair("Add", left, right, 0.02 * 255 / 200, 60)
    pooled = net.pool(total, total.scale / 4, 50)
    rows = net.move("Flatten", pooled)
    return net.linear("Gemm", rows, weights(4, 3), [(3, 9)], None, bias(4), transB=1).name


CASES: dict[str, tuple[Build, dict[str, int]]] = {
    "conv": (conv, {"QLinearConv": 1}),
    "conv_without_bias": (conv_without_bias, {"QLinearConv": 1}),
    "conv_grouped": (conv_grouped, {"QLinearConv": 1}),
    "conv_1d": (conv_1d, {"QLinearConv": 1}),
    "gemm": (gemm, {"QGemm": 1}),
    "gemm_transposed": (gemm_transposed, {"QGemm": 1}),
    "gemm_float": (gemm_float, {"QGemm": 1}),
    "gemm_float_without_bias": (gemm_float_without_bias, {"QGemm": 1}),
    "matmul": (matmul, {"QLinearMatMul": 1}),
    "add": (add, {"QLinearAdd": 1}),
    "add_broadcast": (add_broadcast, {"QLinearAdd": 1}),
    "mul": (multiply, {"QLinearMul": 1}),
    "pool": (pool, {"QLinearGlobalAveragePool": 1}),
    "concat": (concat, {"Concat": 1}),
    "movements": (movements, {"MaxPool": 1, "Transpose": 1, "Reshape": 1}),
    "chain": (chain, {"QLinearConv": 2, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "Flatten": 1, "QGemm": 1}),
}


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


# --- refusals -------------------------------------------------------------------------------------------------


def _linear(net: Net, op: str = "Gemm", **changes: object) -> str:
    """A Gemm, Conv or MatMul of quantised parts with some of them replaced."""
    shape = [1, 4, 5, 5] if op == "Conv" else [2, 4]
    x = changes.get("x") or net.dq(net.input([*shape], 0.25, 3))
    stored = changes.get("w") or [net.const(np.ones((4, 4, 1, 1) if op == "Conv" else (4, 4)), np.int8), net.const(0.5)]
    assert isinstance(x, str) and isinstance(stored, list)
    if len(stored) < 3:
        stored = [*stored, net.const(0, np.int8)]
    inputs = [x, net.node("DequantizeLinear", stored, **changes.get("axis", {}))]  # type: ignore[arg-type]
    if "b" in changes:
        inputs.append(str(changes["b"]))
    return net.node(op, inputs, **changes.get("attributes", {}))  # type: ignore[arg-type]


def _bias_dq(net: Net, scale: object, dtype: type = np.int32, zero: int = 0) -> str:
    return net.node("DequantizeLinear", [net.const(np.ones(4), dtype), net.const(scale), net.const(zero, dtype)])


def _q(net: Net, y: str, kind: type = np.uint8) -> str:
    return net.node("QuantizeLinear", [y, net.const(1.0), net.const(1, kind)])


def no_quantised_form(net: Net) -> list[str]:
    return [_q(net, net.node("Sigmoid", [net.dq(net.input([2, 4], 0.25, 3))]))]


def no_quantised_output(net: Net) -> list[str]:
    return [_linear(net, "Conv")]


def read_elsewhere(net: Net) -> list[str]:
    y = _linear(net)
    return [_q(net, y), net.node("Relu", [y])]


def quantised_twice(net: Net) -> list[str]:
    y = _linear(net)
    return [_q(net, y), _q(net, y)]


def result_is_output(net: Net) -> list[str]:
    y = _linear(net)
    return [_q(net, y), y]


def wide_result(net: Net) -> list[str]:
    return [_q(net, _linear(net), np.uint16)]


def result_per_channel(net: Net) -> list[str]:
    scale, zero = net.const(np.ones(4)), net.const(np.zeros(4), np.uint8)
    return [net.node("QuantizeLinear", [_linear(net), scale, zero], axis=1)]


def float_operand(net: Net) -> list[str]:
    a = net.dq(net.input([2, 4], 0.25, 3))
    net.inputs.append(helper.make_tensor_value_info("f", FLOAT, [2, 4]))
    return [_q(net, net.node("Add", [a, "f"]))]


def wide_operand(net: Net) -> list[str]:
    net.kind = "uint16"
    return [_linear(net, x=net.dq(net.input([2, 4], 0.25, 3)))]


def wide_weights(net: Net) -> list[str]:
    return [_q(net, _linear(net, w=[net.const(np.ones((4, 4)), np.int16), net.const(0.5), net.const(0, np.int16)]))]


def other_axis(net: Net) -> list[str]:
    stored = [net.const(np.ones((4, 4)), np.int8), net.const(np.ones(4)), net.const(np.zeros(4), np.int8)]
    return [_linear(net, w=stored, axis={"axis": 0})]


def computed_scale(net: Net) -> list[str]:
    net.inputs.append(helper.make_tensor_value_info("s", FLOAT, []))
    return [_linear(net, w=[net.const(np.ones((4, 4)), np.int8), "s"])]


def blocks(net: Net) -> list[str]:
    stored = [net.const(np.ones((4, 4)), np.int8), net.const(np.ones((2, 4))), net.const(np.zeros((2, 4)), np.int8)]
    return [_linear(net, w=stored, axis={"axis": 0, "block_size": 2})]


def alpha(net: Net) -> list[str]:
    return [_linear(net, attributes={"alpha": 0.5})]


def float_bias(net: Net) -> list[str]:
    return [_linear(net, b=net.const(np.ones(4)))]


def narrow_bias(net: Net) -> list[str]:
    return [_linear(net, b=_bias_dq(net, 0.125, np.int8))]


def bias_scale(net: Net) -> list[str]:
    return [_linear(net, b=_bias_dq(net, 0.125 * (1 + 1e-6)))]


def bias_scales(net: Net) -> list[str]:
    stored = [net.const(np.ones((4, 4)), np.int8), net.const(np.ones(4)), net.const(np.zeros(4), np.int8)]
    parts = [net.const(np.ones((1, 2)), np.int32), net.const(np.ones(2)), net.const(np.zeros(2), np.int32)]
    return [_linear(net, w=stored, axis={"axis": 1}, b=net.node("DequantizeLinear", parts, axis=1))]


def unsigned_weights(net: Net) -> list[str]:
    net.kind = "int8"
    stored = [net.const(np.ones((4, 4)), np.uint8), net.const(0.5), net.const(0, np.uint8)]
    return [_linear(net, x=net.dq(net.input([2, 4], 0.25, 3)), w=stored)]


def mixed_types(net: Net) -> list[str]:
    return [_q(net, _linear(net), np.int8)]


def mixed_pair(net: Net) -> list[str]:
    a = net.dq(net.input([2, 4], 0.25, 3))
    return [_q(net, net.node("Mul", [a, a]), np.int8)]


def mixed_pool(net: Net) -> list[str]:
    a = net.dq(net.input([2, 4, 3, 3], 0.25, 3))
    return [_q(net, net.node("GlobalAveragePool", [a]), np.int8)]


def mixed_movement(net: Net) -> list[str]:
    a = net.dq(net.input([2, 4], 0.25, 3))
    return [_q(net, net.node("Flatten", [a]), np.int8)]


def rescaling_movement(net: Net) -> list[str]:
    a = net.dq(net.input([2, 4], 0.25, 3))
    return [_q(net, net.node("Flatten", [a]))]


def pad(net: Net) -> list[str]:
    a = net.dq(net.input([2, 4], 1.0, 1))
    return [_q(net, net.node("Pad", [a, net.const([0, 0, 1, 1], np.int64)]))]


REFUSALS: dict[str, tuple[Callable[[Net], list[str]], str]] = {
    "no_quantised_form": (no_quantised_form, "Sigmoid has no quantised form with the same bits everywhere"),
    "no_quantised_output": (no_quantised_output, "Conv without a quantised output"),
    "read_elsewhere": (read_elsewhere, "its float result is read elsewhere too"),
    "quantised_twice": (quantised_twice, "its float result is read elsewhere too"),
    "result_is_output": (result_is_output, "its float result is read elsewhere too"),
    "wide_result": (wide_result, "its result is not 8-bit"),
    "result_per_channel": (result_per_channel, "its result is quantised per channel"),
    "float_operand": (float_operand, "an operand is float"),
    "wide_operand": (wide_operand, "an operand is not 8-bit"),
    "wide_weights": (wide_weights, "an operand is not 8-bit"),
    "other_axis": (other_axis, "an operand is quantised along another axis than the output channels"),
    "computed_scale": (computed_scale, "a scale or zero point is computed at run time"),
    "blocks": (blocks, "an operand is quantised in blocks"),
    "alpha": (alpha, "Gemm with alpha or beta"),
    "float_bias": (float_bias, "the bias is float"),
    "narrow_bias": (narrow_bias, "the bias is not int32 with zero point 0"),
    "bias_scale": (bias_scale, "the bias's scale is not fl(Sx*Sw)"),
    "bias_scales": (bias_scales, "the bias has another number of scales than the weights"),
    "unsigned_weights": (unsigned_weights, "int8 activations with uint8 weights have no kernel"),
    "mixed_types": (mixed_types, "operands and result are not of one integer type"),
    "mixed_pair": (mixed_pair, "operands and result are not of one integer type"),
    "mixed_movement": (mixed_movement, "operands and result are not of one integer type"),
    "rescaling_movement": (rescaling_movement, "data movement between unequal scales"),
    "pad": (pad, "Pad between DequantizeLinear and QuantizeLinear"),
    "mixed_pool": (mixed_pool, "operands and result are not of one integer type"),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_refusals_are_counted_and_change_nothing(case: str) -> None:
    build, reason = REFUSALS[case]
    net = Net("qdq", opset=21)
    outputs = build(net)
    model = net.model(*outputs)
    before = ops(Graph.from_proto(model))
    report, graph = lower(model)
    assert report.rewrites == 0
    assert dict(report.skipped) == {reason: 1}
    assert [r for _, r in report.refusals] == [reason]
    assert ops(graph) == before
    assert not any(n.domain for n in graph.nodes)


def test_float_nodes_between_float_tensors_are_no_refusals() -> None:
    net = Net("qdq", opset=21)
    net.inputs.append(helper.make_tensor_value_info("f", FLOAT, [2, 4]))
    y = net.node("Softmax", [net.node("Mul", ["f", net.const(2.0)])])
    report, graph = lower(net.model(y, types={y: FLOAT}))
    assert (report.rewrites, dict(report.skipped)) == (0, {})
    assert ops(graph) == {"Mul": 1, "Softmax": 1}


def test_a_scale_of_another_float_type_and_an_unknown_integer_type_are_refused() -> None:
    net = Net("qdq", opset=21)
    half = [net.const(np.ones((4, 4)), np.int8), net.const(0.5, np.float16), net.const(0, np.int8)]
    net.inputs.append(helper.make_tensor_value_info("x", TensorProto.UINT8, [2, 4]))
    x = net.node("DequantizeLinear", ["x", net.const(0.25, np.float16), net.const(3, np.uint8)])
    report, _ = lower(net.model(_linear(net, x=x, w=half)))
    assert dict(report.skipped) == {"a scale is not float32": 1}
    net = Net("qdq", opset=21)
    moved = net.node("Flatten", [net.input([2, 4], 0.25, 3).name])  # its type was not inferred
    report, _ = lower(net.model(_linear(net, x=net.node("DequantizeLinear", [moved, net.const(0.25)]))))
    assert dict(report.skipped) == {"a zero point is not stored": 1}
