"""b and c re-derived from a file, in both formats, and every reason for which a rescale is called inexact."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from integer_models import Net, Tensor
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from runtime_marks import needs_conv_integer

from qcompile.errors import ModelError
from qcompile.inspection import Rescale, rescales, summary
from qcompile.pipeline import compile_model

SX, ZX, SY, ZY = 0.0374, 121, 0.0525, 118
BOTH = pytest.mark.parametrize("layout", ["qdq", "qoperator"])
TARGETS = [(1, 1), (1, 2), (3, 3), (1, 4), (5, 5), (1, 3), (311, 16), (1207, 16)]
RNG = np.random.default_rng(0)
WEIGHTS = RNG.integers(-63, 64, (8, 3, 3, 3)).astype(np.int8)
BIAS = RNG.integers(-300, 300, 8).astype(np.int32)


def network(layout: str) -> tuple[Net, Tensor]:
    """Conv, Add, MaxPool, Mul, GlobalAveragePool, Flatten, Gemm into 8 bits, Gemm into float."""
    net = Net(layout)
    x = net.input([1, 3, 6, 6], SX, ZX)
    y = net.linear("Conv", x, WEIGHTS, TARGETS, (SY, 0), BIAS, pads=[1, 1, 1, 1])
    total = net.pair("Add", y, y, float(np.float32(SY * 255 / 143)), 3)
    total = net.move("MaxPool", total, kernel_shape=[2, 2], strides=[2, 2])
    square = net.pair("Mul", total, total, float(np.float32(total.scale) * np.float32(total.scale)), 0)
    pooled = net.pool(square, float(np.float32(square.scale) / np.float32(9) * 2), 0)
    flat = net.move("Flatten", pooled)
    dense = net.linear("Gemm", flat, WEIGHTS.reshape(8, 27)[:, :8], TARGETS, (SY, ZY), BIAS, transB=1)
    return net, net.linear("Gemm", dense, WEIGHTS.reshape(27, 8)[:8], [(1, 4)], None, BIAS)


def named(layout: str, qdq: str, qoperator: str) -> str:
    return qdq if layout == "qdq" else qoperator


@BOTH
def test_every_rescale_of_a_network(layout: str) -> None:
    net, logits = network(layout)
    model = net.model(logits.name, types={logits.name: TensorProto.FLOAT})
    found = rescales(model)
    assert [r.kind for r in found] == ["linear", "add", "mul", "pool", "linear"]
    assert [r.op for r in found] == [
        named(layout, a, b)
        for a, b in [
            ("Conv", "QLinearConv"),
            ("Add", "QLinearAdd"),
            ("Mul", "QLinearMul"),
            ("GlobalAveragePool", "QLinearGlobalAveragePool"),
            ("Gemm", "QGemm"),
        ]
    ]
    assert all(r.node.startswith(r.op) for r in found)
    for rescale in (found[0], found[4]):
        assert rescale.exact
        assert rescale.reason == ""
        assert rescale.b is not None
        assert rescale.c is not None
        got = [Fraction(int(b), 2 ** int(c)) for b, c in zip(rescale.b, rescale.c, strict=True)]
        wanted = [Fraction(b, 2**c) for b, c in TARGETS]
        assert all(abs(g - w) <= Fraction(1, 2**13) for g, w in zip(got, wanted, strict=True))
        assert rescale.multiplier is not None
        assert [Fraction(float(m)) for m in rescale.multiplier] == got
    assert (found[1].exact, found[1].q, found[1].p) == (True, 255, (143, 143))
    assert (found[2].exact, found[2].q, found[2].p) == (True, 1, (1,))
    assert found[3].multiplier is not None
    assert float(found[3].multiplier) == pytest.approx(0.5, rel=1e-6)


@BOTH
def test_summary(layout: str) -> None:
    net, logits = network(layout)
    model = net.model(logits.name, types={logits.name: TensorProto.FLOAT})
    got = summary(model)
    assert got.formats == (layout,)
    assert got.float_ops == {}
    assert sum(got.integer_ops.values()) == 8
    assert got.activation_quantisers == (8 if layout == "qdq" else 1)
    assert got.weight_bytes["int8"] == sum(
        numpy_helper.to_array(t).size for t in model.graph.initializer if t.data_type == TensorProto.INT8
    )
    assert got.weight_bytes["int32"] == sum(
        4 * numpy_helper.to_array(t).size for t in model.graph.initializer if t.data_type == TensorProto.INT32
    )


def one(model: onnx.ModelProto) -> Rescale:
    (rescale,) = rescales(model)
    return rescale


def scaled(net: Net, shape: list[int], factor: float) -> None:
    """Multiply the first float constant of this shape."""
    constant = next(t for t in net.constants if list(t.dims) == shape and t.data_type == TensorProto.FLOAT)
    constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant) * np.float32(factor), constant.name))


@BOTH
@pytest.mark.parametrize(
    ("build", "kind", "reason"),
    [
        pytest.param(
            lambda n, x: n.linear("Conv", x, WEIGHTS, [(1, 17)] * 8, (SY, 0)),
            "linear", "8 of 8 rescale multipliers are not b/2^c", id="conv-c-17",
        ),
        pytest.param(lambda n, x: n.pair("Add", x, x, 2 * SX, 0), "add", "is not p/q", id="add-a-half"),
        pytest.param(lambda n, x: n.pair("Mul", x, x, 0.123, 0), "mul", "is not p/q", id="mul"),
        pytest.param(lambda n, x: n.pool(x, 0.123, 0), "pool", "1 of 1 rescale multipliers", id="pool"),
    ],
)  # fmt: skip
def test_inexact(build: Callable[[Net, Tensor], Tensor], kind: str, reason: str, layout: str) -> None:
    net = Net(layout)
    y = build(net, net.input([1, 3, 6, 6], SX, ZX))
    rescale = one(net.model(y.name))
    assert (rescale.kind, rescale.exact) == (kind, False)
    assert reason in rescale.reason


def test_inexact_channels_keep_their_decomposition() -> None:
    net = Net("qoperator")
    y = net.linear("Conv", net.input([1, 3, 6, 6], SX, ZX), WEIGHTS, TARGETS, (SY, 0))
    scaled(net, [8], 1 + 2**-20)
    rescale = one(net.model(y.name))
    assert not rescale.exact
    assert rescale.multiplier is not None
    assert rescale.b is not None
    assert rescale.c is not None
    assert np.array_equal(rescale.b / 2.0**rescale.c, rescale.multiplier.astype(np.float64))
    assert int(rescale.c.max()) > 16


@BOTH
def test_pool_over_an_unknown_size(layout: str) -> None:
    net = Net(layout)
    y = net.pool(net.input([1, 3, "h", 6], 1.5, 0), 0.25, 0)
    rescale = one(net.model(y.name))
    assert (rescale.kind, rescale.exact) == ("pool", False)
    assert "not static" in rescale.reason


@BOTH
def test_computed_scales_are_not_trusted(layout: str) -> None:
    net = Net(layout)
    y = net.linear("MatMul", net.input([5, 27], SX, ZX), WEIGHTS.reshape(27, 8), [(1, 2)], (SY, 0))
    last = net.nodes[-1]
    at = 1 if layout == "qdq" else 6
    last.input[at] = net.node("Exp", [last.input[at]])
    net.nodes.insert(0, net.nodes.pop())
    rescale = one(net.model(y.name))
    assert (rescale.kind, rescale.exact) == ("linear", False)
    assert "not stored" in rescale.reason


def test_bias_alpha_and_axis_in_qdq() -> None:
    def gemm(change: Callable[[Net], None]) -> Rescale:
        net = Net("qdq")
        x = net.input([5, 8], SX, ZX)
        y = net.linear("Gemm", x, WEIGHTS.reshape(8, 27)[:, :8], TARGETS, (SY, 0), BIAS)
        change(net)
        wide: dict[str, int] | None = {y.name: TensorProto.UINT16} if change is wide_output else None
        return one(net.model(y.name, types=wide))

    def bias_scale(net: Net) -> None:
        third = [n for n in net.nodes if n.op_type == "DequantizeLinear"][2]
        third.input[1] = net.const(np.full(8, 0.1))

    def alpha(net: Net) -> None:
        next(n for n in net.nodes if n.op_type == "Gemm").attribute.append(helper.make_attribute("alpha", 2.0))

    def axis(net: Net) -> None:
        second = [n for n in net.nodes if n.op_type == "DequantizeLinear"][1]
        second.attribute[0].i = 0

    def float_bias(net: Net) -> None:
        next(n for n in net.nodes if n.op_type == "Gemm").input[2] = net.const(np.ones(8))

    def wide_output(net: Net) -> None:
        net.nodes[-1].input[2] = net.const(0, np.uint16)

    assert gemm(lambda net: None).exact
    for change, reason in [
        (bias_scale, "bias's scale"),
        (alpha, "alpha or beta"),
        (axis, "lies along axis 0"),
        (float_bias, "not behind DequantizeLinear"),
        (wide_output, "output is not 8-bit"),
    ]:
        rescale = gemm(change)
        assert not rescale.exact, reason
        assert reason in rescale.reason


def test_relu_behind_a_convolution_and_a_transposed_weight() -> None:
    net = Net("qdq")
    x = net.input([5, 27], SX, ZX)
    y = net.linear("MatMul", x, WEIGHTS.reshape(27, 8), TARGETS, (SY, 0), after="Relu")
    weight = next(n for n in net.nodes if n.op_type == "DequantizeLinear" and len(n.attribute))
    product = next(n for n in net.nodes if n.op_type == "MatMul")
    data = next(t for t in net.constants if t.name == weight.input[0])
    data.CopyFrom(numpy_helper.from_array(WEIGHTS.reshape(27, 8).T.copy(), data.name))
    weight.attribute[0].i = 0
    at = list(net.nodes).index(product)
    net.nodes.insert(at, helper.make_node("Transpose", [weight.output[0]], ["turned"], perm=[1, 0]))
    product.input[1] = "turned"
    model = net.model(y.name)
    assert one(model).exact
    assert summary(model).integer_ops == {"MatMul": 1, "Relu": 1}


def test_movement_is_no_rescale_unless_the_scale_changes() -> None:
    for scale, kinds in ((SX, []), (SY, ["other"])):
        net = Net("qdq")
        x = net.input([1, 3, 6, 6], SX, ZX)
        y = net.q(net.node("Reshape", [net.dq(x), net.const([3, -1], np.int64)]), scale, ZX)
        found = rescales(net.model(y.name))
        assert [r.kind for r in found] == kinds
        assert all("scale changes" in r.reason for r in found)


@pytest.mark.parametrize("scale", [SX, SY], ids=["equal", "unequal"])
@BOTH
def test_concat(scale: float, layout: str) -> None:
    net = Net(layout)
    a, b = net.input([1, 3, 6], SX, ZX), net.input([1, 3, 6], scale, ZX)
    if layout == "qdq":
        y = net.q(net.node("Concat", [net.dq(a), net.dq(b)], axis=1), SX, ZX).name
    else:
        parts = [a.name, *net.ends(a), b.name, *net.ends(b)]
        y = net.node("QLinearConcat", [*net.ends(a), *parts], domain="com.microsoft", axis=1)
    found = rescales(net.model(y))
    assert [r.exact for r in found] == ([] if scale == SX else [False])


def test_float_work_between_quantised_tensors() -> None:
    net = Net("qdq")
    x = net.input([2, 8], SX, ZX)
    soft = net.q(net.node("Softmax", [net.dq(x)], name="soft"), 1 / 256, 0)
    w = net.linear("MatMul", soft, WEIGHTS.reshape(8, 27), [(1, 2)], (SY, 0))
    found = rescales(net.model(w.name))
    assert (found[0].node, found[0].kind, found[0].exact) == ("soft", "other", False)
    assert found[1].exact
    got = summary(net.model(w.name))
    assert got.float_ops == {"Softmax": 1}
    assert got.formats == ("qdq", "float")


def test_qlinear_operators_outside_the_promise() -> None:
    net = Net("qoperator")
    x = net.input([2, 8], SX, ZX)
    y = net.node("QLinearSigmoid", [x.name, *net.ends(x), *net.ends(Tensor("", 1 / 256, 0))], domain="com.microsoft")
    assert "in float" in one(net.model(y)).reason


def test_integer_format_has_no_scales() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (uint8[N, 2] x) => (int32[N, 2] y) <int8[2, 2] w = {1, 2, 3, 4}, int32 b = {5}>
        { acc = MatMulInteger(x, w)  y = Mul(acc, b) }""")
    assert rescales(model) == []
    got = summary(model)
    assert got.formats == ("integer",)
    assert got.integer_ops == {"MatMulInteger": 1, "Mul": 1}


