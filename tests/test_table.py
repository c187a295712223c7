"""Tables: the functions against scipy and onnxruntime, rounding against fractions, signed inputs, and what is refused."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.kernels import Table
from qcompile.kernels._functions import FUNCTIONS, named
from qcompile.runtime import Session

X = np.linspace(-9, 9, 4001)
powers = st.integers(-6, 3).map(lambda e: 2.0**e)
POSITIVE = {"Log", "Sqrt"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_those_of_onnxruntime(name: str) -> None:
    """In float32, with onnx's own defaults of the attributes."""
    x = np.abs(X) + 0.01 if name in POSITIVE | {"Reciprocal"} else X
    node = {"GeluTanh": 'Gelu <approximate = "tanh">', "HardSwish": "HardSwish"}.get(name, name)
    body = f"y = {node} (x)" if name != "Silu" else "s = Sigmoid (x) y = Mul (x, s)"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> g (float[n] x) => (float[n] y) {{ {body} }}')
    got = Session(model, threads=1).run({"x": x.astype(np.float32)})["y"]
    np.testing.assert_allclose(FUNCTIONS[name](x.astype(np.float32).astype(np.float64)), got, rtol=2e-5, atol=2e-6)


def test_functions_in_float64_against_scipy() -> None:
    np.testing.assert_allclose(named("Erf")(X), scipy.special.erf(X), rtol=1e-14, atol=1e-16)
    np.testing.assert_allclose(named("Sigmoid")(X), scipy.special.expit(X), rtol=1e-12)
    np.testing.assert_allclose(named("Gelu")(X), X * scipy.special.ndtr(X), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(named("Silu")(X), X * scipy.special.expit(X), rtol=1e-12, atol=1e-16)
    for name in ("Sigmoid", "Silu", "Softplus", "Mish"):
        assert np.isfinite(named(name)(np.array([-1e6, -800.0, 800.0, 1e6]))).all()


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - POSITIVE))
@pytest.mark.parametrize("signed", [False, True], ids=["uint8", "int8"])
def test_every_function_is_within_half_a_step(name: str, signed: bool) -> None:
    kinds: dict[str, Any] = {"input_type": np.int8, "output_type": np.int8} if signed else {}
    zero = 0 if signed else 128
    table = Table(named(name), 0.047, zero, 0.021, zero + 3, **kinds)
    x = np.arange(256, dtype=np.uint8).view(table.input_type)
    with np.errstate(divide="ignore"):
        exact = FUNCTIONS[name]((x.astype(np.float64) - zero) * 0.047) / 0.021 + zero + 3
    low, high = (-128, 127) if signed else (0, 255)
    assert np.abs(table.reference(x) - np.clip(exact, low, high)).max() <= 0.5 + 1e-9


@settings(max_examples=300, deadline=None)
@given(powers, powers, st.integers(0, 255), st.integers(-128, 127), st.integers(1, 15))
def test_rounding_against_fractions(sx: float, sy: float, zx: int, zy: int, eighths: int) -> None:
    """LeakyRelu and HardSigmoid of dyadic numbers: exact in float64, full of ties; round() of a Fraction takes the even one."""
    alpha = Fraction(eighths, 8)
    tables = [
        Table(named("LeakyRelu", alpha=eighths / 8), sx, zx, sy, zy, output_type=np.int8),
        Table(named("HardSigmoid", alpha=eighths / 8, beta=0.25), sx, zx, sy, zy, output_type=np.int16),
    ]
    for q in range(256):
        x = (q - zx) * Fraction(sx)
        leaky = x if x >= 0 else alpha * x
        hard = min(max(alpha * x + Fraction(1, 4), Fraction(0)), Fraction(1))
        assert tables[0].entries[q] == min(max(round(leaky / Fraction(sy)) + zy, -128), 127)
        assert tables[1].entries[q] == round(hard / Fraction(sy)) + zy


def test_signed_inputs_are_found_by_their_sign() -> None:
    table = Table(named("Neg"), 1.0, 0, 1.0, 0, input_type=np.int8, output_type=np.int16)
    x = np.array([-128, -1, 0, 1, 127], np.int8)
    assert table.reference(x).tolist() == [128, 1, 0, -1, -127]
    assert table.entries[128] == 128 and table.entries[255] == 1


def test_infinite_values_saturate() -> None:
    table = Table(named("Exp"), 10.0, 0, 1.0, 0)
    assert table.entries[-1] == 255 and table.entries[0] == 1
    assert Table(named("Reciprocal"), 1.0, 0, 0.01, 0).entries[:3].tolist() == [255, 100, 50]


GOOD: dict[str, Any] = {"f": named("Tanh"), "input_scale": 0.1, "input_zero_point": 0, "scale": 0.1, "zero_point": 0}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"input_scale": 0.0}, r"table: input scale 0 is outside"),
        ({"scale": float("nan")}, r"table: output scale nan is outside"),
        ({"scale": -1.0}, r"table: output scale -1 is outside"),
        ({"input_zero_point": 256}, r"table: input zero point 256 is outside 0\.\.255: it must be a uint8"),
        ({"zero_point": -1}, r"table: output zero point -1 is outside 0\.\.255"),
        ({"input_type": np.int16}, r"table: int16 to uint8: 8 bits in; 8, 16 or 32 out"),
        ({"output_type": np.float32}, r"table: uint8 to float32: 8 bits in"),
        (
            {"f": named("Log"), "input_zero_point": 3},
            r"table: the function is NaN at -0\.3, which the input's range holds",
        ),
    ],
    ids=["zero scale", "nan", "negative", "input zero point", "output zero point", "16 bits", "float", "log of negatives"],
)
def test_bad_tables_are_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Table(**{**GOOD, **changed})


def test_unknown_functions_are_refused() -> None:
    with pytest.raises(ValueError, match="table: no function is called Gamma; there are Abs, Cos"):
        named("Gamma")
