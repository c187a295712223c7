"""The top eigenvalue by power iteration: closed forms with numpy alone, then through torch, and torch's exact Hessian."""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import CNN, MODELS, Command, is_one_error
from onnx import ModelProto
from passes_helpers import parse

from qcompile.cut_layer import LayerSpec
from qcompile.eigenvalue import eigenvalues, power_iteration, top_eigenvalue
from qcompile.errors import InputError, ModelError
from qcompile.executors import workers
from qcompile.probing import Study
from qcompile.runtime import Array
from qcompile.sensitivity_run import model_sensitivity
from qcompile.torch_gradient import Gradient, require_torch

DATA = str(MODELS / "digits_calib.npz")


def random_symmetric(seed: int, values: Array) -> Array:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))
    return np.asarray(q @ np.diag(values) @ q.T)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(np.array([5.0, 3, 1, 0.5, 0, 0]), id="positive"),
        pytest.param(np.array([-7.0, 4, 2, 1, 0, 0]), id="the largest is negative"),
        pytest.param(np.array([2.0, 2, 1, 0, 0, 0]), id="double"),
    ],
)
def test_a_quadratics_top_eigenvalue(values: Array) -> None:
    matrix, w = random_symmetric(3, values), np.linspace(-1, 1, 6)
    found = power_iteration(lambda x: matrix @ x, w, np.random.default_rng(0), tolerance=1e-6, most=200)
    assert found.value == pytest.approx(values[0], rel=1e-4)
    assert found.tight and found.change <= 1e-6 and found.disagreement < 1e-6


def test_a_step_is_chosen_where_the_loss_is_not_quadratic() -> None:
    """A gradient of x^3 beside 3 x: a large step would count what is not curvature."""
    w = np.full(4, 1.0)
    found = power_iteration(lambda x: 3 * x + 1e4 * (x - w) ** 3, w, np.random.default_rng(1), most=60)
    assert found.value == pytest.approx(3, rel=0.02)
    assert found.step < 2.0**-5 * np.linalg.norm(w)


def test_a_flat_loss_has_none_and_a_short_run_is_not_tight() -> None:
    assert power_iteration(np.zeros_like, np.ones(3), np.random.default_rng(0)).value == 0
    matrix = random_symmetric(5, np.array([1.0, 0.99, 0.98, 0.97]))
    assert not power_iteration(lambda x: matrix @ x, np.ones(4), np.random.default_rng(0), tolerance=1e-12, most=4).tight


def regression(loss: str, *, softmax: bool = False) -> tuple[Study, Array, Array, Array]:
    random = np.random.default_rng(7)
    w, b = random.normal(size=(6, 4)).astype(np.float32), random.normal(size=4).astype(np.float32)
    x = random.normal(size=(10, 1, 6)).astype(np.float32)
    end = "z = Gemm (x, w, b) y = Softmax (z)" if softmax else "y = Gemm (x, w, b)"
    model = parse(f"g (float[n,6] x) => (float[n,4] y) {{ {end} }}", w=w, b=b)
    return study_of(model, x, loss), w, b, x


def study_of(model: ModelProto, x: Array, loss: str) -> Study:
    model.graph.node[0].name = "fc"
    spec = LayerSpec("fc", "Gemm", "linear", "w", "b", 1, 24, 4)
    return Study(model.SerializeToString(), [{"x": row} for row in x], [i % 4 for i in range(len(x))], [spec], loss)


def exact(loss: str, w: Array, b: Array, x: Array) -> float:
    """H of mean KL (and cross-entropy): mean of x x' (x) (diag p - p p'); of noise: 2 sum x x' (x) 1 over the outputs' energy."""
    rows = x.reshape(len(x), -1).astype(np.float64)
    outputs = rows @ w.astype(np.float64) + b.astype(np.float64)
    if loss == "noise":
        return float(2 * np.linalg.eigvalsh(rows.T @ rows)[-1] / np.square(outputs).sum())
    p = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    total = sum(np.kron(np.outer(r, r), np.diag(q) - np.outer(q, q)) for r, q in zip(rows, p, strict=True))
    return float(np.linalg.eigvalsh(np.asarray(total) / len(rows))[-1])


@pytest.fixture(scope="module")
def torch() -> Any:
    pytest.importorskip("onnx2fx")
    return pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("loss", "softmax"),
    [
        pytest.param("noise", False, id="quadratic"),
        pytest.param("kl", False, id="softmax regression, KL"),
        pytest.param("kl", True, id="softmax regression, KL of probabilities"),
        pytest.param("labels", False, id="softmax regression, labels"),
    ],
)
def test_regressions_agree_with_their_closed_form(torch: Any, loss: str, softmax: bool) -> None:
    study, w, b, x = regression(loss, softmax=softmax)
    found = top_eigenvalue(study, 0)
    assert found.tight
    assert found.value == pytest.approx(exact(loss, w, b, x), rel=5e-3)
    assert top_eigenvalue(study, 0) == found


