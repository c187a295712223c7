"""i-LayerNorm and RMSNorm: lowered equals reference for any row, and both are near float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import grudging_rows
from kernel_cases import norm_rows as rows
from kernel_models import assert_lowered_equals_reference, assert_other_evaluators_agree, element_types, widest_int32
from onnx import TensorProto
from runtime_marks import needs_empty_products

from qcompile.kernels.ilayernorm import ILayerNorm, IRmsNorm, _Norm

NORMS = [ILayerNorm, IRmsNorm]
OUTPUTS = [
    ("uint8", 8 / 255, 120),
    ("int8", 0.06, -3),
    ("int16", 2.0**-12, 0),
    ("uint16", 2.0**-12, 30_000),
    ("int32", 2.0**-11, 0),
]
EDGES = [(1e-3, 1e-5), (1e-6, 1e-12), (0.1, 1e-5), (1e-5, 0.0)]


def made(norm: type[_Norm], d: int, output: tuple[str, float, int] = OUTPUTS[0], bits: int = 32, **more: Any) -> _Norm:
    """Channels with gammas of both signs, one of them 0, and betas."""
    rng = np.random.default_rng(d)
    gamma = rng.normal(1, 0.5, d)
    gamma[: min(2, d)] = (-1.5, 0.0)[: min(2, d)]
    dtype, step, zero = output
    values = {"scale": 1e-3, "epsilon": 1e-5, "input_bits": bits, **more}
    return norm(gamma=tuple(gamma), beta=tuple(rng.normal(0, 0.5, d)), y_scale=step, y_zero_point=zero, dtype=dtype, **values)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("d", [1, 2, 64, 384, 512, 2000])
@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("output", OUTPUTS, ids=lambda o: str(o[0]))
def test_lowered_equals_reference_near_the_oracle(norm: type[_Norm], d: int, bits: int, output: tuple[str, float, int]) -> None:
    kernel = made(norm, d, output, bits)
    x = rows(d, bits, 150 if d < 500 else 25)
    assert_lowered_equals_reference(kernel, x)
    error = np.abs(kernel.real(kernel.reference(x)) - kernel.oracle(x)) / kernel.output_scale
    assert error.max() <= kernel.tolerance / kernel.output_scale
    # what a row costs as a rule: rounding, and a step or so where an output step is a 10^4th of the range
    assert d < 16 or np.sqrt(np.mean(error**2)) <= (0.295 if output[0].endswith("t8") else 1.2)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("scale", "epsilon"), EDGES, ids=lambda v: f"{v:g}")
@pytest.mark.parametrize("output", [OUTPUTS[0], OUTPUTS[2]], ids=lambda o: str(o[0]))
def test_epsilon_and_scales(norm: type[_Norm], scale: float, epsilon: float, output: tuple[str, float, int]) -> None:
    """Rows in which epsilon is everything, some, or nothing of the variance."""
    for bits in (32, 16):
        kernel = made(norm, 96, output, bits, scale=scale, epsilon=epsilon)
        x = rows(96, bits)
        assert_lowered_equals_reference(kernel, x)
        assert np.abs(kernel.real(kernel.reference(x)) - kernel.oracle(x)).max() <= kernel.tolerance


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("epsilon", [1e3, 1e7, 1e10], ids=lambda v: f"{v:g}")
def test_epsilon_beyond_the_variance(norm: type[_Norm], epsilon: float) -> None:
    """sigma is clamped where gamma e / sigma is below a quarter of a step."""
    kernel = made(norm, 96, OUTPUTS[2], scale=1e-4, epsilon=epsilon)
    x = rows(96, 32)
    assert_lowered_equals_reference(kernel, x)
    assert np.abs(kernel.real(kernel.reference(x)) - kernel.oracle(x)).max() <= kernel.tolerance


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("d", [64, 384, 1024])
@pytest.mark.parametrize("output", [OUTPUTS[0], OUTPUTS[2]], ids=lambda o: str(o[0]))
def test_rows_made_to_hurt_stay_within_the_tolerance(norm: type[_Norm], d: int, output: tuple[str, float, int]) -> None:
    """And come near enough to it that a kernel that is far off would be seen."""
    kernel = made(norm, d, output)
    x = np.concatenate([grudging_rows(d), rows(d, 32, 30)])
    error = np.abs(kernel.real(kernel.reference(x)) - kernel.oracle(x)).max()
    assert kernel.tolerance / 40 <= error <= kernel.tolerance


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("output", [OUTPUTS[0], OUTPUTS[2]], ids=lambda o: str(o[0]))
def test_the_whole_int32_range_at_length_16384(norm: type[_Norm], output: tuple[str, float, int]) -> None:
    kernel = made(norm, 2**14, output)
    x = rows(2**14, 32, 3)
    assert_lowered_equals_reference(kernel, x)
    assert np.abs(kernel.real(kernel.reference(x)) - kernel.oracle(x)).max() <= kernel.tolerance


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("output", [OUTPUTS[0], OUTPUTS[2]], ids=lambda o: str(o[0]))
def test_other_evaluators_agree(norm: type[_Norm], bits: int, output: tuple[str, float, int]) -> None:
    """The interpreter stops at any sum that leaves its type."""
    for d in (5, 384):
        assert_other_evaluators_agree(made(norm, d, output, bits), rows(d, bits, 4))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bits", [32, 16])
def test_constants_stay_inside_the_bounds_of_the_proof(norm: type[_Norm], bits: int) -> None:
    """The bounds that stand beside the lowering, with the constants at their largest."""
    for d in (1, 7, 384, 2**14):
        for output in OUTPUTS:
            kernel = made(norm, d, output, bits)
            constants, r = kernel.attributes(), kernel.reach
            bound = (2**31 - 1) // 10
            assert np.abs(kernel.constants()["gamma"].astype(np.int64)).max() * r <= bound
            assert 2 * bound + 2 * 4 * bound < 2**31
            assert r * kernel.unit > 2**29 - 1 and constants["offset"] + 2**30 < 2**31
            assert constants["longer"] * d * r * r <= 2**52
            assert constants["epsilon"] * constants["cap"] <= 2**55
            assert 2**22 <= constants["ratio"] <= 2**23 and constants["ratio_unit"] >= 2**5
            assert kernel.constants()["fraction"].min() >= 0 and kernel.constants()["fraction"].max() <= 32


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bits", [32, 20, 16])
@pytest.mark.parametrize("d", [1, 2, 3, 384, 600, 2**14])
def test_no_int32_value_wraps(norm: type[_Norm], bits: int, d: int) -> None:
    """All int32 values inside the lowering, computed in int64; the largest is above 2^29: the room is used."""
    for output in (OUTPUTS[0], OUTPUTS[2]):
        widest = widest_int32(made(norm, d, output, bits), rows(d, bits, 3 if d > 2000 else 60))
        largest = max(widest, key=widest.__getitem__)
        assert 2**29 < widest[largest] < 2**31, largest


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("epsilon", [1e-5, 0.0], ids=["epsilon", "none"])
def test_rows_without_variance_give_beta(norm: type[_Norm], epsilon: float) -> None:
    for bits in (32, 16):
        kernel = made(norm, 12, OUTPUTS[0], bits, epsilon=epsilon)
        x = np.zeros((3, 12), np.int32)
        if norm is ILayerNorm:
            x[1:] = [[32_767], [-32_768]]
        assert_lowered_equals_reference(kernel, x)
        beta = np.rint(np.asarray(kernel.beta) / kernel.y_scale) + kernel.y_zero_point
        np.testing.assert_array_equal(kernel.reference(x), np.broadcast_to(beta, x.shape))


@pytest.mark.parametrize("norm", NORMS)
def test_all_zero_gamma_gives_beta(norm: type[_Norm]) -> None:
    kernel = replace(made(norm, 20), gamma=(0.0,) * 20)
    x = rows(20, 32, 20)
    assert_lowered_equals_reference(kernel, x)
    assert np.abs(kernel.real(kernel.reference(x)) - kernel.oracle(x)).max() <= 0.5001 * kernel.y_scale + kernel.y_scale / 64


@pytest.mark.parametrize("norm", NORMS)
def test_no_beta_is_zero(norm: type[_Norm]) -> None:
    kernel = replace(made(norm, 20), beta=())
    x = rows(20, 32, 20)
    np.testing.assert_array_equal(kernel.reference(x), replace(kernel, beta=(0.0,) * 20).reference(x))
    assert_lowered_equals_reference(kernel, x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "shape",
    [*(pytest.param(s, marks=needs_empty_products) for s in ((0, 12), (3, 0, 12))), (12,), (2, 3, 12), (1, 1, 1, 12)],
    ids=str,
)
def test_any_rank_and_no_rows(norm: type[_Norm], shape: tuple[int, ...]) -> None:
    for bits in (32, 16):
        kernel = made(norm, 12, OUTPUTS[2], bits)
        x = np.random.default_rng(0).integers(-3000, 3000, shape).astype(np.int32)
        assert_lowered_equals_reference(kernel, x)
        assert kernel.reference(x).shape == shape


def test_layer_norm_does_not_see_an_offset() -> None:
    kernel = made(ILayerNorm, 48, OUTPUTS[2])
    x = np.random.default_rng(0).integers(-50_000, 50_000, (40, 48)).astype(np.int32)
    for offset in (1, -7, 2**30, -(2**31) + 50_000):
        np.testing.assert_array_equal(kernel.reference(x), kernel.reference((x.astype(np.int64) + offset).astype(np.int32)))


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=9), st.sampled_from(NORMS), st.sampled_from(OUTPUTS))
def test_any_row_is_near_the_oracle(row: list[int], norm: type[_Norm], output: tuple[str, float, int]) -> None:
    kernel = made(norm, len(row), output)
    x = np.array([row], np.int32)
    assert np.abs(kernel.real(kernel.reference(x)) - kernel.oracle(x)).max() <= kernel.tolerance


@pytest.mark.parametrize("norm", NORMS)
def test_integers_alone(norm: type[_Norm]) -> None:
    for bits in (32, 16):
        kinds = element_types(made(norm, 600, OUTPUTS[0], bits), np.zeros((2, 600), np.int32))
        assert kinds <= {TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8, TensorProto.BOOL}


def test_no_int64_operator_that_is_wrong_in_onnxruntime() -> None:
    """Min, Max, Clip and Sign of the body read int32 alone."""
    for norm in NORMS:
        for node in made(norm, 600).lower().node:
            if node.op_type in ("Min", "Max", "Clip", "Sign"):
                assert not any(word in name for name in node.input for word in ("long", "any", "wide", "root"))


@pytest.mark.parametrize("norm", NORMS)
def test_one_body_a_name(norm: type[_Norm]) -> None:
    bodies: dict[str, bytes] = {}
    for d in (1, 3, 384, 600, 2000):
        for output in OUTPUTS:
            for bits in (32, 16):
                kernel = made(norm, d, output, bits)
                body = kernel.lower().SerializeToString(deterministic=True)
                assert bodies.setdefault(kernel.name, body) == body
    assert len(bodies) == 4


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": ()}, "row length 0 is outside"),
        ({"gamma": (1.0,) * (2**14 + 1), "beta": ()}, "row length 16385 is outside"),
        ({"beta": (1.0,)}, "1 values of beta for 3 of gamma"),
        ({"dtype": "float32"}, "output type 'float32'"),
        ({"scale": 0.0}, "input scale 0: it must be positive"),
        ({"scale": float("nan")}, "input scale nan"),
        ({"y_scale": -1.0}, "output scale -1"),
        ({"input_bits": 33}, "input bits 33 is outside"),
        ({"y_zero_point": 300}, "output zero point 300 is outside"),
        ({"gamma": (1.0, float("inf"), 1.0)}, "gamma / output scale inf is outside"),
        ({"gamma": (1.0, 1.0, -1e9)}, r"gamma / output scale -.* is outside"),
        ({"beta": (1e9, 1.0, 1.0)}, r"beta / output scale .* is outside"),
        ({"epsilon": -1e-5}, "epsilon -1e-05"),
        ({"scale": 1e-15}, "sqrt.epsilon. / input scale, in steps .* is outside"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_outside_the_domain_is_refused(norm: type[_Norm], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(made(norm, 3), **change)


@pytest.mark.parametrize("norm", NORMS)
def test_reference_refuses_what_it_was_not_made_for(norm: type[_Norm]) -> None:
    with pytest.raises(ValueError, match="rows of 4 values, made for 3"):
        made(norm, 3).reference(np.zeros((2, 4), np.int32))
    with pytest.raises(ValueError, match="made for 8 bits"):
        made(norm, 3, bits=8).reference(np.full((2, 3), 200, np.int32))
