"""Data made up where the user gives none: good enough to see ranges of an image model, never to judge accuracy.

Images have a 1/f amplitude spectrum, as photographs do (Field, "Relations between the statistics of natural images and
the response properties of cortical cells", JOSA A 4(12), 1987): neighbouring pixels are alike, so that filters and
pooling see sums that white noise would average out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from qcompile.data import Dataset
from qcompile.errors import DataError
from qcompile.runtime import Array
from qcompile.samples import InputInfo, Row

SPEC = "synthetic"
CHANNELS = (1, 3, 4)
SPATIAL_SIZE = 64  # divisible by the usual total stride of 32
OTHER_SIZE = 8
TOKENS = 32  # length of a made-up sentence
DEVIATIONS = 3.0  # images are bounded: most 8-bit pixels lie within two and a half deviations of the mean
SHARED_VARIANCE = 0.8  # of a pixel's variance, what all channels have in common: photographs are mostly luminance

_Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class InputMoments:
    """Mean by channel (axis 1) and deviation of a float input, where the model tells them."""

    mean: Array
    deviation: float


def limited(values: Array) -> Array:
    """Numbers of deviation 1 kept within DEVIATIONS of 0."""
    return np.clip(values, -DEVIATIONS, DEVIATIONS)


def synthetic_dataset(
    inputs: Sequence[InputInfo],
    count: int,
    seed: int,
    *,
    moments: Mapping[str, InputMoments] | None = None,
    vocabularies: Mapping[str, int] | None = None,
) -> Dataset:
    """`count` unlabelled samples; the same for the same inputs and `seed`, whatever part of them is read.

    Float inputs of rank 4 with 1, 3 or 4 channels (NCHW or NHWC) get correlated noise of mean 0 and deviation 1 per
    image, other floats standard normal numbers, inputs with `mask` in their name ones. Sizes that are not fixed: axis 0
    is 1, height and width 64, unknown channels 3, of tokens 32, all others 8; one symbolic name has one size in all inputs.
    `moments`: inputs that get another mean and deviation, limited to three deviations. `vocabularies`: for token inputs how many
    ids there are; they get uniform ids, but zeros where `type` or `segment` is in the name (one sentence).
    Raises DataError for other integer inputs (the range of token ids is not known) and for inputs of unknown rank.
    """
    if count < 1:
        raise DataError(f"{SPEC} data: {count} samples were asked for; ask for at least 1")
    known = dict(vocabularies or {})
    for info in inputs:
        if info.shape is None:
            raise DataError(f"input {info.name!r} has no shape, so that its data cannot be made up; give --data")
        if needs_vocabulary(info) and info.name not in known:
            raise DataError(f"input {info.name!r} ({info.dtype}): token inputs need --data, their values cannot be made up")
    return Dataset(SPEC, inputs, _SyntheticSource(inputs, count, seed, dict(moments or {}), known))


def needs_vocabulary(info: InputInfo) -> bool:
    """Whether an input holds integers (token ids) that cannot be made up without knowing their range."""
    return not _is_mask(info) and not np.issubdtype(info.dtype, np.floating)


class _SyntheticSource:
    def __init__(
        self,
        inputs: Sequence[InputInfo],
        count: int,
        seed: int,
        moments: dict[str, InputMoments],
        vocabularies: dict[str, int],
    ) -> None:
        self._moments = moments
        self._vocabularies = vocabularies
        self._count = count
        self._seed = seed
        self._inputs = [(info, image_axes(info.shape or ())) for info in inputs]
        self._shapes = _sizes(inputs)

    @property
    def count(self) -> int | None:
        return self._count

    def rows(self, indices: Sequence[int] | None) -> Iterator[Row]:
        for index in range(self._count) if indices is None else indices:
            feeds = {info.name: self._array(index, place, info, axes) for place, (info, axes) in enumerate(self._inputs)}
            yield Row(f"{SPEC}: sample {index}", feeds, None)

    def _array(self, index: int, place: int, info: InputInfo, axes: tuple[int, int, int] | None) -> Array:
        shape = self._shapes[place]
        if _is_mask(info):
            return np.ones(shape, info.dtype)
        # A generator of its own for each array: a subset of the samples is the same as in the whole.
        random = np.random.default_rng([self._seed, index, place])
        if needs_vocabulary(info):
            top = 1 if _is_segment(info) else self._vocabularies[info.name]
            return random.integers(0, top, shape).astype(info.dtype)
        values = random.standard_normal(shape) if axes is None else _images(random, shape, axes)
        moments = self._moments.get(info.name)
        if moments is not None:
            mean = moments.mean.reshape(1, -1, *[1] * (values.ndim - 2))
            values = limited(values) * moments.deviation + mean
        return values.astype(info.dtype)


def _is_mask(info: InputInfo) -> bool:
    return "mask" in info.name.lower()


def _is_segment(info: InputInfo) -> bool:
    return "type" in info.name.lower() or "segment" in info.name.lower()


def image_axes(shape: Sequence[int | str | None]) -> tuple[int, int, int] | None:
    """(channel, height, width) axes of an image input; None for what is no image. NCHW where both would do."""
    if len(shape) != 4:
        return None
    if shape[1] in CHANNELS:
        return 1, 2, 3
    if shape[3] in CHANNELS:
        return 3, 1, 2
    return None if isinstance(shape[1], int) else (1, 2, 3)


def _sizes(inputs: Sequence[InputInfo]) -> list[_Shape]:
    named: dict[str, int] = {}
    shapes = []
    for info in inputs:
        axes = image_axes(info.shape or ())
        shape = []
        for axis, dim in enumerate(info.shape or ()):
            size = dim if isinstance(dim, int) else _default_size(axis, axes, needs_vocabulary(info))
            shape.append(named.setdefault(dim, size) if isinstance(dim, str) else size)
        shapes.append(tuple(shape))
    return shapes


def _default_size(axis: int, axes: tuple[int, int, int] | None, tokens: bool) -> int:
    if axis == 0:
        return 1
    if axes is None:
        return TOKENS if tokens else OTHER_SIZE
    return 3 if axis == axes[0] else SPATIAL_SIZE


def _images(random: np.random.Generator, shape: _Shape, axes: tuple[int, int, int]) -> Array:
    """Noise with amplitude 1/f over height and width, channels correlated, mean 0 and deviation 1 per image."""
    batch, (channels, height, width) = shape[0], (shape[a] for a in axes)
    if height * width == 1:  # no space to be smooth in, and nothing would be left without the mean
        return random.standard_normal(shape)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    frequency[0, 0] = 1.0 / max(height, width)  # the mean: as strong as the lowest frequency, taken out below
    gain = 1.0 / frequency
    gain /= np.sqrt(np.mean(gain**2))  # by Parseval's theorem the deviation stays 1
    white = random.standard_normal((batch, channels + 1, height, width))
    smooth = np.fft.ifft2(np.fft.fft2(white) * gain).real
    images: Array = np.sqrt(SHARED_VARIANCE) * smooth[:, :1] + np.sqrt(1 - SHARED_VARIANCE) * smooth[:, 1:]
    images -= images.mean(axis=(1, 2, 3), keepdims=True)
    images /= images.std(axis=(1, 2, 3), keepdims=True)
    return images if axes[0] == 1 else images.transpose(0, 2, 3, 1)
