"""Structure of latency measurements under a fake clock; no real time is asserted."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

import qcompile.latency
from qcompile.errors import InputError, ModelError
from qcompile.latency import Latency, measure_latency, paired_ratio
from qcompile.runtime import Array, Feeds

MODEL = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) { y = Neg(x) }')
FEEDS = {"x": np.ones(3, np.float32)}


class Machine:
    """A clock, and sessions whose runs move it on; sessions are known by their label ("model 0", ...)."""

    def __init__(self, seconds_a_run: dict[str, float]) -> None:
        self.now = 0.0
        self.seconds_a_run = seconds_a_run
        self.runs: list[str] = []
        self.feeds: dict[str, Feeds] = {}
        self.threads: list[int] = []

    def clock(self) -> float:
        return self.now

    def session(self, model: object, *, threads: int, label: str) -> FakeSession:
        self.threads.append(threads)
        return FakeSession(self, label)


class FakeSession:
    def __init__(self, machine: Machine, label: str) -> None:
        self.machine, self.label = machine, label

    def run(self, feeds: Feeds) -> dict[str, Array]:
        self.machine.now += self.machine.seconds_a_run[self.label]
        self.machine.runs.append(self.label)
        self.machine.feeds[self.label] = feeds
        return {}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine({"a": 0.006, "b": 0.002})
    monkeypatch.setattr(qcompile.latency, "Session", machine.session)
    return machine


def measured(machine: Machine, feeds: Feeds | list[Feeds] = FEEDS, rounds: int = 5) -> Latency:
    return measure_latency(["a", "b"], feeds, rounds=rounds, slot_seconds=0.06, clock=machine.clock)


def test_medians_and_paired_ratios(machine: Machine) -> None:
    latency = measured(machine)
    assert latency.median_ms == pytest.approx((6.0, 2.0))
    assert [len(row) for row in latency.round_ms] == [5, 5]
    assert latency.speedups[0].median == pytest.approx(1.0)
    assert latency.speedups[1].median == pytest.approx(3.0)
    assert latency.threads == 1
    assert machine.threads == [1, 1]


def test_the_reports_keys(machine: Machine) -> None:
    report = measured(machine).as_json()
    assert set(report) == {"float", "quantised", "speedup", "speedup_low", "speedup_high", "threads"}
    assert report["float"] == pytest.approx(6.0)
    assert report["quantised"] == pytest.approx(2.0)
    assert report["speedup"] == pytest.approx(3.0)
    assert report["threads"] == 1


def test_models_take_turns_forwards_and_backwards_and_fill_their_slots(machine: Machine) -> None:
    measured(machine, rounds=3)
    # From the end, one untimed run and then a slot of 0.06 s: rounds a b | b a | a b.
    slots = ["a"] * 11 + ["b"] * 31 + ["b"] * 31 + ["a"] * 11 + ["a"] * 11 + ["b"] * 31
    assert machine.runs[-len(slots) :] == slots


def test_a_model_may_have_feeds_of_its_own(machine: Machine) -> None:
    other = {"x": np.zeros(3, np.float32)}
    measured(machine, [FEEDS, other])
    assert machine.feeds["a"] is FEEDS
    assert machine.feeds["b"] is other


def test_a_run_longer_than_the_slot_is_run_once_a_round(machine: Machine) -> None:
    machine.seconds_a_run = {"a": 1.0, "b": 1.0}
    latency = measured(machine, rounds=2)
    assert latency.median_ms == pytest.approx((1000, 1000))
    assert len(machine.runs) == 2 * (2 + 2 * 2)  # two runs of warming up, then untimed + timed in two rounds


def test_a_clock_that_stands_still_is_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qcompile.latency, "_MOST_REPEATS", 8)
    with pytest.raises(InputError, match="clock"):
        measure_latency(["a"], FEEDS, clock=lambda: 0.0)


@pytest.mark.parametrize("pairs", [1, 2, 5, 6, 11, 12, 25, 40], ids=str)
def test_the_interval_has_the_sign_tests_coverage(pairs: int) -> None:
    ratio = paired_ratio([float(i + 1) for i in range(pairs)], [1.0] * pairs)
    below, above = int(ratio.low) - 1, pairs - int(ratio.high)  # values left out on each side
    assert below == above
    assert ratio.confidence == pytest.approx(1 - 2 * binom.cdf(below, pairs, 0.5))
    if pairs >= 6:
        assert ratio.confidence >= 0.95
        assert 1 - 2 * binom.cdf(below + 1, pairs, 0.5) < 0.95
    else:
        assert below == 0


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=40))
def test_the_interval_holds_the_median(pairs: list[tuple[float, float]]) -> None:
    ratio = paired_ratio([a for a, _ in pairs], [b for _, b in pairs])
    assert ratio.low <= ratio.median <= ratio.high
    assert ratio.median == pytest.approx(float(np.median([a / b for a, b in pairs])))
    assert 0 <= ratio.confidence < 1


def test_real_sessions_from_a_file_and_from_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(MODEL, path)
    latency = measure_latency([path, MODEL, str(path)], FEEDS, rounds=3, slot_seconds=0.001)
    assert len(latency.median_ms) == len(latency.speedups) == 3
    assert all(math.isfinite(t) and t > 0 for row in latency.round_ms for t in row)
    with pytest.raises(ValueError, match="two models"):
        latency.as_json()


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing\.onnx"):
        measure_latency([tmp_path / "nothing.onnx"], FEEDS)


def test_no_model_is_refused() -> None:
    with pytest.raises(InputError, match="no model"):
        measure_latency([], FEEDS)


def test_the_number_of_feeds_must_fit() -> None:
    with pytest.raises(InputError, match="2 models but 1 feeds"):
        measure_latency([MODEL, MODEL], [FEEDS])


@pytest.mark.parametrize(("rounds", "slot", "threads"), [(0, 0.1, 1), (1, 0.0, 1), (1, math.nan, 1), (1, 0.1, 0)], ids=str)
def test_arguments_that_measure_nothing_are_refused(rounds: int, slot: float, threads: int) -> None:
    with pytest.raises(InputError, match="at least one round"):
        measure_latency([MODEL], FEEDS, rounds=rounds, slot_seconds=slot, threads=threads)
