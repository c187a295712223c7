"""Opset conversion up and down, and float16 made float32: against onnxruntime on the original, and onnx's own converter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from backend_cases import CHUNKS, chunk, equal, outcome
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.parser import parse_model

from qcompile.convert import lower_opset, opset_of, raise_opset, without_weights
from qcompile.errors import InputError, ModelError
from qcompile.graph import Graph
from qcompile.runtime import Optimisation, Session
from qcompile.widen import widen


def run(model: ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    return list(Session(model, optimisation=Optimisation.OFF, threads=1).run(feeds).values())


def copied(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def check(model: ModelProto) -> None:
    """onnx's checker wants a shape on every output; the models here leave it to inference."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    for output in inferred.graph.output:
        output.type.tensor_type.shape.SetInParent()
    onnx.checker.check_model(inferred)


@pytest.mark.parametrize("index", range(CHUNKS))
def test_raised_backend_models_compute_the_same(index: int) -> None:
    checked = 0
    for case in chunk(index):
        if not 7 <= opset_of(case.model) < 21 or case.model.functions or "random" in case.name or "scan_sum" in case.name:
            continue
        before = outcome(case.model, case.inputs)
        if before.stage != "done":
            continue
        raised = copied(case.model)
        raise_opset(raised)
        assert opset_of(raised) == 21
        after = outcome(raised, case.inputs)
        assert after.stage == "done", case.name
        assert equal(before.values, after.values, rtol=1e-6), case.name
        checked += 1
    assert checked > 20


OLD = {
    "slice_9": ("", 9, "y = Slice <starts = [1, 0], ends = [3, 9223372036854775807], axes = [1, 2]> (x)"),
    "slice_no_axes": ("", 9, "y = Slice <starts = [0, 1], ends = [1, 3]> (x)"),
    "clip_6": ("", 9, "y = Clip <min = -0.5, max = 0.25> (x)"),
    "clip_half": ("", 9, "y = Clip <max = 0.25> (x)"),
    "pad_2": ("", 9, "y = Pad <pads = [0, 1, 0, 2, 0, 0, 0, 1], value = 1.5> (x)"),
    "pad_reflect": ("", 9, 'y = Pad <mode = "reflect", pads = [0, 0, 1, 1, 0, 0, 1, 1]> (x)'),
    "upsample_7": ("", 7, 'y = Upsample <mode = "nearest", scales = [1.0, 1.0, 2.0, 3.0]> (x)'),
    "upsample_linear": ("", 8, 'y = Upsample <mode = "linear", scales = [1.0, 1.0, 2.0, 2.0]> (x)'),
    "upsample_9": ("float[4] s = {1, 1, 2, 2}", 9, "y = Upsample (x, s)"),
    "resize_10_up": ("float[4] s = {1, 1, 2, 1.5}", 10, "y = Resize (x, s)"),
    "resize_10_down": ("float[4] s = {1, 1, 0.5, 0.4}", 10, "y = Resize (x, s)"),
    "resize_10_linear": ("float[4] s = {1, 1, 2, 2}", 10, 'y = Resize <mode = "linear"> (x, s)'),
    "top_k_1": ("", 9, "y, i = TopK <k = 2, axis = 2> (x)"),
    "dropout_7": ("", 7, "y = Dropout <ratio = 0.5> (x)"),
    "softmax_middle": ("", 11, "y = Softmax <axis = 1> (x)"),
    "softmax_default": ("", 11, "y = Softmax (x)"),
    "softmax_last": ("", 11, "y = Softmax <axis = 3> (x)"),
    "softmax_negative": ("", 11, "y = Softmax <axis = -2> (x)"),
    "log_softmax": ("", 9, "y = LogSoftmax <axis = 2> (x)"),
    "hardmax": ("", 11, "y = Hardmax <axis = 1> (x)"),
    "squeeze": ("", 11, "a = Unsqueeze <axes = [0, 5]> (x) y = Squeeze <axes = [0]> (a)"),
    "split_2": ("", 11, "a, b = Split <axis = 1, split = [1, 3]> (x) y = Concat <axis = 1> (b, a)"),
    "split_even": ("", 13, "a, b = Split <axis = 1> (x) y = Concat <axis = 1> (b, a)"),
    "reduce_sum": ("", 11, "y = ReduceSum <axes = [1], keepdims = 0> (x)"),
    "reduce_mean": ("", 17, "y = ReduceMean <axes = [-1]> (x)"),
    "reduce_min": ("", 9, "y = ReduceMin <axes = [0, 2]> (x)"),
    "batch_norm_7": ("float[4] s = {1, 2, 3, 4}", 7, "y = BatchNormalization <spatial = 1> (x, s, s, s, s)"),
    "scatter": ("int64[1,1,1,2] i = {1, 0}, float[1,1,1,2] u = {7, 8}", 9, "y = Scatter <axis = 3> (x, i, u)"),
}


