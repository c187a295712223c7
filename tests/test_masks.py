from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper
from passes_helpers import floats, parse

from qcompile.context import Context
from qcompile.graph import Array, Graph
from qcompile.passes._masks import Conditions, MaskedSoftmax, masked_softmax, read_softmax
from qcompile.passes.eliminate import Eliminate
from qcompile.passes.fold_constants import FoldConstants
from qcompile.passes.simplify_shapes import SimplifyShapes
from qcompile.runtime import Session

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
L = 5
X = 3 * floats(2, 3, L, L)
PADDING = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int64)
NUMBERS: dict[str, Array] = {
    "one": np.float32(1),
    "zero": np.float32(0),
    "half": np.float32(0.5),
    "two": np.float32(2),
    "root": np.float32(5.656854),
    "big": np.float32(-10000),
    "lowest": np.float32(np.finfo(np.float32).min),
    "infinite": np.float32(-np.inf),
    "hundred": np.float32(-100),
    "minus": np.float32(-1),
    "axes": np.array([1, 2]),
    "axis1": np.array([1]),
    "axis2": np.array([2]),
    "izero": np.int64(0),
    "ione": np.int64(1),
    "shape": np.array([2, 3, L, L]),
    "size": np.array([L, L]),
    "flag": np.array(True),
    "causal": np.tril(np.ones((L, L), bool)),
    "causal_float": np.triu(np.full((L, L), -1e9, np.float32), 1),
    "causal_infinite": np.triu(np.full((L, L), -np.inf, np.float32), 1),
    "three": np.triu(np.full((L, L), -1e9, np.float32), 1) + np.float32(0.5) * np.eye(L, dtype=np.float32),
    "bias": np.linspace(-1, 1, L * L, dtype=np.float32).reshape(L, L),
}
UNSQUEEZED = "u1 = Unsqueeze(mask, axis1)  u = Unsqueeze(u1, axis2)  "
INVERTED = UNSQUEEZED + "f = Cast <to = 1> (u)  n = Sub(one, f)  "
ADDITIVE = INVERTED + "b = Mul(n, big)  "
CAUSAL = np.tril(np.ones((L, L), bool))
KEEP = PADDING.astype(bool)[:, None, None, :]


def model(body: str, opset: int = 21, inputs: str = "int64[n, l] mask", dims: str = "n, h, l, k") -> ModelProto:
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {k: v for k, v in NUMBERS.items() if k in words}
    return parse(f"g (float[{dims}] x, {inputs}) => (float[{dims}] y) {{ {body} }}", opset, **used)


def read(made: ModelProto) -> tuple[Graph, MaskedSoftmax | str]:
    graph = Graph.from_proto(made)
    graph.infer_shapes()
    node = next(n for n in graph.nodes if n.op == "Softmax")
    found = read_softmax(graph, node)
    assert masked_softmax(graph, node) == (None if isinstance(found, str) else found)
    return graph, found


def softmax64(scores: Array, keep: Array) -> Array:
    """Softmax over the kept positions in float64."""
    kept = np.broadcast_to(keep, scores.shape)
    shifted = np.where(kept, scores.astype(np.float64), -np.inf)
    powers = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    result: Array = powers / powers.sum(axis=-1, keepdims=True)
    return result


def check(made: ModelProto, keep: Array, factor: float = 1.0, mask: Array = PADDING, x: Array = X) -> MaskedSoftmax:
    """The written condition is `keep`, and Softmax over it in float64 is what the float model computes."""
    graph, found = read(made)
    assert isinstance(found, MaskedSoftmax), found
    assert found.keep is not None
    assert found.scores.name == "x"
    assert found.factor == pytest.approx(factor, rel=1e-6)
    condition = Conditions(graph).tensor(found.keep)
    feeds = {"x": x, "mask": mask}
    expected = Session(made).run(feeds)["y"]
    got = keep_of(graph, condition.name, feeds)
    np.testing.assert_array_equal(np.broadcast_to(got, x.shape), np.broadcast_to(keep, x.shape))
    np.testing.assert_allclose(softmax64(found.factor * x, got), expected, rtol=0, atol=1e-6)
    return found


def keep_of(graph: Graph, name: str, feeds: Mapping[str, Array]) -> Array:
    """The value of the bool tensor `name` of `graph`."""
    proto = graph.to_proto()
    del proto.graph.output[:]
    proto.graph.node.append(helper.make_node("Identity", [name], ["kept"]))
    proto.graph.output.append(helper.make_tensor_value_info("kept", TensorProto.BOOL, None))
    return np.asarray(Session(proto).run({i.name: feeds[i.name] for i in proto.graph.input})["kept"])


