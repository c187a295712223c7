"""What becomes integer, what folds, and every reason for which a node stays float."""

from __future__ import annotations

import numpy as np
import pytest
from core_models import floats, model, node
from onnx import ModelProto

from qcompile.context import Settings
from qcompile.graph import Array, Graph
from qcompile.placement import Placement, clip_bounds, linear_refusal, place, pool_area, shares_scale


def placed(source: ModelProto, **settings: object) -> tuple[Graph, Placement]:
    graph = Graph.from_proto(source)
    graph.infer_shapes()
    return graph, place(graph, Settings(**settings))  # type: ignore[arg-type]


def names(placement: Placement) -> dict[str, set[str]]:
    return {
        "linear": {n.name for n in placement.linears},
        "quantised": {t.name for t in placement.quantised},
        "integer": {n.name for n in placement.integer},
        "folded": {n.name for n in placement.folded},
    }


W = {
    "w": floats(3, 3, 3, 3),
    "b": floats(3),
    "k": floats(3, 4),
    "c": floats(4),
    "one": np.float32(1),
    "wd": np.ones((3, 3, 3, 3)),
}
CONV = "Conv <pads = [1, 1, 1, 1]>"


def image_model(body: str, result: str = "float[n, 3, 8, 8] y", **constants: Array) -> ModelProto:
    used = {
        k: v for k, v in {**W, **constants}.items() if k in body.replace(",", " ").replace(")", " ").replace("(", " ").split()
    }
    return model("g (float[1, 3, 8, 8] x) => (" + result + ") { " + body + " }", **used)


REFUSALS = [
    pytest.param("y = Relu(x)", {}, {}, "", id="no-weighted-node"),
    pytest.param("y = Conv <pads = [1, 1, 1, 1]> (x, w)", {}, {"exclude": ("conv_*",)}, "excluded by --exclude", id="excluded"),
    pytest.param(
        "y = ConvTranspose <pads = [1, 1, 1, 1]> (x, w)",
        {},
        {},
        "ConvTranspose has no integer kernel in onnxruntime",
        id="transpose",
    ),
    pytest.param("y = MatMul(x, x)", {}, {}, "product of two activations", id="two-activations"),
    pytest.param(
        "v = Identity(w)  y = Conv <pads = [1, 1, 1, 1]> (x, v)",
        {},
        {},
        "weights are computed at run time",
        id="computed-weights",
    ),
    pytest.param("y = MatMul(x, m)", {"m": floats(3, 8, 8)}, {}, "MatMul with weights of rank other than 2", id="matmul-rank-3"),
    pytest.param("v = Identity(b)  y = Conv <pads = [1, 1, 1, 1]> (x, w, v)", {}, {}, "bias is computed at run time", id="bias"),
    pytest.param(
        "y = Conv <pads = [1, 1, 1, 1]> (i, w)  z = Add(y, x)",
        {"i": floats(1, 3, 8, 8)},
        {},
        "input is a constant",
        id="constant-input",
    ),
]


@pytest.mark.parametrize(("body", "constants", "settings", "reason"), REFUSALS)
def test_refusals_of_images(body: str, constants: dict[str, Array], settings: dict[str, object], reason: str) -> None:
    source = image_model(body, "float[n, 3, p, q] y" if "z" not in body.split() else "float[n, 3, p, q] z", **constants)
    graph, placement = placed(source, **settings)
    weighted = [n for n in graph.nodes if n.op in ("Conv", "ConvTranspose", "MatMul", "Gemm", "Relu")]
    assert linear_refusal(weighted[0], Settings(**settings)) == reason  # type: ignore[arg-type]
    assert not placement.linears
    assert [(n.name, r) for n, r in placement.refused] == ([(weighted[0].name, reason)] if reason else [])


GEMM_OPTIONS = "Gemm with transA, alpha or beta"


