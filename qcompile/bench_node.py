"""`qcompile bench --runtime node|web`: models timed in turn by onnxruntime-node, or by onnxruntime-web's WebAssembly in Node."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.errors import InputError, ModelError
from qcompile.raw_tensors import write_tensors
from qcompile.runtime import Feeds

RUNTIMES = ("node", "web")
_SCRIPT = Path(__file__).parent / "bundle_files" / "time.mjs"


def find_modules(runtime: str, modules: str | Path | None) -> Path:
    """The folder whose `node_modules` holds the runtime: `modules`, or the first from here upwards.

    Raises InputError where node or the package is missing.
    """
    if shutil.which("node") is None:
        raise InputError(f"--runtime {runtime} needs Node.js, and there is no program `node`; install it")
    package = f"onnxruntime-{runtime}"
    for folder in [Path.cwd(), *Path.cwd().parents] if modules is None else [Path(modules).resolve()]:
        if (folder / "node_modules" / package / "package.json").is_file():
            return folder
    where = "here" if modules is None else f"in {modules}"
    raise InputError(f"--runtime {runtime}: {package} is not installed {where}: npm install {package}, or give --node-modules")


def time_in_node(
    models: Sequence[Path], feeds: Sequence[Feeds], runtime: str, modules: Path, *, rounds: int, slot_seconds: float, threads: int
) -> tuple[str, list[list[float]]]:
    """(version of the runtime, milliseconds of each round of each model); in turn, a round is the median of its slot.

    Raises ModelError in the runtime's own words where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="qcompile-bench-") as name:
        folder = Path(name)
        job: dict[str, Any] = {"rounds": rounds, "slot_ms": 1e3 * slot_seconds, "threads": threads, "models": []}
        for index, (path, feed) in enumerate(zip(models, feeds, strict=True)):
            tensors = {key: np.asarray(value) for key, value in feed.items()}
            records = write_tensors(folder, tensors, f"input_{index}")
            job["models"].append({"path": str(path.resolve()), "inputs": records})
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = ["node", str(_SCRIPT), runtime, str(modules), str(folder / "job.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines() or ["nothing said"]
        raise ModelError(f"onnxruntime-{runtime} failed: {said[0].strip()[:300]}")
    found = json.loads(lines[-1])
    return str(found["version"]), [[float(t) for t in times] for times in found["round_ms"]]


def bench_in_node(
    *models: str | Path,
    runtime: str,
    modules: str | Path | None = None,
    data_spec: str | None = None,
    preprocess: str | None = None,
    rounds: int = 11,
    seconds: float | None = None,
    batch: int | None = None,
    threads: int = 1,
) -> dict[str, Any]:
    """Time models in turn in Node; the keys of `bench_models` that this runtime can fill, and "runtime".

    Raises InputError, DataError and ModelError.
    """
    from qcompile.bench import sample_feeds
    from qcompile.check import SLOT_SECONDS
    from qcompile.latency import median_interval
    from qcompile.size import size_bytes

    if runtime not in RUNTIMES:
        raise InputError(f"--runtime {runtime}: choose one of python, {', '.join(RUNTIMES)}")
    place = find_modules(runtime, modules)
    paths = [Path(m) for m in models]
    feeds = sample_feeds(paths, data_spec, preprocess, batch)
    slot = SLOT_SECONDS if seconds is None else seconds / rounds
    version, times = time_in_node(paths, feeds, runtime, place, rounds=rounds, slot_seconds=slot, threads=threads)
    rows = []
    for path, mine in zip(paths, times, strict=True):
        low, high, confidence = median_interval(mine)
        ratio = [first / own for first, own in zip(times[0], mine, strict=True)]
        fast_low, fast_high, _ = median_interval(ratio)
        rows.append(
            {
                "path": str(path),
                "size_bytes": size_bytes(path),
                "latency_ms": {"median": float(np.median(mine)), "low": low, "high": high, "confidence": confidence},
                "speedup": {"median": float(np.median(ratio)), "low": fast_low, "high": fast_high},
                "macs": None,
                "peak_share": None,
                "cold_start": None,
                "operators": None,
            }
        )
    return {
        "models": rows,
        "runtime": f"onnxruntime-{runtime} {version}",
        "peak_gops": None,
        "threads": threads,
        "rounds": rounds,
        "batch": batch,
    }
