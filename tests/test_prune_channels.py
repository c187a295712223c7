"""Channel pruning: what hangs together, exact removal of zero channels on every kind of structure, budgets, refit, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from core_models import core_context, float_outputs, floats, model, outputs, sqnr
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator
from prune_models import CONV, FEEDS, net, pruned

from qcompile import compile_model
from qcompile.context import ChannelPruning
from qcompile.errors import InputError, ModelError
from qcompile.graph import Array, Graph
from qcompile.layer_counts import count_layers, totals
from qcompile.options_sparsity import pruning_of
from qcompile.passes._prune_budget import Costs, Fixed, groups_of, order
from qcompile.passes._prune_rules import trace
from qcompile.passes._prune_scores import l1
from qcompile.passes._prune_trace import Cut
from qcompile.passes.prune_channels import PruneChannels

MODELS = Path(__file__).resolve().parents[1] / "models"
DATA = str(MODELS / "digits_calib.npz")


def zero(array: Array, channels: list[int], axis: int = 0) -> Array:
    array = array.copy()
    array[(slice(None),) * axis + (channels,)] = 0
    return array


def chain() -> tuple[ModelProto, str, list[int]]:
    text = f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 4, 4] y) {{
        a = {CONV} (x, w0, b0)  r = Relu(a)  p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)  y = {CONV} (p, w1) }}"""
    weights = {"w0": zero(floats(8, 3, 3, 3), [1, 6]), "b0": zero(floats(8), [1, 6]), "w1": floats(4, 8, 3, 3, seed=1)}
    return model(text, **weights), "a", [1, 6]


def depthwise() -> tuple[ModelProto, str, list[int]]:
    text = """g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {
        a = Conv(x, w0)  d = Conv <group = 6, pads = [1, 1, 1, 1]> (a, w1)  n = BatchNormalization(d, s, b, m, v)
        c = Clip(n, low, high)  y = Conv(c, w2, b2) }"""
    weights = {
        "w0": zero(floats(6, 3, 1, 1), [0, 5]),
        "w1": floats(12, 1, 3, 3, seed=1),
        "s": floats(12),
        "b": zero(floats(12), [0, 1, 10, 11]),
        "m": zero(floats(12), [0, 1, 10, 11]),
        "v": np.abs(floats(12)),
        "low": np.float32(0),
        "high": np.float32(6),
        "w2": floats(4, 12, 1, 1, seed=2),
        "b2": floats(4),
    }
    return model(text, **weights), "a", [0, 5]


def residual() -> tuple[ModelProto, str, list[int]]:
    """Two widths in one stream: channels are padded in front and behind, as CIFAR's ResNets do."""
    text = f"""g (float[1, 3, 8, 8] x) => (float[1, 5] y) {{
        a = {CONV} (x, w0)  b = {CONV} (a, w1)  s = Add(a, b)  r = Relu(s)
        d = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r, w2)
        e = Slice(r, first, last, axes, step)  f = Pad(e, pads)  t = Add(d, f)
        p = GlobalAveragePool(t)  f2 = Flatten(p)  y = Gemm(f2, w3, b3) }}"""
    weights = {
        "w0": zero(floats(4, 3, 3, 3), [2]),
        "w1": zero(floats(4, 4, 3, 3, seed=1), [2]),
        "w2": zero(floats(8, 4, 3, 3, seed=2), [4]),
        "first": np.zeros(2, np.int64),
        "last": np.full(2, 8),
        "axes": np.array([2, 3]),
        "step": np.full(2, 2),
        "pads": np.array([0, 2, 0, 0, 0, 2, 0, 0]),
        "w3": floats(8, 5, seed=3),
        "b3": floats(5),
    }
    return model(text, **weights), "a", [2]


