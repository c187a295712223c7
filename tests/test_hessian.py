"""The trace of the Hessian by probes: closed forms, coverage of the interval, torch's exact Hessian of a network, time limits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto
from passes_helpers import parse

from qcompile.cut_layer import LayerSpec
from qcompile.errors import DataError
from qcompile.executors import workers
from qcompile.hessian import estimate, student, traces
from qcompile.probing import Study, choose_step, probe
from qcompile.runtime import Array

TRIALS, PROBES = 200, 64


def softmax_regression(
    seed: int, *, softmax: bool = False, classes: int = 4, width: int = 6
) -> tuple[ModelProto, Array, Array, Array]:
    random = np.random.default_rng(seed)
    w = random.normal(size=(width, classes)).astype(np.float32)
    b = random.normal(size=classes).astype(np.float32)
    x = random.normal(size=(10, 1, width)).astype(np.float32)
    end = "z = Gemm (x, w, b) y = Softmax (z)" if softmax else "y = Gemm (x, w, b)"
    model = parse(f"g (float[1,{width}] x) => (float[1,{classes}] y) {{ {end} }}", w=w, b=b)
    model.graph.node[0].name = "fc"
    return model, w, b, x


def study_of(model: ModelProto, x: Array, loss: str, labels: Array | None = None, seed: int = 0) -> Study:
    weight = model.graph.initializer[0]
    spec = LayerSpec("fc", "Gemm", "linear", "w", "b", 1, int(np.prod(weight.dims)), weight.dims[1])
    named = [None] * len(x) if labels is None else [int(v) for v in labels]
    return Study(model.SerializeToString(), [{"x": row} for row in x], named, [spec], loss, seed)


def softmax_trace(w: Array, b: Array, x: Array) -> float:
    """tr H of mean cross-entropy (and of KL): mean over rows of |x|^2 sum_c p_c (1 - p_c); the labels do not matter."""
    rows = x.reshape(len(x), -1).astype(np.float64)
    logits = rows @ w.astype(np.float64) + b.astype(np.float64)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return float((np.square(rows).sum(axis=1) * (p * (1 - p)).sum(axis=1)).mean())


def quadratic_trace(w: Array, b: Array, x: Array) -> float:
    """tr H of |f - q|^2 / |f|^2 for a linear f = x w + b: 2 C sum |x|^2 / sum |f|^2."""
    rows = x.reshape(len(x), -1).astype(np.float64)
    outputs = rows @ w.astype(np.float64) + b.astype(np.float64)
    return float(2 * w.shape[1] * np.square(rows).sum() / np.square(outputs).sum())


@pytest.mark.parametrize(
    ("loss", "exact"),
    [
        pytest.param("noise", quadratic_trace, id="quadratic"),
        pytest.param("kl", softmax_trace, id="softmax regression, KL"),
        pytest.param("labels", softmax_trace, id="softmax regression, labels"),
    ],
)
def test_the_interval_covers_the_closed_form_in_90_to_99_percent_of_trials(loss: str, exact: Callable[..., float]) -> None:
    _, w, b, x = softmax_regression(7)
    rows = x.reshape(1, len(x), -1)  # all rows in one run: 12 800 probes are as many runs
    model = parse("g (float[n,6] x) => (float[n,4] y) { y = Gemm (x, w, b) }", w=w, b=b)
    model.graph.node[0].name = "fc"
    study = study_of(model, rows, loss)
    study.labels = [np.arange(len(x)) % 4]
    wanted = exact(w, b, x)
    step, _ = choose_step(study, 0)
    # Each trial draws its own probes: none is used twice.
    drawn = np.array([probe(study, 0, index, step) for index in range(TRIALS * PROBES)]).reshape(TRIALS, PROBES)
    found = [estimate(values.tolist()) for values in drawn]
    covered = sum(f.low <= wanted <= f.high for f in found)
    assert 0.90 * TRIALS <= covered <= 0.99 * TRIALS
    assert np.mean(drawn) == pytest.approx(wanted, rel=0.01)
    # The trials are independent: their means scatter as single probes do, over the root of how many they are.
    assert np.std([f.trace for f in found]) == pytest.approx(np.std(drawn) / np.sqrt(PROBES), rel=0.2)


def test_probabilities_and_logits_give_the_same_curvature() -> None:
    plain, _, _, x = softmax_regression(3)
    ended, *_ = softmax_regression(3, softmax=True)
    studies = [study_of(m, x, "kl") for m in (plain, ended)]
    step, apart = choose_step(studies[0], 0)
    assert apart <= 0.05
    a, c = ([probe(s, 0, i, step) for i in range(16)] for s in studies)
    np.testing.assert_allclose(a, c, rtol=2e-2)


def test_a_wrong_label_is_refused() -> None:
    model, _, _, x = softmax_regression(0)
    with pytest.raises(DataError, match="labels do not fit output 'y'"):
        choose_step(study_of(model, x, "labels", np.full(len(x), 9)), 0)


def test_rounds_stop_when_the_interval_is_narrow_enough_and_at_the_most() -> None:
    model, _, _, x = softmax_regression(1)
    with workers(study_of(model, x, "kl")) as pool:
        narrow = traces(pool, 1, tolerance=0.2, most=256)[0]
        wide = traces(pool, 1, tolerance=1e-6, most=32)[0]
    assert narrow is not None and wide is not None
    assert narrow.tight and (narrow.high - narrow.low) / 2 <= 0.2 * narrow.trace
    assert not wide.tight and wide.probes == 32


def test_no_probe_begins_after_the_time_is_over() -> None:
    model, _, _, x = softmax_regression(1)
    late = itertools.count(0, 10)
    with workers(study_of(model, x, "kl")) as pool:
        assert traces(pool, 1, max_seconds=5, clock=lambda: float(next(late))) == [None]
        slow = itertools.count(0, 1)
        cut = traces(pool, 1, tolerance=1e-6, most=256, max_seconds=6, clock=lambda: float(next(slow)))[0]
    assert cut is not None and 0 < cut.probes < 256


def test_two_processes_give_the_same_bits_as_one() -> None:
    model, _, _, x = softmax_regression(5)
    study = study_of(model, x, "kl")
    with workers(study) as pool:
        one = traces(pool, 1, tolerance=1e-3, most=32)
    with workers(study, 2) as pool:
        two = traces(pool, 1, tolerance=1e-3, most=32)
    assert one == two


def test_student_is_near_the_table() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 7: 2.365, 15: 2.131, 31: 2.040, 127: 1.979}
    assert all(student(f) == pytest.approx(t, rel=0.01) for f, t in table.items())


def test_the_networks_traces_agree_with_torch(torch_traces: dict[str, tuple[float, float]]) -> None:
    for layer, (found, exact) in torch_traces.items():
        assert found == pytest.approx(exact, rel=0.1), layer


@pytest.fixture(scope="module")
def torch_traces() -> dict[str, tuple[float, float]]:
    """{layer: (estimate, exact)} of digits_cnn on a few labelled digits; the exact Hessian by torch's double backward."""
    pytest.importorskip("torch")
    from hessian_torch import digits_traces

    return digits_traces(Path(__file__).resolve().parents[1] / "models")
