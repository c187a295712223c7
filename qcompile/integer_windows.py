"""Convolution, pooling and matrix products of integer tensors in numpy, exact by checked bounds.

Tensors are channels first, [N, C, *spatial], of any spatial rank. Zero points are subtracted by the caller, so that
padding is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qcompile.errors import ModelError

Array: TypeAlias = npt.NDArray[Any]

_FLOAT64_EXACT = 1 << 53
_IM2COL_BYTES = 64 << 20


@dataclass(frozen=True)
class Window:
    """A sliding window over the spatial axes: kernel, strides, dilations, and pads at begin and end of each axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    @staticmethod
    def from_attributes(attributes: dict[str, Any], kernel: Sequence[int], spatial: Sequence[int]) -> Window:
        """Read strides, dilations, pads, auto_pad and ceil_mode as ONNX defines them for Conv and pooling.

        Raises ModelError where the window does not fit the padded input.
        """
        rank = len(kernel)
        strides = tuple(attributes.get("strides") or (1,) * rank)
        dilations = tuple(attributes.get("dilations") or (1,) * rank)
        extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        auto_pad = attributes.get("auto_pad", b"NOTSET").decode() or "NOTSET"
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            totals = [
                max((-(-size // stride) - 1) * stride + extent - size, 0)
                for size, stride, extent in zip(spatial, strides, extents, strict=True)
            ]
            small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
            begins, ends = (small, large) if auto_pad == "SAME_UPPER" else (large, small)
        else:
            pads = list(attributes.get("pads") or (0,) * (2 * rank)) if auto_pad == "NOTSET" else [0] * (2 * rank)
            begins, ends = pads[:rank], pads[rank:]
            if attributes.get("ceil_mode", 0):
                ends = [
                    end + _ceil_extra(size, begin, end, stride, extent)
                    for size, begin, end, stride, extent in zip(spatial, begins, ends, strides, extents, strict=True)
                ]
        if min([*begins, *ends], default=0) < 0:
            raise ModelError(f"negative pads {[*begins, *ends]} are not supported")
        window = Window(tuple(kernel), strides, dilations, tuple(begins), tuple(ends))
        if min(window.output_shape(spatial), default=1) < 1:
            raise ModelError(f"a window of {list(kernel)} does not fit an input of {list(spatial)}")
        return window

    def output_shape(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Spatial shape of the output for an input of spatial shape `spatial`."""
        return tuple(
            (size + begin + end - (k - 1) * d - 1) // stride + 1
            for size, begin, end, k, d, stride in zip(
                spatial, self.begins, self.ends, self.kernel, self.dilations, self.strides, strict=True
            )
        )

    def pad(self, x: Array, value: float, dtype: Any) -> Array:
        """`x` as `dtype`, with `value` around its spatial axes."""
        if not any(self.begins) and not any(self.ends):
            return x.astype(dtype, copy=False)
        inner: tuple[Any, ...] = (
            ...,
            *(slice(b, b + n) for b, n in zip(self.begins, x.shape[2:], strict=True)),
        )
        shape = tuple(b + n + e for b, n, e in zip(self.begins, x.shape[2:], self.ends, strict=True))
        out = np.full((*x.shape[:2], *shape), value, dtype)
        out[inner] = x
        return out

    def taps(self, output_shape: Sequence[int]) -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
        """For each kernel position its index (last axes) and the slices of the padded input that it meets."""
        return [
            (
                (..., *position),
                (
                    ...,
                    *(
                        slice(p * d, p * d + (o - 1) * s + 1, s)
                        for p, d, s, o in zip(position, self.dilations, self.strides, output_shape, strict=True)
                    ),
                ),
            )
            for position in product(*(range(k) for k in self.kernel))
        ]


def _ceil_extra(size: int, begin: int, end: int, stride: int, extent: int) -> int:
    """Padding that ceil_mode adds: the last window may hang over, but must start inside input or begin padding."""
    span = size + begin + end - extent
    count = -(-span // stride) + 1
    if (count - 1) * stride >= size + begin:
        count -= 1
    return max((count - 1) * stride - span, 0)


def exact_matmul(a: Array, b: Array) -> Array:
    """The int64 matrix product of two integer tensors (numpy broadcasting), exact.

    numpy has no fast integer product. A float64 product is exact when every partial sum stays below 2^53, in any order
    and with or without fused multiply-add; max|a| * max|b| * K bounds them all and is checked here. Larger operands go
    through numpy's own int64 product. Raises ModelError where even int64 could overflow.
    """
    bound = _largest(a) * _largest(b) * a.shape[-1]
    if bound < _FLOAT64_EXACT:
        return np.asarray(np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.int64))
    if bound >= 1 << 63:
        raise ModelError(f"an integer product could reach {bound}, beyond int64")
    return np.asarray(np.matmul(a.astype(np.int64), b.astype(np.int64)))


def convolve(x: Array, w: Array, window: Window, groups: int = 1) -> Array:
    """Convolution of integers: x [N, C, *S], w [M, C/groups, *K] -> int64 [N, M, *O].

    Raises ModelError where shapes disagree or a sum could pass 2^53.
    """
    n, channels = x.shape[:2]
    outputs, depth = w.shape[:2]
    if depth * groups != channels or outputs % groups:
        raise ModelError(f"weights {list(w.shape)} in {groups} groups do not fit {channels} input channels")
    flat = np.abs(w.astype(np.int64)).reshape(outputs, -1).sum(1)
    bound = _largest(x) * int(flat.max(initial=0))
    if bound >= _FLOAT64_EXACT:
        raise ModelError(f"a convolution's sum could reach {bound}, beyond 2^53")
    shape = window.output_shape(x.shape[2:])
    if depth == 1 and groups > 1:
        return _depthwise(x, w, window, groups, shape, np.int32 if bound < 1 << 31 else np.int64)
    padded = window.pad(x, 0, np.float64)
    kernel = w.reshape(groups, outputs // groups, -1).astype(np.float64)
    # Exact in float64, see exact_matmul: bound above is that of every partial sum.
    if prod(window.kernel) == 1 and set(window.strides) == {1}:
        product_ = np.matmul(kernel, padded.reshape(n, groups, depth, -1))
        return np.asarray(product_.astype(np.int64).reshape(n, outputs, *shape))
    out = np.empty((n, outputs, *shape), np.int64)
    extents = tuple((k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True))
    axes = tuple(range(2, x.ndim))
    # [N, C, *positions, *extents], thinned to every stride-th position and every dilation-th tap
    views = np.lib.stride_tricks.sliding_window_view(padded, extents, axis=axes)
    thin: list[Any] = [slice(None, None, s) for s in (1, 1, *window.strides, *window.dilations)]
    views = views[tuple(thin)]
    rank = len(shape)
    order = (0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank))
    row_bytes = 8 * n * channels * prod(window.kernel) * prod(shape[1:])
    rows = max(1, _IM2COL_BYTES // max(row_bytes, 1))
    for start in range(0, shape[0], rows):  # bounded memory: im2col of a few output rows at a time
        part = views[:, :, start : start + rows]
        columns = part.transpose(order).reshape(n, groups, depth * prod(window.kernel), -1)
        result = np.matmul(kernel, columns)
        out[:, :, start : start + rows] = result.reshape(n, outputs, -1, *shape[1:])
    return out


def _depthwise(x: Array, w: Array, window: Window, groups: int, shape: tuple[int, ...], dtype: Any) -> Array:
    """One input channel a group: a sum over kernel positions, in `dtype`, whose range the caller has checked."""
    padded = window.pad(x, 0, dtype)[:, :, None]
    kernel = w.reshape(groups, w.shape[0] // groups, *window.kernel).astype(dtype)
    out = np.zeros((x.shape[0], groups, kernel.shape[1], *shape), dtype)
    for position, where in window.taps(shape):
        tap = kernel[position].reshape(groups, -1, *(1,) * len(shape))
        out += padded[where] * tap
    return np.asarray(out.reshape(x.shape[0], w.shape[0], *shape).astype(np.int64))


def max_pool(x: Array, window: Window) -> Array:
    """Maximum over windows; padding is the least value of the type, so that it never wins."""
    least: float = -np.inf if np.issubdtype(x.dtype, np.floating) else int(np.iinfo(x.dtype).min)
    padded = window.pad(x, least, x.dtype)
    shape = window.output_shape(x.shape[2:])
    out = np.full((*x.shape[:2], *shape), least, x.dtype)
    for _, where in window.taps(shape):
        np.maximum(out, padded[where], out=out)
    return out


def _largest(x: Array) -> int:
    return max(abs(int(x.min())), abs(int(x.max()))) if x.size else 0
