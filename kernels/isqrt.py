"""Exact integer square root: floor(sqrt(n)) by Newton's iteration with a proven number of steps.

Source: Newton's (Heron's) iteration as in Crandall and Pomerance, "Prime Numbers", 2005, algorithm 9.2.11; I-BERT (2021),
algorithm 4, uses it with a loop. A graph has no cheap loop: here the number of steps is fixed, and proven.

    x0 = ceil(2^((k+1)/2)),  k = floor(log2 n)             x <- (x + n div x) div 2, three or four times       x - [n div x < x]

**k** is the number of thresholds 2^1, 2^2, ... that n reaches, and x0 a sum over them: a comparison and a product.

**Proof.** Let s = floor(sqrt n), n >= 1. (1) No step falls below s: (x + n/x)/2 >= sqrt n for every x > 0, and flooring n/x,
then the half, gives floor((x + n/x)/2) >= s. So x >= 1 and nothing is divided by 0. (2) With a = x - sqrt n >= 0 one step gives
at most a^2 / (2x). From x0 / sqrt n <= sqrt 2 + 2^(-k/2) the relative error goes .42, .06, .0018, 1.6e-6, 1.2e-12: below 1/sqrt
n after three steps for n < 2^31, after four for n < 2^63 (for small k, where the ceiling matters, the tests compute it for each
k in fractions). (3) Once x is s or s + 1 it stays so: from s, a step gives at most sqrt n + 1/(2s). (4) x = s + 1 is told by n
div x < x; x = s never fulfils that.

n = 0 runs as n = 1, and the last correction, which reads n itself, turns 1 into 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import numpy as np
from onnx import FunctionProto

from qcompile.kernels._protocol import Array, Float64, Kernel, function

STEPS = {False: 3, True: 4}  # int32, int64
_BITS = {False: 31, True: 63}
_LARGEST_ROOT = 3037000499  # of n < 2^63


def start(k: int) -> int:
    """x0 for 2^k <= n < 2^(k+1): ceil(2^((k+1)/2))."""
    return isqrt((1 << (k + 1)) - 1) + 1


def root_text(value: str, root: str, wide: bool) -> str:
    """The lines that make `root` = floor(sqrt(value)), both int32 or, where `wide`, int64; `value` >= 0."""
    kind = "int64" if wide else "int32"
    thresholds = [1 << k for k in range(1, _BITS[wide])]
    rises = [start(k) - start(k - 1) for k in range(1, _BITS[wide])]
    count = len(rises)
    listed = [f"{kind}[{count}] {{{', '.join(map(str, numbers))}}}" for numbers in (thresholds, rises)]
    lines = f"""
        {root}_none = Constant <value = {kind} {{0}}> ()
        {root}_two = Constant <value = {kind} {{2}}> ()
        {root}_thresholds = Constant <value = {listed[0]}> ()
        {root}_rises = Constant <value = {listed[1]}> ()
        {root}_is_none = Equal ({value}, {root}_none)
        {root}_one = Cast <to = {7 if wide else 6}> ({root}_is_none)
        {root}_n = Add ({value}, {root}_one)
        {root}_last = Constant <value_ints = [-1]> ()
        {root}_column = Unsqueeze ({root}_n, {root}_last)
        {root}_reached = GreaterOrEqual ({root}_column, {root}_thresholds)
        {root}_steps = Cast <to = {7 if wide else 6}> ({root}_reached)
        {root}_risen = MatMul ({root}_steps, {root}_rises)
        {root}_x0 = Add ({root}_risen, {root}_two)
    """
    for step in range(STEPS[wide]):
        lines += f"""
        {root}_q{step} = Div ({root}_n, {root}_x{step})
        {root}_s{step} = Add ({root}_x{step}, {root}_q{step})
        {root}_x{step + 1} = Div ({root}_s{step}, {root}_two)
        """
    found = f"{root}_x{STEPS[wide]}"
    return f"""{lines}
        {root}_check = Div ({value}, {found})
        {root}_is_above = Less ({root}_check, {found})
        {root}_above = Cast <to = {7 if wide else 6}> ({root}_is_above)
        {root} = Sub ({found}, {root}_above)
    """


def integer_root(n: Array) -> Array:
    """floor(sqrt(n)) in int64 of integers 0 <= n < 2^63: float64's root, put right where it is off by one."""
    n = np.asarray(n, np.int64)
    root = np.minimum(np.sqrt(n.astype(np.float64)).astype(np.int64), _LARGEST_ROOT)
    root -= root * root > n
    # (root + 1)^2 <= n, without leaving int64
    return np.asarray(root + (n - root * root >= 2 * root + 1))


@dataclass(frozen=True)
class ISqrt(Kernel):
    """floor(sqrt(n)) of int32, or of int64 where `wide`; any shape but a scalar's."""

    wide: bool = False

    source: ClassVar[str] = "Newton's iteration; I-BERT (2021), algorithm 4"
    domain: ClassVar[str] = "0 <= n < 2^31 in int32, 0 <= n < 2^63 in int64; a negative n has no root"
    TOLERANCE: ClassVar[float] = 1.0  # the floor

    @property
    def name(self) -> str:
        """ISqrt, ISqrtWide."""
        return "ISqrtWide" if self.wide else "ISqrt"

    @property
    def output_scale(self) -> float:
        """1."""
        return 1.0

    def reference(self, *inputs: Array) -> Array:
        """The floor, in the type of the input. Raises ValueError where n is negative."""
        n = inputs[0]
        if n.size and int(n.min()) < 0:
            raise ValueError(f"i-sqrt: {int(n.min())} is negative")
        return integer_root(n).astype(np.int64 if self.wide else np.int32)

    def lower(self) -> FunctionProto:
        """One function for each width."""
        # x0 <= ceil(2^(bits/2)), n div x <= n for n = 1, 2 and at most x0 above: x + n div x <= 2^17 (2^33).
        return function(f"{self.name} (n) => (root) {{ {root_text('n', 'root', self.wide)} }}")

    def oracle(self, *inputs: Array) -> Float64:
        """The square root in float64."""
        return np.sqrt(inputs[0].astype(np.float64))
