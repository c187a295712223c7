"""Metrics of a model's outputs against the true answers: per-sample terms, and a score of their means (`--metric`).

    top1, topk:K      rows right                          higher is better, 0/1
    f1                F1 of class 1 for two classes, else the mean over classes that occur (macro)
    mse               mean squared error against the label, or without labels against the input of the same shape (autoencoder)
    file.py:function  function(outputs, label) -> one number a sample; a lower one is better where it says so
                      (`function.higher_is_better = False`)

Scores that are means of terms, or functions of such means, can be resampled without running anything again (`statistics`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from qcompile.accuracy import class_labels, class_output, classes_of
from qcompile.data_callable import load_function, user_code
from qcompile.errors import DataError, InputError
from qcompile.runtime import Array, Feeds

_FUNCTION = re.compile(r".+:[^\W\d]\w*(\.[^\W\d]\w*)*")
_FORMS = "give top1, topk:K, mse, f1 or file.py:function"


class Metric(Protocol):
    """One metric. `binary`: each term is 0 or 1 and the score their mean. `class_labels`: labels are class ids, and needed."""

    @property
    def name(self) -> str:
        """As `--metric` takes it."""

    @property
    def binary(self) -> bool:
        """Whether each row is right or wrong."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a drop is a lower score."""

    @property
    def class_labels(self) -> bool:
        """Whether it needs class ids."""

    def terms(self, outputs: Mapping[str, Array], label: int | Array | None, feeds: Feeds, sample: int) -> Array:
        """[rows, terms] of one sample. Raises DataError where the metric does not fit the outputs or the label."""

    def score(self, means: Array) -> Array:
        """The score [...] of mean terms [..., terms]."""


@dataclass(frozen=True)
class TopK:
    """Share of rows whose class is among the `k` largest values; equal values: the lower index wins."""

    k: int = 1
    binary: bool = True
    higher_is_better: bool = True
    class_labels: bool = True

    @property
    def name(self) -> str:
        """As `--metric` takes it."""
        return "top1" if self.k == 1 else f"topk:{self.k}"

    def terms(self, outputs: Mapping[str, Array], label: int | Array | None, feeds: Feeds, sample: int) -> Array:
        """[rows, 1]: 1 where right."""
        name, rows = _class_rows(outputs, feeds, sample, self.name)
        if self.k >= rows.shape[-1]:
            raise DataError(f"--metric {self.name}: output '{name}' has {rows.shape[-1]} classes, so every row would be right")
        truth = class_labels(label, len(rows), name, rows.shape[-1], sample)
        of_truth = np.take_along_axis(rows, truth[:, None], axis=1)
        before = (rows > of_truth).sum(axis=1)
        before += ((rows == of_truth) & (np.arange(rows.shape[1]) < truth[:, None])).sum(axis=1)
        right: Array = (before < self.k).astype(np.float64)[:, None]
        return right

    def score(self, means: Array) -> Array:
        """The share."""
        return _first(means)


@dataclass(frozen=True)
class F1:
    """2 TP / (2 TP + FP + FN) of class 1 where there are two classes, else its mean over classes that occur or are predicted."""

    name: str = "f1"
    binary: bool = False
    higher_is_better: bool = True
    class_labels: bool = True

    def terms(self, outputs: Mapping[str, Array], label: int | Array | None, feeds: Feeds, sample: int) -> Array:
        """[rows, 3 classes]: true positives, false positives, false negatives of each class."""
        name, rows = _class_rows(outputs, feeds, sample, self.name)
        classes = rows.shape[-1]
        truth = class_labels(label, len(rows), name, classes, sample)
        told = np.eye(classes)[rows.argmax(axis=-1)]
        true = np.eye(classes)[truth]
        return np.concatenate([told * true, told * (1 - true), (1 - told) * true], axis=1)

    def score(self, means: Array) -> Array:
        """F1; 0 where nothing is right."""
        right, wrong, missed = np.split(means, 3, axis=-1)
        union = 2 * right + wrong + missed
        each = np.divide(2 * right, union, out=np.zeros_like(right), where=union > 0)
        if each.shape[-1] == 2:
            second: Array = each[..., 1]
            return second
        seen = (union > 0).sum(axis=-1)
        macro: Array = each.sum(axis=-1) / np.maximum(seen, 1)
        return macro


