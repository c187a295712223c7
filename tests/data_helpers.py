"""What tests of datasets share: inputs of a model, and files that are quickly written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qcompile.data import Dataset, InputInfo

F32 = np.dtype(np.float32)
X = InputInfo("x", ("N", 3), F32)


def info(shape: tuple[int | str | None, ...] | None, dtype: Any = np.float32, name: str = "x") -> InputInfo:
    return InputInfo(name, shape, np.dtype(dtype))


def save(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def rows(count: int, *inner: int) -> Any:
    return np.arange(count * int(np.prod(inner)), dtype=np.float32).reshape(count, *inner)


def labels_of(data: Dataset) -> list[Any]:
    return [s.label for s in data]
