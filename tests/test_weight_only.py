"""Weight-only INT4: what is rewritten and how, both spellings hold the same integers, refusals, and the whole way to a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, numpy_helper
from passes_helpers import floats, ops, parse

from qcompile.audit import audit
from qcompile.context import Context, Settings, WeightOnly
from qcompile.errors import DataError, ModelError
from qcompile.graph import Array, Graph, Node
from qcompile.inspection import summary
from qcompile.passes.weight_only import WeightOnlyInt4
from qcompile.pipeline import compile_model
from qcompile.rewrite import Report
from qcompile.runtime import Optimisation, Session

MODELS = Path(__file__).resolve().parents[1] / "models"
ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
VIT = MODELS / "digits_vit.onnx"
CALIBRATION = str(MODELS / "digits_calib.npz")

MATMUL = "g (float[n, 96] x) => (float[n, 24] y) { [product] y = MatMul (x, w) }"
GEMM = "g (float[n, 96] x) => (float[n, 24] y) { [product] y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, wt, b) }"
LOOK_UP = "g (int64[n, 5] ids) => (float[n, 5, 64] y) { [look] y = Gather (table, ids) }"
CONSTANTS = {
    "w": floats(96, 24),
    "wt": floats(24, 96, seed=1),
    "b": floats(24, seed=2),
    "row": floats(1, 24, seed=2),
    "scalar": floats(seed=3),
    "table": floats(300, 64, seed=4),
}
IDS = np.array([[0, 7, 299, -1, 41], [3, 3, 120, 200, -300]])


def model(text: str, **constants: Array) -> ModelProto:
    """`text` with those of CONSTANTS and `constants` that it reads."""
    used = {**CONSTANTS, **constants}
    return parse(text, **{k: v for k, v in used.items() if f" {k}" in text or f"({k}" in text})


def run(
    source: ModelProto, feeds: list[Mapping[str, Array]] | None = None, settings: Mapping[str, Any] | None = None, **options: Any
) -> tuple[Graph, Report]:
    """The pass on `source`; asserts a valid model, names that stay, and an idle second run."""
    graph = Graph.from_proto(source)
    context = Context(
        Settings(bits=4, weight_only=WeightOnly(**options), **(settings or {})), calibration=lambda: iter(feeds or [])
    )
    context.synthetic = feeds is None
    names = {n.name for n in graph.nodes}
    report = WeightOnlyInt4().run(graph, context)
    onnx.checker.check_model(graph.to_proto())
    assert names <= {n.name for n in graph.nodes}
    assert WeightOnlyInt4().run(graph, context).rewrites == 0
    return graph, report


PORTABLE: dict[str, Any] = {"spelling": "portable", "accuracy_level": None}


def holders(graph: Graph) -> list[Node]:
    """The nodes that hold a matrix of 4 bits."""
    return [n for n in graph.nodes if n.op == "MatMulNBits" or (n.op == "DequantizeLinear" and n.constant(0) is not None)]


def stored_matrix(graph: Graph) -> Array:
    """What a graph's first 4-bit matrix stands for."""
    return held_by(holders(graph)[0])


def held_by(node: Node) -> Array:
    """What a node's 4-bit weight stands for, [K, N], read from its own constants by plain numpy."""
    if node.op == "DequantizeLinear":
        q, scale, zero = (node.constant(i) for i in range(3))
        assert q is not None and scale is not None
        rows = q.dims[0]
        spread = [np.repeat(c.array().astype(np.float32), node.attr("block_size"), axis=0)[:rows] for c in (scale, zero) if c]
        values = q.array().astype(np.float32) - (spread[1] if len(spread) > 1 else np.float32(0))
        return np.asarray(values * spread[0], np.float32)
    width, channels, block = node.attr("K"), node.attr("N"), node.attr("block_size")
    packed, scale, zero = (node.constant(i) for i in (1, 2, 3))
    assert packed is not None and scale is not None
    blob = packed.array()
    q = np.stack([blob & 15, blob >> 4], axis=-1).reshape(channels, -1)[:, :width]
    blocks = scale.dims[1]
    z = np.full((channels, blocks), 8, np.uint8)
    if zero is not None:
        z = np.stack([zero.array() & 15, zero.array() >> 4], axis=-1).reshape(channels, -1)[:, :blocks]
    wide = [np.repeat(a, block, axis=1)[:, :width] for a in (scale.array(), z)]
    return np.asarray(((q.astype(np.int32) - wide[1]).astype(np.float32) * wide[0]).T, np.float32)


