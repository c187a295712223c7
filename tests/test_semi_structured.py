"""2:4 weights for GPUs: read back by an independent implementation of the layout, and refused where the tiles do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from passes_helpers import floats, parse

from qcompile.cli import cli
from qcompile.command_group import run
from qcompile.errors import InputError
from qcompile.graph import Array
from qcompile.layer_counts import count_layers
from qcompile.semi_structured import export, semi_structured
from qcompile.sparsity import Pattern, keep_mask


def two_of_four(rows: int, width: int, dtype: type[np.int8] | type[np.float32], seed: int = 0) -> Array:
    random = np.random.default_rng(seed)
    dense = random.normal(size=(rows, width)) * 40
    dense = np.rint(dense).clip(-127, 127) if dtype is np.int8 else dense.astype(np.float16)
    dense = dense * keep_mask(random.normal(size=(1, rows, width)), Pattern(2, 4))[0]
    dense[random.random(dense.shape) < 0.2] = 0
    return dense.astype(dtype)


def read_back(values: Array, meta: Array) -> Array:
    """The dense matrix, element by element, by the gather offsets with which a reader finds the metadata."""
    rows, columns = meta.shape
    wide = meta.dtype == np.int32
    step, starts, codes = (4, (0, 1, 32, 33), 8) if wide else (8, (0, 1, 4, 5), 4)
    memory = meta.reshape(-1).tolist()
    dense = np.zeros((rows, values.shape[1] * 2), values.dtype)
    for row in range(rows):
        for column in range(columns):
            at = column % 2 * 2 + column // 2 * 2 * rows + row % 8 * step + starts[row // 8 % 4] + row // 32 * 64
            word = memory[at]
            for k in range(codes):
                block = column * codes + k
                for place in range(2):
                    index = word >> (4 * k + 2 * place) & 3
                    dense[row, 4 * block + index] = values[row, 2 * block + place]
    return dense


@pytest.mark.parametrize("dtype", [np.int8, np.float32], ids=["int8", "float16"])
@pytest.mark.parametrize(("rows", "width"), [(32, 64), (32, 128), (64, 64), (96, 192)])
def test_an_independent_reader_finds_every_weight(rows: int, width: int, dtype: type[np.int8] | type[np.float32]) -> None:
    dense = two_of_four(rows, width, dtype, seed=rows + width)
    made = semi_structured(dense)
    assert made.values.dtype == (np.int8 if dtype is np.int8 else np.float16)
    assert made.values.shape == (rows, width // 2)
    back = read_back(made.values, made.meta)
    assert (back == dense).all()
    first, second = made.codes & 3, made.codes >> 2
    assert (first < second).all()
    plain = np.zeros((rows, width // 4, 4), made.values.dtype)
    np.put_along_axis(plain, np.stack([first, second], axis=2).astype(np.int64), made.values.reshape(rows, -1, 2), 2)
    assert (plain.reshape(rows, width) == dense).all()


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (np.zeros((16, 64), np.int8), "16 x 64 is not made of tiles of 32 x 64"),
        (np.zeros((32, 32), np.int8), "32 x 32 is not made of tiles of 32 x 64"),
        (np.zeros((32, 16), np.float32), "32 x 16 is not made of tiles of 32 x 32"),
        (np.ones((32, 64), np.int8), "not 2:4"),
    ],
)
def test_what_has_no_such_form(weight: Array, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        semi_structured(weight)


def written(path: Path) -> Array:
    import onnx

    dense = two_of_four(64, 9 * 32, np.float32).reshape(64, 3, 3, 32)
    weight = np.ascontiguousarray(np.moveaxis(dense, -1, 1))
    text = "g (float[1, 32, 8, 8] x) => (float[1, 64, 6, 6] y) { a = Conv(x, w)  b = Conv(a, v)  y = Relu(b) }"
    onnx.save(parse(text, w=weight, v=floats(64, 64, 1, 1)), path)
    return dense.reshape(64, -1)


def test_a_file_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = written(tmp_path / "m.onnx")
    assert run(cli, ["inspect", str(tmp_path / "m.onnx"), "--export-2:4", str(tmp_path / "out")]) == 0
    assert "wrote 1 layers" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [e["reason"] for e in manifest["skipped"]] == ["not 2:4 along the input channels"]
    (entry,) = manifest["layers"]
    assert (entry["rows"], entry["columns"], entry["dtype"]) == (64, 288, "float16")
    stored = np.load(tmp_path / "out" / entry["file"])
    assert (read_back(stored["values"], stored["meta"]) == dense.astype(np.float16)).all()
    assert count_layers(tmp_path / "m.onnx")[0].zeros == int((dense == 0).sum())


def test_nothing_to_export_and_nowhere_to_write(tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "dense.onnx"
    onnx.save(parse("g (float[1, 64] x) => (float[1, 64] y) { y = MatMul(x, w) }", w=floats(64, 64)), path)
    with pytest.raises(InputError, match=r"no layer can be exported \(not 2:4 .*--sparsity 2:4"):
        export(path, tmp_path / "out")
    written(tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"cannot be written .*--export-2:4"):
        export(tmp_path / "m.onnx", path)


def test_a_gpu_multiplies_by_it() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    dense = two_of_four(128, 128, np.float32)
    made = semi_structured(dense)
    tensor = torch.sparse.to_sparse_semi_structured(torch.from_numpy(dense).half().cuda())
    right = torch.randn(128, 128, dtype=torch.half, device="cuda")
    wanted = torch.from_numpy(read_back(made.values, made.meta)).half().cuda() @ right
    torch.testing.assert_close(tensor @ right, wanted, rtol=1e-2, atol=1e-1)


def unsigned(path: Path, form: str, zero: int) -> Array:
    """A file whose weight [32, 64] (its own layout: [64, 32]) is uint8 about `zero`; returns what its integers stand for."""
    weight = two_of_four(32, 64, np.int8)
    stored = (weight.astype(np.int64) + zero).clip(0, 255).astype(np.uint8)
    body = {
        "qoperator": "y = QLinearMatMul (x, s, u, w, s, z, s, u)",
        "integer": "y = MatMulInteger (x, w, u, z)",
        "qdq": "d = DequantizeLinear (x, s, u)  v = DequantizeLinear <axis = 1> (w, t, z)  y = MatMul (d, v)",
    }[form]
    kind = {"qoperator": "uint8", "integer": "int32", "qdq": "float"}[form]
    constants = {"s": np.float32(0.1), "u": np.uint8(3), "w": stored.T.copy(), "z": np.full(32, zero, np.uint8)}
    constants["t"] = np.full(32, 0.1, np.float32)
    text = f"g (uint8[2, 64] x) => ({kind}[2, 32] y) {{ {body} }}"
    made = parse(text, **{k: v for k, v in constants.items() if k in "suwz" or form == "qdq"})
    path.write_bytes(made.SerializeToString())
    return stored.astype(np.int64) - zero


@pytest.mark.parametrize("form", ["qoperator", "integer", "qdq"])
@pytest.mark.parametrize("zero", [0, 128])
def test_zeros_of_unsigned_weights_are_zero_points(form: str, zero: int, tmp_path: Path) -> None:
    wanted = unsigned(tmp_path / "m.onnx", form, zero)
    (layer,) = count_layers(tmp_path / "m.onnx")
    np.testing.assert_array_equal(layer.matrix, wanted)
    assert layer.zeros == int((wanted == 0).sum())


def test_unsigned_weights_that_no_int8_holds_are_not_exported(tmp_path: Path) -> None:
    weight = np.zeros((64, 32), np.uint8)
    weight[::4] = 200
    made = parse("g (uint8[2, 64] x) => (int32[2, 32] y) { y = MatMulInteger (x, w) }", w=weight)
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(InputError, match="beyond int8"):
        export(tmp_path / "m.onnx", tmp_path / "out")


def test_a_convolution_of_one_input_channel_is_not_depthwise(tmp_path: Path) -> None:
    text = "g (float[1, 1, 8, 8] x) => (float[1, 8, 8, 8] y) { y = Conv <pads = [1, 1, 1, 1]> (x, w) }"
    (tmp_path / "m.onnx").write_bytes(parse(text, w=floats(8, 1, 3, 3)).SerializeToString())
    (layer,) = count_layers(tmp_path / "m.onnx")
    assert not layer.depthwise


def test_of_reasons_alike_in_number_the_first_is_named(tmp_path: Path) -> None:
    text = "g (float[1, 8] x) => (float[1, 4] y) { a = MatMul (x, w)  y = MatMul (a, v) }"
    sparse = np.zeros((8, 8), np.float32)
    (tmp_path / "m.onnx").write_bytes(parse(text, w=sparse, v=floats(8, 4)).SerializeToString())
    with pytest.raises(InputError, match=r"\(8 x 8 is not made of multiples of 16\)"):
        export(tmp_path / "m.onnx", tmp_path / "out")