@pytest.mark.parametrize(
    ("body", "factor"),
    [
        pytest.param(ADDITIVE + "s = Add(x, b)  y = Softmax(s)", 1.0, id="add"),
        pytest.param(ADDITIVE + "s = Add(b, x)  y = Softmax <axis = 3> (s)", 1.0, id="mask-first"),
        pytest.param(ADDITIVE + "d = Div(x, root)  s = Add(d, b)  y = Softmax(s)", 1 / 5.656854, id="divided-before"),
        pytest.param(ADDITIVE + "d = Mul(half, x)  s = Add(d, b)  y = Softmax(s)", 0.5, id="multiplied-before"),
        pytest.param(ADDITIVE + "s = Add(x, b)  d = Mul(s, two)  y = Softmax(d)", 2.0, id="multiplied-after"),
        pytest.param(ADDITIVE + "c = Mul(x, half)  s = Add(c, b)  d = Mul(s, two)  y = Softmax(d)", 1.0, id="before-and-after"),
        pytest.param(ADDITIVE + "s = Add(x, b)  m = Max(s, lowest)  y = Softmax(m)", 1.0, id="max-with-the-lowest"),
        pytest.param(INVERTED + "b = Mul(lowest, n)  s = Add(x, b)  y = Softmax(s)", 1.0, id="lowest-number"),
        pytest.param(
            INVERTED + "c = Cast <to = 9> (n)  b = Where(c, lowest, n)  s = Add(x, b)  y = Softmax(s)", 1.0, id="masked-fill"
        ),
        pytest.param(
            INVERTED + "c = Cast <to = 9> (n)  b = Where(c, infinite, n)  s = Add(x, b)  y = Softmax(s)", 1.0, id="infinite-fill"
        ),
        pytest.param(UNSQUEEZED + "c = Cast <to = 9> (u)  s = Where(c, x, infinite)  y = Softmax(s)", 1.0, id="where-kept"),
        pytest.param(UNSQUEEZED + "c = Equal(u, izero)  s = Where(c, infinite, x)  y = Softmax(s)", 1.0, id="where-masked"),
        pytest.param(
            UNSQUEEZED + "c = Equal(u, izero)  e = Expand(c, shape)  s = Where(e, big, x)  d = Mul(s, two)  y = Softmax(d)",
            2.0,
            id="where-expanded",
        ),
        pytest.param(
            UNSQUEEZED + "n = Sub(ione, u)  f = Cast <to = 1> (n)  b = Mul(f, big)  s = Add(x, b)  y = Softmax(s)",
            1.0,
            id="integer-difference",
        ),
        pytest.param(
            UNSQUEEZED + "f = Cast <to = 1> (u)  n = Sub(f, one)  p = Mul(n, big)  s = Sub(x, p)  y = Softmax(s)",
            1.0,
            id="subtracted",
        ),
        pytest.param(
            "c = Cast <to = 9> (mask)  i = Not(c)  t = Unsqueeze(i, axes)  b = Where(t, big, zero)  s = Add(x, b)  "
            "y = Softmax(s)",
            1.0,
            id="booleans",
        ),
    ],
)
def test_padding(body: str, factor: float) -> None:
    found = check(model(body), KEEP, factor)
    assert found.replaced == ("s = Where(" in body)
    assert found.masked_value <= -1e4


CAUSAL_BODIES = [
    pytest.param("s = Add(x, causal_float)  y = Softmax(s)", id="constant"),
    pytest.param("s = Add(x, causal_infinite)  y = Softmax(s)", id="constant-infinite"),
    pytest.param("s = Where(causal, x, lowest)  y = Softmax(s)", id="where"),
    pytest.param("t = Trilu <upper = 0> (causal)  s = Where(t, x, lowest)  y = Softmax(s)", id="trilu-of-bool"),
    pytest.param(
        "z = Shape <start = 2> (x)  e = Expand(infinite, z)  t = Trilu <upper = 1> (e, ione)  s = Add(x, t)  y = Softmax(s)",
        id="trilu-of-expand",
    ),
    pytest.param(
        "z = Shape <start = 2> (x)  e = ConstantOfShape <value = float[1] {-100000.0}> (z)  "
        "t = Trilu <upper = 1> (e, ione)  s = Add(x, t)  y = Softmax(s)",
        id="trilu-of-constant-of-shape",
    ),
]


