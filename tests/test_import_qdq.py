"""Q/DQ models of other tools: what is kept, what the formats agree on, what is refused."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from import_models import net, samples
from onnx import ModelProto, numpy_helper
from passes_helpers import parse
from runtime_marks import needs_conv_integer
from test_exactness import assert_exact

from qcompile.audit import audit
from qcompile.certificate import certify
from qcompile.context import Context, Settings
from qcompile.errors import InputError, LimitError, ModelError
from qcompile.graph import Array, Graph, Node
from qcompile.imported import Imported
from qcompile.interpret import Interpreter
from qcompile.passes import passes_for
from qcompile.passes.lower_qoperator import LowerQOperator
from qcompile.pipeline import Compiled, compile_model
from qcompile.runtime import Optimisation, Session

SPELLINGS: dict[str, dict[str, Any]] = {
    "u8s8": {},
    "u8s8_per_tensor": {"per_channel": False},
    "s8s8_symmetric": {"activations": "int8", "symmetric": True},
    "s8s8": {"activations": "int8"},
    "fake_quantised_weights": {"weights": "fake"},
    "relu_in_the_range": {"relu": False},
    "batch_norm": {"norm": True, "weights": "fake"},
    "int32_bias": {"int32_bias": True},
    "float_logits": {"ends": False},
    "no_add": {"add": False},
    "narrow_integers": {"narrow": (0, 90)},
}


def imported(model: ModelProto, **settings: Any) -> tuple[Graph, Context]:
    """Through all passes of an import, without the checks of the pipeline."""
    graph, context = Graph.from_proto(model), Context(Settings(**settings))
    for step in passes_for("imported"):
        step.run(graph, context)
    return graph, context


def state(context: Context) -> Imported:
    assert context.imported is not None
    return context.imported


def written_weights(graph: Graph) -> dict[str, Array]:
    """Integers of each linear node, in the layout [channels, ...]."""
    found = {}
    for node in graph.nodes:
        if node.op in ("Conv", "Gemm"):
            dequantise = node.inputs[1].producer
            assert dequantise is not None
            stored = dequantise.constant(0)
            assert stored is not None
            found[node.name] = stored.array() if node.op == "Conv" or node.attr("transB", 0) else stored.array().T
    return found


def compiled(model: ModelProto, tmp_path: Path, **options: Any) -> Compiled:
    onnx.save(model, tmp_path / "source.onnx")
    return compile_model(tmp_path / "source.onnx", tmp_path / "out.onnx", latency=False, **options)


def sqnr(wanted: Array, got: Array) -> float:
    noise = float(np.square(wanted.astype(np.float64) - got).sum())
    return float("inf") if noise == 0 else 10 * np.log10(float(np.square(wanted.astype(np.float64)).sum()) / noise)


@pytest.mark.parametrize(("spelling", "target"), [*((s, "any") for s in SPELLINGS), ("u8s8", "vnni")])
def test_all_formats_and_the_interpreter_agree_bit_for_bit(spelling: str, target: str) -> None:
    model, _ = net(**SPELLINGS[spelling])
    graph, context = imported(model, target=target)
    qdq = graph.to_proto()
    context.settings = dataclasses.replace(context.settings, format="qoperator")
    assert LowerQOperator().run(graph, context).rewrites > 0
    results = assert_exact(qdq, graph.to_proto(), samples())
    source = Session(model)
    name = model.graph.output[0].name
    wanted = np.concatenate([source.run(feeds)[name] for feeds in samples()])
    assert sqnr(wanted, np.concatenate([r[name] for r in results])) > 25


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_kept_integers_are_the_sources(spelling: str) -> None:
    model, stored = net(**SPELLINGS[spelling])
    graph, context = imported(model, target="vnni")
    report = state(context)
    kept = total = 0
    for name, values in written_weights(graph).items():
        source = stored[name][0] if name != "gemm" else stored[name][0].T
        turned = np.where((values == -source).reshape(len(source), -1).all(axis=1), -1, 1)
        if not SPELLINGS[spelling].get("norm"):
            assert (turned == 1).all() or not values.any()
        same = (values == source * turned.reshape(-1, *[1] * (source.ndim - 1))).reshape(len(source), -1).all(axis=1)
        kept, total = kept + int(same.sum()), total + len(source)
    assert kept == report.channels_kept
    assert total == report.channels_kept + report.channels_rounded
    assert kept >= 0.6 * total


def test_powers_of_two_import_without_any_difference() -> None:
    powers = {n: (-s * 128, s * 127) for n, s in {"x": 2.0**-5, "relu1": 2.0**-5, "conv2": 2.0**-4, "pool": 2.0**-6}.items()}
    powers["gemm"] = (-4.0, 4.0 - 2.0**-5)
    model, stored = net(add=False, per_channel=False, ranges=powers)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_ws"):
            tensor.CopyFrom(numpy_helper.from_array(np.float32(2.0**-8), tensor.name))
    graph, context = imported(model, target="vnni")
    report = state(context)
    assert report.channels_rounded == report.channels_far == report.scales_moved == 0
    assert report.channels_kept == 8 + 8 + 5
    for name, values in written_weights(graph).items():
        np.testing.assert_array_equal(values, stored[name][0] if name != "gemm" else stored[name][0].T)
    before, after = Session(model), Session(graph.to_proto())
    for feeds in samples():
        for name, value in before.run(feeds).items():
            np.testing.assert_array_equal(after.run(feeds)[name], value)


@pytest.mark.parametrize("target", ["any", "vnni"])
def test_an_import_of_its_own_output_changes_nothing(target: str, tmp_path: Path) -> None:
    model, _ = net()
    first = compiled(model, tmp_path, target=target)
    again = compile_model(first.path, tmp_path / "again.onnx", target=target, latency=False)
    report = again.report["imported"]
    assert report["channels"]["rounded"] == report["scales"]["moved"] == 0
    assert report["sqnr_db"] is None
    graphs = [Graph.load(p) for p in (first.path, again.path)]
    one, other = ({k: v.tobytes() for k, v in written_weights(g).items()} for g in graphs)
    assert one == other


def test_signed_activations_become_unsigned_and_nothing_else_changes() -> None:
    model, _ = net(activations="int8", add=False)
    _, unsigned = imported(model)
    _, signed = imported(model, target="arm")
    for a, b in zip(state(unsigned).classes, state(signed).classes, strict=True):
        assert a[0].zero_point == b[0].zero_point + 128
        assert a[0].scale == b[0].scale
        assert a[1] == b[1]


def test_weights_that_break_the_pair_rule_are_rounded_again_and_counted() -> None:
    model, stored = net(add=False)
    graph, context = imported(model, target="any")
    broken = 0
    for name, (values, _) in stored.items():
        rows = np.moveaxis(values.astype(int), 1, -1).reshape(len(values), -1) if values.ndim == 4 else values.T.astype(int)
        even = rows.shape[1] // 2 * 2
        broken += int((np.abs(rows[:, 0:even:2] + rows[:, 1:even:2]) > 128).any(axis=1).sum())
        new = written_weights(graph)[name].astype(int)
        new = np.moveaxis(new, 1, -1).reshape(len(new), -1) if new.ndim == 4 else new
        assert np.abs(new[:, 0:even:2] + new[:, 1:even:2]).max() <= 128
    assert broken > 0
    assert state(context).reasons["pairs of weights that saturate on some machines (--target any)"] == broken


def test_minus_128_is_never_kept() -> None:
    model, _ = net(add=False, per_channel=False)
    weight = next(t for t in model.graph.initializer if t.name == "conv2_w")
    values = numpy_helper.to_array(weight).copy()
    values[3, 0, 0, 0] = -128
    weight.CopyFrom(numpy_helper.from_array(values, "conv2_w"))
    graph, context = imported(model, target="vnni")
    assert written_weights(graph)["conv2"].min() == -127
    assert state(context).reasons["an integer is -128 or too wide"] == 1


def test_the_pipeline_reports_and_prints_an_import(tmp_path: Path) -> None:
    model, _ = net()
    found = compiled(model, tmp_path).report
    assert found["data"]["calibration"] == "imported"
    assert found["imported"]["sqnr_db"] == found["accuracy"]["sqnr_db"] > 25
    channels = found["imported"]["channels"]
    assert channels["kept"] + channels["rounded"] == 8 + 8 + 5
    assert sum(channels["reasons"].values()) == channels["rounded"]
    assert any("made-up inputs" in w for w in found["warnings"])


def test_evaluation_samples_change_no_byte_of_an_import(tmp_path: Path) -> None:
    model, _ = net()
    np.savez(tmp_path / "d.npz", x=np.concatenate([s["x"] for s in samples()]))
    plain = compiled(model, tmp_path).path.read_bytes()
    assert compiled(model, tmp_path, eval_data=str(tmp_path / "d.npz"), diagnose=True).path.read_bytes() == plain


def test_data_move_biases_and_nothing_else_of_an_import(tmp_path: Path) -> None:
    model, _ = net()
    np.savez(tmp_path / "d.npz", x=np.concatenate([s["x"] for s in samples()]))
    files = [compiled(model, tmp_path).path.read_bytes()]
    files.append(compiled(model, tmp_path, data=str(tmp_path / "d.npz")).path.read_bytes())
    one, other = ({t.name: t for t in onnx.load_from_string(f).graph.initializer} for f in files)
    moved = {name for name, tensor in one.items() if tensor != other[name]}
    assert moved
    assert {one[name].data_type for name in moved} == {onnx.TensorProto.INT32}


def test_a_limit_on_the_loss_is_kept_or_breaks(tmp_path: Path) -> None:
    model, _ = net()
    assert compiled(model, tmp_path, max_requant_loss=10.0).report["imported"]["max_requant_loss_db"] == 10.0
    with pytest.raises(
        LimitError, match=r"--max-requant-loss 200: \d+\.\d\d dB against the imported model on \d+ samples"
    ) as caught:
        compiled(model, tmp_path, max_requant_loss=200.0)
    assert getattr(caught.value.compiled, "path", None) == tmp_path / "out.failed.onnx"
    assert caught.value.exit_status == 3


def test_a_limit_on_the_loss_of_a_float_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--max-requant-loss is for models that already hold Q/DQ"):
        compiled(parse("g (float[1, 2] x) => (float[1, 2] y) { y = Relu(x) }"), tmp_path, max_requant_loss=30.0)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")], ids=["negative", "nan", "inf"])
def test_a_limit_that_makes_no_sense_is_refused(value: float, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give decibels from 0 on"):
        compiled(net()[0], tmp_path, max_requant_loss=value)


def test_weight_only_options_do_not_go_with_an_import(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already holds Q/DQ"):
        compiled(net()[0], tmp_path, bits=4, activations="float")


def test_int4_integers_are_packed(tmp_path: Path) -> None:
    found = compiled(net(add=False)[0], tmp_path, bits=4)
    types = {t.data_type for t in onnx.load(found.path).graph.initializer}
    assert onnx.TensorProto.INT4 in types


@needs_conv_integer
def test_an_import_leaves_as_integers_only(tmp_path: Path) -> None:
    assert certify(compiled(net()[0], tmp_path, format="integer").path).integer_only


def test_excluded_nodes_stay_float(tmp_path: Path) -> None:
    found = compiled(net()[0], tmp_path, exclude=["conv2"]).report["imported"]
    assert found["left_float"] == {"excluded by --exclude": 1}


# ---- single patterns, as text ----
def only(graph: Graph, op: str) -> Node:
    found = [n for n in graph.nodes if n.op == op]
    assert len(found) == 1, [n.op for n in graph.nodes]
    return found[0]


SCALES = "float s = {0.05}, uint8 z = {100}, float t = {0.02}, uint8 o = {0}, float m = {0.01}, int8 n = {0}"
WEIGHT = "int8[4, 4] v = {1, -2, 3, 4, 5, 60, -7, 8, 9, 10, -110, 12, 13, 14, 15, -127}"


def text(body: str, constants: str = "", ends: str = "float[2, 4] x) => (float[2, 4] y") -> ModelProto:
    made = parse(f"g ({ends}) <{SCALES}, {WEIGHT}{', ' + constants if constants else ''}> {{ {body} }}")
    for index, node in enumerate(made.graph.node):
        node.name = f"{node.op_type.lower()}_{index}"
    onnx.checker.check_model(made, full_check=True)
    return made


QX = "a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z) "
QW = "w = DequantizeLinear(v, m, n) "


def close_to_source(model: ModelProto, graph: Graph, step: float, shape: tuple[int, ...] = (2, 4)) -> None:
    """Every output within one step of the source's last rounding."""
    before, after = Session(model), Session(graph.to_proto())
    random = np.random.default_rng(1)
    for _ in range(5):
        feeds = {"x": random.normal(size=shape).astype(np.float32) * 3}
        for name, value in before.run(feeds).items():
            np.testing.assert_allclose(after.run(feeds)[name], value, rtol=0, atol=1.01 * step)