@pytest.mark.parametrize(
    ("body", "constants", "reason"),
    [
        pytest.param("y = Gemm(x, w)", {"w": floats(4, 5)}, None, id="plain"),
        pytest.param("y = Gemm <transA = 1> (x, w)", {"w": floats(4, 5)}, GEMM_OPTIONS, id="transA"),
        pytest.param("y = Gemm <alpha = 0.5> (x, w)", {"w": floats(4, 5)}, GEMM_OPTIONS, id="alpha"),
        pytest.param("y = Gemm <beta = 2.0> (x, w, b)", {"w": floats(4, 5), "b": floats(5)}, GEMM_OPTIONS, id="beta"),
        pytest.param("y = Gemm(x, w, b)", {"w": floats(4, 5), "b": floats(5)}, None, id="bias-row"),
        pytest.param("y = Gemm(x, w, b)", {"w": floats(4, 5), "b": floats(1, 5)}, None, id="bias-1-by-N"),
        pytest.param("y = Gemm(x, w, b)", {"w": floats(4, 5), "b": floats(1)}, None, id="bias-one"),
        pytest.param(
            "y = Gemm(x, w, b)", {"w": floats(4, 5), "b": floats(4, 5)}, "bias is not one number a channel", id="bias-matrix"
        ),
        pytest.param(
            "y = Gemm(x, w, b)", {"w": floats(4, 4), "b": floats(4, 1)}, "bias is not one number a channel", id="bias-column"
        ),
    ],
)
def test_refusals_of_gemm(body: str, constants: dict[str, Array], reason: str | None) -> None:
    source = model("g (float[4, 4] x) => (float[p, q] y) { " + body + " }", **constants)
    graph, placement = placed(source)
    assert linear_refusal(graph.nodes[0], Settings()) == reason
    assert bool(placement.linears) == (reason is None)


def test_refusal_of_other_weight_types_and_ranks() -> None:
    source = model(
        "g (double[1, 3, 8, 8] x) => (double[n, 3, p, q] y) { y = Conv(x, w) }", w=floats(3, 3, 3, 3).astype(np.float64)
    )
    graph, _ = placed(source)
    assert linear_refusal(graph.nodes[0], Settings()) == "weights are not float32"
    source = model("g (float[1, 2, 4, 4, 4] x) => (float[n, 2, p, q, r] y) { y = Conv(x, w) }", w=floats(2, 2, 3, 3, 3))
    graph, _ = placed(source)
    assert linear_refusal(graph.nodes[0], Settings()) == "convolution over more than two dimensions"


def test_a_conv_reads_and_writes_integers_a_gemm_reads_them() -> None:
    source = image_model(f"a = {CONV} (x, w)  p = GlobalAveragePool(a)  f = Flatten(p)  y = Gemm(f, k)", "float[n, 4] y")
    _, placement = placed(source)
    got = names(placement)
    assert got["linear"] == {"conv_0", "gemm_3"}
    assert got["quantised"] == {"x", "a", "p", "f"}  # not y: a Gemm that nothing integer reads ends in float
    assert got["integer"] == {"globalaveragepool_1", "flatten_2"}


def test_relu_and_clip_fold_into_the_range() -> None:
    source = image_model(
        f"a = {CONV} (x, w)  r = Relu(a)  b2 = {CONV} (r, w)  d = Clip(b2, zero, six)  y = {CONV} (d, w)",
        zero=np.float32(0),
        six=np.float32(6),
    )
    _, placement = placed(source)
    got = names(placement)
    assert got["folded"] == {"relu_1", "clip_3"}
    assert got["quantised"] == {"x", "r", "d", "y"}
    assert got["integer"] == set()


@pytest.mark.parametrize(
    ("body", "result"),
    [
        pytest.param(f"a = {CONV} (x, w)  r = Relu(a)  s = Sigmoid(a)  m = Mul(r, s)  y = {CONV} (m, w)", "y", id="read-twice"),
        pytest.param(f"s = Sigmoid(x)  r = Relu(s)  y = {CONV} (r, w)", "y", id="behind-a-float-node"),
        pytest.param(f"a = {CONV} (x, w)  r = Clip(a, half, six)  y = {CONV} (r, w)", "y", id="bounds-without-zero"),
        pytest.param(f"h = Identity(six)  a = {CONV} (x, w)  r = Clip(a, half, h)  y = {CONV} (r, w)", "y", id="bounds-computed"),
    ],
)
def test_what_does_not_fold(body: str, result: str) -> None:
    constants = {k: np.float32(v) for k, v in {"half": 0.5, "six": 6.0}.items() if f"{k}" in body}
    _, placement = placed(image_model(body, f"float[n, 3, 8, 8] {result}", **constants))
    assert placement.folded == set()


