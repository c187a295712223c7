"""qcompile.data: .npz files and directories, ONNX test data, sampling, labels and the checks of every sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from data_helpers import F32, X, info, labels_of, rows, save
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.data import InputInfo, load_dataset, model_inputs
from qcompile.errors import DataError, ModelError
from qcompile.samples import as_label, conform

I64 = np.dtype(np.int64)


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
