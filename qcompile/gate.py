"""The limits of `qcompile check`: each becomes one finding with its interval, its outcome and what would decide it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qcompile.accuracy import Accuracy, Evidence
from qcompile.agreement import judge_agreement
from qcompile.certificate import Certificate
from qcompile.errors import DataError, InputError
from qcompile.evaluation import Evaluation
from qcompile.latency import Latency
from qcompile.limits import ON_INCONCLUSIVE, breaks
from qcompile.runtime import Array
from qcompile.statistics import (
    CONFIDENCE,
    LEAST_SAMPLES,
    Interval,
    Outcome,
    advice,
    bootstrap_interval,
    finite,
    outcome_of,
    samples_for,
)
from qcompile.verdict import Verdict, judge_drop


@dataclass(frozen=True)
class Gate:
    """What is asked of a model. None: no limit.

    max_drop: points of the metric (per cent of the float score where lower is better). min_agreement: share of rows that keep
    their class. min_sqnr: decibels. max_latency_ratio, max_size_ratio: quantised / float. on_inconclusive: fail | pass.
    """

    max_drop: float | None = None
    min_agreement: float | None = None
    min_sqnr: float | None = None
    max_latency_ratio: float | None = None
    max_size_ratio: float | None = None
    require_integer_only: bool = False
    on_inconclusive: str = "fail"

    def __post_init__(self) -> None:
        if self.on_inconclusive not in ON_INCONCLUSIVE:
            raise InputError(f"--on-inconclusive {self.on_inconclusive}: choose one of {', '.join(ON_INCONCLUSIVE)}")
        for name in ("max_drop", "max_latency_ratio", "max_size_ratio"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"--{name.replace('_', '-')} {value:g}: give a number of at least 0")
        if self.min_agreement is not None and not 0 < self.min_agreement <= 1:
            raise InputError(f"--min-agreement {self.min_agreement:g}: give a share above 0 and at most 1, such as .99")
        if self.min_sqnr is not None and not math.isfinite(self.min_sqnr):
            raise InputError(f"--min-sqnr {self.min_sqnr:g}: give a number of decibels")


@dataclass(frozen=True)
class Finding:
    """One limit: `limit` as it was asked for, the measured `value` with its interval, and the outcome.

    Without an interval (a size) `low` and `high` are None; None also stands for an infinite SQNR, and in JSON for whatever is
    infinite.
    """

    limit: str
    outcome: Outcome
    value: float | None
    low: float | None
    high: float | None
    samples: int | None
    samples_needed: int | None
    reason: str

    def as_json(self) -> dict[str, Any]:
        """One entry of the report's `gate.limits`."""
        return {**asdict(self), **{name: finite(getattr(self, name)) for name in ("value", "low", "high")}}


@dataclass(frozen=True)
class Judged:
    """The findings, in the order of the limits."""

    findings: tuple[Finding, ...]
    on_inconclusive: str

    @property
    def broken(self) -> Finding | None:
        """The first finding that makes the exit status 3; fails go before what is inconclusive."""
        for outcome in ("fail", "inconclusive"):
            for finding in self.findings:
                if finding.outcome == outcome and breaks(finding.outcome, self.on_inconclusive):
                    return finding
        return None

    @property
    def outcome(self) -> Outcome:
        """The worst outcome; pass where nothing was asked for."""
        found = {f.outcome for f in self.findings}
        return "fail" if "fail" in found else "inconclusive" if "inconclusive" in found else "pass"

    def as_json(self) -> dict[str, Any]:
        """The report's `gate`."""
        limits = [finding.as_json() for finding in self.findings]
        return {"outcome": self.outcome, "on_inconclusive": self.on_inconclusive, "confidence": CONFIDENCE, "limits": limits}


def judge_metric(accuracy: Accuracy, evaluation: Evaluation, max_drop: float) -> Verdict:
    """The verdict on a drop of any metric: exact for 0/1 metrics, by the paired bootstrap for others. Raises DataError."""
    if accuracy.identical:
        return judge_drop(0, 0, accuracy.samples, max_drop, identical=True)
    if accuracy.lost is not None and accuracy.won is not None:
        return judge_drop(accuracy.lost, accuracy.won, accuracy.samples, max_drop)
    if evaluation.metric is None:
        raise DataError("--max-drop compares with the true answers; give --eval data with labels, or choose a --metric")
    unit = "points" if evaluation.metric.higher_is_better else "per cent"
    found = _bootstrapped(evaluation.drop_interval(), accuracy.samples, max_drop, at_most=True)
    reason = f"drop {found.value:.3g} {unit}, {100 * CONFIDENCE:g} % interval {found.low:.3g} to {found.high:.3g}"
    reason = _with_limit(reason, f"{max_drop:g}", found)
    drop, low, high = (float(x) for x in (found.value, found.low, found.high))
    return Verdict(found.outcome, drop, low, high, CONFIDENCE, accuracy.samples, found.needed, reason)


