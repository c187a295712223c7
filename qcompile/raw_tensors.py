"""Tensors as raw little-endian bytes beside a JSON record: what a loader in any language reads without a library."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.errors import InputError
from qcompile.runtime import Array

#: Element types that every loader knows.
TYPES = ("bool", "float32", "float64", "int8", "int32", "int64", "uint8", "uint32")


def write_tensors(folder: Path, tensors: Mapping[str, Array], prefix: str) -> list[dict[str, Any]]:
    """One file `PREFIX_<index>.bin` a tensor; returns {"name", "type", "dims", "file", "sha256"} of each, in order.

    Raises InputError for an element type that loaders do not know.
    """
    records = []
    for index, (name, array) in enumerate(tensors.items()):
        if array.dtype.name not in TYPES:
            raise InputError(f"tensor '{name}' is {array.dtype.name}; a sample holds only {', '.join(TYPES)}")
        stored = np.ascontiguousarray(array)
        data = (stored if sys.byteorder == "little" else stored.byteswap()).tobytes()
        file = f"{prefix}_{index}.bin"
        (folder / file).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        records.append({"name": name, "type": array.dtype.name, "dims": list(array.shape), "file": file, "sha256": digest})
    return records