def test_a_matmul_with_its_bias_behind_a_pair_becomes_one_gemm() -> None:
    body = QX + QW + "p = MatMul(b, w) q = QuantizeLinear(p, t, z) r = DequantizeLinear(q, t, z) y = Add(r, c)"
    model = text(body, "float[4] c = {1, 2, 3, 4}")
    graph, context = imported(model, target="vnni")
    assert only(graph, "Gemm").name == "matmul_3"
    assert state(context).changed == {"rounding between a MatMul and its bias": 1}
    assert state(context).channels_kept == 4


def test_a_transposed_weight_keeps_its_integers() -> None:
    model = text(QX + QW + "u = Transpose <perm = [1, 0]> (w) y = MatMul(b, u)")
    graph, context = imported(model, target="vnni")
    assert state(context).channels_kept == 4
    wanted = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "v"))
    np.testing.assert_array_equal(written_weights(graph)["matmul_4"], wanted)
    close_to_source(model, graph, 1e-5)


def test_a_pair_that_was_a_relu_stays_one_where_the_tensor_is_read_without_it() -> None:
    body = QX + QW + "p = MatMul(b, w) q = QuantizeLinear(p, t, o) r = DequantizeLinear(q, t, o) k = Sigmoid(p) y = Mul(r, k)"
    model = text(body)
    graph, context = imported(model, target="vnni")
    assert only(graph, "Gemm").outputs[0].consumers
    assert not state(context).changed
    close_to_source(model, graph, 0.02)


