"""Bit planes against plain arithmetic, and the function that reads them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompile.bit_planes import bit_planes, from_bit_planes


@given(
    st.integers(2, 8).flatmap(
        lambda b: st.tuples(
            st.just(b),
            hnp.arrays(
                np.int8, hnp.array_shapes(max_dims=4, max_side=7), elements=st.integers(-(2 ** (b - 1)), 2 ** (b - 1) - 1)
            ),
        )
    )
)
def test_planes_hold_every_value_in_exactly_that_many_bits(case: tuple[int, npt.NDArray[np.int8]]) -> None:
    bits, values = case
    planes = bit_planes(values, bits)
    assert planes.shape == (bits, -(-values.size // 8))
    for place, value in enumerate(values.reshape(-1).tolist()):
        digits = [(int(planes[p, place // 8]) >> (place % 8)) & 1 for p in range(bits)]
        assert sum(d << p for p, d in enumerate(digits)) == value % 2**bits
    np.testing.assert_array_equal(from_bit_planes(planes, values.shape), values)


def test_a_value_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"outside -2\.\.1"):
        bit_planes(np.array([2], np.int8), 2)