@pytest.mark.parametrize("body", CAUSAL_BODIES)
def test_causal(body: str) -> None:
    check(model(body), CAUSAL)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(ADDITIVE + "p = Add(x, b)  s = Add(p, causal_float)  y = Softmax(s)", id="two-adds"),
        pytest.param(ADDITIVE + "m = Add(b, causal_float)  s = Add(x, m)  y = Softmax(s)", id="sum-of-masks"),
        pytest.param(
            UNSQUEEZED + "c = Cast <to = 9> (u)  a = And(c, causal)  s = Where(a, x, infinite)  y = Softmax(s)",
            id="and-of-conditions",
        ),
        pytest.param(ADDITIVE + "w = Where(causal, x, lowest)  s = Add(w, b)  y = Softmax(s)", id="where-and-add"),
        pytest.param(ADDITIVE + "m = Min(b, causal_float)  s = Add(x, m)  y = Softmax(s)", id="the-lower-mask"),
        pytest.param(
            UNSQUEEZED + "c = Equal(u, izero)  m = Where(c, lowest, causal_float)  s = Add(x, m)  y = Softmax(s)",
            id="filled-causal",
        ),
    ],
)
def test_causal_and_padding(body: str) -> None:
    check(model(body), CAUSAL & KEEP)


def test_positions_compared() -> None:
    """Lengths, not 0 and 1: the comparison is the condition."""
    body = "c = Less(steps, mask)  u = Unsqueeze(c, axes)  s = Where(u, x, infinite)  y = Softmax(s)"
    made = model(body, inputs="int64[n, 1] mask")
    made.graph.initializer.append(helper.make_tensor("steps", TensorProto.INT64, [1, L], list(range(L))))
    check(made, np.arange(L) < np.array([4, 2])[:, None, None, None], mask=np.array([[4], [2]]))


def test_token_ids_are_not_zeros_and_ones() -> None:
    ids = np.array([[5, 1, 2, 0, 0], [7, 0, 0, 0, 0]])
    body = "c = Equal(mask, ione)  u = Unsqueeze(c, axes)  s = Where(u, infinite, x)  y = Softmax(s)"
    check(model(body), (ids != 1)[:, None, None, :], mask=ids)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=L, max_size=L), min_size=2, max_size=2), st.sampled_from([0.25, 1.0, 3.0]))
def test_any_padding(rows: list[list[int]], scale: float) -> None:
    mask = np.array(rows, np.int64)
    mask[:, 0] = 1  # a row without a kept position is not defined by `keep`
    body = ADDITIVE + "d = Mul(x, s0)  s = Add(d, b)  y = Softmax(s)"
    made = model(body)
    made.graph.initializer.append(helper.make_tensor("s0", TensorProto.FLOAT, [], [scale]))
    check(made, mask.astype(bool)[:, None, None, :], scale, mask)


def test_two_layers_share_one_condition() -> None:
    body = ADDITIVE + "s = Add(x, b)  z = Softmax(s)  t = Add(z, b)  y = Softmax(t)"
    graph = Graph.from_proto(model(body))
    graph.infer_shapes()
    found = [masked_softmax(graph, n) for n in graph.nodes if n.op == "Softmax"]
    conditions = Conditions(graph)
    tensors = {conditions.tensor(f.keep) for f in found if f is not None and f.keep is not None}
    assert len(tensors) == 1
    made = next(iter(tensors))
    assert made.producer is not None
    assert [n.op for n in graph.nodes].count("Cast") == 2  # the float one and that to bool


@pytest.mark.parametrize(
    ("body", "factor", "scores"),
    [
        pytest.param("y = Softmax(x)", 1.0, "x", id="alone"),
        pytest.param("d = Div(x, root)  y = Softmax(d)", 1 / 5.656854, "x", id="factor"),
        pytest.param("d = Add(x, bias)  y = Softmax(d)", 1.0, "d", id="bias"),
        pytest.param("d = Add(x, other)  y = Softmax(d)", 1.0, "d", id="float-input"),
        pytest.param("d = Mul(x, minus)  y = Softmax(d)", 1.0, "d", id="negative-factor"),
        pytest.param("d = Div(two, x)  y = Softmax(d)", 1.0, "d", id="divisor"),
        pytest.param("d = Mul(x, bias)  y = Softmax(d)", 1.0, "d", id="factor-of-many"),
        pytest.param("d = Max(x, zero)  y = Softmax(d)", 1.0, "d", id="max"),
        pytest.param(
            "e = Add(x, zero)  c = Cast <to = 9> (mask)  u = Unsqueeze(c, axes)  d = Where(u, x, e)  y = Softmax(d)", 1.0, "d",
            id="where-of-scores",
        ),
    ],
)  # fmt: skip
def test_no_mask(body: str, factor: float, scores: str) -> None:
    _, found = read(model(body, inputs="int64[n, l] mask, float[n, 1, 1, l] other"))
    assert isinstance(found, MaskedSoftmax)
    assert found.keep is None
    assert found.scores.name == scores
    assert found.factor == pytest.approx(factor, rel=1e-6)


