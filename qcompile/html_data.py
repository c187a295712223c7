"""What the HTML report shows beyond the JSON report: layers, histograms of the worst, operators, samples that changed most.

All is read from the two files and measured on them, so it works for any two models of one origin.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from qcompile.accuracy import class_output, classes_of
from qcompile.bench import OperatorTime, operator_times
from qcompile.check import Progress, made_up_feeds, paired_inputs
from qcompile.data import Dataset
from qcompile.diff import diff_models
from qcompile.errors import DataError, ModelError
from qcompile.integer_outputs import DequantisedOutputs
from qcompile.model_file import read_model
from qcompile.runtime import Array, Optimisation, Session
from qcompile.samples import Sample
from qcompile.wiring import bits

_WORST = 3
_SEARCHED = 500  # samples among which those that changed most are looked for
_BINS = 128
_LINEAR = {"Conv": (0, 1), "Gemm": (0, 1), "MatMul": (0, 1), "QLinearConv": (0, 3), "QLinearMatMul": (0, 3), "QGemm": (0, 3)}


@dataclass(frozen=True)
class Layer:
    """One layer in graph order: how far its output is from the float model's (dB; None: no error), and what it adds by itself."""

    name: str
    op: str
    sqnr_db: float | None
    own_db: float | None


@dataclass(frozen=True)
class Histogram:
    """Stored integers as the values that they stand for: bin edges, counts; low and high are the ends of the range."""

    title: str
    edges: Array
    counts: Array
    low: float
    high: float
    note: str


@dataclass(frozen=True)
class WorstLayer:
    """A layer with its histograms: weights and input, as far as the file tells."""

    layer: Layer
    histograms: tuple[Histogram, ...]


@dataclass(frozen=True)
class WorstSample:
    """A sample that changed most: its number, its error / signal in dB, both outputs (flat), the largest classes of both."""

    index: int
    sqnr_db: float | None
    label: str
    outputs: tuple[Array, Array]
    classes: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class Details:
    """Everything that is gathered. notes: what could not be, and why."""

    layers: tuple[Layer, ...]
    worst: tuple[WorstLayer, ...]
    operators: tuple[tuple[OperatorTime, ...], tuple[OperatorTime, ...]]
    bytes_by_operator: tuple[dict[str, int], dict[str, int]]
    samples: tuple[WorstSample, ...]
    notes: tuple[str, ...]