def test_a_tensor_read_with_and_without_rounding_is_rounded_for_all_and_counted() -> None:
    body = QX + QW + "p = MatMul(b, w) q = QuantizeLinear(p, s, z) r = DequantizeLinear(q, s, z) k = Sigmoid(p) y = Mul(r, k)"
    _, context = imported(text(body), target="vnni")
    assert state(context).changed == {"tensors that float operators now read after rounding": 1}
    assert context.plan is not None
    assert context.plan.linears[0].result is not None


def test_a_second_scale_on_moved_data_is_given_up_and_its_saturation_kept() -> None:
    body = (
        QX + QW + "p = MatMul(b, w) q = QuantizeLinear(p, s, z) r = DequantizeLinear(q, s, z) k = Reshape(r, h) "
        "l = QuantizeLinear(k, t, o) g = DequantizeLinear(l, t, o) y = Sigmoid(g)"
    )
    model = text(body, "int64[2] h = {4, 2}", "float[2, 4] x) => (float[4, 2] y")
    graph, context = imported(model, target="vnni")
    assert state(context).changed == {"scales given up where data only moves": 1}
    clip = only(graph, "Clip")
    assert int(clip.inputs[1].array()) == 100  # type: ignore[union-attr]
    close_to_source(model, graph, 0.05)


