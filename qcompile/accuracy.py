"""How far a quantised model is from its float original: SQNR, cosine, top-1 agreement, accuracy drop. Streaming.

**Which output holds the classes.** The first float output, if it is [N, C] with C >= 2 once trailing axes of length 1 are
dropped ([N, 1000, 1, 1] counts); without any float output, the first integer output, whose values are taken for class ids
(a model that ends in ArgMax). With labels any rank >= 2 is taken, classes on the last axis, if each row has one label.
Without labels a float output shaped like one of the model's float inputs is a reconstruction (autoencoder), not classes. A
shape cannot tell an embedding [N, C] from logits: its top-1 agreement is given, and means little. Everything else (boxes,
sequences, maps) has no agreement. Each row counts as a sample; without classes each feed does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from qcompile.errors import DataError, ModelError
from qcompile.runtime import Array, Feeds

FeedsMap: TypeAlias = Callable[[Feeds], Feeds]


class LabelledFeeds(Protocol):
    """One sample: the model's feeds, and its class label(s) or None."""

    @property
    def feeds(self) -> Feeds:
        """{input name: array}."""

    @property
    def label(self) -> int | Array | None:
        """One class id, one for each row of the output, or None."""


class Runnable(Protocol):
    """What `compare` needs of a session."""

    def run(self, feeds: Feeds) -> Mapping[str, Array]:
        """{output name: array} of one feed."""


@dataclass(frozen=True)
class Accuracy:
    """A quantised model measured against its float original on the same samples.

    `sqnr_db` is 10 log10(sum f^2 / sum (f-q)^2) over all float outputs and samples; None stands for infinity (no error).
    `cosine` is over the same values. Scores and `top1_agreement` are fractions, `drop_points` percentage points. `lost`
    samples are right in float and wrong quantised, `won` the opposite. Values that need labels, or classes, are None
    where there are none; `cosine` is None where no output is float. `identical`: every output is the same bit for bit.
    """

    samples: int
    sqnr_db: float | None
    cosine: float | None
    top1_agreement: float | None
    metric: str | None
    float_score: float | None
    quantised_score: float | None
    drop_points: float | None
    lost: int | None
    won: int | None
    identical: bool

    def as_json(self) -> dict[str, object]:
        """The report's `accuracy`."""
        return {
            "samples": self.samples,
            "sqnr_db": self.sqnr_db,
            "cosine": self.cosine,
            "top1_agreement": self.top1_agreement,
            "metric": self.metric,
            "float": self.float_score,
            "quantised": self.quantised_score,
            "drop_points": self.drop_points,
            "lost": self.lost,
            "won": self.won,
            "identical": self.identical,
        }


@dataclass(frozen=True)
class Evidence:
    """What each sample said, for intervals and for the samples that changed most.

    signal, noise: sums of f^2 and (f-q)^2 over its float outputs, one a feed. agreed, float_right, quantised_right: one a row
    (empty where the outputs hold no classes, or there are no labels).
    """

    signal: Array
    noise: Array
    agreed: Array
    float_right: Array
    quantised_right: Array


