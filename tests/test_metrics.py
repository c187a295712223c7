"""Metrics: against scikit-like definitions by hand, drops in points and per cent, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.errors import DataError, InputError
from qcompile.evaluation import Evaluation
from qcompile.metrics import F1, MeanSquaredError, TopK, drop_of, parse_metric

RNG = np.random.default_rng(3)
LOGITS = RNG.normal(size=(200, 6)).astype(np.float32)
LABELS = RNG.integers(0, 6, 200)


def terms(metric: Any, outputs: np.ndarray[Any, Any], label: Any, feeds: dict[str, Any] | None = None) -> np.ndarray[Any, Any]:
    rows = metric.terms({"y": outputs}, label, feeds or {}, 0)
    assert isinstance(rows, np.ndarray)
    return rows


@pytest.mark.parametrize("k", [1, 2, 5])
def test_topk_is_the_share_among_the_largest(k: int) -> None:
    order = np.argsort(-LOGITS, axis=1, kind="stable")[:, :k]
    expected = np.mean([LABELS[i] in order[i] for i in range(len(LABELS))])
    rows = terms(TopK(k), LOGITS, LABELS)
    assert float(TopK(k).score(rows.mean(axis=0))) == pytest.approx(expected)


def test_ties_go_to_the_lower_index_as_argmax_does() -> None:
    logits = np.zeros((3, 4), np.float32)
    rows = terms(TopK(2), logits, np.array([0, 1, 2]))
    assert rows[:, 0].tolist() == [1, 1, 0]
    assert parse_metric("top1") == TopK(1)
    assert (parse_metric("topk:5").name, TopK(1).name) == ("topk:5", "top1")


def f1_by_hand(told: np.ndarray[Any, Any], truth: np.ndarray[Any, Any], of: int) -> float:
    right = ((told == of) & (truth == of)).sum()
    return float(2 * right / max(1, (told == of).sum() + (truth == of).sum()))


def test_f1_of_many_classes_is_the_mean_and_of_two_that_of_class_1() -> None:
    told = LOGITS.argmax(axis=1)
    rows = terms(F1(), LOGITS, LABELS)
    expected = np.mean([f1_by_hand(told, LABELS, c) for c in range(6)])
    assert float(F1().score(rows.mean(axis=0))) == pytest.approx(expected)
    two = LOGITS[:, :2]
    rows = terms(F1(), two, LABELS % 2)
    assert float(F1().score(rows.mean(axis=0))) == pytest.approx(f1_by_hand(two.argmax(axis=1), LABELS % 2, 1))


def test_classes_that_never_occur_do_not_count() -> None:
    rows = terms(F1(), np.eye(3, dtype=np.float32)[[0, 1, 1]], np.array([0, 1, 1]))
    assert float(F1().score(rows.mean(axis=0))) == 1.0


def test_mse_against_labels_or_the_input() -> None:
    target = np.array([[1.0, 2.0]])
    output = np.array([[2.0, 4.0]], np.float32)
    assert terms(MeanSquaredError(), output, target).tolist() == [[2.5]]
    assert terms(MeanSquaredError(), output, None, {"x": target.astype(np.float32)}).tolist() == [[2.5]]
    assert float(drop_of(MeanSquaredError(), np.array(2.0), np.array(3.0))) == 50
    assert float(drop_of(TopK(), np.array(0.9), np.array(0.8))) == pytest.approx(10)


@pytest.mark.parametrize(
    ("metric", "outputs", "label", "said"),
    [
        pytest.param(MeanSquaredError(), np.zeros((1, 2), np.float32), None, "no input has the shape", id="no target"),
        pytest.param(MeanSquaredError(), np.zeros((1, 2), np.float32), np.zeros(3), "the label holds 3 values", id="size"),
        pytest.param(MeanSquaredError(), np.zeros((1, 2), np.int64), None, "no float output", id="integers"),
        pytest.param(TopK(6), LOGITS, LABELS, "every row would be right", id="k"),
        pytest.param(TopK(1), np.zeros((1, 2), np.int64), 1, "no float output has classes", id="no classes"),
        pytest.param(F1(), LOGITS, LABELS[:3], "3 labels for 200 rows", id="too few labels"),
        pytest.param(F1(), LOGITS, None, "no label", id="no label"),
    ],
)
def test_what_does_not_fit_is_refused(metric: Any, outputs: Any, label: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        terms(metric, outputs, label)


@pytest.mark.parametrize("text", ["top5", "topk:", "topk:0", "topk:x", "", "accuracy", "m.py"])
def test_names_that_are_no_metric(text: str) -> None:
    with pytest.raises(InputError, match="--metric"):
        parse_metric(text)


SOURCE = """
import numpy as np
def closeness(outputs, label):
    return -float(np.abs(outputs["y"] - label).mean())
def error(outputs, label):
    return float(np.abs(outputs["y"] - label).mean())
error.higher_is_better = False
def text(outputs, label):
    return "good"
def nan(outputs, label):
    return float("nan")
def fault(outputs, label):
    raise ValueError("odd")
"""


def test_functions_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(SOURCE)
    best, worst = (parse_metric(f"{tmp_path}/m.py:{name}") for name in ("closeness", "error"))
    output = np.array([[1.0, 3.0]], np.float32)
    assert (best.higher_is_better, worst.higher_is_better) == (True, False)
    assert terms(best, output, 2).tolist() == [[-1.0]]
    for name, said in (("text", "gave a str"), ("nan", "gave nan"), ("fault", "raised ValueError: odd")):
        with pytest.raises(DataError, match=said):
            terms(parse_metric(f"{tmp_path}/m.py:{name}"), output, 2)
    with pytest.raises(DataError, match="there is no 'erro' in it; did you mean 'error'"):
        parse_metric(f"{tmp_path}/m.py:erro")
    with pytest.raises(DataError, match="no such file"):
        parse_metric(f"{tmp_path}/none.py:f")


def test_an_evaluation_gathers_both_models() -> None:
    evaluation = Evaluation(TopK(2))
    for row, label in zip(LOGITS, LABELS, strict=True):
        evaluation.update({"y": row[None]}, {"y": -row[None]}, int(label), feeds={"x": row[None]})
    found = evaluation.result()
    before, after = evaluation.terms()
    assert (found.metric, found.samples) == ("topk:2", 200)
    assert found.lost == int((before > after).sum())
    assert found.drop_points == pytest.approx(100 * (before.mean() - after.mean()))
    assert len(evaluation.evidence().noise) == 200
    again = Evaluation(TopK(2))
    again.update({"y": LOGITS[:1]}, {"y": LOGITS[:1]}, int(LABELS[0]), feeds={"x": LOGITS[:1]})
    assert again.data_sha256 != evaluation.data_sha256


def test_data_that_differ_in_the_middle_of_a_long_text_input_have_other_fingerprints() -> None:
    found = []
    for word in ("a", "b"):
        words = np.full((1, 5000), "x", dtype=object)
        words[0, 2500] = word
        evaluation = Evaluation(TopK(1))
        evaluation.update({"y": LOGITS[:1]}, {"y": LOGITS[:1]}, int(LABELS[0]), feeds={"words": words})
        found.append(evaluation.data_sha256)
    assert found[0] != found[1]


def test_a_perfect_float_model_has_no_drop_in_per_cent() -> None:
    evaluation = Evaluation(MeanSquaredError())
    evaluation.update({"y": np.ones((1, 2), np.float32)}, {"y": np.zeros((1, 2), np.float32)}, np.ones((1, 2)), feeds={})
    with pytest.raises(DataError, match="a drop in per cent of it has no meaning"):
        evaluation.result()