def concat() -> tuple[ModelProto, str, list[int]]:
    text = f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
        a = Conv(x, w0)  l = Conv(a, w1)  r = {CONV} (a, w2)  c = Concat <axis = 1> (l, r, a)  y = Conv(c, w3) }}"""
    weights = {
        "w0": floats(4, 3, 1, 1),
        "w1": floats(5, 4, 1, 1, seed=1),
        "w2": zero(floats(6, 4, 3, 3, seed=2), [0, 3]),
        "w3": floats(4, 15, 1, 1, seed=3),
    }
    return model(text, **weights), "r", [0, 3]


def flattened() -> tuple[ModelProto, str, list[int]]:
    text = """g (float[1, 3, 4, 4] x) => (float[1, 2] y) {
        a = Conv(x, w0)  m = Mul(a, k)  f = Reshape(m, shape)  h = Gemm <transB = 1> (f, w1, b1)
        g1 = Gelu(h)  y = MatMul(g1, w2) }"""
    weights = {
        "w0": zero(floats(6, 3, 1, 1), [1, 4]),
        "k": floats(6, 1, 1),
        "shape": np.array([0, 96]),
        "w1": floats(7, 96, seed=1),
        "b1": floats(7),
        "w2": floats(7, 2, seed=2),
    }
    return model(text, **weights), "a", [1, 4]


def split() -> tuple[ModelProto, str, list[int]]:
    text = """g (float[1, 3, 4, 4] x) => (float[1, 3, 4, 4] y) {
        a = Conv(x, w0)  b, c = Split <axis = 1, num_outputs = 2> (a)  d = Conv(b, w1)  e = Conv(c, w2)  y = Add(d, e) }"""
    weights = {"w0": zero(floats(8, 3, 1, 1), [0, 1, 6]), "w1": floats(3, 4, 1, 1, seed=1), "w2": floats(3, 4, 1, 1, seed=2)}
    return model(text, **weights), "a", [0, 1, 6]


def attention() -> tuple[ModelProto, str, list[int]]:
    """Three heads of two channels; the value of the middle one is zero, and so is one hidden unit."""
    text = """g (float[b, 5, 6] x) => (float[b, 5, 6] y) {
        q0 = MatMul(x, wq)  k0 = MatMul(x, wk)  v0 = MatMul(x, wv)  q1 = Add(q0, bq)
        q2 = Reshape(q1, heads)  k2 = Reshape(k0, heads)  v2 = Reshape(v0, heads)
        q = Transpose <perm = [0, 2, 1, 3]> (q2)  k = Transpose <perm = [0, 2, 3, 1]> (k2)
        v = Transpose <perm = [0, 2, 1, 3]> (v2)
        s0 = MatMul(q, k)  s = Div(s0, root)  p = Softmax <axis = -1> (s)  o = MatMul(p, v)
        t = Transpose <perm = [0, 2, 1, 3]> (o)  c = Reshape(t, whole)  z = MatMul(c, wo)  r = Add(x, z)
        n = LayerNormalization <axis = -1> (r, gamma, beta)  h = MatMul(n, w1)  u = Relu(h)  f = MatMul(u, w2)  y = Add(n, f) }"""
    weights = {
        **{name: floats(6, 6, seed=i) for i, name in enumerate(["wq", "wk", "wo"])},
        "wv": zero(floats(6, 6, seed=5), [2, 3], axis=1),
        "bq": floats(6),
        "heads": np.array([0, -1, 3, 2]),
        "whole": np.array([0, -1, 6]),
        "root": np.float32(1.4),
        "gamma": floats(6),
        "beta": floats(6),
        "w1": floats(6, 9, seed=6),
        "w2": floats(9, 6, seed=7),
    }
    return model(text, **weights), "v0", [2, 3]


CASES = [chain, depthwise, residual, concat, flattened, split, attention]


@pytest.mark.parametrize("make", CASES, ids=lambda f: f.__name__)
def test_channels_that_are_zero_change_nothing(make: Callable[[], tuple[ModelProto, str, list[int]]]) -> None:
    source, tensor, channels = make()
    graph = Graph.from_proto(source)
    graph.infer_shapes()
    graph.sort()
    found = trace(graph, lambda node: False)
    label = found.label(next(v for v in graph.values() if v.name == tensor))
    assert label is not None
    gone = {int(r) for r in found.roots(label.ids[channels])}
    assert all(found.frozen(root) is None for root in gone)
    before = sum(c.array().size for c in graph.constants.values())
    found.cut(Cut(frozenset(gone)))
    pruned = graph.to_proto()
    onnx.checker.check_model(pruned, full_check=True)
    assert sum(c.array().size for c in graph.constants.values()) < before
    shape = [d.dim_value or 2 for d in source.graph.input[0].type.tensor_type.shape.dim]
    for seed in range(3):
        feed = {"x": floats(*shape, seed=seed)}
        (wanted,), (got,) = (ReferenceEvaluator(m).run(None, feed) for m in (source, pruned))
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def why(source: ModelProto) -> dict[str, str | None]:
    """Layer -> why its first channel stays."""
    graph = Graph.from_proto(source)
    graph.infer_shapes()
    graph.sort()
    found = trace(graph, lambda node: False)
    return {s.node.name: found.frozen(int(found.roots(s.ids)[0])) for s in found.of_role("out")}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = Conv(x, w)  y = Relu(a)", "its channels are an output of the model"),
        ("a = Conv(x, w)  b = Softmax <axis = 1> (a)  y = Conv(b, w2)", "Softmax runs over its channels"),
        ("a = Conv(x, w)  b = ReduceMean <keepdims = 1> (a, one)  y = Conv(b, v)", "ReduceMean runs over its channels"),
        ("a = Conv(x, w)  b = Conv <group = 2> (a, w3)  y = Conv(b, w2)", "grouped convolution: its groups would become unequal"),
        ("a = Conv(x, w)  b = Conv(a, w4)  y = Conv(b, w4)", "weights are computed at run time, or shared by several nodes"),
        ("a = Conv(x, w)  b = CumSum(a, at)  y = Conv(b, w2)", "an operator reads its channels that pruning does not know"),
        (
            "a = Conv(x, w)  s = Shape(a)  b = Expand(a, s)  y = Conv(b, w2)",
            "a shape is computed from the number of its channels",
        ),
        (
            "a = Conv(x, w)  b = Reshape(a, odd)  y = Conv(b, w2)",
            "its channels are reshaped in a way that does not keep them apart",
        ),
    ],
)
def test_channels_that_stay(body: str, reason: str) -> None:
    weights = {
        "w": floats(4, 4, 1, 1),
        "w2": floats(4, 4, 1, 1),
        "w3": floats(4, 2, 1, 1),
        "w4": floats(4, 4, 1, 1),
        "v": floats(4, 1, 1, 1),
        "one": np.array([1]),
        "at": np.array(1),
        "odd": np.array([1, 4, -1, 4]),
    }
    used = {k: v for k, v in weights.items() if f"{k})" in body or f"{k} " in body or f" {k}," in body}
    made = Graph.from_proto(model(f"g (float[1, 4, 4, 4] x) => (float[p, q, r, s] y) {{ {body} }}", **used)).to_proto()
    if "odd" in body:
        made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    assert why(made)["conv_0"] == reason


def test_a_model_in_which_nothing_can_go() -> None:
    made = model("g (float[1, 4] x) => (float[1, 4] y) { y = MatMul(x, w) }", w=floats(4, 4))
    context = core_context([{"x": floats(1, 4)}], pruning=ChannelPruning(0.5, criterion="l1", refit=False))
    with pytest.raises(ModelError, match=r"--prune-channels 0.5: only 0.000 of the macs can go"):
        PruneChannels().run(Graph.from_proto(made), context)


@pytest.mark.parametrize("criterion", ["l1", "hrank", "hessian", "second-order"])
@pytest.mark.parametrize("budget", ["macs", "params"])
def test_the_budget_holds_and_widths_are_multiples(tmp_path: Path, criterion: str, budget: str) -> None:
    graph, records = pruned(criterion=criterion, budget=budget)
    assert all(r.kept % 4 == 0 and 0 < r.kept < r.channels for r in records)
    onnx.save(net(), tmp_path / "a.onnx")
    graph.save(tmp_path / "b.onnx")
    before, after = (totals(count_layers(tmp_path / f"{n}.onnx", FEEDS[0])) for n in "ab")
    key = "macs" if budget == "macs" else "parameters"
    assert 0.45 < after[key] / before[key] <= 0.7  # type: ignore[operator]


def test_a_latency_budget_is_measured() -> None:
    _, records = pruned(ratio=0.01, budget="latency", multiple=8)
    assert records
    with pytest.raises(
        ModelError, match=r"only .* of the latency can go; ask for less, or give a smaller --channel-multiple than 16"
    ):
        pruned(ratio=0.99, budget="latency", multiple=16)


def test_the_refit_and_second_order_help() -> None:
    wanted = float_outputs(net(), FEEDS)
    plain, fitted = (sqnr(wanted, outputs(pruned(criterion="l1", refit=r)[0], FEEDS)) for r in (False, True))
    best = sqnr(wanted, outputs(pruned(criterion="second-order")[0], FEEDS))
    assert plain + 3 < fitted
    assert fitted < best + 1


def test_both_parts_of_a_split_keep_channels() -> None:
    """All that is cheap to lose stands in one part: a layer that reads no channel would be left."""
    text = f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
        a = {CONV} (x, w0)  p, q = Split <axis = 1, num_outputs = 2> (a)  r = Relu(p)  d = {CONV} (r, w1)  e = {CONV} (q, w2)
        y = Add(d, e) }}"""
    first = floats(16, 3, 3, 3)
    first[:8] *= np.float32(0.01)
    source = model(text, w0=first, w1=floats(4, 8, 3, 3, seed=1), w2=floats(4, 8, 3, 3, seed=2))
    graph = Graph.from_proto(source)
    PruneChannels().run(graph, core_context(FEEDS, pruning=ChannelPruning(0.45, criterion="l1", budget="params", multiple=2)))
    onnx.checker.check_model(graph.to_proto(), full_check=True)
    assert [n.inputs[1].dims[1] for n in graph.nodes if n.op == "Conv"] == [3, 2, 6]


