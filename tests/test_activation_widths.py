"""`--activations`: narrow activations are exact in every format, groups share a width, 8 bits stay where they must."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import CNN, MODELS, Command, is_one_error
from core_models import floats, images, model, run_core
from exactness_helpers import assert_exact, assert_file_exact, digits, with_ranges
from runtime_marks import needs_conv_integer

from qcompile import compile_model
from qcompile.audit import audit
from qcompile.certificate import certify
from qcompile.clipped_bits import clipped_bits
from qcompile.context import Settings
from qcompile.errors import InputError
from qcompile.graph import Array, Graph
from qcompile.inspection import rescales
from qcompile.interpret import Interpreter
from qcompile.layer_counts import count_layers
from qcompile.passes._activation_widths import BRANCH, INPUT, RESULT, UNREAD
from qcompile.passes.search_ranges import NARROW_FACTORS, SearchRanges
from qcompile.plan import ScaleClass
from qcompile.printing_lines import raised_line, worst_lines
from qcompile.qparams import ACTIVATIONS
from qcompile.recipe import recipe_of
from qcompile.runtime import Session

DATA = str(MODELS / "digits_calib.npz")
FORMATS = ["qdq", "qoperator", pytest.param("integer", marks=needs_conv_integer)]
CONV = "Conv <pads = [1, 1, 1, 1]>"
CONSTANTS = {f"w{i}": floats(4, 4, 3, 3, seed=i) * 0.2 for i in range(4)}
RESIDUAL = f"""g (float[1, 4, 8, 8] x) => (float[1, 3] y) {{
    a = {CONV} (x, w0)  b = Relu (a)
    c = {CONV} (b, w1)  d = Add (b, c)  e = Relu (d)
    f = {CONV} (e, w2)  h = Add (e, f)  i = Relu (h)
    p = GlobalAveragePool (i)  q = Flatten (p)  y = Gemm (q, w) }}"""


def residual() -> Any:
    return model(RESIDUAL, **CONSTANTS, w=floats(4, 3))


def run(path: Path, **options: Any) -> dict[str, Any]:
    return compile_model(CNN, path, data=DATA, latency=False, **options).report


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bits", [6, 5, 4, 3, 2])
def test_each_format_is_exact(bits: int, form: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    run(path, format=form, activations=bits)
    assert [x.activation_bits for x in count_layers(path)] == [8] + 5 * [bits]
    assert audit(path).not_fused == []
    assert all(r.exact for r in rescales(path))
    if form == "integer":
        assert certify(path).integer_only
    assert_file_exact(path, form, digits(20))


@pytest.mark.parametrize("bits", [6, 4, 3, 2])
def test_a_residual_network_has_the_same_integers_in_all_ways_of_running(bits: int) -> None:
    ranges = {
        "x": (-2.0, 2.0),
        "b": (0.0, 1.5),
        "c": (-2.0, 1.5),
        "e": (0.0, 2.0),
        "f": (-1.0, 2.0),
        "i": (0.0, 2.5),
        "p": (0.0, 1.0),
    }
    qdq, qoperator, context = with_ranges(residual(), ranges, activation_bits=bits)
    assert context.plan is not None
    widths = {name: place.bits for place in context.plan.classes for name in place.tensors}
    assert widths == {"x": 8, "c": 8, "f": 8, **dict.fromkeys(["b", "e", "i", "p", "q"], bits)}
    feeds = [{"x": floats(1, 4, 8, 8, seed=s) * 3} for s in range(6)]
    assert_exact(qdq, qoperator, feeds)
    clipped = [n.outputs[0].name for n in Graph.from_proto(qoperator).nodes if n.op == "Clip"]
    assert len(clipped) == 4
    for found in assert_exact(qdq, qoperator, feeds, clipped):
        assert all(value.dtype == np.uint8 and int(value.max()) <= 2**bits - 1 for value in found.values())
    assert max(int(v.max()) for v in found.values()) == 2**bits - 1  # the ends are reached


@pytest.mark.parametrize("target", ["any", "arm"])
def test_the_integers_of_a_width(target: str) -> None:
    kind = ACTIVATIONS[target]
    for bits in (2, 3, 4, 5, 6, 8):
        narrow = kind.narrowed(bits)
        assert (narrow.high - narrow.low, narrow.dtype) == (2**bits - 1, kind.dtype)
        assert narrow.low == (0 if target == "any" else -(2 ** (bits - 1)))


GROUPS = {
    "input": (f"g (float[1, 4, 8, 8] x) => (float[n, 4, p, q] y) {{ y = {CONV} (x, w0) }}", {("x",): INPUT, ("y",): RESULT}),
    "branch": (RESIDUAL, {("x",): INPUT, ("c",): BRANCH, ("f",): BRANCH, ("b", "e", "i"): None, ("p", "q"): None}),
    "function": (
        f"g (float[1, 4, 8, 8] x) => (float[n, 4, p, q] y) {{ a = {CONV} (x, w0) b = Tanh (a) c = {CONV} (b, w1) y = Tanh (c) }}",
        {("x",): INPUT, ("a",): UNREAD, ("b",): None, ("c",): UNREAD},
    ),
    "summed-input": (
        f"g (float[1, 4, 8, 8] x) => (float[n, 4, p, q] y) {{"
        f" a = {CONV} (x, w0) b = Add (x, a) c = {CONV} (b, w1) y = Tanh (c) }}",
        {("b", "x"): INPUT, ("a",): BRANCH, ("c",): UNREAD},
    ),
    "shared-result": (
        f"g (float[1, 4, 8, 8] x) => (float[n, 4, p, q] y, float[n, 4, r, s] a) {{ a = {CONV} (x, w0) y = {CONV} (a, w1) }}",
        {("x",): INPUT, ("a",): RESULT, ("y",): RESULT},
    ),
    "moved": (
        f"g (float[1, 4, 8, 8] x) => (float[n, 4, p, q] y) {{"
        f" a = {CONV} (x, w0) b = MaxPool <kernel_shape = [2, 2]> (a) c = {CONV} (b, w1) y = Tanh (c) }}",
        {("x",): INPUT, ("a", "b"): None, ("c",): UNREAD},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), GROUPS.values(), ids=GROUPS)
def test_which_tensors_share_a_width_and_which_keep_8_bits(text: str, expected: dict[tuple[str, ...], str | None]) -> None:
    used = {name: value for name, value in {**CONSTANTS, "w": floats(4, 3)}.items() if name in text.replace(")", " ").split()}
    _, context, reports = run_core(model(text, **used), images(2, channels=4), until="quantise", activation_bits=4)
    assert context.plan is not None
    found = {tuple(sorted(t for c in g.classes for t in c.tensors)): g.fixed for g in context.plan.groups}
    assert found == expected
    for group in context.plan.groups:
        assert {c.bits for c in group.classes} == {4 if group.fixed is None else 8}
    reasons = [reason for names, reason in expected.items() if reason is not None for _ in _classes(context, names)]
    assert reports["quantise"].skipped == {r: reasons.count(r) for r in reasons}


def _classes(context: Any, names: tuple[str, ...]) -> list[ScaleClass]:
    return [c for c in context.plan.classes if set(c.tensors) & set(names)]


def test_nothing_is_told_without_narrow_activations() -> None:
    _, context, reports = run_core(residual(), images(2, channels=4), until="quantise")
    assert context.plan is not None
    assert {c.bits for c in context.plan.classes} == {8}
    assert reports["quantise"].skipped == {}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        pytest.param({"conv_2": 4}, {"b": 4, "e": 4, "i": 4, "p": 8}, id="one-reader-decides-for-what-adds-join"),
        pytest.param({"conv_2": 4, "conv_5": 6}, {"b": 6, "e": 6, "i": 6, "p": 8}, id="the-widest-counts"),
        pytest.param({"conv_*": 3, "conv_5": 5, "gemm_*": 2}, {"b": 5, "e": 5, "i": 5, "p": 2}, id="patterns"),
        pytest.param({"conv_0": 4}, {"x": 8, "b": 8}, id="the-input"),
    ],
)  # fmt: skip
def test_widths_of_single_nodes(asked: dict[str, int], expected: dict[str, int]) -> None:
    source = residual()
    _, context, reports = run_core(source, images(2, channels=4), until="quantise", node_activations=tuple(asked.items()))
    assert context.plan is not None
    widths = {name: place.bits for place in context.plan.classes for name in place.tensors}
    assert {name: widths[name] for name in expected} == expected
    if len({v for k, v in asked.items() if k.startswith("conv")}) > 1:
        assert any("shares the width" in reason for reason in reports["quantise"].skipped)


def test_others_that_read_less_than_usual_are_told() -> None:
    _, _, reports = run_core(residual(), images(2, channels=4), until="quantise", node_activations=(("conv_2", 4),))
    assert any("fewer bits than usual" in reason for reason in reports["quantise"].skipped)


@pytest.mark.parametrize("pin", [{"node_activations": (("conv_2", 8),)}, {"node_ranges": (("conv_2", -1.0, 1.0),)}], ids=str)
@pytest.mark.parametrize("chosen", ["raised", "assigned"])
def test_what_is_asked_of_a_node_that_a_limit_leaves_in_float_is_no_mistake(pin: dict[str, Any], chosen: str) -> None:
    _, context, _ = run_core(residual(), images(2, channels=4), until="quantise", **pin, **{chosen: (("conv_2", 32),)})
    assert context.plan is not None
    assert "conv_2" not in {site.node.name for site in context.plan.linears}


def test_a_recipe_gives_single_nodes_widths(tmp_path: Path) -> None:
    nodes = {"/pointwise/*": {"activations": 4}}
    run(tmp_path / "m.onnx", nodes=nodes)
    widths = {x.node: x.activation_bits for x in count_layers(tmp_path / "m.onnx")}
    assert sorted(widths.values()) == [4, 8, 8, 8, 8, 8]
    assert next(w for n, w in widths.items() if n.startswith("/pointwise")) == 4


def test_the_same_bytes_again_and_8_bits_are_the_default(tmp_path: Path) -> None:
    first, second, plain, eight = (tmp_path / f"{n}.onnx" for n in range(4))
    run(first, activations=4)
    report = run(second, activations="4")
    assert first.read_bytes() == second.read_bytes()
    assert report["recipe"]["compile"]["activations"] == "4"
    run(plain)
    run(eight, activations=8)
    assert plain.read_bytes() == eight.read_bytes()
    assert [x.activation_bits for x in count_layers(plain)] == 6 * [8]


def test_the_report_and_the_diagnosis_tell_the_width(tmp_path: Path) -> None:
    report = run(tmp_path / "m.onnx", activations=5, diagnose=True)
    assert [layer["activation_bits"] for layer in report["layers"]] == [8] + 5 * [5]
    assert report["settings"]["activation_bits"] == 5
    quantise = next(row for row in report["passes"] if row["name"] == "quantise")
    assert quantise["skipped"] == {INPUT: 1, BRANCH: 1}


def test_more_bits_are_better(tmp_path: Path) -> None:
    found = [run(tmp_path / "m.onnx", activations=b)["accuracy"]["sqnr_db"] for b in (2, 3, 4, 5, 6, 8)]
    assert found == sorted(found)
    assert found[-1] > found[0] + 20


def test_the_range_is_searched_for_its_levels() -> None:
    """A Gemm with 3-bit input: every factor of the upper end, rounded and multiplied here in float64."""
    w = floats(4, 5, seed=3)
    relu = [{"x": np.maximum(floats(64, 6, seed=s), 0)} for s in range(4)]
    source = model("g (float[n, 6] x) => (float[n, 5] y) { h = Gemm (x, v)  r = Relu (h)  y = Gemm (r, w) }", v=floats(6, 4), w=w)
    graph, context, _ = run_core(source, relu, until="quantise", ranges="mse", activation_bits=3)
    assert context.plan is not None
    place = next(c for c in context.plan.classes if "r" in c.tensors)
    high = place.high
    SearchRanges().run(graph, context)
    v = next(c for c in Graph.from_proto(source).constants.values() if c.name == "v").array()
    x = np.maximum(np.concatenate([f["x"] for f in relu]).astype(np.float64) @ v, 0)

    def cost(factor: float) -> float:
        step = high * factor / 7
        y = (np.clip(np.rint(x / step), 0, 7) * step - x) @ w
        return float(np.square(y - y.mean(axis=0)).sum())

    costs = [cost(f) for f in NARROW_FACTORS]
    chosen = NARROW_FACTORS.index(min(NARROW_FACTORS, key=lambda f: abs(f * high - place.high)))
    assert place.high == pytest.approx(NARROW_FACTORS[chosen] * high)
    assert chosen > 0
    # Clipping and rounding are added up as if they were independent, which costs a little at the best place.
    assert costs[chosen] <= 1.05 * min(costs)


CLIPS = {
    "none": ("y = Relu (x)", 8),
    "four": ("y = Clip (x, zero, fifteen)", 4),
    "seven-bits-count-8": ("y = Clip (x, zero, hundred)", 8),
    "moved": ("a = Clip (x, zero, fifteen)  y = MaxPool <kernel_shape = [2, 2]> (a)", 4),
    "joined": ("a = Clip (x, zero, fifteen)  b = Clip (x, zero, six)  y = Concat <axis = 1> (a, b)", 4),
    "joined-with-8": ("a = Clip (x, zero, fifteen)  y = Concat <axis = 1> (a, x)", 8),
    "no-bound": ("y = Clip (x, , fifteen)", 8),
}


@pytest.mark.parametrize(("body", "bits"), CLIPS.values(), ids=CLIPS)
def test_bits_in_use_are_read_from_the_file(body: str, bits: int) -> None:
    ends = {"zero": 0, "six": 6, "fifteen": 15, "hundred": 100}
    constants = {name: np.asarray(v, np.uint8) for name, v in ends.items() if name in body}
    kind = "float" if "Relu" in body else "uint8"
    source = model(f"g ({kind}[1, 2, 4, 4] x) => ({kind}[n, c, p, q] y) {{ {body} }}", **constants)
    assert clipped_bits(Graph.from_proto(source).outputs[0]) == bits


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "seven": ({"activations": 7}, "--activations 7: choose one of int8, 8, 6, 5, 4, 3, 2, float"),
    "words": ({"activations": "narrow"}, "--activations narrow: choose"),
    "tensorrt": ({"activations": 4, "target": "tensorrt"}, "--activations 4 --target tensorrt: .*int8"),
    "tensorrt-node": (
        {"nodes": {"*": {"activations": 4}}, "target": "tensorrt"},
        r"\[nodes\] \*: activations 4 --target tensorrt",
    ),
    "float": ({"activations": 4, "bits": 32}, "--activations 4 --bits 32: nothing is quantised"),
    "weight-only": (
        {"activations": "float", "bits": 4, "nodes": {"*": {"activations": 4}}},
        "--activations float: bits, activations",
    ),
    "no-such-node": ({"nodes": {"nowhere": {"activations": 4}}}, "nowhere: no node of the model"),
    "reads-none": ({"nodes": {"/residual/relu/Relu": {"activations": 4}}}, "no such node reads activations"),
    "node-seven": ({"nodes": {"*": {"activations": 7}}}, "activations is 7; give one of 8, 6"),
    "block": ({"activations": 4, "block": 32}, "--block is for weight-only"),
}


@pytest.mark.parametrize(("options", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        run(tmp_path / "m.onnx", **options)
    assert not (tmp_path / "m.onnx").exists()


def test_nodes_that_read_no_integers_are_refused() -> None:
    with pytest.raises(InputError, match=r"\[nodes\] relu_1: activations 4: no such node reads activations in integers"):
        run_core(residual(), images(2, channels=4), until="quantise", node_activations=(("relu_1", 4),))


def test_a_quantised_source_keeps_its_widths(tmp_path: Path) -> None:
    run(tmp_path / "m.onnx")
    with pytest.raises(InputError, match="already holds Q/DQ with widths of its own"):
        compile_model(tmp_path / "m.onnx", tmp_path / "n.onnx", activations=4, latency=False)


def test_without_samples_a_transformer_keeps_8_bits(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="quantised at run time, in 8 bits; give --data"):
        compile_model(MODELS / "digits_vit.onnx", tmp_path / "n.onnx", activations=4, latency=False)


def test_the_command_line(tmp_path: Path, command: Command) -> None:
    out = tmp_path / "m.onnx"
    assert command(CNN, "--data", DATA, "--activations", "4", "-o", str(out), "--quiet", "--no-latency")[0] == 0
    assert [x.activation_bits for x in count_layers(out)] == [8] + 5 * [4]
    status, _, err = command(CNN, "--data", DATA, "--activations", "7", "-o", str(out))
    assert status == 2
    assert is_one_error(err)
    assert "--activations" in err


@pytest.mark.parametrize("form", FORMATS)
def test_a_transformer_is_exact(form: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    options: dict[str, Any] = {"format": form, "activations": 6, "latency": False}
    report = compile_model(MODELS / "digits_vit.onnx", path, data=DATA, **options).report
    assert report["accuracy"]["sqnr_db"] > 28
    reference, fast = Interpreter(path), Session(path)
    if form == "qdq":  # attention is float there
        return
    images_: Array = np.load(MODELS / "digits.npz")["input"][:5]
    for image in images_:
        expected = reference.run({"input": image[None]})
        for name, value in fast.run({"input": image[None]}).items():
            np.testing.assert_array_equal(value, expected[name])


def test_recipes_hold_activations() -> None:
    found = recipe_of({"nodes": {"/a/*": {"activations": 4, "bits": 8}}}, "r").compile_arguments()
    assert found["nodes"] == {"/a/*": {"activations": 4, "bits": 8}}


def test_the_summary_tells_the_width_of_what_costs_most(tmp_path: Path) -> None:
    narrow = "\n".join(worst_lines(run(tmp_path / "m.onnx", activations=4, diagnose=True)))
    assert "(8 bits, reads 4): " in narrow
    plain = "\n".join(worst_lines(run(tmp_path / "m.onnx", diagnose=True)))
    assert "(8 bits): " in plain
    assert "reads" not in plain


@pytest.mark.parametrize("bits", [4, 2])
def test_sums_that_must_share_one_scale_stay_exact(bits: int) -> None:
    """The branch `c` is far wider than the sum: no ratio of theirs is small enough, so 8 and fewer bits share a scale."""
    ranges = {"x": (-2.0, 2.0), "c": (-400.0, 400.0), "f": (-1.0, 1.0)}
    ranges |= {"b": (0.0, 1.0), "e": (0.0, 0.2), "i": (0.0, 2.5), "p": (0.0, 1.0)}
    qdq, qoperator, context = with_ranges(residual(), ranges, activation_bits=bits)
    assert context.plan is not None
    scales = {name: float(place.scale) for place in context.plan.classes for name in place.tensors}
    assert scales["c"] == scales["e"] == scales["b"]
    assert_exact(qdq, qoperator, [{"x": floats(1, 4, 8, 8, seed=s) * 20} for s in range(4)])


def test_a_limit_raises_what_layers_read_before_any_layer_becomes_float(tmp_path: Path) -> None:
    options: dict[str, Any] = {"activations": 2, "eval_data": str(MODELS / "digits.npz"), "min_agreement": 0.995}
    report = run(tmp_path / "m.onnx", on_inconclusive="pass", **options)
    moves = report["fallback"]["raised"]
    assert moves
    assert {m["to_bits"] for m in moves} == {8}
    assert all(m["from_bits"] == 8 and m["from_activation_bits"] == 2 for m in moves)
    widths = {x.node: x.activation_bits for x in count_layers(tmp_path / "m.onnx")}
    assert all(widths[m["node"]] == 8 for m in moves)
    assert report["fallback"]["held"]
    assert "8 bits, reading 2, to 8 bits" in raised_line(moves[0])


def test_what_a_limit_raises_wins_over_a_recipe() -> None:
    settings = Settings(activation_bits=4, node_activations=(("a", 3),), assigned_activations=(("b", 5),), raised=(("a", 8),))
    assert [settings.activations_for(name) for name in "abc"] == [8, 5, None]
    assert settings.least_activations == 3


def test_few_bits_may_drown_a_net_until_its_ranges_are_searched(tmp_path: Path) -> None:
    """Embedding tables promise 10 dB of the float signal, which 2-bit activations did not leave them."""
    path = tmp_path / "m.onnx"
    report = compile_model(MODELS / "digits_vit.onnx", path, data=DATA, activations=2, latency=False).report
    kept = {row["name"]: row["sqnr_db"] for row in report["passes"]}
    assert kept["quantise"] < 10
    assert report["accuracy"]["sqnr_db"] > 0
