from __future__ import annotations

import numpy as np
import pytest
from passes_helpers import check_pass, floats, ops, parse

from qcompile.context import Context
from qcompile.errors import ModelError
from qcompile.graph import Array, Graph
from qcompile.passes.fold_bn import FoldBatchNorm


def statistics(channels: int, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    names = {"gamma": rng.normal(size=channels), "beta": rng.normal(size=channels), "mean": rng.normal(size=channels)}
    names["var"] = rng.uniform(0.05, 4, channels)
    return {k: v.astype(np.float32) for k, v in names.items()}


BN = "BatchNormalization <epsilon = 0.01> "
PARAMETERS = "gamma, beta, mean, var"


@pytest.mark.parametrize("seed", range(8))
def test_behind_a_conv_with_random_options(seed: int) -> None:
    rng = np.random.default_rng(seed)
    group = int(rng.choice([1, 2, 4]))
    kernel, stride, pad = int(rng.choice([1, 3])), int(rng.choice([1, 2])), int(rng.choice([0, 1]))
    bias = bool(rng.integers(2))
    inputs = "x, w, b" if bias else "x, w"
    constants = statistics(8, seed) | {"w": floats(8, 4 // group, kernel, kernel, seed=seed)} | ({"b": floats(8)} if bias else {})
    model = parse(
        f"""g (float[n, 4, 7, 7] x) => (float[n, 8, p, q] y) {{
            c = Conv <group = {group}, strides = [{stride}, {stride}], pads = [{pad}, {pad}, {pad}, {pad}]> ({inputs})
            y = {BN} (c, {PARAMETERS}) }}""",
        **constants,
    )
    report, graph = check_pass(FoldBatchNorm(), model, {"x": floats(2, 4, 7, 7)})
    assert ops(graph) == {"Conv": 1}
    assert report.rewrites == 1


@pytest.mark.parametrize("group", [1, 2, 3])
def test_behind_a_conv_transpose(group: int) -> None:
    model = parse(
        f"""g (float[n, 6, 4, 4] x) => (float[n, 12, p, q] y) {{
            c = ConvTranspose <group = {group}, strides = [2, 2]> (x, w)  y = {BN} (c, {PARAMETERS}) }}""",
        w=floats(6, 12 // group, 3, 3),
        **statistics(12),
    )
    _, graph = check_pass(FoldBatchNorm(), model, {"x": floats(2, 6, 4, 4)})
    assert ops(graph) == {"ConvTranspose": 1}


@pytest.mark.parametrize(
    ("body", "left"),
    [
        pytest.param("c = Gemm(x, w, b)", {"Gemm": 1}, id="gemm"),
        pytest.param("c = Gemm <alpha = 0.5, beta = 0.25> (x, w, b)", {"Gemm": 1}, id="gemm-alpha-beta"),
        pytest.param("c = MatMul(x, w)", {"MatMul": 1, "Add": 1}, id="matmul"),
        pytest.param("m = MatMul(x, w)  c = Add(m, b)", {"MatMul": 1, "Add": 1}, id="matmul-add"),
    ],
)
def test_behind_a_matrix_product(body: str, left: dict[str, int]) -> None:
    model = parse(
        f"g (float[n, 6] x) => (float[n, 4] y) {{ {body}  y = {BN} (c, {PARAMETERS}) }}",
        w=floats(6, 4),
        b=floats(4),
        **statistics(4),
    )
    _, graph = check_pass(FoldBatchNorm(), model, {"x": floats(5, 6)})
    assert ops(graph) == left


@pytest.mark.parametrize("group", [1, 2])
def test_before_a_conv_without_padding(group: int) -> None:
    model = parse(
        f"""g (float[n, 6, 5, 5] x) => (float[n, 4, 3, 3] y) {{
            a = Relu(x)  c = {BN} (a, {PARAMETERS})  y = Conv <group = {group}> (c, w, b) }}""",
        w=floats(4, 6 // group, 3, 3),
        b=floats(4),
        **statistics(6),
    )
    report, graph = check_pass(FoldBatchNorm(), model, {"x": floats(2, 6, 5, 5)})
    assert ops(graph) == {"Relu": 1, "Conv": 1}
    assert not report.refusals


def test_before_a_padded_conv_only_the_scale_goes_in() -> None:
    values = statistics(6) | {"beta": np.zeros(6, np.float32), "mean": np.zeros(6, np.float32)}
    model = parse(
        f"g (float[n, 6, 5, 5] x) => (float[n, 4, 5, 5] y) {{ c = {BN} (x, {PARAMETERS})"
        "  y = Conv <pads = [1, 1, 1, 1]> (c, w) }",
        w=floats(4, 6, 3, 3),
        **values,
    )
    _, graph = check_pass(FoldBatchNorm(), model, {"x": floats(2, 6, 5, 5)})
    assert ops(graph) == {"Conv": 1}


@pytest.mark.parametrize(
    "pads", ["pads = [1, 1, 1, 1]", 'auto_pad = "SAME_UPPER", kernel_shape = [3, 3]'], ids=["pads", "auto-pad"]
)
def test_padding_would_see_the_shift(pads: str) -> None:
    model = parse(
        f"g (float[n, 6, 5, 5] x) => (float[n, 4, 5, 5] y) {{ c = {BN} (x, {PARAMETERS})  y = Conv <{pads}> (c, w) }}",
        w=floats(4, 6, 3, 3),
        **statistics(6),
    )
    report, graph = check_pass(FoldBatchNorm(), model, {"x": floats(2, 6, 5, 5)})
    assert report.skipped == {"padding would see the shift": 1}
    assert ops(graph) == {"Conv": 2}


@pytest.mark.parametrize(
    ("body", "weight", "left"),
    [
        pytest.param("y = Gemm(c, w, b)", (6, 4), {"Gemm": 1}, id="gemm"),
        pytest.param("y = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (c, w, b)", (4, 6), {"Gemm": 1}, id="gemm-options"),
        pytest.param("y = MatMul(c, w)", (6, 4), {"MatMul": 1, "Add": 1}, id="matmul-graph-output"),
        pytest.param("m = MatMul(c, w)  y = Relu(m)", (6, 4), {"MatMul": 1, "Add": 1, "Relu": 1}, id="matmul"),
    ],
)
def test_before_a_matrix_product(body: str, weight: tuple[int, int], left: dict[str, int]) -> None:
    model = parse(
        f"g (float[n, 6] x) => (float[n, 4] y) {{ c = {BN} (x, {PARAMETERS})  {body} }}",
        w=floats(*weight),
        b=floats(4),
        **statistics(6),
    )
    _, graph = check_pass(FoldBatchNorm(), model, {"x": floats(5, 6)})
    assert ops(graph) == left


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        pytest.param("n, 6, 5, 5", {"Relu": 2, "Conv": 1}, id="rank-4"),
        pytest.param("n, 6, 5", {"Relu": 2, "Mul": 1, "Add": 1}, id="rank-3"),
        pytest.param("n, 6", {"Relu": 2, "Mul": 1, "Add": 1}, id="rank-2"),
    ],
)
def test_alone(shape: str, left: dict[str, int]) -> None:
    model = parse(
        f"g (float[{shape}] x) => (float[{shape}] y) {{ a = Relu(x)  c = {BN} (a, {PARAMETERS})  y = Relu(c) }}", **statistics(6)
    )
    sizes = [2 if s.strip() == "n" else int(s) for s in shape.split(",")]
    _, graph = check_pass(FoldBatchNorm(), model, {"x": floats(*sizes)})
    assert ops(graph) == left


def test_conv_output_read_elsewhere() -> None:
    model = parse(
        f"g (float[n, 3, 5, 5] x) => (float[n, 4, 3, 3] y) {{ c = Conv(x, w)  d = {BN} (c, {PARAMETERS})  y = Add(c, d) }}",
        w=floats(4, 3, 3, 3),
        **statistics(4),
    )
    report, graph = check_pass(FoldBatchNorm(), model, {"x": floats(2, 3, 5, 5)})
    assert report.skipped == {"the linear output is read elsewhere, or is an output of the graph": 1}
    assert ops(graph) == {"Conv": 2, "Add": 1}


def test_conv_output_is_a_graph_output() -> None:
    model = parse(
        f"g (float[n, 3, 5, 5] x) => (float[n, 4, 3, 3] c, float[n, 4, 3, 3] y) {{ c = Conv(x, w)  y = {BN} (c, {PARAMETERS}) }}",
        w=floats(4, 3, 3, 3),
        **statistics(4),
    )
    report, graph = check_pass(FoldBatchNorm(), model, {"x": floats(2, 3, 5, 5)})
    assert len(report.refusals) == 1
    assert ops(graph) == {"Conv": 2}


def test_shared_weights_are_copied() -> None:
    model = parse(
        f"""g (float[n, 3, 5, 5] x) => (float[n, 4, 3, 3] y, float[n, 4, 3, 3] z) {{
            c = Conv(x, w)  y = {BN} (c, {PARAMETERS})  z = Conv(x, w) }}""",
        w=floats(4, 3, 3, 3),
        **statistics(4),
    )
    _, graph = check_pass(FoldBatchNorm(), model, {"x": floats(2, 3, 5, 5)})
    assert ops(graph) == {"Conv": 2}


def test_rank_three_matmul_is_left_to_mul_and_add() -> None:
    model = parse(
        f"g (float[n, 5, 6] x) => (float[n, 5, 4] y) {{ c = MatMul(x, w)  y = {BN} (c, {PARAMETERS}) }}",
        w=floats(6, 4),
        **statistics(5),
    )
    report, graph = check_pass(FoldBatchNorm(), model, {"x": floats(2, 5, 6)})
    assert report.skipped == {"axis 1 is not the output channel of the MatMul": 1}
    assert ops(graph) == {"MatMul": 1, "Mul": 1, "Add": 1}


def test_parameters_that_are_not_constant() -> None:
    constants = statistics(4)
    del constants["gamma"]
    model = parse(
        f"g (float[n, 4, 5, 5] x, float[4] gamma) => (float[n, 4, 5, 5] y) {{ y = {BN} (x, {PARAMETERS}) }}", **constants
    )
    report, graph = check_pass(FoldBatchNorm(), model, {"x": floats(2, 4, 5, 5), "gamma": floats(4)})
    assert report.skipped == {"parameters are not constant": 1}
    assert ops(graph) == {"BatchNormalization": 1}


def test_training_mode() -> None:
    model = parse(
        f"""g (float[n, 4, 5, 5] x) => (float[n, 4, 5, 5] y, float[4] m, float[4] v) {{
            y, m, v = BatchNormalization <training_mode = 1> (x, {PARAMETERS}) }}""",
        **statistics(4),
    )
    graph = Graph.from_proto(model)
    report = FoldBatchNorm().run(graph, Context())
    assert report.skipped == {"training mode": 1}
    assert report.rewrites == 0


def test_variance_that_is_not_positive_is_an_error() -> None:
    constants = statistics(4) | {"var": np.array([1, 1, -0.5, 1], np.float32)}
    model = parse(f"g (float[n, 4, 5, 5] x) => (float[n, 4, 5, 5] y) {{ y = {BN} (x, {PARAMETERS}) }}", **constants)
    with pytest.raises(ModelError, match=r"node 'BatchNormalization\(y\)': variance \+ epsilon is not positive in 'var'"):
        FoldBatchNorm().run(Graph.from_proto(model), Context())
