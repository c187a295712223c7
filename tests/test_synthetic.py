"""qcompile.synthetic: shapes, statistics, determinism and refusals of made-up data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompile.data import InputInfo
from qcompile.errors import DataError
from qcompile.synthetic import image_axes, synthetic_dataset


def info(shape: tuple[int | str | None, ...] | None, dtype: Any = np.float32, name: str = "x") -> InputInfo:
    return InputInfo(name, shape, np.dtype(dtype))


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        (("N", 3, 224, 192), (1, 3, 224, 192)),
        (("N", 3, "H", "W"), (1, 3, 64, 64)),
        ((None, None, None, None), (1, 3, 64, 64)),
        ((None, 49, 10, 1), (1, 49, 10, 1)),
        (("N", "H", "W", 3), (1, 64, 64, 3)),
        ((4, 1, 8, 8), (4, 1, 8, 8)),
        (("N", 3, 1, 1), (1, 3, 1, 1)),
        (("N", 3, 1, 40), (1, 3, 1, 40)),
        (("N", 16, "H", 5), (1, 16, 8, 5)),
        (("N", "L", 7), (1, 8, 7)),
        (("N", 640), (1, 640)),
        ((), ()),
    ],
    ids=str,
)
def test_shapes(shape: Any, want: tuple[int, ...]) -> None:
    data = synthetic_dataset([info(shape)], 3, 0)
    assert data.count == 3
    assert not data.has_labels
    for sample in data:
        assert sample.feeds["x"].shape == want
        assert sample.feeds["x"].dtype == np.float32


def test_one_symbolic_name_has_one_size() -> None:
    inputs = [info(("N", 3, "s", "s")), info(("N", "s"), name="y")]
    (sample,) = synthetic_dataset(inputs, 1, 0)
    assert sample.feeds["y"].shape == (1, 64)


@pytest.mark.parametrize("shape", [(2, 3, 64, 48), (2, 64, 48, 3)], ids=["nchw", "nhwc"])
def test_images_are_smooth_and_of_unit_deviation(shape: tuple[int, ...]) -> None:
    for sample in synthetic_dataset([info(shape)], 3, 7):
        x = sample.feeds["x"].astype(np.float64)
        x = x if shape[1] == 3 else x.transpose(0, 3, 1, 2)
        np.testing.assert_allclose(x.mean(axis=(1, 2, 3)), 0, atol=1e-6)
        np.testing.assert_allclose(x.std(axis=(1, 2, 3)), 1, rtol=1e-6)
        for a, b in ((x[..., 1:], x[..., :-1]), (x[..., 1:, :], x[..., :-1, :]), (x[:, 1:], x[:, :-1])):
            assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.5  # neighbours in space, and channels


def test_the_spectrum_falls_as_one_over_frequency() -> None:
    maps = np.concatenate([s.feeds["x"][0] for s in synthetic_dataset([info((1, 1, 64, 64))], 40, 3)])
    power = (np.abs(np.fft.fft2(maps.astype(np.float64))) ** 2).mean(axis=0)
    k = np.arange(1, 32)
    slope = np.polyfit(np.log(k), np.log(power[0, 1:32]), 1)[0]
    assert slope == pytest.approx(-2, abs=0.15)  # power is amplitude squared


def test_other_floats_are_standard_normal() -> None:
    values = np.concatenate([s.feeds["x"].ravel() for s in synthetic_dataset([info(("N", 50, 40))], 20, 1)])
    assert abs(values.mean()) < 4 / np.sqrt(values.size)
    assert values.std() == pytest.approx(1, abs=0.02)
    assert np.isfinite(values).all()


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.bool_, np.float32])
def test_masks_are_ones(dtype: Any) -> None:
    (sample,) = synthetic_dataset([info(("N", "L"), dtype, "Attention_Mask")], 1, 0)
    assert sample.feeds["Attention_Mask"].dtype == dtype
    np.testing.assert_array_equal(sample.feeds["Attention_Mask"], np.ones((1, 8)))


def test_the_seed_fixes_all_and_a_subset_is_the_same() -> None:
    inputs = [info(("N", 3, 8, 8)), info(("N", 5), np.float64, "y")]
    whole = list(synthetic_dataset(inputs, 6, 1))
    again = list(synthetic_dataset(inputs, 6, 1))
    for a, b in zip(whole, again, strict=True):
        assert all(np.array_equal(a.feeds[n], b.feeds[n]) for n in a.feeds)
    firsts = {float(s.feeds["x"][0, 0, 0, 0]) for s in whole}
    assert len(firsts) == 6
    assert {float(s.feeds["x"][0, 0, 0, 0]) for s in synthetic_dataset(inputs, 6, 1).sample(3)} < firsts
    (other, *_) = synthetic_dataset(inputs, 6, 2)
    assert not np.array_equal(other.feeds["x"], whole[0].feeds["x"])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([info(("N", "L"), np.int64, "input_ids")], r"'input_ids' \(int64\): token inputs need --data"),
        ([info((1, 3, 8, 8), np.uint8)], "token inputs need --data"),
        ([info((1,), np.object_)], "need --data"),
        ([info(None)], "has no shape.*give --data"),
    ],
    ids=["tokens", "uint8", "strings", "no shape"],
)
def test_refused(inputs: list[InputInfo], message: str) -> None:
    with pytest.raises(DataError, match=message):
        synthetic_dataset(inputs, 2, 0)


def test_no_samples_are_refused() -> None:
    with pytest.raises(DataError, match="ask for at least 1"):
        synthetic_dataset([info((1,))], 0, 0)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((1, 3, 4, 4), (1, 2, 3)),
        ((1, 4, 4, 3), (1, 2, 3)),
        ((1, 9, 9, 3), (3, 1, 2)),
        ((1, 9, 9, 9), None),
        ((1, 3), None),
    ],
)
def test_image_axes(shape: Any, axes: Any) -> None:
    assert image_axes(shape) == axes
