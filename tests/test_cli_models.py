"""The command line on real models, and as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_helpers import CNN, MODELS, Command, is_one_error
from onnx import numpy_helper, parser

DIGITS = str(MODELS / "digits.npz")


# --- check, bench, inspect on real models ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model with the weights of its last layer set to zero: it always gives the same class."""
    model = onnx.load(CNN)
    name = next(n for n in model.graph.node if n.op_type == "Gemm").input[1]
    weight = next(t for t in model.graph.initializer if t.name == name)
    weight.CopyFrom(numpy_helper.from_array(np.zeros(tuple(weight.dims), np.float32), name))
    path = tmp_path_factory.mktemp("models") / "broken.onnx"
    onnx.save(model, path)
    return path


def test_check_of_a_model_with_itself(command: Command, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    status, out, err = command("check", CNN, CNN, "--eval", DIGITS, "--max-drop", 0, "--report", report, "--no-latency")
    assert (status, err) == (0, "")
    assert "limit: pass: --max-drop 0: outputs are bit-identical" in out
    written = json.loads(report.read_text())
    assert written["accuracy"]["samples"] == 500
    assert written["accuracy"]["float"] == 0.998  # models/README.md: 499 of 500
    assert written["accuracy"]["sqnr_db"] is None
    assert written["latency_ms"] is None
    assert written["size_bytes"] == {"float": 95032, "quantised": 95032, "ratio": 1.0}
    assert written["verdict"]["outcome"] == "pass"


def test_check_fails_a_broken_model(command: Command, broken: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    status, out, err = command("check", CNN, broken, "--eval", DIGITS, "--max-drop", 1, "--report", report, "--no-latency")
    assert status == 3
    assert is_one_error(err)
    assert "above limit 1" in err
    assert "limit: fail" in out
    assert json.loads(report.read_text())["verdict"]["outcome"] == "fail"


def test_check_without_a_limit_never_fails(command: Command, broken: Path) -> None:
    status, out, _ = command("check", CNN, broken, "--eval", DIGITS, "--samples", 50, "--no-latency")
    assert status == 0
    assert "over 50 samples" in out
    assert "limit:" not in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        pytest.param([CNN, "nowhere.onnx", "--eval", DIGITS], "nowhere.onnx: cannot be read", id="no such model"),
        pytest.param([CNN, DIGITS, "--eval", DIGITS], "is not an ONNX model", id="not a model"),
        pytest.param([CNN, CNN, "--eval", "nowhere.npz"], "no such file", id="no such data"),
        pytest.param(
            [CNN, CNN, "--eval", str(MODELS / "digits_calib.npz"), "--max-drop", "1"], "holds no labels", id="limit, no labels"
        ),
    ],
)
def test_check_errors(args: list[str], said: str, command: Command) -> None:
    status, out, err = command("check", *args)
    assert (status, out) == (2, "")
    assert is_one_error(err)
    assert said in err


def test_bench(command: Command) -> None:
    status, out, err = command("bench", CNN, CNN, "--rounds", 1, "--data", DIGITS)
    assert (status, err) == (0, "")
    assert out.count("95.0 kB") == 2
    assert "of int8 peak" in out and "cold load" in out
    assert "int8 peak" in out.splitlines()[-1]


TEXT = """
<ir_version: 9, opset_import: ["" : 17]>
g (float[1, 2] x) => (float[1, 2] y)
<float sx = {0.5}, float sw = {SW}, float sy = {1.0}, uint8 zero = {0}, int8 w0 = {0}, int8[2, 2] w = {1, 2, 3, 4}>
{
  xq = QuantizeLinear (x, sx, zero)
  xd = DequantizeLinear (xq, sx, zero)
  wd = DequantizeLinear (w, sw, w0)
  m = MatMul (xd, wd)
  mq = QuantizeLinear (m, sy, zero)
  y = DequantizeLinear (mq, sy, zero)
}
"""


def quantised(path: Path, weight_scale: str) -> Path:
    onnx.save(parser.parse_model(TEXT.replace("SW", weight_scale)), path)
    return path


def test_inspect_lists_rescales(command: Command, tmp_path: Path) -> None:
    model = quantised(tmp_path / "m.onnx", "0.375")  # M = .5 * .375 / 1 = 3 / 2^4
    status, out, err = command("inspect", model, "--dyadic", "--require-exact")
    assert (status, err) == (0, "")
    row = next(line.split() for line in out.splitlines() if "MatMul" in line)
    assert row[1:] == ["MatMul", "linear", "1", "3", "4", "yes"]
    assert out.splitlines()[-1] == "1 rescale, all exact"


