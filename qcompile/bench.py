"""`qcompile bench`: models in turn on one sample: times with intervals, cold start, memory, operators, share of the peak."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompile.check import ROUNDS, SLOT_SECONDS, Progress, made_up_feeds, paired_inputs
from qcompile.cold_start import measure_cold_starts
from qcompile.data import load_dataset
from qcompile.errors import DataError, InputError, ModelError
from qcompile.latency import measure_latency, median_interval
from qcompile.macs import count_macs
from qcompile.runtime import Array, Feeds, Session
from qcompile.samples import InputInfo
from qcompile.size import size_bytes

PEAK_SIZE = 1024  # of the square MatMulInteger that the machine's peak is measured by
_PROFILED_RUNS = 20


@dataclass(frozen=True)
class OperatorTime:
    """Time of one operator type in one run: milliseconds, share of all operators, calls."""

    op: str
    ms: float
    share: float
    calls: int


def bench_models(
    *models: str | Path,
    data_spec: str | None = None,
    preprocess: str | None = None,
    rounds: int = ROUNDS,
    seconds: float | None = None,
    batch: int | None = None,
    threads: int = 1,
    cold: bool = True,
    profile: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time models in turn on the first sample of `data_spec`, or on made-up feeds.

    seconds: for each model, in all its rounds. batch: repeat the sample along axis 0. cold, profile: also measure cold starts and
    time by operator.
    Returns {"models": [...], "peak_gops", "threads", "rounds", "batch"}; "speedup" is against the first model. For two models
    "latency_ms" and "size_bytes" stand beside it as in a report. Raises ModelError, InputError, and DataError where there are
    no data and the inputs are such that none can be made up.
    """
    if not models:
        raise InputError("no model to measure")
    if rounds < 1:
        raise InputError(f"rounds {rounds}: give a whole number from 1 on")
    if seconds is not None and not seconds > 0:
        raise InputError(f"--seconds {seconds:g}: give a time above 0")
    if batch is not None and batch < 1:
        raise InputError(f"--batch {batch}: give at least 1")
    paths = [Path(m) for m in models]
    feeds = sample_feeds(paths, data_spec, preprocess, batch)
    peak_model, peak_feeds = _peak_model(PEAK_SIZE)
    slot = SLOT_SECONDS if seconds is None else seconds / rounds
    together: list[str | Path | onnx.ModelProto] = [*paths, peak_model]
    tell = progress or _silent
    tell("latency", 0, None)
    timed = measure_latency(together, [*feeds, peak_feeds], rounds=rounds, slot_seconds=slot, threads=threads)
    peak_gops = 2 * PEAK_SIZE**3 / timed.median_ms[-1] / 1e6
    tell("cold starts", 0, None)
    starts = measure_cold_starts(paths, feeds, threads=threads) if cold else [None] * len(paths)
    rows = []
    for index, path in enumerate(paths):
        times = timed.round_ms[index]
        low, high, confidence = median_interval(times)
        speedup = timed.speedups[index]
        row: dict[str, Any] = {"path": str(path), "size_bytes": size_bytes(path)}
        row["latency_ms"] = {"median": timed.median_ms[index], "low": low, "high": high, "confidence": confidence}
        row["speedup"] = {"median": speedup.median, "low": speedup.low, "high": speedup.high}
        row |= _arithmetic(path, feeds[index], timed.median_ms[index], peak_gops)
        start = starts[index]
        tell("operators", index, len(paths))
        row["cold_start"] = None if start is None else asdict(start)
        row["operators"] = [asdict(o) for o in operator_times(path, feeds[index], threads)] if profile else None
        rows.append(row)
    found: dict[str, Any] = {"models": rows, "peak_gops": peak_gops, "threads": threads, "rounds": rounds, "batch": batch}
    if len(rows) == 2:
        first, second = rows
        found["latency_ms"] = {
            "float": timed.median_ms[0], "quantised": timed.median_ms[1], "speedup": second["speedup"]["median"],
            "speedup_low": second["speedup"]["low"], "speedup_high": second["speedup"]["high"], "threads": threads,
        }  # fmt: skip
        sizes = first["size_bytes"], second["size_bytes"]
        found["size_bytes"] = {"float": sizes[0], "quantised": sizes[1], "ratio": sizes[1] / sizes[0]}
    return found


