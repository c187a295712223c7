"""Constants of a model: TensorProtos held as they came, read one at a time, from memory or from an external file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from qcompile.errors import ModelError

Array = npt.NDArray[Any]


def is_external(proto: TensorProto) -> bool:
    """Whether the bytes of `proto` stand in another file."""
    return proto.data_location == TensorProto.EXTERNAL


def read_tensor(proto: TensorProto, directory: Path) -> Array:
    """The values of `proto`; external data are looked for in `directory`. INT4, BF16 and FP8 come as ml_dtypes arrays.

    Raises ModelError naming the tensor where the bytes are missing or too few.
    """
    if is_external(proto):
        proto = with_data(proto, directory)
    try:
        return numpy_helper.to_array(proto)
    except (ValueError, TypeError) as error:
        raise ModelError(f"initializer '{proto.name}' cannot be read: {error}; export the model again") from error


def location(proto: TensorProto) -> str:
    """The file name that an external `proto` gives, relative to the model's folder."""
    return next((e.value for e in proto.external_data if e.key == "location"), "")


def with_data(proto: TensorProto, directory: Path) -> TensorProto:
    """A copy of an external `proto` that holds its own bytes (raw_data); only the bytes of this tensor are read.

    Raises ModelError where the file is missing, too short or outside `directory`.
    """
    path = directory / location(proto)
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ModelError(
            f"initializer '{proto.name}': its data lie outside the model's folder ({location(proto)}); move them there"
        )
    if not path.is_file():
        raise ModelError(f"initializer '{proto.name}': data file {path} is missing; put it beside the model")
    try:
        entries = {e.key: int(e.value) for e in proto.external_data if e.key in ("offset", "length")}
    except ValueError as error:
        raise ModelError(f"initializer '{proto.name}': its external offset or length is no number; export it again") from error
    offset = entries.get("offset", 0)
    length = entries.get("length", path.stat().st_size - offset)
    if offset < 0 or length < 0 or offset + length > path.stat().st_size:
        raise ModelError(f"initializer '{proto.name}': {path} is too short; the download may be truncated")
    own = TensorProto(name=proto.name, data_type=proto.data_type, dims=proto.dims)
    if proto.HasField("doc_string"):
        own.doc_string = proto.doc_string
    if hasattr(proto, "metadata_props"):
        own.metadata_props.extend(proto.metadata_props)
    try:
        with path.open("rb") as file:
            file.seek(offset)
            own.raw_data = file.read(length)
    except OSError as error:
        raise ModelError(f"initializer '{proto.name}': {path} cannot be read ({error.strerror}); check it") from error
    return own


def raw_bytes(proto: TensorProto) -> bytes:
    """The values of a non-string `proto` that holds them itself, as little-endian raw_data."""
    if proto.HasField("raw_data"):
        return proto.raw_data
    return numpy_helper.from_array(numpy_helper.to_array(proto)).raw_data


def byte_size(proto: TensorProto) -> int:
    """Bytes of the values, computed from shape and type: nothing is read."""
    count = int(np.prod(proto.dims, dtype=np.int64)) if proto.dims else 1
    bits = _BITS.get(proto.data_type)
    if bits is None:
        return int(proto.ByteSize())
    return (count * bits + 7) // 8


def _bits() -> dict[int, int]:
    four = {getattr(TensorProto, name) for name in ("INT4", "UINT4", "FLOAT4E2M1") if hasattr(TensorProto, name)}
    two = {getattr(TensorProto, name) for name in ("INT2", "UINT2") if hasattr(TensorProto, name)}
    table: dict[int, int] = {}
    for _, code in TensorProto.DataType.items():
        if code in four:
            table[code] = 4
        elif code in two:
            table[code] = 2
        elif code not in (TensorProto.UNDEFINED, TensorProto.STRING):
            table[code] = 8 * onnx.helper.tensor_dtype_to_np_dtype(code).itemsize
    return table


_BITS = _bits()