def test_operators_on_integers_are_lifted() -> None:
    body = (
        "a = QuantizeLinear(x, s, z) c = MaxPool <kernel_shape = [2, 2]> (a) d = Pad(c, h, z) "
        "e = Transpose <perm = [0, 1, 3, 2]> (d) f = Clip(e, k, l) b = DequantizeLinear(f, s, z) "
        "i = DequantizeLinear(wv, m, n) p = Conv(b, i) "
        "q = QuantizeLinear(p, s, z) y = DequantizeLinear(q, s, z)"
    )
    constants = (
        "int64[8] h = {0, 0, 1, 0, 0, 0, 0, 1}, uint8 k = {90}, uint8 l = {200}, int8[2, 1, 2, 2] wv = {9, 8, 7, 6, -5, 4, 3, 20}"
    )
    model = text(body, constants, "float[1, 1, 6, 6] x) => (float[1, 2, 5, 5] y")
    graph, context = imported(model, target="vnni")
    assert state(context).channels_kept == 2
    close_to_source(model, graph, 0.05, (1, 1, 6, 6))


def test_average_pools_are_exact_convolutions_of_the_importer() -> None:
    body = (
        QX + "i = DequantizeLinear(wv, m, n) p = Conv(b, i) q = QuantizeLinear(p, s, z) r = DequantizeLinear(q, s, z) "
        "k = AveragePool <kernel_shape = [2, 2]> (r) l = QuantizeLinear(k, s, z) y = DequantizeLinear(l, s, z)"
    )
    model = text(body, "int8[1, 1, 2, 2] wv = {9, 8, 7, 60}", "float[1, 1, 6, 6] x) => (float[1, 1, 4, 4] y")
    graph, context = imported(model, target="vnni")
    assert state(context).changed == {"weights that a pass made, not the source": 1}
    close_to_source(model, graph, 0.05, (1, 1, 6, 6))


