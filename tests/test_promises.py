"""The check behind every pass: a broken promise is named on the spot, and no output is left behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from core_models import floats, model

import qcompile.pipeline as pipeline
from qcompile.context import Context
from qcompile.errors import PassError
from qcompile.graph import Graph, Value
from qcompile.pipeline import compile_model
from qcompile.promises import Signature, Verifier, sqnr_db
from qcompile.rewrite import Close, Exact, Lossy, Promise, Report

Rewrite = Callable[[Graph], int]

MODEL = """g (float[n, 4] x) => (float[n, m] y, int64[n] best) {
    h = MatMul(x, w)  r = Relu(h)  y = Mul(r, factor)  best = ArgMax <axis = 1, keepdims = 0> (h) }"""


def source() -> onnx.ModelProto:
    return model(MODEL, w=floats(4, 3), factor=np.float32(2))


@dataclass(frozen=True)
class Fake:
    """A pass that does what it is told, once."""

    rewrite: Rewrite
    keeps: Promise = field(default_factory=Exact)
    name: str = "fake_pass"

    def run(self, graph: Graph, context: Context) -> Report:
        return Report(rewrites=self.rewrite(graph))


def times(factor: float) -> Rewrite:
    """Scale the output through its constant; done once."""

    def rewrite(graph: Graph) -> int:
        constant = next(c for c in graph.constants.values() if c.name == "factor")
        if float(constant.array()) != 2:
            return 0
        constant.assign(np.asarray(2 * factor, np.float32))
        return 1

    return rewrite


def rename(graph: Graph) -> int:
    if graph.outputs[0].name == "z":
        return 0
    graph.outputs[0].name = "z"
    return 1


def shift_best(graph: Graph) -> int:
    found = next(n for n in graph.nodes if n.op in ("ArgMax", "ArgMin"))
    if found.op == "ArgMin":
        return 0
    found.op = "ArgMin"
    return 1


def invalid(graph: Graph) -> int:
    next(n for n in graph.nodes if n.op.startswith("Relu")).op = "Relux"
    return 1


def two_of_a_name(graph: Graph) -> int:
    graph.nodes[1].outputs[0].name = "h"
    return 1


def cycle(graph: Graph) -> int:
    graph.nodes[0].inputs[0] = graph.nodes[1].outputs[0]
    return 1


def fails_at_run_time(graph: Graph) -> int:
    """Valid for the checker, but the shapes do not fit when it runs."""
    next(c for c in graph.constants.values() if c.name == "factor").assign(np.ones(7, np.float32))
    return 1


def more_columns(graph: Graph) -> int:
    """A wider output where the declared width is dynamic."""
    weight = next(c for c in graph.constants.values() if c.name == "w")
    weight.assign(np.concatenate([weight.array(), weight.array()], axis=1))
    return 1


def every_time(graph: Graph) -> int:
    return 1


def raises_second(graph: Graph) -> int:
    if "again" in graph.constants:
        raise IndexError("list index out of range")
    graph.constant("again", np.zeros(1, np.float32))
    return 1


def raises(graph: Graph) -> int:
    raise KeyError("no such thing")


CASES = [
    pytest.param(Fake(times(1 + 1e-5)), "moved output 'y'", id="exact-moved"),
    pytest.param(Fake(times(1 + 1e-6), keeps=Exact(fused=True)), "moved output 'y'", id="exact-fused-one-ulp-or-so"),
    pytest.param(Fake(times(1 + 1e-3), keeps=Close()), "moved output 'y'", id="close-moved"),
    pytest.param(Fake(times(np.nan), keeps=Close()), "moved output 'y'", id="close-nan"),
    pytest.param(Fake(times(np.nan)), "moved output 'y'", id="exact-nan"),
    pytest.param(Fake(times(np.inf), keeps=Close()), "moved output 'y'", id="close-inf"),
    pytest.param(Fake(times(-1.0), keeps=Lossy()), "dB", id="lossy-lost-the-signal"),
    pytest.param(Fake(times(np.nan), keeps=Lossy()), "dB", id="lossy-nan"),
    pytest.param(Fake(times(1.2), keeps=Lossy(least_sqnr_db=20.0)), "less than 20 dB", id="lossy-below-its-own-limit"),
    pytest.param(Fake(shift_best, keeps=Close()), "integer output 'best'", id="integers"),
    pytest.param(Fake(rename), "inputs or outputs", id="renamed"),
    pytest.param(Fake(invalid), "invalid model", id="invalid"),
    pytest.param(Fake(two_of_a_name), "invalid model", id="two-of-a-name"),
    pytest.param(Fake(cycle), "invalid model", id="cycle"),
    pytest.param(Fake(fails_at_run_time), "does not run", id="does-not-run"),
    pytest.param(Fake(more_columns, keeps=Lossy()), "made output 'y' float32", id="shape"),
]


def feeds() -> list[dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]]:
    return [{"x": floats(2, 4, seed=s)} for s in range(2)]


@pytest.mark.parametrize(("fake", "message"), CASES)
def test_a_broken_promise_is_named(fake: Fake, message: str) -> None:
    graph = Graph.from_proto(source())
    verifier = Verifier(graph, feeds())
    verifier.before(graph, fake)
    fake.run(graph, Context())
    with pytest.raises(PassError, match="pass 'fake_pass'") as caught, np.errstate(all="ignore"):
        verifier.after(graph, fake, finished=False)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keeps", "factor", "low", "high"),
    [
        pytest.param(Exact(), 1.0, None, None, id="exact"),
        pytest.param(Close(), 1 + 2e-5, 93, 95, id="close"),
        pytest.param(Lossy(), 1.01, 39.9, 40.1, id="lossy"),
    ],
)
def test_a_kept_promise_gives_the_sqnr(keeps: Promise, factor: float, low: float | None, high: float | None) -> None:
    graph = Graph.from_proto(source())
    verifier = Verifier(graph, feeds())
    fake = Fake(times(factor), keeps=keeps)
    verifier.before(graph, fake)
    fake.run(graph, Context())
    ratio = verifier.after(graph, fake, finished=False)
    assert (ratio is None) == (low is None)
    if ratio is not None and low is not None and high is not None:
        assert low < ratio < high  # 20 log10(1 / (factor - 1))


def test_each_pass_is_compared_with_the_model_just_before_it() -> None:
    graph = Graph.from_proto(source())
    verifier = Verifier(graph, feeds())
    for factor in (1.2, 1.2):
        constant = next(c for c in graph.constants.values() if c.name == "factor")
        constant.assign(constant.array() * np.float32(factor))
        ratio = verifier.after(graph, Fake(every_time, keeps=Lossy()), finished=False)
        assert ratio == pytest.approx(20 * np.log10(1 / 0.2), abs=1e-3)


def test_the_limit_is_on_the_float_model_not_on_a_drowned_one_before_the_pass() -> None:
    """Rounding to 4 bits may drown a net until learned rounding brings it back: the way back is no loss."""
    graph = Graph.from_proto(source())
    verifier = Verifier(graph, feeds())
    constant = next(c for c in graph.constants.values() if c.name == "factor")
    constant.assign(np.asarray(-4, np.float32))
    verifier.after(graph, Fake(every_time, keeps=Lossy(-30.0)), finished=False)
    constant.assign(np.asarray(2.1, np.float32))
    ratio = verifier.after(graph, Fake(every_time, keeps=Lossy()), finished=False)
    assert ratio == pytest.approx(20 * np.log10(4 / 6.1), abs=1e-3)


def test_an_attention_mask_of_minus_infinity_is_left_out_of_the_ratio() -> None:
    before = [{"y": np.array([-np.inf, 1.0, 2.0], np.float32)}]
    after = [{"y": np.array([-np.inf, 1.0, 2.1], np.float32)}]
    assert sqnr_db(before, after) == pytest.approx(10 * np.log10(5 / 0.01), abs=1e-3)


def test_the_ratio_at_its_ends() -> None:
    y, zero = np.ones(3, np.float32), np.zeros(3, np.float32)
    assert sqnr_db([{"y": y}], [{"y": y}]) is None
    assert sqnr_db([{"y": zero}], [{"y": y}]) == -np.inf
    assert sqnr_db([{"y": y}], [{"y": zero}]) == 0.0
    assert sqnr_db([{"i": np.arange(3)}], [{"i": np.arange(3) + 1}]) is None  # integers have no signal


def test_the_signature_holds_names_types_and_shapes() -> None:
    first = Signature.of(Graph.from_proto(source()))
    assert first == Signature.of(Graph.from_proto(source()))
    other = Graph.from_proto(source())
    extra = Value("extra", other.inputs[0].type)
    other.inputs.append(extra)
    assert Signature.of(other) != first
    assert not first.allows(Signature.of(other))
    assert not Signature.of(other).allows(first)


def test_a_shape_may_be_found_where_none_was_declared_but_not_changed() -> None:
    bare = source()
    bare.graph.output[0].type.tensor_type.ClearField("shape")
    open_, shaped = (Signature.of(Graph.from_proto(m)) for m in (bare, source()))
    assert open_.allows(shaped)
    assert not shaped.allows(open_)


@pytest.mark.parametrize(
    ("rewrite", "message"),
    [
        pytest.param(rename, "inputs or outputs", id="renamed"),
        pytest.param(invalid, "invalid model", id="invalid"),
        pytest.param(every_time, "1 more rewrites when run twice", id="never-idle"),
        pytest.param(raises_second, "IndexError: list index out of range", id="raises-at-the-second-run"),
        pytest.param(raises, "KeyError", id="raises"),
        pytest.param(times(1.5), "moved output", id="exact-moved"),
    ],
)
def test_the_pipeline_leaves_no_file(rewrite: Rewrite, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "float.onnx"
    onnx.save(source(), path)
    monkeypatch.setattr(pipeline, "passes_for", lambda *_: (Fake(rewrite),))
    with pytest.raises(PassError, match="pass 'fake_pass'") as caught:
        compile_model(path, latency=False)
    assert message in str(caught.value)
    assert [f.name for f in tmp_path.iterdir()] == ["float.onnx"]


def scale_hidden(graph: Graph) -> int:
    constant = next(c for c in graph.constants.values() if c.name == "w")
    if constant.array()[0, 0] == 7:
        return 0
    values = constant.array().copy()
    values[0, 0] = 7
    constant.assign(values)
    return 1


@pytest.mark.parametrize("keeps", [Exact(), Close()], ids=["exact", "close"])
def test_the_node_where_a_promise_broke_is_named(keeps: Promise) -> None:
    graph = Graph.from_proto(source())
    wanted = next(n for n in graph.nodes if n.op == "MatMul").label
    verifier, step = Verifier(graph, [{"x": floats(2, 4)}]), Fake(scale_hidden, keeps)
    verifier.before(graph, step)
    step.run(graph, Context())
    with pytest.raises(PassError, match=r"fake_pass") as caught:
        verifier.after(graph, step, finished=False)
    assert str(caught.value).endswith(f"it shows first at node '{wanted}'")


def test_a_lossy_pass_may_leave_noise_where_few_bits_were_asked_for() -> None:
    graph = Graph.from_proto(source())
    verifier = Verifier(graph, feeds())
    constant = next(c for c in graph.constants.values() if c.name == "factor")
    constant.assign(np.asarray(-4, np.float32))
    noise = 20 * np.log10(2 / 6)
    step = Fake(every_time, keeps=Lossy(10.0))
    assert verifier.after(graph, step, finished=False, rough=True) == pytest.approx(noise, abs=1e-3)
    constant.assign(np.asarray(-4.1, np.float32))
    with pytest.raises(PassError, match="less than 10 dB"):
        verifier.after(graph, step, finished=False)