CASES = [
    pytest.param(MATMUL, {"MatMulNBits": 1}, {"DequantizeLinear": 1, "MatMul": 1}, id="matmul"),
    pytest.param(GEMM, {"MatMulNBits": 1}, {"DequantizeLinear": 1, "MatMul": 1, "Add": 1}, id="gemm"),
    pytest.param(
        GEMM.replace("wt, b", "wt, row"),
        {"MatMulNBits": 1},
        {"DequantizeLinear": 1, "MatMul": 1, "Add": 1},
        id="gemm with a bias row",
    ),
    pytest.param(
        GEMM.replace("wt, b", "wt, scalar"),
        {"MatMulNBits": 1, "Add": 1},
        {"DequantizeLinear": 1, "MatMul": 1, "Add": 1},
        id="gemm with a scalar",
    ),
    pytest.param(
        GEMM.replace("(float[n, 96] x)", "(float[n, 96] x, float[n, 24] c)").replace("wt, b", "wt, c"),
        {"MatMulNBits": 1, "Mul": 1, "Add": 1},
        {"DequantizeLinear": 1, "MatMul": 1, "Mul": 1, "Add": 1},
        id="gemm with a computed summand",
    ),
    pytest.param(
        "g (float[n, 96] x) => (float[n, 24] y) { p = MatMul (x, w) q = Relu (x) r = MatMul (q, w) y = Add (p, r) }",
        {"MatMulNBits": 2, "Relu": 1, "Add": 1},
        {"DequantizeLinear": 1, "MatMul": 2, "Relu": 1, "Add": 1},
        id="a shared weight is stored once",
    ),
]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("text", "nbits", "portable"), CASES)
def test_products_in_both_spellings(text: str, nbits: dict[str, int], portable: dict[str, int], symmetric: bool) -> None:
    """Both hold bit for bit the same matrix, and compute the product with it (level 0: in float)."""
    source = model(text)
    feeds = {"x": floats(5, 96, seed=9), "c": floats(5, 24, seed=10)}
    feeds = {k: v for k, v in feeds.items() if k in {i.name for i in source.graph.input}}
    fused, report = run(source, symmetric=symmetric, accuracy_level=0)
    plain, _ = run(source, symmetric=symmetric, **PORTABLE)
    assert report.rewrites == nbits["MatMulNBits"]
    assert ops(fused) == nbits
    assert ops(plain) == portable
    matrix = stored_matrix(fused)
    assert matrix.tobytes() == stored_matrix(plain).tobytes()
    wanted = (0.5 * CONSTANTS["wt"].T if "transB" in text else CONSTANTS["w"]).astype(np.float64)
    assert np.square(matrix - wanted).sum() < 0.012 * np.square(wanted).sum()
    replaced = Graph.from_proto(source)
    for name, values in (("w", matrix), ("wt", 2 * matrix.T)):
        if name in replaced.constants:
            replaced.constants[name].assign(np.ascontiguousarray(values))
    expected = Session(replaced.to_proto(), optimisation=Optimisation.OFF).run(feeds)["y"]
    for graph, level in ((fused, Optimisation.OFF), (fused, Optimisation.ALL), (plain, Optimisation.OFF)):
        np.testing.assert_allclose(Session(graph.to_proto(), optimisation=level).run(feeds)["y"], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("level", [Optimisation.OFF, Optimisation.ALL], ids=["off", "all"])
@pytest.mark.parametrize("width", [64, 100, 8], ids=["whole blocks", "a part of a block", "less than a block"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_look_ups_give_the_same_bits_in_both_spellings(symmetric: bool, width: int, level: Optimisation) -> None:
    table = floats(3000, width, seed=5) * np.geomspace(0.01, 10, 3000, dtype=np.float32)[:, None]
    source = model(LOOK_UP.replace("5, 64", f"5, {width}"), table=table)
    fused, report = run(source, symmetric=symmetric)
    plain, _ = run(source, symmetric=symmetric, **PORTABLE)
    assert report.rewrites == 1
    assert ops(fused) == {"GatherBlockQuantized": 1}
    extra = 0 if symmetric else 1
    assert ops(plain) == {"Cast": 1 + extra, "Gather": 2 + extra, "DequantizeLinear": 1}
    results = [Session(g.to_proto(), optimisation=level).run({"ids": IDS})["y"] for g in (fused, plain)]
    assert results[0].tobytes() == results[1].tobytes()
    stored, scale, zero = (fused.nodes[0].constant(i) for i in (0, 2, 3))
    assert stored is not None and scale is not None
    assert stored.elem_type == (TensorProto.INT4 if symmetric else TensorProto.UINT4)
    spread = [np.repeat(c.array().astype(np.float32), 32, axis=1)[:, :width] for c in (scale, zero) if c is not None]
    by_hand = (stored.array().astype(np.float32) - (0 if symmetric else spread[1])) * spread[0]
    np.testing.assert_array_equal(results[0], by_hand[IDS])
    assert np.square(results[0] - table[IDS]).sum() < 0.02 * np.square(table[IDS]).sum()


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("level", [0, 1, 4])
def test_the_options_stand_in_the_file(block: int, level: int) -> None:
    graph, _ = run(model(MATMUL), block=block, accuracy_level=level)
    node = graph.nodes[0]
    named = {"K": 96, "N": 24, "bits": 4, "block_size": block, "accuracy_level": level}
    assert {name: node.attr(name) for name in named} == named
    assert graph.opset("com.microsoft") == 1
    assert graph.opset() == 21


def error(matrix: Array, moment: Array) -> Array:
    e = (CONSTANTS["w"] - matrix).astype(np.float64)
    return np.einsum("kn,kl,ln->n", e, moment, e)


def correlated(count: int = 20) -> list[Mapping[str, Array]]:
    mix = np.random.default_rng(6).normal(size=(96, 96))
    return [{"x": (floats(40, 96, seed=50 + i) @ mix + 1).astype(np.float32)} for i in range(count)]


def test_calibration_lowers_the_error_on_its_own_moment_in_every_column() -> None:
    feeds = correlated()
    rows = np.concatenate([f["x"] for f in feeds]).astype(np.float64)
    moment = rows.T @ rows / len(rows)
    learned = error(stored_matrix(run(model(MATMUL), feeds)[0]), moment)
    nearest = error(stored_matrix(run(model(MATMUL))[0]), moment)
    fast = stored_matrix(run(model(MATMUL), feeds, {"effort": "fast"})[0])
    assert learned.sum() < 0.6 * nearest.sum()
    assert fast.tobytes() == stored_matrix(run(model(MATMUL))[0]).tobytes()


def test_a_matrix_too_wide_for_a_moment_is_rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.passes.weight_only.WIDEST", 95)
    feeds = correlated()
    graph, report = run(model(MATMUL), feeds)
    assert report.rewrites == 1
    assert report.skipped == {"reduction too wide for a second moment in memory: rounded to nearest": 1}
    power = np.diag(np.square(np.concatenate([f["x"] for f in feeds]).astype(np.float64)).mean(axis=0))
    assert error(stored_matrix(graph), power).sum() <= error(stored_matrix(run(model(MATMUL))[0]), power).sum()


@pytest.mark.parametrize(
    "feeds",
    [
        pytest.param([{"x": np.zeros((3, 96), np.float32)}], id="zeros"),
        pytest.param([{"x": np.ones((1, 96), np.float32)}], id="one constant row"),
    ],
)
def test_degenerate_calibration_works(feeds: list[Mapping[str, Array]]) -> None:
    graph, report = run(model(MATMUL), feeds)
    assert report.rewrites == 1
    assert np.square(stored_matrix(graph) - CONSTANTS["w"]).sum() < 0.05 * np.square(CONSTANTS["w"]).sum()


def test_calibration_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(DataError, match="node 'product': the calibration data"):
        run(model(MATMUL), [{"x": np.full((3, 96), np.inf, np.float32)}])


CONV = "g (float[n, 3, 8, 8] x) => (float[n, 4, 8, 8] y) { [conv] y = Conv <pads = [1, 1, 1, 1]> (x, k) }"
REFUSED = [
    pytest.param("{ [conv] y = Conv <pads = [1, 1, 1, 1]> (x4, k) }", "a convolution stays float", id="convolution"),
    pytest.param("{ y = MatMul (x, x2) }", "product of two activations", id="two activations"),
    pytest.param("{ y = MatMul (left, x2) }", "weights are the left operand", id="left"),
    pytest.param("{ y = MatMul (x3, deep) }", "rank other than 2", id="rank 3"),
    pytest.param("{ y = Gemm <transA = 1> (x, tall) }", "Gemm with transA", id="transA"),
    pytest.param("{ y = MatMul (x, tiny) }", "need more room", id="tiny"),
    pytest.param("{ y = MatMul (x1, w) }", "one vector", id="a vector"),
    pytest.param("{ r = ReduceSum (w) p = MatMul (x, w) y = Add (p, r) }", "more than matrix products", id="read elsewhere"),
    pytest.param("{ p = MatMul (x, w) q = Gemm <alpha = 2.0> (x, w) y = Add (p, q) }", "in another way", id="two layouts"),
    pytest.param("{ [kept] y = MatMul (x, w) }", "excluded by --exclude", id="excluded"),
    pytest.param("{ y = Gather (little, ids) }", "a small table", id="small table"),
]


@pytest.mark.parametrize(("body", "reason"), REFUSED)
def test_refusals_are_counted_with_their_reason(body: str, reason: str) -> None:
    """Beside one product that is rewritten."""
    inputs = {
        "x": "float[n, 96] x", "x1": "float[96] x1", "x2": "float[96, n] x2", "x3": "float[2, n, 96] x3",
        "x4": "float[n, 3, 8, 8] x4", "ids": "int64[n] ids",
    }  # fmt: skip
    held = {
        "k": floats(4, 3, 3, 3), "left": floats(4, 96), "deep": floats(2, 96, 8), "tall": floats(7, 24),
        "tiny": np.ones((96, 0), np.float32), "little": floats(20, 8),
    }  # fmt: skip
    used = ", ".join(v for k, v in inputs.items() if any(f"{s}{k}{e}" in body for s in "( " for e in ",)"))
    other = "{ [other] o = MatMul (z, v) "
    text = f"g ({used}, float[n, 64] z) => (float y, float[n, 40] o) {other}{body[1:]}"
    made = parse(text, **{k: v for k, v in {**held, "w": CONSTANTS["w"]}.items() if f" {k})" in body or f"({k}," in body},
                 v=floats(64, 40))  # fmt: skip
    made.graph.output[0].type.tensor_type.ClearField("shape")
    graph = Graph.from_proto(made)
    context = Context(Settings(bits=4, weight_only=WeightOnly(), exclude=("kept",)))
    context.synthetic = True
    report = WeightOnlyInt4().run(graph, context)
    assert report.rewrites == 1
    assert all(reason in text for text in report.skipped)
    assert len(report.skipped) == 1
    assert ops(graph)["MatMulNBits"] == 1


def test_a_model_without_a_matrix_is_an_error() -> None:
    with pytest.raises(ModelError, match="no weight can be stored in 4 bits"):
        run(parse(CONV, k=floats(4, 3, 3, 3)))


# ---- the whole way ----
@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("written")
    found = {}
    for spelling in ("matmulnbits", "portable"):
        made = compile_model(
            VIT, folder / f"{spelling}.onnx", bits=4, activations="float", spelling=spelling, data=CALIBRATION, latency=False
        )
        found[spelling] = (made.path, made.report)
    return found


def test_the_report_says_how_weights_are_stored(written: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    common = {"bits": 4, "block": 32, "symmetric": False, "rounding": "second order"}
    fused, plain = (written[s][1] for s in ("matmulnbits", "portable"))
    assert fused["weights"] == {**common, "spelling": "matmulnbits", "accuracy_level": 4}
    assert plain["weights"] == {**common, "spelling": "portable", "accuracy_level": None}
    for report in (fused, plain):
        assert report["settings"]["weight_only"]["block"] == 32
        assert report["accuracy"]["sqnr_db"] > 25
        assert report["size_bytes"]["ratio"] < 0.25
        assert report["fusion"]["integer_weight_bytes"] > 10 * report["fusion"]["float_weight_bytes"]


def test_the_audit_and_inspect_know_weight_only_files(written: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    for spelling, (path, _) in written.items():
        audited = audit(path)
        assert audited.integer_ops["MatMulNBits"] > 10, spelling
        assert "MatMulNBits" not in audited.float_ops
        # The least onnxruntime makes a Gemm of the head's MatMul + Add, whose shapes are static, before it looks for blocks.
        assert [left.node for left in audited.not_fused] in ([], ["/head/Gemm"] if spelling == "portable" else [])
        assert all("in blocks of 32 was not made a MatMulNBits" in left.reason for left in audited.not_fused)
        assert audited.leftover == [] or audited.not_fused
        assert summary(path).formats == ("weight-only", "float")


def test_both_files_hold_the_same_integers(written: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    matrices = []
    for path, _ in written.values():
        graph = Graph.load(path)
        matrices.append(sorted(hashlib.sha256(held_by(n).tobytes()).hexdigest() for n in holders(graph)))
    assert matrices[0] == matrices[1]
    assert len(matrices[0]) > 10


def test_the_same_bytes_twice(written: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path) -> None:
    again = compile_model(VIT, tmp_path / "again.onnx", bits=4, activations="float", data=CALIBRATION, latency=False)
    assert again.path.read_bytes() == written["matmulnbits"][0].read_bytes()


@pytest.mark.parametrize("spelling", ["matmulnbits", "portable"])
def test_a_weight_only_file_is_refused_as_input(
    spelling: str, written: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="already quantised"):
        compile_model(written[spelling][0], tmp_path / "again.onnx")


def test_a_file_of_a_portable_table_alone_is_refused_as_input(tmp_path: Path) -> None:
    graph, _ = run(model(LOOK_UP), **PORTABLE)
    graph.save(tmp_path / "table.onnx")
    with pytest.raises(ModelError, match="already quantised: 1 DequantizeLinear"):
        compile_model(tmp_path / "table.onnx", tmp_path / "again.onnx")


def test_without_data_it_works_and_warns(tmp_path: Path) -> None:
    made = compile_model(VIT, tmp_path / "vit.onnx", bits=4, activations="float", latency=False)
    assert made.report["weights"]["rounding"] == "nearest"
    assert any("rounded to nearest" in w for w in made.report["warnings"])
    assert made.report["data"]["calibration"] == "synthetic"
    stamps = {p.key: p.value for p in onnx.load(made.path).metadata_props}
    assert '"weight_only":{"accuracy_level":4,"block":32' in stamps["qcompile.settings"]


@pytest.mark.zoo
def test_minilm_keeps_its_signal_in_a_sixth_of_the_size(tmp_path: Path) -> None:
    folder = ZOO / "minilm_sst2"
    if not folder.is_dir():
        pytest.skip("no ../shared/zoo here")
    data = f"{ZOO / 'tasks.py'}:minilm_sst2"
    made = compile_model(
        folder / "model.onnx", tmp_path / "m.onnx", bits=4, activations="float",
        data=f"{data}_calib", eval_data=f"{data}_eval", latency=False,
    )  # fmt: skip
    assert made.report["accuracy"]["top1_agreement"] >= 0.98
    assert made.report["accuracy"]["sqnr_db"] >= 21
    assert made.report["size_bytes"]["ratio"] <= 0.20
    stored = {numpy_helper.to_array(t).shape for t in onnx.load(made.path).graph.initializer if t.data_type == TensorProto.UINT4}
    assert (30522, 384) in stored