PRODUCT = QX + QW + "p = MatMul(b, w) q = QuantizeLinear(p, s, z) r = DequantizeLinear(q, s, z) "


@pytest.mark.parametrize("op", ["MatMul", "Mul"])
def test_products_of_two_activations_are_exact(op: str) -> None:
    body = PRODUCT + f"u = Transpose <perm = [1, 0]> (r) k = {op}(r, {'u' if op == 'MatMul' else 'b'}) "
    body += "l = QuantizeLinear(k, s, z) y = DequantizeLinear(l, s, z)"
    ends = "float[2, 4] x) => (float[2, 2] y" if op == "MatMul" else "float[2, 4] x) => (float[2, 4] y"
    model = text(body, ends=ends)
    graph, context = imported(model, target="vnni")
    assert context.plan is not None
    (site,) = context.plan.products
    multiplier = Fraction(float(np.float32(np.float32(site.left.scale * site.right.scale) / site.result.scale)))
    if op == "MatMul":
        assert (multiplier * 2**16).denominator == 1
    else:
        near = multiplier.limit_denominator(1023)
        assert near.denominator % 2 == 1
        assert abs(near / multiplier - 1) < Fraction(1, 2**22)
    qdq = graph.to_proto()
    context.settings = dataclasses.replace(context.settings, format="qoperator")
    LowerQOperator().run(graph, context)
    assert only(graph, f"QLinear{op}")
    session, source = Session(graph.to_proto(), optimisation=Optimisation.OFF), Session(model)
    random = np.random.default_rng(1)
    for _ in range(20):
        feeds = {"x": random.normal(size=(2, 4)).astype(np.float32)}
        results = [s.run(feeds)["y"] for s in (Session(qdq), session, Interpreter(qdq))]
        np.testing.assert_array_equal(results[0], results[1])
        np.testing.assert_array_equal(results[0], results[2])
        np.testing.assert_allclose(results[0], source.run(feeds)["y"], rtol=0, atol=0.06)


def test_a_product_whose_scale_a_sum_decides_is_computed_in_float() -> None:
    body = PRODUCT + "k = Mul(r, b) l = QuantizeLinear(k, s, z) g = DequantizeLinear(l, s, z) h = Add(g, r) "
    body += "i = QuantizeLinear(h, s, z) y = DequantizeLinear(i, s, z)"
    model = text(body)
    graph, context = imported(model, target="vnni")
    assert state(context).changed == {"products of two activations computed in float: their scale is tied to a sum": 1}
    assert only(graph, "Sum").inputs[0].producer is only(graph, "Mul")
    close_to_source(model, graph, 0.5)  # one step of r times the largest b


@pytest.mark.parametrize("op", ["Sigmoid", "Softmax", "LeakyRelu"])
def test_operators_without_an_exact_kernel_do_not_fuse(op: str) -> None:
    model = text(PRODUCT + f"k = {op}(r) l = QuantizeLinear(k, m, o) y = DequantizeLinear(l, m, o)")
    graph, _ = imported(model, target="vnni")
    assert only(graph, "Sum").inputs[0].producer is only(graph, op)
    assert op in audit(graph.to_proto()).float_ops
    close_to_source(model, graph, 0.06)  # a step of r, and the last one


