"""Neural implants: 1x1 filters in place of those that go; exact where filters are 1x1 already, fitted by least squares else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from core_models import core_context, float_outputs, floats, images, model, outputs, sqnr
from exactness_helpers import assert_exact, both_formats
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator
from prune_models import CONV, FEEDS, net, pruned
from runtime_marks import needs_conv_integer

from qcompile import compile_model
from qcompile.context import ChannelPruning
from qcompile.errors import DataError, InputError, ModelError
from qcompile.graph import Array, Graph
from qcompile.layer_counts import count_layers, totals
from qcompile.passes._prune_budget import groups_of
from qcompile.passes._prune_implant import parts_of, refusals, split
from qcompile.passes._prune_rules import trace
from qcompile.passes._prune_trace import Cut, Trace
from qcompile.passes.prune_channels import PruneChannels

MODELS = Path(__file__).resolve().parents[1] / "models"
DATA = str(MODELS / "digits_calib.npz")


def centred(weight: Array, filters: list[int]) -> Array:
    """`weight` with these filters zero but at their centre."""
    weight = weight.copy()
    middle = tuple(k // 2 for k in weight.shape[2:])
    for index in filters:
        kept = weight[index][(slice(None), *middle)].copy()
        weight[index] = 0
        weight[index][(slice(None), *middle)] = kept
    return weight


def traced(proto: ModelProto) -> Trace:
    graph = Graph.from_proto(proto)
    graph.infer_shapes()
    graph.sort()
    return trace(graph, lambda node: False)


def chain() -> ModelProto:
    """A strided, dilated filter whose pads reach further than its centre needs; its activation goes with it."""
    text = f"""g (float[1, 3, 11, 11] x) => (float[1, 4, 3, 3] y) {{
        a = Conv <pads = [2, 3, 2, 3], strides = [2, 2], dilations = [2, 2]> (x, w0, b0)  c = Clip(a, low, high)
        l = LeakyRelu <alpha = 0.2> (c)  p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (l)  y = {CONV} (p, w1) }}"""
    first = centred(floats(8, 3, 3, 3), [1, 4])
    return model(text, w0=first, b0=floats(8), w1=floats(4, 8, 3, 3, seed=1), low=np.float32(-1), high=np.float32(2))


def one_axis() -> ModelProto:
    text = """g (float[2, 3, 12] x) => (float[2, 5] y) {
        a = Conv <auto_pad = "SAME_UPPER"> (x, w0)  r = Relu(a)  f = Flatten(r)  y = MatMul(f, w1) }"""
    return model(text, w0=centred(floats(8, 3, 5), [1, 4]), w1=floats(96, 5, seed=1))


def depthwise() -> ModelProto:
    text = f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
        a = {CONV} (x, w0)  d = Conv <group = 8, pads = [1, 1, 1, 1]> (a, w1, b1)  n = BatchNormalization(d, s, b, m, v)
        y = Conv(n, w2) }}"""
    weights = {name: floats(16, seed=i) for i, name in enumerate(["b1", "s", "b", "m"])}
    return model(
        text,
        **weights,
        v=np.abs(floats(16)) + np.float32(0.1),
        w0=centred(floats(8, 3, 3, 3), [1, 4]),
        w1=floats(16, 1, 3, 3, seed=1),
        w2=floats(4, 16, 1, 1, seed=2),
    )


