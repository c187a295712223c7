"""`qcompile check`: any two models with the same inputs, measured and judged against every limit that was asked for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qcompile
from qcompile.audit import audit
from qcompile.baseline import against, read_baseline, record
from qcompile.certificate import certify
from qcompile.check import Measured, Progress, fusion_json, measure, nodes_json, paired_inputs
from qcompile.data import Dataset, load_dataset
from qcompile.errors import DataError, InputError, LimitError
from qcompile.evaluation import Evaluation
from qcompile.gate import (
    Finding,
    Gate,
    Judged,
    judge_integer_only,
    judge_latency,
    judge_metric,
    judge_share,
    judge_size,
    judge_sqnr,
    of_verdict,
)
from qcompile.metrics import Metric, parse_metric
from qcompile.report_file import file_record, peak_rss_mb, write_report


@dataclass(frozen=True)
class Checked:
    """What a LimitError of `check_models` carries: the file that was judged, and the report."""

    path: Path
    report: dict[str, Any]


def check_models(
    float_model: str | Path,
    quantised: str | Path,
    eval_data: str | Path | Dataset,
    *,
    metric: str | None = None,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    min_sqnr: float | None = None,
    max_latency_ratio: float | None = None,
    max_size_ratio: float | None = None,
    require_integer_only: bool = False,
    on_inconclusive: str = "fail",
    baseline: str | Path | None = None,
    update_baseline: bool = False,
    samples: int | None = None,
    preprocess: str | None = None,
    latency: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The report of `qcompile check`: that of a compilation without its passes, with `gate` and `baseline`.

    metric: top1 (the default where there are labels and classes), topk:K, mse, f1 or file.py:function (see `qcompile.metrics`).
    The limits are those of `qcompile.gate.Gate`. baseline: a file of an earlier check, than which nothing may be worse;
    update_baseline: write it instead, where no limit is broken.
    Raises ModelError, DataError and InputError (exit status 2), and LimitError (3), which carries the report, where a limit is
    broken, or cannot be decided and on_inconclusive is "fail".
    """
    start = time.perf_counter()
    gate = Gate(max_drop, min_agreement, min_sqnr, max_latency_ratio, max_size_ratio, require_integer_only, on_inconclusive)
    _check_options(gate, latency, baseline, update_baseline)
    chosen = None if metric is None else parse_metric(metric)
    old = read_baseline(baseline) if baseline is not None and not update_baseline else None
    float_path, quantised_path = Path(float_model), Path(quantised)
    source, output = file_record(float_path), file_record(quantised_path)
    inputs, _ = paired_inputs(float_path, quantised_path)
    if isinstance(eval_data, Dataset):
        dataset = eval_data
    else:
        dataset = load_dataset(str(eval_data), inputs, preprocess=preprocess, samples=samples, seed=seed)
    _check_labels(dataset, chosen, max_drop)
    evaluation = Evaluation(chosen)
    measured = measure(float_path, quantised_path, dataset, latency=latency, progress=progress, comparison=evaluation)
    if progress is not None:
        progress("fusion audit", 0, None)
    audited = audit(quantised_path)
    assert measured.accuracy is not None  # there was a dataset
    made = record(evaluation, measured.accuracy, source["sha256"])
    judged = Judged(tuple(_findings(gate, measured, evaluation, quantised_path, old, made, baseline)), on_inconclusive)
    settings = {
        "eval": dataset.spec,
        "metric": metric,
        "max_drop": max_drop,
        "min_agreement": min_agreement,
        "min_sqnr": min_sqnr,
        "max_latency_ratio": max_latency_ratio,
        "max_size_ratio": max_size_ratio,
        "require_integer_only": require_integer_only,
        "on_inconclusive": on_inconclusive,
        "baseline": None if baseline is None else str(baseline),
        "preprocess": preprocess,
        "samples": samples,
        "seed": seed,
    }
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
        "gate": judged.as_json(),
        "recipe": {"check": _recipe(settings, latency)},
        "baseline": made,
        "warnings": list(measured.warnings),
    }
    for finding in judged.findings:
        if finding.limit.startswith("--max-drop"):
            report["verdict"] = judge_metric(measured.accuracy, evaluation, max_drop or 0.0).as_json()
    report["seconds"] = time.perf_counter() - start
    report["peak_rss_mb"] = peak_rss_mb()
    broken = judged.broken
    if broken is not None:
        raise LimitError(f"{quantised_path}: {broken.limit}: {broken.reason}", Checked(quantised_path, report))
    if update_baseline and baseline is not None:
        write_report({"baseline": made}, baseline)
    return report


def _recipe(settings: dict[str, Any], latency: bool) -> dict[str, Any]:
    plain = {key.replace("_", "-"): value for key, value in settings.items() if value is not None and value is not False}
    usual = {"seed": 0, "on-inconclusive": "fail"}
    kept = {key: value for key, value in plain.items() if usual.get(key) != value}
    return kept if latency else {**kept, "no-latency": True}


def _findings(
    gate: Gate,
    measured: Measured,
    evaluation: Evaluation,
    path: Path,
    old: dict[str, Any] | None,
    made: dict[str, Any],
    baseline: str | Path | None,
) -> list[Finding]:
    accuracy = measured.accuracy
    assert accuracy is not None
    found = []
    if gate.max_drop is not None:
        found.append(of_verdict(judge_metric(accuracy, evaluation, gate.max_drop), f"--max-drop {gate.max_drop:g}"))
    if gate.min_agreement is not None:
        found.append(judge_share(accuracy, gate.min_agreement))
    if gate.min_sqnr is not None:
        found.append(judge_sqnr(evaluation.evidence(), gate.min_sqnr, identical=accuracy.identical))
    if gate.max_latency_ratio is not None:
        if measured.latency is None:
            raise DataError(f"--max-latency-ratio {gate.max_latency_ratio:g}: {'; '.join(measured.warnings)}")
        found.append(judge_latency(measured.latency, gate.max_latency_ratio))
    if gate.max_size_ratio is not None:
        found.append(judge_size(measured.quantised_bytes / measured.float_bytes, gate.max_size_ratio))
    if gate.require_integer_only:
        found.append(judge_integer_only(certify(path)))
    if old is not None and baseline is not None:
        found += against(baseline, old, made, evaluation)
    return found


def _check_options(gate: Gate, latency: bool, baseline: str | Path | None, update_baseline: bool) -> None:
    if gate.max_latency_ratio is not None and not latency:
        raise InputError("--max-latency-ratio needs the latency; leave --no-latency out")
    if update_baseline and baseline is None:
        raise InputError("--update-baseline writes the file that --baseline names; give both")


def _check_labels(dataset: Dataset, metric: Metric | None, max_drop: float | None) -> None:
    needed = "--max-drop" if max_drop is not None and metric is None else None
    needed = f"--metric {metric.name}" if metric is not None and metric.class_labels else needed
    if needed is not None and not dataset.has_labels:
        raise DataError(f"{dataset.spec}: holds no labels; {needed} compares with the true answers and needs them")
