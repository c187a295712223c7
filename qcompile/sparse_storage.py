"""2:4 weights as they are stored: the two that stay of every four, and where they stood, in 2 bits each.

    dense     a 0 b 0 | 0 0 c d
    values    a b | c d
    indices   0 2 | 2 3   ->   codes 0 + 4*2 = 8 and 2 + 4*3 = 14   ->   one byte, 8 + 16*14

int8 takes .625 of its dense bytes, 4 bits take 3 bits a weight, float32 takes .531.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompile.sparsity import Array, Pattern, follows

TWO_OF_FOUR = Pattern(2, 4)


@dataclass(frozen=True)
class Compressed:
    """`values` [blocks, 2] in the order of their places; `indices` [blocks / 2] uint8: two blocks a byte, the first one low."""

    values: Array
    indices: npt.NDArray[np.uint8]


def compress(weight: Array) -> Compressed | None:
    """`weight` [..., K] in C order; None where it is not 2:4 along K or the number of its blocks is odd."""
    if not weight.size or not follows(weight, TWO_OF_FOUR) or weight.size % 8:
        return None
    blocks = weight.reshape(-1, 4)
    places = places_of(blocks)
    values = np.take_along_axis(blocks, places, axis=1)
    codes = (places[:, 0] + 4 * places[:, 1]).astype(np.uint8)
    return Compressed(values, (codes[0::2] | (codes[1::2] << 4)).astype(np.uint8))


def places_of(blocks: Array) -> npt.NDArray[np.int64]:
    """Two places, rising, for each of `blocks` [n, 4]: those of what is not zero, then free ones."""
    return np.sort(np.argsort(blocks == 0, axis=1, kind="stable")[:, :2], axis=1).astype(np.int64)


def decompress(stored: Compressed, shape: tuple[int, ...]) -> Array:
    """The inverse of `compress`: [..., K] of `shape`."""
    codes = np.stack([stored.indices & 15, stored.indices >> 4], axis=1).reshape(-1, 1)
    places = np.concatenate([codes & 3, codes >> 2], axis=1).astype(np.int64)
    blocks = np.zeros((len(codes), 4), stored.values.dtype)
    np.put_along_axis(blocks, places, stored.values, axis=1)
    return blocks.reshape(shape)
