"""Lean i-LayerNorm and RMSNorm: lowered equals reference for any row, nothing wraps, and both are near float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_models import assert_lowered_equals_reference, assert_other_evaluators_agree, element_types, widest_int32
from onnx import TensorProto
from runtime_marks import needs_empty_products
from test_ilayernorm import grudging_rows, made, rows

from qcompile.kernels.lean_norm import ILayerNormLean, IRmsNormLean, _Lean

NORMS = [ILayerNormLean, IRmsNormLean]
OUTPUTS = [("int32", 2.0**-11, 0), ("uint8", 8 / 255, 120), ("int8", 0.06, -3)]
WIDE_OUTPUT = OUTPUTS[0]


def lean(norm: type[_Lean], d: int, output: tuple[str, float, int] = WIDE_OUTPUT, bits: int = 30, **more: Any) -> _Lean:
    kernel = made(norm, d, output, bits, **more)
    assert isinstance(kernel, _Lean)
    return kernel


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("d", [1, 2, 64, 384, 1024, 1700])
@pytest.mark.parametrize("bits", [30, 16, 8])
@pytest.mark.parametrize("output", OUTPUTS, ids=lambda o: str(o[0]))
def test_lowered_equals_reference_near_the_oracle(norm: type[_Lean], d: int, bits: int, output: tuple[str, float, int]) -> None:
    kernel = lean(norm, d, output, bits)
    x = rows(d, bits, 150 if d < 500 else 25)
    assert_lowered_equals_reference(kernel, x)
    error = np.abs(kernel.real(kernel.reference(x)) - kernel.oracle(x)) / kernel.output_scale
    assert error.max() <= kernel.tolerance / kernel.output_scale
    # an int32 step is 2^-11 of a sigma here, 1/80 of the uint8 one
    assert d < 16 or np.sqrt(np.mean(error**2)) <= (0.33 if output[0].endswith("t8") else 8)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("scale", "epsilon"), [(1e-3, 1e-5), (1e-6, 1e-12), (0.1, 1e-5), (1e-5, 0.0), (1e-6, 1e-5), (1e-4, 3.0)])
@pytest.mark.parametrize("output", OUTPUTS, ids=lambda o: str(o[0]))
def test_epsilon_and_scales(norm: type[_Lean], scale: float, epsilon: float, output: tuple[str, float, int]) -> None:
    """Rows in which epsilon is everything, some, or nothing of the variance."""
    for bits in (30, 16):
        kernel = lean(norm, 96, output, bits, scale=scale, epsilon=epsilon)
        x = rows(96, bits)
        assert_lowered_equals_reference(kernel, x)
        assert np.abs(kernel.real(kernel.reference(x)) - kernel.oracle(x)).max() <= kernel.tolerance


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("d", [64, 384, 1024])
@pytest.mark.parametrize("output", OUTPUTS, ids=lambda o: str(o[0]))
def test_rows_made_to_hurt_stay_within_the_tolerance(norm: type[_Lean], d: int, output: tuple[str, float, int]) -> None:
    """And come near enough to it that a kernel that is far off would be seen."""
    kernel = lean(norm, d, output)
    x = np.concatenate([grudging_rows(d), rows(d, 30, 30)])
    error = np.abs(kernel.real(kernel.reference(x)) - kernel.oracle(x)).max()
    assert kernel.tolerance / 40 <= error <= kernel.tolerance


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bits", [30, 20, 16])
@pytest.mark.parametrize("d", [1, 2, 3, 384, 600, 1700])
def test_no_int32_value_wraps(norm: type[_Lean], bits: int, d: int) -> None:
    """All int32 values inside the lowering, computed in int64, with gains at the largest; the room is used."""
    for output in OUTPUTS:
        kernel = lean(norm, d, output, bits)
        least = 1 if output[0] == "int32" else 8
        most = min((2**31 - 2 - kernel.reach) / (2 * np.sqrt(d) * kernel.reach) / least, 2.0**15) * output[1]
        for tried in (kernel, replace(kernel, gamma=(most, *(-most,) * (d - 1)), epsilon=1e-3)):
            widest = widest_int32(tried, rows(d, bits, 3 if d > 600 else 60))
            raised = [v for name, v in widest.items() if "raised" in name]
            assert max(widest.values()) < 2**31 and (d == 1 or max(raised) > 2**30)  # one value is a flat row


@pytest.mark.parametrize("norm", NORMS)
def test_constants_stay_inside_the_bounds_of_the_proof(norm: type[_Lean]) -> None:
    for d in (1, 7, 384, 1700):
        for output in OUTPUTS:
            kernel = lean(norm, d, output, epsilon=1e-2)
            constants, reach = kernel.attributes(), kernel.reach
            assert (2**31 - 1) // kernel.unit == reach
            squares = d * (reach**2 + 1) / 4 if norm is ILayerNormLean else d * reach**2
            assert squares + (constants["epsilon"] // constants["least"]) ** 2 < 2**31
            assert np.abs(kernel.constants()["gamma"].astype(np.int64)).max() * reach < 2**31
            assert kernel.constants()["roots"].min() == 362 and kernel.constants()["roots"].size == 2**31 // 2**18


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("epsilon", [1e-5, 0.0], ids=["epsilon", "none"])
@pytest.mark.parametrize("output", OUTPUTS, ids=lambda o: str(o[0]))
def test_rows_without_variance_give_beta(norm: type[_Lean], epsilon: float, output: tuple[str, float, int]) -> None:
    kernel = lean(norm, 12, output, 30, epsilon=epsilon)
    x = np.zeros((4, 12), np.int32)
    if norm is ILayerNormLean:
        x[1:] = [[32_767], [-(2**29)], [2**29]]
    assert_lowered_equals_reference(kernel, x)
    beta = np.rint(np.asarray(kernel.beta) / kernel.y_scale) + kernel.y_zero_point
    np.testing.assert_array_equal(kernel.reference(x), np.broadcast_to(beta, x.shape))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("output", OUTPUTS, ids=lambda o: str(o[0]))
def test_no_beta_is_zero(norm: type[_Lean], output: tuple[str, float, int]) -> None:
    """And not added at all, in int32."""
    kernel = replace(lean(norm, 20, output), beta=(), y_zero_point=0)
    x = rows(20, 30, 20)
    np.testing.assert_array_equal(kernel.reference(x), replace(kernel, beta=(0.0,) * 20).reference(x))
    assert_lowered_equals_reference(kernel, x)
    assert kernel.name.endswith("Plain") == (output[0] == "int32")
    assert ("beta" in kernel.constants()) == (output[0] != "int32")


@pytest.mark.parametrize("norm", NORMS)
def test_all_zero_gamma_gives_beta(norm: type[_Lean]) -> None:
    kernel = replace(lean(norm, 20), gamma=(0.0,) * 20)
    x = rows(20, 30, 20)
    assert_lowered_equals_reference(kernel, x)
    np.testing.assert_array_equal(kernel.reference(x), np.broadcast_to(kernel.constants()["beta"], x.shape))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "shape",
    [*(pytest.param(s, marks=needs_empty_products) for s in ((0, 12), (3, 0, 12))), (12,), (2, 3, 12), (1, 1, 1, 12)],
    ids=str,
)
def test_any_rank_and_no_rows(norm: type[_Lean], shape: tuple[int, ...]) -> None:
    for output in OUTPUTS:
        kernel = lean(norm, 12, output)
        x = np.random.default_rng(0).integers(-3000, 3000, shape).astype(np.int32)
        assert_lowered_equals_reference(kernel, x)
        assert kernel.reference(x).shape == shape


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("output", OUTPUTS, ids=lambda o: str(o[0]))
def test_other_evaluators_agree(norm: type[_Lean], output: tuple[str, float, int]) -> None:
    """The interpreter stops at any sum that leaves its type."""
    for d in (5, 384):
        assert_other_evaluators_agree(lean(norm, d, output), rows(d, 30, 4))


def test_layer_norm_does_not_see_an_offset() -> None:
    kernel = lean(ILayerNormLean, 48)
    x = np.random.default_rng(0).integers(-50_000, 50_000, (40, 48)).astype(np.int32)
    for offset in (1, -7, 2**29 - 50_000, -(2**29) + 50_000):
        np.testing.assert_array_equal(kernel.reference(x), kernel.reference((x + offset).astype(np.int32)))


@given(st.lists(st.integers(-(2**29), 2**29), min_size=1, max_size=9), st.sampled_from(NORMS), st.sampled_from(OUTPUTS))
def test_any_row_is_near_the_oracle(row: list[int], norm: type[_Lean], output: tuple[str, float, int]) -> None:
    kernel = lean(norm, len(row), output)
    x = np.array([row], np.int32)
    assert np.abs(kernel.real(kernel.reference(x)) - kernel.oracle(x)).max() <= kernel.tolerance


@given(st.integers(2**18, 2**31 - 1))
def test_one_step_from_the_table_is_twice_the_root(v: int) -> None:
    """s of 2 sqrt v: above it by 1/8 of the square of the root's error, below it by the floor."""
    r = int(lean(ILayerNormLean, 3).constants()["roots"][v >> 18])
    of_root = 0.26 / (v >> 18) + 1 / 700  # the middle of an interval, and the rounded entry
    twice = 2 * np.sqrt(v)
    assert twice - 1 <= r + v // r <= twice * (1 + of_root**2 * 0.75)


