"""What has no quantised operator is left alone, with a reason."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from integer_models import Net
from onnx import TensorProto, helper
from passes_helpers import ops
from qoperator_cases import (
    FLOAT,
    lower,
)

from qcompile.graph import Graph

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
