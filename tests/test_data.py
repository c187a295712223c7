"""qcompile.data: .npz files and directories, ONNX test data, sampling, labels and the checks of every sample."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.data import Dataset, InputInfo, load_dataset, model_inputs
from qcompile.errors import DataError, ModelError
from qcompile.samples import as_label, conform

F32 = np.dtype(np.float32)
I64 = np.dtype(np.int64)
X = InputInfo("x", ("N", 3), F32)


def info(shape: tuple[int | str | None, ...] | None, dtype: Any = np.float32, name: str = "x") -> InputInfo:
    return InputInfo(name, shape, np.dtype(dtype))


def save(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def rows(count: int, *inner: int) -> Any:
    return np.arange(count * int(np.prod(inner)), dtype=np.float32).reshape(count, *inner)


def labels_of(data: Dataset) -> list[Any]:
    return [s.label for s in data]


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


# --- sampling ---------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    count=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_a_sample_is_an_ordered_subset_that_the_seed_fixes(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], count: int, seed: int
) -> None:
    folder, start = tmp_path_factory.mktemp("npz"), 0
    for place, size in enumerate(sizes):
        values = np.arange(start, start + size, dtype=np.float32)[:, None].repeat(3, 1)
        save(folder / f"{place}.npz", x=values, labels=np.arange(start, start + size))
        start += size
    data = load_dataset(str(folder), [X], samples=count, seed=seed)
    got = labels_of(data)
    assert got == sorted(set(got))
    assert len(got) == data.count == min(count, start)
    assert [int(s.feeds["x"][0, 0]) for s in data] == got
    assert labels_of(load_dataset(str(folder), [X], samples=count, seed=seed)) == got
    assert set(labels_of(data.sample(2, seed))) <= set(got)


def test_seeds_draw_different_samples_and_no_count_means_all(tmp_path: Path) -> None:
    data = load_dataset(save(tmp_path / "a.npz", x=rows(100, 3), labels=np.arange(100)), [X])
    draws = {tuple(labels_of(data.sample(10, seed))) for seed in range(5)}
    assert len(draws) == 5
    assert data.sample(None) is data
    assert data.sample(100) is data


@pytest.mark.parametrize("count", [0, -1])
def test_asking_for_no_sample_is_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(DataError, match="ask for at least 1"):
        load_dataset(save(tmp_path / "a.npz", x=rows(2, 3)), [X], samples=count)


# --- what the specification names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "no such file or directory"),
        ("missing.npz", "no such file or directory; give a .npz file"),
        ("missing_dir/", "no such file or directory"),
        ("missing.py:f", r"no such file missing\.py"),
        ("some/dir:f", "'some/dir' is no module name"),
        ("a:1", "no such file or directory"),
    ],
)
def test_missing_sources(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(spec, [X])


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.csv", "not a kind of file"), ("a.py", r"a\.py:FUNCTION"), ("a.npy", "not a kind of file")],
)
def test_files_of_another_kind(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=message):
        load_dataset(str(tmp_path / name), [X])


def test_preprocess_is_for_images_only(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'imagenet' is for image directories"):
        load_dataset(save(tmp_path / "a.npz", x=rows(2, 3)), [X], preprocess="imagenet")


def test_a_model_without_inputs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no input to feed"):
        load_dataset(save(tmp_path / "a.npz", x=rows(2, 3)), [])


# --- ONNX test data ---------------------------------------------------------------------------------------------------


def write_set(folder: Path, *arrays: Any) -> None:
    folder.mkdir(parents=True)
    for k, array in enumerate(arrays):
        (folder / f"input_{k}.pb").write_bytes(onnx.numpy_helper.from_array(array).SerializeToString())
    (folder / "output_0.pb").write_bytes(b"")


TWO = [info((2, 3), name="a"), info((), np.int64, name="b")]


def test_onnx_test_data_sets_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for k in (10, 0, 2):
        write_set(tmp_path / f"test_data_set_{k}", rows(2, 3) + k, np.array(k))
    save(tmp_path / "test_data_0.npz", inputs=rows(1), outputs=rows(1))  # the model zoo's: the sets go first
    data = load_dataset(str(tmp_path), TWO)
    assert data.count == 3
    assert [int(s.feeds["b"]) for s in data] == [0, 2, 10]
    np.testing.assert_array_equal(list(data)[1].feeds["a"], rows(2, 3) + 2)
    assert not data.has_labels
    assert len(list(data.sample(2, 1))) == 2


def test_one_onnx_test_data_set(tmp_path: Path) -> None:
    write_set(tmp_path / "test_data_set_0", rows(2, 3), np.array(7))
    (sample,) = load_dataset(str(tmp_path / "test_data_set_0"), TWO)
    assert int(sample.feeds["b"]) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "input_1.pb").unlink(), r"input_1\.pb is missing; the model has 2 inputs"),
        (lambda d: (d / "input_2.pb").write_bytes(b""), r"input_2\.pb is one too many"),
    ],
    ids=["missing", "one too many"],
)
def test_onnx_test_data_of_another_number_of_inputs(tmp_path: Path, change: Any, message: str) -> None:
    write_set(tmp_path / "test_data_set_0", rows(2, 3), np.array(7))
    change(tmp_path / "test_data_set_0")
    with pytest.raises(DataError, match=message):
        load_dataset(str(tmp_path), TWO)


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff", b"garbage"], ids=["empty", "broken", "text"])
def test_onnx_test_data_that_are_no_tensors(tmp_path: Path, content: bytes) -> None:
    write_set(tmp_path / "test_data_set_0", rows(2, 3), np.array(7))
    (tmp_path / "test_data_set_0" / "input_1.pb").write_bytes(content)
    with pytest.raises(DataError, match=r"input_1\.pb: cannot be read as an ONNX TensorProto"):
        list(load_dataset(str(tmp_path), TWO))


# --- the checks of a sample -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.array([0.5, 1e-3]), np.float32),
        (np.array([0.5, 1e-3], np.float32), np.float64),
        (np.array([0, 255], np.uint8), np.float32),
        (np.array([0, 255], np.uint8), np.float16),
        (np.array([-5, 5], np.int32), np.int64),
        (np.array([5, 6], np.int64), np.int32),
        (np.array([0, 255], np.int64), np.uint8),
        (np.array([2**24, -(2**24)], np.int64), np.float32),
        (np.array([0, 1], np.int64), np.bool_),
        (np.array([True, False]), np.float32),
        (np.array([True, False]), np.int64),
        (np.array(["a", "b"]), np.object_),
        ([1, 2], np.int64),
    ],
    ids=lambda v: str(getattr(v, "dtype", getattr(v, "__name__", v))),
)
def test_conversions_that_keep_the_values(value: Any, dtype: Any) -> None:
    got = conform({"x": value}, [info((2,), dtype)], "here")["x"]
    assert got.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(got, np.asarray(value).astype(dtype))


@pytest.mark.parametrize("name", ["bfloat16", "float8e4m3fn"])
def test_floats_that_numpy_does_not_have(name: str) -> None:
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, name.upper())))
    got = conform({"x": np.array([0.5, 1.0])}, [info((2,), dtype)], "here")["x"]
    assert got.dtype == dtype
    with pytest.raises(DataError, match="NaN"):
        conform({"x": np.array([0.5, np.nan])}, [info((2,), dtype)], "here")


@pytest.mark.parametrize(
    ("value", "want", "message"),
    [
        (rows(2, 3), info((2,)), r"has shape \(2, 3\), the model wants \(2\): wrong rank"),
        (rows(3), info(("N", 3)), r"the model wants \(N, 3\): wrong rank; add the batch axis"),
        (rows(1, 4), info((None, 3)), r"the model wants \(\?, 3\): wrong axis 1"),
        (rows(1, 8, 8, 3), info(("N", 3, 8, 8)), "wrong axis 1; transpose it, NCHW and NHWC look swapped"),
        (rows(0, 3), info(("N", 3)), "it is empty"),
        (np.array([1.0]), info((1,), np.int64), "has dtype float64, the model wants int64; convert the data"),
        (np.array([1.0]), info((1,), np.bool_), "has dtype float64, the model wants bool"),
        (np.array([1], np.int64), info((1,), np.object_), "has dtype int64, the model wants object"),
        (np.array([1j]), info((1,)), "has dtype complex128"),
        (np.array(["a"]), info((1,)), "has dtype <U1, the model wants float32"),
        (np.array([256]), info((1,), np.uint8), r"values 256\.\.256 do not fit uint8 exactly"),
        (np.array([-1]), info((1,), np.uint8), "do not fit uint8 exactly"),
        (np.array([2]), info((1,), np.bool_), r"do not fit bool exactly \(0\.\.1\)"),
        (np.array([2**24 + 1]), info((1,)), "do not fit float32 exactly"),
        (np.array([2**64 - 1], np.uint64), info((1,), np.int64), "do not fit int64 exactly"),
        (np.array([1, np.nan], np.float32), info((2,)), "1 of 2 values are NaN or infinite"),
        (np.array([np.inf, np.nan], np.float64), info((2,)), "2 of 2 values are NaN or infinite"),
        (np.array([1e300]), info((1,)), r"values up to 1e\+300 do not fit float32"),
        ([[1, 2], [3]], info((2, 2)), "a list cannot be made an array"),
    ],
)
def test_samples_that_do_not_fit(value: Any, want: InputInfo, message: str) -> None:
    with pytest.raises(DataError, match=f"^d: sample 3: input 'x': .*{message}") as caught:
        conform({"x": value}, [want], "d: sample 3")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "shape"), [(rows(1, 0), ("N", "L")), (rows(0, 3), (0, 3)), (rows(5), None), (np.float32(1), ())]
)
def test_shapes_that_are_unusual_and_right(value: Any, shape: Any) -> None:
    assert conform({"x": value}, [info(shape)], "here")["x"].shape == value.shape


def test_symbolic_sizes_may_differ_between_inputs() -> None:
    inputs = [info(("N",), name="a"), info(("N",), name="b")]
    assert set(conform({"a": rows(2), "b": rows(3)}, inputs, "here")) == {"a", "b"}


def test_a_bad_sample_is_named_by_file_and_index(tmp_path: Path) -> None:
    x = rows(4, 3)
    x[2, 1] = np.nan
    data = load_dataset(save(tmp_path / "a.npz", x=x), [X])
    with pytest.raises(DataError, match=r"a\.npz: sample 2: input 'x': 1 of 3 values"):
        list(data)


@given(st.integers(-(2**63), 2**63 - 1), st.sampled_from([np.uint8, np.int8, np.int32, np.float16, np.float32]))
def test_integers_are_converted_exactly_or_refused(value: int, dtype: Any) -> None:
    try:
        got = conform({"x": np.array([value], np.int64)}, [info((1,), dtype)], "here")["x"]
    except DataError:
        if np.dtype(dtype).kind in "iu":
            assert not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max
        else:
            assert abs(value) > 2 ** (11 if dtype is np.float16 else 24)
    else:
        assert int(got[0]) == value


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (3, 3),
        (np.int64(3), 3),
        (np.uint8(3), 3),
        (np.array(3), 3),
        (np.array([3]), 3),
        ([3], 3),
        (None, None),
    ],
    ids=["int", "int64", "uint8", "0-d", "1-d", "list", "none"],
)
def test_labels_of_one_class(value: object, want: int | None) -> None:
    got = as_label(value, "here")
    assert got == want
    assert type(got) is type(want)


@pytest.mark.parametrize("value", [[1, 2], 0.5, np.zeros((2, 2)), [0.5], True, [[3]]])
def test_labels_that_are_arrays(value: object) -> None:
    got = as_label(value, "here")
    assert isinstance(got, np.ndarray)
    np.testing.assert_array_equal(got, np.asarray(value))


@pytest.mark.parametrize("value", ["cat", [], {"a": 1}, [[1], [2, 3]], float("nan")], ids=str)
def test_labels_that_are_refused(value: object) -> None:
    with pytest.raises(DataError, match=r"^here: "):
        as_label(value, "here")


# --- inputs of a model ------------------------------------------------------------------------------------------------


def test_model_inputs_without_those_that_initializers_give() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        agraph (float[N, 3, ?, 4] x, int64[M] ids, float[2] w, bool b, float[] any) => (float[2] y)
        <float[2] w = {1.0, 2.0}> { y = Identity(w) }"""
    )
    model.graph.input[4].type.tensor_type.ClearField("shape")
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = -1
    assert model_inputs(model) == [
        InputInfo("x", ("N", 3, None, None), F32),
        InputInfo("ids", ("M",), I64),
        InputInfo("b", (), np.dtype(bool)),
        InputInfo("any", None, F32),
    ]


def test_model_inputs_that_are_no_tensors() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        agraph (seq(float[N]) xs) => (int64 y) { y = SequenceLength(xs) }"""
    )
    with pytest.raises(ModelError, match="input 'xs' is no typed tensor but sequence"):
        model_inputs(model)
