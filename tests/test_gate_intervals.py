"""Intervals of the gate where a resample may hold no signal or no error: numbers or open ends, and reports that can be written."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qcompile.accuracy import Evidence
from qcompile.evaluation import Evaluation
from qcompile.gate import judge_metric, judge_sqnr
from qcompile.metrics import UserMetric
from qcompile.report_file import report_json


def test_few_samples_with_any_signal_or_error() -> None:
    """A resample may hold no signal, no error or neither: the interval stays a number or open, and the report can be written."""
    none = np.zeros(0, bool)
    signal, noise = np.zeros(30), np.zeros(30)
    signal[3], noise[3] = 4.0, 0.1
    found = judge_sqnr(Evidence(signal, noise, none, none, none), 10.0, identical=False)
    assert (found.outcome, found.high) == ("pass", np.inf)
    assert found.low == pytest.approx(10 * np.log10(40))
    assert json.loads(report_json(found.as_json()))["high"] is None
    lost = judge_sqnr(Evidence(signal, np.full(30, 0.1), none, none, none), 10.0, identical=False)
    assert (lost.outcome, lost.low) == ("fail", -np.inf)
    assert json.loads(report_json(lost.as_json()))["low"] is None


def test_errors_that_few_samples_have() -> None:
    """Where lower is better a resample may hold no error of the float model at all: its drop in per cent is infinite, or none."""
    evaluation = Evaluation(UserMetric("f", lambda outputs, label: float(outputs["y"][0, 0]), ".", higher_is_better=False))
    for index in range(40):
        values = [{"y": np.array([[error, 0.0]], np.float32)} for error in (float(index == 3), float(index in (3, 4)))]
        evaluation.update(*values, np.array(0.0), feeds={})
    found = judge_metric(evaluation.result(), evaluation, 20.0)
    assert (found.outcome, found.low, found.high) == ("inconclusive", 0.0, np.inf)
    assert found.drop_points == pytest.approx(100)
    assert json.loads(report_json(found.as_json()))["high"] is None
