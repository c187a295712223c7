"""qcompile.images: the preprocess text, which files and labels are found, and the arithmetic on the pixels."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qcompile.data import InputInfo, load_dataset, model_inputs
from qcompile.errors import DataError
from qcompile.images import PRESETS, Preprocess, holds_images, list_images, parse_preprocess
from qcompile.runtime import Session

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
needs_zoo = pytest.mark.skipif(not ZOO.is_dir(), reason="../shared/zoo is absent")


def info(shape: tuple[int | str | None, ...] | None, dtype: Any = np.float32, name: str = "x") -> InputInfo:
    return InputInfo(name, shape, np.dtype(dtype))


NCHW = info(("N", 3, 4, 6))


def picture(path: Path, height: int = 4, width: int = 6, seed: int = 0) -> Any:
    """Write a random picture; returns its pixels, uint8 [H, W, 3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def one(directory: Path, preprocess: str | None, what: InputInfo = NCHW) -> Any:
    (sample,) = load_dataset(str(directory), [what], preprocess=preprocess)
    return sample.feeds[what.name]


# --- the text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("raw", Preprocess()),
        ("imagenet", PRESETS["imagenet"]),
        (
            "size=224,resize=256,mean=0.485:0.456:0.406,std=0.229:0.224:0.225,layout=nchw,order=rgb,scale=255",
            Preprocess((224, 224), 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 255.0, "nchw", "rgb"),
        ),
        (
            " caffe , order = rgb , size=192x256",
            Preprocess((192, 256), mean=(104.0, 117.0, 123.0), order="rgb"),
        ),
        ("mobilenet,layout=nhwc", Preprocess(scale=127.5, mean=(1.0,), layout="nhwc")),
    ],
    ids=["raw", "imagenet", "all keys", "preset changed", "layout"],
)
def test_parse(text: str, want: Preprocess) -> None:
    assert parse_preprocess(text) == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagnet", r"'imagnet' is no preset \(raw, mobilenet, imagenet, caffe\); did you mean 'imagenet'\?"),
        ("", "'' is no preset .*; give for example imagenet,resize=256"),
        ("raw,", "'' is no preset"),
        ("size=4,raw", "the preset 'raw' must come first"),
        ("sizes=4", r"unknown key 'sizes' \(known: .*\); did you mean 'size'\?"),
        ("qqqq=4", "unknown key 'qqqq' .*give for example"),
        ("size=4,size=5", "size is given twice"),
        ("size=", "size= cannot be meant; give pixels"),
        ("size=0", "size=0 cannot be meant"),
        ("size=1x2x3", "size=1x2x3 cannot be meant"),
        ("resize=-1", "resize=-1 cannot be meant"),
        ("resize=9999999", "resize=9999999 cannot be meant"),
        ("mean=a:b", "mean=a:b cannot be meant"),
        ("mean=nan", "mean=nan cannot be meant"),
        ("std=0", "std=0 cannot be meant; give positive"),
        ("scale=1:2", "scale=1:2 cannot be meant"),
        ("scale=inf", "scale=inf cannot be meant"),
        ("layout=chw", "layout=chw cannot be meant; give nchw or nhwc"),
        ("order=grb", "order=grb cannot be meant; give rgb or bgr"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(DataError, match=f"^preprocess: {message}"):
        parse_preprocess(text)


# --- the pixels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preprocess", "oracle"),
    [
        ("raw", lambda p: p),
        ("mobilenet", lambda p: p / 127.5 - 1),
        ("imagenet", lambda p: (p / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]),
        ("caffe", lambda p: p[..., ::-1] - [104, 117, 123]),
        ("scale=2,mean=3:4:5,std=0.5", lambda p: (p / 2 - [3, 4, 5]) / 0.5),
        ("order=bgr", lambda p: p[..., ::-1]),
    ],
    ids=["raw", "mobilenet", "imagenet", "caffe", "keys", "bgr"],
)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_arithmetic(tmp_path: Path, preprocess: str, oracle: Any, last: bool) -> None:
    pixels = picture(tmp_path / "a.png").astype(np.float64)
    got = one(tmp_path, preprocess, info(("N", 4, 6, 3)) if last else NCHW)
    want = oracle(pixels)[None] if last else oracle(pixels).transpose(2, 0, 1)[None]
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_integer_inputs_take_the_pixels_as_they_are(tmp_path: Path) -> None:
    pixels = picture(tmp_path / "a.png")
    got = one(tmp_path, None, info(("N", 4, 6, 3), np.uint8))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got[0], pixels)
    with pytest.raises(DataError, match="has dtype float32, the model wants uint8"):
        one(tmp_path, "mobilenet", info(("N", 4, 6, 3), np.uint8))


