"""The audit against what onnxruntime really does; the reasons it gives are in test_audit_reasons."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from audit_models import (
    SCALE,
    Build,
    between,
    clip,
    conv,
    int4,
    linear,
)
from onnx import TensorProto, helper, numpy_helper, parser

from qcompile.audit import Audit, Left, audit, audit_optimised
from qcompile.errors import ModelError
from qcompile.runtime import Array

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"


GOOD: dict[str, tuple[Callable[[], onnx.ModelProto], dict[str, int]]] = {
    "conv": (conv, {"QLinearConv": 1}),
    "conv-relu-in-range": (
        lambda: conv(zero=np.uint8(0), then=lambda b, y: b.node("Relu", [y], "relu")),
        {"QLinearConv": 1},
    ),
    "conv-clip-in-range": (
        lambda: conv(zero=np.uint8(0), then=lambda b, y: clip(b, y, 255 * SCALE)),
        {"QLinearConv": 1},
    ),
    "conv-int4-cast": (lambda: conv(weight=lambda b: int4(b, cast=True)), {"QLinearConv": 1}),
    "matmul": (linear, {"QLinearMatMul": 1}),
    "matmul-no-output-q": (lambda: linear(output=False), {"MatMulIntegerToFloat": 1}),
    "gemm": (lambda: linear("Gemm", bias=lambda b: b.bias(8)), {"QGemm": 1}),
    "gemm-no-output-q": (lambda: linear("Gemm", bias=lambda b: b.bias(8), output=False), {"QGemm": 1}),
    "add": (lambda: between("Add", two=True), {"QLinearAdd": 1}),
    "activation-product": (lambda: between("MatMul", two=True), {"QLinearMatMul": 1}),
}


@pytest.mark.parametrize(("make", "kernels"), GOOD.values(), ids=GOOD)
def test_a_good_model_has_no_finding(make: Callable[[], onnx.ModelProto], kernels: dict[str, int]) -> None:
    found = audit(make())
    assert (found.not_fused, found.leftover, found.float_ops) == ([], [], {})
    assert found.integer_ops == kernels
    assert found.float_weight_bytes == 0


def test_a_rescale_with_no_operator() -> None:
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2, 8] x) => (float[2, 8] y)
        <float s1 = {0.1}, float s2 = {0.3}, uint8 z1 = {3}, uint8 z2 = {9}>
        {
            a = QuantizeLinear (x, s1, z1)
            b = DequantizeLinear (a, s1, z1)
            c = QuantizeLinear (b, s2, z2)
            y = DequantizeLinear (c, s2, z2)
        }
    """)
    found = audit_optimised(model, model)
    assert [left.node for left in found.leftover] == ["b", "c"]
    assert {left.reason for left in found.leftover} == {"a rescale from one scale to another with no operator to carry it"}


def test_floats_at_the_ends_and_beside_kept_operators_are_no_finding() -> None:
    """x -> Mul (normalise) -> Q .. QLinearConv .. DQ -> Softmax; and a residual that stays float."""
    b = Build()
    image = b.node("Mul", ["x", b.constant("by", np.float32(1 / 255))], "image")
    y = b.node("Conv", [b.qdq(image), b.weight((4, 4, 3, 3)), b.bias(4)], "y", pads=[1, 1, 1, 1])
    residual = b.node("Add", [b.qdq(y), image], "residual")
    found = audit(b.model({"x": [1, 4, 8, 8]}, [b.node("Softmax", [residual], "head")]))
    assert (found.not_fused, found.leftover) == ([], [])
    assert found.integer_ops == {"QLinearConv": 1}
    assert found.float_ops == {"Add": 1, "Mul": 1, "Softmax": 1}


def test_a_float_model_has_no_finding_and_float_weights_only() -> None:
    b = Build()
    w = b.constant("W", np.ones((16, 8), np.float32))
    found = audit(b.model({"x": [3, 16]}, [b.node("MatMul", ["x", w], "y")]))
    assert found == Audit({}, {"MatMul": 1}, [], [], 0, 16 * 8 * 4)


def test_dynamic_quantisation_counts_as_integer() -> None:
    b = Build()
    b.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]))
    b.node("MatMulInteger", ["xq", b.constant("W", np.ones((16, 8), np.int8)), "xz"], "acc")
    b.node("Mul", ["xs", b.constant("Ws", np.float32(SCALE))], "s")
    b.node("Mul", [b.node("Cast", ["acc"], "wide", to=TensorProto.FLOAT), "s"], "y")
    assert audit(b.model({"x": [3, 16]}, ["y"])) == Audit({"DynamicQuantizeMatMul": 1}, {}, [], [], 128, 0)


