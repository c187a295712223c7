"""The certificate: what counts as an end, and every float tensor between the ends by its name and maker."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto
from passes_helpers import parse
from runtime_marks import needs_conv_integer

from qcompile.certificate import certify
from qcompile.cli import main
from qcompile.errors import ModelError

MODELS = Path(__file__).resolve().parents[1] / "models"
BODY = """g (float[2, 4] x) => (float[2, 4] y) {{
    q = QuantizeLinear(x, s, z)
    i = MatMulInteger(q, w, z)
    {0}
}}"""


def model(text: str) -> ModelProto:
    constants = {"s": np.float32(0.5), "z": np.uint8(3), "w": np.eye(4, dtype=np.int8), "one": np.float32(1)}
    return parse(text, **constants)


ENDINGS = {
    "dequantise": ("y = DequantizeLinear(i, s)", [("dequantise output", "DequantizeLinear")]),
    "cast_and_scale": (
        "f = Cast<to: int = 1>(i) y = Mul(f, s)",
        [("dequantise output", "Cast"), ("dequantise output", "Mul")],
    ),
    "moved": (
        "f = DequantizeLinear(i, s) y = Transpose(f)",
        [("dequantise output", "DequantizeLinear"), ("dequantise output", "Transpose")],
    ),
    "softmax": (
        "f = DequantizeLinear(i, s) y = Softmax(f)",
        [("dequantise output", "DequantizeLinear"), ("float head", "Softmax")],
    ),
    "two_readers": (
        "f = DequantizeLinear(i, s) a = Softmax(f) b = Sigmoid(f) y = Concat<axis: int = 1>(a, b)",
        [
            ("dequantise output", "DequantizeLinear"),
            ("float head", "Softmax"),
            ("float head", "Sigmoid"),
            ("dequantise output", "Concat"),
        ],
    ),
}


@pytest.mark.parametrize("case", list(ENDINGS))
def test_ends_are_no_floats_between(case: str) -> None:
    text, ends = ENDINGS[case]
    found = certify(model(BODY.format(text)))
    assert found.integer_only, found.floats
    assert [(e.kind, e.op) for e in found.ends] == [("quantise input", "QuantizeLinear"), *ends]
    assert found.element_types["int32"] == 1 and found.element_types["uint8"] == 1


BETWEEN = {
    "back_to_integers": (
        "f = DequantizeLinear(i, s) r = Sigmoid(f) p = QuantizeLinear(r, s, z) y = DequantizeLinear(p, s, z)",
        [("f", "DequantizeLinear"), ("r", "Sigmoid")],
    ),
    "no_head": ("f = DequantizeLinear(i, s) y = Exp(f)", [("f", "DequantizeLinear"), ("y", "Exp")]),
    "two_scales": (
        "f = DequantizeLinear(i, s) h = DequantizeLinear(i, s) y = Mul(f, h)",
        [("y", "Mul")],
    ),
    "input_read": ("y = Mul(x, one) j = Cast<to: int = 1>(i)", [("y", "Mul"), ("j", "Cast")]),
    "computed_by_comparison": (
        "b = Greater(x, one) c = Cast<to: int = 6>(b) d = Add(c, i) y = DequantizeLinear(d, s)",
        [("x", "Greater")],
    ),
}


@pytest.mark.parametrize("case", list(BETWEEN))
def test_floats_between_are_named(case: str) -> None:
    text, floats = BETWEEN[case]
    found = certify(model(BODY.format(text)))
    assert not found.integer_only
    assert [(f.tensor, f.op) for f in found.floats] == floats
    assert all(f.reason for f in found.floats)


def test_an_end_that_ends_in_classes() -> None:
    text = """g (uint8[2, 4] q) => (int64[2, 1] y) {
        i = MatMulInteger(q, w, z)
        f = DequantizeLinear(i, s)
        y = ArgMax<axis: int = 1>(f)
    }"""
    found = certify(model(text))
    assert found.integer_only and [e.kind for e in found.ends] == ["dequantise output", "float head"]


def test_quantised_operators_hold_float_multipliers() -> None:
    text = """g (uint8[2, 4] q) => (uint8[2, 4] y) {
        y = QLinearMatMul(q, s, z, w, s, v, s, z)
    }"""
    made = model(text)
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.int8(0), "v"))
    (found,) = certify(made).floats
    assert (found.tensor, found.op, found.reason) == ("s", "QLinearMatMul", "rescales by a float multiplier")


def test_a_resize_by_constant_ratios_is_integer() -> None:
    text = 'g (uint8[1, 1, 4, 4] q) => (uint8[1, 1, 8, 8] y) { y = Resize<mode: string = "nearest">(q, , r) }'
    made = parse(text, r=np.asarray([1, 1, 2, 2], np.float32))
    assert certify(made).integer_only


def test_the_body_of_a_loop_is_between_the_ends() -> None:
    text = """g (uint8[4] q, int64 n, bool go) => (uint8[4] y) {
        y = Loop<body: graph = b (int64 i, bool c, uint8[4] v) => (bool d, uint8[4] o) {
            d = Identity(c)
            f = Cast<to: int = 1>(v)
            e = Exp(f)
            o = Cast<to: int = 2>(e)
        }>(n, go, q)
    }"""
    found = certify(parse(text))
    assert [(f.tensor, f.op) for f in found.floats] == [("f", "Cast"), ("e", "Exp")]


def test_an_operator_of_an_unknown_domain_counts_as_float() -> None:
    made = parse("g (uint8[4] q) => (uint8[4] y) { m = Neg(q) y = Identity(m) }")
    made.graph.node[0].domain = "elsewhere"
    made.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    assert next((f.tensor, f.reason) for f in certify(made).floats) == ("m", "computes in float")


def test_a_type_that_cannot_be_told_counts_as_float() -> None:
    text = """g (int64 n, bool go, uint8[4] q) => (y) {
        y = If<then_branch: graph = t () => (a) { a = Identity(q) }, else_branch: graph = e () => (a) { a = Neg(q) }>(go)
    }"""
    made = parse(text)
    made.graph.output[0].ClearField("type")
    assert [f.reason for f in certify(made).floats] == ["its type cannot be told"]


def test_functions_are_counted_and_written_out() -> None:
    made = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21, "f" : 1]>
        g (int32[4] x) => (int32[4] y) { a = Twice(x) y = f.Twice(x) z = f.Twice(y) }
        <domain: "f", opset_import: ["" : 21]> Twice (x) => (y) { y = Add(x, x) }""".replace("a = Twice(x) ", "")
    )
    found = certify(made)
    assert found.functions == {"Twice": 2} and found.operators == {"Add": 2} and found.integer_only


