"""Integers of b bits as b planes of single bits, so that any width takes exactly b bits a value in a file."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcompile.runtime import Array


def bit_planes(values: Array, bits: int) -> npt.NDArray[np.uint8]:
    """uint8 [bits, ceil(n / 8)]: plane p holds bit p of each of the n `values` in two's complement, the first in the lowest bit.

    Raises ValueError where a value does not fit in `bits` bits (2 to 8).
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    flat = values.reshape(-1).astype(np.int16)
    if flat.size and not (low <= int(flat.min()) and int(flat.max()) <= high):
        raise ValueError(f"a value lies outside {low}..{high}")
    patterns = (flat & (2**bits - 1)).astype(np.uint8)
    planes = patterns[None, :] >> np.arange(bits, dtype=np.uint8)[:, None] & 1
    return np.packbits(planes, axis=1, bitorder="little")


def place_values(bits: int) -> npt.NDArray[np.int64]:
    """What a bit of each plane counts: 1, 2, 4 ... and the top one negative."""
    places = 2 ** np.arange(bits, dtype=np.int64)
    places[-1] = -places[-1]
    return places


def from_bit_planes(planes: Array, shape: tuple[int, ...]) -> npt.NDArray[np.int8]:
    """The inverse of `bit_planes`: int8 of `shape`."""
    bits = np.unpackbits(planes, axis=1, bitorder="little").astype(np.int64)
    sums = place_values(len(planes)) @ bits
    return sums[: int(np.prod(shape))].astype(np.int8).reshape(shape)