def test_a_tensor_that_is_an_output_does_not_fold() -> None:
    source = image_model(f"a = {CONV} (x, w)  r = Relu(a)  y = {CONV} (r, w)", "float[n, 3, 8, 8] y, float[n, 3, 8, 8] a")
    graph, placement = placed(source)
    assert placement.folded == set()
    assert node(graph, "relu_1") in placement.integer  # done on the integers of a


@pytest.mark.parametrize(
    ("text", "constants", "expected"),
    [
        pytest.param("y = Relu(x)", {}, (0.0, np.inf), id="relu"),
        pytest.param("y = Clip(x, lo, hi)", {"lo": np.float32(-1), "hi": np.float32(2)}, (-1.0, 2.0), id="both"),
        pytest.param("y = Clip(x, lo)", {"lo": np.float32(0)}, (0.0, np.inf), id="low-only"),
        pytest.param("y = Clip(x, , hi)", {"hi": np.float32(3)}, (-np.inf, 3.0), id="high-only"),
        pytest.param("y = Clip(x)", {}, (-np.inf, np.inf), id="none"),
        pytest.param("y = Clip(x, lo)", {"lo": np.float32(0.1)}, None, id="without-zero"),
        pytest.param("y = Tanh(x)", {}, None, id="another-operator"),
    ],
)
def test_clip_bounds(text: str, constants: dict[str, Array], expected: tuple[float, float] | None) -> None:
    graph = Graph.from_proto(model("g (float[2] x) => (float[2] y) { " + text + " }", **constants))
    assert clip_bounds(graph.nodes[-1]) == expected


def test_a_residual_of_convolutions_is_carried_in_integers() -> None:
    source = image_model(f"a = {CONV} (x, w)  d = {CONV} (a, w)  s = Add(a, d)  r = Relu(s)  y = {CONV} (r, w)")
    _, placement = placed(source)
    got = names(placement)
    assert got["integer"] == {"add_2"}
    assert got["folded"] == {"relu_3"}
    assert got["quantised"] == {"x", "a", "d", "r", "y"}


def test_a_residual_stream_of_floats_stays_float() -> None:
    text = """g (float[n, 4] x) => (float[n, 4] y) {
        a = LayerNormalization(x, g1, g0)  m = Gemm(a, w1)  s = Add(x, m)
        c = LayerNormalization(s, g1, g0)  o = Gemm(c, w1)  y = Add(s, o) }"""
    _, placement = placed(model(text, g1=np.ones(4, np.float32), g0=np.zeros(4, np.float32), w1=floats(4, 4)))
    got = names(placement)
    assert got["quantised"] == {"a", "c"}
    assert got["integer"] == set()


@pytest.mark.parametrize(
    "body",
    [
        f"a = {CONV} (x, w)  s = Add(a, one)  y = {CONV} (s, w)",
        f"a = {CONV} (x, w)  p = GlobalAveragePool(a)  s = Add(a, p)  y = {CONV} (s, w)",
        f"a = {CONV} (x, w)  p = GlobalAveragePool(a)  r = Relu(p)  s = Add(a, r)  y = {CONV} (s, w)",
        f"a = {CONV} (x, w)  p = GlobalAveragePool(a)  i = Identity(p)  s = Add(a, i)  y = {CONV} (s, w)",
    ],
    ids=["constant", "pool", "pool-relu", "pool-moved"],
)
def test_an_added_constant_or_pooled_operand_keeps_an_add_float(body: str) -> None:
    _, placement = placed(image_model(body))
    assert [n for n in placement.integer if n.op == "Add"] == []
    assert any(t.name == "s" for t in placement.quantised)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("k2 = Concat <axis = 1> (p, q)", id="two-pools"),
        pytest.param("k2 = Concat <axis = 1> (q, p)", id="two-pools-swapped"),
        pytest.param("r = Relu(p)  k2 = Concat <axis = 1> (r, q)", id="behind-relu"),
    ],
)
def test_two_pools_never_share_a_scale(body: str) -> None:
    """A pool's scale follows from its own source: one scale for two results would leave one of them inexact."""
    text = f"""g (float[1, 3, 8, 8] x) => (float[n, 4] y) {{
        a = {CONV} (x, w)  c = {CONV} (a, w)  p = GlobalAveragePool(a)  q = GlobalAveragePool(c)
        {body}  f = Flatten(k2)  y = Gemm(f, m) }}"""
    _, placement = placed(model(text, w=W["w"], m=floats(6, 4)))
    assert not [n for n in placement.integer if n.op == "Concat"]
    assert any(t.name == "f" for t in placement.quantised)


