"""Quantised operators to integer arithmetic: one operator at a time, every refusal, and whole models as files."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from integer_models import Net
from onnx import ModelProto, TensorProto
from passes_helpers import ops, parse
from runtime_marks import needs_conv_integer
from test_exactness import MODELS, ZOO, zoo_tasks
from test_lower_qoperator import CASES

from qcompile.certificate import certify
from qcompile.context import Context, Settings
from qcompile.errors import InputError, ModelError
from qcompile.graph import Graph
from qcompile.integer_outputs import DequantisedOutputs, give_integers
from qcompile.interpret import Interpreter
from qcompile.passes.integer_head import IntegerHead
from qcompile.passes.lower_integer import LowerInteger
from qcompile.pipeline import Compiled, compile_model
from qcompile.rewrite import Report
from qcompile.runtime import Optimisation, Session

pytestmark = needs_conv_integer

INTEGER = Context(Settings(format="integer"))
DATA = str(MODELS / "digits_calib.npz")


def lower(model: ModelProto) -> tuple[Report, Graph]:
    graph = Graph.from_proto(model)
    report = LowerInteger().run(graph, INTEGER)
    assert LowerInteger().run(graph, INTEGER).rewrites == 0, "a second run rewrote something"
    return report, graph


# --- the operators --------------------------------------------------------------------------------------------

EXPECTED: dict[str, dict[str, int]] = {
    "conv": {"ConvInteger": 1, "Add": 1, "DyadicRescale": 1},
    "conv_without_bias": {"ConvInteger": 1, "DyadicRescale": 1},
    "conv_grouped": {"ConvInteger": 1, "Add": 1, "DyadicRescale": 1},
    "conv_1d": {"ConvInteger": 1, "Add": 1, "DyadicRescale": 1},
    "gemm": {"MatMulInteger": 1, "Add": 1, "DyadicRescale": 1},
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


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("case", list(EXPECTED))
def test_each_operator_keeps_its_bits(case: str, opset: int) -> None:
    build, _ = CASES[case]
    net = Net("qoperator", opset=opset)
    output = build(net)
    model = onnx.shape_inference.infer_shapes(net.model(output, types={output: TensorProto.FLOAT} if "float" in case else None))
    report, graph = lower(model)
    counts = ops(graph)
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
    assert ops(graph)["DyadicRescale" if scale > 0.1 else "RatioRescale"] == 1
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
    node = next(n for n in graph.to_proto().graph.node if n.op_type == "DyadicRescale")
    notes = {p.key: p.value for p in node.metadata_props}
    assert notes["qcompile.source"] == name
    assert (notes["qcompile.scale_x"], notes["qcompile.scale_y"]) == ("0.05", "0.02")  # the shortest that read back as float32
    assert notes["qcompile.scale_w"].endswith("(3 channels)")


# --- refusals -------------------------------------------------------------------------------------------------


def _net(op: str, *inputs: Any) -> ModelProto:
    net = Net("qoperator", opset=21)
    return net.model(net.node(op, [i(net) if callable(i) else i for i in inputs]))


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


# --- whole models ---------------------------------------------------------------------------------------------


def compiled(path: Path, **options: Any) -> Compiled:
    model = options.pop("model", MODELS / "digits_cnn.onnx")
    return compile_model(model, path, **{"data": DATA, "effort": "fast", "latency": False, **options})


def digits(count: int) -> list[dict[str, Any]]:
    return [{"input": x[None]} for x in np.load(MODELS / "digits.npz")["input"][:count]]


def same(first: Path, others: list[Path], feeds: list[dict[str, Any]]) -> None:
    expected = [Session(first, threads=1).run(f) for f in feeds]
    for path in others:
        for level in (Optimisation.OFF, Optimisation.ALL):
            for threads in (1, 2):
                session = Session(path, optimisation=level, threads=threads)
                for feed, want in zip(feeds, expected, strict=True):
                    for name, value in session.run(feed).items():
                        np.testing.assert_array_equal(value, want[name])
        interpreter = Interpreter(path)
        for feed, want in zip(feeds, expected, strict=True):
            for name, value in interpreter.run(feed).items():
                np.testing.assert_array_equal(value, want[name])


@pytest.mark.parametrize("bits", [8, 4])
def test_files_of_digits_cnn(bits: int, tmp_path: Path) -> None:
    """With functions, written out, and at the least opset: the bits of the Q/DQ file."""
    qdq = compiled(tmp_path / "qdq.onnx", bits=bits).path
    result = compiled(tmp_path / "i.onnx", format="integer", bits=bits)
    paths = [result.path, compiled(tmp_path / "inline.onnx", format="integer", inline=True, bits=bits).path]
    if bits == 8:
        paths.append(compiled(tmp_path / "old.onnx", format="integer", opset=13).path)
        paths.append(compiled(tmp_path / "older.onnx", format="integer", opset=13, inline=True).path)
    same(qdq, paths, digits(8))
    models = [onnx.load(p) for p in paths]
    for model in models:
        onnx.checker.check_model(model, full_check=True)
        assert certify(model).integer_only
    assert [len(m.functions) for m in models] == [1, 0, 1, 0][: len(paths)]
    assert {o.domain for o in models[1].opset_import} == {""}
    assert [n.op_type for n in models[0].graph.node].count("DyadicRescale") == 7
    assert result.report["integer_only"]["holds"]
    assert [e["kind"] for e in result.report["integer_only"]["ends"]] == ["quantise input", "dequantise output"]
    assert result.report["nodes"]["float"] == 0
    again = compiled(tmp_path / "again.onnx", format="integer", bits=bits).path
    assert again.read_bytes() == result.path.read_bytes()


def test_the_reference_evaluator_gives_the_same_bits(tmp_path: Path) -> None:
    qdq = compiled(tmp_path / "qdq.onnx").path
    model = onnx.load(compiled(tmp_path / "i.onnx", format="integer").path)
    evaluator = onnx.reference.ReferenceEvaluator(model)
    for feed in digits(2):
        np.testing.assert_array_equal(evaluator.run(None, feed)[0], Session(qdq).run(feed)["logits"])


def test_integer_inputs(tmp_path: Path) -> None:
    result = compiled(tmp_path / "i.onnx", format="integer", inputs_as="uint8")
    assert result.report["accuracy"]["sqnr_db"] > 25
    assert [e["kind"] for e in result.report["integer_only"]["ends"]] == ["dequantise output"]


@pytest.mark.parametrize("inline", [False, True], ids=["functions", "inline"])
def test_integer_ends(inline: bool, tmp_path: Path) -> None:
    """uint8 in, int32 out; what they mean stands in the metadata, and gives the logits of the file with float ends."""
    plain = Session(compiled(tmp_path / "f.onnx", format="integer").path)
    result = compiled(tmp_path / "i.onnx", format="integer", io="integer", inline=inline)
    model = onnx.load(result.path)
    assert result.report["integer_only"]["ends"] == [] and "float" not in result.report["integer_only"]["element_types"]
    assert result.report["accuracy"]["sqnr_db"] > 25
    assert [o.type.tensor_type.elem_type for o in model.graph.output] == [TensorProto.INT32]
    assert [i.type.tensor_type.elem_type for i in model.graph.input] == [TensorProto.UINT8]
    stated = {p.key: json.loads(p.value) for p in model.metadata_props if p.key.startswith(("qcompile.in", "qcompile.out"))}
    x, y = stated["qcompile.input.input"], stated["qcompile.output.logits"]
    session = Session(result.path)
    for feed in digits(4):
        q = np.clip(np.rint(feed["input"] / np.float32(x["scale"])) + x["zero_point"], 0, 255).astype(np.uint8)
        logits = session.run({"input": q})["logits"].astype(np.float32) * np.asarray(y["scale"], np.float32)
        np.testing.assert_array_equal(logits, plain.run(feed)["logits"])


def ends(text: str) -> Graph:
    constants = {"s": np.float32(0.5), "z": np.uint8(3), "w": np.eye(4, dtype=np.int8)}
    return Graph.from_proto(parse(f"g (uint8[2, 4] q) => (float[2, 4] y) {{ {text} }}", 21, **constants))


def test_outputs_whose_integers_are_read_elsewhere_or_fed() -> None:
    for text in ("y = DequantizeLinear(q, s, z)", "m = Max(q, z) y = DequantizeLinear(m, s, z) n = Neg(m)"):
        graph = ends(text)
        assert give_integers(graph) == ["y"]
        feed = np.arange(8, dtype=np.uint8).reshape(2, 4)
        got = DequantisedOutputs(Session(graph.to_proto()), graph.to_proto()).run({"q": feed})["y"]
        integers = feed if "Max" not in text else np.maximum(feed, 3)
        np.testing.assert_array_equal(got, (integers.astype(np.float32) - 3) * np.float32(0.5))


def test_a_float_head_has_no_integers_to_give() -> None:
    with pytest.raises(InputError, match=r"--io integer: output 'y' is made in float by node '.*' \(Softmax\)"):
        give_integers(ends("f = DequantizeLinear(q, s, z) y = Softmax(f)"))


def test_transformers_are_refused_for_now(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"node '.*' \(\w+\): computes in float, and --format integer leaves no float"):
        compiled(tmp_path / "i.onnx", format="integer", model=MODELS / "digits_vit.onnx")
    assert not (tmp_path / "i.onnx").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "integer", "exclude": ["/pool*"]}, "--exclude /pool.: no node may stay float"),
        ({"format": "integer", "target": "arm"}, "--format integer --target arm"),
        ({"format": "qdq", "io": "integer"}, "--io integer --format qdq: only integer files have integer ends"),
        ({"format": "integer", "io": "int8"}, "--io int8: choose one of float, integer"),
        ({"format": "qdq", "inline": True}, "--inline --format qdq: only integer files call functions"),
        ({"format": "integer", "bits": 4, "activations": "float"}, "--activations float --format integer"),
    ],
    ids=["exclude", "arm", "io_qdq", "io_int8", "inline", "weight_only"],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        compiled(tmp_path / "i.onnx", **options)


@pytest.mark.zoo
@pytest.mark.parametrize("task", ["resnet20_cifar10", "mobilenet_v1", "squeezenet", "resnet8_cifar10", "mobilenet_v2"])
def test_real_models(task: str, tmp_path: Path) -> None:
    """Before a final Softmax: the same logits (squeezenet's average is a float one in qdq, so there the integers before it)."""
    tasks = zoo_tasks()
    spec = f"{ZOO / 'tasks.py'}:{task}_calib"
    model = ZOO / task / "model.onnx"
    paths = {f: compiled(tmp_path / f"{f}.onnx", model=model, format=f, data=spec, samples=8).path for f in ("qdq", "integer")}
    feeds = [f for f, _ in islice(getattr(tasks, f"{task}_eval")(), 3)]
    if task != "squeezenet":
        same(paths["qdq"], [paths["integer"]], feeds)
    found = certify(paths["integer"])
    assert found.integer_only
    assert found.ends[0].kind == "quantise input" and found.ends[1].kind == "dequantise output"
    assert [e.op for e in found.ends[2:]] == (["Softmax"] if task in ("squeezenet", "resnet8_cifar10") else [])
    if task == "squeezenet":
        off, on = (Session(paths["integer"], optimisation=level) for level in (Optimisation.OFF, Optimisation.ALL))
        for feed in feeds:
            for name, value in on.run(feed).items():
                np.testing.assert_allclose(off.run(feed)[name], value, rtol=1e-5)
    if task == "resnet20_cifar10":
        evaluator = onnx.reference.ReferenceEvaluator(onnx.load(paths["integer"]))
        for feed in feeds[:2]:
            np.testing.assert_array_equal(evaluator.run(None, feed)[0], Session(paths["qdq"]).run(feed)["logits"])


@pytest.mark.zoo
@pytest.mark.parametrize("task", ["kws_dscnn", "ad_autoencoder"])
def test_models_without_data(task: str, tmp_path: Path) -> None:
    result = compiled(tmp_path / "i.onnx", model=ZOO / task / "model.onnx", format="integer", data=None)
    assert certify(result.path).integer_only
    assert any("no --data" in w for w in result.report["warnings"])
