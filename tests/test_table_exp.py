"""The table of exp: its entries against decimals of forty digits, masks, its size, and what is refused."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_models import masked_keys_do_not_count

from qcompile.kernels import TableExp


@pytest.mark.parametrize("scale", [2.0**-14, 1e-3, 0.05, 0.11, 1.0], ids=str)
def test_entries_against_decimals(scale: float) -> None:
    entries = TableExp(scale).entries
    with localcontext() as context:
        context.prec = 40
        for d in range(0, len(entries), max(1, len(entries) // 500)):
            exact = 255 * (-d * Decimal(scale)).exp()
            assert entries[d] == int(exact.quantize(Decimal(1), ROUND_HALF_EVEN))


def test_the_table_ends_where_one_half_is_reached_and_stays_small() -> None:
    for scale in np.exp(np.linspace(np.log(2.0**-26), 0, 300)):
        kernel = TableExp(float(scale))
        entries = kernel.entries
        assert entries[0] == 255 and entries[-1] == 0 and (np.diff(entries.astype(np.int64)) <= 0).all()
        assert len(entries) <= 2 or entries[-3] >= 1
        assert len(entries) <= 2**18 and kernel.limit < 2**31
        assert kernel.step & (kernel.step - 1) == 0


rows = st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-3000, 3000), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(rows, st.sampled_from([1e-6, 3e-4, 0.05]), st.data())
def test_masked_keys_are_as_if_they_were_not_there(row: list[int], scale: float, data: st.DataObject) -> None:
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row))))
    got = masked_keys_do_not_count(TableExp(scale), TableExp(scale, masked=True), row, keep)
    assert not keep.any() or got.max() == 255


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.0**-27, 1.01, float("inf"), float("nan")], ids=str)
def test_scales_outside_the_domain_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=rf"table of exp: scale of the scores {scale:g} is outside 1\.49012e-08\.\.1: rescale"):
        TableExp(scale)