def test_grey_inputs_and_pictures_with_palette_or_alpha(tmp_path: Path) -> None:
    pixels = picture(tmp_path / "a" / "a.png")
    got = one(tmp_path / "a", "raw", info((1, 1, 4, 6)))
    grey = pixels.astype(np.float64) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(got[0, 0], grey, atol=1)
    alpha = np.concatenate([pixels, np.full((4, 6, 1), 255, np.uint8)], axis=2)
    (tmp_path / "b").mkdir()
    Image.fromarray(alpha).save(tmp_path / "b" / "b.png")
    np.testing.assert_array_equal(one(tmp_path / "b", "raw")[0], pixels.transpose(2, 0, 1))
    got = one(tmp_path / "a", "raw,layout=nchw", info(("N", "C", 4, 6)))
    assert got.shape == (1, 3, 4, 6)  # an unknown number of channels is colour


def test_input_without_batch_axis(tmp_path: Path) -> None:
    pixels = picture(tmp_path / "a.png")
    np.testing.assert_array_equal(one(tmp_path, "raw", info((3, 4, 6))), pixels.transpose(2, 0, 1))


def test_centre_crop_without_resize_where_one_side_fits(tmp_path: Path) -> None:
    pixels = picture(tmp_path / "a.png", 4, 11)
    np.testing.assert_array_equal(one(tmp_path, "raw")[0], pixels[:, 2:8].transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("height", "width", "text", "size"),
    [
        (40, 60, "resize=20", (20, 30)),
        (60, 40, "resize=20", (30, 20)),
        (64, 48, "", (21, 16)),
        (8, 8, "", (16, 16)),
    ],
    ids=["wide", "tall", "as small as covers", "enlarged"],
)
def test_resize_keeps_the_proportions_and_the_centre(
    tmp_path: Path, height: int, width: int, text: str, size: tuple[int, int]
) -> None:
    ramp = np.stack(np.broadcast_arrays(np.arange(height)[:, None], np.arange(width), 7), axis=-1).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    got = one(tmp_path, f"raw,size=16{',' if text else ''}{text}", info(("N", 3, None, None)))[0]
    # Independent: sample the ramp at the centre of every cropped pixel; antialiasing keeps a ramp a ramp inside.
    rows = (np.arange(16) + (size[0] - 16) // 2 + 0.5) * height / size[0] - 0.5
    columns = (np.arange(16) + (size[1] - 16) // 2 + 0.5) * width / size[1] - 0.5
    inner = slice(2, -2)
    np.testing.assert_allclose(got[0, inner, inner], np.broadcast_to(rows[inner, None], (12, 12)), atol=1.01)
    np.testing.assert_allclose(got[1, inner, inner], np.broadcast_to(columns[inner], (12, 12)), atol=1.01)
    np.testing.assert_array_equal(got[2], 7)


def test_fixed_batch_groups_images(tmp_path: Path) -> None:
    pixels = [picture(tmp_path / str(k % 2) / f"{k}.png", seed=k) for k in range(5)]
    data = load_dataset(str(tmp_path), [info((2, 3, 4, 6))], preprocess="raw")
    assert data.count == 2
    first, second = list(data)
    np.testing.assert_array_equal(first.feeds["x"], np.stack([pixels[0], pixels[2]]).transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(first.label, [0, 0])
    np.testing.assert_array_equal(second.label, [0, 1])
    with pytest.raises(DataError, match="5 images do not fill one batch; the model's is fixed to 8"):
        load_dataset(str(tmp_path), [info((8, 3, 4, 6))], preprocess="raw")


# --- files and labels -------------------------------------------------------------------------------------------------


def names(found: list[tuple[Path, int | None]]) -> list[tuple[str, int | None]]:
    return [(path.name, label) for path, label in found]


def test_flat_directory_has_no_labels(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", ".hidden.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    assert names(list_images(tmp_path)) == [("a.jpg", None), ("b.PNG", None)]
    assert not load_dataset(str(tmp_path), [NCHW], preprocess="raw").has_labels


@pytest.mark.parametrize(
    ("folders", "want"),
    [
        (["dog", "cat", "eel"], {"cat": 0, "dog": 1, "eel": 2}),
        (["10", "9", "007"], {"10": 10, "9": 9, "007": 7}),
        (["10", "x"], {"10": 0, "x": 1}),
    ],
    ids=["names", "numbers", "mixed"],
)
def test_class_folders(tmp_path: Path, folders: list[str], want: dict[str, int]) -> None:
    for folder in folders:
        picture(tmp_path / folder / "deeper" / "a.png")
    (tmp_path / ".cache").mkdir()
    found = {path.parent.parent.name: label for path, label in list_images(tmp_path)}
    assert found == want


def test_an_empty_class_folder_keeps_its_number(tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    picture(tmp_path / "bee" / "a.png")
    assert names(list_images(tmp_path)) == [("a.png", 1)]


def test_labels_file(tmp_path: Path) -> None:
    picture(tmp_path / "b.png")
    picture(tmp_path / "sub" / "a.png")
    (tmp_path / "labels.csv").write_text("\ufefflabel,file,note\n7,sub/a.png,x\n3, b.png ,y\n", encoding="utf-8")
    assert names(list_images(tmp_path)) == [("b.png", 3), ("a.png", 7)]
    data = load_dataset(str(tmp_path), [NCHW], preprocess="raw")
    assert [s.label for s in data] == [3, 7]
    assert [s.label for s in data.sample(1, seed=0)] in ([3], [7])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "its first line must name the columns file,label"),
        ("name,class\na.png,1\n", "its first line must name the columns"),
        ("file,label\na.png,1\na.png,2\n", "line 3: a.png is labelled twice"),
        ("file,label\nc.png,1\n", "line 2: no such file"),
        ("file,label\n,1\n", "line 2: no such file"),
        ("file,label\na.png,cat\n", "line 2: label 'cat' is no class number"),
        ("file,label\na.png\n", "line 2: label '' is no class number"),
        ("file,label\na.png,-1\n", "line 2: label '-1' is no class number"),
        ("file,label\na.png,1\n", "has no line for b.png"),
        ("file,label\na.png,1\nb.png,\xff", "cannot be read"),
    ],
)
def test_labels_file_refused(tmp_path: Path, content: str, message: str) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "labels.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"labels\.csv: " + message):
        load_dataset(str(tmp_path), [NCHW], preprocess="raw")


def test_labels_file_without_images(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\n")
    assert holds_images(tmp_path)
    with pytest.raises(DataError, match="labels no image"):
        list_images(tmp_path)


def test_images_beside_class_folders(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "cat" / "b.png")
    with pytest.raises(DataError, match=r"holds images beside class folders \(a.png, cat/\)"):
        list_images(tmp_path)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preprocess", "inputs", "message"),
    [
        (
            None,
            [NCHW],
            "images need --preprocess, what the model was trained with: raw, mobilenet, imagenet, caffe",
        ),
        ("raw", [NCHW, info((1,), name="y")], "images feed one input, the model has 'x', 'y'"),
        ("raw", [info(None)], "images need 3 or 4 dimensions"),
        ("raw", [info(("N", 3))], "images need 3 or 4 dimensions"),
        ("raw", [info(("N", 4, 8, 8))], "wants 4 channels, images give 1 or 3"),
        ("raw,layout=nhwc", [NCHW], "wants 6 channels"),
        ("raw", [info(("N", 3, "H", 6))], r"height and width are not fixed \(H, 6\); add size="),
        ("raw,size=5", [NCHW], r"wants height and width \(4, 6\), size= says \(5, 5\)"),
        ("raw,resize=5", [NCHW], r"resize=5 does not cover the size \(4, 6\)"),
        ("mean=1:2", [NCHW], "mean has 2 numbers for 3 channels"),
        ("imagenet", [info(("N", 1, 4, 6))], "mean has 3 numbers for 1 channels"),
    ],
)
def test_refused(tmp_path: Path, preprocess: str | None, inputs: list[InputInfo], message: str) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match=message):
        load_dataset(str(tmp_path), inputs, preprocess=preprocess)


@pytest.mark.parametrize("content", [b"", b"no image at all"], ids=["empty", "text"])
def test_broken_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png: cannot be read as an image"):
        one(tmp_path, "raw")


def test_images_of_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: its pixels are no 8-bit numbers \(mode I;16\)"):
        one(tmp_path, "raw")


def test_truncated_image(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 64, 64)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.png: cannot be read as an image"):
        one(tmp_path, "raw")


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DataError, match=r"pip install qcompile\[images\]"):
        load_dataset(str(tmp_path), [NCHW], preprocess="raw")


