"""`qcompile bundle`: a folder with all that a device needs: model, `.ort` form, a sample, loaders that check themselves by it.

Every loader runs the sample first and compares its outputs with the bytes in the folder, so that a device on which the
model gives other bits says so itself. What is expected is computed by onnxruntime here and, where the file promises bits,
must equal what the file interpreter computes in plain integers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import qcompile
from qcompile.bundle_c import c_header
from qcompile.bundle_ort import write_ort
from qcompile.bundle_page import find_web, write_page
from qcompile.check import made_up_feeds
from qcompile.data import load_dataset
from qcompile.errors import InputError, ModelError
from qcompile.images import holds_images
from qcompile.interpret import Interpreter
from qcompile.model_file import read_model
from qcompile.portable import Portability, portability
from qcompile.raw_tensors import write_tensors
from qcompile.report_file import file_record, report_json
from qcompile.runtime import Array, Feeds, Session
from qcompile.samples import model_inputs

FILES = Path(__file__).parent / "bundle_files"
_LOADERS = {"load.py": "load.py", "load.mjs": "load.mjs", "load.c": "c/load.c", "CMakeLists.txt": "c/CMakeLists.txt"}
#: How far a file that does not promise bits may be from the sample, as a share of the output's range.
CLOSE = 1e-3


def bundle_model(
    model: str | Path,
    folder: str | Path,
    *,
    data: str | None = None,
    preprocess: str | None = None,
    page: bool = False,
    web: str | Path | None = None,
    labels: str | Path | None = None,
) -> dict[str, Any]:
    """Write the bundle of `model` into `folder`, which must be new or empty; returns the manifest.

    data: where the sample comes from (its first one; made up where None), preprocess: of images. page: also a static page;
    web: the `dist` folder of onnxruntime-web; labels: a text file with the name of one class a line.
    Raises InputError, DataError and ModelError; then nothing is left in `folder`.
    """
    path, target = Path(model), Path(folder)
    found_web = find_web(web) if page else None
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: is not an empty folder; choose another with -o")
    if not target.parent.is_dir():
        raise InputError(f"{target}: its folder does not exist; create it or choose another with -o")
    names = _labels(labels)
    proto = read_model(path)
    judged = portability(path)
    if judged.needs["onnxruntime"] is None:
        opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)
        raise ModelError(f"{path}: no onnxruntime reads opset {opset}, IR {proto.ir_version}; compile it with a lower --opset")
    session = Session(path, threads=1, label=str(path))
    feeds = _sample(proto, data, preprocess, page)
    outputs = session.run(feeds)
    exact = not judged.among("onnxruntime")
    if exact:
        _check_exact(path, feeds, outputs)
    was_there = target.exists()
    try:
        target.mkdir(exist_ok=True)
        manifest = _write(path, target, proto, judged, feeds, outputs, exact, names)
        if found_web is not None:
            write_page(target, manifest, found_web, preprocess)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        if was_there:
            target.mkdir(exist_ok=True)
        raise
    return manifest


def _write(
    path: Path,
    target: Path,
    proto: onnx.ModelProto,
    judged: Portability,
    feeds: Feeds,
    outputs: Mapping[str, Array],
    exact: bool,
    names: list[str],
) -> dict[str, Any]:
    _copy_model(path, target, proto)
    operators = write_ort(target / "model.onnx", target)
    sample = target / "sample"
    sample.mkdir()
    manifest: dict[str, Any] = {
        "qcompile": qcompile.__version__,
        "files": {f.name: file_record(f)["sha256"] for f in sorted(target.iterdir()) if f.is_file()},
        "inputs": write_tensors(sample, feeds, "input"),
        "outputs": write_tensors(sample, outputs, "output"),
        "quantisation": _ends(proto),
        "promise": "bits" if exact else "close",
        "close": CLOSE,
        "needs": judged.needs,
        "findings": judged.as_json()["findings"],
        "operators": operators,
        "labels": names,
    }
    (target / "manifest.json").write_text(report_json(manifest), encoding="utf-8")
    for name, place in _LOADERS.items():
        (target / place).parent.mkdir(exist_ok=True)
        shutil.copyfile(FILES / name, target / place)
    (target / "c" / "sample.h").write_text(c_header(manifest), encoding="utf-8")
    return manifest


def _copy_model(path: Path, target: Path, proto: onnx.ModelProto) -> None:
    """The file as it is; external data beside it under their own names."""
    shutil.copyfile(path, target / "model.onnx")
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and not (target / entry.value).exists():
                (target / entry.value).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path.parent / entry.value, target / entry.value)


def _sample(proto: onnx.ModelProto, data: str | None, preprocess: str | None, page: bool) -> dict[str, Array]:
    inputs = model_inputs(proto)
    if page and data is not None and not (Path(data).is_dir() and holds_images(Path(data))):
        preprocess = None  # it is for the pictures that the page is given
    if data is None:
        return {name: np.asarray(value) for name, value in made_up_feeds(inputs).items()}
    first = next(iter(load_dataset(data, inputs, preprocess=preprocess)))
    return {name: np.asarray(value) for name, value in first.feeds.items()}


def _check_exact(path: Path, feeds: Feeds, outputs: Mapping[str, Array]) -> None:
    expected = Interpreter(path).run(feeds)
    for name, value in outputs.items():
        differ = int((expected[name] != value).sum())
        if differ:
            raise ModelError(
                f"{path}: onnxruntime and plain integers differ in {differ} of {value.size} values of '{name}' on this machine; "
                "see `qcompile inspect --portable`"
            )


def _ends(proto: onnx.ModelProto) -> dict[str, Any]:
    """What integer inputs and outputs mean (from the metadata); scale and zero point of the Q and DQ at float ends."""
    found: dict[str, Any] = {}
    for entry in proto.metadata_props:
        if entry.key.startswith(("qcompile.input.", "qcompile.output.")):
            found[entry.key.split(".", 2)[2]] = json.loads(entry.value)
    constants = {t.name: t for t in proto.graph.initializer}
    ends = {i.name: 0 for i in proto.graph.input} | {o.name: 1 for o in proto.graph.output}
    for node in proto.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        name = node.input[0] if node.op_type == "QuantizeLinear" else node.output[0]
        if ends.get(name) == (node.op_type == "DequantizeLinear") and all(n in constants for n in node.input[1:]):
            values = [np.ravel(onnx.numpy_helper.to_array(constants[n])).tolist() for n in node.input[1:]]
            found.setdefault(name, {"scale": values[0], "zero_point": values[1] if len(values) > 1 else [0]})
    return found


def _labels(path: str | Path | None) -> list[str]:
    if path is None:
        return []
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of labels; give a text file, one name a line") from error
