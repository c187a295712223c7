from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from passes_helpers import check_pass, floats, parse

from qcompile.context import Context, Settings
from qcompile.graph import Array, Const, Graph
from qcompile.passes.pad_channels import PadChannels

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
READ = "its channels are read by an operator that has no zero to skip"
MADE = "its channels come from an operator that cannot add zeros"
OUTPUT = "its channels are an output of the graph"


def weights(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Shape of the weights of each Conv by the name of its output."""
    return {
        n.outputs[0].name: n.inputs[1].array().shape for n in graph.nodes if n.op == "Conv" and isinstance(n.inputs[1], Const)
    }


def block(body: str, outputs: str = "float[n, 8, 9, 9] y") -> str:
    """x -> 1x1 Conv to 24 channels `a`, then `body`, which ends in `y`."""
    return f"g (float[n, 4, 9, 9] x) => ({outputs}) {{ a = Conv(x, wa, ba)  {body} }}"


BLOCK = {
    "wa": floats(24, 4, 1, 1),
    "ba": floats(24, seed=1),
    "wd": floats(24, 1, 3, 3, seed=2),
    "bd": floats(24, seed=3),
    "wy": floats(8, 24, 1, 1, seed=4),
}
DEPTHWISE = "<group = 24, pads = [1, 1, 1, 1]>"


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        pytest.param(f"d = Conv {DEPTHWISE} (a, wd, bd)  y = Conv(d, wy)", {}, id="bare"),
        pytest.param(f"r = Relu(a)  d = Conv {DEPTHWISE} (r, wd, bd)  s = HardSwish(d)  y = Conv(s, wy)", {}, id="activations"),
        pytest.param(f"d = Conv {DEPTHWISE} (a, wd)  s = Sigmoid(d)  y = Conv(s, wy)", {}, id="sigmoid-of-zero-is-not-zero"),
        pytest.param(
            f"c = Clip(a, low, high)  d = Conv {DEPTHWISE} (c, wd, bd)  y = Conv(d, wy)",
            {"low": np.float32(0), "high": np.float32(6)},
            id="clip",
        ),
        pytest.param(
            f"d = Conv {DEPTHWISE} (a, wd, bd)  e = Conv {DEPTHWISE} (d, we)  y = Conv(e, wy)",
            {"we": floats(24, 1, 3, 3, seed=9)},
            id="two-depthwise",
        ),
        pytest.param(f"d = Conv {DEPTHWISE} (a, wd, bd)  s = Add(a, d)  y = Conv(s, wy)", {}, id="residual"),
        pytest.param(
            f"d = Conv {DEPTHWISE} (a, wd, bd)  t = Mul(d, k)  s = Sub(t, half)  y = Conv(s, wy)",
            {"k": floats(24, 1, 1, seed=7), "half": np.float32(0.5)},
            id="factor-a-channel",
        ),
        pytest.param(
            f"d = Conv {DEPTHWISE} (a, wd, bd)  p = GlobalAveragePool(d)  q = Conv(p, wq)  r = Relu(q)  t = Conv(r, wt)  "
            "h = HardSigmoid(t)  s = Mul(d, h)  y = Conv(s, wy)",
            {"wq": floats(8, 24, 1, 1, seed=5), "wt": floats(24, 8, 1, 1, seed=6)},
            id="squeeze-and-excitation",
        ),
        pytest.param(
            f"d = Conv {DEPTHWISE} (a, wd, bd)  m = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (d)  y = Conv(m, wy)",
            {},
            id="pool",
        ),
        pytest.param(
            f"d = Conv {DEPTHWISE} (a, wd, bd)  s = Mul(d, k)  y = Conv(s, wy)", {"k": floats(9, 9)}, id="factor-a-position"
        ),
        pytest.param(
            f"d = Conv {DEPTHWISE} (a, wd, bd)  g = Conv(d, wg)  h = Sigmoid(g)  s = Mul(d, h)  y = Conv(s, wy)",
            {"wg": floats(1, 24, 1, 1, seed=5)},
            id="spatial-attention",
        ),
    ],
)
def test_depthwise_is_widened_with_all_that_shares_its_channels(body: str, constants: dict[str, Array]) -> None:
    model = parse(block(body), **BLOCK, **constants)
    report, graph = check_pass(PadChannels(), model, [{"x": floats(2, 4, 9, 9)}, {"x": floats(1, 4, 9, 9, seed=8)}])
    assert report.rewrites == 1
    assert not report.refusals
    found = weights(graph)
    assert found["a"] == (32, 4, 1, 1)
    assert found["d"] == (32, 1, 3, 3)
    assert found["y"] == (8, 32, 1, 1)
    assert all(n.attr("group") == 32 for n in graph.nodes if n.outputs[0].name == "d")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(f"d = Conv {DEPTHWISE} (a, wd, bd)  y = Concat <axis = 1> (a, d)", READ, id="concat"),
        pytest.param(f"d = Conv {DEPTHWISE} (a, wd, bd)  y = Softmax <axis = 1> (d)", READ, id="softmax-over-channels"),
        pytest.param(f"y = Conv {DEPTHWISE} (a, wd, bd)", OUTPUT, id="output"),
        pytest.param(
            f"t = Transpose <perm = [0, 1, 3, 2]> (a)  d = Conv {DEPTHWISE} (t, wd, bd)  y = Conv(d, wy)", MADE, id="transpose"
        ),
        pytest.param(
            f"d = Conv {DEPTHWISE} (a, wd, bd)  y = Conv <group = 2> (d, wg)",
            READ,
            id="grouped",
        ),
    ],
)
def test_what_needs_every_channel_stops_it(body: str, reason: str) -> None:
    constants = {"wg": floats(8, 12, 1, 1)}
    used = {k: v for k, v in {**BLOCK, **constants}.items() if k in body or k in ("wa", "ba")}
    model = parse(block(body, "float[n, c, h, w] y"), **used)
    report, _ = check_pass(PadChannels(), model, {"x": floats(2, 4, 9, 9)})
    assert report.rewrites == 0
    assert dict(report.skipped) == {reason: 1}


def test_pinned_in_the_middle_stops_it() -> None:
    body = f"d = Conv {DEPTHWISE} (a, wd, bd)  y = Conv(d, wy)"
    model = parse(block(body, "float[n, 8, 9, 9] y, float[n, 24, 9, 9] a"), **BLOCK)
    report, _ = check_pass(PadChannels(), model, {"x": floats(2, 4, 9, 9)})
    assert dict(report.skipped) == {OUTPUT: 1}


def test_shared_weights_of_other_nodes_stay() -> None:
    body = f"d = Conv {DEPTHWISE} (a, wd, bd)  z = Conv(d, wy)  o = Conv(x, wa, ba)  p = Conv(o, wy)  y = Add(z, p)"
    _, graph = check_pass(PadChannels(), parse(block(body), **BLOCK), {"x": floats(2, 4, 9, 9)})
    found = weights(graph)
    assert found["o"] == (24, 4, 1, 1)
    assert found["p"] == (8, 24, 1, 1)
    assert found["z"] == (8, 32, 1, 1)


def test_weights_computed_at_run_time_stop_it() -> None:
    body = f"wr = Abs(wa)  b = Conv(x, wr)  d = Conv {DEPTHWISE} (b, wd, bd)  y = Conv(d, wy)"
    text = f"g (float[n, 4, 9, 9] x, float[24, 4, 1, 1] wa) => (float[n, 8, 9, 9] y) {{ {body} }}"
    constants = {k: v for k, v in BLOCK.items() if k in ("wd", "bd", "wy")}
    report, _ = check_pass(PadChannels(), parse(text, **constants), {"x": floats(2, 4, 9, 9), "wa": BLOCK["wa"]})
    assert dict(report.skipped) == {MADE: 1}


def test_excluded_depthwise_is_left_alone() -> None:
    model = parse(block(f"d = Conv {DEPTHWISE} (a, wd, bd)  y = Conv(d, wy)"), **BLOCK)
    model.graph.node[1].name = "depthwise"
    report = PadChannels().run(Graph.from_proto(model), Context(Settings(exclude=("depth*",))))
    assert report.rewrites == 0


def test_tensorrt_pads_for_itself() -> None:
    model = parse(block(f"d = Conv {DEPTHWISE} (a, wd, bd)  y = Conv(d, wy)"), **BLOCK)
    report = PadChannels().run(Graph.from_proto(model), Context(Settings(target="tensorrt")))
    assert report.rewrites == 0


@pytest.mark.parametrize(
    ("channels", "kernel", "outputs", "pads"),
    [
        pytest.param(3, 3, 16, True, id="first-layer"),
        pytest.param(1, 3, 32, True, id="grey"),
        pytest.param(3, 4, 96, True, id="patches-of-4"),
        pytest.param(3, 7, 64, True, id="resnet-stem"),
        pytest.param(1, 5, 16, False, id="five-times-five-times-four"),
        pytest.param(3, 7, 16, False, id="few-outputs"),
        pytest.param(3, 16, 64, False, id="patches-of-16"),
        pytest.param(3, 3, 8, False, id="too-few-outputs"),
        pytest.param(3, 1, 64, False, id="pointwise"),
        pytest.param(4, 3, 64, False, id="four-already"),
    ],
)
def test_first_convolution(channels: int, kernel: int, outputs: int, pads: bool) -> None:
    model = parse(
        f"g (float[n, {channels}, 32, 32] x) => (float[n, c, h, w] y) {{ y = Conv <strides = [2, 2]> (x, w, b) }}",
        w=floats(outputs, channels, kernel, kernel),
        b=floats(outputs, seed=1),
    )
    report, graph = check_pass(PadChannels(), model, {"x": floats(2, channels, 32, 32, seed=2)})
    assert report.rewrites == int(pads)
    assert [n.op for n in graph.nodes] == (["Pad", "Conv"] if pads else ["Conv"])
    assert weights(graph)["y"] == (outputs, 4 if pads else channels, kernel, kernel)


def test_one_pad_serves_all_readers() -> None:
    model = parse(
        "g (float[n, 3, 8, 8] x) => (float[n, 16, 6, 6] y) { a = Conv(x, w)  b = Conv(x, v)  y = Add(a, b) }",
        w=floats(16, 3, 3, 3),
        v=floats(16, 3, 3, 3, seed=1),
    )
    report, graph = check_pass(PadChannels(), model, {"x": floats(2, 3, 8, 8)})
    assert report.rewrites == 2
    assert sum(n.op == "Pad" for n in graph.nodes) == 1


def test_inner_convolution_is_widened_to_fours() -> None:
    model = parse(
        "g (float[n, 4, 8, 8] x) => (float[n, 16, 4, 4] y) { a = Conv(x, w, b)  r = Relu(a)  y = Conv(r, v) }",
        w=floats(6, 4, 3, 3),
        b=floats(6, seed=2),
        v=floats(16, 6, 3, 3, seed=1),
    )
    report, graph = check_pass(PadChannels(), model, {"x": floats(2, 4, 8, 8)})
    assert report.rewrites == 1
    assert weights(graph) == {"a": (8, 4, 3, 3), "y": (16, 8, 3, 3)}


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("task", "rewrites"), [pytest.param("mobilenet_v1", 2, id="mobilenet_v1"), pytest.param("squeezenet", 1, id="squeezenet")]
)
def test_zoo(task: str, rewrites: int) -> None:
    if not ZOO.exists():
        pytest.skip(f"{ZOO} is absent")
    model = onnx.version_converter.convert_version(onnx.load(ZOO / task / "model.onnx"), 21)
    graph = Graph.from_proto(model)
    from qcompile.passes.fold_bn import FoldBatchNorm
    from qcompile.passes.fold_constants import FoldConstants

    for pass_ in (FoldConstants(), FoldBatchNorm()):
        pass_.run(graph, Context())
    dims = [1 if isinstance(d, str) or d is None else d for d in graph.inputs[0].dims or ()]
    report, after = check_pass(PadChannels(), graph.to_proto(), {graph.inputs[0].name: floats(*dims)})
    assert report.rewrites == rewrites
    for node in after.nodes:
        if node.op == "Conv" and node.attr("group", 1) > 1:
            assert node.attr("group") % 16 == 0