def test_quantised_graph_input_is_no_rescale() -> None:
    net = Net("qdq")
    net.inputs.append(helper.make_tensor_value_info("x0", TensorProto.FLOAT, [2, 8]))
    moved = net.node("Reshape", ["x0", net.const([16], np.int64)])
    assert rescales(net.model(net.q(moved, SX, ZX).name)) == []


def test_four_bit_weights_are_counted_by_their_stored_size() -> None:
    net = Net("qoperator", opset=21)
    y = net.linear("MatMul", net.input([5, 27], SX, ZX), WEIGHTS.reshape(27, 8), [(1, 2)], (SY, 0))
    net.constants.append(helper.make_tensor("packed", TensorProto.INT4, [3], [1, 2, 3]))
    assert summary(net.model(y.name)).weight_bytes["int4"] == 2


def test_scales_in_external_data(tmp_path: Path) -> None:
    net, logits = network("qdq")
    model = net.model(logits.name, types={logits.name: TensorProto.FLOAT})
    expected = [(r.node, r.exact) for r in rescales(model)]
    external_data_helper.convert_model_to_external_data(model, location="w.bin", size_threshold=0)
    onnx.save(model, str(tmp_path / "m.onnx"))
    assert [(r.node, r.exact) for r in rescales(tmp_path / "m.onnx")] == expected


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.onnx: cannot be read"):
        rescales(tmp_path / "absent.onnx")


