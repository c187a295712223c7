"""Datasets in .npz files and in directories of them: streaming, sample axes, labels, refusals."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import X, info, labels_of, rows, save

from qcompile.data import InputInfo, load_dataset
from qcompile.errors import DataError

# --- .npz -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True], ids=["stored", "deflated"])
def test_npz_gives_batches_of_one_with_labels(tmp_path: Path, compress: bool) -> None:
    x, path = rows(5, 3), tmp_path / "a.npz"
    (np.savez_compressed if compress else np.savez)(path, x=x, labels=np.arange(5) * 10, calib_other=np.zeros(2))
    data = load_dataset(str(path), [X])
    assert data.count == 5
    assert data.has_labels
    for _ in range(2):  # every iteration starts again
        got = list(data)
        assert [s.label for s in got] == [0, 10, 20, 30, 40]
        assert all(type(s.label) is int for s in got)
        for i, s in enumerate(got):
            assert s.feeds["x"].dtype == np.float32
            np.testing.assert_array_equal(s.feeds["x"], x[i : i + 1])


def test_npz_without_labels(tmp_path: Path) -> None:
    data = load_dataset(save(tmp_path / "a.npz", x=rows(2, 3)), [X])
    assert not data.has_labels
    assert labels_of(data) == [None, None]


def test_npz_two_iterations_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    data = load_dataset(save(tmp_path / "a.npz", x=rows(3, 3)), [X])
    for a, b in zip(data, data, strict=True):
        np.testing.assert_array_equal(a.feeds["x"], b.feeds["x"])


@pytest.mark.parametrize("samples", [None, 5], ids=["all", "some"])
def test_npz_larger_than_the_memory_is_streamed(tmp_path: Path, samples: int | None) -> None:
    path = save(tmp_path / "a.npz", x=np.ones((4000, 1000), np.float32))  # 16 MB
    data = load_dataset(path, [info(("N", 1000))], samples=samples)
    tracemalloc.start()
    try:
        assert sum(float(s.feeds["x"].sum()) for s in data) == 1000 * (samples or 4000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_npz_samples_are_writable_and_independent(tmp_path: Path) -> None:
    data = load_dataset(save(tmp_path / "a.npz", x=rows(2, 3)), [X])
    first, second = list(data)
    first.feeds["x"][:] = 99
    np.testing.assert_array_equal(second.feeds["x"], rows(2, 3)[1:])


@pytest.mark.parametrize(
    ("array", "shape", "want"),
    [
        (rows(4, 3), ("N", 3), lambda a, i: a[i : i + 1]),
        (rows(4, 3), (1, 3), lambda a, i: a[i : i + 1]),
        (rows(4, 3), (3,), lambda a, i: a[i]),
        (rows(4, 1, 3), ("N", 3), lambda a, i: a[i]),
        (rows(4, 2, 3), (2, 3), lambda a, i: a[i]),
        (rows(4), (), lambda a, i: a[i]),
        (rows(4, 3), None, lambda a, i: a[i : i + 1]),
        (np.asfortranarray(rows(4, 3)), ("N", 3), lambda a, i: a[i : i + 1]),
        (rows(4, 3).astype(">f4"), ("N", 3), lambda a, i: a[i : i + 1]),
        (rows(8, 3)[::2], ("N", 3), lambda a, i: a[i : i + 1]),
    ],
    ids=[
        "batch axis",
        "batch fixed to 1",
        "no batch axis",
        "whole feeds",
        "whole batches",
        "scalar input",
        "rank unknown",
        "fortran order",
        "big endian",
        "strided",
    ],
)
def test_npz_sample_axis(tmp_path: Path, array: Any, shape: Any, want: Any) -> None:
    got = [s.feeds["x"] for s in load_dataset(save(tmp_path / "a.npz", x=array), [info(shape)])]
    assert len(got) == 4
    for i, value in enumerate(got):
        np.testing.assert_array_equal(value, want(array, i))
        assert value.shape == want(array, i).shape
        assert value.dtype == np.float32


def test_npz_fixed_batch_groups_samples_and_drops_the_rest(tmp_path: Path) -> None:
    x = rows(7, 2)
    data = load_dataset(save(tmp_path / "a.npz", x=x, labels=np.arange(7)), [info((3, 2))])
    assert data.count == 2
    got = list(data)
    for i, s in enumerate(got):
        np.testing.assert_array_equal(s.feeds["x"], x[3 * i : 3 * i + 3])
        np.testing.assert_array_equal(s.label, np.arange(3 * i, 3 * i + 3))


def test_npz_inputs_in_the_models_order_with_and_without_batch_axis(tmp_path: Path) -> None:
    inputs = [info(("N", 2), name="a"), info((2,), name="b")]
    (first, *_) = load_dataset(save(tmp_path / "a.npz", b=rows(3, 2), a=rows(3, 2)), inputs)
    assert [(n, v.shape) for n, v in first.feeds.items()] == [("a", (1, 2)), ("b", (2,))]


def test_npz_input_named_as_a_special_key_is_an_input(tmp_path: Path) -> None:
    inputs = [info(("N", 2), name="labels"), info(("N", 2), name="calib_x")]
    data = load_dataset(save(tmp_path / "a.npz", labels=rows(3, 2), calib_x=rows(3, 2)), inputs)
    assert not data.has_labels
    assert len(list(data)) == 3


def test_npz_labels_that_are_no_classes_stay_arrays(tmp_path: Path) -> None:
    boxes = np.arange(8, dtype=np.float32).reshape(2, 4)
    data = load_dataset(save(tmp_path / "a.npz", x=rows(2, 3), labels=boxes), [X])
    np.testing.assert_array_equal(np.stack(labels_of(data)), boxes)


@pytest.mark.parametrize(
    ("arrays", "inputs", "message"),
    [
        ({"y": rows(2, 3)}, [info(("N", 3), name="yy")], r"'y' is no input .*did you mean 'yy'\?"),
        ({"x": rows(2, 3), "extra": rows(2)}, [X], "'extra' is no input of the model"),
        ({"x": rows(2, 3)}, [X, info((1,), name="z")], "input 'z' of the model is missing"),
        ({"x": rows(2, 3), "labels": np.arange(3)}, [X], "'x' has 2 samples and 'labels' has 3"),
        ({"x": rows(2, 3), "z": rows(4, 1)}, [X, info((1, 1), name="z")], "'x' has 2 samples and 'z' has 4"),
        ({"x": rows(2, 3), "labels": np.int64(3)}, [X], "'labels' is a single number"),
        ({"x": np.zeros((0, 3), np.float32)}, [X], "holds no sample"),
        ({"x": rows(2, 3, 4, 5)}, [X], r"'x' has shape \(2, 3, 4, 5\); the model's input has 2 dimensions"),
        (
            {"x": rows(2, 3)},
            [info((4, 3))],
            "2 samples do not fill one batch; the model's batch is fixed to 4",
        ),
        (
            {"x": rows(8, 3), "z": rows(8, 1)},
            [info((4, 3)), info((1, 1), name="z")],
            "differ in their batch .* cannot be grouped",
        ),
        ({"x": rows(8, 3), "z": rows(8)}, [info((4, 3)), info((), name="z")], "cannot be grouped"),
        ({"x": np.array([[None, 1, 2]], object)}, [X], "holds Python objects"),
    ],
    ids=[
        "unknown key",
        "extra key",
        "missing key",
        "label count",
        "sample count",
        "scalar labels",
        "empty",
        "rank",
        "incomplete batch",
        "two batch sizes",
        "batch and none",
        "pickled objects",
    ],
)
def test_npz_refused_on_loading(tmp_path: Path, arrays: dict[str, Any], inputs: list[InputInfo], message: str) -> None:
    path = save(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(path, inputs)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04broken"], ids=["empty", "text", "broken"])
def test_npz_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz: cannot be read as \.npz"):
        load_dataset(str(path), [X])


def test_npz_with_a_foreign_member(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=rows(2, 3))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(DataError, match=r"no \.npy array"):
        load_dataset(str(path), [X])


@pytest.mark.parametrize("keep", [0, 4], ids=["header only", "half a sample"])
def test_npz_with_a_member_that_ends_too_early(tmp_path: Path, keep: int) -> None:
    np.save(tmp_path / "x.npy", rows(1, 3))
    whole = (tmp_path / "x.npy").read_bytes()
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", whole[: len(whole) - 12 + keep])
    data = load_dataset(str(path), [X])
    with pytest.raises(DataError, match="ends too early"):
        list(data)


def test_npz_of_a_newer_npy_version_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(1, 3))
    content = bytearray((tmp_path / "x.npy").read_bytes())
    content[6] = 3
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", bytes(content))
    with pytest.raises(DataError, match=r"version \(3, 0\) is not read"):
        load_dataset(str(tmp_path / "a.npz"), [X])


def test_npz_of_npy_version_two(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("x.npy", "w") as stream:
        np.lib.format.write_array(stream, rows(2, 3), version=(2, 0))
    np.testing.assert_array_equal(np.concatenate([s.feeds["x"] for s in load_dataset(str(tmp_path / "a.npz"), [X])]), rows(2, 3))


# --- directories of .npz ----------------------------------------------------------------------------------------------


def test_directory_of_npz_in_the_order_of_names(tmp_path: Path) -> None:
    save(tmp_path / "b.npz", x=rows(3, 3) + 100, labels=np.arange(3))
    save(tmp_path / "a.npz", x=rows(2, 3), labels=np.arange(2))
    data = load_dataset(str(tmp_path), [X])
    assert data.count == 5
    assert labels_of(data) == [0, 1, 0, 1, 2]
    stacked = np.concatenate([s.feeds["x"] for s in data])
    np.testing.assert_array_equal(stacked, np.concatenate([rows(2, 3), rows(3, 3) + 100]))


def test_directory_of_npz_with_some_labels_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", x=rows(2, 3), labels=np.arange(2))
    save(tmp_path / "b.npz", x=rows(2, 3))
    with pytest.raises(DataError, match=r"b\.npz: sample 0: some samples have a label and some have none"):
        list(load_dataset(str(tmp_path), [X]))


def test_directory_without_data(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"the directory holds no data; give a \.npz file"):
        load_dataset(str(tmp_path), [X])


def test_directory_of_two_kinds(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", x=rows(2, 3))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds \.npz files and images"):
        load_dataset(str(tmp_path), [X])