def judge_sqnr(evidence: Evidence, least: float, *, identical: bool) -> Finding:
    """Whether the SQNR is at least `least` dB, by the bootstrap over feeds."""
    limit, count = f"--min-sqnr {least:g}", len(evidence.signal)
    if identical or not evidence.noise.any():
        return Finding(limit, "pass", None, None, None, count, None, "the float outputs are equal")
    rows = np.stack([evidence.signal, evidence.noise], axis=1)
    found = _bootstrapped(bootstrap_interval(rows, decibels), count, least, at_most=False)
    reason = f"SQNR {found.value:.2f} dB, {100 * CONFIDENCE:g} % interval {found.low:.2f} to {found.high:.2f}"
    return Finding(
        limit, found.outcome, found.value, found.low, found.high, count, found.needed, _with_limit(reason, f"{least:g} dB", found)
    )


def judge_latency(latency: Latency, most: float) -> Finding:
    """Whether quantised / float time is at most `most`, by the sign interval of the paired rounds."""
    limit, speedup = f"--max-latency-ratio {most:g}", latency.speedups[1]
    value, low, high = 1 / speedup.median, 1 / speedup.high, 1 / speedup.low
    outcome = outcome_of(low, high, most, at_most=True)
    rounds = len(latency.round_ms[0])
    reason = f"{value:.3f} times the float model's time, {100 * speedup.confidence:.3g} % interval {low:.3f} to {high:.3f}"
    reason += {"pass": ", within", "fail": ", above", "inconclusive": ","}[outcome] + f" limit {most:g}"
    reason += ": measure on a quieter machine" if outcome == "inconclusive" else ""
    return Finding(limit, outcome, value, low, high, rounds, None, reason)


def judge_size(ratio: float, most: float) -> Finding:
    """Whether the file is at most `most` times the float model's size: exact."""
    within = ratio <= most
    reason = f"{ratio:.4f} times the float model's size, {'within' if within else 'above'} limit {most:g}"
    return Finding(f"--max-size-ratio {most:g}", "pass" if within else "fail", ratio, None, None, None, None, reason)


def judge_integer_only(found: Certificate) -> Finding:
    """Whether no float tensor lies between the ends: exact."""
    if found.integer_only:
        reason = "no float tensor between the ends"
        return Finding("--require-integer-only", "pass", 0.0, None, None, None, None, reason)
    first = found.floats[0]
    reason = f"{len(found.floats)} float tensors between the ends, first '{first.tensor}' of node '{first.node}' ({first.op})"
    return Finding("--require-integer-only", "fail", float(len(found.floats)), None, None, None, None, reason)


def judge_share(accuracy: Accuracy, least: float) -> Finding:
    """Whether enough rows keep their class. Raises DataError where no output looks like classes."""
    if accuracy.top1_agreement is None:
        raise DataError("--min-agreement compares classes, and no output of this model looks like classes; use --min-sqnr")
    agreed = round(accuracy.top1_agreement * accuracy.samples)
    found = judge_agreement(agreed, accuracy.samples, least, identical=accuracy.identical)
    limit = f"--min-agreement {least:g}"
    return Finding(
        limit, found.outcome, found.agreement, found.low, found.high, found.samples, found.samples_needed, found.reason
    )


def of_verdict(verdict: Verdict, limit: str) -> Finding:
    """A verdict on a drop as a finding."""
    return Finding(
        limit,
        verdict.outcome,
        verdict.drop_points,
        verdict.low,
        verdict.high,
        verdict.samples,
        verdict.samples_needed,
        verdict.reason,
    )


def decibels(means: Array, neither: float = math.inf) -> Array:
    """SQNR of means [..., (signal, noise)]; infinite where a resample holds no noise, `neither` where no signal either."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = 10 * np.log10(means[..., 0] / np.maximum(means[..., 1], 0.0))
    return np.where(np.isnan(found), neither, found)


@dataclass(frozen=True)
class _Bootstrapped:
    value: float
    low: float
    high: float
    outcome: Outcome
    needed: int | None
    few: bool
    samples: int


def _bootstrapped(interval: Interval, samples: int, limit: float, *, at_most: bool) -> _Bootstrapped:
    value, low, high = (float(x) for x in (interval.value, interval.low, interval.high))
    if samples < LEAST_SAMPLES:
        return _Bootstrapped(value, low, high, "inconclusive", LEAST_SAMPLES, True, samples)
    outcome = outcome_of(low, high, limit, at_most=at_most)
    needed = samples_for(value, low, high, limit, samples) if outcome == "inconclusive" else None
    return _Bootstrapped(value, low, high, outcome, needed, False, samples)


def _with_limit(about: str, limit: str, found: _Bootstrapped) -> str:
    if found.few:
        return f"{about}, limit {limit}: {found.samples} samples are too few for an interval; give at least {LEAST_SAMPLES}"
    if found.outcome == "inconclusive":
        return f"{about}, limit {limit}: {found.samples} samples are too few; {advice(found.needed)}"
    return f"{about}, {'within' if found.outcome == 'pass' else 'outside'} limit {limit}"