def test_a_layer_without_a_bias_takes_the_mean_of_lost_channels() -> None:
    """What is left must give it by the weights alone, so the fit is about zero and not about the mean."""
    text = "g (float[1, 6, 8] x) => (float[1, 6, 5] y) { a = MatMul(x, w0)  b = Relu(a)  c = Add(b, k)  y = MatMul(c, w1) }"
    source = model(text, w0=floats(8, 32), k=np.float32(1), w1=floats(32, 5, seed=1))
    feeds = [{"x": floats(1, 6, 8, seed=i)} for i in range(48)]
    graph = Graph.from_proto(source)
    PruneChannels().run(graph, core_context(feeds, pruning=ChannelPruning(0.4, criterion="l1", multiple=4)))
    first, last = (n.inputs[1].array().astype(np.float64) for n in graph.nodes if n.op == "MatMul")
    rows = np.concatenate([f["x"][0] for f in feeds]).astype(np.float64)
    reached, wanted = np.maximum(rows @ first, 0) + 1, np.concatenate([o[0] for o in float_outputs(source, feeds)])
    least = np.linalg.lstsq(reached, wanted.astype(np.float64), rcond=None)[0]
    error, floor = (float(np.square(reached @ w - wanted).sum()) for w in (last, least))
    assert error < 1.05 * floor


