"""Both models over the samples, with a metric of choice and what each sample said; a fingerprint of the samples on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from qcompile.accuracy import Accuracy, Comparison
from qcompile.errors import DataError
from qcompile.metrics import Metric, drop_of
from qcompile.runtime import Array, Feeds
from qcompile.statistics import Interval, bootstrap_interval


class Evaluation(Comparison):
    """A comparison that also gathers the terms of `metric` (None: top1 where there are labels and classes)."""

    def __init__(self, metric: Metric | None = None) -> None:
        super().__init__()
        self.metric = metric
        self._terms: tuple[list[Array], list[Array]] = ([], [])
        self._digest = hashlib.sha256()
        self._count = 0

    def update(
        self,
        float_outputs: Mapping[str, Array],
        quantised_outputs: Mapping[str, Array],
        label: int | Array | None = None,
        *,
        feeds: Feeds | None = None,
    ) -> None:
        """Add one sample, as `Comparison.update`; DataError where the metric does not fit."""
        metric = self.metric
        ours = metric is None or metric.class_labels
        super().update(float_outputs, quantised_outputs, label if ours else None, feeds=feeds)
        self._fingerprint(feeds or {}, label)
        if metric is not None:
            for outputs, rows in zip((float_outputs, quantised_outputs), self._terms, strict=True):
                rows.append(metric.terms(outputs, label, feeds or {}, self._count))
        self._count += 1

    def result(self) -> Accuracy:
        """The measures so far; score and drop are those of the metric."""
        found = super().result()
        metric = self.metric
        if metric is None:
            return found
        before, after = self.terms()
        float_score, score = (np.asarray(metric.score(rows.mean(axis=0))) for rows in (before, after))
        if not metric.higher_is_better and not float(float_score) > 0:
            raise DataError(
                f"--metric {metric.name}: the float model's score is {float(float_score):g}; a drop in per cent of it "
                "has no meaning"
            )
        lost = won = None
        if metric.binary:
            lost = int((before[:, 0] > after[:, 0]).sum())
            won = int((before[:, 0] < after[:, 0]).sum())
        return replace(
            found,
            samples=len(before),
            metric=metric.name,
            float_score=float(float_score),
            quantised_score=float(score),
            drop_points=float(drop_of(metric, float_score, score)),
            lost=lost,
            won=won,
        )

    def terms(self) -> tuple[Array, Array]:
        """([rows, terms] of the float model, the same of the quantised one)."""
        if not self._terms[0]:
            return np.zeros((0, 1)), np.zeros((0, 1))
        return np.concatenate(self._terms[0]), np.concatenate(self._terms[1])

    def drop_interval(self, seed: int = 0) -> Interval:
        """The paired bootstrap interval of the drop, as `drop_of` defines it."""
        metric = self.metric
        assert metric is not None
        before, after = self.terms()
        width = before.shape[1]

        def drop(means: Array) -> Array:
            return drop_of(metric, metric.score(means[..., :width]), metric.score(means[..., width:]))

        return bootstrap_interval(np.concatenate([before, after], axis=1), drop, seed=seed)

    @property
    def data_sha256(self) -> str:
        """Fingerprint of all feeds and labels so far."""
        return self._digest.hexdigest()

    def _fingerprint(self, feeds: Feeds, label: int | Array | None) -> None:
        for name in sorted(feeds):
            array = np.asarray(feeds[name])
            self._digest.update(f"{name} {array.dtype} {array.shape};".encode())
            plain = (
                array.dtype.kind in "iufb"
            )  # others (strings, bfloat16) value by value: repr leaves the middle of long arrays out
            self._digest.update(np.ascontiguousarray(array).view(np.uint8).data if plain else repr(array.tolist()).encode())
        if label is not None:
            self._digest.update(np.asarray(label, np.float64).tobytes())
