"""Calibration and evaluation data: from the text a user gives (SPEC) to a stream of samples that fit the model.

SPEC is one of
  - `file.npz`: keys are input names, axis 0 is the sample axis; key `labels` is optional, keys `calib_*` are ignored;
  - a directory of `.npz` files, read in the order of their names;
  - a directory of images (`images`), which needs a preprocess text such as `imagenet`;
  - an ONNX `test_data_set_*` directory (`input_0.pb` ...), or a directory that holds several of them;
  - `path/to/file.py:function` or `package.module:function`: yields feeds, or (feeds, label).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from qcompile.data_callable import CallableSource
from qcompile.data_sources import NpzSource, OnnxTestSource, find_test_data
from qcompile.errors import DataError
from qcompile.images import ImageSource, holds_images
from qcompile.samples import InputInfo, Label, Sample, Source, as_label, conform, model_inputs

__all__ = ["Dataset", "InputInfo", "Label", "Sample", "load_dataset", "model_inputs"]

_CALLABLE = re.compile(r"(?P<module>.+):(?P<function>[^\W\d]\w*(\.[^\W\d]\w*)*)")
_FORMS = (
    "give a .npz file, a directory of .npz files or images, an ONNX test_data_set_* directory, "
    "file.py:function or package.module:function"
)


class Dataset:
    """Samples that fit a model, as a stream: every iteration starts again and holds one sample at a time.

    Each sample is one run of the model. Each is checked when it is reached (`samples.conform`); an iteration raises
    DataError for a sample that does not fit, for no sample at all, and where only some samples have labels.
    """

    def __init__(
        self,
        spec: str,
        inputs: Sequence[InputInfo],
        source: Source,
        *,
        indices: Sequence[int] | None = None,
        limit: int | None = None,
        start: int = 0,
        step: int = 1,
    ) -> None:
        self.spec = spec
        self._inputs = tuple(inputs)
        self._source = source
        self._indices = indices
        self._limit = limit
        self._start = start
        self._step = step
        self._has_labels: bool | None = None

    @property
    def has_labels(self) -> bool:
        """Whether the samples carry labels; the first use reads the first sample."""
        if self._has_labels is None:
            self._has_labels = next(iter(self)).label is not None
        return self._has_labels

    @property
    def count(self) -> int | None:
        """Number of samples; None where only running through them tells (a callable)."""
        return self._source.count if self._indices is None else len(self._indices)

    def __iter__(self) -> Iterator[Sample]:
        labelled: bool | None = None
        for row in islice(self._source.rows(self._indices), self._start, self._limit, self._step):
            sample = Sample(conform(row.feeds, self._inputs, row.origin), as_label(row.label, row.origin))
            if labelled is None:
                labelled = sample.label is not None
            elif labelled != (sample.label is not None):
                raise DataError(f"{row.origin}: some samples have a label and some have none; label all or none")
            yield sample
        if labelled is None:
            raise DataError(f"{self.spec}: it gave no sample; {self._why_empty()}")

    def _why_empty(self) -> str:
        if self._source.count is None:
            return "each call of the function must begin a new sequence of at least one"
        return "give at least one"

    def sample(self, count: int | None, seed: int = 0) -> Dataset:
        """At most `count` samples (None: all), in the order of the source.

        Where the number of samples is known, a random subset drawn with `seed`; of a callable the first `count`,
        since drawing at random would mean to run through all of it. A sample is one run: where the model's batch is
        fixed to B, `count` samples are `count * B` pictures.
        """
        if count is None:
            return self
        if count < 1:
            raise DataError(f"{self.spec}: {count} samples were asked for; ask for at least 1")
        total = self.count
        if total is None:
            stop = self._start + count * self._step
            limit = stop if self._limit is None else min(stop, self._limit)
            return Dataset(self.spec, self._inputs, self._source, limit=limit, start=self._start, step=self._step)
        if count >= total:
            return self
        drawn = np.sort(np.random.default_rng(seed).choice(total, size=count, replace=False))
        chosen = [int(i) if self._indices is None else self._indices[int(i)] for i in drawn]
        return Dataset(self.spec, self._inputs, self._source, indices=chosen)

    def halves(self) -> tuple[Dataset, Dataset]:
        """Every other sample from the first on, and the others: two parts without a common sample, in the order of the source."""
        if self.count is None:  # only running through them tells how many there are
            first, second = (
                Dataset(self.spec, self._inputs, self._source, limit=self._limit, start=start, step=2 * self._step)
                for start in (self._start, self._start + self._step)
            )
            return first, second
        indices = self._indices if self._indices is not None else range(self.count)
        first, second = (Dataset(self.spec, self._inputs, self._source, indices=list(indices[i::2])) for i in (0, 1))
        return first, second


def load_dataset(
    spec: str,
    inputs: Sequence[InputInfo],
    *,
    preprocess: str | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> Dataset:
    """The data that `spec` names, for a model with `inputs`, cut to `samples` with `seed` (`Dataset.sample`).

    `preprocess` is for image directories only (`images.parse_preprocess`). What can be seen without reading the data
    (missing files, names, shapes of .npz members) is checked at once. Raises DataError.
    """
    if not inputs:
        raise DataError(f"{spec}: the model has no input to feed")
    source = _open(spec, inputs, preprocess)
    if preprocess is not None and not isinstance(source, ImageSource):
        raise DataError(f"{spec}: preprocess {preprocess!r} is for image directories; leave it out")
    return Dataset(spec, inputs, source).sample(samples, seed)


def _open(spec: str, inputs: Sequence[InputInfo], preprocess: str | None) -> Source:
    path = Path(spec)
    if spec and path.is_dir():
        return _open_directory(path, inputs, preprocess)
    if spec and path.exists():
        if path.suffix.lower() == ".npz":
            return NpzSource([path], inputs)
        if path.suffix == ".py":
            raise DataError(f"{spec}: name the function in it, as {spec}:FUNCTION")
        raise DataError(f"{spec}: not a kind of file that data are read from; {_FORMS}")
    match = _CALLABLE.fullmatch(spec)
    if match:
        return CallableSource(match["module"], match["function"])
    raise DataError(f"{spec!r}: no such file or directory; {_FORMS}")


def _open_directory(path: Path, inputs: Sequence[InputInfo], preprocess: str | None) -> Source:
    # Directories of the ONNX model zoo hold .npz files too, of other keys: the test data sets go first.
    sets = find_test_data(path)
    if sets:
        return OnnxTestSource(sets, inputs)
    archives = sorted(p for p in path.iterdir() if p.suffix.lower() == ".npz" and p.is_file())
    images = holds_images(path)
    if archives and images:
        raise DataError(f"{path}: holds .npz files and images; put one kind into a directory of its own")
    if archives:
        return NpzSource(archives, inputs)
    if images:
        return ImageSource(path, inputs, preprocess)
    raise DataError(f"{path}: the directory holds no data; {_FORMS}")