def test_tables_of_integers_keep_their_form() -> None:
    body = (
        QW + "e = Gather(w, i) a = QuantizeLinear(e, s, z) b = DequantizeLinear(a, s, z) u = DequantizeLinear(v, m, n) "
        "y = MatMul(b, u)"
    )
    model = text(body, ends="int64[2] i) => (float[2, 4] y")
    graph, _ = imported(model, target="vnni")
    gather = only(graph, "Gather")
    assert gather.constant(0) is not None
    feeds = {"i": np.array([3, 1])}
    np.testing.assert_allclose(Session(graph.to_proto()).run(feeds)["y"], Session(model).run(feeds)["y"], rtol=0, atol=1e-5)


def test_an_input_of_integers_is_read_as_it_is() -> None:
    model = text(
        "b = DequantizeLinear(x, s, z) w = DequantizeLinear(v, m, n) y = MatMul(b, w)", ends="uint8[2, 4] x) => (float[2, 4] y"
    )
    graph, context = imported(model, target="vnni")
    assert state(context).channels_kept == 4
    assert "QuantizeLinear" not in [n.op for n in graph.nodes if n.inputs[0].name == "x"]
    assert [n.op for n in graph.nodes if n.op == "QuantizeLinear"] == []


def test_a_scale_that_nothing_but_a_float_operator_reads_stands() -> None:
    model = text(QX + QW + "p = MatMul(b, w) k = Sigmoid(p) q = QuantizeLinear(k, m, o) y = DequantizeLinear(q, m, o)")
    graph, context = imported(model, target="vnni")
    assert sum(n.op == "QuantizeLinear" for n in graph.nodes) == 2
    close_to_source(model, graph, 0.01)
    assert not state(context).changed


def test_16_bit_activations_are_computed_in_float_and_counted() -> None:
    body = QX + QW + "p = MatMul(b, w) q = QuantizeLinear(p, m, u) y = DequantizeLinear(q, m, u)"
    model = text(body, "uint16 u = {32768}")
    graph, context = imported(model, target="vnni")
    assert state(context).changed == {"activations of 16 bits computed in float": 1}
    close_to_source(model, graph, 0.01)


