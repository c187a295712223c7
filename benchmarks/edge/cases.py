"""The cases of the matrix, each a folder: `model.onnx`, `case.json`, inputs and expected outputs as raw bytes.

What is expected comes from the file interpreter, which reads the scales from the file and computes in numpy integers. Compiled
models are kept between runs, under the hash of the compiler that wrote them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from broken import STRICT, broken_files
from onnx import ModelProto, numpy_helper
from ties import count_ties, tie_models

import qcompile
from qcompile import compile_model
from qcompile.data import load_dataset
from qcompile.graph import Array
from qcompile.interpret import Interpreter
from qcompile.raw_tensors import write_tensors
from qcompile.samples import model_inputs

ROOT = Path(__file__).resolve().parents[2]
MODELS, ZOO = ROOT / "models", ROOT.parent / "shared" / "zoo"
FORMATS = ("qdq", "qoperator", "integer")


@dataclass(frozen=True)
class Source:
    """A model to compile: its file, calibration data, samples to run, and how many of them make the feed of a case."""

    model: Path
    calibration: str
    samples: str
    count: int


def _zoo(model: str, task: str, count: int) -> Source:
    tasks = ZOO / "tasks.py"
    return Source(ZOO / model / "model.onnx", f"{tasks}:{task}_calib", f"{tasks}:{task}_eval", count)


_CALIBRATION, _SAMPLES = str(MODELS / "digits_calib.npz"), str(MODELS / "digits.npz")
SOURCES = {
    "digits_cnn": Source(MODELS / "digits_cnn.onnx", _CALIBRATION, _SAMPLES, 16),
    "digits_vit": Source(MODELS / "digits_vit.onnx", _CALIBRATION, _SAMPLES, 16),
    "resnet20": _zoo("resnet20_cifar10", "resnet20_cifar10", 2),
    "minilm": _zoo("minilm_sst2", "minilm_sst2", 1),
}


@dataclass
class Built:
    """What was written: names of cases in order, by format; nodes that compute in float;
    ties counted; operators of all files; what was skipped and why.
    """

    cases: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    floats: dict[str, int] = field(default_factory=dict)
    ties: int = 0
    operators: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)


def build(folder: Path, cache: Path) -> Built:
    """Write every case into `folder`, which is made anew; compiled models are kept in `cache`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    built = Built()
    for name, made in tie_models().items():
        built.ties += count_ties(made.formats["integer"], made.feeds)
        for format_, model in made.formats.items():
            _write(folder, f"ties.{name}.{format_}", model, made.feeds, built, format_)
    for name, source in SOURCES.items():
        if not source.model.exists():
            built.skipped[name] = f"{source.model.parent.name} is absent from ../shared/zoo"
            continue
        for format_ in FORMATS:
            path = compiled(source, format_, cache)
            _write(folder, f"{name}.{format_}", onnx.load(path), _feeds(path, source), built, format_)
    for rule, made in broken_files().items():
        expected = None
        if rule != "no-kernel":
            expected = Interpreter(made.model, strict=False).run(dict(made.feeds))
        write_case(folder / f"broken.{rule}", made.model, dict(made.feeds), expected or {})
        built.broken[f"broken.{rule}"] = made.differs
        if made.differs == STRICT:
            del built.broken[f"broken.{rule}"]
    return built


def compiled(source: Source, format_: str, cache: Path, **settings: Any) -> Path:
    """The model compiled by this version of the compiler, from `cache` where it was compiled before."""
    key = hashlib.sha256(_compiler().encode() + source.model.read_bytes() + repr((format_, settings)).encode()).hexdigest()[:16]
    path = cache / f"{source.model.parent.name}.{source.model.stem}.{format_}.{key}.onnx"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {
            "data": source.calibration,
            "format": format_,
            "effort": "fast",
            "latency": False,
            "samples": 32,
        }
        compile_model(source.model, path, **{**options, **settings})
    return path


def _compiler() -> str:
    """A hash of every module of the compiler."""
    digest = hashlib.sha256()
    for module in (qcompile, qcompile.passes, qcompile.kernels):
        for file in sorted(Path(str(module.__file__)).parent.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _feeds(path: Path, source: Source) -> dict[str, Array]:
    """The first samples, joined along axis 0."""
    rows: Iterator[Any] = iter(load_dataset(source.samples, model_inputs(onnx.load(path, load_external_data=False))))
    taken = [next(rows).feeds for _ in range(source.count)]
    return {name: np.concatenate([feeds[name] for feeds in taken]) for name in taken[0]}


def _write(folder: Path, name: str, model: ModelProto, feeds: Mapping[str, Array], built: Built, format_: str) -> None:
    interpreter = Interpreter(model)
    expected = interpreter.run(feeds)
    write_case(folder / name, model, feeds, expected, floats=len(interpreter.float_nodes))
    built.cases[name] = format_
    built.floats[name] = len(interpreter.float_nodes)
    built.operators |= {n.op_type for n in model.graph.node}


def write_case(
    folder: Path, model: ModelProto, feeds: Mapping[str, Array], expected: Mapping[str, Array], floats: int = 0
) -> None:
    """One case; `floats`: how many of its nodes compute in float, so that bits are not promised."""
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    if model.functions:  # other runtimes do not write functions out by themselves
        onnx.save(_plain(onnx.inliner.inline_local_functions(model)), folder / "inlined.onnx")
    record = {
        "inputs": write_tensors(folder, {k: np.asarray(v) for k, v in feeds.items()}, "input"),
        "outputs": write_tensors(folder, expected, "output"),
        "floats": floats,
    }
    (folder / "case.json").write_text(json.dumps(record, indent=1) + "\n")


def _plain(model: ModelProto) -> ModelProto:
    """Constant nodes as initializers, and no shapes of inner tensors: what other runtimes trip over."""
    kept = []
    for node in model.graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            stored = numpy_helper.from_array(numpy_helper.to_array(value), node.output[0])
            model.graph.initializer.append(stored)
        else:
            kept.append(node)
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(kept)
    return model
