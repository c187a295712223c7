"""The acceptance of DESIGN section 3: the same bits from `qdq` (fused), `qoperator`, `integer` and the interpreter.

Small models run through the passes with ranges chosen such that many sums lie exactly half-way between two integers: random
data have almost no ties. Real models run on 3 inputs, or on 50 where QCOMPILE_FULL=1.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import ModelProto, numpy_helper
from passes_helpers import parse
from runtime_marks import needs_conv_integer
from test_pack_int4 import unpacked

from qcompile.certificate import certify
from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph, Value
from qcompile.interpret import Interpreter
from qcompile.load import load_model
from qcompile.passes import passes_for
from qcompile.passes.lower_integer import LowerInteger
from qcompile.passes.lower_qoperator import LowerQOperator
from qcompile.pipeline import compile_model
from qcompile.ranges import Observer
from qcompile.runtime import Feeds, Optimisation, Session, runs_signed_conv_integer

MODELS = Path(__file__).resolve().parents[1] / "models"
ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
FULL = os.environ.get("QCOMPILE_FULL") == "1"
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


def integer_tensors(model: ModelProto) -> list[str]:
    """Names of all integer activations of a quantised-operator model: what its nodes read beside constants."""
    graph = Graph.from_proto(model)
    found: list[str] = []
    for node in graph.nodes:
        for value in node.inputs:
            if isinstance(value, Value) and value.producer is not None and value.producer.op != "DequantizeLinear":
                found.append(value.name)
    return list(dict.fromkeys(n for n in found if n))


# --- ties: models whose ranges make every scale a power of two ------------------------------------------------


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


def constants(model: ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def node_of(model: ModelProto, op: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(n for n in model.graph.node if n.op_type == op)
    return found


def half_even(acc: Ints, multiplier: Array, zero_point: int) -> tuple[Array, float]:
    """Round acc * M half to even in integers: the uint8 values, and the share of exact ties among all that do not saturate."""
    b = np.asarray(multiplier, np.float64) * 65536
    assert np.array_equal(b, np.rint(b)), "a multiplier is not b / 2^16"
    quotient, rest = np.divmod(acc * b.astype(np.int64), 65536)
    tie = rest == 32768
    rounded = quotient + ((rest > 32768) | (tie & (quotient % 2 == 1))) + zero_point
    inside = (rounded > 0) & (rounded < 255)
    return np.clip(rounded, 0, 255).astype(np.uint8), float((tie & inside).mean())


def convolve(x: Ints, w: Ints, group: int) -> Ints:
    """Convolution of padded `x` [N, C, H, W] with `w` [M, C/group, kh, kw], stride 1, no padding."""
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=(2, 3))
    xs, ws = np.split(windows, group, axis=1), np.split(w, group, axis=0)
    return np.concatenate([np.einsum("nchwij,mcij->nmhw", a, b) for a, b in zip(xs, ws, strict=True)], axis=1)


KINDS = {"dense_3x3": (4, 4, 3, 1), "dense_1x1": (16, 8, 1, 1), "depthwise_3x3": (8, 1, 3, 8), "grouped_3x3": (8, 2, 3, 4)}


@pytest.mark.parametrize("source", ["signed", "unsigned"])
@pytest.mark.parametrize("result", ["signed", "relu"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_ties_of_convolutions(kind: str, source: str, result: str) -> None:
    rng = np.random.default_rng(7)
    channels, depth, size, group = KINDS[kind]
    integers = integer_weights(rng, (channels, depth, size, size), 0, 1)
    # Sw = 2^-7 .. 2^-10 and 3 * 2^-9 (M = 3/4 * 2^-1): multipliers 1/2, 1/4, 1/8, 3/8
    scales = np.resize([2.0**-7, 2.0**-8, 2.0**-9, 3 * 2.0**-9], channels)
    offset = rng.integers(-9, 10, channels)
    model = parse(
        f"""g (float[N, {depth * group}, 9, 9] x) => (float[N, {channels}, p, p] y) {{
            c = Conv<group: int = {group}, pads: ints = [{size // 2}, {size // 2}, {size // 2}, {size // 2}]>(x, w, b)
            y = {"Relu" if result == "relu" else "Identity"}(c)
        }}""",
        w=(integers * scales.reshape(-1, 1, 1, 1)).astype(np.float32),
        b=(offset * scales * 2.0**-4).astype(np.float32),
    )
    ends = signed(-10) if result == "signed" else unsigned(-10)
    qdq, qoperator, _ = with_ranges(model, {"x": signed(-4) if source == "signed" else unsigned(-4), "y": ends, "c": ends})
    feed = {"x": tie_feed(rng, (3, depth * group, 9, 9), -4, -3 if source == "signed" else 0, 3)}
    y = assert_exact(qdq, qoperator, [feed])[0]["y"]

    values, node = constants(qoperator), node_of(qoperator, "QLinearConv")
    sx, zx, w, sw, sy, zy = (values[node.input[i]] for i in (1, 2, 3, 4, 6, 7))
    np.testing.assert_array_equal(w, integers, err_msg="the weights are not those that make ties")
    x = np.clip(np.rint(feed["x"] / sx) + zx, 0, 255).astype(np.int64) - int(zx)
    edge = size // 2
    acc = convolve(np.pad(x, ((0, 0), (0, 0), (edge, edge), (edge, edge))), w.astype(np.int64), group)
    acc += values[node.input[8]].astype(np.int64).reshape(1, -1, 1, 1)
    expected, ties = half_even(acc, (sx * sw / sy).reshape(1, -1, 1, 1), int(zy))
    assert ties > 0.05, f"only {ties:.1%} ties: the test says nothing"
    np.testing.assert_array_equal(y / sy + zy, expected)


@pytest.mark.parametrize("trans", [0, 1], ids=["w", "transposed"])
def test_ties_of_gemm_and_its_float_end(trans: int) -> None:
    """h is an output as well as the second Gemm's input: its DequantizeLinear stays for the graph's end."""
    rng = np.random.default_rng(8)
    first, second = integer_weights(rng, (12, 16), 0, 1), integer_weights(rng, (5, 12), 0, 1)
    scales = np.resize([2.0**-7, 2.0**-8, 2.0**-9], 12)
    weight = (first * scales[:, None]).astype(np.float32)
    model = parse(
        f"""g (float[N, 16] x) => (float[N, 12] h, float[N, 5] y) {{
            h = Gemm<transB: int = {trans}>(x, w, b)
            y = Gemm<transB: int = 1>(h, v)
        }}""",
        w=weight if trans else weight.T.copy(),
        b=(rng.integers(-9, 10, 12) * scales * 2.0**-4).astype(np.float32),
        v=(second * 2.0**-7).astype(np.float32),
    )
    qdq, qoperator, _ = with_ranges(model, {"x": signed(-4), "h": signed(-10)})
    feed = {"x": tie_feed(rng, (200, 16), -4, -3, 3)}
    result = assert_exact(qdq, qoperator, [feed])[0]
    values = constants(qoperator)
    nodes = [n for n in qoperator.graph.node if n.op_type == "QGemm"]
    assert [len(n.input) for n in nodes] == [9, 7]
    sx, zx, w, sw, bias, sy, zy = (values[nodes[0].input[i]] for i in (1, 2, 3, 4, 6, 7, 8))
    x = np.clip(np.rint(feed["x"] / sx) + zx, 0, 255).astype(np.int64) - int(zx)
    acc = x @ (w.T if trans else w).astype(np.int64) + bias
    expected, ties = half_even(acc, sx * sw / sy, int(zy))
    assert ties > 0.1
    np.testing.assert_array_equal(result["h"] / sy + zy, expected)
    sh, w, sw, bias = (values[nodes[1].input[i]] for i in (1, 3, 4, 6))
    acc = (expected.astype(np.int64) - int(zy)) @ w.T.astype(np.int64) + bias
    np.testing.assert_array_equal(result["y"], acc.astype(np.float32) * (sh * sw), err_msg="not fl(acc) * fl(Sx*Sw)")


def test_ties_of_global_average_pool() -> None:
    rng = np.random.default_rng(9)
    model = parse(
        """g (float[N, 8, 4, 4] x) => (float[N, 8, 4, 4] c, float[N, 8, 1, 1] p, float[N, 3] y) {
            c = Conv(x, w)
            p = GlobalAveragePool(c)
            f = Flatten(p)
            y = Gemm<transB: int = 1>(f, v)
        }""",
        w=(integer_weights(rng, (8, 8, 1, 1), 0, 1) * 2.0**-7).astype(np.float32),
        v=rng.normal(size=(3, 8)).astype(np.float32),
    )
    qdq, qoperator, _ = with_ranges(model, {"x": signed(-4), "c": signed(-5), "p": signed(-8)})
    feed = {"x": tie_feed(rng, (400, 8, 4, 4), -4, -2, 2)}
    result = assert_exact(qdq, qoperator, [feed])[0]
    values, node = constants(qoperator), node_of(qoperator, "QLinearGlobalAveragePool")
    sx, sy, zy = (values[node.input[i]] for i in (1, 3, 4))
    acc = np.rint(result["c"] / sx).astype(np.int64).sum(axis=(2, 3), keepdims=True)
    expected, ties = half_even(acc, sx / (sy * np.float32(16)), int(zy))
    assert ties > 0.1
    np.testing.assert_array_equal(result["p"] / sy + zy, expected)


@pytest.mark.parametrize(("left", "right", "total"), [(-5, -5, -4), (-5, -6, -5), (-4, -7, -5)])
def test_every_pair_of_an_add_without_ties(left: int, right: int, total: int) -> None:
    """With the ratios 2^k that these ranges ask for, up to half of the sums would tie; the solver must have moved them."""
    model = parse(
        """g (float[1, 1, 256, 256] a, float[1, 1, 256, 256] b) =>
             (float[1, 1, 256, 256] l, float[1, 1, 256, 256] r, float[1, 1, 256, 256] s, float[1, 2, 256, 256] y) {
            l = Conv(a, one)
            r = Conv(b, one)
            s = Add(l, r)
            y = Conv(s, two)
        }""",
        one=np.ones((1, 1, 1, 1), np.float32),
        two=np.asarray([1.0, -0.5], np.float32).reshape(2, 1, 1, 1),
    )
    ranges = {
        "a": signed(left),
        "l": signed(left),
        "b": signed(right),
        "r": signed(right),
        "s": signed(total),
        "y": signed(total),
    }
    qdq, qoperator, _ = with_ranges(model, ranges)
    values, node = constants(qoperator), node_of(qoperator, "QLinearAdd")
    sl, sr, ss, zs = (values[node.input[i]] for i in (1, 4, 6, 7))
    grid = np.arange(-128, 128, dtype=np.int64)
    feed = {
        "a": (np.repeat(grid, 256).reshape(1, 1, 256, 256) * sl).astype(np.float32),
        "b": (np.tile(grid, 256).reshape(1, 1, 256, 256) * sr).astype(np.float32),
    }
    result = assert_exact(qdq, qoperator, [feed])[0]
    a, b = np.rint(result["l"] / sl).astype(np.int64), np.rint(result["r"] / sr).astype(np.int64)
    assert len(np.unique(a * 1000 + b)) > 55_000
    q = next(
        q
        for q in range(1, 1024, 2)
        if all(abs(float(s) / float(ss) * q - round(float(s) / float(ss) * q)) < 1e-4 for s in (sl, sr))
    )
    pa, pb = round(float(sl) / float(ss) * q), round(float(sr) / float(ss) * q)
    assert not ((2 * (a * pa + b * pb)) % (2 * q) == q).any()
    expected = np.clip((2 * (a * pa + b * pb) + q) // (2 * q) + int(zs), 0, 255)
    np.testing.assert_array_equal(np.rint(result["s"] / ss) + zs, expected)


# --- all operators together -----------------------------------------------------------------------------------

NETWORK = """g (float[N, 4, 12, 12] x) => (float[N, 6] y) {
    c0 = Conv<pads: ints = [1, 1, 1, 1]>(x, w0, b0)
    r0 = Relu(c0)
    c1 = Conv<pads: ints = [1, 1, 1, 1], group: int = 8>(r0, w1, b1)
    r1 = Clip(c1, zero, six)
    m = MaxPool<kernel_shape: ints = [2, 2], strides: ints = [2, 2]>(r1)
    c2 = Conv(m, w2, b2)
    c3 = Conv<pads: ints = [1, 1, 1, 1]>(m, w3, b3)
    j = Concat<axis: int = 1>(c2, c3)
    c4 = Conv<pads: ints = [1, 1, 1, 1], group: int = 2>(j, w4, b4)
    t = Add(c4, m)
    r2 = Relu(t)
    c5 = Conv<strides: ints = [2, 2]>(r2, w5, b5)
    h = Slice(r2, starts, ends, axes, steps)
    d = Pad(h, pads)
    u = Add(c5, d)
    g = GlobalAveragePool(u)
    f = Flatten(g)
    e = Gemm<transB: int = 1>(f, w6, b6)
    q = Relu(e)
    y = Gemm(q, w7, b7)
}"""


def network(rng: np.random.Generator) -> ModelProto:
    shapes = {
        "0": (8, 4, 3, 3), "1": (8, 1, 3, 3), "2": (4, 8, 1, 1), "3": (4, 8, 3, 3),
        "4": (8, 4, 3, 3), "5": (12, 8, 1, 1), "6": (10, 12), "7": (10, 6),
    }  # fmt: skip
    values: dict[str, Array] = {}
    for key, shape in shapes.items():
        axis = 1 if key == "7" else 0
        scale = rng.choice([2.0**-7, 2.0**-8, 3 * 2.0**-9], shape[axis])
        spread = [1] * len(shape)
        spread[axis] = -1
        values["w" + key] = (integer_weights(rng, shape, axis, 1) * scale.reshape(spread)).astype(np.float32)
        values["b" + key] = (rng.integers(-20, 21, shape[axis]) * scale * 2.0**-4).astype(np.float32)
    numbers = {"starts": [0, 0], "ends": [6, 6], "axes": [2, 3], "steps": [2, 2], "pads": [0, 2, 0, 0, 0, 2, 0, 0]}
    values |= {k: np.asarray(v, np.int64) for k, v in numbers.items()}
    values |= {"zero": np.asarray(0, np.float32), "six": np.asarray(200 * 2.0**-5, np.float32)}
    return parse(NETWORK, 21, **values)


@pytest.mark.parametrize("target", ["any", "vnni"])
@pytest.mark.parametrize("seed", range(4))
def test_ties_through_all_operators(seed: int, target: str) -> None:
    rng = np.random.default_rng(seed)
    relu = {name: unsigned(-5) for name in ("r0", "r1", "m", "r2", "h", "d", "q")}
    plain = {name: signed(-6) for name in ("c0", "c1", "c2", "c3", "c4", "j", "t", "c5", "u", "g", "f", "e")}
    model = network(rng)
    qdq, qoperator, _ = with_ranges(model, {"x": signed(-4), **relu, **plain}, target=target)
    counts = {n.op_type for n in qoperator.graph.node}
    assert {"QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "QGemm", "MaxPool", "Concat", "Pad", "Slice"} <= counts
    assert "DequantizeLinear" not in counts
    feeds = [{"x": tie_feed(rng, (4, 4, 12, 12), -4, -4, 4)}, {"x": tie_feed(rng, (2, 4, 12, 12), -4, -128, 127)}]
    logits = assert_exact(qdq, qoperator, feeds)
    assert all(len(np.unique(r["y"])) > 6 for r in logits)
    assert_exact(qdq, qoperator, feeds, integer_tensors(qoperator))


# --- real models ----------------------------------------------------------------------------------------------


def digits() -> tuple[list[Feeds], list[Feeds]]:
    """(calibration feeds, 50 held-out feeds) of the digits models."""
    calibration = np.load(MODELS / "digits_calib.npz")["input"]
    held_out = np.load(MODELS / "digits.npz")["input"]
    return [{"input": calibration[i : i + 1]} for i in range(0, 200, 4)], [{"input": x[None]} for x in held_out[:50]]


@pytest.mark.parametrize(("ranges", "target", "count"), [("mse", "any", 50), ("minmax", "vnni", 10)], ids=["any", "vnni"])
def test_digits_cnn(ranges: str, target: str, count: int) -> None:
    calibration, inputs = digits()
    context = Context(
        Settings(ranges=ranges, target=target), samples=[dict(f) for f in calibration], calibration=lambda: calibration
    )
    qdq, qoperator = both_formats(load_model(MODELS / "digits_cnn.onnx").graph, context)
    logits = assert_exact(qdq, qoperator, inputs[:count])
    assert len({int(r["logits"].argmax()) for r in logits}) > 5, "the model does not tell the digits apart"
    assert_exact(qdq, qoperator, inputs[:5], integer_tensors(qoperator))


def test_digits_vit_with_float_nodes_between() -> None:
    """LayerNormalization models hold float nodes, so the interpreter is no judge; the two files must agree all the same."""
    calibration, inputs = digits()
    context = Context(Settings(), samples=[dict(f) for f in calibration[:8]], calibration=lambda: calibration)
    qdq, qoperator = both_formats(load_model(MODELS / "digits_vit.onnx").graph, context)
    fused, lowered = Session(qdq, threads=1), Session(qoperator, threads=1)
    for feed in inputs:
        for name, value in fused.run(feed).items():
            np.testing.assert_array_equal(lowered.run(feed)[name], value)


@needs_conv_integer
def test_written_files_of_all_formats(tmp_path: Path) -> None:
    _, inputs = digits()
    files = {}
    for layout in ("qdq", "qoperator", "integer"):
        compiled = compile_model(
            MODELS / "digits_cnn.onnx",
            tmp_path / f"{layout}.onnx",
            format=layout,
            data=str(MODELS / "digits_calib.npz"),
            effort="fast",
            latency=False,
        )
        files[layout] = onnx.load(compiled.path)
    assert not any(n.op_type == "QLinearConv" for n in files["qdq"].graph.node)
    assert any(n.op_type == "QLinearConv" for n in files["qoperator"].graph.node)
    assert any(n.op_type == "ConvInteger" for n in files["integer"].graph.node)
    assert_exact(files["qdq"], files["qoperator"], inputs, integer=files["integer"])


def zoo_tasks() -> ModuleType:
    if not (ZOO / "tasks.py").exists():
        pytest.skip(f"{ZOO} is absent")
    spec = importlib.util.spec_from_file_location("zoo_tasks", ZOO / "tasks.py")
    assert spec is not None and spec.loader is not None
    tasks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tasks)
    return tasks


@pytest.mark.zoo
@pytest.mark.parametrize("task", ["resnet20_cifar10", "squeezenet", "mobilenet_v1", "mobilenet_v2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_real_models(task: str, bits: int) -> None:
    """Before a float head (squeezenet: pooling and Softmax) the integer tensor that it reads is compared."""
    tasks = zoo_tasks()
    samples, inputs = (32, 50) if FULL else (2, 3)
    calibration: list[Feeds] = list(islice(getattr(tasks, f"{task}_calib")(), samples))
    settings = Settings(bits=bits) if FULL else Settings(bits=bits, effort="fast", ranges="minmax")
    context = Context(settings, samples=[dict(f) for f in calibration], calibration=lambda: calibration)
    qdq, qoperator = both_formats(load_model(ZOO / task / "model.onnx").graph, context)
    feeds = [f for f, _ in islice(getattr(tasks, f"{task}_eval")(), inputs)]
    ends = [n.input[0] for n in qoperator.graph.node if n.op_type == "DequantizeLinear"]
    assert bool(ends) == (task == "squeezenet")
    assert_exact(qdq, qoperator, feeds, ends or None)
    if ends:
        fused, lowered = Session(qdq, threads=1), Session(qoperator, threads=1)
        for feed in feeds:
            for name, value in fused.run(feed).items():
                np.testing.assert_array_equal(lowered.run(feed)[name], value)
