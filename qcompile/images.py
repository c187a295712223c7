"""Data from a directory of images: which files, which labels, and how a picture becomes the model's input.

Labels come from `labels.csv` (columns `file`, `label`) in the directory, or from class folders: a folder's label is
its place in the sorted names, or the number itself where all names are numbers. A flat directory has no labels.
Pillow is imported when it is first needed, so that all else works without it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qcompile.errors import DataError
from qcompile.runtime import Array
from qcompile.samples import InputInfo, Row, closest

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
LABELS_FILE = "labels.csv"


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes an array: see `parse_preprocess`.

    `size`: (height, width) in pixels, None: the model's; `resize`: length of the shorter side in pixels before the
    centre crop to `size`, None: as small as covers `size`; `mean`, `std`: one number, or one a channel in `order`.
    """

    size: tuple[int, int] | None = None
    resize: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1.0
    layout: str | None = None
    order: str = "rgb"


PRESETS = {
    "raw": Preprocess(),
    "mobilenet": Preprocess(scale=127.5, mean=(1.0,)),
    "imagenet": Preprocess(scale=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "caffe": Preprocess(mean=(104.0, 117.0, 123.0), order="bgr"),
}
_KEYS = ("size", "resize", "mean", "std", "scale", "layout", "order")
_EXAMPLE = "give for example imagenet,resize=256"


def parse_preprocess(text: str) -> Preprocess:
    """Read a preprocess text: comma-separated, first a preset if any, then KEY=VALUE, which go before the preset.

    A picture is resized (bilinear) so that its shorter side is `resize`, cropped at the centre to `size`, read in
    `order`, and becomes `(pixel / scale - mean) / std`, pixels being 0..255. EXIF rotation is not applied.
        size=224 or 192x256 (height x width)    the model's size where it is fixed
        resize=256                              as small as covers `size`
        mean=0.485:0.456:0.406, std=...         0 and 1; one number, or one a channel in `order`
        scale=255                               1
        layout=nchw|nhwc                        seen from the model's shape
        order=rgb|bgr                           rgb
    Presets: `raw` 0..255; `mobilenet` -1..1; `imagenet` scale 255 with ImageNet's mean and deviation; `caffe` BGR less
    104, 117, 123. Raises DataError for an unknown key or preset, and for a value that cannot be meant.
    """
    result, seen = Preprocess(), set[str]()
    for place, item in enumerate(part.strip() for part in text.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            if key not in PRESETS:
                hint = closest(key, PRESETS)
                raise DataError(f"preprocess: {key!r} is no preset ({', '.join(PRESETS)}){hint or f'; {_EXAMPLE}'}")
            if place:
                raise DataError(f"preprocess: the preset {key!r} must come first; {_EXAMPLE}")
            result = PRESETS[key]
            continue
        if key not in _KEYS:
            hint = closest(key, _KEYS)
            raise DataError(f"preprocess: unknown key {key!r} (known: {', '.join(_KEYS)}){hint or f'; {_EXAMPLE}'}")
        if key in seen:
            raise DataError(f"preprocess: {key} is given twice; give it once")
        seen.add(key)
        try:
            result = replace(result, **{key: _VALUES[key](value)})
        except ValueError as error:
            raise DataError(f"preprocess: {key}={value} cannot be meant; {_MEANT[key]}") from error
    return result


def _size(text: str) -> tuple[int, int]:
    parts = [_pixels(part) for part in text.split("x")]
    if len(parts) > 2:
        raise ValueError(text)
    return parts[0], parts[-1]


def _pixels(text: str) -> int:
    value = int(text)
    if not 0 < value <= 1 << 16:
        raise ValueError(text)
    return value


def _numbers(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(":"))
    if not np.isfinite(values).all():
        raise ValueError(text)
    return values


def _divisors(text: str) -> tuple[float, ...]:
    values = _numbers(text)
    if min(values) <= 0:
        raise ValueError(text)
    return values


def _divisor(text: str) -> float:
    (value,) = _divisors(text)
    return value


def _one_of(*words: str) -> Any:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(text)
        return text

    return read


_VALUES: dict[str, Any] = {
    "size": _size,
    "resize": _pixels,
    "mean": _numbers,
    "std": _divisors,
    "scale": _divisor,
    "layout": _one_of("nchw", "nhwc"),
    "order": _one_of("rgb", "bgr"),
}
_MEANT = {
    "size": "give pixels, as 224 or 192x256 (height x width)",
    "resize": "give pixels, as 256",
    "mean": "give numbers, as 0.5 or 0.485:0.456:0.406",
    "std": "give positive numbers, as 0.5 or 0.229:0.224:0.225",
    "scale": "give one positive number, as 255",
    "layout": "give nchw or nhwc",
    "order": "give rgb or bgr",
}


class ImageSource:
    """Rows of the images in a directory; one image, or one batch of them where the model's batch is fixed, at a time.

    The model must have one input, of rank 4 (NCHW or NHWC) or 3 (without batch axis), with 1 or 3 channels.
    `preprocess` is needed unless the input is an integer one, which takes the pixels as they are.
    """

    def __init__(self, directory: Path, inputs: Sequence[InputInfo], preprocess: str | None) -> None:
        if len(inputs) != 1:
            names = ", ".join(repr(i.name) for i in inputs)
            raise DataError(f"{directory}: images feed one input, the model has {names}; give file.py:function")
        _pillow(directory)
        if preprocess is None and inputs[0].dtype.kind != "u":
            raise DataError(
                f"{directory}: images need --preprocess, what the model was trained with: "
                f"{', '.join(PRESETS)}, or KEY=VALUE of {', '.join(_KEYS)}; {_EXAMPLE}"
            )
        self._name = inputs[0].name
        self._files = list_images(directory)
        self._plan = _Plan.make(inputs[0], parse_preprocess(preprocess or "raw"), f"{directory}: input {self._name!r}")
        if len(self._files) < self._plan.batch:
            raise DataError(
                f"{directory}: {len(self._files)} images do not fill one batch; the model's is fixed to {self._plan.batch}"
            )

    @property
    def count(self) -> int | None:
        """Number of complete batches."""
        return len(self._files) // self._plan.batch

    def rows(self, indices: Sequence[int] | None) -> Iterator[Row]:
        """Rows in the order of the images' paths."""
        size = self._plan.batch
        for index in range(len(self._files) // size) if indices is None else indices:
            files = self._files[index * size : (index + 1) * size]
            images = [self._plan.load(path) for path, _ in files]
            labels = [label for _, label in files if label is not None]
            label = np.array(labels, np.int64) if labels else None
            yield Row(
                str(files[0][0]),
                {self._name: np.stack(images) if self._plan.batch_axis else images[0]},
                label,
            )


@dataclass(frozen=True)
class _Plan:
    """`Preprocess` with everything settled for one input of a model."""

    preprocess: Preprocess
    height: int
    width: int
    channels: int
    channels_last: bool
    batch_axis: bool
    batch: int

    @staticmethod
    def make(info: InputInfo, preprocess: Preprocess, where: str) -> _Plan:
        shape = info.shape
        if shape is None or len(shape) not in (3, 4):
            raise DataError(f"{where}: has shape {shape}; images need 3 or 4 dimensions, give file.py:function instead")
        first, second, third = shape[-3:]
        channels_last = preprocess.layout == "nhwc"
        if preprocess.layout is None:  # NCHW, ONNX's own, where the shape does not tell
            channels_last = first not in (1, 3) and third in (1, 3)
        channels, height, width = (third, first, second) if channels_last else (first, second, third)
        if isinstance(channels, int) and channels not in (1, 3):
            raise DataError(f"{where}: wants {channels} channels, images give 1 or 3; give file.py:function, or layout=")
        channels = channels if isinstance(channels, int) else 3
        for key, numbers in (("mean", preprocess.mean), ("std", preprocess.std)):
            if len(numbers) not in (1, channels):
                raise DataError(f"{where}: preprocess: {key} has {len(numbers)} numbers for {channels} channels")
        if preprocess.size is None and not (isinstance(height, int) and isinstance(width, int)):
            raise DataError(f"{where}: its height and width are not fixed ({height}, {width}); add size= to preprocess")
        fixed = tuple(d if isinstance(d, int) else None for d in (height, width))
        size = preprocess.size or (fixed[0] or 0, fixed[1] or 0)
        if any(d is not None and d != s for d, s in zip(fixed, size, strict=True)) or min(size) < 1:
            raise DataError(f"{where}: wants height and width {fixed}, size= says {size}; leave size= out")
        if preprocess.resize is not None and preprocess.resize < max(size):
            raise DataError(f"{where}: resize={preprocess.resize} does not cover the size {size}; give a larger one")
        batch = shape[0] if len(shape) == 4 and isinstance(shape[0], int) else 1
        return _Plan(preprocess, *size, channels, channels_last, len(shape) == 4, max(batch, 1))

    def load(self, path: Path) -> Array:
        """The image as [C, H, W] or [H, W, C]; uint8 where the pixels stay as they are, else float32."""
        pixels = self._pixels(path)
        if self.preprocess.order == "bgr":
            pixels = pixels[..., ::-1]
        recipe = self.preprocess
        if (recipe.scale, set(recipe.mean), set(recipe.std)) != (1.0, {0.0}, {1.0}):
            mean, std = np.array(recipe.mean, np.float32), np.array(recipe.std, np.float32)
            pixels = (pixels.astype(np.float32) / np.float32(recipe.scale) - mean) / std
        return np.ascontiguousarray(pixels if self.channels_last else pixels.transpose(2, 0, 1))

    def _pixels(self, path: Path) -> Array:
        """uint8 [H, W, C], resized and cropped."""
        pillow = _pillow(path)
        try:
            with pillow.open(path) as file:
                if file.mode.startswith(("I", "F")):  # Pillow's conversion would saturate them without a word
                    raise DataError(f"{path}: its pixels are no 8-bit numbers (mode {file.mode}); convert it first")
                image = file.convert("RGB" if self.channels == 3 else "L")
                width, height = image.size
                if self.preprocess.resize is not None:
                    ratio = self.preprocess.resize / min(width, height)
                else:
                    ratio = max(self.width / width, self.height / height)
                # Rounding must not leave an edge one pixel short of the crop.
                target = max(self.width, round(width * ratio)), max(self.height, round(height * ratio))
                if target != image.size:
                    image = image.resize(target, pillow.Resampling.BILINEAR)
        except (
            OSError,
            ValueError,
            SyntaxError,
            pillow.DecompressionBombError,
        ) as error:  # what Pillow's readers raise
            raise DataError(f"{path}: cannot be read as an image: {error}") from error
        left, top = (target[0] - self.width) // 2, (target[1] - self.height) // 2
        pixels: Array = np.asarray(image)[top : top + self.height, left : left + self.width]
        return pixels.reshape(self.height, self.width, self.channels)


def _pillow(needed_for: Path) -> ModuleType:
    try:
        import PIL.Image
    except ImportError as error:
        raise DataError(f"{needed_for}: reading images needs Pillow; pip install qcompile[images]") from error
    return PIL.Image


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _class_folders(directory: Path) -> list[Path]:
    return sorted(p for p in directory.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def holds_images(directory: Path) -> bool:
    """Whether the directory is one of images: some in it or in a folder of it, or a `labels.csv`."""
    if (directory / LABELS_FILE).is_file() or any(map(_is_image, directory.iterdir())):
        return True
    return any(_is_image(p) for folder in _class_folders(directory) for p in folder.rglob("*"))


def list_images(directory: Path) -> list[tuple[Path, int | None]]:
    """(image, label or None) in the order of the paths. Raises DataError where files and labels contradict each other."""
    folders = _class_folders(directory)
    flat = sorted(p for p in directory.iterdir() if _is_image(p))
    inside = {folder: sorted(p for p in folder.rglob("*") if _is_image(p)) for folder in folders}
    table = directory / LABELS_FILE
    if table.is_file():
        return _labelled_by_table(table, sorted([*flat, *(p for found in inside.values() for p in found)]))
    nested = [folder for folder, found in inside.items() if found]
    if flat and nested:
        raise DataError(
            f"{directory}: holds images beside class folders ({flat[0].name}, {nested[0].name}/); "
            f"move them, or label all in {LABELS_FILE}"
        )
    if flat:
        return [(path, None) for path in flat]
    numbers = all(folder.name.isdecimal() for folder in folders)
    labels = {folder: int(folder.name) if numbers else place for place, folder in enumerate(folders)}
    return [(path, labels[folder]) for folder, found in inside.items() for path in found]


def _labelled_by_table(table: Path, images: Sequence[Path]) -> list[tuple[Path, int | None]]:
    labels: dict[Path, int] = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"file", "label"} <= set(reader.fieldnames or ()):
                raise DataError(f"{table}: its first line must name the columns file,label")
            for row in reader:
                path, label = table.parent / (row["file"] or "").strip(), (row["label"] or "").strip()
                where = f"{table}: line {reader.line_num}"
                if path in labels:
                    raise DataError(f"{where}: {row['file']} is labelled twice; leave one line")
                if not path.is_file():
                    raise DataError(f"{where}: no such file {path}")
                if not label.isdecimal():
                    raise DataError(f"{where}: label {label!r} is no class number; give 0, 1, 2, ...")
                labels[path] = int(label)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read: {error}") from error
    unlabelled = [p for p in images if p not in labels]
    if unlabelled:
        raise DataError(f"{table}: has no line for {unlabelled[0].relative_to(table.parent)}; add it, or move the image")
    if not labels:
        raise DataError(f"{table}: labels no image; add lines FILE,LABEL")
    return sorted(labels.items())