def concat() -> ModelProto:
    text = f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
        a = {CONV} (x, w0)  r = Relu(a)  b = Conv(x, w1)  c = Concat <axis = 1> (b, r, x)  d = {CONV} (c, w2)  e = Conv(a, w3)
        y = Add(d, e) }}"""
    weights = {"w1": floats(5, 3, 1, 1), "w2": floats(4, 16, 3, 3, seed=2), "w3": floats(4, 8, 1, 1, seed=3)}
    return model(text, w0=centred(floats(8, 3, 3, 3), [1, 4]), **weights)


def residual() -> ModelProto:
    """A stream that three layers write, one of 1x1 filters: all of them move alike."""
    text = f"""g (float[1, 3, 8, 8] x) => (float[1, 5] y) {{
        a = {CONV} (x, w0)  b = Conv(x, w1, b1)  s = Add(a, b)  r = Relu(s)  c = {CONV} (r, w2, b1)  t = Add(c, r)
        p = GlobalAveragePool(t)  f = Flatten(p)  y = Gemm(f, w3, b3) }}"""
    weights = {
        "w0": centred(floats(8, 3, 3, 3), [1, 4]),
        "w1": floats(8, 3, 1, 1, seed=1),
        "b1": floats(8),
        "w2": centred(floats(8, 8, 3, 3, seed=2), [1, 4]),
        "w3": floats(8, 5, seed=3),
        "b3": floats(5),
    }
    return model(text, **weights)


@pytest.mark.parametrize(
    ("make", "made"),
    [(chain, 1), (one_axis, 1), (depthwise, 1), (concat, 1), (residual, 2)],
    ids=lambda f: getattr(f, "__name__", ""),
)
@pytest.mark.parametrize("gone", [False, True], ids=["implants alone", "others go"])
def test_filters_that_are_1x1_already_become_implants_exactly(make: Callable[[], ModelProto], made: int, gone: bool) -> None:
    source = make()
    found = traced(source)
    units, _ = next(g for g in groups_of(found) if len(g[0]) == 8)
    assert not set(refusals(found, groups_of(found))) & set(units)
    lost = frozenset([units[2], units[6]] if gone else [])
    cut = Cut(lost, frozenset([units[1], units[4]]), (frozenset(units),))
    reference = traced(source)
    reference.cut(Cut(lost))
    parts = parts_of(found, cut)
    found.cut(cut)
    after = split(found, cut, parts)
    assert [len(p.rows) for p in after if p.implant] == [2] * made
    wanted, got = reference.graph.to_proto(), found.graph.to_proto()
    onnx.checker.check_model(got, full_check=True)
    shape = [d.dim_value for d in source.graph.input[0].type.tensor_type.shape.dim]
    for seed in range(2):
        feed = {"x": floats(*shape, seed=seed)}
        a, b = (ReferenceEvaluator(m).run(None, feed)[0] for m in (wanted, got))
        np.testing.assert_allclose(b, a, rtol=2e-4, atol=1e-4)


def why(body: str, **weights: Array) -> str | None:
    found = traced(model(f"g (float[1, 4, 8, 8] x) => (float[p, q, r, s] y) {{ {body} }}", **weights))
    groups = groups_of(found)
    return refusals(found, groups).get(groups[0][0][0])


@pytest.mark.parametrize(
    ("body", "kernel", "reason"),
    [
        ("a = Conv(x, w)  y = Conv(a, v)", 3, "its padding does not keep the centre of its kernel inside"),
        (
            'a = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w)  y = Conv(a, v)',
            3,
            "its padding does not keep the centre",
        ),
        ("a = Conv <pads = [1, 1, 0, 0]> (x, w)  y = Conv(a, v)", 2, "an even kernel has no centre"),
        ("a = Conv(x, w)  y = Conv(a, v)", 1, "its filters are 1x1"),
        (f"a = {CONV} (x, w)  b = Concat <axis = 1> (a, a)  y = Conv(b, u)", 3, "its channels are not read in one order"),
        (f"a = {CONV} (x, w)  b, c = Split <axis = 1, num_outputs = 2> (a)  d = Add(b, c)  y = Conv(d, s)", 3, "makes others in"),
        ("a = MatMul(x, m)  b = Relu(a)  y = MatMul(b, m2)", 3, "no convolution"),
    ],
    ids=["valid", "same, strided", "even", "1x1", "twice", "split", "product"],
)
def test_filters_that_get_none(body: str, kernel: int, reason: str) -> None:
    known = {
        "w": floats(4, 4, kernel, kernel),
        "v": floats(4, 4, 1, 1),
        "u": floats(4, 8, 1, 1),
        "s": floats(4, 2, 1, 1),
        "m": floats(8, 6),
        "m2": floats(6, 8),
    }
    found = why(body, **{k: v for k, v in known.items() if f" {k})" in body})
    assert found is not None and found.startswith("no implant: ") and reason in found


def test_a_padded_shortcut_ties_channels_that_no_one_order_suits() -> None:
    text = f"""g (float[1, 3, 8, 8] x) => (float[1, 5] y) {{
        a = {CONV} (x, w0)  r = Relu(a)  d = {CONV} (r, w2)  f = Pad(r, pads)  t = Add(d, f)
        p = GlobalAveragePool(t)  f2 = Flatten(p)  y = Gemm(f2, w3) }}"""
    weights = {"w0": floats(4, 3, 3, 3), "w2": floats(8, 4, 3, 3), "pads": np.array([0, 2, 0, 0, 0, 2, 0, 0]), "w3": floats(8, 5)}
    found = traced(model(text, **weights))
    reasons = refusals(found, groups_of(found))
    assert set(reasons.values()) == {"no implant: a layer that makes its channels makes others in between"}
    assert len(reasons) == 8


@pytest.mark.parametrize("budget", ["macs", "params"])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_budget_counts_implants(tmp_path: Path, budget: str, share: float) -> None:
    graph, records = pruned(budget=budget, implant=share)
    went = {r.node: r.channels - r.kept for r in records}
    assert 0 < sum(r.implanted for r in records) <= share * sum(went.values())
    assert all(r.kept % 4 == 0 and r.implanted % 4 == 0 and r.kept > 0 for r in records)
    made = {n.name: n.inputs[1].dims for n in graph.nodes if n.op == "Conv"}
    for record in records:
        assert made[record.node][0] == record.kept
        if record.implanted:
            assert made[record.node + "_implant"][0] == record.implanted and made[record.node + "_implant"][2:] == (1, 1)
    onnx.save(net(), tmp_path / "a.onnx")
    graph.save(tmp_path / "b.onnx")
    before, after = (totals(count_layers(tmp_path / f"{n}.onnx", FEEDS[0])) for n in "ab")
    key = "macs" if budget == "macs" else "parameters"
    assert 0.45 < after[key] / before[key] <= 0.7  # type: ignore[operator]


def test_a_latency_budget_measures_the_graph_with_implants(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be timed is looked at: here it takes as long as it has weights."""
    seen: list[list[str]] = []

    def ratio(dense: Graph, cut: Graph, feeds: object) -> float:
        seen.append([n.name for n in cut.nodes if n.op == "Conv"])
        sizes = [sum(c.array().size for c in g.constants.values()) for g in (dense, cut)]
        return sizes[1] / sizes[0]

    monkeypatch.setattr("qcompile.passes._prune_latency.graph_session", lambda graph, threads: graph)
    monkeypatch.setattr("qcompile.passes._prune_latency._ratio", ratio)
    graph, records = pruned(ratio=0.2, budget="latency", implant=0.25)
    assert any(r.implanted for r in records)
    assert any(name.endswith("_implant") for names in seen for name in names)
    assert sorted(n.name for n in graph.nodes if n.op == "Conv") in [sorted(names) for names in seen]


