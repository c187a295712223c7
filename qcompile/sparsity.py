"""Which weights stay: N of every M along the reduction, or a share of all, by a score for each weight.

A weight is [groups, channels, K] with K in the kernel's order (convolution: kh, kw, channel of the group). Where M divides the
channels of the group, M neighbours along K are M input channels at one (kh, kw): the layout that sparse tensor cores ask for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qcompile.errors import InputError

Array = npt.NDArray[Any]
Mask: TypeAlias = npt.NDArray[np.bool_]

_LARGEST_M = 64


@dataclass(frozen=True)
class Pattern:
    """At most `kept` of every `block` neighbours along the reduction are not zero (N:M; NVIDIA's is 2:4)."""

    kept: int
    block: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.block}"

    @property
    def zeros(self) -> float:
        """The share of weights that become zero."""
        return 1 - self.kept / self.block


@dataclass(frozen=True)
class Share:
    """A share `zeros` of the weights becomes zero, wherever they stand."""

    zeros: float

    def __str__(self) -> str:
        return f"{self.zeros:g}"


Rule: TypeAlias = Pattern | Share


@dataclass(frozen=True)
class SparseRecord:
    """One layer that was made sparse: its node, how many weights it has and how many of them are zero, and the noise that this
    adds to its output on the samples, in dB below the signal (None: not known without samples, or none)."""

    node: str
    op: str
    weights: int
    zeros: int
    sqnr_db: float | None


def parse_sparsity(text: str) -> Rule:
    """`2:4` or `0.5`. Raises InputError for anything that is no N:M with 0 < N < M <= 64, and no share inside (0, 1)."""
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if found is not None:
        kept, block = int(found[1]), int(found[2])
        if not 0 < kept < block <= _LARGEST_M:
            raise InputError(f"--sparsity {text}: N:M keeps N of every M weights, with 0 < N < M <= {_LARGEST_M}; such as 2:4")
        return Pattern(kept, block)
    try:
        share = float(text)
    except ValueError:
        raise InputError(f"--sparsity {text}: give N:M such as 2:4, or the share of zeros such as 0.5") from None
    if not 0 < share < 1:
        raise InputError(f"--sparsity {text}: the share of zeros lies above 0 and below 1, such as 0.5")
    return Share(share)


def keep_mask(scores: Array, rule: Rule, *, by_row: bool = False) -> Mask:
    """True where a weight stays, for `scores` [groups, channels, K] of what its loss would cost; of equals the first stays.

    by_row: a Share is taken from each row of K weights, else from the layer as a whole. Raises ValueError where M does not
    divide K.
    """
    if isinstance(rule, Pattern):
        if scores.shape[-1] % rule.block:
            raise ValueError(f"{rule}: {scores.shape[-1]} weights do not divide into blocks of {rule.block}")
        return _largest(scores.reshape(-1, rule.block), rule.kept).reshape(scores.shape)
    rows = scores.reshape(-1, scores.shape[-1]) if by_row else scores.reshape(1, -1)
    return _largest(rows, rows.shape[1] - round(rule.zeros * rows.shape[1])).reshape(scores.shape)


def _largest(scores: Array, count: int) -> Mask:
    """True at the `count` largest of each row."""
    order = np.argsort(-scores, axis=1, kind="stable")
    mask = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(mask, order[:, :count], True, axis=1)
    return mask


def follows(weight: Array, rule: Rule) -> bool:
    """Whether `weight` [..., K] holds at most N non-zeros in each block of M; a Share: at least so many zeros (to one weight)."""
    if isinstance(rule, Pattern):
        if weight.shape[-1] % rule.block:
            return False
        blocks = weight.reshape(-1, rule.block)
        return bool((np.count_nonzero(blocks, axis=1) <= rule.kept).all())
    return bool(np.count_nonzero(weight == 0) >= int(rule.zeros * weight.size))


def choices(rule: Pattern) -> npt.NDArray[np.int64]:
    """All ways to drop weights from one block, [ways, M - N]."""
    return np.array(list(combinations(range(rule.block), rule.block - rule.kept)), np.int64)
