"""A quantised model measured against its float original: accuracy, verdict on a limit, fusion, latency, size.

`measure` takes two files and a stream of samples; `check_models` and `bench_models` are the commands of that name.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import qcompile
from qcompile.accuracy import Accuracy, FeedsMap, compare
from qcompile.audit import Audit, audit
from qcompile.data import Dataset, Sample, load_dataset
from qcompile.errors import DataError, LimitError
from qcompile.integer_outputs import DequantisedOutputs
from qcompile.latency import Latency, measure_latency
from qcompile.model_file import read_model
from qcompile.quantised_inputs import feeds_map
from qcompile.report_file import file_record, peak_rss_mb
from qcompile.runtime import Feeds, Session
from qcompile.samples import InputInfo, model_inputs
from qcompile.size import size_bytes
from qcompile.synthetic import synthetic_dataset
from qcompile.verdict import Verdict, judge_drop

ROUNDS = 11
SLOT_SECONDS = 0.05


class Progress(Protocol):
    """Told how far a stage is; `total` is None where nobody knows."""

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """`done` of `total` steps of `stage` are finished."""


@dataclass(frozen=True)
class Measured:
    """Numbers of two models side by side; what could not be measured is None, and `warnings` says why."""

    accuracy: Accuracy | None
    latency: Latency | None
    float_bytes: int
    quantised_bytes: int
    warnings: tuple[str, ...] = ()

    def accuracy_json(self) -> dict[str, object] | None:
        """The report's `accuracy`."""
        return None if self.accuracy is None else self.accuracy.as_json()

    def latency_json(self) -> dict[str, object] | None:
        """The report's `latency_ms`."""
        return None if self.latency is None else self.latency.as_json()

    def size_json(self) -> dict[str, object]:
        """The report's `size_bytes`; `ratio` is quantised / float."""
        return {"float": self.float_bytes, "quantised": self.quantised_bytes, "ratio": self.quantised_bytes / self.float_bytes}


@dataclass(frozen=True)
class Checked:
    """What a LimitError of `check_models` carries: the file that was judged, and the report."""

    path: Path
    report: dict[str, Any]


def measure(
    float_model: str | Path,
    quantised: str | Path,
    dataset: Dataset | None,
    *,
    latency: bool = True,
    rounds: int = ROUNDS,
    slot_seconds: float = SLOT_SECONDS,
    threads: int = 1,
    progress: Progress | None = None,
) -> Measured:
    """Measure `quantised` against `float_model`; each sample runs once through both, one sample in memory at a time.

    The first sample is the one that latency is measured on. Without `dataset` there is no accuracy, and latency is measured
    on made-up feeds where the inputs allow it. Raises ModelError and DataError.
    """
    float_path, quantised_path = Path(float_model), Path(quantised)
    inputs, convert = _inputs(float_path, quantised_path)
    sizes = size_bytes(float_path), size_bytes(quantised_path)
    accuracy, feeds, warnings = None, None, []
    if dataset is not None:
        stream = _Stream(dataset, progress)
        accuracy = compare(
            Session(float_path, label=str(float_path)),
            DequantisedOutputs(Session(quantised_path, label=str(quantised_path)), read_model(quantised_path)),
            stream,
            quantised_feeds=convert,
        )
        feeds = stream.first
    timed = None
    if latency:
        try:
            feeds = _made_up(inputs) if feeds is None else feeds
        except DataError as error:
            warnings.append(f"latency was not measured: {error}")
        else:
            if progress is not None:
                progress("latency", 0, None)
            both = [feeds, convert(feeds) if convert else feeds]
            timed = measure_latency([float_path, quantised_path], both, rounds=rounds, slot_seconds=slot_seconds, threads=threads)
    return Measured(accuracy, timed, *sizes, tuple(warnings))


def quantised_feeds(float_model: Path, quantised: Path, feeds: Feeds) -> Feeds:
    """`feeds` of the float model as the quantised one takes them."""
    _, convert = _inputs(float_model, quantised)
    return convert(feeds) if convert else feeds


def judge(accuracy: Accuracy, max_drop: float) -> Verdict:
    """The verdict on a limit of `max_drop` points. Raises DataError where the samples had no labels."""
    if accuracy.identical:
        return judge_drop(0, 0, accuracy.samples, max_drop, identical=True)
    if accuracy.lost is None or accuracy.won is None:
        raise DataError("--max-drop compares with the true answers; give --eval data with labels")
    return judge_drop(accuracy.lost, accuracy.won, accuracy.samples, max_drop)


def nodes_json(audited: Audit) -> dict[str, object]:
    """The report's `nodes`, counted in the graph that onnxruntime runs."""
    return {
        "quantised": sum(audited.integer_ops.values()),
        "float": sum(audited.float_ops.values()),
        "float_ops": audited.float_ops,
    }