AXIS = "not along the last axis"
VALUES = "the mask holds other numbers than 0 and at most -10000"


@pytest.mark.parametrize(
    ("body", "opset", "dims", "reason"),
    [
        pytest.param(ADDITIVE + "s = Add(x, b)  y = Softmax <axis = 1> (s)", 21, "n, h, l, k", AXIS, id="axis"),
        pytest.param("y = Softmax <axis = 1> (x)", 11, "n, h, l, k", AXIS, id="flattening-axis"),
        pytest.param("y = Softmax(x)", 11, "n, h, l, k", AXIS, id="old-default"),
        pytest.param(INVERTED + "b = Mul(n, hundred)  s = Add(x, b)  y = Softmax(s)", 21, "n, h, l, k", VALUES, id="small"),
        pytest.param(INVERTED + "b = Mul(n, infinite)  s = Add(x, b)  y = Softmax(s)", 21, "n, h, l, k", VALUES, id="nan"),
        pytest.param(ADDITIVE + "d = Add(b, one)  s = Add(x, d)  y = Softmax(s)", 21, "n, h, l, k", VALUES, id="shifted"),
        pytest.param(
            ADDITIVE + "s = Add(x, b)  d = Mul(s, half)  y = Softmax(d)", 21, "n, h, l, k", VALUES, id="halved-behind"
        ),
        pytest.param("s = Add(x, three)  y = Softmax(s)", 21, "n, h, l, k", VALUES, id="mask-and-bias"),
        pytest.param("s = Add(x, big)  y = Softmax(s)", 21, "n, h, l, k", "the mask keeps nothing", id="nothing-kept"),
        pytest.param(ADDITIVE + "s = Add(x, b)  y = Softmax(s)", 21, "l, k", "the mask enlarges the scores", id="rank"),
        pytest.param("s = Add(x, causal_float)  y = Softmax(s)", 21, "1, h, 1, k", "the mask enlarges the scores", id="repeats"),
    ],
)  # fmt: skip
def test_refused(body: str, opset: int, dims: str, reason: str) -> None:
    made = model(body, opset, dims=dims)
    if dims != "n, h, l, k":
        made.graph.output[0].type.tensor_type.ClearField("shape")
    _, found = read(made)
    assert found == reason


def test_last_axis_of_an_old_softmax() -> None:
    _, found = read(model("y = Softmax <axis = 3> (x)", opset=11))
    assert isinstance(found, MaskedSoftmax)


def test_moved_only_where_the_shape_is_its_own() -> None:
    """The condition [l] stands for a [n, l] tensor: transposing it would be something else."""
    body = "f = Cast <to = 1> (mask)  n = Sub(one, f)  b = Mul(n, big)  w = Add(b, wide)  t = Transpose(w)  s = Add(x, t)  "
    body += "y = Softmax(s)"
    made = model(body, inputs="int64[l] mask", dims="l, n")
    made.graph.initializer.append(helper.make_tensor("wide", TensorProto.FLOAT, [2, L], [0.0] * 2 * L))
    _, found = read(made)
    assert isinstance(found, MaskedSoftmax)
    assert found.keep is None
    assert found.scores.name == "s"


@pytest.mark.zoo
def test_minilm() -> None:
    """Six layers, one condition, from the int64 input; the same Softmax on real sentences."""
    if not ZOO.is_dir():
        pytest.skip(f"{ZOO} is absent")
    made = onnx.load(ZOO / "minilm_sst2" / "model.onnx")
    graph = Graph.from_proto(made)
    for step in (FoldConstants(), SimplifyShapes(), Eliminate()):
        step.run(graph, Context())
    graph.infer_shapes()
    found = [f for n in graph.nodes if n.op == "Softmax" and (f := masked_softmax(graph, n)) is not None]
    assert len(found) == 6
    assert all([s.op for s in f.steps] == ["Add", "Div"] and not f.replaced and f.masked_value == -1e4 for f in found)
    assert all(f.factor == pytest.approx(32**-0.5) for f in found)
    conditions = Conditions(graph)
    keep = {conditions.tensor(f.keep).name for f in found if f.keep is not None}
    assert len(keep) == 1
    feeds = {
        "input_ids": np.array([[101, 2009, 102, 0]]),
        "attention_mask": np.array([[1, 1, 1, 0]]),
        "token_type_ids": np.zeros((1, 4), np.int64),
    }
    feeds = {k: v.astype(np.int64) for k, v in feeds.items()}
    np.testing.assert_array_equal(keep_of(graph, keep.pop(), feeds), [[[[True, True, True, False]]]])