def old_model(constants: str, opset: int, body: str) -> ModelProto:
    head = f'<ir_version: 4, opset_import: ["" : {opset}]> g (float[2, 4, 3, 3] x) => (float y) <{constants}>'
    model = parse_model(f"{head} {{ {body} }}" if constants else f"{head.removesuffix('<>')} {{ {body} }}")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


X = np.random.default_rng(0).standard_normal((2, 4, 3, 3)).astype(np.float32)


@pytest.mark.parametrize("case", OLD.values(), ids=OLD.keys())
def test_each_adapter_keeps_the_outputs(case: tuple[str, int, str]) -> None:
    model = old_model(*case)
    before = run(model, x=X)
    assert raise_opset(model) >= 1
    check(model)
    for left, right in zip(before, run(model, x=X), strict=True):
        np.testing.assert_allclose(right, left, rtol=1e-6, atol=1e-6)


CONVERTER = ["slice_9", "clip_6", "dropout_7", "softmax_middle", "split_2", "reduce_sum", "reduce_mean", "squeeze"]


@pytest.mark.parametrize("name", CONVERTER)
def test_agrees_with_onnx_version_converter(name: str) -> None:
    model = old_model(*OLD[name])
    other = onnx.version_converter.convert_version(model, 21)
    raise_opset(model)
    np.testing.assert_allclose(run(model, x=X)[0], run(other, x=X)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5), (1, 10, 1, 1), (3, 4, 5)], ids=["last", "ones_after", "coalesced"])
