"""Tables with ranges a channel: rounding against fractions, the table of each kind, and what is refused."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.kernels import ChannelTable, Table
from qcompile.kernels._functions import named

powers = st.integers(-6, 3).map(lambda e: 2.0**e)
kinds = st.lists(st.tuples(powers, st.integers(-8, 8).map(float), powers), min_size=1, max_size=4)
LEAKY = named("LeakyRelu", alpha=0.25)


@settings(max_examples=200, deadline=None)
@given(kinds, powers, powers, st.integers(0, 255), st.integers(-128, 127), st.data())
def test_rounding_against_fractions(
    numbers: list[tuple[float, float, float]], sx: float, sy: float, zx: int, zy: int, data: st.DataObject
) -> None:
    """LeakyRelu of dyadic numbers: exact in float64, full of ties; round() of a Fraction takes the even one."""
    kind = tuple(data.draw(st.lists(st.integers(0, len(numbers) - 1), min_size=1, max_size=5)))
    kernel = ChannelTable(LEAKY, sx, zx, sy, zy, tuple(numbers), kind, output_type=np.int8)
    x = np.repeat(np.arange(256, dtype=np.uint8), len(kind)).reshape(256, len(kind))
    got = kernel.reference(x)
    for channel, index in enumerate(kind):
        a, m, c = (Fraction(number) for number in numbers[index])
        for q in data.draw(st.lists(st.integers(0, 255), min_size=4, max_size=4)):
            real = Fraction(sx) * (q - zx) * a + m
            real = c * (real if real >= 0 else real / 4)
            assert int(got[q, channel]) == min(127, max(-128, round(real / Fraction(sy)) + zy))


@pytest.mark.parametrize("signed", [False, True], ids=["uint8", "int8"])
def test_one_kind_is_the_plain_table(signed: bool) -> None:
    types: dict[str, Any] = {"input_type": np.int8, "output_type": np.int8} if signed else {}
    zero = -7 if signed else 120
    x = np.arange(256, dtype=np.uint8).view(np.int8 if signed else np.uint8)[:, None]
    got = ChannelTable(named("Gelu"), 0.04, zero, 0.02, zero, ((1.0, 0.0, 1.0),), (0,), **types).reference(x)
    np.testing.assert_array_equal(got, Table(named("Gelu"), 0.04, zero, 0.02, zero, **types).reference(x))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kinds": ()}, "kinds of channels 0 is outside 1..4096"),
        ({"kinds": ((1.0, float(k), 1.0) for k in range(4097))}, "kinds of channels 4097 is outside"),
        ({"axis": 1}, "axis 1: count it from the end"),
        ({"kind": ()}, "of a kind that there is not"),
        ({"kind": (0, 1)}, "of a kind that there is not"),
        ({"kind": (-1,)}, "of a kind that there is not"),
        ({"kinds": ((1.0, float("nan"), 1.0),)}, "not finite"),
        ({"input_scale": 0.0}, "input scale 0 is outside"),
        ({"input_zero_point": 256}, "input zero point 256 is outside"),
        ({"f": named("Log")}, "the function is NaN"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_refusals(changed: dict[str, Any], message: str) -> None:
    given = {"f": named("Gelu"), "input_scale": 1.0, "input_zero_point": 128, "scale": 1.0, "zero_point": 0}
    given |= {"kinds": ((1.0, 0.0, 1.0),), "kind": (0,)} | changed
    given["kinds"] = tuple(given["kinds"])
    with pytest.raises(ValueError, match=message):
        ChannelTable(**given)