class Comparison:
    """Accumulates the outputs of two models over samples; `result` may be asked for at any time. Holds some bytes a sample."""

    def __init__(self) -> None:
        self._feeds = 0
        self._identical = True
        self._has_float = False
        self._signal = self._noise = self._power = self._product = 0.0
        self._head: str | None = None  # the output with the classes; the first sample decides
        self._labelled: bool | None = None
        self._rows = self._agreed = self._float_right = self._quantised_right = self._lost = self._won = 0
        self._sums: list[tuple[float, float]] = []
        self._by_row: tuple[list[Array], list[Array], list[Array]] = ([], [], [])  # agreed, right in float, right quantised

    def update(
        self,
        float_outputs: Mapping[str, Array],
        quantised_outputs: Mapping[str, Array],
        label: int | Array | None = None,
        *,
        feeds: Feeds | None = None,
    ) -> None:
        """Add one sample (or batch). `feeds` of the float model are read for their shapes only, see the module's head.

        Equal infinities on both sides are left out of the sums (an additive mask). Raises ModelError where the outputs do
        not pair up or the quantised ones are not finite, DataError where the float ones are not finite or labels misfit.
        """
        missing = sorted(set(float_outputs) ^ set(quantised_outputs))
        if missing:
            raise ModelError(f"output '{missing[0]}' is in one of the two models only; compare models of one origin")
        before = self._signal, self._noise
        self._signal = self._noise = 0.0
        for name, f in float_outputs.items():
            self._add_output(name, f, quantised_outputs[name])
        self._sums.append((self._signal, self._noise))
        self._signal, self._noise = before[0] + self._signal, before[1] + self._noise
        if self._labelled not in (None, label is not None):
            raise DataError(f"sample {self._feeds}: some samples have labels and some have none; label all or none")
        self._labelled = label is not None
        self._add_classes(float_outputs, quantised_outputs, label, feeds)
        self._feeds += 1

    def result(self) -> Accuracy:
        """The measures over all samples so far. Raises DataError where there are none, or nothing was there to measure."""
        if self._feeds == 0:
            raise DataError("no samples to compare the models on; give --eval data")
        rows = self._rows if self._head is not None else self._feeds
        if rows == 0:
            raise DataError("all outputs are empty on these samples; give --eval data with at least one row")
        scores: tuple[float, float, float] | None = None
        if self._labelled:
            drop = 100 * (self._lost - self._won) / rows
            scores = self._float_right / rows, self._quantised_right / rows, drop
        return Accuracy(
            samples=rows,
            sqnr_db=self._sqnr_db(),
            cosine=self._cosine() if self._has_float else None,
            top1_agreement=self._agreed / rows if self._head is not None else None,
            metric="top1" if scores else None,
            float_score=scores[0] if scores else None,
            quantised_score=scores[1] if scores else None,
            drop_points=scores[2] if scores else None,
            lost=self._lost if scores else None,
            won=self._won if scores else None,
            identical=self._identical,
        )

    def evidence(self) -> Evidence:
        """Sample by sample, what `result` sums up."""
        sums = np.array(self._sums, np.float64).reshape(-1, 2)
        agreed, right, still_right = (np.concatenate([np.zeros(0, bool), *rows]) for rows in self._by_row)
        return Evidence(sums[:, 0], sums[:, 1], agreed, right, still_right)

    def _add_output(self, name: str, f: Array, q: Array) -> None:
        kind, other = _kind(name, f), _kind(name, q)
        if f.shape != q.shape:
            raise ModelError(
                f"output '{name}' is {list(f.shape)} in float and {list(q.shape)} quantised on sample {self._feeds}; "
                "compare an output before its shape depends on the data"
            )
        if kind != other:
            raise ModelError(f"output '{name}' is {f.dtype} in float and {q.dtype} quantised; keep the output's type")
        same = f.dtype == q.dtype and np.array_equal(_bytes(f), _bytes(q))
        self._identical = self._identical and same
        if kind == "integer":
            return
        self._has_float = True
        # Copies in float64: neither squares nor differences of float16 or float32 overflow there.
        x, y = f.astype(np.float64).ravel(), q.astype(np.float64).ravel()
        unequal = ~(np.isinf(x) & (x == y))
        if not unequal.all():
            x, y = x[unequal], y[unequal]
        if not np.isfinite(x).all():
            raise DataError(f"float model: output '{name}' holds NaN or Inf on sample {self._feeds}; check the data")
        if not np.isfinite(y).all():
            raise ModelError(f"quantised model: output '{name}' holds NaN or Inf on sample {self._feeds}")
        with np.errstate(over="ignore"):  # an overflow stays in the sums as Inf, which `result` refuses
            error = x - y
            self._signal += float(x @ x)
            self._noise += float(error @ error)
            self._power += float(y @ y)
            self._product += float(x @ y)

    def _add_classes(
        self,
        float_outputs: Mapping[str, Array],
        quantised_outputs: Mapping[str, Array],
        label: int | Array | None,
        feeds: Feeds | None,
    ) -> None:
        if self._feeds == 0:
            self._head = class_output(float_outputs, labelled=label is not None, feeds=feeds)
        name = self._head
        if name is None:
            if label is not None:
                raise DataError("there are labels but no output with classes on its last axis; give --eval data without labels")
            return
        if not _holds_classes(float_outputs[name]):
            shape = list(float_outputs[name].shape)
            raise ModelError(f"output '{name}' holds no classes on sample {self._feeds}: its shape is {shape}")
        float_top, quantised_top = _top(float_outputs[name]), _top(quantised_outputs[name])
        self._rows += len(float_top)
        self._agreed += int((float_top == quantised_top).sum())
        self._by_row[0].append(float_top == quantised_top)
        if label is None:
            return
        truth = class_labels(label, len(float_top), name, _class_count(float_outputs[name]), self._feeds)
        float_right, quantised_right = float_top == truth, quantised_top == truth
        self._by_row[1].append(float_right)
        self._by_row[2].append(quantised_right)
        self._float_right += int(float_right.sum())
        self._quantised_right += int(quantised_right.sum())
        self._lost += int((float_right & ~quantised_right).sum())
        self._won += int((~float_right & quantised_right).sum())

    def _sqnr_db(self) -> float | None:
        if not all(map(math.isfinite, (self._signal, self._noise, self._power))):
            raise DataError("outputs are too large to square in float64; there is no SQNR to report")
        if self._noise == 0:
            return None
        if self._signal == 0:
            raise DataError("the float model gives only zeros on these samples, so SQNR is undefined; give other data")
        return 10 * (math.log10(self._signal) - math.log10(self._noise))

    def _cosine(self) -> float:
        if self._noise == 0:
            return 1.0
        if self._power == 0:
            return 0.0
        cosine = self._product / (math.sqrt(self._signal) * math.sqrt(self._power))
        return min(1.0, max(-1.0, cosine))