def gather(
    float_model: str | Path,
    quantised: str | Path,
    dataset: Dataset | None,
    layers: Sequence[Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> Details:
    """Read and measure both files. layers: the diagnosis of a compilation, in place of a comparison of the two files.

    What does not apply to these models is left out with a note; ModelError and DataError where they cannot be run at all.
    """
    paths = Path(float_model), Path(quantised)
    inputs, convert = paired_inputs(*paths)
    notes = []
    samples = [] if dataset is None else list(islice(dataset, 1))
    try:
        feeds = samples[0].feeds if samples else made_up_feeds(inputs)
    except DataError as error:
        return Details((), (), ((), ()), _sizes(paths), (), (f"nothing could be run: {error}",))
    both = feeds, convert(feeds) if convert is not None else feeds
    if layers is not None:
        found = [Layer(entry["node"], entry["op"], entry["sqnr_out_db"], entry["own_db"]) for entry in layers]
    elif dataset is None:
        found = []
        notes.append("layers were not compared: there are no samples")
    else:
        try:
            points = diff_models(*paths, dataset, progress=progress).points
            found = [Layer(p.layer, p.op, p.sqnr_db, p.own_db) for p in points]
        except ModelError as error:
            found = []
            notes.append(f"layers were not compared: {error}")
    worst = []
    order = sorted((x for x in found if x.own_db is not None), key=lambda layer: layer.own_db or 0.0)
    for layer in order[:_WORST]:
        worst.append(WorstLayer(layer, tuple(_histograms(paths[1], layer.name, both[1]))))
    if progress is not None:
        progress("operators", 0, None)
    operators = tuple(operator_times(p, f) for p, f in zip(paths, both, strict=True))
    changed = () if dataset is None else tuple(_worst_samples(paths, dataset, convert, progress))
    return Details(tuple(found), tuple(worst), (tuple(operators[0]), tuple(operators[1])), _sizes(paths), changed, tuple(notes))


def _histograms(path: Path, name: str, feeds: Mapping[str, Array]) -> Iterator[Histogram]:
    """Of the weights and the input of the node that has this name in the quantised file."""
    try:
        model = onnx.load(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read with its external data ({error})") from error
    constants = {t.name: t for t in model.graph.initializer}
    makers = {o: n for n in model.graph.node for o in n.output}
    node = next((n for n in model.graph.node if n.name == name and n.op_type in _LINEAR), None)
    if node is None:
        return
    data, weight = (_stored(node, place, makers) for place in _LINEAR[node.op_type])
    if weight is not None and weight[0] in constants and weight[1] in constants:
        integers = numpy_helper.to_array(constants[weight[0]]).astype(np.int64)
        top = 7 if constants[weight[0]].data_type in (TensorProto.INT4, TensorProto.UINT4) else 127
        edges = np.arange(-top - 1, top + 2) - 0.5
        counts, _ = np.histogram(integers, bins=edges)
        saturated = float((np.abs(integers) >= top).mean())
        note = f"{integers.size} weights as stored integers; {100 * saturated:.2f} % at an end"
        yield Histogram("weights", edges, counts, -top, top, note)
    if data is None or data[1] not in constants:
        return
    scale = float(numpy_helper.to_array(constants[data[1]]).reshape(-1)[0])
    zero = int(numpy_helper.to_array(constants[data[2]]).reshape(-1)[0]) if data[2] in constants else 0
    if data[0] not in {o.name for o in model.graph.output}:
        model.graph.output.add(name=data[0])
    session = Session(model, optimisation=Optimisation.OFF, label=str(path), fuse_qdq=False)
    values = session.run({n: feeds[n] for n in session.input_names}, [data[0]])[data[0]]
    if values.dtype.kind not in "iu":
        return
    low, high = int(np.iinfo(values.dtype).min), int(np.iinfo(values.dtype).max)
    edges = (np.linspace(low - 0.5, high + 0.5, _BINS + 1) - zero) * scale
    counts, _ = np.histogram((values.astype(np.float64) - zero) * scale, bins=edges)
    ends = float(np.isin(values, [end for end in (low, high) if end != zero]).mean())  # an end that stands for 0 cuts nothing
    note = f"input on one sample; {100 * ends:.2f} % at an end of the range"
    yield Histogram("input", edges, counts, (low - zero) * scale, (high - zero) * scale, note)


def _stored(node: onnx.NodeProto, place: int, makers: Mapping[str, onnx.NodeProto]) -> tuple[str, str, str] | None:
    """(integers, scale, zero point) of an operand: beside it in operators of integers, else at the DequantizeLinear before."""
    if node.op_type.startswith("Q"):
        return node.input[place], node.input[place + 1], node.input[place + 2]
    before = makers.get(node.input[place])
    if before is None or before.op_type != "DequantizeLinear":
        return None
    widened = makers.get(before.input[0])
    integers = widened.input[0] if widened is not None and widened.op_type == "Cast" else before.input[0]
    return integers, before.input[1], before.input[2] if len(before.input) > 2 else ""


def _sizes(paths: tuple[Path, Path]) -> tuple[dict[str, int], dict[str, int]]:
    first, second = (_bytes_by_operator(path) for path in paths)
    return first, second


def _bytes_by_operator(path: Path) -> dict[str, int]:
    """Bytes of constants by the operator that reads them, quantisation and casts skipped."""
    graph = read_model(path).graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: Counter[str] = Counter()
    for tensor in graph.initializer:
        reader = next(iter(readers.get(tensor.name, [])), None)
        while reader is not None and reader.op_type in ("DequantizeLinear", "Cast") and readers.get(reader.output[0]):
            reader = readers[reader.output[0]][0]
        size = int(np.prod(tensor.dims, dtype=np.int64)) * bits(tensor.data_type) // 8
        found["unread" if reader is None else reader.op_type] += size
    return dict(found.most_common())


def _worst_samples(paths: tuple[Path, Path], dataset: Dataset, convert: Any, progress: Progress | None) -> Iterator[WorstSample]:
    """The samples with the largest error / signal of the first float output among the first `_SEARCHED`."""
    float_session = Session(paths[0], label=str(paths[0]))
    session = DequantisedOutputs(Session(paths[1], label=str(paths[1])), read_model(paths[1]))
    kept: list[tuple[float, int, Sample, Mapping[str, Array], Mapping[str, Array], str]] = []
    for index, sample in enumerate(islice(dataset, _SEARCHED)):
        if progress is not None:
            progress("samples", index, None)
        before: Mapping[str, Array] = float_session.run(sample.feeds)
        after: Mapping[str, Array] = session.run(convert(sample.feeds) if convert is not None else sample.feeds)
        name = class_output(before, labelled=True, feeds=sample.feeds)
        name = name or next((n for n, a in before.items() if a.dtype.kind == "f"), None)
        if name is None or before[name].dtype.kind != "f":
            return
        a, b = before[name].astype(np.float64), after[name].astype(np.float64)
        signal = float(np.square(a[np.isfinite(a)]).sum())
        noise = float(np.square((a - b)[np.isfinite(a)]).sum())
        kept.append((noise / max(signal, 1e-30), index, sample, before, after, name))
        kept = sorted(kept, key=lambda entry: (-entry[0], entry[1]))[:_WORST]
    for share, index, sample, before, after, name in kept:
        if share == 0:
            continue
        yield WorstSample(
            index,
            -10 * float(np.log10(share)),
            "" if sample.label is None else str(sample.label),
            (before[name].reshape(-1), after[name].reshape(-1)),
            tuple(_classes(before[name], after[name])) if class_output(before, labelled=True, feeds=sample.feeds) == name else (),
        )


def _classes(before: Array, after: Array) -> Iterator[tuple[int, float, float]]:
    """(class, float, quantised) of the largest values of either in the first row."""
    a, b = classes_of(before)[0], classes_of(after)[0]
    shown = list(dict.fromkeys([*np.argsort(-a, kind="stable")[:3].tolist(), *np.argsort(-b, kind="stable")[:3].tolist()]))
    for index in shown:
        yield index, float(a[index]), float(b[index])
