"""Measures against float64 and Fraction oracles, which output holds the classes, labels, refusals."""

from __future__ import annotations

import importlib.util
import json
import math
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.accuracy import Accuracy, Comparison, compare
from qcompile.errors import DataError, ModelError
from qcompile.runtime import Array, Feeds, Optimisation, Session
from qcompile.samples import Sample

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"


def f32(values: object) -> Array:
    return np.asarray(values, np.float32)


def measured(f: Array, q: Array, label: int | Array | None = None, *, feeds: Feeds | None = None) -> Accuracy:
    comparison = Comparison()
    comparison.update({"y": f}, {"y": q}, label, feeds=feeds)
    return comparison.result()


def exact_sum(terms: list[Fraction]) -> Fraction:
    return sum(terms, Fraction(0))


integers = st.lists(st.tuples(st.integers(-99, 99), st.integers(-99, 99)), min_size=1, max_size=30)


@given(integers, st.integers(1, 5))
def test_sqnr_and_cosine_equal_exact_arithmetic(pairs: list[tuple[int, int]], batch: int) -> None:
    comparison = Comparison()
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        # Two outputs, of which the second is empty of information but counts in the sums.
        comparison.update(
            {"y": f32([a for a, _ in part]) / 4, "z": f32([1])},
            {"y": f32([b for _, b in part]) / 4, "z": f32([1])},
        )
    result = comparison.result()
    ones = Fraction(math.ceil(len(pairs) / batch))
    signal = exact_sum([Fraction(a, 4) ** 2 for a, _ in pairs]) + ones
    noise = exact_sum([Fraction(a - b, 4) ** 2 for a, b in pairs])
    power = exact_sum([Fraction(b, 4) ** 2 for _, b in pairs]) + ones
    product = exact_sum([Fraction(a * b, 16) for a, b in pairs]) + ones
    if noise == 0:
        assert result.sqnr_db is None
        assert result.cosine == 1
        assert result.identical
    else:
        assert result.sqnr_db == pytest.approx(10 * math.log10(signal / noise), rel=1e-12, abs=1e-12)
        assert result.cosine == pytest.approx(float(product) / math.sqrt(signal * power), rel=1e-12, abs=1e-12)
        assert not result.identical


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=lambda d: d.__name__)
def test_sums_are_float64_whatever_the_outputs_type(dtype: type[np.floating[Any]]) -> None:
    largest = float(np.finfo(dtype).max) if dtype is not np.float64 else 1e150
    f = np.asarray([largest, -largest, 1], dtype)
    q = np.asarray([-largest, largest, 1], dtype)  # the difference overflows the type
    assert measured(f, q).sqnr_db == pytest.approx(10 * math.log10(1 / 4), abs=1e-6)
    assert measured(f, q).cosine == pytest.approx(-1)


def test_different_float_types_are_compared_but_not_identical() -> None:
    result = measured(np.ones(3, np.float16), np.ones(3, np.float32))
    assert result.sqnr_db is None
    assert not result.identical


def test_zero_of_the_other_sign_is_no_error_but_not_identical() -> None:
    result = measured(f32([0.0, 1]), f32([-0.0, 1]))
    assert result.sqnr_db is None
    assert not result.identical


def test_zeros_on_both_sides_are_no_error() -> None:
    result = measured(f32([0, 0]), f32([0, 0]))
    assert (result.sqnr_db, result.cosine, result.identical) == (None, 1.0, True)


def test_zeros_in_the_quantised_model_only() -> None:
    result = measured(f32([3, 4]), f32([0, 0]))
    assert result.sqnr_db == pytest.approx(0)
    assert result.cosine == 0


def test_zeros_in_the_float_model_only_are_refused() -> None:
    with pytest.raises(DataError, match="only zeros"):
        measured(f32([0, 0]), f32([0, 1]))


def test_outputs_too_large_to_square_are_refused() -> None:
    with pytest.raises(DataError, match="too large"):
        measured(np.array([1e200]), np.array([1e190]))