def test_unreadable_files_are_model_errors(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError):
        certify(tmp_path / "m.onnx")


# --- the command line -----------------------------------------------------------------------------------------


def run(*args: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(list(args))
    out, err = capfd.readouterr()
    return int(end.value.code or 0), out, err


@needs_conv_integer
def test_inspect_says_yes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, report = tmp_path / "i.onnx", tmp_path / "r.json"
    data = str(MODELS / "digits_calib.npz")
    options = ["--format", "integer", "--effort", "fast", "--no-latency", "--quiet", "--data", data]
    status, _, err = run(str(MODELS / "digits_cnn.onnx"), *options, "-o", str(path), "--report", str(report), capfd=capfd)
    assert status == 0, err
    found = json.loads(report.read_text())["integer_only"]
    assert found["holds"] and found["floats"] == 0 and found["element_types"]["float"] == 2
    status, out, _ = run("inspect", str(path), "--require-integer-only", capfd=capfd)
    assert status == 0 and "integer-only: yes" in out and "DyadicRescale" in out and "dequantise output" in out


def test_inspect_names_floats(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(MODELS / "digits_cnn.onnx")
    status, out, err = run("inspect", path, "--require-integer-only", capfd=capfd)
    assert status == 3 and "integer-only: no" in out
    assert "not integer-only:" in err and "first '" in err and err.count("\n") == 1
    status, out, _ = run("inspect", path, capfd=capfd)
    assert status == 0 and "integer-only: no" in out and "--require-integer-only names them all" in out


def test_the_command_line_refuses_what_stays_float(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]> g (float[n, 8] x) => (float[n, 8] y)
        {h = MatMul(x, a)
         logs = LogSoftmax(h)
         y = MatMul(logs, b)}"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name in "ab":
        weight = rng.standard_normal((8, 8)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=rng.standard_normal((32, 8)).astype(np.float32))
    options = ["--format", "integer", "--effort", "fast", "--no-latency", "--quiet", "--data", str(tmp_path / "d.npz")]
    status, _, err = run(str(tmp_path / "m.onnx"), *options, "-o", str(tmp_path / "i.onnx"), capfd=capfd)
    assert status == 2 and "LogSoftmax" in err and "leaves no float between the ends" in err and err.count("\n") == 1
    assert not (tmp_path / "i.onnx").exists()
