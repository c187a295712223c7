"""The benchmark scripts, run as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompile.audit import audit

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
MODEL = ROOT / "models" / "digits_cnn.onnx"
DATA = ROOT / "models" / "digits_calib.npz"


def _run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _measured(code: str) -> dict[str, float | str]:
    finished = _run("run_measured.py", sys.executable, "-c", code)
    told: dict[str, float | str] = json.loads(finished.stdout)
    return told


def test_seconds_and_status_of_a_command_are_measured() -> None:
    told = _measured("import sys, time; time.sleep(0.2); sys.stderr.write('so it went'); sys.exit(3)")
    assert told["status"] == 3
    assert told["stderr"] == "so it went"
    assert 0.2 <= float(told["seconds"]) < 5


def test_peak_memory_is_the_command_s_own() -> None:
    ballast = np.ones(60_000_000)  # 480 MB in this process must not count
    small = _measured("pass")
    large = _measured("b = b'1' * 200_000_000")
    assert ballast[-1] == 1
    assert float(small["peak_rss_mb"]) < 100
    assert 150 < float(large["peak_rss_mb"]) - float(small["peak_rss_mb"]) < 250


@pytest.mark.parametrize("kind", ["u8s8", "default", "dynamic"])
def test_onnxruntime_quantises(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out.onnx"
    finished = _run("ort_quantise.py", MODEL, out, "--kind", kind, "--data", DATA, "--samples", "20")
    assert finished.returncode == 0, finished.stderr
    assert audit(out).integer_weight_bytes > 0


def test_an_old_opset_is_raised_first(tmp_path: Path) -> None:
    old = onnx.parser.parse_model("""
        <ir_version: 4, opset_import: ["" : 9]>
        g (float[1, 64] x) => (float[1, 8] y) { y = MatMul (x, W) }
    """)
    weight = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    old.graph.initializer.append(onnx.numpy_helper.from_array(weight, "W"))
    onnx.save(old, tmp_path / "old.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32))
    out = tmp_path / "out.onnx"
    finished = _run("ort_quantise.py", tmp_path / "old.onnx", out, "--data", tmp_path / "data.npz")
    assert finished.returncode == 0, finished.stderr
    assert audit(out).integer_ops == {"QLinearMatMul": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--kind", "u8s8"], "--kind u8s8 needs --data", id="no-data"),
        pytest.param(["--data", "nowhere.npz"], "no such file or directory", id="wrong-data"),
    ],
)
def test_onnxruntime_s_quantiser_refuses(tmp_path: Path, arguments: list[str], message: str) -> None:
    finished = _run("ort_quantise.py", MODEL, tmp_path / "out.onnx", *arguments)
    assert finished.returncode != 0
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


def test_tools_are_compared_in_one_table(tmp_path: Path) -> None:
    output = tmp_path / "RESULTS.md"
    tools: list[str | Path] = ["--tool", "onnxruntime-u8s8", "--tool", "onnxruntime-dynamic"]
    quick: list[str | Path] = ["--samples", "30", "--rounds", "3", "--slot", "0.01", "--output", output]
    finished = _run("compare.py", "--task", "digits_cnn", *tools, *quick)
    assert finished.returncode == 0, finished.stderr
    rows = [line.strip("| ").split(" | ") for line in output.read_text().splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == ["float", "onnxruntime u8s8", "onnxruntime dynamic"]
    assert {len(line.split("|")) for line in output.read_text().splitlines() if line.startswith("|")} == {13}
    float_row, static = rows[2], rows[3]
    assert float_row[4] == "exact"
    assert float(static[4]) > 20
    assert float(static[3]) > 0.9
    assert float(static[9]) > 0
    assert float(static[10]) > 20


def test_a_tool_that_fails_has_a_row_that_says_so(tmp_path: Path) -> None:
    broken = tmp_path / "zoo" / "mnist_cnn"
    broken.mkdir(parents=True)
    (broken / "model.onnx").write_bytes(MODEL.read_bytes())
    (tmp_path / "zoo" / "tasks.py").write_text(
        "import numpy as np\n"
        "def mnist_cnn_calib():\n    yield {'no_such_input': np.zeros(1, np.float32)}\n"
        "def mnist_cnn_eval():\n    yield {'input': np.zeros((1, 1, 8, 8), np.float32)}, 0\n"
    )
    output = tmp_path / "RESULTS.md"
    quick: list[str | Path] = [
        "--rounds",
        "1",
        "--slot",
        "0.001",
        "--zoo",
        tmp_path / "zoo",
        "--output",
        output,
    ]
    finished = _run("compare.py", "--task", "mnist_cnn", "--tool", "onnxruntime-u8s8", *quick)
    assert finished.returncode == 0, finished.stderr
    row = next(line for line in output.read_text().splitlines() if line.startswith("| onnxruntime u8s8"))
    assert "failed: exit status 1" in row
    assert "no_such_input" in row


def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    finished = _run("compare.py", "--task", "nothing", "--output", tmp_path / "R.md")
    assert finished.returncode == 2
    assert "nothing is not there; there are digits_cnn" in finished.stderr


def test_weight_only_files_are_timed_in_turn() -> None:
    finished = _run("weight_only.py", "--width", "64", "--channels", "32", "--rows", "2", "--rounds", "1")
    assert finished.returncode == 0, finished.stderr
    head, *lines = finished.stdout.splitlines()
    assert head.startswith("2 x 64 x 32: float ")
    assert len(lines) == 9
    assert all(" dB " in line and " size" in line for line in lines)
