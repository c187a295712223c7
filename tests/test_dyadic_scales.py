"""Final activation scales in the graph: what the solver says, bounds kept, and no scale moving afterwards."""

from __future__ import annotations

import numpy as np
import pytest
from core_models import CORE, core_context, float_outputs, floats, images, model, outputs, run_core, run_registry, sqnr
from onnx import ModelProto, load

from qcompile.context import Context
from qcompile.dyadic import is_exact_dyadic, linear_multiplier, pool_multiplier, sum_ratio
from qcompile.graph import Array, Graph
from qcompile.passes import PASSES, passes_for
from qcompile.passes.dyadic_scales import DyadicScales
from qcompile.rewrite import Report
from qcompile.runtime import Optimisation, Session

CONV = "Conv <pads = [1, 1, 1, 1]>"
W = {f"w{i}": floats(3, 3, 3, 3, seed=i) * 0.3 for i in range(4)}


def residual() -> ModelProto:
    body = f"""a = {CONV} (x, w0)  b = Relu(a)  c = {CONV} (b, w1)  s = Add(b, c)  t = Relu(s)
        d = {CONV} (t, w2)  u = Add(t, d)  p = GlobalAveragePool(u)  y = {CONV} (p, w3)"""
    return model("g (float[1, 3, 8, 8] x) => (float[n, 3, h, w] y) { " + body + " }", **W)


def test_every_rescale_of_the_graph_is_exact() -> None:
    graph, context, _ = run_core(residual(), images(), until="integer_bias")
    plan = context.plan
    assert plan is not None
    assert plan.linears and plan.adds and plan.pools
    constants = graph.constants
    for place in plan.classes:
        assert place.scale_const is not None and constants[place.scale_const.name] is place.scale_const
        assert place.scale_const.array() == place.scale
    for site in plan.linears:
        if site.result is not None:
            assert is_exact_dyadic(linear_multiplier(site.source.scale, site.weight_scale, site.result.scale)).all()
    for add in plan.adds:
        assert sum_ratio(add.left.scale, add.right.scale, add.result.scale) is not None
    for pool in plan.pools:
        assert is_exact_dyadic(pool_multiplier(pool.source.scale, pool.result.scale, pool.area))


@pytest.mark.parametrize("target", ["any", "vnni", "arm"])
def test_little_accuracy_is_spent(target: str) -> None:
    feeds = images()
    source = residual()
    before, context, _ = run_core(source, feeds, until="search_ranges", target=target)
    plain = sqnr(float_outputs(source, feeds), outputs(before, feeds))
    DyadicScales().run(before, context)
    for level in (Optimisation.OFF, Optimisation.ALL):
        assert sqnr(float_outputs(source, feeds), outputs(before, feeds, level)) > plain - 1


def test_a_second_run_moves_nothing() -> None:
    graph, context, reports = run_core(residual(), images(), until="dyadic_scales")
    assert reports["dyadic_scales"].rewrites > 0
    before = graph.to_proto().SerializeToString(deterministic=True)
    assert DyadicScales().run(graph, context).rewrites == 0
    assert graph.to_proto().SerializeToString(deterministic=True) == before


def test_a_bound_below_a_shared_scale_becomes_a_clip_on_integers() -> None:
    """The two Adds meet again, so that one scale is shared; it reaches past the Relu6-like bound of `b`."""
    body = f"""a = {CONV} (x, w0)  b = Clip(a, zero, top)  c = {CONV} (x, w1)  s = Add(b, c)  t = Add(c, b)  v = {CONV} (t, w2)
        u = Add(s, t)  z = Add(u, b)  k = Add(z, s)  y = {CONV} (k, w3)"""
    source = model(
        "g (float[1, 3, 8, 8] x) => (float[n, 3, h, w] y, float[n, 3, e, f] b) { "
        + body.replace(f"v = {CONV} (t, w2)", "")
        + " }",
        zero=np.float32(0),
        top=np.float32(0.3),
        **{k: v for k, v in W.items() if k != "w2"},
    )
    feeds = images()
    graph, context, _ = run_core(source, feeds, until="dyadic_scales")
    assert context.plan is not None
    place = next(c for c in context.plan.classes if "b" in c.tensors)
    assert place.clamped, "the case no longer shares one scale: choose another"
    assert [n.op for n in graph.nodes].count("Clip") == 1
    for level in (Optimisation.OFF, Optimisation.ALL):
        session = Session(graph.to_proto(), optimisation=level, fuse_qdq=False)
        for feed in feeds:
            b = session.run(feed)["b"]
            assert b.max() <= 0.3 + float(place.scale) / 2
            assert b.min() == 0
    assert DyadicScales().run(graph, context).rewrites == 0
    assert [n.op for n in graph.nodes].count("Clip") == 1