# --- rescales written out -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both_formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, models = tmp_path_factory.mktemp("formats"), Path(__file__).resolve().parents[1] / "models"
    for form in ("qoperator", "integer"):
        data = str(models / "digits_calib.npz")
        compile_model(models / "digits_cnn.onnx", folder / f"{form}.onnx", format=form, effort="fast", data=data, latency=False)
    return {form: folder / f"{form}.onnx" for form in ("qoperator", "integer")}


@needs_conv_integer
def test_the_integer_format_states_the_multipliers_of_the_quantised_operators(both_formats: dict[str, Path]) -> None:
    fused = [r for r in rescales(both_formats["qoperator"]) if r.kind == "linear"]
    written = {frozenset(_fractions(r)) for r in rescales(both_formats["integer"])}
    assert fused
    assert all(r.exact for r in rescales(both_formats["integer"]))
    for rescale in fused:
        assert frozenset(min(f, Fraction(256)) for f in _fractions(rescale)) in written


def _fractions(rescale: Rescale) -> list[Fraction]:
    assert rescale.b is not None
    assert rescale.c is not None
    b, c = np.broadcast_arrays(rescale.b, rescale.c)
    return [Fraction(int(x), 2 ** int(y)) for x, y in zip(b.reshape(-1), c.reshape(-1), strict=True)]


@needs_conv_integer
@pytest.mark.parametrize(("place", "value"), [(1, 0), (1, 1 << 29), (2, 0), (2, 23)], ids=["b-0", "b-large", "c-0", "c-large"])
def test_a_written_rescale_outside_its_bounds_is_named(both_formats: dict[str, Path], place: int, value: int) -> None:
    model = onnx.load(both_formats["integer"])
    call = next(n for n in model.graph.node if n.op_type.startswith("DyadicRescale"))
    tensor = next(t for t in model.graph.initializer if t.name == call.input[place])
    kind = numpy_helper.to_array(tensor).dtype
    tensor.CopyFrom(numpy_helper.from_array(np.full(tuple(tensor.dims), value, kind), tensor.name))
    found = [r for r in rescales(model) if not r.exact]
    # Equal constants are shared.
    readers = [n for n in model.graph.node if n.op_type.startswith("DyadicRescale") and n.input[place] == tensor.name]
    assert [r.node for r in found] == [n.name or n.output[0] for n in readers]
    assert "outside what int32 can rescale" in found[0].reason
