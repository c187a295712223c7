"""The acceptance of DESIGN section 3: the same bits from `qdq` (fused), `qoperator`, `integer` and the interpreter.

Small models run through the passes with ranges chosen such that many sums lie exactly half-way between two integers: random
data have almost no ties. Real models run on 3 inputs, or on 50 where QCOMPILE_FULL=1.
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import pytest
from exactness_helpers import (
    MODELS,
    ZOO,
    assert_exact,
    both_formats,
    integer_weights,
    signed,
    tie_feed,
    unsigned,
    with_ranges,
    zoo_tasks,
)
from onnx import ModelProto
from passes_helpers import parse
from runtime_marks import needs_conv_integer

from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph, Value
from qcompile.load import load_model
from qcompile.pipeline import compile_model
from qcompile.runtime import Feeds, Session

FULL = os.environ.get("QCOMPILE_FULL") == "1"


def integer_tensors(model: ModelProto) -> list[str]:
    """Names of all integer activations of a quantised-operator model: what its nodes read beside constants."""
    graph = Graph.from_proto(model)
    found: list[str] = []
    for node in graph.nodes:
        for value in node.inputs:
            if isinstance(value, Value) and value.producer is not None and value.producer.op != "DequantizeLinear":
                found.append(value.name)
    return list(dict.fromkeys(n for n in found if n))


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
