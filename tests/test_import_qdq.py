"""Q/DQ models of other tools: what is kept, what the formats agree on, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from import_helpers import compiled, imported, sqnr, state, written_weights
from import_models import net, samples
from onnx import numpy_helper
from passes_helpers import parse
from runtime_marks import needs_conv_integer
from test_exactness import assert_exact

from qcompile.certificate import certify
from qcompile.errors import InputError, LimitError
from qcompile.graph import Array, Graph
from qcompile.passes.lower_qoperator import LowerQOperator
from qcompile.pipeline import compile_model
from qcompile.runtime import Session

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