# --- the zoo ----------------------------------------------------------------------------------------------------------


@pytest.mark.zoo
@needs_zoo
@pytest.mark.parametrize(("task", "preset"), [("mobilenet_v1", "mobilenet"), ("squeezenet", "caffe")])
def test_zoo_photos_are_what_the_zoo_itself_makes_of_them(task: str, preset: str) -> None:
    inputs = model_inputs(onnx.load(ZOO / task / "model.onnx"))
    ours = load_dataset(str(ZOO / "images" / "calib"), inputs, preprocess=preset)
    assert ours.count == 100
    theirs = load_dataset(f"{ZOO}/tasks.py:{task}_calib", inputs)
    for a, b in zip(ours.sample(100), theirs, strict=True):
        np.testing.assert_array_equal(a.feeds[inputs[0].name], b.feeds[inputs[0].name])


@pytest.mark.zoo
@needs_zoo
def test_zoo_photos_with_a_labels_file_are_classified(tmp_path: Path) -> None:
    assert importlib.util.find_spec("PIL")
    photos = sorted((ZOO / "images" / "eval").glob("*.jpg"))[::40]
    for photo in photos:
        (tmp_path / photo.name).write_bytes(photo.read_bytes())
    lines = [f"{p.name},{int(p.stem)}" for p in photos]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", *lines]))
    session = Session(ZOO / "mobilenet_v1" / "model.onnx", label="mobilenet_v1", threads=1)
    inputs = model_inputs(onnx.load(ZOO / "mobilenet_v1" / "model.onnx"))
    data = load_dataset(str(tmp_path), inputs, preprocess="mobilenet")
    right = [int(session.run(s.feeds)[session.output_names[0]].argmax()) == s.label for s in data]
    assert len(right) == len(photos) == 13
    assert sum(right) >= 8
