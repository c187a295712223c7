"""Data from array files: `.npz` archives and the `test_data_set_*` directories of ONNX."""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx

from qcompile.errors import DataError
from qcompile.runtime import Array
from qcompile.samples import InputInfo, Row, check_names

LABELS = "labels"
IGNORED_PREFIX = "calib_"
SKIP_BYTES = 1 << 20


class NpzSource:
    """Rows of `.npz` files; axis 0 of each member is the sample axis.

    A member of the input's own rank gives `member[i:i+1]`, and B of them where the model's batch is fixed to B > 1 (an
    incomplete last group is left out); a member of one rank more gives `member[i]`. Members are streamed from the
    archive row by row; only `labels` and members in Fortran order are read whole. Nothing is ever unpickled.
    """

    def __init__(self, paths: Sequence[Path], inputs: Sequence[InputInfo]) -> None:
        self._files = [_Archive.open(path, inputs) for path in paths]
        self._ends = list(accumulate(f.runs for f in self._files))
        if self._ends[-1] == 0:
            first = self._files[0]
            raise DataError(
                f"{first.path}: {first.samples} samples do not fill one batch; the model's batch is fixed to {first.batch}"
            )

    @property
    def count(self) -> int | None:
        """Number of rows."""
        return self._ends[-1]

    def rows(self, indices: Sequence[int] | None) -> Iterator[Row]:
        """Rows at ascending `indices`, or all; one file is open at a time."""
        for file, end in zip(self._files, self._ends, strict=True):
            start = end - file.runs
            picked = range(file.runs) if indices is None else [i - start for i in indices if start <= i < end]
            if picked:
                yield from file.rows(picked)


@dataclass(frozen=True)
class _Member:
    """Header of one .npy file in the archive; `keep_axis`: the sample axis is the batch axis of the model's input."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    keep_axis: bool = True


@dataclass(frozen=True)
class _Archive:
    """One .npz file: its headers, the number of its samples, and how many of them make a batch."""

    path: Path
    members: Mapping[str, _Member]
    samples: int
    batch: int
    has_labels: bool

    @property
    def runs(self) -> int:
        """Number of complete batches."""
        return self.samples // self.batch

    @staticmethod
    def open(path: Path, inputs: Sequence[InputInfo]) -> _Archive:
        """Read the headers. Raises DataError for what does not fit `inputs`."""
        names = {i.name for i in inputs}
        members: dict[str, _Member] = {}
        with _reading(path), zipfile.ZipFile(path) as archive:
            for name in (entry.removesuffix(".npy") for entry in archive.namelist()):
                if name in names or not name.startswith(IGNORED_PREFIX):
                    with _open_member(archive, name) as stream:
                        members[name] = _header(stream, f"{path}: key {name!r}")
        labels = None if LABELS in names else members.pop(LABELS, None)
        check_names(members, inputs, str(path))
        samples = _sample_count(path, members if labels is None else {**members, LABELS: labels})
        members = {i.name: _placed(path, i, members[i.name]) for i in inputs}
        return _Archive(path, members, samples, _batch(path, members, inputs), labels is not None)

    def rows(self, runs: Sequence[int]) -> Iterator[Row]:
        """The batches numbered `runs` (ascending)."""
        with _reading(self.path), ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(self.path))
            labels = self._read_labels(archive)
            readers = {name: _Reader(stack, archive, name, member) for name, member in self.members.items()}
            for run in runs:
                first = run * self.batch
                feeds = {name: reader.read(first, self.batch) for name, reader in readers.items()}
                label = labels[first : first + self.batch] if labels is not None else None
                yield Row(
                    f"{self.path}: sample {first}",
                    feeds,
                    label if label is None or self.batch > 1 else label[0],
                )

    def _read_labels(self, archive: zipfile.ZipFile) -> Array | None:
        if not self.has_labels:
            return None
        with _open_member(archive, LABELS) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)


class _Reader:
    """Reads ascending samples of one archive member without holding the others."""

    def __init__(self, stack: ExitStack, archive: zipfile.ZipFile, name: str, member: _Member) -> None:
        self._member = member
        self._whole: Array | None = None
        self._stream = stack.enter_context(_open_member(archive, name))
        self._position = 0
        if member.fortran_order:  # a sample's elements lie scattered over the whole member
            self._whole = np.lib.format.read_array(self._stream, allow_pickle=False)
        else:
            _header(self._stream, name)
        self._sample_bytes = math.prod(member.shape[1:]) * member.dtype.itemsize

    def read(self, first: int, count: int) -> Array:
        """Samples `first` to `first + count`, without the sample axis where the model's input has none."""
        if self._whole is not None:
            block = self._whole[first : first + count]
        else:
            self._skip((first - self._position) * self._sample_bytes)
            data = bytearray(self._stream.read(count * self._sample_bytes))
            if len(data) < count * self._sample_bytes:
                raise EOFError("a member ends too early")
            self._position = first + count
            block = np.ndarray((count, *self._member.shape[1:]), self._member.dtype, buffer=data)
        return block if self._member.keep_axis else block[0]

    def _skip(self, count: int) -> None:
        # zipfile reads what it skips, up to 16 MiB at once: in smaller steps the memory stays small.
        for step in range(0, count, SKIP_BYTES):
            self._stream.seek(min(SKIP_BYTES, count - step), 1)


