"""The onnx package's own backend tests as (name, model, first data set), with what onnxruntime makes of a model."""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import ModelProto

from qcompile.errors import ModelError
from qcompile.runtime import Optimisation, Session

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
CHUNKS = 16


class Case(NamedTuple):
    name: str
    model: ModelProto
    inputs: list[Any]


class Outcome(NamedTuple):
    stage: str  # "load" or "run" where it failed there, else "done"
    values: list[Any]


@lru_cache(maxsize=1)
def all_cases() -> list[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's overflow and division warnings while the package makes its data
        from onnx.backend.test.loader import load_model_tests

        found = [case for kind in KINDS for case in load_model_tests(kind=kind)]
        return [_case(case) for case in found]


def chunk(index: int) -> list[Case]:
    return all_cases()[index::CHUNKS]


def _case(case: Any) -> Case:
    if case.model is not None:
        return Case(case.name, case.model, list(case.data_sets[0][0]) if case.data_sets else [])
    folder = Path(case.model_dir)
    model = onnx.load(str(folder / "model.onnx"))
    inputs = []
    for path in sorted((folder / "test_data_set_0").glob("input_*.pb"), key=lambda p: int(p.stem.split("_")[1])):
        tensor = onnx.TensorProto()
        tensor.ParseFromString(path.read_bytes())
        inputs.append(onnx.numpy_helper.to_array(tensor))
    return Case(case.name, model, inputs)


def outcome(model: ModelProto, inputs: list[Any]) -> Outcome:
    try:
        session = Session(model, optimisation=Optimisation.OFF, threads=1)
    except ModelError:
        return Outcome("load", [])
    feeds = dict(zip(session.input_names, inputs, strict=False))
    try:
        # The raw session: sequences and optionals come out as lists and None, which `Session.run` does not offer.
        return Outcome("done", session._session.run(None, feeds))
    except Exception:
        return Outcome("run", [])


def equal(left: Any, right: Any, rtol: float = 0.0) -> bool:
    if isinstance(left, list) or isinstance(right, list):
        both = isinstance(left, list) and isinstance(right, list) and len(left) == len(right)
        return both and all(equal(a, b, rtol) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict) or left is None or isinstance(right, dict) or right is None:
        return bool(left == right)
    a, b = np.asarray(left), np.asarray(right)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind != "f":
        return a.tobytes() == b.tobytes() if a.dtype.kind != "O" else bool(np.all(a == b))
    if rtol == 0.0:
        return np.array_equal(a, b, equal_nan=True)
    return np.allclose(a, b, rtol=rtol, atol=rtol, equal_nan=True)
