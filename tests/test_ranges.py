"""Observers, thinning and the choice of ranges."""

from __future__ import annotations

import numpy as np
import pytest
from core_models import model
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import DataError
from qcompile.graph import Array
from qcompile.ranges import Observer, Thinned, choose_range, observe
from qcompile.runtime import Session


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), feeds=st.integers(1, 40))
def test_extremes_are_exact(seed: int, feeds: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(3, 5)).astype(np.float32) for _ in range(feeds)]
    observer = Observer(keep=False)
    assert not observer.seen
    for array in arrays:
        observer.update(array, "t")
    assert observer.low == float(np.min(arrays))
    assert observer.high == float(np.max(arrays))
    assert observer.seen
    assert observer.sample().size == 0


def test_memory_is_bounded_and_the_sample_stays_representative() -> None:
    rng = np.random.default_rng(0)
    observer = Observer()
    for _ in range(200):
        observer.update(rng.normal(size=(1, 16, 56, 56)).astype(np.float32), "t")
    kept = observer.sample()
    assert kept.dtype == np.float32
    assert 1 << 12 < kept.size <= 1 << 17
    assert abs(float(kept.std()) - 1) < 0.02
    assert abs(float(np.percentile(kept, 99)) - 2.326) < 0.1


@pytest.mark.parametrize("shape", [(64, 1024), (1, 64, 32, 32), (100_000,)])
def test_the_sample_visits_all_columns(shape: tuple[int, ...]) -> None:
    """Values that depend on the last axis alone: each must be met about as often as the others."""
    observer = Observer()
    values = np.broadcast_to(np.arange(shape[-1]) % 16, shape).astype(np.float32)
    observer.update(values, "t")
    counts = np.bincount(observer.sample().astype(int), minlength=16)
    assert counts.min() > 0.5 * counts.mean()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        pytest.param([np.nan, 1.0], "NaN", id="nan"),
        pytest.param([np.inf, 1.0], "inf", id="inf"),
        pytest.param([1e31, 1.0], "1e\\+31|9.99", id="absurd"),
        pytest.param([np.nan, -3.4e38], "NaN", id="nan-beside-a-mask"),
    ],
)
def test_nan_and_inf_are_refused(values: list[float], words: str) -> None:
    with pytest.raises(DataError, match=f"tensor 'score' became ({words})"):
        Observer().update(np.array(values, np.float32), "score")


@pytest.mark.parametrize("mask", [-3.4e38, -np.inf], ids=["largest-negative", "minus-infinity"])
def test_an_attention_mask_is_no_data(mask: float) -> None:
    observer = Observer()
    observer.update(np.array([mask, -2.0, 3.0], np.float32), "t")
    assert (observer.low, observer.high) == (-2.0, 3.0)
    assert observer.sample().min() == -2.0


def test_an_empty_array_changes_nothing() -> None:
    observer = Observer()
    observer.update(np.zeros((0, 4), np.float32), "t")
    assert not observer.seen


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 300), most=st.integers(1, 20))
def test_thinning_is_even_bounded_and_passes_everything(count: int, most: int) -> None:
    thinned = Thinned(budget_bytes=1 << 30, most=most)
    feeds = [{"x": np.full(1, i)} for i in range(count)]
    passed = [int(f["x"][0]) for f in thinned.passing(feeds)]
    assert passed == list(range(count))
    kept = [int(f["x"][0]) for f in thinned.kept]
    assert 1 <= len(kept) <= most
    assert kept[0] == 0
    steps = set(np.diff(kept).tolist())
    assert len(steps) <= 1, "unevenly spaced"
    if count <= most:
        assert kept == list(range(count))
    elif most > 1:
        assert len(kept) >= most // 2


def test_thinning_keeps_to_its_bytes() -> None:
    thinned = Thinned(budget_bytes=1000, most=64)
    list(thinned.passing({"x": np.zeros(50, np.float32)} for _ in range(100)))
    assert sum(f["x"].nbytes for f in thinned.kept) <= 1000
    big = Thinned(budget_bytes=10)
    list(big.passing({"x": np.zeros(50, np.float32)} for _ in range(5)))
    assert len(big.kept) == 1


def watched(*arrays: Array) -> list[Observer]:
    observers = []
    for array in arrays:
        observers.append(Observer())
        observers[-1].update(np.asarray(array, np.float32), "t")
    return observers


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        pytest.param([[-1, 2], [-3, 1]], (-3.0, 2.0), id="joined"),
        pytest.param([[1, 2]], (0.0, 2.0), id="holds-zero-from-above"),
        pytest.param([[-5, -2]], (-5.0, 0.0), id="holds-zero-from-below"),
        pytest.param([], (0.0, 0.0), id="none"),
    ],
)
def test_minmax(arrays: list[list[float]], expected: tuple[float, float]) -> None:
    assert choose_range(watched(*arrays), "minmax") == expected


def test_unseen_observers_are_left_out() -> None:
    assert choose_range([Observer(), *watched([1, 2])], "minmax") == (0.0, 2.0)
    assert choose_range([Observer()], "percentile") == (0.0, 0.0)


def test_percentiles_split_the_tail_between_two_ends() -> None:
    values = np.linspace(-1, 1, 100_001)
    low, high = choose_range(watched(values), "percentile", percentile=99.0)
    assert low == pytest.approx(-0.99, abs=1e-3)
    assert high == pytest.approx(0.99, abs=1e-3)
    low, high = choose_range(watched(np.abs(values)), "percentile", percentile=99.0)
    assert low == 0.0
    assert high == pytest.approx(0.99, abs=1e-3)


def test_observe_counts_feeds_and_reads_inputs_too() -> None:
    session = Session(model("g (float[2] x) => (float[2] y) { y = Neg(x) }"))
    observers = {"x": Observer(), "y": Observer()}
    ticks: list[int] = []
    count = observe(session, observers, ({"x": np.full(2, float(i), np.float32)} for i in range(5)), lambda: ticks.append(1))
    assert count == len(ticks) == 5
    assert (observers["x"].low, observers["x"].high) == (0.0, 4.0)
    assert (observers["y"].low, observers["y"].high) == (-4.0, 0.0)


def test_no_feed_is_an_error() -> None:
    session = Session(model("g (float[2] x) => (float[2] y) { y = Neg(x) }"))
    with pytest.raises(DataError, match="calibration data are empty"):
        observe(session, {"y": Observer()}, [])
