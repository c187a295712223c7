"""What one run of a model is fed with, and the check that data fit the model's inputs.

Nothing here reads files: the readers are `data_sources`, `data_callable` and `images`; `data` ties them together.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import onnx

from qcompile.errors import DataError, ModelError
from qcompile.runtime import Array, Feeds

Dimension: TypeAlias = int | str | None
Label: TypeAlias = int | Array | None


@dataclass(frozen=True)
class InputInfo:
    """One input of a model. `shape` entries: a fixed size, a symbolic name, or None (unknown); no shape: unknown rank."""

    name: str
    shape: tuple[Dimension, ...] | None
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Sample:
    """What one run of the model takes (batch axis included as the model expects), and the true answer where known.

    `label` is a class number; an array where there are several (a batch) or where it is no class; None: unlabelled.
    """

    feeds: dict[str, Array]
    label: Label


class Row(NamedTuple):
    """One sample as a source gives it, not yet checked; `origin` says in messages where it came from."""

    origin: str
    feeds: Feeds
    label: object


class Source(Protocol):
    """Where rows come from. `count` is None where only running it tells how many there are."""

    @property
    def count(self) -> int | None:
        """Number of rows, or None."""

    def rows(self, indices: Sequence[int] | None) -> Iterator[Row]:
        """Rows in source order; all, or those at ascending `indices` (only where `count` is known)."""


def model_inputs(model: onnx.ModelProto) -> list[InputInfo]:
    """Inputs that a caller must feed, in graph order: graph inputs without those that an initializer gives.

    A negative size (older exporters) is unknown. Raises ModelError for inputs that are no tensors.
    """
    graph = model.graph
    given = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    return [_input_info(value) for value in graph.input if value.name not in given]


def _input_info(value: onnx.ValueInfoProto) -> InputInfo:
    kind = value.type.WhichOneof("value")
    tensor = value.type.tensor_type
    if kind != "tensor_type" or tensor.elem_type == onnx.TensorProto.UNDEFINED:
        what = (kind or "untyped").removesuffix("_type")
        raise ModelError(f"input {value.name!r} is no typed tensor but {what}; only tensor inputs can be fed")
    shape = tuple(_dimension(d) for d in tensor.shape.dim) if tensor.HasField("shape") else None
    return InputInfo(value.name, shape, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))


def _dimension(dim: onnx.TensorShapeProto.Dimension) -> Dimension:
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value >= 0 else None
    return dim.dim_param or None


def closest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `names`, or the empty text where none is near."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def check_names(names: Iterable[str], inputs: Sequence[InputInfo], origin: str) -> None:
    """Raise DataError where `names` are not exactly the names of `inputs`."""
    given = list(names)
    wanted = [i.name for i in inputs]
    unknown = [n for n in given if n not in wanted]
    missing = [n for n in wanted if n not in given]
    known = ", ".join(map(repr, wanted)) or "none"
    if unknown:
        hint = closest(str(unknown[0]), missing or wanted)
        raise DataError(f"{origin}: {unknown[0]!r} is no input of the model (its inputs: {known}){hint}")
    if missing:
        raise DataError(f"{origin}: input {missing[0]!r} of the model is missing; give data for each of {known}")


def conform(feeds: Mapping[str, object], inputs: Sequence[InputInfo], origin: str) -> dict[str, Array]:
    """`feeds` as arrays of the model's shapes and dtypes, in the model's order.

    Value-preserving conversions are made: integers to any type that holds their values exactly, floats to a narrower
    float (rounded). A float is never made an integer. Raises DataError, naming `origin` and the input, for unknown or
    missing names, a wrong rank, a wrong fixed dimension, a wrong dtype, an empty batch, NaN and infinity.
    Symbolic dimensions take any size, also different sizes in two inputs.
    """
    check_names(feeds, inputs, origin)
    return {info.name: _fit(feeds[info.name], info, f"{origin}: input {info.name!r}") for info in inputs}


def _fit(value: object, info: InputInfo, where: str) -> Array:
    try:
        array: Array = np.asarray(value)
    except Exception as error:  # whatever a foreign array type raises on its way to numpy
        raise DataError(f"{where}: a {type(value).__name__} cannot be made an array: {error}") from error
    _check_shape(array, info, where)
    converted = _convert(array, info.dtype, where)
    if _kind(info.dtype) == "float" and not np.isfinite(converted).all():
        raise DataError(f"{where}: {_not_finite(array, info.dtype)}; clean the data first")
    return converted


def _not_finite(array: Array, dtype: np.dtype[Any]) -> str:
    if np.isfinite(array).all():
        return f"values up to {np.abs(array).max():.3g} do not fit {dtype}"
    count = array.size - int(np.isfinite(array).sum())
    return f"{count} of {array.size} values are NaN or infinite"


def _check_shape(array: Array, info: InputInfo, where: str) -> None:
    if array.ndim and array.shape[0] == 0 and not (info.shape and info.shape[0] == 0):
        raise DataError(f"{where}: it is empty (shape {array.shape}); give at least one sample")
    if info.shape is None:
        return
    wanted = "(" + ", ".join("?" if d is None else str(d) for d in info.shape) + ")"
    if array.ndim != len(info.shape):
        hint = "; add the batch axis" if array.ndim == len(info.shape) - 1 else ""
        raise DataError(f"{where}: has shape {array.shape}, the model wants {wanted}: wrong rank{hint}")
    wrong = [a for a, (got, d) in enumerate(zip(array.shape, info.shape, strict=True)) if d != got and isinstance(d, int)]
    if wrong:
        swapped = len(info.shape) == 4 and sorted(map(str, array.shape[1:])) == sorted(map(str, info.shape[1:]))
        hint = "; transpose it, NCHW and NHWC look swapped" if swapped else ""
        raise DataError(f"{where}: has shape {array.shape}, the model wants {wanted}: wrong axis {wrong[0]}{hint}")


def _kind(dtype: np.dtype[Any]) -> str:
    """`float`, `int`, `bool`, `text` or `other`; bfloat16 and the 8-bit floats are floats here (numpy calls them void)."""
    if dtype.kind in "iu" or dtype.name.startswith(("int", "uint")):
        return "int"
    if dtype.kind == "f" or dtype.name.startswith(("bfloat", "float")):
        return "float"
    return {"b": "bool", "U": "text", "S": "text", "O": "text"}.get(dtype.kind, "other")


def _convert(array: Array, dtype: np.dtype[Any], where: str) -> Array:
    if array.dtype == dtype:
        return array
    have, want = _kind(array.dtype), _kind(dtype)
    if (have, want) in {("float", "float"), ("text", "text")} or (have == "bool" and want in ("int", "float")):
        with np.errstate(over="ignore"):  # an overflow is reported by the caller, as a value that does not fit
            return array.astype(dtype)
    limits = _exact_integers(dtype)
    if have != "int" or limits is None:
        raise DataError(f"{where}: has dtype {array.dtype}, the model wants {dtype}; convert the data")
    if array.size and (int(array.min()) < limits[0] or int(array.max()) > limits[1]):
        span = f"{array.min()}..{array.max()}"
        raise DataError(f"{where}: {array.dtype} values {span} do not fit {dtype} exactly ({limits[0]}..{limits[1]})")
    return array.astype(dtype)


def _exact_integers(dtype: np.dtype[Any]) -> tuple[int, int] | None:
    """The range in which `dtype` holds every integer exactly; None where integers are not converted to it."""
    if dtype.kind in "iu":
        return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    if dtype.kind == "f":
        bound = 2 ** (int(np.finfo(dtype).nmant) + 1)
        return -bound, bound
    return (0, 1) if dtype.kind == "b" else None


def as_label(value: object, origin: str) -> Label:
    """A label in its normal form: one integer (also in an array of one element) is an int, all other numbers an array."""
    if value is None:
        return None
    try:
        array: Array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"{origin}: the label cannot be made an array: {error}") from error
    if array.dtype.kind not in "iufb" or array.size == 0:
        raise DataError(f"{origin}: label {value!r} is not a number; give the class number or an array of numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{origin}: the label holds NaN or infinity; clean the data first")
    if array.size == 1 and array.ndim <= 1 and array.dtype.kind in "iu":
        return operator.index(array.reshape(-1)[0])
    return array