def fusion_json(audited: Audit) -> dict[str, object]:
    """The report's `fusion`: what was meant to be integer and is not, and how many bytes of weights each kind of kernel reads."""
    return {
        "not_fused": [asdict(left) for left in audited.not_fused],
        "leftover": [asdict(left) for left in audited.leftover],
        "integer_weight_bytes": audited.integer_weight_bytes,
        "float_weight_bytes": audited.float_weight_bytes,
    }


def broke_limit(verdict: Verdict) -> bool:
    """Whether the verdict is one for exit status 3. Samples that cannot decide have broken nothing; the report says so."""
    return verdict.outcome == "fail"


def check_models(
    float_model: str | Path,
    quantised: str | Path,
    eval_spec: str,
    *,
    max_drop: float | None = None,
    samples: int | None = None,
    preprocess: str | None = None,
    latency: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The report of `qcompile check`: that of a compilation, without its passes.

    Raises ModelError, DataError and InputError, and LimitError, which carries the report, where `max_drop` is broken.
    """
    start = time.perf_counter()
    float_path, quantised_path = Path(float_model), Path(quantised)
    source, output = file_record(float_path), file_record(quantised_path)
    inputs, _ = _inputs(float_path, quantised_path)
    dataset = load_dataset(eval_spec, inputs, preprocess=preprocess, samples=samples, seed=seed)
    if max_drop is not None and not dataset.has_labels:
        raise DataError(f"{eval_spec}: holds no labels; --max-drop compares with the true answers and needs them")
    measured = measure(float_path, quantised_path, dataset, latency=latency, progress=progress)
    assert measured.accuracy is not None  # there was a dataset
    if progress is not None:
        progress("fusion audit", 0, None)
    audited = audit(quantised_path)
    settings = {"eval": eval_spec, "max_drop": max_drop, "preprocess": preprocess, "samples": samples, "seed": seed}
    report: dict[str, Any] = {
        "qcompile": qcompile.__version__,
        "source": source,
        "output": output,
        "settings": settings,
        "accuracy": measured.accuracy_json(),
        "latency_ms": measured.latency_json(),
        "size_bytes": measured.size_json(),
        "nodes": nodes_json(audited),
        "fusion": fusion_json(audited),
        "warnings": list(measured.warnings),
    }
    report["seconds"] = time.perf_counter() - start
    report["peak_rss_mb"] = peak_rss_mb()
    if max_drop is not None:
        verdict = judge(measured.accuracy, max_drop)
        report["verdict"] = verdict.as_json()
        if broke_limit(verdict):
            raise LimitError(f"{quantised_path}: {verdict.reason}", Checked(quantised_path, report))
    return report


def bench_models(
    float_model: str | Path,
    quantised: str | Path,
    *,
    data_spec: str | None = None,
    preprocess: str | None = None,
    rounds: int = ROUNDS,
    threads: int = 1,
) -> dict[str, Any]:
    """`latency_ms` and `size_bytes` of a report, on the first sample of `data_spec` or on made-up feeds.

    Raises ModelError, InputError, and DataError where there are no data and the inputs are such that none can be made up.
    """
    float_path, quantised_path = Path(float_model), Path(quantised)
    inputs, convert = _inputs(float_path, quantised_path)
    data = None if data_spec is None else load_dataset(data_spec, inputs, preprocess=preprocess)
    feeds = _made_up(inputs) if data is None else next(iter(data)).feeds
    both = [feeds, convert(feeds) if convert else feeds]
    timed = measure_latency([float_path, quantised_path], both, rounds=rounds, threads=threads)
    sizes = Measured(None, timed, size_bytes(float_path), size_bytes(quantised_path))
    return {"latency_ms": sizes.latency_json(), "size_bytes": sizes.size_json(), "rounds": rounds}


class _Stream:
    """The samples of a dataset, which remembers the first one's feeds and tells how far it is."""

    def __init__(self, dataset: Dataset, progress: Progress | None) -> None:
        self.first: Feeds | None = None
        self._dataset = dataset
        self._progress = progress

    def __iter__(self) -> Iterator[Sample]:
        total = self._dataset.count
        for done, sample in enumerate(self._dataset):
            if self.first is None:
                self.first = sample.feeds
            if self._progress is not None:
                self._progress("evaluate", done, total)
            yield sample


def _inputs(float_path: Path, quantised_path: Path) -> tuple[list[InputInfo], FeedsMap | None]:
    inputs = model_inputs(read_model(float_path))
    return inputs, feeds_map(inputs, read_model(quantised_path), quantised_path)


def _made_up(inputs: list[InputInfo]) -> Feeds:
    return next(iter(synthetic_dataset(inputs, 1, seed=0))).feeds
