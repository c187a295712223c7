"""Whether a converted model still computes what the original file computes: both run in onnxruntime on random input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from qcompile.errors import ModelError
from qcompile.graph import Graph
from qcompile.graph_io import write_model
from qcompile.runtime import Array, Optimisation, Session

_IN_MEMORY = 2**31 - 2**24
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
# Sizes tried for open dimensions: (batch, height and width, any other). The first that the original runs with is used.
_SIZES = ((2, 32, 8), (1, 224, 16), (1, 64, 1), (1, 1, 1), (1, 320, 128))


def compare_models(original: Path, graph: Graph, tolerance: float) -> str | None:
    """Run both on one random feed; None where the outputs agree, a note where no comparison was possible.

    Agreement: |difference| <= tolerance * max |output| for each floating output, equality for all others. Raises ModelError
    where the graph does not load or the outputs differ, naming the output.
    """
    if any(n.op in _RANDOM for n in graph.nodes):
        return "conversion not checked by running: the model draws random numbers"
    if sum(c.nbytes for c in graph.constants.values()) >= _IN_MEMORY:
        return "conversion not checked by running: the model is over 2 GiB"
    before = Session(original, optimisation=Optimisation.OFF, label="the original")
    after = Session(write_model(graph, embed=True), optimisation=Optimisation.OFF, label="the converted model")
    for feeds in _feeds(graph):
        try:
            expected = before.run(feeds)
        except ModelError:
            continue  # sizes that do not suit the model: the next ones may
        found = after.run(feeds)
        for name, value in expected.items():
            _require_close(name, value, found[name], tolerance)
        return None
    return "conversion not checked by running: no random input suits the model"


def _require_close(name: str, expected: Array, found: Array, tolerance: float) -> None:
    same = expected.shape == found.shape and expected.dtype == found.dtype
    if same and expected.dtype.kind in "fV":
        left, right = expected.astype(np.float64), found.astype(np.float64)
        finite = np.isfinite(left)
        same = bool(np.array_equal(left[~finite], right[~finite], equal_nan=True))
        peak = float(np.max(np.abs(left[finite]), initial=0.0))
        same = same and bool(np.all(np.abs(left[finite] - right[finite]) <= tolerance * peak))
    elif same:
        same = bool(np.array_equal(expected, found))
    if not same:
        raise ModelError(f"output '{name}' differs after opset conversion; export the model with opset 21 and report this")


def _feeds(graph: Graph) -> Iterator[Mapping[str, Array]]:
    for batch, size, other in _SIZES:
        random = np.random.default_rng(0)
        named: dict[str, int] = {}
        feeds: dict[str, Array] = {}
        for value in graph.inputs:
            dims = value.dims
            if dims is None or value.elem_type in (TensorProto.UNDEFINED, TensorProto.STRING):
                return
            shape = []
            for axis, dim in enumerate(dims):
                open_size = batch if axis == 0 else size if len(dims) == 4 and axis >= 2 else other
                if isinstance(dim, int):
                    shape.append(dim)
                else:
                    shape.append(named.setdefault(dim, open_size) if dim is not None else open_size)
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(value.elem_type))
            if dtype.kind in "biu":
                feeds[value.name] = random.integers(0, 2, shape).astype(dtype)
            else:
                feeds[value.name] = random.standard_normal(shape).astype(dtype)
        yield feeds
        if not any(isinstance(d, str) or d is None for v in graph.inputs for d in v.dims or ()):
            return