def _silent(stage: str, done: int, total: int | None) -> None:
    """Progress that nobody sees."""


def operator_times(path: str | Path, feeds: Feeds, threads: int = 1, *, runs: int = _PROFILED_RUNS) -> list[OperatorTime]:
    """Time of each operator type in a run, longest first, from onnxruntime's profile after its optimisation.

    Each node's median over `runs`; where runs differ in what they execute (control flow), the mean.
    """
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        session = Session(path, threads=threads, label=str(path), profile=Path(folder) / "profile")
        for _ in range(runs + 1):
            session.run(feeds)
        events = json.loads(session.end_profile().read_text(encoding="utf-8"))
    kernels = [e for e in events if e.get("cat") == "Node" and str(e.get("name", "")).endswith("_kernel_time")]
    names, times = [str(e["args"]["op_name"]) for e in kernels], np.array([float(e["dur"]) for e in kernels])
    each = len(kernels) // (runs + 1)
    names, times = names[each:], times[each:]  # the first run warms up
    if names == names[:each] * runs:
        names, times = names[:each], np.median(times.reshape(runs, each), axis=0)
    else:
        times = times / runs
    spent: dict[str, float] = {}
    for name, microseconds in zip(names, times.tolist(), strict=True):
        spent[name] = spent.get(name, 0.0) + microseconds
    total, calls = sum(spent.values()) or 1.0, Counter(names)
    scale = 1 if len(names) == each else runs
    order = sorted(spent, key=lambda op: (-spent[op], op))
    return [OperatorTime(op, spent[op] / 1e3, spent[op] / total, round(calls[op] / scale)) for op in order]


def _arithmetic(path: Path, feeds: Feeds, ms: float, peak_gops: float) -> dict[str, Any]:
    """MACs of a run, operations a second and the share of the peak; None with a reason where they cannot be counted."""
    try:
        macs = sum(layer.macs for layer in count_macs(path, feeds))
    except ModelError as error:
        return {"macs": None, "gops": None, "peak_share": None, "macs_unknown": str(error)}
    gops = 2 * macs / ms / 1e6
    return {"macs": macs, "gops": gops, "peak_share": gops / peak_gops}


def sample_feeds(paths: Sequence[Path], spec: str | None, preprocess: str | None, batch: int | None) -> list[Feeds]:
    """The first sample of `spec`, or made up, as each model of `paths` takes it. Raises DataError."""
    first: Feeds | None = None
    each: list[Feeds] = []
    for path in paths:
        inputs, convert = paired_inputs(paths[0], path)
        if first is None:
            first = _sample(inputs, spec, preprocess)
            if batch is not None:
                first = _batched(first, inputs, batch)
        each.append(convert(first) if convert is not None else first)
    return each


def _sample(inputs: list[InputInfo], spec: str | None, preprocess: str | None) -> Feeds:
    if spec is None:
        return made_up_feeds(inputs)
    return next(iter(load_dataset(spec, inputs, preprocess=preprocess))).feeds


def _batched(feeds: Feeds, inputs: Sequence[InputInfo], batch: int) -> Feeds:
    """The first row of each input, `batch` times. Raises DataError where an input's first dimension is fixed otherwise."""
    found: dict[str, Array] = {}
    for info in inputs:
        array = feeds[info.name]
        size = info.shape[0] if info.shape else None
        if array.ndim == 0 or (isinstance(size, int) and size != batch):
            raise DataError(f"--batch {batch}: the first dimension of input '{info.name}' is fixed; export it with a dynamic one")
        found[info.name] = np.repeat(array[:1], batch, axis=0)
    return found


def _peak_model(size: int) -> tuple[onnx.ModelProto, Mapping[str, Array]]:
    """A u8 x s8 MatMulInteger of constant weights, [size, size] by [size, size]."""
    random = np.random.default_rng(0)
    weight = numpy_helper.from_array(random.integers(-64, 64, (size, size), dtype=np.int8), "w")
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [size, size])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [size, size])
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "peak", [x], [y], [weight])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return model, {"x": random.integers(0, 128, (size, size), dtype=np.uint8)}
