"""The tie-heavy operator set: small models whose rescales are powers of two and whose sums fall half-way again and again.

Random data has almost no ties, and a machine that rounds ties in another way passes unseen. Every model goes through the
compiler's own passes with given ranges (nothing is learned, which would move the ties) and leaves in all three formats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph
from qcompile.interpret import Interpreter
from qcompile.passes import passes_for
from qcompile.passes.lower_integer import LowerInteger
from qcompile.passes.lower_qoperator import LowerQOperator
from qcompile.ranges import Observer

_HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
_SCALES = np.asarray([2.0**-7, 2.0**-8, 2.0**-9, 3 * 2.0**-9])  # multipliers 1/2, 1/4, 1/8, 3/8


@dataclass(frozen=True)
class TieModel:
    """A model in each format (integer: None where it has no such form) and one feed that makes ties."""

    formats: Mapping[str, ModelProto]
    feeds: Mapping[str, Array]


def signed(exponent: int) -> tuple[float, float]:
    """The range with scale 2^exponent and zero point 128."""
    return -128 * 2.0**exponent, 127 * 2.0**exponent


def unsigned(exponent: int) -> tuple[float, float]:
    """The range with scale 2^exponent and zero point 0."""
    return 0.0, 255 * 2.0**exponent


def tie_models() -> dict[str, TieModel]:
    """{name: model}; the same on every call."""
    rng = np.random.default_rng(7)
    found: dict[str, TieModel] = {}
    kinds = {"dense_3x3": (16, 16, 3, 1), "dense_1x1": (16, 8, 1, 1), "depthwise_3x3": (16, 1, 3, 16), "grouped": (8, 2, 3, 4)}
    for name, (channels, depth, size, group) in kinds.items():
        for result in ("signed", "relu"):
            found[f"conv_{name}_{result}"] = _convolution(rng, channels, depth, size, group, result)
    found["gemm"] = _gemm(rng)
    found["matmul"] = _matmul(rng)
    found["pool"] = _pool(rng)
    found["add"] = _add()
    return found


def count_ties(model: ModelProto, feeds: Mapping[str, Array]) -> int:
    """Outputs of the rescales of an integer file that lie exactly half-way between two integers and do not saturate."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    calls = [n for n in model.graph.node if n.op_type.startswith("DyadicRescale")]
    sums = Interpreter(model).run(feeds, [n.input[0] for n in calls])
    ties = 0
    for call in calls:
        b, c, zero = (np.asarray(constants[n]).astype(np.int64) for n in call.input[1:4])
        bias = np.asarray(constants[call.input[4]] if len(call.input) > 4 else 0, np.int64)
        product = (sums[call.input[0]].astype(np.int64) + bias) * b
        quotient, rest = np.divmod(product, np.left_shift(1, c))
        inside = (quotient + zero > 0) & (quotient + zero < 254)
        ties += int(((2 * rest == np.left_shift(1, c)) & inside & (c > 0)).sum())
    return ties


