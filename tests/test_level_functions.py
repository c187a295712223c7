"""Ranges a channel in front of functions: exact in float, one look-up in the file, finer where channels differ, every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto
from passes_helpers import floats, ops, parse

from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph
from qcompile.interpret import Interpreter
from qcompile.levelled import levelled
from qcompile.passes.calibrate import Calibrate
from qcompile.passes.level_functions import LevelFunctions, channel_ranges
from qcompile.passes.smooth import Smooth
from qcompile.pipeline import compile_model
from qcompile.rewrite import Report
from qcompile.runtime import Optimisation, Session

K, N, M = 12, 24, 5
SPREAD = np.where(np.arange(N) % 8 == 3, 9.0, 0.5).astype(np.float32)
SHARED = "h = Gemm(x, w, b) f = Gelu(h) p = Gemm(f, v) s = ReduceSum(h, one) y = Add(p, s)"
WEIGHTS = {"w": floats(K, N, seed=1) * SPREAD, "b": floats(N, seed=2) * SPREAD, "v": floats(N, M, seed=3)}
BODY = "h = Gemm(x, w, b) f = {f}(h) y = Gemm(f, v)"


def mlp(body: str = BODY, f: str = "Gelu", outputs: str = f"float[R, {M}] y", **more: Array) -> ModelProto:
    text = f"g (float[R, {K}] x) => ({outputs}) {{ {body.format(f=f)} }}"
    return parse(text, 21, **{k: v for k, v in {**WEIGHTS, **more}.items() if k in text})


def feeds(count: int = 6) -> list[dict[str, Array]]:
    return [{"x": floats(30, K, seed=i)} for i in range(count)]


def levelled_graph(model: ModelProto, settings: Settings | None = None, **options: Any) -> tuple[Report, Graph, Context]:
    """Run the pass; asserts a valid model, equal outputs, true statistics and an idle second run."""
    graph = Graph.from_proto(model)
    context = Context(settings or Settings(format="qoperator"), calibration=feeds)
    Calibrate().run(graph, context)
    Smooth().run(graph, context)
    step = LevelFunctions(**options)
    report = step.run(graph, context)
    result = graph.to_proto()
    onnx.checker.check_model(result, full_check=True)
    for level in (Optimisation.OFF, Optimisation.ALL):
        before, after = Session(model, optimisation=level), Session(result, optimisation=level)
        for feed in feeds():
            want = before.run(feed)["y"]
            np.testing.assert_allclose(after.run(feed)["y"], want, rtol=0, atol=1e-5 * float(np.abs(want).max()))
    again = step.run(graph, context)
    assert again.rewrites == 0, "a second run rewrote something"
    return report, graph, context


@pytest.mark.parametrize("f", ["Gelu", 'Gelu<approximate = "tanh">', "Softplus", "Elu"])
def test_exact_in_float_and_every_channel_fills_its_range(f: str) -> None:
    model = mlp(f=f)
    report, graph, context = levelled_graph(model)
    assert report.rewrites == 1
    node = next(n for n in graph.nodes if n.op == f.split("<", maxsplit=1)[0])
    found = levelled(graph, node)
    assert found is not None and found.axis == -1
    observer = context.observers[found.x.name]
    assert (observer.low, observer.high, observer.fixed) == (-1.0, 127 / 128, True)
    h = np.concatenate([f["x"] for f in feeds()]) @ WEIGHTS["w"] + WEIGHTS["b"]
    stretched = (h - found.shift) / found.factor
    lows, highs = channel_ranges(node, h.min(axis=0).astype(np.float64), h.max(axis=0).astype(np.float64))
    np.testing.assert_allclose(((lows - found.shift) / found.factor), -1, atol=1e-5)
    np.testing.assert_allclose(((highs - found.shift) / found.factor), 127 / 128, atol=1e-5)
    assert observer.lows is not None
    np.testing.assert_allclose(observer.lows, stretched.min(axis=0), atol=1e-4)
    reference = Session(mlp("y = {f}(x)", f, f"float[R, {K}] y"))

    def function(x: Array) -> Array:
        wide = np.zeros((len(x), K), np.float32)
        wide[:, 0] = x
        return reference.run({"x": wide})["y"][:, 0]

    ends = function(np.array([h.min(), h.max()]))
    for channel in range(N):  # what is cut off is flat: twice 1/2048 of the function's span, at the most
        values = h[:, channel].astype(np.float32)
        inside = np.clip(values, np.float32(lows[channel]), np.float32(highs[channel]))
        assert np.abs(function(values) - function(inside)).max() <= (ends.max() - min(ends.min(), -0.17)) / 1000


def test_channels_come_in_half_octaves_and_factors_behind_the_function_in_eighths() -> None:
    _, graph, context = levelled_graph(mlp(v=floats(N, M, seed=3) * np.geomspace(0.02, 8, N, dtype=np.float32)[:, None]))
    node = next(n for n in graph.nodes if n.op == "Gelu")
    found = levelled(graph, node)
    assert found is not None
    assert len(np.unique(np.stack([found.factor, found.shift]), axis=1).T) <= 12
    (product,) = node.outputs[0].consumers
    assert product.op == "Mul"
    eighths = 8 * np.log2(product.constant(1).array())  # type: ignore[union-attr]
    np.testing.assert_allclose(eighths, np.rint(eighths), atol=1e-5)
    assert len(np.unique(np.rint(eighths))) > 2
    assert product.outputs[0].name in context.observers


@pytest.mark.parametrize(
    ("model", "settings", "options", "reason"),
    [
        (mlp(SHARED, one=np.array([1])), {}, {}, "something else reads its input"),
        (mlp(), {"node_ranges": (("gemm_0", -4.0, 4.0),)}, {}, "the range of its input was given"),
        (mlp(w=floats(K, N, seed=1), b=floats(N, seed=2)), {}, {"most_alike": 0.1}, "are alike"),
        (mlp("f = Gelu(x) y = Gemm(f, u)", u=floats(K, M)), {}, {}, "no quantised layer"),
        (mlp("h = Gemm(x, w, m) f = Gelu(h) y = Gemm(f, v)", m=floats(30, N)), {}, {}, "no quantised layer"),
    ],
    ids=["shared", "given", "alike", "no layer", "a matrix is added"],
)
def test_refusals(model: ModelProto, settings: dict[str, Any], options: dict[str, Any], reason: str) -> None:
    before = ops(Graph.from_proto(model))
    if "node_ranges" in settings:
        name = next(n.name for n in Graph.from_proto(model).nodes if n.op == "Gemm")
        settings = {"node_ranges": ((name, -4.0, 4.0),)}
    report, graph, _ = levelled_graph(model, Settings(format="qoperator", **settings), **options)
    assert report.rewrites == 0
    assert ops(graph)["Gemm"] == before["Gemm"]
    assert any(reason in text for _, text in report.refusals), report.refusals


@pytest.mark.parametrize(
    "settings",
    [{"format": "qdq"}, {"format": "integer", "kernels": "ibert"}, {"format": "qoperator", "effort": "fast"}],
    ids=["qdq", "ibert", "fast"],
)
def test_it_stays_out_where_nothing_reads_the_function_in_8_bits(settings: dict[str, Any]) -> None:
    report, _, _ = levelled_graph(mlp(), Settings(**settings))
    assert (report.rewrites, report.refusals) == (0, [])


@pytest.mark.parametrize("form", ["qoperator", "integer"])
@pytest.mark.parametrize("target", ["any", "vnni"])
def test_one_look_up_the_same_bits_and_finer_than_one_range(
    form: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "m.onnx"
    small = mlp(v=floats(N, M, seed=3) / SPREAD[:, None] ** 2)  # the wide channels count no more than the others
    onnx.save(small, source)
    np.savez(tmp_path / "data.npz", x=np.concatenate([f["x"] for f in feeds()]))

    def compiled(name: str) -> ModelProto:
        made = compile_model(source, tmp_path / name, format=form, target=target, data=tmp_path / "data.npz", latency=False)
        return onnx.load(made.path)

    model = compiled("levelled.onnx")
    assert [n.op_type for n in model.graph.node].count("ChannelTable") == 1
    held_out = [{"x": floats(30, K, seed=i)} for i in range(50, 60)]
    want = np.concatenate([Session(small).run(f)["y"] for f in held_out])

    def decibels(which: ModelProto) -> float:
        got = np.concatenate([Session(which).run(f)["y"] for f in held_out])
        return float(10 * np.log10(np.square(want).sum() / np.square(got - want).sum()))

    for feed in held_out:
        expected = Interpreter(model).run(feed)["y"]
        for level in (Optimisation.OFF, Optimisation.ALL):
            np.testing.assert_array_equal(Session(model, optimisation=level).run(feed)["y"], expected)
    monkeypatch.setattr(LevelFunctions, "run", lambda *_: Report())
    plain = compiled("plain.onnx")
    assert "ChannelTable" not in [n.op_type for n in plain.graph.node]
    assert decibels(model) > decibels(plain) + 1.2
