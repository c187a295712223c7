"""Four-bit integers as files hold them: ONNX's INT4 and UINT4 tensors, and the blocks of com.microsoft MatMulNBits.

Both put two integers in a byte, the earlier one in its lower half. ONNX packs a tensor as one flat row; MatMulNBits packs every
block by itself, so that rows may end in the middle of one, and the zero points of every row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from qcompile.block_grid import MIDDLE, BlockGrid
from qcompile.graph import Array


def int4_tensor(values: Array, *, signed: bool) -> TensorProto:
    """An INT4 (-8..7) or UINT4 (0..15) tensor without a name. Raises ValueError where a value does not fit."""
    least, most = (-8, 7) if signed else (0, 15)
    if values.size and not (least <= values.min() and values.max() <= most):
        raise ValueError(f"a value lies outside {least}..{most}")
    flat = values.reshape(-1).astype(np.uint8) & 15  # two's complement: the low half of the byte is the INT4
    tensor = TensorProto(data_type=TensorProto.INT4 if signed else TensorProto.UINT4, dims=values.shape)
    tensor.raw_data = _halves(np.append(flat, np.zeros(flat.size % 2, np.uint8))).tobytes()
    return tensor


def grid_tensors(integers: Array, grid: BlockGrid, *, transposed: bool = False) -> tuple[TensorProto, Array, TensorProto | None]:
    """(integers, scales, zero points) as a blocked DequantizeLinear or GatherBlockQuantized takes them.

    integers: [rows, K] in 0..15. Symmetric grids become INT4 without zero points, others UINT4. transposed: K first.
    """
    values, scale, zero = integers.astype(np.int16), grid.scale, grid.zero_point
    if transposed:
        values, scale, zero = values.T, scale.T, zero.T
    scale = np.ascontiguousarray(scale)
    if grid.symmetric:
        return int4_tensor(values - MIDDLE, signed=True), scale, None
    return int4_tensor(values, signed=False), scale, int4_tensor(zero, signed=False)


def nbits_weight(integers: Array, block: int) -> npt.NDArray[np.uint8]:
    """MatMulNBits' B: uint8 [N, ceil(K / block), block / 2] of `integers` [N, K] in 0..15; what is past K is never read."""
    rows, width = integers.shape
    blocks = -(-width // block)
    padded = np.pad(integers, ((0, 0), (0, blocks * block - width)), constant_values=MIDDLE)
    return _halves(padded).reshape(rows, blocks, block // 2)


def nbits_zero_points(grid: BlockGrid) -> npt.NDArray[np.uint8] | None:
    """MatMulNBits' zero_points: uint8 [N, ceil(blocks / 2)]; None where all are the middle, its own default."""
    if grid.symmetric:
        return None
    return _halves(np.pad(grid.zero_point, ((0, 0), (0, grid.zero_point.shape[1] % 2))))


def _halves(values: Array) -> npt.NDArray[np.uint8]:
    """Neighbours along the last axis (of even length) in one byte, the first in the lower half."""
    return np.asarray(values[..., 0::2] | values[..., 1::2] << 4, np.uint8)
