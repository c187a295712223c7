"""Pixels of a row as channels: the same sums, for every stride, kernel and padding where blocks fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from passes_helpers import check_pass, floats, parse

from qcompile.context import Context, Settings
from qcompile.graph import Const, Graph
from qcompile.passes.fold_width import FoldWidth
from qcompile.pipeline import compile_model
from qcompile.runtime import Session

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
ROW = "its rows do not divide into blocks of pixels"
PADS = "its padding depends on a size that is not static"
DEAR = "with its pixels as channels it would multiply with zeros too often"
LARGER = "with its pixels as channels the file would grow too much"


def conv(
    attributes: str = "", channels: int = 1, width: int = 8, height: str = "7", tail: str = "y = Relu(c)", dims: str = "h, v"
) -> str:
    first = f"<{attributes}>" if attributes else ""
    return f"g (float[n, {channels}, {height}, {width}] x) => (float[n, o, {dims}] y) {{ c = Conv {first} (x, w, b)  {tail} }}"


def image(channels: int, height: int, width: int, batch: int = 2) -> dict[str, Any]:
    return {"x": floats(batch, channels, height, width, seed=5)}


def conv_weights(graph: Graph) -> tuple[int, ...]:
    node = next(n for n in graph.nodes if n.op == "Conv")
    assert isinstance(node.inputs[1], Const)
    return node.inputs[1].dims


@pytest.mark.parametrize(
    ("attributes", "kernel", "width", "folded"),
    [
        pytest.param("pads = [2, 2, 2, 2]", (5, 5), 8, (12, 4, 5, 3), id="as wide as before"),
        pytest.param('auto_pad = "SAME_UPPER"', (5, 5), 8, (12, 4, 5, 3), id="automatic padding"),
        pytest.param('auto_pad = "SAME_LOWER"', (4, 4), 8, (12, 4, 4, 3), id="padding before"),
        pytest.param('auto_pad = "SAME_UPPER", strides = [2, 2]', (3, 3), 8, (6, 4, 3, 2), id="automatic, stride 2"),
        pytest.param("", (5, 5), 12, (12, 4, 5, 2), id="no padding"),
        pytest.param('auto_pad = "VALID"', (5, 5), 12, (12, 4, 5, 2), id="valid"),
        pytest.param("pads = [0, 0, 1, 1], strides = [2, 2]", (3, 3), 8, (6, 4, 3, 2), id="stride 2"),
        pytest.param("pads = [0, 1, 0, 2], strides = [1, 4]", (1, 7), 16, (3, 4, 1, 3), id="stride 4"),
        pytest.param("pads = [2, 1, 2, 1], dilations = [2, 1]", (3, 3), 8, (12, 4, 3, 3), id="dilated rows"),
    ],
)
def test_one_channel(attributes: str, kernel: tuple[int, int], width: int, folded: tuple[int, ...]) -> None:
    model = parse(conv(attributes, width=width), w=floats(3, 1, *kernel, seed=1), b=floats(3, seed=2))
    report, graph = check_pass(FoldWidth(), model, [image(1, 7, width), image(1, 7, width, batch=1)])
    assert report.rewrites == 1
    assert conv_weights(graph) == folded


@pytest.mark.parametrize(
    ("channels", "attributes", "kernel", "folded"),
    [
        pytest.param(2, "pads = [1, 1, 1, 1]", 3, (6, 4, 3, 3), id="two channels, two pixels"),
        pytest.param(3, "pads = [0, 0, 1, 1], strides = [2, 2]", 3, (6, 12, 3, 2), id="three channels"),
        pytest.param(3, "pads = [3, 3, 3, 3], strides = [2, 2]", 7, (6, 12, 7, 3), id="seven wide"),
    ],
)
def test_more_channels(channels: int, attributes: str, kernel: int, folded: tuple[int, ...]) -> None:
    model = parse(conv(attributes, channels, 16), w=floats(3, channels, kernel, kernel, seed=1), b=floats(3, seed=2))
    report, graph = check_pass(FoldWidth(), model, image(channels, 7, 16))
    assert (report.rewrites, conv_weights(graph)) == (1, folded)


@settings(deadline=None, max_examples=40)
@given(
    channels=st.integers(1, 3),
    kernel=st.integers(2, 7),
    stride=st.sampled_from([1, 2, 4]),
    left=st.integers(0, 5),
    right=st.integers(0, 5),
    blocks=st.integers(1, 4),
)
def test_every_row(channels: int, kernel: int, stride: int, left: int, right: int, blocks: int) -> None:
    assume(4 * blocks + left + right >= kernel)
    text = conv(f"pads = [1, {left}, 0, {right}], strides = [1, {stride}]", channels, 4 * blocks)
    model = parse(text, w=floats(2, channels, 2, kernel, seed=1), b=floats(2, seed=2))
    check_pass(FoldWidth(), model, image(channels, 7, 4 * blocks))


@pytest.mark.parametrize(
    ("tail", "between"),
    [
        pytest.param("r = Relu(c)  y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)", ["Conv", "Relu"], id="activation"),
        pytest.param("r = Clip(c, b0)  s = Neg(r)  y = Add(r, s)", ["Conv", "Clip"], id="clip"),
        pytest.param("r = Relu(c)  y = Add(c, r)", ["Conv"], id="two readers"),
        pytest.param("y = Sigmoid(c)", ["Conv"], id="another activation"),
    ],
)
def test_activations_stay_behind_their_convolution(tail: str, between: list[str]) -> None:
    text = conv("pads = [1, 1, 1, 1]", tail=tail)
    model = parse(text, w=floats(3, 1, 3, 3, seed=1), b=floats(3, seed=2), b0=np.float32(0.1))
    report, graph = check_pass(FoldWidth(), model, image(1, 7, 8))
    assert report.rewrites == 1
    ops = [n.op for n in graph.nodes]
    assert ops[: 2 + len(between) + 3] == ["Reshape", "Transpose", *between, "Transpose", "Reshape", "Transpose"]


def test_an_output_keeps_its_name_and_heights_may_be_dynamic() -> None:
    text = conv("pads = [1, 1, 1, 1]", height="h", dims="h, 8", tail="y = Identity(c)").replace("c = Conv", "y = Conv")
    model = parse(text.replace("y = Identity(c)", ""), w=floats(3, 1, 3, 3, seed=1), b=floats(3, seed=2))
    report, _ = check_pass(FoldWidth(), model, [image(1, 7, 8), image(1, 4, 8)])
    assert report.rewrites == 1


@pytest.mark.parametrize(
    ("text", "weight", "reason"),
    [
        pytest.param(conv("pads = [1, 1, 1, 1]", width=10), (3, 1, 3, 3), ROW, id="odd row"),
        pytest.param(conv("pads = [1, 1, 1, 1]", height="7, v").replace(", 8]", "]"), (3, 1, 3, 3), ROW, id="dynamic row"),
        pytest.param(conv("pads = [0, 1, 0, 1], strides = [1, 3]", width=12), (3, 1, 3, 3), ROW, id="stride 3"),
        pytest.param(conv("", width=8), (3, 1, 3, 3), ROW, id="shorter result"),
        pytest.param(
            conv('auto_pad = "SAME_UPPER", strides = [2, 2]', height="h"), (3, 1, 3, 3), PADS, id="padding by a dynamic height"
        ),
        pytest.param(conv("pads = [1, 1, 1, 1]", 3), (16, 3, 3, 3), DEAR, id="three channels, stride 1"),
        pytest.param(conv("pads = [1, 1, 1, 1]"), (600, 1, 3, 3), LARGER, id="larger"),
    ],
)
def test_refusals(text: str, weight: tuple[int, ...], reason: str) -> None:
    model = parse(text, w=floats(*weight, seed=1), b=floats(weight[0], seed=2))
    graph = Graph.from_proto(model)
    report = FoldWidth().run(graph, Context())
    assert (report.rewrites, dict(report.skipped)) == (0, {reason: 1})


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(conv("pads = [1, 1, 1, 1], group = 2", 2), id="groups"),
        pytest.param(conv("pads = [1, 2, 1, 2], dilations = [1, 2]"), id="dilated"),
        pytest.param(
            conv("pads = [1, 1, 1, 1]").replace("c = Conv", "v = Neg(w)  c = Conv").replace("x, w, b", "x, v, b"), id="weight"
        ),
    ],
)
def test_what_is_no_candidate(text: str) -> None:
    model = parse(text, w=floats(4, 1, 3, 3, seed=1), b=floats(4, seed=2))
    report = FoldWidth().run(Graph.from_proto(model), Context())
    assert (report.rewrites, dict(report.skipped)) == (0, {})


@pytest.mark.parametrize(
    "context",
    [Context(Settings(target="tensorrt")), Context(Settings(exclude=("c*",))), Context(synthetic=True)],
    ids=["tensorrt", "excluded", "no data"],
)
def test_where_it_is_off(context: Context) -> None:
    model = parse(conv("pads = [1, 1, 1, 1]"), w=floats(3, 1, 3, 3, seed=1), b=floats(3, seed=2))
    model.graph.node[0].name = "conv"
    assert FoldWidth().run(Graph.from_proto(model), context).rewrites == 0


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
@pytest.mark.zoo
def test_mnist_runs_in_integers_and_both_formats_agree(form: str, tmp_path: Path) -> None:
    source = ZOO / "mnist_cnn" / "model.onnx"
    if not source.is_file():
        pytest.skip("the zoo is not here")
    data: dict[str, Any] = {"data": f"{ZOO}/tasks.py:mnist_cnn_calib", "eval_data": f"{ZOO}/tasks.py:mnist_cnn_eval"}
    made = compile_model(source, tmp_path / "a.onnx", format=form, latency=False, **data)
    assert made.report["fusion"]["not_fused"] == made.report["fusion"]["leftover"] == []
    assert made.report["fusion"]["float_weight_bytes"] == 0
    assert made.report["accuracy"]["sqnr_db"] > 43
    other = compile_model(source, tmp_path / "b.onnx", latency=False, **data)
    feeds = {"Input3": np.random.default_rng(0).integers(0, 256, (1, 1, 28, 28)).astype(np.float32)}
    for name, values in Session(other.path).run(feeds).items():
        np.testing.assert_array_equal(Session(made.path).run(feeds)[name], values)
    assert "Reshape" in [n.op_type for n in onnx.load(other.path).graph.node][:4]  # it was folded
