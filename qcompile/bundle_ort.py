"""The `.ort` form of a model and the operators that a minimal build of onnxruntime needs for it, by onnxruntime's own tools."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from qcompile.errors import ModelError

CONFIG = "required_operators.config"
_SAME = {"PYTHONHASHSEED": "0"}  # sets of operators are written in one order


def write_ort(model: Path, folder: Path) -> list[str]:
    """Write `model.ort` and `required_operators.config` into `folder`; returns the lines of the latter that name operators.

    The graph is optimised as for ARM: without the blocked layouts that only x86 has, so that one file serves every machine.
    Raises ModelError where onnxruntime's tools refuse the model.
    """
    with tempfile.TemporaryDirectory(prefix="qcompile-ort-") as name:
        inside = Path(name)
        # a process of its own: the tools print, and leave files open
        command = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(model.resolve())]
        options = ["--output_dir", name, "--optimization_style", "Fixed", "--target_platform", "arm"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, env={**os.environ, **_SAME}, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ModelError(f"{model}: onnxruntime cannot write it as .ort: {last[:300]}")
        written, configs = sorted(inside.rglob("*.ort")), sorted(inside.rglob("*.config"))
        if not written or not configs:
            raise ModelError(f"{model}: onnxruntime wrote no .ort file: {' '.join(done.stderr.split())[-300:]}")
        shutil.copyfile(written[0], folder / "model.ort")
        lines = [line for line in configs[0].read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        header = "# operators that a minimal build of onnxruntime needs: build.sh --include_ops_by_config\n"
        (folder / CONFIG).write_text(header + "\n".join(lines) + "\n", encoding="utf-8")
    return lines
