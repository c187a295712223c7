"""A baseline: what each sample said of an earlier model, in a JSON file that can be committed, and is a new model worse.

The comparison is paired, sample by sample, on the same data and against the same float model. It fails only where the samples
show, at the level of `statistics.CONFIDENCE`, that the new model is worse: no change is no finding, and needs no
number of samples. A difference of SQNR below `SQNR_MARGIN` dB is none, however sure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.accuracy import Accuracy
from qcompile.errors import InputError
from qcompile.evaluation import Evaluation
from qcompile.gate import Finding, decibels
from qcompile.metrics import drop_of
from qcompile.runtime import Array
from qcompile.statistics import LEAST_SAMPLES, Outcome, bootstrap_interval
from qcompile.verdict import judge_drop

SQNR_MARGIN = 0.5  # dB: below it a change that is statistically sure is of no consequence
_VERSION = 1


def record(evaluation: Evaluation, accuracy: Accuracy, source_sha256: str) -> dict[str, Any]:
    """The baseline of a measured model, as plain JSON."""
    evidence = evaluation.evidence()
    right, terms = _metric_rows(evaluation)
    return {
        "version": _VERSION,
        "source_sha256": source_sha256,
        "data_sha256": evaluation.data_sha256,
        "metric": accuracy.metric,
        "score": accuracy.quantised_score,
        "top1_agreement": accuracy.top1_agreement,
        "sqnr_db": accuracy.sqnr_db,
        "rows": len(evidence.agreed),
        "agreed": _packed(evidence.agreed),
        "right": None if right is None else _packed(right),
        "terms": None if terms is None else _rounded(terms).tolist(),
        "noise_share": _rounded(evidence.noise).tolist(),
    }


def read_baseline(path: str | Path) -> dict[str, Any]:
    """The baseline in a file that `--update-baseline` wrote, or in a report of `qcompile check`. Raises InputError."""
    advice = "make it again with --update-baseline"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: the baseline cannot be read ({error.strerror}); {advice}") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the baseline is no JSON file; {advice}") from error
    inner = found.get("baseline") if isinstance(found, dict) else None
    if not isinstance(inner, dict) or inner.get("version") != _VERSION:
        raise InputError(f"{path}: holds no baseline of this version; {advice}")
    missing = sorted({"source_sha256", "data_sha256", "metric", "rows", "agreed", "right", "terms", "noise_share"} - set(inner))
    if missing:
        raise InputError(f"{path}: the baseline lacks '{missing[0]}'; {advice}")
    return inner


def against(path: str | Path, old: Mapping[str, Any], new: Mapping[str, Any], evaluation: Evaluation) -> Iterator[Finding]:
    """Findings on metric, agreement and SQNR. Raises InputError where the two were not measured on the same."""
    advice = "make a new one with --update-baseline"
    for key, what in (("source_sha256", "float model"), ("data_sha256", "data"), ("metric", "metric")):
        if old[key] != new[key]:
            raise InputError(f"{path}: the baseline is of another {what}; {advice}")
    try:
        yield from _metric(old, new, evaluation)
        agreed = _unpacked(old["agreed"], old["rows"]), _unpacked(new["agreed"], new["rows"])
        if len(agreed[0]):
            yield _of_bits("agreement", *agreed)
        yield _sqnr(np.asarray(old["noise_share"], np.float64), evaluation)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: the baseline is damaged ({error}); {advice}") from error


def _metric(old: Mapping[str, Any], new: Mapping[str, Any], evaluation: Evaluation) -> Iterator[Finding]:
    if old["metric"] is None:
        return
    limit = f"baseline {old['metric']}"
    if old["right"] is not None:
        yield _of_bits(old["metric"], _unpacked(old["right"], old["rows"]), _unpacked(new["right"], new["rows"]))
        return
    metric = evaluation.metric
    assert metric is not None
    before, after = np.asarray(old["terms"], np.float64), np.asarray(new["terms"], np.float64)
    width = before.shape[1]
    joined = np.concatenate([before, after], axis=1)

    def drop(means: Array) -> Array:
        return drop_of(metric, metric.score(means[..., :width]), metric.score(means[..., width:]))

    if len(joined) < LEAST_SAMPLES or np.array_equal(before, after):
        yield Finding(limit, "pass", None, None, None, len(joined), None, "unchanged, or too few samples to show a change")
        return
    found = bootstrap_interval(joined, drop)
    value, low, high = (float(x) for x in (found.value, found.low, found.high))
    unit = "points" if metric.higher_is_better else "per cent"
    reason = f"{old['metric']} is {value:.3g} {unit} worse than the baseline, interval {low:.3g} to {high:.3g}"
    yield Finding(limit, "fail" if low > 0 else "pass", value, low, high, len(joined), None, reason)


def _of_bits(name: str, before: Array, after: Array) -> Finding:
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    found = judge_drop(lost, won, len(before), 0.0)
    reason = (
        f"{name} {found.drop_points:.2f} points below the baseline ({lost} lost, {won} won), "
        f"interval {found.low:.2f} to {found.high:.2f}"
    )
    outcome: Outcome = "fail" if found.low > 0 else "pass"
    return Finding(f"baseline {name}", outcome, found.drop_points, found.low, found.high, len(before), None, reason)


def _sqnr(old_noise: Array, evaluation: Evaluation) -> Finding:
    evidence = evaluation.evidence()
    if old_noise.shape != evidence.noise.shape:
        raise ValueError(f"{len(old_noise)} samples, not {len(evidence.noise)}")
    count, limit = len(old_noise), "baseline SQNR"
    new_noise = _rounded(evidence.noise)
    if np.array_equal(old_noise, new_noise):
        return Finding(limit, "pass", 0.0, None, None, count, None, "SQNR as in the baseline")
    if not old_noise.any():
        return Finding(limit, "fail", None, None, None, count, None, "outputs were equal in the baseline, and are not any more")
    if not new_noise.any() or count < LEAST_SAMPLES:
        reason = "the outputs are equal now" if not new_noise.any() else f"{count} samples are too few to show a change"
        return Finding(limit, "pass", None, None, None, count, None, reason)
    rows = np.stack([new_noise, old_noise], axis=1)  # signal and noise: by how many dB the noise grew
    found = bootstrap_interval(rows, partial(decibels, neither=0.0))
    value, low, high = (float(x) for x in (found.value, found.low, found.high))
    reason = f"SQNR {value:.2f} dB below the baseline, interval {low:.2f} to {high:.2f}, margin {SQNR_MARGIN:g} dB"
    return Finding(limit, "fail" if low > SQNR_MARGIN else "pass", value, low, high, count, None, reason)


def _metric_rows(evaluation: Evaluation) -> tuple[list[bool] | None, Array | None]:
    """(right or wrong by row, None) of a 0/1 metric, (None, terms) of another."""
    if evaluation.metric is None:
        right = evaluation.evidence().quantised_right
        return (right.tolist() if len(right) else None), None
    after = evaluation.terms()[1]
    return ((after[:, 0] > 0).tolist(), None) if evaluation.metric.binary else (None, after)


def _packed(bits: Array | list[bool]) -> str:
    return np.packbits(np.asarray(bits, bool)).tobytes().hex()


def _unpacked(text: str, count: int) -> Array:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))
    if not 0 <= len(bits) - count < 8:
        raise ValueError(f"{len(bits)} bits for {count} rows")
    return bits[:count].astype(bool)


def _rounded(values: Array) -> Array:
    """To seven digits: short in a file, and equal again when read."""
    flat = [float(f"{v:.7g}") for v in np.asarray(values, np.float64).reshape(-1)]
    return np.array(flat, np.float64).reshape(np.shape(values))
