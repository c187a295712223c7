"""What loading a model costs a process that has not seen it: time until it is loaded, until its first result, and memory.

Measured in processes of their own (`python -m qcompile.cold_start`): caches of this one would hide the cost, and its memory too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from qcompile.errors import ModelError
from qcompile.report_file import peak_rss_mb
from qcompile.runtime import Feeds, Session

_STATUS = Path("/proc/self/status")
_MARK = "input "  # before each name: `file` is an argument of savez itself


@dataclass(frozen=True)
class ColdStart:
    """Medians over processes. load_ms: to build the session; first_run_ms: then to the first result; memory in 10^6 bytes, the
    whole process's peak, and how much of it came with the model."""

    load_ms: float
    first_run_ms: float
    peak_rss_mb: float
    model_rss_mb: float


def measure_cold_starts(models: Sequence[Path], feeds: Sequence[Feeds], *, rounds: int = 3, threads: int = 1) -> list[ColdStart]:
    """Each model `rounds` times, in turn. Raises ModelError where a process fails."""
    found: list[list[ColdStart]] = [[] for _ in models]
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        files = []
        for index, feed in enumerate(feeds):
            files.append(Path(folder) / f"{index}.npz")
            named: dict[str, Any] = {_MARK + name: array for name, array in feed.items()}
            np.savez(files[-1], **named)
        for _ in range(rounds):
            for index, model in enumerate(models):
                found[index].append(_in_a_process(model, files[index], threads))
    return [ColdStart(*(median(getattr(run, key) for run in runs) for key in asdict(runs[0]))) for runs in found]


def measure_here(model: Path, feeds: Feeds, threads: int) -> ColdStart:
    """The same in this process, which should be fresh."""
    before = _resident_peak()
    start = time.perf_counter()
    session = Session(model, threads=threads, label=str(model))
    loaded = time.perf_counter()
    session.run(feeds)
    ran = time.perf_counter()
    peak = _resident_peak()
    return ColdStart(1e3 * (loaded - start), 1e3 * (ran - loaded), peak, peak - before)


def _in_a_process(model: Path, feeds: Path, threads: int) -> ColdStart:
    command = [sys.executable, "-m", "qcompile.cold_start", str(model), str(feeds), str(threads)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"{model}: the process that loads it ended with status {ran.returncode}: {last}")
    return ColdStart(**json.loads(ran.stdout))


def _resident_peak() -> float:
    """Peak resident memory in 10^6 bytes. On Linux from /proc: getrusage also counts the process that started this one."""
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024 / 1e6
    return peak_rss_mb() or 0.0


if __name__ == "__main__":
    with np.load(sys.argv[2]) as _arrays:
        _feeds = {name.removeprefix(_MARK): _arrays[name] for name in _arrays.files}
    sys.stdout.write(json.dumps(asdict(measure_here(Path(sys.argv[1]), _feeds, int(sys.argv[3])))))