NUMBERS = "{1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}"
LEFT: dict[str, tuple[str, str, str]] = {
    "blocked": (
        QX + QW + "d = DequantizeLinear <axis = 0, block_size = 2> (v, c) p = MatMul(b, d) y = Identity(p)",
        "float[2, 4] c = {1, 2, 3, 4, 5, 6, 7, 8}",
        "weights are quantised in blocks",
    ),
    "wide": (QX + "d = DequantizeLinear(i, m) y = MatMul(b, d)", f"int16[4, 4] i = {NUMBERS}", "weights have more than 8 bits"),
    "float_input": (
        "k = Sigmoid(x) " + QW + "a = QuantizeLinear(k, s, z) b = DequantizeLinear(a, s, z) p = MatMul(x, w) y = Add(p, b)",
        "",
        "its input is not quantised in the source",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_where_nothing_can_be_imported_the_error_says_why(case: str) -> None:
    body, constants, reason = LEFT[case]
    with pytest.raises(ModelError, match=f"nothing of its Q/DQ can be imported: {reason}"):
        imported(text(body, constants))


def test_nodes_with_float_weights_stay_float_and_are_counted() -> None:
    body = (
        QX + QW + "c = MatMul(b, w) d = QuantizeLinear(c, s, z) e = DequantizeLinear(d, s, z) p = MatMul(e, f) y = MatMul(p, w)"
    )
    graph = Graph.from_proto(text(body, f"float[4, 4] f = {NUMBERS}"))
    context = Context(Settings(target="vnni"))
    refused: dict[str, int] = {}
    for step in passes_for("imported"):
        report = step.run(graph, context)
        if step.name == "quantise_imported" and report.rewrites:
            refused = dict(report.skipped)
    assert refused == {"its weights are float in the source": 1, "its input is not quantised in the source": 1}


REFUSED: dict[str, tuple[str, str, str]] = {
    "computed_scale": (
        "k = ReduceMax <keepdims = 0> (x) a = QuantizeLinear(x, k, z) b = DequantizeLinear(a, k, z) y = Relu(b)", "",
        r"node 'quantizelinear_1': its scale or zero point is computed at run time",
    ),
    "per_channel": (
        "a = QuantizeLinear <axis = 1> (x, c, cz) b = DequantizeLinear <axis = 1> (a, c, cz) y = Relu(b)",
        "float[4] c = {1, 2, 3, 4}, uint8[4] cz = {0, 0, 0, 0}",
        r"node 'quantizelinear_0': activations with one scale a channel are not imported",
    ),
    "blocked": (
        "a = QuantizeLinear <axis = 1, block_size = 2> (x, c) b = DequantizeLinear <axis = 1, block_size = 2> (a, c) y = Relu(b)",
        "float[2, 2] c = {1, 2, 3, 4}",
        r"node 'quantizelinear_0': activations quantised in blocks are not imported",
    ),
    "float8": (
        "a = QuantizeLinear <output_dtype = 17> (x, s) b = DequantizeLinear(a, s) y = Relu(b)", "",
        r"QuantizeLinear of type FLOAT8E4M3FN is not imported",
    ),
    "negative_scale": (
        "a = QuantizeLinear(x, c, z) b = DequantizeLinear(a, c, z) y = Relu(b)", "float c = {-1}",
        r"a scale in 'c' is not a positive number",
    ),
    "arithmetic": (
        "a = QuantizeLinear(x, s, z) c = Add(a, a) b = DequantizeLinear(c, s, z) y = Relu(b)", "",
        r"node 'add_1': Add on integers of QuantizeLinear is not imported",
    ),
    "other_parameters": (
        "a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, t, z) y = Relu(b)", "",
        r"node 'dequantizelinear_1': dequantises with other parameters than 'quantizelinear_0' quantised with",
    ),
    "unequal_concat": (
        "a = QuantizeLinear(x, s, z) c = QuantizeLinear(x, t, z) d = Concat <axis = 0> (a, c) b = DequantizeLinear(d, s, z) "
        "y = Slice(b, i, j)", "int64[1] i = {0}, int64[1] j = {2}",
        r"node 'concat_2': Concat of integers with unequal scales is not imported",
    ),
    "computed_integers": (
        QX + "d = Cast <to = 2> (b) c = DequantizeLinear(d, s, z) y = Relu(c)",
        "",
        r"node 'dequantizelinear_3': dequantises integers that are computed in a way that is not imported",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_imported_is_refused_by_name(case: str) -> None:
    body, constants, message = REFUSED[case]
    with pytest.raises(ModelError, match=message):
        imported(text(body, constants))


# ---- real models ----
ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"


@pytest.mark.zoo
@pytest.mark.skipif(not ZOO.is_dir(), reason=f"{ZOO} is absent: no real models")
@pytest.mark.parametrize("signed", [False, True], ids=["u8s8", "s8s8"])
def test_onnxruntimes_own_resnet20_is_imported(signed: bool, tmp_path: Path) -> None:
    feeds = [{"input": x} for x in np.random.default_rng(0).normal(size=(8, 1, 3, 32, 32)).astype(np.float32)]
    source = quantised_by_onnxruntime(ZOO / "resnet20_cifar10" / "model.onnx", tmp_path / "source.onnx", feeds, signed)
    wanted = np.concatenate([source.run(f)["logits"] for f in feeds])
    results = []
    for form in ("qdq", "qoperator"):
        found = compile_model(tmp_path / "source.onnx", tmp_path / f"{form}.onnx", format=form, target="vnni", latency=False)
        report = found.report["imported"]
        assert report["channels"]["kept"] > 0.4 * report["channels"]["rounded"]
        assert not report["left_float"]
        session = Session(found.path)
        results.append(np.concatenate([session.run(f)["logits"] for f in feeds]))
    np.testing.assert_array_equal(results[0], results[1])
    assert sqnr(wanted, results[0]) > 22


def quantised_by_onnxruntime(model: Path, path: Path, feeds: list[dict[str, Array]], signed: bool) -> Session:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        rows = iter(feeds)

        def get_next(self) -> Any:
            return next(self.rows, None)

    activation = QuantType.QInt8 if signed else QuantType.QUInt8
    options = {"ActivationSymmetric": signed}
    quantize_static(
        model, path, Reader(), per_channel=True, activation_type=activation, weight_type=QuantType.QInt8, extra_options=options
    )
    return Session(path)