@dataclass(frozen=True)
class MeanSquaredError:
    """Mean of (output - truth)^2 over the first float output."""

    name: str = "mse"
    binary: bool = False
    higher_is_better: bool = False
    class_labels: bool = False

    def terms(self, outputs: Mapping[str, Array], label: int | Array | None, feeds: Feeds, sample: int) -> Array:
        """[1, 1]: the mean over the sample's values."""
        name = next((n for n, a in outputs.items() if a.dtype.kind == "f"), None)
        if name is None:
            raise DataError("--metric mse: the model has no float output")
        output = outputs[name].astype(np.float64)
        if label is None:
            alike = [a for a in feeds.values() if a.dtype.kind == "f" and a.shape == output.shape]
            if not alike:
                raise DataError(f"--metric mse: no labels, and no input has the shape {list(output.shape)} of output '{name}'")
            truth = alike[0].astype(np.float64)
        else:
            truth = np.asarray(label, np.float64)
        if truth.size != output.size:
            raise DataError(
                f"sample {sample}: the label holds {truth.size} values, output '{name}' {output.size}; "
                "--metric mse needs one for each"
            )
        return np.array([[np.square(output - truth.reshape(output.shape)).mean()]])

    def score(self, means: Array) -> Array:
        """The mean."""
        return _first(means)


@dataclass(frozen=True)
class UserMetric:
    """A function of (outputs, label), whose mean over samples is the score."""

    name: str
    function: Callable[..., Any] = field(repr=False)
    directory: str = field(repr=False)
    higher_is_better: bool
    binary: bool = False
    class_labels: bool = False

    def terms(self, outputs: Mapping[str, Array], label: int | Array | None, feeds: Feeds, sample: int) -> Array:
        """[1, 1]: what the function gives. Raises DataError where it raises, or gives no finite number."""
        with user_code(self.name, self.directory, f"on sample {sample} it"):
            value = self.function(dict(outputs), label)
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.name}: gave a {type(value).__name__} on sample {sample}; give one number") from error
        if not math.isfinite(number):
            raise DataError(f"{self.name}: gave {number} on sample {sample}; give a finite number")
        return np.array([[number]])

    def score(self, means: Array) -> Array:
        """The mean."""
        return _first(means)


def parse_metric(text: str) -> Metric:
    """The metric that `--metric` names. Raises InputError for any other text, DataError where a function cannot be loaded."""
    if text == "top1":
        return TopK()
    if text == "mse":
        return MeanSquaredError()
    if text == "f1":
        return F1()
    if text.startswith("topk:"):
        number = text.removeprefix("topk:")
        if not number.isdecimal() or int(number) < 1:
            raise InputError(f"--metric {text}: give a whole number of at least 1, such as topk:5")
        return TopK(int(number))
    if not _FUNCTION.fullmatch(text):
        raise InputError(f"--metric {text}: no such metric; {_FORMS}")
    function, directory = load_function(text)
    return UserMetric(text, function, directory, bool(getattr(function, "higher_is_better", True)))


def drop_of(metric: Metric, float_score: Array, quantised_score: Array) -> Array:
    """How much worse the second score is: 100 (float - quantised) points; where lower is better, per cent of the float score.

    Of a float score that is not above 0 (a resample without any error) no per cent can be taken: infinite, or 0 where equal.
    """
    change = np.asarray(quantised_score - float_score)
    if metric.higher_is_better:
        return -100 * change
    parts = np.where(np.asarray(float_score) > 0, float_score, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(change == 0, 0.0, 100 * change / parts)


def _first(means: Array) -> Array:
    only: Array = means[..., 0]
    return only


def _class_rows(outputs: Mapping[str, Array], feeds: Feeds, sample: int, metric: str) -> tuple[str, Array]:
    name = class_output(outputs, labelled=True, feeds=feeds)
    if name is None or outputs[name].dtype.kind != "f":
        raise DataError(f"--metric {metric}: no float output has classes on its last axis; choose mse or a function of your own")
    rows = classes_of(outputs[name])
    return name, rows
