"""Each pattern that the importer understands, and each refusal, on models as text."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from import_helpers import QW, QX, close_to_source, imported, only, state, text, written_weights
from onnx import numpy_helper

from qcompile.audit import audit
from qcompile.context import Context, Settings
from qcompile.errors import ModelError
from qcompile.graph import Graph
from qcompile.interpret import Interpreter
from qcompile.passes import passes_for
from qcompile.passes.lower_qoperator import LowerQOperator
from qcompile.runtime import Optimisation, Session


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


@pytest.mark.parametrize("axis", [-1, 2])
def test_a_flattened_weight_keeps_its_integers(axis: int) -> None:
    values = ", ".join(str(v) for v in range(1, 17))
    body = QX + f"w = DequantizeLinear(k, m, n) u = Flatten <axis = {axis}> (w) y = MatMul(b, u)"
    graph, context = imported(text(body, f"int8[2, 2, 4] k = {{{values}}}"), target="vnni")
    assert state(context).channels_kept == 4
    np.testing.assert_array_equal(written_weights(graph)["matmul_4"], np.arange(1, 17).reshape(4, 4).T)


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
