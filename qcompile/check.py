"""Two model files measured side by side: accuracy, latency, size. `measure` takes the files and a stream of samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from qcompile.accuracy import Accuracy, Comparison, FeedsMap, compare
from qcompile.audit import Audit
from qcompile.data import Dataset, Sample
from qcompile.errors import DataError
from qcompile.integer_outputs import DequantisedOutputs
from qcompile.latency import Latency, measure_latency
from qcompile.model_file import read_model
from qcompile.quantised_inputs import feeds_map
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
    comparison: Comparison | None = None,
) -> Measured:
    """Measure `quantised` against `float_model`; each sample runs once through both, one sample in memory at a time.

    The first sample is the one that latency is measured on. Without `dataset` there is no accuracy, and latency is measured
    on made-up feeds where the inputs allow it. `comparison` gathers the outputs, see `accuracy.compare`.
    Raises ModelError and DataError.
    """
    float_path, quantised_path = Path(float_model), Path(quantised)
    inputs, convert = paired_inputs(float_path, quantised_path)
    sizes = size_bytes(float_path), size_bytes(quantised_path)
    accuracy, feeds, warnings = None, None, []
    if dataset is not None:
        stream = _Stream(dataset, progress)
        accuracy = compare(
            Session(float_path, label=str(float_path)),
            DequantisedOutputs(Session(quantised_path, label=str(quantised_path)), read_model(quantised_path)),
            stream,
            quantised_feeds=convert,
            comparison=comparison,
        )
        feeds = stream.first
    timed = None
    if latency:
        try:
            feeds = made_up_feeds(inputs) if feeds is None else feeds
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
    _, convert = paired_inputs(float_model, quantised)
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


def paired_inputs(float_path: Path, quantised_path: Path) -> tuple[list[InputInfo], FeedsMap | None]:
    """The float model's inputs, and how feeds for them become those of the other model. Raises ModelError where they misfit."""
    inputs = model_inputs(read_model(float_path))
    return inputs, feeds_map(inputs, read_model(quantised_path), quantised_path)


def made_up_feeds(inputs: list[InputInfo]) -> Feeds:
    """One made-up feed. Raises DataError where none can be made up (tokens)."""
    return next(iter(synthetic_dataset(inputs, 1, seed=0))).feeds
