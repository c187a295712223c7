"""The machines of the matrix: how each runs cases, and why one cannot run here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import run_browser

HERE = Path(__file__).resolve().parent
_SILENCE = 240.0  # seconds that a machine may say nothing
Found = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """`run(cases, names)` yields what the runner prints; `missing`: what is not installed, "" where nothing is."""

    name: str
    missing: str
    run: Callable[[Path, list[str]], Iterator[Found]]


def machines(cache: Path) -> list[Machine]:
    """All machines, in the order of the matrix."""
    script, arm, node = str(HERE / "run_onnxruntime.py"), cache / "arm64", cache / "node"
    found = [Machine("native", "", _process([sys.executable, script]))]
    for name, processor in (("x86 AVX2", "Haswell"), ("x86 SSE", "Nehalem")):
        # numpy's BLAS takes its kernels by the name of the processor and believes in AVX where qemu says Nehalem
        command = ["qemu-x86_64", "-cpu", processor, sys.executable, script]
        found.append(Machine(name, _absent("qemu-x86_64"), _process(command, {"OPENBLAS_CORETYPE": "Nehalem"})))
    python = arm / "usr/bin/python3"
    rooted = _absent("qemu-aarch64-static") or ("" if (arm / "site/onnxruntime").is_dir() else "arm64 root with onnxruntime")
    for processor in ("cortex-a72", "neoverse-n1", "max"):
        command = [
            "qemu-aarch64-static",
            "-L",
            str(arm),
            "-cpu",
            processor,
            "-E",
            f"PYTHONPATH={arm / 'site'}",
            str(python),
            script,
        ]
        found.append(Machine(f"ARM64 {processor}", rooted, _process(command)))
    for name, package in (("onnxruntime-node", "onnxruntime-node"), ("wasm in Node", "onnxruntime-web")):
        missing = _absent("node") or ("" if (node / "node_modules" / package).is_dir() else f"npm package {package}")
        found.append(Machine(name, missing, _process(["node", str(HERE / "run_node.mjs"), package, str(node)])))
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    web = node / "node_modules/onnxruntime-web/dist"
    missing = "chromium" if browser is None else "" if web.is_dir() else "npm package onnxruntime-web"
    found.append(
        Machine("wasm in Chromium", missing, lambda cases, names: run_browser.run(str(browser), web, cases, names, _SILENCE))
    )
    return found


def others(cache: Path) -> list[Machine]:
    """Runtimes that promise no bits: OpenVINO and tract, one process a case, for some never come back."""
    site = cache / "other"
    found = []
    for name in ("openvino", "tract"):
        missing = "" if (site / name).is_dir() else f"Python package {name}"
        found.append(Machine({"openvino": "OpenVINO"}.get(name, name), missing, _one_by_one(name, site)))
    return found


def _absent(program: str) -> str:
    return "" if shutil.which(program) else program


def _process(command: list[str], extra: Mapping[str, str] | None = None) -> Callable[[Path, list[str]], Iterator[Found]]:
    def run(cases: Path, names: list[str]) -> Iterator[Found]:
        done = subprocess.run(
            [*command, str(cases), *names],
            env={**os.environ, **(extra or {})},
            capture_output=True,
            text=True,
            timeout=_SILENCE * 4,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        yield from (json.loads(line) for line in lines)
        answered = {json.loads(line).get("case") for line in lines}
        for name in names:
            if name not in answered:
                last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
                yield {"case": name, "fault": f"exit status {done.returncode}: {last[:160]}"}

    return run


def _one_by_one(name: str, site: Path) -> Callable[[Path, list[str]], Iterator[Found]]:
    def run(cases: Path, names: list[str]) -> Iterator[Found]:
        for case in names:
            command = [sys.executable, str(HERE / "run_other.py"), name, str(cases), case]
            try:
                done = subprocess.run(
                    command, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, timeout=20
                )
            except subprocess.TimeoutExpired:
                yield {"case": case, "error": "no answer in 20 s"}
                continue
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
            yield json.loads(lines[-1]) if lines else {"case": case, "error": f"exit status {done.returncode}: {last[:160]}"}

    return run
