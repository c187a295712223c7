"""Second moments of what a linear node reads: the Hessian of its squared output error (OBS, Hassibi 1993; GPTQ)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.errors import DataError
from qcompile.graph import Node

Array = npt.NDArray[Any]

_ROWS_PER_COLUMN = 8
_LEAST_ROWS = 4096
_MOST_ROWS = 24576
_MATRIX_PRODUCTS = ("Gemm", "MatMul")


def input_covariance(node: Node, weight_shape: tuple[int, ...], arrays: Iterable[Array], count: int, seed: int = 0) -> Array:
    """Covariance [groups, K, K] (float64) of the rows that each output of Conv, Gemm or MatMul `node` is a product with.

    arrays: the node's input for each of `count` samples. K runs as the kernel does: (kh, kw, channel of the group). At most
    about 8 K rows are used in all, at positions drawn with `seed`.
    """
    return covariance_and_mean(node, weight_shape, arrays, count, seed)[0]


def input_moment(node: Node, weight_shape: tuple[int, ...], arrays: Iterable[Array], count: int, seed: int = 0) -> Array:
    """Second moment E[x x^T] of those rows about zero, [groups, K, K]: where no bias takes care of the mean error."""
    covariance, mean = covariance_and_mean(node, weight_shape, arrays, count, seed)
    return np.asarray(covariance + mean[:, :, None] * mean[:, None, :])


def input_variance(node: Node, weight_shape: tuple[int, ...], arrays: Iterable[Array], count: int, seed: int = 0) -> Array:
    """The diagonal of `input_covariance`, [groups, K], at a small part of its cost."""
    return variance_and_mean(node, weight_shape, arrays, count, seed)[0]


def input_power(node: Node, weight_shape: tuple[int, ...], arrays: Iterable[Array], count: int, seed: int = 0) -> Array:
    """The diagonal of `input_moment`, [groups, K], at a small part of its cost."""
    variance, mean = variance_and_mean(node, weight_shape, arrays, count, seed)
    return variance + np.square(mean)


def covariance_and_mean(
    node: Node, weight_shape: tuple[int, ...], arrays: Iterable[Array], count: int, seed: int = 0
) -> tuple[Array, Array]:
    """(`input_covariance` [groups, K, K], the mean of those rows [groups, K])."""
    total: Array = np.zeros(())
    mean, rows, origin = np.zeros(()), 0, np.zeros(())
    for part, shift in _sampled(node, weight_shape, arrays, count, seed):
        # float32 products and float64 sums lose nothing that matters beside the damping.
        total = total + np.matmul(np.swapaxes(part, 1, 2), part).astype(np.float64)
        mean = mean + part.sum(axis=1, dtype=np.float64)
        rows, origin = rows + part.shape[1], shift
    _require_rows(rows, node)
    mean = mean / rows
    return total / rows - mean[:, :, None] * mean[:, None, :], mean + origin[:, 0]


def variance_and_mean(
    node: Node, weight_shape: tuple[int, ...], arrays: Iterable[Array], count: int, seed: int = 0
) -> tuple[Array, Array]:
    """(`input_variance`, the mean of those rows), both [groups, K]."""
    total: Array = np.zeros(())
    mean, rows, origin = np.zeros(()), 0, np.zeros(())
    for part, shift in _sampled(node, weight_shape, arrays, count, seed):
        total = total + np.square(part).sum(axis=1, dtype=np.float64)
        mean = mean + part.sum(axis=1, dtype=np.float64)
        rows, origin = rows + part.shape[1], shift
    _require_rows(rows, node)
    mean = mean / rows
    return np.maximum(total / rows - np.square(mean), 0.0), mean + origin[:, 0]


def _require_rows(rows: int, node: Node) -> None:
    if rows == 0:
        raise DataError(f"node '{node.label}': no sample reaches it; give at least one with --data")


def rows_wanted(node: Node, weight_shape: tuple[int, ...], count: int) -> int:
    """How many rows to draw from each of `count` samples: about 8 K in all."""
    if node.op in _MATRIX_PRODUCTS:
        width = weight_shape[1] if node.attr("transB", 0) else weight_shape[0]
    else:
        width = int(np.prod(weight_shape[1:]))
    return max(1, min(max(_ROWS_PER_COLUMN * width, _LEAST_ROWS), _MOST_ROWS) // max(count, 1))


def rows_of(node: Node, weight_shape: tuple[int, ...], array: Array, wanted: int, random: np.random.Generator) -> Array:
    """[groups, rows, K] float32: at most `wanted` of the rows that `node` (Conv, Gemm, MatMul) multiplies, for one sample."""
    if node.op in _MATRIX_PRODUCTS:
        return _rows(array, weight_shape[1] if node.attr("transB", 0) else weight_shape[0], wanted, random)
    return _patches(node, weight_shape, array, node.attr("group", 1), wanted, random)


def _sampled(
    node: Node, weight_shape: tuple[int, ...], arrays: Iterable[Array], count: int, seed: int
) -> Iterator[tuple[npt.NDArray[np.float32], Array]]:
    """[groups, rows, K] of each sample, shifted near the mean of the first, and that shift [groups, 1, K].

    Large means would cancel otherwise, and leave noise of either sign where there is no variance.
    """
    wanted = rows_wanted(node, weight_shape, count)
    random = np.random.default_rng(seed)
    shift: Array | None = None
    for array in arrays:
        part = rows_of(node, weight_shape, array, wanted, random)
        shift = part.mean(axis=1, dtype=np.float64, keepdims=True).astype(np.float32) if shift is None else shift
        yield part - shift, shift


def _rows(array: Array, width: int, wanted: int, random: np.random.Generator) -> Array:
    flat = array.reshape(-1, width)
    if flat.shape[0] > wanted:
        flat = flat[np.sort(random.choice(flat.shape[0], wanted, replace=False))]
    return flat[None].astype(np.float32)


def _patches(
    node: Node, weight_shape: tuple[int, ...], array: Array, groups: int, wanted: int, random: np.random.Generator
) -> Array:
    """[groups, rows, K] patches of one sample at drawn output positions."""
    kernel = weight_shape[2:]
    rank = len(kernel)
    strides = list(node.attr("strides", [1] * rank))
    dilations = list(node.attr("dilations", [1] * rank))
    begin, end = conv_pads(node, array.shape[2:], kernel, strides, dilations)
    padded = np.pad(array, [(0, 0), (0, 0), *zip(begin, end, strict=True)])
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=tuple(range(2, 2 + rank)))
    whole: tuple[Any, ...] = (slice(None), slice(None))
    windows = windows[whole + tuple(slice(None, None, step) for step in (*strides, *dilations))]
    places = windows.shape[0], *windows.shape[2 : 2 + rank]
    size = int(np.prod(places))
    chosen = np.arange(size) if size <= wanted else np.sort(random.choice(size, wanted, replace=False))
    sample, *position = np.unravel_index(chosen, places)
    where: tuple[Any, ...] = (sample, slice(None), *position)
    picked = windows[where]  # [rows, channels, *kernel]
    rows = picked.reshape(len(chosen), groups, -1, *kernel)
    return np.ascontiguousarray(np.moveaxis(np.moveaxis(rows, 2, -1), 0, 1).reshape(groups, len(chosen), -1), dtype=np.float32)


def conv_pads(
    node: Node, size: tuple[int, ...], kernel: tuple[int, ...], strides: list[int], dilations: list[int]
) -> tuple[list[int], list[int]]:
    """(begin, end) padding of each spatial axis, `auto_pad` resolved (ONNX operator Conv)."""
    rank = len(kernel)
    mode = node.attr("auto_pad", "NOTSET")
    if mode == "VALID":
        return [0] * rank, [0] * rank
    if mode == "NOTSET":
        pads = list(node.attr("pads", [0] * 2 * rank))
        return pads[:rank], pads[rank:]
    begin, end = [], []
    for length, k, stride, dilation in zip(size, kernel, strides, dilations, strict=True):
        total = max((-(-length // stride) - 1) * stride + (k - 1) * dilation + 1 - length, 0)
        small, large = total // 2, total - total // 2
        begin.append(large if mode == "SAME_LOWER" else small)
        end.append(small if mode == "SAME_LOWER" else large)
    return begin, end