def test_no_share_is_no_implant() -> None:
    graphs = [pruned(implant=share)[0].to_proto().SerializeToString(deterministic=True) for share in (0.0, 0.0)]
    assert graphs[0] == graphs[1]
    assert all(not r.implanted for r in pruned(implant=0.0)[1])


def test_an_implant_is_the_least_squares_fit_from_the_centre_taps() -> None:
    """Oracle: numpy's lstsq on the centre pixels of all samples, with a column of ones for the bias."""
    text = f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) {{
        a = {CONV} (x, w0, b0)  r = Relu(a)  y = {CONV} (r, w1) }}"""
    source = model(text, w0=floats(8, 3, 3, 3), b0=floats(8), w1=floats(4, 8, 3, 3, seed=1))
    # Neighbours are alike, as in images: the centre tells what they are.
    feeds = [{"x": f["x"].repeat(4, axis=2).repeat(4, axis=3)[:, :, 2:10, 3:11]} for f in images(24)]
    graph = Graph.from_proto(source)
    context = core_context(feeds, pruning=ChannelPruning(0.05, criterion="l1", multiple=2, implant=1.0))
    PruneChannels().run(graph, context)
    node = next(n for n in graph.nodes if n.name.endswith("_implant"))
    weight, bias = (node.inputs[i].array().astype(np.float64) for i in (1, 2))
    dense = ReferenceEvaluator(model("g (float[1, 3, 8, 8] x) => (float[1, 8, 8, 8] a) { a = " + CONV + " (x, w0, b0) }",
                                     w0=floats(8, 3, 3, 3), b0=floats(8)))  # fmt: skip
    wanted = np.concatenate([np.moveaxis(dense.run(None, f)[0], 1, -1).reshape(-1, 8) for f in feeds]).astype(np.float64)
    rows = np.concatenate([np.moveaxis(f["x"], 1, -1).reshape(-1, 3) for f in feeds]).astype(np.float64)
    ones = np.column_stack([rows, np.ones(len(rows))])
    least = np.linalg.lstsq(ones, wanted, rcond=None)[0]  # [4, 8]
    floor = np.square(ones @ least - wanted).sum(axis=0)
    given = rows @ weight.reshape(-1, 3).T + bias
    errors = np.square(given[:, :, None] - wanted[:, None, :]).sum(axis=0)  # [implants, filters]
    which = (errors / floor).argmin(axis=1)
    assert len(set(which.tolist())) == len(which) == 2
    own = errors[[0, 1], which]
    np.testing.assert_array_less(own, 1.01 * floor[which])
    centre = floats(8, 3, 3, 3)[which, :, 1, 1].astype(np.float64)
    unfitted = np.square(rows @ centre.T + floats(8)[which] - wanted[:, which]).sum(axis=0)
    assert own.sum() < 0.7 * unfitted.sum()


def test_an_implant_is_better_than_no_filter() -> None:
    """The same chunks, once implanted and once gone."""
    wanted = float_outputs(net(), FEEDS)
    graph, records = pruned(implant=1.0, criterion="l1", ratio=0.2)
    implanted = sqnr(wanted, outputs(graph, FEEDS))
    rows = sum(r.implanted for r in records)
    for ratio in (0.2, 0.3, 0.4, 0.5):
        other, lost = pruned(implant=0.0, criterion="l1", ratio=ratio)
        if sum(r.channels - r.kept for r in lost) >= rows:
            assert implanted > sqnr(wanted, outputs(other, FEEDS)) + 1
            return
    pytest.fail("no ratio removes as many filters")


def test_all_formats_agree_on_a_model_with_implants() -> None:
    graph, records = pruned(implant=1.0)
    assert any(r.implanted for r in records)
    qdq, qoperator = both_formats(graph, core_context(FEEDS))
    assert any(n.op_type == "Concat" for n in qdq.graph.node)
    results = assert_exact(qdq, qoperator, FEEDS[:4])
    assert len(results) == 4


@pytest.mark.parametrize("criterion", ["l1", "hrank"])
def test_implants_of_a_stream_that_a_folded_layer_starts(tmp_path: Path, criterion: str) -> None:
    """The first layer is folded after it was split; the streams behind it start at a depthwise convolution."""
    options: dict[str, Any] = {"prune_channels": 0.3, "prune_implant": 0.5, "channel_multiple": 4, "prune_criterion": criterion}
    path = tmp_path / "m.onnx"
    report = compile_model(MODELS / "digits_cnn.onnx", path, data=DATA, latency=False, **options).report
    assert any(x["implanted"] for x in report["pruning"]["layers"])
    assert report["accuracy"]["sqnr_db"] > 0


@pytest.mark.parametrize("format_", ["qdq", "qoperator", pytest.param("integer", marks=needs_conv_integer)])
def test_a_compiled_model_with_implants(tmp_path: Path, format_: str) -> None:
    path = tmp_path / "m.onnx"
    options: dict[str, Any] = {"data": DATA, "latency": False, "prune_channels": 0.2, "prune_implant": 0.5, "format": format_}
    report = compile_model(MODELS / "digits_cnn.onnx", path, **options).report
    layers = report["pruning"]["layers"]
    assert report["pruning"]["implant"] == 0.5
    assert sum(x["implanted"] for x in layers) > 0
    assert report["complexity"]["quantised"]["macs"] <= 0.8 * report["complexity"]["float"]["macs"]
    assert report["accuracy"]["sqnr_db"] > 3
    first = path.read_bytes()
    compile_model(MODELS / "digits_cnn.onnx", path, **options)
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prune_channels": 0.3, "prune_implant": 1.5}, "--prune-implant 1.5: give the share of pruned filters"),
        ({"prune_channels": 0.3, "prune_implant": -0.1}, "--prune-implant -0.1: give the share"),
        ({"prune_channels": 0.3, "prune_implant": 0.5, "refit": False}, "--prune-implant 0.5: 1x1 filters are fitted"),
        ({"prune_implant": 0.5}, "--prune-implant is for channel pruning; give --prune-channels"),
    ],
    ids=["above 1", "below 0", "not fitted", "alone"],
)  # fmt: skip
def test_bad_options(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        compile_model(MODELS / "digits_cnn.onnx", tmp_path / "m.onnx", **{"data": DATA, "latency": False, **options})
    assert "\n" not in str(caught.value)


def test_one_sample_is_too_few() -> None:
    context = core_context(FEEDS[:1], pruning=ChannelPruning(0.3, criterion="l1", multiple=4, implant=0.5))
    with pytest.raises(DataError, match="give 2 at least"):
        PruneChannels().run(Graph.from_proto(net()), context)


def test_a_budget_that_implants_keep_out_of_reach() -> None:
    with pytest.raises(ModelError, match=r"of the macs can go; .* or fewer implants than --prune-implant 1$"):
        pruned(ratio=0.85, implant=1.0)


def test_layers_without_implants_are_counted() -> None:
    text = f"""g (float[1, 3, 8, 8] x) => (float[1, 4, 6, 6] y) {{
        a = Conv(x, w0)  r = Relu(a)  b = {CONV} (r, w1)  s = Relu(b)  y = {CONV} (s, w2) }}"""
    source = model(text, w0=floats(16, 3, 3, 3), w1=floats(16, 16, 3, 3, seed=1), w2=floats(4, 16, 3, 3, seed=2))
    context = core_context(FEEDS, pruning=ChannelPruning(0.6, criterion="l1", multiple=4, implant=0.5))
    report = PruneChannels().run(Graph.from_proto(source), context)
    assert any(reason.startswith("no implant: its padding") for reason in report.skipped)