def test_operators_on_integer_tensors_are_integer_operators_and_moves_are_none() -> None:
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (int32[2, 8] x, float[2, 8] f) => (int32[8, 2] y, int64[2] shape, float[8, 2] moved)
        {
            a = Add (x, x)
            b = Mul (a, x)
            y = Transpose (b)
            shape = Shape (f)
            moved = Transpose (f)
        }
    """)
    found = audit(model)
    assert (found.integer_ops, found.float_ops) == ({"Add": 1, "Mul": 1}, {})


@pytest.mark.parametrize(
    ("make", "integer_bytes", "float_bytes"),
    [
        pytest.param(conv, 4 * 4 * 3 * 3, 0, id="int8"),
        pytest.param(lambda: conv(output=False), 0, 4 * 4 * 3 * 3 * 4, id="int8-read-as-float"),
        pytest.param(lambda: conv(weight=lambda b: int4(b, cast=True)), 4 * 4 * 3 * 3, 0, id="int4-in-int8-kernel"),
    ],
)
def test_weight_bytes_are_what_the_kernel_reads(
    make: Callable[[], onnx.ModelProto], integer_bytes: int, float_bytes: int
) -> None:
    found = audit(make())
    assert (found.integer_weight_bytes, found.float_weight_bytes) == (integer_bytes, float_bytes)


def test_a_shared_weight_counts_once() -> None:
    b = Build()
    w = b.constant("W", np.ones((8, 8), np.float32))
    y = b.node("Relu", [b.node("MatMul", ["x", w], "a")], "r")
    found = audit(b.model({"x": [3, 8]}, [b.node("MatMul", [y, w], "y")]))
    assert (found.float_ops["MatMul"], found.float_weight_bytes) == (2, 8 * 8 * 4)


def test_nodes_inside_a_branch_are_audited() -> None:
    b = Build()
    y = b.node("Conv", [b.qdq("x"), b.weight((4, 4, 3, 3)), b.bias(4)], "y", pads=[1, 1, 1, 1])
    branch = b.model({"x": [1, 4, 8, 8]}, [y]).graph
    del branch.input[:]
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["same"])],
        "other",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)],
    )
    outer = Build()
    outer.node("If", ["which"], "out", then_branch=branch, else_branch=other)
    model = outer.model({"x": [1, 4, 8, 8]}, ["out"])
    model.graph.input.append(helper.make_tensor_value_info("which", TensorProto.BOOL, []))
    found = audit(model)
    assert [(left.node, left.op) for left in found.not_fused] == [("y_node", "Conv")]
    assert found.not_fused[0].reason.startswith("Conv without an output QuantizeLinear")
    assert found.float_ops["Conv"] == 1


def test_nodes_inside_a_function_are_audited() -> None:
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[3, 16] x) => (float[3, 8] y)
        <float s = {0.1}, uint8 z = {3}, float ws = {0.1}, int8 wz = {0}>
        { y = local.layer (x, s, z, ws, wz, W, s2, z2) }
        <opset_import: ["" : 21], domain: "local">
        layer (x, s, z, ws, wz, W, s2, z2) => (y) {
            xq = QuantizeLinear (x, s, z)
            xd = DequantizeLinear (xq, s, z)
            w = DequantizeLinear (W, ws, wz)
            m = MatMul (xd, w)
            t = Tanh (m)
            q = QuantizeLinear (t, s2, z2)
            y = DequantizeLinear (q, s2, z2)
        }
    """)
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.ones((16, 8), np.int8), "W"),
            numpy_helper.from_array(np.float32(0.2), "s2"),
            numpy_helper.from_array(np.uint8(1), "z2"),
        ]
    )
    found = audit(model)
    assert (found.integer_ops, found.float_ops) == ({"MatMulIntegerToFloat": 1}, {"Tanh": 1})
    assert [(left.op, left.reason) for left in found.leftover] == [
        ("QuantizeLinear", "Tanh: onnxruntime has no integer kernel for it")
    ]


def test_a_path_with_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    path = tmp_path / "model.onnx"
    onnx.save(linear(), path, save_as_external_data=True, location="w.bin", size_threshold=100)
    assert (tmp_path / "w.bin").stat().st_size >= 128
    assert audit(path) == audit(str(path)) == audit(linear())
    assert list(scratch.iterdir()) == []


def test_a_nameless_node_is_named_by_its_output() -> None:
    model = conv(output=False)
    for node in model.graph.node:
        node.name = ""
    assert [left.node for left in audit(model).not_fused] == ["y"]


def test_findings_are_in_the_order_of_the_graph_and_deterministic() -> None:
    b = Build()
    first = b.node("Conv", [b.qdq("x"), b.weight((4, 4, 3, 3)), b.bias(4)], "first", pads=[1, 1, 1, 1])
    soft = b.node("Tanh", [first], "tanh")
    second = b.node("Conv", [b.qdq(soft), "W_dq", "B_dq"], "second", pads=[1, 1, 1, 1])
    model = b.model({"x": [1, 4, 8, 8]}, [second])
    found = audit(model)
    assert [left.node for left in found.not_fused] == ["first_node", "second_node"]
    assert found == audit(model)


@pytest.mark.parametrize("content", [None, b"no model at all"], ids=["missing", "garbage"])
def test_an_unreadable_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.onnx: cannot be read as an ONNX model"):
        audit(path)


def test_a_model_that_onnxruntime_refuses() -> None:
    b = Build()
    b.node("NoSuchOperator", ["x"], "y")
    with pytest.raises(ModelError, match="onnxruntime cannot load it"):
        audit(b.model({"x": [1]}, ["y"]))


def _stored_weights(model: onnx.ModelProto) -> dict[str, Array]:
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    read = {n.input[1] for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")}
    return {name: stored[name] for name in read if name in stored}


@pytest.mark.zoo
@pytest.mark.parametrize("task", ["resnet8_cifar10", "minilm_sst2", "ad_autoencoder"])
def test_real_float_models_have_no_finding(task: str) -> None:
    path = ZOO / task / "model.onnx"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    found = audit(path)
    assert (found.not_fused, found.leftover, found.integer_weight_bytes) == ([], [], 0)
    assert found.float_weight_bytes == sum(w.nbytes for w in _stored_weights(onnx.load(path)).values())


def test_left_is_hashable_and_compares_by_value() -> None:
    assert len({Left("n", "Conv", "r"), Left("n", "Conv", "r")}) == 1
