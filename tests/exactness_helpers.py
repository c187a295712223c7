"""What the tests of exactness share: a model in all formats, and the comparison of every integer tensor."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from int4_files import unpacked
from onnx import ModelProto

from qcompile.certificate import certify
from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph
from qcompile.interpret import Interpreter
from qcompile.passes import passes_for
from qcompile.passes.lower_integer import LowerInteger
from qcompile.passes.lower_qoperator import LowerQOperator
from qcompile.ranges import Observer
from qcompile.runtime import Feeds, Optimisation, Session, runs_signed_conv_integer

MODELS = Path(__file__).resolve().parents[1] / "models"
ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
Ints = npt.NDArray[np.int64]


def both_formats(graph: Graph, context: Context) -> tuple[ModelProto, ModelProto]:
    """The finished Q/DQ model and its quantised-operator form, from one run of the passes."""
    for step in passes_for():
        step.run(graph, context)
    qdq = graph.to_proto()
    context.settings = dataclasses.replace(context.settings, format="qoperator")
    report = LowerQOperator().run(graph, context)
    assert report.rewrites > 0
    return qdq, graph.to_proto()


def integer_form(qoperator: ModelProto) -> ModelProto:
    """The integer format of a finished quantised-operator model; weights are packed behind it, so here they are unpacked."""
    graph = Graph.from_proto(unpacked(qoperator))
    report = LowerInteger().run(graph, Context(Settings(format="integer")))
    assert report.rewrites > 0
    assert certify(graph.to_proto()).integer_only
    return graph.to_proto()


def assert_exact(
    qdq: ModelProto,
    qoperator: ModelProto,
    feeds: Iterable[Feeds],
    outputs: Sequence[str] | None = None,
    integer: ModelProto | None = None,
) -> list[dict[str, Array]]:
    """All outputs (or the tensors `outputs`) equal, in eight ways of running; returns those of the fused Q/DQ model."""
    if outputs is not None:
        qdq, qoperator = ending_in(qdq, outputs), ending_in(qoperator, outputs)
    fused = Session(qdq, threads=1)
    if integer is None and runs_signed_conv_integer():
        integer = integer_form(qoperator)
    interpreters = {
        "interpreter of qdq": Interpreter(qdq),
        "interpreter of qoperator": Interpreter(qoperator),
    }
    others: dict[str, Session | Interpreter] = {
        "qoperator": Session(qoperator, threads=1),
        "qoperator, optimisation off": Session(qoperator, optimisation=Optimisation.OFF, threads=1),
    }
    if integer is not None:
        interpreters["interpreter of integer"] = Interpreter(integer)
        others["integer"] = Session(integer, threads=1)
        others["integer, optimisation off"] = Session(integer, optimisation=Optimisation.OFF, threads=1)
    others.update(interpreters)
    results = []
    for index, feed in enumerate(feeds):
        expected = fused.run(feed)
        for label, other in others.items():
            got = other.run(feed)
            for name, value in expected.items():
                assert got[name].dtype == value.dtype
                assert got[name].shape == value.shape
                differ = int((got[name] != value).sum())
                assert differ == 0, f"input {index}, {name}: {differ} of {value.size} differ between qdq and {label}"
        for label, interpreter in interpreters.items():
            assert interpreter.float_nodes == [], f"{label} computed in float"
        results.append(expected)
    assert results
    return results


def assert_file_exact(path: Path, form: str, feeds: Iterable[Feeds]) -> None:
    """The file equals the integer interpreter in onnxruntime, fused and as far below as `form` is made of integers."""
    reference, fast = Interpreter(path), Session(path)
    # Q/DQ is float arithmetic below the level EXTENDED.
    other = Session(path, optimisation=Optimisation.EXTENDED if form == "qdq" else Optimisation.OFF)
    for feed in feeds:
        for name, expected in reference.run(feed).items():
            assert reference.float_nodes == []
            np.testing.assert_array_equal(fast.run(feed)[name], expected)
            np.testing.assert_array_equal(other.run(feed)[name], expected)


def digits(count: int) -> list[Feeds]:
    """The first labelled digits that ship, one a feed."""
    return [{"input": image[None]} for image in np.load(MODELS / "digits.npz")["input"][:count]]


def ending_in(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """The part of `model` that computes the tensors `names`, which become its outputs."""
    graph = Graph.from_proto(model)
    named = {v.name: v for v in graph.values()}
    graph.outputs = [named[n] for n in names]
    graph.cleanup()
    return with_types(graph.to_proto())


def with_types(model: ModelProto) -> ModelProto:
    """Outputs of unknown type are integer tensors here: uint8 of unknown shape."""
    for output in model.graph.output:
        if not output.type.HasField("tensor_type"):
            output.type.tensor_type.elem_type = onnx.TensorProto.UINT8
    return model


def with_ranges(
    model: ModelProto, ranges: Mapping[str, tuple[float, float]], **settings: Any
) -> tuple[ModelProto, ModelProto, Context]:
    """Through all passes, with `ranges` (tensor -> extremes) for a calibration; nothing is learned, which would move ties."""
    context = Context(Settings(ranges="minmax", effort="fast", bias_correction=False, **settings))
    context.observers = {name: Observer(False, low, high) for name, (low, high) in ranges.items()}
    qdq, qoperator = both_formats(Graph.from_proto(model), context)
    assert context.plan is not None
    for place in context.plan.classes:
        assert place.low < place.high, f"no range was given for {place.tensors}"
    return qdq, qoperator, context


def signed(exponent: int) -> tuple[float, float]:
    """The range with scale 2^exponent and zero point 128."""
    return -128 * 2.0**exponent, 127 * 2.0**exponent


def unsigned(exponent: int) -> tuple[float, float]:
    """The range with scale 2^exponent and zero point 0."""
    return 0.0, 255 * 2.0**exponent


def integer_weights(rng: np.random.Generator, shape: tuple[int, ...], channel_axis: int, most: int) -> Ints:
    """Random integers up to `most` with one 127 a channel (it pins the channel's scale), neighbours never saturating a pair."""
    matrix = rng.integers(-most, most + 1, (shape[channel_axis], int(np.prod(shape)) // shape[channel_axis]))
    matrix[np.arange(len(matrix)), rng.integers(0, matrix.shape[1], len(matrix))] = rng.choice([-127, 127], len(matrix))
    rest = [d for i, d in enumerate(shape) if i != channel_axis]
    weights = np.moveaxis(matrix.reshape(shape[channel_axis], *rest), 0, channel_axis)
    assert most == 1  # 127 + 1 = 128, the pair rule's limit
    return weights


def tie_feed(rng: np.random.Generator, shape: Sequence[int], exponent: int, low: int, high: int) -> Array:
    """Small multiples of the scale, with the ends of the range among them."""
    integers = rng.integers(low, high + 1, shape)
    ends = rng.random(shape) < 0.02
    return np.asarray(np.where(ends, rng.choice([-128, 127, 255], shape), integers) * 2.0**exponent, np.float32)


def zoo_tasks() -> ModuleType:
    if not (ZOO / "tasks.py").exists():
        pytest.skip(f"{ZOO} is absent")
    spec = importlib.util.spec_from_file_location("zoo_tasks", ZOO / "tasks.py")
    assert spec is not None and spec.loader is not None
    tasks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tasks)
    return tasks