def test_one_channel_that_is_squeezed_away_names_no_other_axis() -> None:
    text = """g (float[1, 3, 5, 4] x) => (float[1, 2, 4] y) {
        a = Conv(x, w)  b = Squeeze(a, one)  d = Conv(x, v)  e = ReduceMean <keepdims = 0> (d, two)
        c = Concat <axis = 1> (b, e)  y = Conv(c, u) }"""
    weights = {"w": floats(1, 3, 1, 1), "v": floats(4, 3, 1, 1), "u": floats(2, 9, 1), "one": np.array([1]), "two": np.array([2])}
    graph = Graph.from_proto(model(text, **weights))
    graph.infer_shapes()
    graph.sort()
    found = trace(graph, lambda node: False)
    reader = next(s for s in found.of_role("in") if s.node.outputs[0].name == "y")
    assert len(reader.ids) == 9


def test_kept_layers_lose_nothing() -> None:
    _, records = pruned(keep=("gemm*",), ratio=0.1, criterion="l1")
    assert [r.node for r in records] == [
        "conv_2"
    ]  # what the last layer reads is the residual stream: only the block's inside is left
    with pytest.raises(InputError, match=r"--keep nobody: no node of the model matches"):
        pruned(keep=("nobody",))


def test_the_first_to_go_are_the_cheapest_for_what_they_save() -> None:
    graph = Graph.from_proto(net())
    graph.infer_shapes()
    found = trace(graph, lambda node: False)
    base = {s.node: float(s.node.constant(1).array().size) for s in found.of_role("out")}
    groups = groups_of(found)
    assert [len(units) for units, _ in groups] == [16, 32]  # the residual stream, and what is inside the block
    scores = l1(found)
    steps = list(order(groups, Fixed(scores), Costs(found, base), 4))
    assert [len(s.units) for s in steps] == [4] * 10
    inner = set(groups[1][0])
    gone = [u for s in steps for u in s.units if u in inner]
    assert max(scores[u] for u in gone) <= min(scores[u] for u in inner - set(gone))


