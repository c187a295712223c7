"""Data movement: each function takes the tensor to move and the node's other inputs, and returns what it moves to.

They act on any element type. On a quantised tensor they act on its integers, and the scale stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from qcompile.dyadic import Array
from qcompile.integer_windows import Window, max_pool
from qcompile.interpret_nodes import Step

Others: TypeAlias = Sequence[Array | None]
Movement: TypeAlias = Callable[[Step, Array, Others], list[Array]]


def _other(others: Others, index: int) -> Array | None:
    return others[index] if index < len(others) else None


def _integers(step: Step, others: Others, index: int, attribute: str) -> list[int] | None:
    """A list of integers that older opsets keep in an attribute and newer ones in an input."""
    value = _other(others, index)
    if value is not None:
        return [int(v) for v in np.ravel(value)]
    stored = step.attributes.get(attribute)
    return None if stored is None else [int(v) for v in stored]


def _identity(step: Step, x: Array, others: Others) -> list[Array]:
    return [x]


def _reshape(step: Step, x: Array, others: Others) -> list[Array]:
    target = _integers(step, others, 0, "shape")
    if target is None:
        raise step.error("the target shape is missing")
    if not step.attributes.get("allowzero", 0):
        target = [x.shape[i] if d == 0 else d for i, d in enumerate(target)]
    try:
        return [x.reshape(target)]
    except ValueError as error:
        raise step.error(f"{list(x.shape)} cannot be reshaped to {target}") from error


def _flatten(step: Step, x: Array, others: Others) -> list[Array]:
    axis = step.attributes.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return [x.reshape(int(np.prod(x.shape[:axis], dtype=np.int64)), -1)]


def _transpose(step: Step, x: Array, others: Others) -> list[Array]:
    return [np.transpose(x, step.attributes.get("perm"))]


def _squeeze(step: Step, x: Array, others: Others) -> list[Array]:
    axes = _integers(step, others, 0, "axes")
    return [np.squeeze(x, None if axes is None else tuple(axes))]


def _unsqueeze(step: Step, x: Array, others: Others) -> list[Array]:
    return [np.expand_dims(x, tuple(_integers(step, others, 0, "axes") or ()))]


def _slice(step: Step, x: Array, others: Others) -> list[Array]:
    starts = _integers(step, others, 0, "starts") or []
    ends = _integers(step, others, 1, "ends") or []
    axes = _integers(step, others, 2, "axes") or list(range(len(starts)))
    strides = _integers(step, others, 3, "steps") or [1] * len(starts)
    where = [slice(None)] * x.ndim
    for axis, start, end, stride in zip(axes, starts, ends, strides, strict=True):
        size = x.shape[axis]
        if stride < 0 and end < -size:  # "beyond the first element", which Python spells None
            where[axis] = slice(start, None, stride)
        else:
            where[axis] = slice(start, end, stride)
    return [x[tuple(where)]]


def _split(step: Step, x: Array, others: Others) -> list[Array]:
    axis, count = step.attributes.get("axis", 0), len(step.outputs)
    sizes = _integers(step, others, 0, "split")
    if sizes is None:
        chunk = -(-x.shape[axis] // count)
        sizes = [min(chunk, x.shape[axis] - i * chunk) for i in range(count)]
    return list(np.split(x, np.cumsum(sizes)[:-1], axis))


def _gather(step: Step, x: Array, others: Others) -> list[Array]:
    axis = step.attributes.get("axis", 0)
    return [np.take(x, _indices(step, x.shape[axis], _other(others, 0)), axis)]


def _gather_elements(step: Step, x: Array, others: Others) -> list[Array]:
    axis = step.attributes.get("axis", 0)
    index = _indices(step, x.shape[axis], _other(others, 0))
    # Axes other than `axis` may be longer in x than in the indices.
    where = tuple(slice(None) if i == axis % x.ndim else slice(n) for i, n in enumerate(index.shape))
    return [np.take_along_axis(x[where], index, axis)]


def _indices(step: Step, size: int, indices: Array | None) -> Array:
    if indices is None:
        raise step.error("the indices are missing")
    if indices.size and (int(indices.min()) < -size or int(indices.max()) >= size):
        raise step.error(f"an index lies outside [-{size}, {size})")
    return indices


def _expand(step: Step, x: Array, others: Others) -> list[Array]:
    target = _integers(step, others, 0, "shape") or []
    return [np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(target)))]


def _tile(step: Step, x: Array, others: Others) -> list[Array]:
    return [np.tile(x, _integers(step, others, 0, "repeats") or [1] * x.ndim)]


def _depth_to_space(step: Step, x: Array, others: Others) -> list[Array]:
    n, c, h, w = x.shape
    size = step.attributes["blocksize"]
    if step.attributes.get("mode", b"DCR") == b"CRD":
        parts = x.reshape(n, c // size**2, size, size, h, w).transpose(0, 1, 4, 2, 5, 3)
    else:
        parts = x.reshape(n, size, size, c // size**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    return [parts.reshape(n, c // size**2, h * size, w * size)]


def _space_to_depth(step: Step, x: Array, others: Others) -> list[Array]:
    n, c, h, w = x.shape
    size = step.attributes["blocksize"]
    parts = x.reshape(n, c, h // size, size, w // size, size).transpose(0, 3, 5, 1, 2, 4)
    return [parts.reshape(n, c * size**2, h // size, w // size)]


def _max_pool(step: Step, x: Array, others: Others) -> list[Array]:
    if len(step.outputs) > 1 and step.outputs[1]:
        raise step.error("the Indices output is not supported")
    return [max_pool(x, Window.from_attributes(step.attributes, step.attributes["kernel_shape"], x.shape[2:]))]


def _resize(step: Step, x: Array, others: Others) -> list[Array]:
    """Nearest only: Upsample(X, scales), Resize-10(X, scales), Resize-11(X, roi, scales, sizes)."""
    mode = step.attributes.get("mode", b"nearest")
    if mode != b"nearest" or step.attributes.get("axes") is not None:
        raise step.error(f"only nearest resizing over all axes moves integers, this is {mode.decode()}")
    old = step.op == "Upsample" or step.opset < 11
    scales, sizes = _other(others, 0 if old else 1), None if old else _other(others, 2)
    if sizes is not None and sizes.size:
        target = [int(v) for v in sizes]
        factors = [np.float32(t) / np.float32(s) for t, s in zip(target, x.shape, strict=True)]
    elif (given := scales if scales is not None else step.attributes.get("scales")) is not None:
        factors = [np.float32(v) for v in np.ravel(given)]
        target = [int(np.floor(np.float32(s) * f)) for s, f in zip(x.shape, factors, strict=True)]
    else:
        raise step.error("neither scales nor sizes are given")
    coordinates = b"asymmetric" if old else step.attributes.get("coordinate_transformation_mode", b"half_pixel")
    rounding = b"floor" if old else step.attributes.get("nearest_mode", b"round_prefer_floor")
    for axis, (size, length, factor) in enumerate(zip(x.shape, target, factors, strict=True)):
        if size != length or factor != 1:
            x = np.take(x, _nearest(step, size, length, factor, coordinates, rounding), axis)
    return [x]


def _nearest(step: Step, size: int, length: int, factor: np.float32, coordinates: bytes, rounding: bytes) -> Array:
    """Source index of each of `length` output positions (Resize, table of coordinate transformations)."""
    i = np.arange(length, dtype=np.float32)
    half = np.float32(0.5)
    if coordinates == b"half_pixel":
        at = (i + half) / factor - half
    elif coordinates == b"pytorch_half_pixel":
        at = (i + half) / factor - half if length > 1 else np.zeros_like(i)
    elif coordinates == b"asymmetric":
        at = i / factor
    elif coordinates == b"align_corners":
        at = i * np.float32(size - 1) / np.float32(length - 1) if length > 1 else np.zeros_like(i)
    else:
        raise step.error(f"coordinate transformation {coordinates.decode()} is not supported")
    rounders: dict[bytes, Callable[[Array], Array]] = {
        b"floor": np.floor,
        b"ceil": np.ceil,
        b"round_prefer_floor": lambda v: np.ceil(v - half),
        b"round_prefer_ceil": lambda v: np.floor(v + half),
    }
    if rounding not in rounders:
        raise step.error(f"nearest mode {rounding.decode()} is not supported")
    return np.asarray(np.clip(rounders[rounding](at).astype(np.int64), 0, size - 1))


def pad(step: Step, x: Array, others: Others, value: Any) -> Array:
    """Pad with `value` (mode constant), or by reflection or edge; negative pads crop."""
    pads = _integers(step, others, 0, "pads") or []
    axes = _integers(step, others, 2, "axes") or list(range(len(pads) // 2))
    widths = [(0, 0)] * x.ndim
    crops = [slice(None)] * x.ndim
    for i, axis in enumerate(axes):
        begin, end = pads[i], pads[i + len(axes)]
        widths[axis] = (max(begin, 0), max(end, 0))
        crops[axis] = slice(max(-begin, 0), x.shape[axis] - max(-end, 0))
    x = x[tuple(crops)]
    mode = step.attributes.get("mode", b"constant").decode()
    if mode == "constant":
        return np.asarray(np.pad(x, widths, constant_values=value))
    if mode == "reflect":
        return np.asarray(np.pad(x, widths, "reflect"))
    if mode == "edge":
        return np.asarray(np.pad(x, widths, "edge"))
    raise step.error(f"pad mode {mode} is not supported")


MOVEMENTS: dict[str, Movement] = {
    "DepthToSpace": _depth_to_space,
    "Dropout": _identity,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Identity": _identity,
    "MaxPool": _max_pool,
    "Reshape": _reshape,
    "Resize": _resize,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Upsample": _resize,
}