def test_softmax_stays_one_node_where_it_can(shape: tuple[int, ...]) -> None:
    model = parse_model(
        f'<ir_version: 4, opset_import: ["" : 9]> g (float[{",".join(map(str, shape))}] x) => (float y) {{ y = Softmax(x) }}'
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    before = run(model, x=x)[0]
    raise_opset(model)
    np.testing.assert_allclose(run(model, x=x)[0], before, rtol=1e-6)
    assert len(model.graph.node) == (4 if len(shape) == 3 else 1)


def test_bodies_are_converted_too() -> None:
    model = parse_model("""
    <ir_version: 4, opset_import: ["" : 9]> g (bool c, float[2, 3] x) => (float[2, 3] y) {
      y = If (c) <
        then_branch = t () => (float[2, 3] p) { p = Clip <min = 0.0> (x) },
        else_branch = e () => (float[2, 3] q) { q = Pad <pads = [0, 0, 0, 0], value = 2.0> (x) } >
    }
    """)
    before = [run(model, c=np.array(c), x=X[0, 0, :2])[0] for c in (True, False)]
    assert raise_opset(model) == 2
    after = [run(model, c=np.array(c), x=X[0, 0, :2])[0] for c in (True, False)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("opset", "body", "message"),
    [
        (6, "y = Relu(x)", "opset 6 is too old"),
        (7, "y = BatchNormalization <spatial = 0> (x, x, x, x, x)", "spatial=0"),
        (9, "y, m, v, sm, sv = BatchNormalization (x, x, x, x, x)", "in training form"),
        (9, "y = Crop(x)", "'Crop.y.': Crop does not exist in opset 21"),
        (18, "y = GroupNormalization <num_groups = 1> (x, x, x)", "old form of GroupNormalization"),
    ],
    ids=["too_old", "spatial", "training", "removed", "group_norm"],
)
def test_what_cannot_be_raised_is_refused(opset: int, body: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        raise_opset(old_model("", opset, body))


def test_metadata_and_weights_are_left_alone() -> None:
    model = old_model("float[4] s = {1, 1, 2, 2}", 9, "y = Upsample (x, s)")
    model.graph.node[0].metadata_props.add(key="k", value="v")
    weight = numpy_helper.from_array(np.zeros((64, 64), np.float32), "big")
    model.graph.initializer.append(weight)
    assert [i.name for i in without_weights(model).graph.input] == ["x", "big"]
    raise_opset(model)
    assert model.graph.node[0].metadata_props[0].value == "v"
    assert weight in model.graph.initializer


# ---- downwards ----
def graph_of(body: str, opset: int = 21, constants: str = "", shape: str = "2, 4, 3, 3") -> Graph:
    middle = f"<{constants}>" if constants else ""
    model = parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> g (float[{shape}] x) => (float y) {middle} {{ {body} }}')
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return Graph.from_proto(model)


QDQ = "q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z)"
SCALE = "float s = {0.1}, uint8 z = {3}"
LOWER = {
    "relu": ("y = Relu(x)", ""),
    "qdq": (QDQ, SCALE),
    "reduce_axes": ("y = ReduceMean <keepdims = 0> (x, a)", "int64[1] a = {-1}"),
    "reduce_all": ("y = ReduceMax (x)", ""),
    "split": ("a, b = Split <num_outputs = 2, axis = 1> (x) y = Concat <axis = 1> (b, a)", ""),
    "defaults": ("y = Reshape <allowzero = 0> (x, s)", "int64[1] s = {-1}"),
    "shape": ("s = Shape <start = 0> (x) y = Cast <to = 1, saturate = 1> (s)", ""),
}


@pytest.mark.parametrize("case", LOWER.values(), ids=LOWER.keys())
@pytest.mark.parametrize("opset", [13, 17, 20])
def test_lowered_graphs_compute_the_same(case: tuple[str, str], opset: int) -> None:
    graph = graph_of(case[0], constants=case[1])
    before = run(graph.to_proto(), x=X)
    lower_opset(graph, opset)
    model = graph.to_proto()
    assert opset_of(model) == opset
    check(model)
    assert np.array_equal(run(model, x=X)[0], before[0])


REFUSED = {
    "layer_norm": (
        "y = LayerNormalization (x, s)",
        "float[3] s = {1, 1, 1}",
        13,
        "LayerNormalization does not exist in opset 13",
    ),
    "output_dtype": (
        "q = QuantizeLinear <output_dtype = 3> (x, s) y = DequantizeLinear (q, s)",
        "float s = {1}",
        13,
        "output_dtype",
    ),
    "int16": (QDQ, "float s = {0.1}, int16 z = {3}", 13, "takes no int16 there"),
    "blocked": (
        "y = DequantizeLinear <block_size = 2, axis = 0> (w, s)",
        "int8[2] w = {1, 2}, float[1] s = {1}",
        13,
        "block_size",
    ),
    "axes_computed": ("a = Cast <to = 7> (x) y = ReduceMean (x, a)", "", 13, "axes that are computed"),
    "noop": ("y = ReduceMean <noop_with_empty_axes = 1> (x)", "", 13, "does nothing"),
    "uneven": ("y, b, c = Split <num_outputs = 3, axis = 1> (x)", "", 13, "unequal or unknown"),
    "pad_axes": ("y = Pad (x, p, , a)", "int64[2] p = {1, 1}, int64[1] a = {0}", 13, "fewer inputs"),
    "average_pool": ("y = AveragePool <kernel_shape = [2, 2], ceil_mode = 1> (x)", "", 13, "ceil_mode"),
    "grid_sample": ("y = GridSample (x, x)", "", 17, "changed its meaning"),
    "start": ("s = Shape <start = 1> (x) y = Cast <to = 1> (s)", "", 13, "no attribute start"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_lowered_is_refused_and_left_alone(case: tuple[str, str, int, str]) -> None:
    graph = graph_of(case[0], constants=case[1])
    before = graph.to_proto()
    with pytest.raises(ModelError, match=case[3]):
        lower_opset(graph, case[2])
    assert graph.to_proto() == before


def test_a_body_that_differs_is_refused() -> None:
    graph = graph_of(
        "c = Cast <to = 9> (x) y = If (c) < then_branch = t () => (float p) { p = ReduceMean (x) },"
        " else_branch = e () => (float q) { q = Neg (x) } >",
        shape="",
    )
    with pytest.raises(ModelError, match="ReduceMean in its body differs in opset 13"):
        lower_opset(graph, 13)


@pytest.mark.parametrize("opset", [12, 22])
def test_opsets_out_of_range_are_refused(opset: int) -> None:
    with pytest.raises(InputError, match="choose one from 13 to 21"):
        lower_opset(graph_of("y = Relu(x)"), opset)


def test_the_same_opset_is_no_change() -> None:
    graph = graph_of("y = Relu(x)")
    lower_opset(graph, 21)
    assert graph.opset() == 21


# ---- half precision ----
def half_model(code: TensorProto.DataType = TensorProto.FLOAT16) -> ModelProto:
    kind = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}[code]
    model = parse_model(f"""
    <ir_version: 10, opset_import: ["" : 21]>
    g ({kind}[2, 4] x, bool c) => ({kind}[2, 3] y, {kind}[2, 4] z, {kind}[2, 4] x) {{
      a = MatMul (x, w)
      b = Cast <to = 1> (a)
      d = Cast <to = {code}> (b)
      y = Add (d, k)
      z = If (c) <
        then_branch = t () => ({kind}[2, 4] p) {{ p = Relu (x) }},
        else_branch = e () => ({kind}[2, 4] q) {{ h = Cast <to = {code}> (x) q = Neg (h) }} >
    }}
    """)
    dtype = helper.tensor_dtype_to_np_dtype(code)
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(dtype)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    value = numpy_helper.from_array(np.ones(3, dtype), "k")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=value))
    return model


@pytest.mark.parametrize("choice", [True, False], ids=["then", "else"])
def test_float16_is_float32_inside_and_float16_at_the_ends(choice: bool) -> None:
    model = half_model()
    x = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float16)
    before = run(model, x=x, c=np.array(choice))
    assert widen(model, Path()) > 0
    onnx.checker.check_model(model, full_check=True)
    graph = Graph.from_proto(model)
    assert [i.name for i in graph.inputs] == ["x", "c"]
    assert graph.inputs[0].elem_type == TensorProto.FLOAT16
    assert graph.constants["w"].elem_type == TensorProto.FLOAT
    assert sum(n.op == "Cast" and n.attr("to") == TensorProto.FLOAT16 for n in graph.nodes) == 2
    after = run(graph.to_proto(), x=x, c=np.array(choice))
    for left, right in zip(before, after, strict=True):
        assert right.dtype == np.float16
        np.testing.assert_allclose(right.astype(float), left.astype(float), atol=4e-3)
    weight = numpy_helper.to_array(half_model().graph.initializer[0]).astype(np.float32)
    assert np.array_equal(graph.constants["w"].array(), weight)  # widening rounds nothing


def test_bfloat16_is_widened_too() -> None:
    model = half_model(TensorProto.BFLOAT16)
    assert widen(model, Path()) > 0
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.BFLOAT16
    assert {t.data_type for t in model.graph.initializer} == {TensorProto.FLOAT}


def test_float32_models_are_left_alone() -> None:
    model = old_model("", 21, "y = Relu(x)")
    before = copied(model)
    assert widen(model, Path()) == 0
    assert model == before


def test_output_that_is_a_half_constant_keeps_name_and_type() -> None:
    model = parse_model('<ir_version: 10, opset_import: ["" : 21]> g (float16[1] x) => (float16[1] w) { a = Relu (x) }')
    model.graph.initializer.append(numpy_helper.from_array(np.array([1.5], np.float16), "w"))
    widen(model, Path())
    result = run(Graph.from_proto(model).to_proto(), x=np.zeros(1, np.float16))[0]
    assert result.dtype == np.float16
    assert result.tolist() == [1.5]
