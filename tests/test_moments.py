"""Second moments of a layer's input against explicit windows, and padding against onnxruntime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from core_models import floats, model

from qcompile.errors import DataError
from qcompile.graph import Array, Graph, Node
from qcompile.moments import conv_pads, input_covariance, input_moment, input_power, input_variance
from qcompile.runtime import Session


def conv(attributes: str, weight: Array, size: tuple[int, int]) -> tuple[Node, Session]:
    channels = weight.shape[1] * int(attributes.split("group = ")[1].split(",")[0] if "group = " in attributes else 1)
    text = f"g (float[n, {channels}, {size[0]}, {size[1]}] x) => (float[n, m, p, q] y) {{ y = Conv <{attributes}> (x, w) }}"
    made = model(text, w=weight)
    return Graph.from_proto(made).nodes[0], Session(made)


def rows_of(node: Node, weight: Array, x: Array, pads: list[int], strides: list[int], dilations: list[int]) -> Array:
    """[groups, rows, K] by plain loops: one row an output position, K = (kh, kw, channel of the group)."""
    groups = node.attr("group", 1)
    kh, kw = weight.shape[2:]
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])])
    depth = weight.shape[1]
    rows: list[list[Array]] = [[] for _ in range(groups)]
    for n in range(x.shape[0]):
        for top in range(0, padded.shape[2] - (kh - 1) * dilations[0], strides[0]):
            for left in range(0, padded.shape[3] - (kw - 1) * dilations[1], strides[1]):
                for g in range(groups):
                    row = [
                        padded[n, g * depth + c, top + i * dilations[0], left + j * dilations[1]]
                        for i in range(kh)
                        for j in range(kw)
                        for c in range(depth)
                    ]
                    rows[g].append(np.array(row))
    return np.stack([np.stack(r) for r in rows])


def covariance(rows: Array) -> Array:
    centred = rows - rows.mean(axis=1, keepdims=True)
    return np.matmul(np.swapaxes(centred, 1, 2), centred) / rows.shape[1]


CONVS = [
    pytest.param("pads = [1, 1, 1, 1]", (4, 3, 3, 3), (6, 7), [1, 1, 1, 1], [1, 1], [1, 1], id="plain"),
    pytest.param("strides = [2, 1], pads = [0, 1, 2, 0]", (4, 3, 3, 2), (7, 6), [0, 1, 2, 0], [2, 1], [1, 1], id="strides"),
    pytest.param("dilations = [2, 3], pads = [2, 3, 2, 3]", (2, 2, 3, 2), (7, 8), [2, 3, 2, 3], [1, 1], [2, 3], id="dilations"),
    pytest.param("group = 2, pads = [1, 1, 1, 1]", (4, 2, 3, 3), (5, 5), [1, 1, 1, 1], [1, 1], [1, 1], id="groups"),
    pytest.param("group = 3", (3, 1, 2, 2), (5, 5), [0, 0, 0, 0], [1, 1], [1, 1], id="depthwise"),
    pytest.param(
        'auto_pad = "SAME_UPPER", strides = [2, 2]', (2, 2, 3, 3), (6, 7), [0, 1, 1, 1], [2, 2], [1, 1], id="same-upper"
    ),
    pytest.param(
        'auto_pad = "SAME_LOWER", strides = [2, 2]', (2, 2, 3, 3), (6, 7), [1, 1, 0, 1], [2, 2], [1, 1], id="same-lower"
    ),
    pytest.param('auto_pad = "VALID", strides = [1, 2]', (2, 2, 3, 3), (6, 7), [0, 0, 0, 0], [1, 2], [1, 1], id="valid"),
    pytest.param("strides = [3, 3]", (2, 2, 1, 1), (7, 7), [0, 0, 0, 0], [3, 3], [1, 1], id="1x1-strided"),
]


@pytest.mark.parametrize(("attributes", "shape", "size", "pads", "strides", "dilations"), CONVS)
def test_convolutions_against_loops(
    attributes: str, shape: tuple[int, ...], size: tuple[int, int], pads: list[int], strides: list[int], dilations: list[int]
) -> None:
    weight = floats(*shape, seed=1)
    node, session = conv(attributes, weight, size)
    channels = shape[1] * node.attr("group", 1)
    samples = [floats(2, channels, *size, seed=s) + 3 for s in range(3)]
    rows = np.concatenate([rows_of(node, weight, x, pads, strides, dilations) for x in samples], axis=1)
    # The rows really are what the convolution multiplies: onnxruntime's outputs are products with them.
    matrix = np.moveaxis(weight, 1, -1).reshape(rows.shape[0], -1, rows.shape[2]).astype(np.float64)
    expected = np.concatenate([session.run({"x": x})["y"] for x in samples])
    product = np.matmul(rows, np.swapaxes(matrix, 1, 2))
    got = np.moveaxis(product, 1, 2).reshape(shape[0], len(expected), *expected.shape[2:]).swapaxes(0, 1)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    found = input_covariance(node, shape, samples, 3)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, covariance(rows), rtol=1e-5, atol=1e-5)


MODES = ["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"]
# onnxruntime refuses SAME padding of a dilated kernel.
PADS = [(m, k, 1) for m in MODES for k in (1, 2, 3, 5)] + [("VALID", 3, 2), ("NOTSET", 3, 2)]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("mode", "kernel", "dilation"), PADS)
def test_pads_against_onnxruntime(mode: str, stride: int, kernel: int, dilation: int) -> None:
    """The same Conv with explicit pads computes the same as with auto_pad."""
    weight = floats(1, 1, kernel, kernel)
    pads = ", pads = [1, 0, 2, 1]" if mode == "NOTSET" else ""
    options = f"strides = [{stride}, {stride}], dilations = [{dilation}, {dilation}]"
    node, session = conv(f'auto_pad = "{mode}", {options}{pads}', weight, (9, 10))
    begin, end = conv_pads(node, (9, 10), (kernel, kernel), [stride] * 2, [dilation] * 2)
    if mode == "NOTSET":
        assert (begin, end) == ([1, 0], [2, 1])
    _, explicit = conv(f"{options}, pads = [{begin[0]}, {begin[1]}, {end[0]}, {end[1]}]", weight, (9, 10))
    x = floats(1, 1, 9, 10)
    np.testing.assert_array_equal(explicit.run({"x": x})["y"], session.run({"x": x})["y"])


def gemm(transposed: bool, width: int = 5) -> Node:
    shape = (3, width) if transposed else (width, 3)
    text = f"g (float[n, {width}] x) => (float[n, 3] y) {{ y = Gemm <transB = {int(transposed)}> (x, w) }}"
    return Graph.from_proto(model(text, w=floats(*shape))).nodes[0]


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_product(transposed: bool) -> None:
    samples = [floats(4, 5, seed=s) for s in range(6)]
    found = input_covariance(gemm(transposed), (3, 5) if transposed else (5, 3), samples, 6)
    np.testing.assert_allclose(found, covariance(np.concatenate(samples)[None].astype(np.float64)), rtol=1e-5, atol=1e-6)


def test_one_row_has_no_variance() -> None:
    found = input_covariance(gemm(True), (3, 5), [floats(1, 5) * 100], 1)
    np.testing.assert_array_equal(found, np.zeros((1, 5, 5)))


def test_constant_columns_have_no_variance() -> None:
    """Products of large means in float32 would leave noise there, of either sign."""
    samples = [np.concatenate([np.full((64, 4), 211.3, np.float32), floats(64, 1, seed=s) * 1e-3], axis=1) for s in range(9)]
    found = input_covariance(gemm(True), (3, 5), samples, 9)[0]
    exact = covariance(np.concatenate(samples)[None].astype(np.float64))[0]
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-12)
    assert np.linalg.eigvalsh(found).min() > -1e-12


def test_rows_are_bounded_and_drawn_by_seed() -> None:
    x = floats(20_000, 5)
    first, second = (input_covariance(gemm(True), (3, 5), [x], 1, seed=4) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    other = input_covariance(gemm(True), (3, 5), [x], 1, seed=5)
    assert not np.array_equal(first, other)  # not all rows were used
    np.testing.assert_allclose(first[0], np.eye(5), atol=0.1)


@pytest.mark.parametrize("moment", [input_covariance, input_variance], ids=["covariance", "variance"])
def test_no_sample_is_refused(moment: Callable[..., Array]) -> None:
    with pytest.raises(DataError, match="no sample reaches it"):
        moment(gemm(True), (3, 5), [], 0)


def test_the_variance_is_the_diagonal_of_the_covariance() -> None:
    rows = [np.random.default_rng(7).normal(loc=40, size=(7, 5)) * np.arange(5) for _ in range(3)]
    covariance = input_covariance(gemm(True), (3, 5), rows, 3)
    variance = input_variance(gemm(True), (3, 5), rows, 3)
    expected = np.concatenate(rows).var(axis=0)
    np.testing.assert_allclose(variance[0], expected, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(np.diag(covariance[0]), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("op", ["MatMul (x, w)", "Gemm (x, w)"], ids=["matmul", "gemm"])
def test_moments_about_zero_hold_the_mean(op: str) -> None:
    weight = floats(6, 4)
    node = Graph.from_proto(model(f"g (float[n, 6] x) => (float[n, 4] y) {{ y = {op} }}", w=weight)).nodes[0]
    arrays = [floats(9, 6, seed=i) + np.arange(6, dtype=np.float32) * 10 for i in range(5)]
    rows = np.concatenate(arrays).astype(np.float64)
    expected = rows.T @ rows / len(rows)
    np.testing.assert_allclose(input_moment(node, weight.shape, arrays, 5)[0], expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(input_power(node, weight.shape, arrays, 5)[0], np.diag(expected), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(input_covariance(node, weight.shape, arrays, 5), covariance(rows[None]), rtol=1e-3, atol=1e-3)


def test_moments_without_samples_are_refused() -> None:
    node = Graph.from_proto(model("g (float[n, 6] x) => (float[n, 4] y) { y = MatMul (x, w) }", w=floats(6, 4))).nodes[0]
    for statistic in (input_moment, input_power):
        with pytest.raises(DataError, match="no sample reaches it"):
            statistic(node, (6, 4), [], 0)
