"""Block grids and their packing, against plain float64, onnx's reference evaluator and onnxruntime's own kernel."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qcompile.block_grid import BlockGrid, round_blocks
from qcompile.block_packing import grid_tensors, int4_tensor, nbits_weight, nbits_zero_points
from qcompile.graph import Array
from qcompile.runtime import Session

SHAPES = [
    pytest.param(64, 5, 32, id="whole blocks"),
    pytest.param(100, 3, 32, id="a part of a block at the end"),
    pytest.param(96, 4, 32, id="an odd number of blocks"),
    pytest.param(16, 6, 32, id="less than one block"),
    pytest.param(65, 7, 64, id="one weight in the last block"),
    pytest.param(256, 2, 128, id="blocks of 128"),
]


def matrix_of(rows: int, width: int, seed: int = 0) -> Array:
    """Rows of different sizes and offsets, so that zero points differ."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, width)) * rng.uniform(0.1, 5, (rows, 1)) + rng.normal(size=(rows, 1))).astype(np.float32)


def plain(integers: Array, grid: BlockGrid) -> Array:
    """(q - z) * s by a loop over blocks, float64."""
    result = np.zeros(integers.shape)
    for row in range(integers.shape[0]):
        for index, start in enumerate(range(0, integers.shape[1], grid.block)):
            part = integers[row, start : start + grid.block].astype(np.float64)
            result[row, start : start + grid.block] = (part - int(grid.zero_point[row, index])) * float(grid.scale[row, index])
    return result


def weighted(matrix: Array, reached: Array, importance: Array) -> float:
    return float((np.square(matrix.astype(np.float64) - reached) * importance).sum())


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("width", "rows", "block"), SHAPES)
def test_a_grid_is_within_its_limits_and_beats_the_plain_range(width: int, rows: int, block: int, symmetric: bool) -> None:
    matrix = matrix_of(rows, width)
    grid, q = round_blocks(matrix, block, symmetric=symmetric)
    assert q.dtype == np.uint8 and q.shape == matrix.shape and q.max() <= 15
    assert grid.scale.dtype == np.float32 and grid.zero_point.dtype == np.uint8
    assert grid.scale.shape == grid.zero_point.shape == (rows, -(-width // block))
    assert (grid.scale > 0).all() and grid.zero_point.max() <= 15
    assert grid.symmetric is symmetric
    np.testing.assert_allclose(grid.dequantise(q), plain(q, grid), rtol=1e-7, atol=0)
    nearest = np.zeros(matrix.shape)  # min/max of every block, by hand
    for row in range(rows):
        for start in range(0, width, block):
            part = matrix[row, start : start + block].astype(np.float64)
            low, high = min(part.min(), 0.0), max(part.max(), 0.0)
            scale = max(high / 7, -low / 8) if symmetric else (high - low) / 15
            zero = 8 if symmetric else np.rint(-low / scale)
            nearest[row, start : start + block] = (np.clip(np.rint(part / scale) + zero, 0, 15) - zero) * scale
    ones = np.ones(width)
    assert weighted(matrix, plain(q, grid), ones) <= weighted(matrix, nearest, ones) * (1 + 1e-5)


def test_importance_moves_the_error_to_where_it_counts_less() -> None:
    matrix = matrix_of(40, 128, seed=1)
    importance = np.where(np.arange(128) % 4 == 0, 100.0, 0.01)
    grid, q = round_blocks(matrix, 32, symmetric=False, importance=importance)
    even_grid, even = round_blocks(matrix, 32, symmetric=False)
    ones = np.ones(128)
    assert weighted(matrix, plain(q, grid), importance) < 0.9 * weighted(matrix, plain(even, even_grid), importance)
    assert weighted(matrix, plain(q, grid), ones) > weighted(matrix, plain(even, even_grid), ones)


def test_importance_of_zeros_is_none() -> None:
    matrix = matrix_of(3, 40)
    grid, q = round_blocks(matrix, 32, symmetric=False, importance=np.zeros(40))
    same, even = round_blocks(matrix, 32, symmetric=False)
    np.testing.assert_array_equal(q, even)
    np.testing.assert_array_equal(grid.scale, same.scale)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    "value",
    [
        pytest.param(0.0, id="zero"),
        pytest.param(3.0, id="positive"),
        pytest.param(-0.25, id="negative"),
        pytest.param(1e-42, id="denormal"),
    ],
)
def test_constant_blocks(value: float, symmetric: bool) -> None:
    matrix = np.full((2, 48), value, np.float32)
    grid, q = round_blocks(matrix, 32, symmetric=symmetric)
    expected = 0.0 if abs(value) < 1e-30 else value
    np.testing.assert_allclose(grid.dequantise(q), np.full((2, 48), expected), rtol=1e-6, atol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 70), rows=st.integers(1, 5), symmetric=st.booleans())