def test_equal_infinities_are_left_out() -> None:
    mask = -np.inf
    result = measured(f32([[mask, 3, 4]]), f32([[mask, 3, 3]]))
    assert result.sqnr_db == pytest.approx(10 * math.log10(25))
    assert result.top1_agreement == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_values_that_are_not_finite_are_refused_by_name_and_side(bad: float) -> None:
    with pytest.raises(DataError, match=r"float model: output 'y'.*sample 0"):
        measured(f32([1, bad]), f32([1, 2]))
    with pytest.raises(ModelError, match=r"quantised model: output 'y'.*sample 0"):
        measured(f32([1, 2]), f32([1, bad]))


def test_nan_on_both_sides_is_refused() -> None:
    with pytest.raises(DataError, match="NaN"):
        measured(f32([np.nan]), f32([np.nan]))


@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_scores_agreement_and_discordant_counts(rows: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    f, q = (rng.integers(-2, 3, (rows, classes)).astype(np.float32) for _ in "fq")
    f[0, 0] = 9  # not all zeros
    labels = rng.integers(0, classes, rows)
    result = measured(f, q, labels)
    tops = [([max(range(classes), key=row.__getitem__) for row in array.tolist()]) for array in (f, q)]
    right = [[top == int(label) for top, label in zip(side, labels, strict=True)] for side in tops]
    assert result.samples == rows
    assert result.top1_agreement == sum(a == b for a, b in zip(*tops, strict=True)) / rows
    assert result.metric == "top1"
    assert (result.float_score, result.quantised_score) == (sum(right[0]) / rows, sum(right[1]) / rows)
    assert result.lost == sum(a and not b for a, b in zip(*right, strict=True))
    assert result.won == sum(b and not a for a, b in zip(*right, strict=True))
    assert result.drop_points == pytest.approx(100 * (sum(right[0]) - sum(right[1])) / rows)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), (2, 3, 1, 1)], ids=str)
def test_trailing_axes_of_one_are_dropped(shape: tuple[int, ...]) -> None:
    f, q = f32([[1, 2, 3], [3, 2, 1]]).reshape(shape), f32([[1, 2, 3], [1, 2, 3]]).reshape(shape)
    result = measured(f, q, np.array([2, 0]))
    assert (result.samples, result.top1_agreement, result.lost, result.won) == (2, 0.5, 1, 0)


@pytest.mark.parametrize("shape", [(1, 5, 4), (3,), (), (2, 1), (2, 1, 1, 1), (1, 2, 4, 4)], ids=str)
def test_other_shapes_have_no_agreement_without_labels(shape: tuple[int, ...]) -> None:
    f = np.ones(shape, np.float32)
    result = measured(f, f)
    assert result.top1_agreement is None
    assert result.samples == 1
    assert (result.metric, result.drop_points, result.lost, result.won) == (None, None, None, None)


def test_with_labels_each_token_may_be_a_row() -> None:
    f = f32([[[1, 0], [0, 1], [1, 0]]])  # [1, 3 tokens, 2 classes]
    result = measured(f, -f, np.array([[0, 1, 1]]))
    assert (result.samples, result.float_score, result.quantised_score) == (3, 2 / 3, 1 / 3)


def test_a_reconstruction_is_no_classification() -> None:
    x = np.ones((1, 640), np.float32)
    assert measured(x, x, feeds={"x": x}).top1_agreement is None
    assert measured(x, x, feeds={"x": x[:, :10]}).top1_agreement == 1
    assert measured(x, x, feeds={"ids": np.ones((1, 640), np.int64)}).top1_agreement == 1
    assert measured(x, x, 3, feeds={"x": x}).metric == "top1"