def test_a_pool_and_its_source_never_share_a_scale() -> None:
    text = f"""g (float[1, 3, 8, 8] x) => (float[n, 3, p, q] y) {{
        a = {CONV} (x, w)  p = GlobalAveragePool(a)  e = Expand(p, shape)  k2 = Concat <axis = 0> (a, e)  y = {CONV} (k2, w) }}"""
    _, placement = placed(model(text, w=W["w"], shape=np.array([1, 3, 8, 8])))
    assert not [n for n in placement.integer if n.op == "Concat"]


def test_excluded_nodes_are_read_as_floats() -> None:
    source = image_model(f"a = {CONV} (x, w)  r = Relu(a)  d = {CONV} (r, w)  y = {CONV} (d, w)")
    _, placement = placed(source, exclude=("conv_2",))
    got = names(placement)
    assert got["linear"] == {"conv_0", "conv_3"}
    assert [(n.name, reason) for n, reason in placement.refused] == [("conv_2", "excluded by --exclude")]
    _, placement = placed(source, exclude=("relu_1",))
    assert names(placement)["folded"] == set()
    assert names(placement)["integer"] == set()


SHARED = [
    ("y = MaxPool <kernel_shape = [2, 2]> (x)", {}, True),
    ("y, i = MaxPool <kernel_shape = [2, 2]> (x)", {}, False),
    ("y = Transpose(x)", {}, True),
    ("y = Pad(x, p)", {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1])}, True),
    ("y = Pad(x, p, v)", {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "v": np.float32(0)}, True),
    ("y = Pad(x, p, v)", {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "v": np.float32(2)}, False),
    ('y = Pad <mode = "wrap"> (x, p)', {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1])}, False),
    ('y = Pad <mode = "reflect"> (x, p)', {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1])}, True),
    ('y = Resize <mode = "nearest"> (x, , s)', {"s": np.float32([1, 1, 2, 2])}, True),
    ('y = Resize <mode = "linear"> (x, , s)', {"s": np.float32([1, 1, 2, 2])}, False),
    ("y = Sigmoid(x)", {}, False),
    ("y = Concat <axis = 1> (x, x)", {}, True),
]


@pytest.mark.parametrize(("text", "constants", "expected"), SHARED, ids=[s[0].split("=", 1)[1].strip()[:40] for s in SHARED])
def test_shares_scale(text: str, constants: dict[str, Array], expected: bool) -> None:
    ends = "float[a, b, c, d] y" + (", int64[a, b, c, d] i" if "i = " in text.split("<")[0] else "")
    graph = Graph.from_proto(model("g (float[1, 3, 4, 4] x) => (" + ends + ") { " + text + " }", **constants))
    assert shares_scale(graph.nodes[0]) is expected


@pytest.mark.parametrize(
    ("shape", "expected"), [("1, 3, 7, 5", 35), ("1, 3, h, 5", None), ("1, 3, 9", 9)], ids=["static", "dynamic", "rank-3"]
)
def test_pool_area(shape: str, expected: int | None) -> None:
    rank = ", ".join("abcd"[: shape.count(",") + 1])
    graph = Graph.from_proto(model(f"g (float[{shape}] x) => (float[{rank}] y) {{ y = GlobalAveragePool(x) }}"))
    assert pool_area(graph.nodes[0]) == expected


def test_both_parts_of_a_split_share_the_scale_of_its_input() -> None:
    text = f"""g (float[1, 3, 8, 8] x) => (float[n, 3, p, q] y, float[n, 3, r, s] z) {{
        a = {CONV} (x, w)  b1, b2 = Split <axis = 2, num_outputs = 2> (a)  y = {CONV} (b1, w)  z = Sigmoid(b2) }}"""
    _, placement = placed(model(text, w=W["w"]))
    assert {"a", "b1", "b2"} <= names(placement)["quantised"]
    assert names(placement)["integer"] == {"split_1"}