def _open_member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    return archive.open(f"{name}.npy")


def _header(stream: IO[bytes], where: str) -> _Member:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    else:  # version 3 is for structured arrays with field names beyond latin-1, which no model takes
        raise DataError(f"{where}: .npy version {version} is not read; save it with numpy.savez")
    if dtype.hasobject:
        raise DataError(f"{where}: holds Python objects, which would have to be unpickled; save plain numbers")
    return _Member(shape, fortran_order, dtype)


def _sample_count(path: Path, members: Mapping[str, _Member]) -> int:
    counts: dict[str, int] = {}
    for name, member in members.items():
        if not member.shape:
            raise DataError(f"{path}: key {name!r} is a single number; axis 0 must be the sample axis")
        counts[name] = member.shape[0]
    first, samples = next(iter(counts.items()))
    for name, count in counts.items():
        if count != samples:
            raise DataError(f"{path}: {first!r} has {samples} samples and {name!r} has {count}; make them equal")
    if samples == 0:
        raise DataError(f"{path}: holds no sample (axis 0 is empty); give at least one")
    return samples


def _placed(path: Path, info: InputInfo, member: _Member) -> _Member:
    have, want = len(member.shape), None if info.shape is None else len(info.shape)
    if want is not None and have not in (want, want + 1):
        raise DataError(
            f"{path}: key {info.name!r} has shape {member.shape}; the model's input has {want} dimensions, so give it "
            f"{want} (axis 0 is sample and batch axis) or {want + 1} (axis 0 is the sample axis)"
        )
    return replace(member, keep_axis=want is None or have == want)


def _batch(path: Path, members: Mapping[str, _Member], inputs: Sequence[InputInfo]) -> int:
    """How many samples make one batch: the fixed size of axis 0 of those inputs whose batch axis is the sample axis."""
    fixed = {i.name: i.shape[0] for i in inputs if i.shape and members[i.name].keep_axis}
    sizes = {name: size for name, size in fixed.items() if isinstance(size, int)}
    if not sizes:
        return 1
    batch = max(1, *sizes.values())
    if batch > 1 and (set(sizes.values()) != {batch} or not all(m.keep_axis for m in members.values())):
        raise DataError(
            f"{path}: the model's inputs differ in their batch ({sizes}); samples cannot be grouped: "
            f"give arrays of one more axis, one whole feed a sample, or file.py:function"
        )
    return batch


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise DataError(f"{path}: holds something that is no .npy array: {error}; write it with numpy.savez") from error
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as .npz: {error}; write it again with numpy.savez") from error


class OnnxTestSource:
    """Rows of ONNX test data: each directory is one sample, its `input_K.pb` (TensorProto) the K-th input to feed."""

    def __init__(self, directories: Sequence[Path], inputs: Sequence[InputInfo]) -> None:
        self._directories = list(directories)
        self._names = [i.name for i in inputs]
        wanted = {f"input_{k}.pb" for k in range(len(inputs))}
        for directory in self._directories:
            found = {p.name for p in directory.iterdir() if _INPUT_FILE.fullmatch(p.name)}
            if found != wanted:
                odd = min(found ^ wanted)
                raise DataError(
                    f"{directory}: {odd} is {'one too many' if odd in found else 'missing'}; the model has "
                    f"{len(inputs)} inputs to feed, each needs one file, input_0.pb for {self._names[0]!r} and so on"
                )

    @property
    def count(self) -> int | None:
        """Number of directories."""
        return len(self._directories)

    def rows(self, indices: Sequence[int] | None) -> Iterator[Row]:
        """Rows in the order of the directories' numbers."""
        for index in range(len(self._directories)) if indices is None else indices:
            directory = self._directories[index]
            feeds = {name: _read_tensor(directory / f"input_{k}.pb") for k, name in enumerate(self._names)}
            yield Row(str(directory), feeds, None)


_INPUT_FILE = re.compile(r"input_\d+\.pb")
_SET_NAME = re.compile(r"test_data_set_(\d+)")


def find_test_data(directory: Path) -> list[Path]:
    """The ONNX test data sets that `directory` is (one) or holds (in the order of their numbers); or none."""
    if any(_INPUT_FILE.fullmatch(p.name) for p in directory.iterdir()):
        return [directory]
    numbered = [(match, p) for p in directory.iterdir() if (match := _SET_NAME.fullmatch(p.name)) and p.is_dir()]
    return [p for _, p in sorted(numbered, key=lambda item: (int(item[0][1]), item[1].name))]


def _read_tensor(path: Path) -> Array:
    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(path.read_bytes())
        if tensor.data_type == onnx.TensorProto.UNDEFINED:
            raise ValueError("it has no data type")
        return onnx.numpy_helper.to_array(tensor, base_dir=str(path.parent))
    except Exception as error:  # protobuf's and onnx's errors for broken bytes have no common base
        raise DataError(f"{path}: cannot be read as an ONNX TensorProto: {error}") from error