# --- whole compilations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits_cnn", "digits_vit"])
def test_a_pruned_model_compiles_and_is_smaller(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.onnx"
    options: dict[str, Any] = {"data": DATA, "latency": False, "prune_channels": 0.2, "channel_multiple": 8, "sparsity": "2:4"}
    report = compile_model(MODELS / f"{name}.onnx", path, **options).report
    assert report["pruning"]["layers"]
    assert report["complexity"]["quantised"]["macs"] < report["complexity"]["float"]["macs"]
    assert report["accuracy"]["sqnr_db"] > 3
    floating = compile_model(MODELS / f"{name}.onnx", tmp_path / "f.onnx", bits=32, **{**options, "sparsity": None}).report
    assert floating["complexity"]["quantised"]["macs"] <= 0.8 * floating["complexity"]["float"]["macs"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prune_channels": 0.0}, "--prune-channels 0: give the share to remove"),
        ({"prune_channels": 1.0}, "--prune-channels 1: give the share to remove"),
        ({"prune_channels": 0.3, "prune_criterion": "luck"}, "--prune-criterion luck: choose one of l1, hrank, hessian"),
        ({"prune_channels": 0.3, "prune_budget": "money"}, "--prune-budget money: choose one of params, macs, latency"),
        ({"prune_channels": 0.3, "channel_multiple": 0}, "--channel-multiple 0: give a whole number"),
        ({"prune_channels": 0.3, "data": None}, "--prune-criterion second-order looks at samples; give --data"),
        ({"prune_channels": 0.3, "prune_criterion": "l1", "data": None}, "refitting looks at samples; give --data"),
        ({"keep": ("a",)}, "--keep is for channel pruning; give --prune-channels"),
        ({"refit": False}, "--no-refit is for channel pruning; give --prune-channels"),
        ({"prune_budget": "macs"}, "--prune-budget is for channel pruning"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        compile_model(MODELS / "digits_cnn.onnx", tmp_path / "m.onnx", **{"data": DATA, "latency": False, **options})
    assert "\n" not in str(caught.value)


def test_defaults() -> None:
    assert pruning_of(None, None, None, None, (), None) is None
    assert pruning_of(0.3, None, None, None, (), None) == ChannelPruning(0.3)