def test_the_first_sample_decides_what_is_a_reconstruction() -> None:
    comparison = Comparison()
    for length in (2, 3, 4):  # a sequence model whose second sample is as long as it has classes
        y = np.ones((1, 3), np.float32)
        comparison.update({"y": y}, {"y": y}, feeds={"x": np.ones((1, length), np.float32)})
    assert comparison.result().top1_agreement == 1
    assert comparison.result().samples == 3


def test_an_output_that_stops_holding_classes_is_refused() -> None:
    comparison = Comparison()
    comparison.update({"y": f32([[1, 2]])}, {"y": f32([[1, 2]])})
    with pytest.raises(ModelError, match=r"'y' holds no classes on sample 1.*\[1, 1\]"):
        comparison.update({"y": f32([[1]])}, {"y": f32([[1]])})


def test_integer_outputs_hold_class_ids_where_no_output_is_float() -> None:
    result = measured(np.array([[3], [4], [5]]), np.array([[3], [4], [6]]), np.array([3, 0, 5]))
    assert (result.samples, result.top1_agreement, result.lost, result.won) == (3, 2 / 3, 1, 0)
    assert (result.sqnr_db, result.cosine, result.identical) == (None, None, False)


def test_a_float_output_goes_before_class_ids_and_ids_stay_out_of_the_sums() -> None:
    comparison = Comparison()
    comparison.update({"id": np.array([1]), "p": f32([[0.25, 0.75]])}, {"id": np.array([7]), "p": f32([[0.25, 0.75]])}, 1)
    result = comparison.result()
    assert (result.top1_agreement, result.sqnr_db, result.identical) == (1, None, False)


def test_equal_values_count_for_the_first_class() -> None:
    result = measured(f32([[2, 2]]), f32([[2, 1]]), 0)
    assert (result.top1_agreement, result.float_score) == (1, 1)


@pytest.mark.parametrize("label", [1, np.int64(1), np.array([1]), np.array([[1]], np.uint8)], ids=repr)
def test_forms_of_one_label(label: int | Array) -> None:
    assert measured(f32([[1, 2]]), f32([[1, 2]]), label).float_score == 1


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (np.array([0.0]), "float64, not integer"),
        (np.array([0, 1]), "2 labels for 1 rows"),
        (-1, "background"),
        (2, "labels 2 to 2 do not fit the 2 classes of output 'y'"),
    ],
    ids=["float", "too-many", "negative", "too-large"],
)
def test_labels_that_do_not_fit_are_refused(label: int | Array, words: str) -> None:
    with pytest.raises(DataError, match=words):
        measured(f32([[1, 2]]), f32([[1, 2]]), label)


def test_labels_without_classes_are_refused() -> None:
    with pytest.raises(DataError, match="without labels"):
        measured(f32([1, 2]), f32([1, 2]), 0)


@pytest.mark.parametrize("labels", [(0, None), (None, 0)], ids=str)
def test_labels_on_some_samples_only_are_refused(labels: tuple[int | None, int | None]) -> None:
    comparison = Comparison()
    outputs = {"y": f32([[1, 2]])}
    comparison.update(outputs, outputs, labels[0])
    with pytest.raises(DataError, match=r"sample 1.*label all or none"):
        comparison.update(outputs, outputs, labels[1])


@pytest.mark.parametrize(
    ("f", "q", "words"),
    [
        (f32([[1, 2]]), f32([[1, 2, 3]]), r"'y' is \[1, 2\] in float and \[1, 3\] quantised on sample 0"),
        (f32([1]), np.array([1]), "'y' is float32 in float and int64 quantised"),
        (np.array(["a"]), np.array(["a"]), "'y' is of type <U1"),
        (np.array([1j]), np.array([1j]), "'y' is of type complex128"),
    ],
    ids=["shape", "kind", "string", "complex"],
)
def test_outputs_that_do_not_pair_are_refused(f: Array, q: Array, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        measured(f, q)


@pytest.mark.parametrize(("f", "q"), [("yz", "y"), ("y", "yz")], ids=["lost", "new"])
def test_an_output_in_one_model_only_is_refused(f: str, q: str) -> None:
    with pytest.raises(ModelError, match="'z' is in one"):
        Comparison().update({name: f32([1]) for name in f}, {name: f32([1]) for name in q})


def test_no_samples_are_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        Comparison().result()


def test_empty_outputs_are_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        measured(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32))