def test_the_gradient_of_labels_is_that_of_a_softmax_regression(torch: Any) -> None:
    study, w, b, x = regression("labels")
    rows = x.reshape(len(x), -1).astype(np.float64)
    outputs = rows @ w + b
    p = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(10), np.arange(10) % 4] -= 1
    np.testing.assert_allclose(Gradient(study, 0)(w.astype(np.float64)), rows.T @ p / 10, atol=1e-6)


def test_samples_that_cannot_run_together_run_one_by_one(torch: Any) -> None:
    """A Reshape that names the batch of one: two samples at once would be one row of twice the width."""
    random = np.random.default_rng(2)
    w, b = random.normal(size=(6, 4)).astype(np.float32), np.zeros(4, np.float32)
    x = random.normal(size=(6, 1, 6)).astype(np.float32)
    text = "g (float[1,6] x) => (float[1,4] y) { z = Gemm (x, w, b) y = Reshape (z, s) }"
    found = top_eigenvalue(study_of(parse(text, w=w, b=b, s=np.array([1, 4])), x, "noise"), 0)
    assert found.value == pytest.approx(exact("noise", w, b, x), rel=5e-3)


def test_two_processes_give_the_same_bits(torch: Any) -> None:
    study = regression("kl")[0]
    with workers(study) as pool:
        one = eigenvalues(pool, 1)
    with workers(study, 2) as pool:
        assert eigenvalues(pool, 1) == one


def test_no_layer_is_begun_after_the_time_is_over(torch: Any) -> None:
    late = itertools.count(0, 10)
    with workers(regression("kl")[0]) as pool:
        assert eigenvalues(pool, 1, max_seconds=5, clock=lambda: float(next(late))) == [None]


def test_an_operator_that_cannot_be_converted_is_named(torch: Any) -> None:
    study = regression("kl")[0]
    study.layer(0).cut.model = lambda: parse("g (float[1,6] x) => (float[1,4] y) { y = Unheard (x) }")  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"^layer 'fc': --eigenvalue: .*Unheard.*; leave --eigenvalue out$"):
        Gradient(study, 0)


def test_torch_must_compute_what_onnxruntime_does(torch: Any) -> None:
    study = regression("kl")[0]
    state = study.layer(0)
    state.clean = [{name: value + 1 for name, value in outputs.items()} for outputs in state.clean]
    with pytest.raises(ModelError, match="layer 'fc': --eigenvalue: torch does not compute what onnxruntime does"):
        Gradient(study, 0)


@pytest.mark.parametrize("missing", ["torch", "onnx2fx"])
def test_missing_torch_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=r'^--eigenvalue differentiates with torch; pip install "qcompile\[torch\]"'):
        require_torch()
    with pytest.raises(InputError, match="--eigenvalue differentiates"):
        model_sensitivity(CNN, DATA, eigenvalue=True)


def test_the_command_line_names_the_extra(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx2fx", None)
    status, _, err = command("sensitivity", CNN, "--data", DATA, "--eigenvalue")
    assert status == 2
    assert is_one_error(err) and "qcompile[torch]" in err


def test_the_table_and_the_command_line(torch: Any, command: Command, tmp_path: Path) -> None:
    options = ["--samples", "12", "--no-trace", "--no-activations", "--widths", "4"]
    written, report = tmp_path / "t.csv", tmp_path / "r.json"
    files = ["--csv", str(written), "--report", str(report)]
    status, out, err = command("sensitivity", CNN, "--data", DATA, *options, "--eigenvalue", *files)
    assert status == 0, err
    assert "top eigenvalue" in out
    rows = list(csv.DictReader(io.StringIO(written.read_text())))
    layers = json.loads(report.read_text())["sensitivity"]["layers"]
    assert [float(row["eigenvalue"]) for row in rows] == [layer["eigenvalue"]["value"] for layer in layers]
    assert len(rows) == 6 and all(float(row["eigenvalue"]) > 0 for row in rows)


def test_without_the_option_there_is_none(command: Command, tmp_path: Path) -> None:
    written = tmp_path / "t.csv"
    options = ["--samples", "4", "--no-trace", "--no-activations", "--widths", "4", "--csv", str(written)]
    status, out, _ = command("sensitivity", CNN, "--data", DATA, *options)
    assert status == 0 and "eigenvalue" not in out
    assert all(row["eigenvalue"] == "" for row in csv.DictReader(io.StringIO(written.read_text())))


@pytest.mark.filterwarnings("ignore")
def test_the_networks_eigenvalues_agree_with_torchs_exact_hessian(torch: Any) -> None:
    from hessian_torch import digits_eigenvalues

    found = digits_eigenvalues(Path(__file__).resolve().parents[1] / "models")
    assert len(found) >= 3
    for layer, (value, wanted) in found.items():
        assert value == pytest.approx(wanted, rel=0.02), layer