def _finish(text: str, ranges: Mapping[str, tuple[float, float]], feeds: Mapping[str, Array], **constants: Array) -> TieModel:
    model = onnx.parser.parse_model(_HEAD + text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    context = Context(Settings(ranges="minmax", effort="fast", bias_correction=False))
    context.observers = {name: Observer(False, low, high) for name, (low, high) in ranges.items()}
    graph = Graph.from_proto(model)
    for step in passes_for():
        step.run(graph, context)
    formats = {"qdq": graph.to_proto()}
    context.settings = dataclasses.replace(context.settings, format="qoperator")
    LowerQOperator().run(graph, context)
    formats["qoperator"] = graph.to_proto()
    LowerInteger().run(graph, Context(Settings(format="integer")))
    formats["integer"] = graph.to_proto()
    return TieModel(formats, feeds)


def _weights(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """-1, 0, 1 and one 127 or -127 a channel, which pins its scale."""
    matrix = rng.integers(-1, 2, (shape[0], int(np.prod(shape[1:]))))
    matrix[np.arange(shape[0]), rng.integers(0, matrix.shape[1], shape[0])] = rng.choice([-127, 127], shape[0])
    return matrix.reshape(shape)


def _feed(rng: np.random.Generator, shape: tuple[int, ...], exponent: int, low: int, high: int) -> Array:
    """Small multiples of the scale, the ends of the range among them."""
    integers = rng.integers(low, high + 1, shape)
    ends = rng.random(shape) < 0.02
    return np.asarray(np.where(ends, rng.choice([-128, 127], shape), integers) * 2.0**exponent, np.float32)


def _convolution(rng: np.random.Generator, channels: int, depth: int, size: int, group: int, result: str) -> TieModel:
    scales, edge = np.resize(_SCALES, channels), size // 2
    ends = signed(-10) if result == "signed" else unsigned(-10)
    return _finish(
        f"""g (float[N, {depth * group}, 9, 9] x) => (float[N, {channels}, p, p] y) {{
            c = Conv<group: int = {group}, pads: ints = [{edge}, {edge}, {edge}, {edge}]>(x, w, b)
            y = {"Relu" if result == "relu" else "Identity"}(c)
        }}""",
        {"x": signed(-4), "y": ends, "c": ends},
        {"x": _feed(rng, (3, depth * group, 9, 9), -4, -3, 3)},
        w=(_weights(rng, (channels, depth, size, size)) * scales.reshape(-1, 1, 1, 1)).astype(np.float32),
        b=(rng.integers(-9, 10, channels) * scales * 2.0**-4).astype(np.float32),
    )


def _gemm(rng: np.random.Generator) -> TieModel:
    scales = np.resize(_SCALES, 12)
    return _finish(
        """g (float[N, 16] x) => (float[N, 12] h, float[N, 5] y) {
            h = Gemm<transB: int = 1>(x, w, b)
            y = Gemm<transB: int = 1>(h, v)
        }""",
        {"x": signed(-4), "h": signed(-10)},
        {"x": _feed(rng, (200, 16), -4, -3, 3)},
        w=(_weights(rng, (12, 16)) * scales[:, None]).astype(np.float32),
        b=(rng.integers(-9, 10, 12) * scales * 2.0**-4).astype(np.float32),
        v=(_weights(rng, (5, 12)) * 2.0**-7).astype(np.float32),
    )


def _matmul(rng: np.random.Generator) -> TieModel:
    scales = np.resize(_SCALES, 12)
    return _finish(
        "g (float[N, 16] x) => (float[N, 12] h, float[N, 5] y) { h = MatMul(x, w) y = MatMul(h, v) }",
        {"x": signed(-4), "h": signed(-10)},
        {"x": _feed(rng, (200, 16), -4, -3, 3)},
        w=(_weights(rng, (12, 16)) * scales[:, None]).astype(np.float32).T.copy(),
        v=(_weights(rng, (5, 12)) * 2.0**-7).astype(np.float32).T.copy(),
    )


def _pool(rng: np.random.Generator) -> TieModel:
    return _finish(
        """g (float[N, 8, 8, 8] x) => (float[N, 8, 1, 1] p, float[N, 3] y) {
            c = Conv(x, w)
            m = MaxPool<kernel_shape: ints = [2, 2], strides: ints = [2, 2]>(c)
            p = GlobalAveragePool(m)
            f = Flatten(p)
            y = Gemm<transB: int = 1>(f, v)
        }""",
        {"x": signed(-4), "c": signed(-5), "m": signed(-5), "p": signed(-8)},
        {"x": _feed(rng, (200, 8, 8, 8), -4, -2, 2)},
        w=(_weights(rng, (8, 8, 1, 1)) * 2.0**-7).astype(np.float32),
        v=rng.normal(size=(3, 8)).astype(np.float32),
    )


def _add() -> TieModel:
    """Every pair of two 8-bit operands, with ranges that would make half of the sums tie if ratios were powers of two."""
    grid = np.arange(-128, 128)
    left, right = (
        np.asarray(v * 2.0**-5, np.float32).reshape(1, 1, 256, 256) for v in (np.repeat(grid, 256), np.tile(grid, 256))
    )
    square = "float[1, 1, 256, 256]"
    return _finish(
        f"""g ({square} a, {square} b) => ({square} s, float[1, 2, 256, 256] y) {{
            l = Conv(a, one)
            r = Conv(b, one)
            s = Add(l, r)
            y = Conv(s, two)
        }}""",
        {"a": signed(-5), "l": signed(-5), "b": signed(-5), "r": signed(-5), "s": signed(-4), "y": signed(-4)},
        {"a": left, "b": right},
        one=np.ones((1, 1, 1, 1), np.float32),
        two=np.asarray([1.0, -0.5], np.float32).reshape(2, 1, 1, 1),
    )