def test_rows_are_independent_of_each_other_and_of_the_chunk(seed: int, width: int, rows: int, symmetric: bool) -> None:
    matrix = matrix_of(rows, width, seed)
    grid, q = round_blocks(matrix, 32, symmetric=symmetric)
    for row in range(rows):
        one, alone = round_blocks(matrix[row : row + 1], 32, symmetric=symmetric)
        np.testing.assert_array_equal(alone[0], q[row])
        np.testing.assert_array_equal(one.scale[0], grid.scale[row])


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = matrix_of(23, 70)
    whole = round_blocks(matrix, 32, symmetric=False)
    monkeypatch.setattr("qcompile.block_grid._VALUES", 200)
    parts = round_blocks(matrix, 32, symmetric=False)
    np.testing.assert_array_equal(parts[1], whole[1])
    np.testing.assert_array_equal(parts[0].scale, whole[0].scale)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.integers(-8, 7), min_size=0, max_size=9))
def test_int4_tensors_read_back_as_onnx_reads_them(values: list[int]) -> None:
    made = int4_tensor(np.array(values, np.int8), signed=True)
    np.testing.assert_array_equal(numpy_helper.to_array(made).astype(np.int8), np.array(values, np.int8))
    shifted = np.array(values, np.int16) + 8
    unsigned = int4_tensor(shifted, signed=False)
    np.testing.assert_array_equal(numpy_helper.to_array(unsigned).astype(np.int16), shifted)


@pytest.mark.parametrize(("value", "signed"), [(8, True), (-9, True), (16, False), (-1, False)])
def test_int4_tensors_refuse_what_does_not_fit(value: int, signed: bool) -> None:
    with pytest.raises(ValueError, match="outside"):
        int4_tensor(np.array([0, value]), signed=signed)


@pytest.mark.parametrize("level", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("width", "rows", "block"), SHAPES)
def test_onnxruntime_reads_the_packed_blocks(width: int, rows: int, block: int, symmetric: bool, level: int) -> None:
    """MatMulNBits against the float64 product with the plainly dequantised matrix. Level 4 rounds x to 8 bits: about 1/254."""
    grid, q = round_blocks(matrix_of(rows, width), block, symmetric=symmetric)
    arrays = {"b": nbits_weight(q, block), "s": grid.scale, "z": nbits_zero_points(grid)}
    assert (arrays["z"] is None) is symmetric
    held = [numpy_helper.from_array(a, n) for n, a in arrays.items() if a is not None]
    node = helper.make_node(
        "MatMulNBits", ["x", *(t.name for t in held)], ["y"], domain="com.microsoft",
        K=width, N=rows, bits=4, block_size=block, accuracy_level=level,
    )  # fmt: skip
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy"]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], held)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    session = Session(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    x = np.random.default_rng(3).normal(size=(3, width)).astype(np.float32)
    expected = x.astype(np.float64) @ plain(q, grid).T
    # Level 4: |error of x| <= max|x| / 254 in every block, against every weight.
    allowed = np.abs(x).max() / 254 * np.abs(plain(q, grid)).sum(axis=1) if level == 4 else 0.0
    assert (np.abs(session.run({"x": x})["y"] - expected) <= allowed + 1e-5 * np.abs(expected).max()).all()


@pytest.mark.parametrize("transposed", [False, True], ids=["rows first", "K first"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("width", "rows", "block"), SHAPES)
def test_the_reference_evaluator_reads_the_blocked_tensors(
    width: int, rows: int, block: int, symmetric: bool, transposed: bool
) -> None:
    grid, q = round_blocks(matrix_of(rows, width), block, symmetric=symmetric)
    stored, scale, zero = grid_tensors(q, grid, transposed=transposed)
    assert stored.data_type == (TensorProto.INT4 if symmetric else TensorProto.UINT4)
    stored.name = "w"
    held = [stored, numpy_helper.from_array(scale, "s")]
    if zero is not None:
        zero.name = "z"
        held.append(zero)
    node = helper.make_node("DequantizeLinear", [t.name for t in held], ["y"], axis=0 if transposed else 1, block_size=block)
    end = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])
    opsets = [helper.make_opsetid("", 21)]
    model = helper.make_model(helper.make_graph([node], "g", [], [end], held), opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    expected = grid.dequantise(q).T if transposed else grid.dequantise(q)
    np.testing.assert_array_equal(Session(model).run({})["y"], expected)
    if width % block == 0:  # onnx's evaluator repeats whole blocks only
        np.testing.assert_array_equal(ReferenceEvaluator(model).run(None, {})[0], expected)