@pytest.mark.parametrize("norm", NORMS)
def test_integers_alone(norm: type[_Lean]) -> None:
    """No 64-bit value either."""
    kinds = element_types(lean(norm, 600, OUTPUTS[1]), np.zeros((2, 600), np.int32))
    assert kinds <= {TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8}


@pytest.mark.parametrize("norm", NORMS)
def test_one_body_a_name(norm: type[_Lean]) -> None:
    bodies: dict[str, bytes] = {}
    for d in (1, 3, 384, 600, 1700):
        for output in OUTPUTS:
            for bits in (30, 16):
                kernel = lean(norm, d, output, bits)
                body = kernel.lower().SerializeToString(deterministic=True)
                assert bodies.setdefault(kernel.name, body) == body
    assert len(bodies) == 3


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int16"}, "output type 'int16'"),
        ({"input_bits": 31}, "input bits 31 is outside"),
        ({"gamma": (1.0,) * 1900, "beta": ()}, "steps in a row .* is outside"),
        ({"gamma": (-15.9, *(1.0,) * 99), "beta": ()}, "gamma / output scale, times 2 D sqrt d .* is outside"),
        ({"beta": (3e5, 1.0, 1.0)}, "beta / output scale .* is outside"),
        ({"epsilon": 1e5, "scale": 1e-4}, "sqrt.d epsilon. in its steps .* is outside"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_outside_the_domain_is_refused(norm: type[_Lean], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(lean(norm, 3), **change)
