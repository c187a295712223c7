"""Constants of a model: TensorProtos held as they came, read one at a time, from memory or from an external file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, external_data_helper, numpy_helper

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


def with_data(proto: TensorProto, directory: Path) -> TensorProto:
    """A copy of an external `proto` that holds its own bytes (raw_data)."""
    info = external_data_helper.ExternalDataInfo(proto)
    path = directory / info.location
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ModelError(
            f"initializer '{proto.name}': its data lie outside the model's folder ({info.location}); move them there"
        )
    if not path.is_file():
        raise ModelError(f"initializer '{proto.name}': data file {path} is missing; put it beside the model")
    offset = int(info.offset or 0)
    length = int(info.length) if info.length is not None else path.stat().st_size - offset
    with path.open("rb") as file:
        file.seek(offset)
        raw = file.read(length)
    if len(raw) != length:
        raise ModelError(f"initializer '{proto.name}': {path} is too short; the download may be truncated")
    own = TensorProto()
    own.CopyFrom(proto)
    del own.external_data[:]
    own.data_location = TensorProto.DEFAULT
    own.raw_data = raw
    return own


def byte_size(proto: TensorProto) -> int:
    """Bytes of the values, computed from shape and type: nothing is read."""
    count = int(np.prod(proto.dims, dtype=np.int64)) if proto.dims else 1
    bits = _BITS.get(proto.data_type)
    if bits is None:
        return int(proto.ByteSize())
    return (count * bits + 7) // 8


def _bits() -> dict[int, int]:
    four = {TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1}
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