def compare(
    float_session: Runnable,
    quantised_session: Runnable,
    samples: Iterable[LabelledFeeds],
    *,
    on_sample: Callable[[], None] | None = None,
    float_feeds: FeedsMap | None = None,
    quantised_feeds: FeedsMap | None = None,
    comparison: Comparison | None = None,
) -> Accuracy:
    """Run both models on every sample, one at a time, and measure the second against the first.

    `float_feeds` and `quantised_feeds` turn a sample's feeds into those of the model, where one takes its inputs in another
    form (`--inputs-as uint8`). `on_sample` is called after each sample (progress). `comparison`: what gathers the outputs, for
    one that is asked for more than the result. Errors as `Comparison` and `Session`.
    """
    comparison = Comparison() if comparison is None else comparison
    for sample in samples:
        for_float = float_feeds(sample.feeds) if float_feeds else sample.feeds
        for_quantised = quantised_feeds(sample.feeds) if quantised_feeds else sample.feeds
        f, q = float_session.run(for_float), quantised_session.run(for_quantised)
        comparison.update(f, q, sample.label, feeds=for_float)
        if on_sample is not None:
            on_sample()
    return comparison.result()


def _kind(name: str, array: Array) -> str:
    if array.dtype.kind == "f":
        return "float"
    if array.dtype.kind in "iub":
        return "integer"
    raise ModelError(f"output '{name}' is of type {array.dtype}; only float and integer tensors can be compared")


def _bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _squeezed(array: Array) -> Array:
    """Drop trailing axes of length 1 down to rank 2: [N, 1000, 1, 1] -> [N, 1000]."""
    while array.ndim > 2 and array.shape[-1] == 1:
        array = array[..., 0]
    return array


def class_output(outputs: Mapping[str, Array], *, labelled: bool, feeds: Feeds | None) -> str | None:
    """Name of the output that holds the classes, by the rules at the module's head; None where there is none."""
    floats = [name for name, array in outputs.items() if array.dtype.kind == "f"]
    if not floats:
        return next(iter(outputs), None)
    output = outputs[floats[0]]
    if not _holds_classes(output):
        return None
    if labelled:
        return floats[0]
    inputs = [array.shape for array in (feeds or {}).values() if array.dtype.kind == "f"]
    return floats[0] if _squeezed(output).ndim == 2 and output.shape not in inputs else None


def _holds_classes(output: Array) -> bool:
    logits = _squeezed(output)
    return output.dtype.kind != "f" or (logits.ndim >= 2 and logits.shape[-1] >= 2)


def _top(output: Array) -> Array:
    """Class of each row: the largest value, the first of equals. An integer output holds the class ids themselves."""
    if output.dtype.kind != "f":
        return output.reshape(-1)
    classes: Array = _squeezed(output).argmax(axis=-1).reshape(-1)
    return classes


def _class_count(output: Array) -> int | None:
    return _squeezed(output).shape[-1] if output.dtype.kind == "f" else None


def classes_of(output: Array) -> Array:
    """[rows, classes] of a float output that holds classes."""
    logits = _squeezed(output)
    return logits.reshape(-1, logits.shape[-1])


def class_labels(label: int | Array | None, rows: int, name: str, classes: int | None, sample: int) -> Array:
    """[rows] class ids. Raises DataError where they are none, too few or too many, or out of range."""
    if label is None:
        raise DataError(f"sample {sample}: no label; this metric compares with the true answers")
    labels = np.asarray(label).reshape(-1)
    if labels.dtype.kind not in "iu":
        raise DataError(f"sample {sample}: labels are {labels.dtype}, not integer class ids; give --eval data without labels")
    if len(labels) != rows:
        raise DataError(f"sample {sample}: {len(labels)} labels for {rows} rows of output '{name}'; give one for each row")
    if classes is not None and rows and (labels.min() < 0 or labels.max() >= classes):
        raise DataError(
            f"sample {sample}: labels {labels.min()} to {labels.max()} do not fit the {classes} classes of output '{name}'; "
            "is there a background class that shifts them?"
        )
    return labels