def test_an_empty_output_beside_another_is_fine() -> None:
    comparison = Comparison()
    outputs = {"y": f32([1, 2]), "boxes": np.zeros((0, 4), np.float32)}
    comparison.update(outputs, outputs)
    assert comparison.result().identical


def test_the_report_is_strict_json_with_stable_keys() -> None:
    report = measured(f32([[1, 2], [2, 1]]), f32([[1, 2.5], [1, 2]]), np.array([1, 0])).as_json()
    assert json.loads(json.dumps(report, allow_nan=False)) == {
        "samples": 2,
        "sqnr_db": pytest.approx(10 * math.log10(10 / 2.25)),
        "cosine": pytest.approx((1 + 5 + 2 + 2) / math.sqrt(10 * 12.25)),
        "top1_agreement": 0.5,
        "metric": "top1",
        "float": 1.0,
        "quantised": 0.5,
        "drop_points": 50.0,
        "lost": 1,
        "won": 0,
        "identical": False,
    }


def test_compare_runs_both_models_on_every_sample() -> None:
    head = '<ir_version: 8, opset_import: ["": 17]>'
    exact = Session(onnx.parser.parse_model(head + "g (float[N,C] x) => (float[N,C] y) { y = Neg(x) }"))
    coarse = Session(onnx.parser.parse_model(head + "g (uint8[N,C] x) => (float[N,C] y) { c = Cast<to=1>(x) y = Neg(c) }"))
    samples = [Sample({"x": f32([[i + 0.25, 5 - i, 2]])}, 0 if i < 2 else 1) for i in range(5)]
    ticks: list[int] = []
    result = compare(
        exact,
        coarse,
        samples,
        on_sample=lambda: ticks.append(1),
        float_feeds=lambda feeds: {"x": feeds["x"] * 2},
        quantised_feeds=lambda feeds: {"x": (feeds["x"] * 2).astype(np.uint8)},
    )
    f = np.concatenate([-s.feeds["x"] * 2 for s in samples]).astype(np.float64)
    assert len(ticks) == result.samples == 5
    assert result.sqnr_db == pytest.approx(10 * math.log10((f**2).sum() / (5 * 0.5**2)))
    labels = np.array([0, 0, 1, 1, 1])
    assert result.float_score == (f.argmax(1) == labels).mean()


def test_compare_without_samples_is_refused() -> None:
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]> g (float x) => (float y) { y = Neg(x) }')
    with pytest.raises(DataError, match="--eval"):
        compare(Session(model), Session(model), [])


@pytest.mark.zoo
def test_a_real_model_against_itself_unoptimised() -> None:
    if not (ZOO / "tasks.py").exists():
        pytest.skip(f"{ZOO} is absent")
    spec = importlib.util.spec_from_file_location("zoo_tasks", ZOO / "tasks.py")
    assert spec is not None
    assert spec.loader is not None
    tasks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tasks)
    path = ZOO / "resnet8_cifar10" / "model.onnx"
    rows = list(islice(tasks.resnet8_cifar10_eval(), 60))
    optimised, plain = Session(path, threads=1), Session(path, threads=1, optimisation=Optimisation.OFF)
    result = compare(optimised, plain, [Sample(feeds, label) for feeds, label in rows])
    tops = [int(next(iter(plain.run(feeds).values())).argmax()) for feeds, _ in rows]
    assert result.quantised_score == sum(t == label for t, (_, label) in zip(tops, rows, strict=True)) / 60
    assert result.top1_agreement == 1
    assert result.sqnr_db is None or result.sqnr_db > 100
    assert (result.lost, result.won) == (0, 0)