def test_no_scale_moves_after_a_weight_was_rounded_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """DESIGN section 2. Over the whole registry and a real model: constants that are scales keep their bits."""
    from pathlib import Path

    folder = Path(__file__).resolve().parents[1] / "models"
    data = np.load(folder / "digits_calib.npz")["input"][:24]
    graph = Graph.from_proto(load(folder / "digits_cnn.onnx"))
    context = core_context([{"input": data[i : i + 1]} for i in range(len(data))], ranges="mse")
    fixed: dict[str, bytes] = {}
    rounded = False
    checked = 0
    for step in passes_for():
        if step.name == "lower_qoperator":
            break  # renames and merges; the scales it writes are those of the graph it is given
        step.run(graph, context)
        now = scales_of(graph)
        for name, value in fixed.items():
            if name in now:
                assert now[name] == value, f"pass '{step.name}' moved {name}"
                checked += 1
        rounded = rounded or step.name == "round_weights"
        if rounded:
            fixed.update(now)
    assert rounded
    assert checked > 20


def scales_of(graph: Graph) -> dict[str, bytes]:
    """Bits of all scale operands of Q and DQ nodes, by the constant's name."""
    found = {}
    for n in graph.nodes:
        if n.op in ("QuantizeLinear", "DequantizeLinear"):
            scale = n.constant(1)
            assert scale is not None
            found[scale.name] = scale.array().tobytes()
    return found


def test_the_registry_holds_the_core_in_this_order() -> None:
    names = [p.name for p in PASSES]
    order = [names.index(step.name) for step in CORE]
    assert order == sorted(order)


def test_running_the_whole_registry_twice_changes_nothing() -> None:
    source, feeds = residual(), images()
    graph, context = run_registry(source, feeds)
    before = graph.to_proto().SerializeToString(deterministic=True)
    for step in PASSES:
        assert rerun(step.run(graph, context)) == 0, step.name
    assert graph.to_proto().SerializeToString(deterministic=True) == before


def rerun(report: Report) -> int:
    return report.rewrites


def test_two_compilations_give_the_same_bytes() -> None:
    first, second = (run_registry(residual(), images())[0].to_proto().SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_without_a_plan_there_is_nothing_to_solve() -> None:
    assert DyadicScales().run(Graph.from_proto(residual()), Context()).rewrites == 0


def test_ranges_that_the_data_never_leave_zero() -> None:
    """Dead tensors everywhere: a scale of one, and zeros out."""
    dead: dict[str, Array] = {name: np.zeros_like(value) for name, value in W.items()}
    source = model(residual_text(), **dead)
    graph, _, _ = run_core(source, images())
    for level in (Optimisation.OFF, Optimisation.ALL):
        assert not np.any(outputs(graph, images(), level, fuse=True))


def residual_text() -> str:
    body = (
        f"a = {CONV} (x, w0)  c = {CONV} (a, w1)  s = Add(a, c)  p = GlobalAveragePool(s)  d = {CONV} (p, w2)  y = {CONV} (d, w3)"
    )
    return "g (float[1, 3, 8, 8] x) => (float[n, 3, h, w] y) { " + body + " }"