def test_inspect_says_what_is_not_exact(command: Command, tmp_path: Path) -> None:
    model = quantised(tmp_path / "m.onnx", "0.1")
    status, out, _ = command("inspect", model, "--dyadic")
    assert status == 0
    assert "no: " in out
    assert out.splitlines()[-1] == "1 rescale, 0 exact, 1 not"
    status, _, err = command("inspect", model, "--dyadic", "--require-exact")
    assert status == 3
    assert "1 of 1 rescales are not exact" in err


def test_inspect_of_a_float_model(command: Command) -> None:
    status, out, _ = command("inspect", CNN, "--dyadic")
    assert (status, out) == (0, "no rescales\n")
    status, _, err = command("inspect", CNN, "--dyadic", "--require-exact")
    assert status == 3
    assert "holds no rescale" in err


def test_inspect_lists_node_names(command: Command) -> None:
    status, out, _ = command("inspect", CNN, "--nodes")
    assert status == 0
    assert [line.split()[:2] for line in out.splitlines()[2:]] == [[n.name, n.op_type] for n in onnx.load(CNN).graph.node]


def test_inspect_summary(command: Command, tmp_path: Path) -> None:
    status, out, _ = command("inspect", quantised(tmp_path / "m.onnx", "0.375"))
    assert status == 0
    assert "formats: qdq\n" in out
    assert any(line.split() == ["MatMul", "1"] for line in out.splitlines())
    assert any(line.split() == ["int8", "5", "B"] for line in out.splitlines())  # the weight and its zero point


# --- the real pipeline -------------------------------------------------------------------------------------------

CALIBRATION = str(MODELS / "digits_calib.npz")


def test_compile_check_and_inspect(command: Command, tmp_path: Path) -> None:
    output, report = tmp_path / "m.onnx", tmp_path / "r.json"
    args = ["--data", CALIBRATION, "--eval", DIGITS, "--max-drop", "1", "--no-latency", "-o", output]
    status, out, err = command(CNN, *args, "--report", report)
    assert (status, err) == (0, "")
    assert f"wrote {output}" in out
    written = json.loads(report.read_text())
    assert written.keys() >= {"qcompile", "source", "output", "settings", "passes", "nodes", "seconds", "peak_rss_mb"}
    assert written["accuracy"]["samples"] == 500
    assert written["accuracy"]["sqnr_db"] > 35
    assert written["verdict"]["outcome"] == "pass"
    assert written["size_bytes"]["quantised"] == output.stat().st_size

    checked = tmp_path / "c.json"
    assert command("check", CNN, output, "--eval", DIGITS, "--report", checked, "--no-latency")[0] == 0
    again = json.loads(checked.read_text())
    for key in ("accuracy", "size_bytes", "nodes", "fusion", "output"):
        assert again[key] == written[key]

    status, out, _ = command("inspect", output, "--dyadic", "--require-exact")
    assert status == 0
    assert out.splitlines()[-1].endswith("rescales, all exact")

    other = tmp_path / "other.onnx"
    assert command(CNN, "--data", CALIBRATION, "--no-latency", "--quiet", "-o", other) == (0, "", "")
    assert other.read_bytes() == output.read_bytes()  # --eval changes nothing


def test_integer_inputs_are_checked_with_float_data(command: Command, tmp_path: Path) -> None:
    output, report = tmp_path / "m.onnx", tmp_path / "r.json"
    assert command(CNN, "--data", CALIBRATION, "--inputs-as", "uint8", "--no-latency", "-o", output)[0] == 0
    assert onnx.load(output).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert command("check", CNN, output, "--eval", DIGITS, "--no-latency", "--report", report)[0] == 0
    assert json.loads(report.read_text())["accuracy"]["sqnr_db"] > 35


# --- as a process ------------------------------------------------------------------------------------------------


def process(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "qcompile", *args], capture_output=True, text=True, timeout=120, cwd=cwd)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to oneself")
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    data = tmp_path / "data.py"
    data.write_text(
        "import os, signal\nimport numpy as np\n\n\ndef samples():\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored\n"
        "    yield {'input': np.zeros((1, 1, 8, 8), np.float32)}\n"
        f"    os.kill(os.getpid(), {int(signal.SIGINT)})\n"
        "    yield {'input': np.zeros((1, 1, 8, 8), np.float32)}\n"
    )
    folder = tmp_path / "out"
    folder.mkdir()
    done = process("check", CNN, CNN, "--eval", f"{data}:samples", "--report", str(folder / "r.json"))
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr.strip() == "qcompile: interrupted"
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX pipe")
def test_a_reader_that_goes_away_is_no_fault() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "qcompile", "passes"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_help_of_the_process() -> None:
    done = process("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: qcompile MODEL")
