"""Reading any float ONNX model for compilation: refused early where it cannot work, raised to the working opset otherwise."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto, helper

from qcompile import load_checks
from qcompile.convert import WORKING_OPSET, opset_of, raise_opset
from qcompile.equivalence import compare_models
from qcompile.errors import ModelError
from qcompile.graph import Graph
from qcompile.graph_io import inline_functions, load_proto, read_model
from qcompile.runtime import Optimisation, Session
from qcompile.tensors import is_external, location
from qcompile.widen import widen

IR_VERSION = 10
_LATE_TYPES = ("FLOAT4E2M1", "FLOAT8E8M0", "INT2", "UINT2", "FLOAT6E2M3", "FLOAT6E3M2")  # need more than IR 10


@dataclass
class Loaded:
    """A model ready for the passes. source_sha256: of the file, then its data files in order of name. notes: for the report.

    quantised: whether it already holds Q/DQ, and is to be imported.
    """

    graph: Graph
    source_sha256: str
    notes: list[str] = field(default_factory=list)
    quantised: bool = False


def load_model(path: str | Path) -> Loaded:
    """Read `path` and bring it to opset 21 (or its own, where higher), IR 10, float32, every node named.

    Where nodes were rewritten, the result is compared with the original in onnxruntime on random input. Raises ModelError
    naming the file and the node or tensor for everything that cannot be compiled: no model, truncated, too new, already
    quantised in another form than Q/DQ pairs, in training form, NaN or infinity in weights, operators unknown to onnxruntime.
    """
    path = Path(path)
    model = load_proto(path)
    directory = path.resolve().parent
    try:
        return _load(path, model, directory)
    except ModelError as error:
        message = str(error)
        raise ModelError(message if message.startswith(str(path)) else f"{path}: {message}") from error


def _load(path: Path, model: ModelProto, directory: Path) -> Loaded:
    sha256 = file_digest(path, model, directory)
    notes: list[str] = []
    if model.functions:
        notes.append(f"{len(model.functions)} local functions inlined")
        model = inline_functions(model)
    opset = opset_of(model)
    newest = newest_opset()
    if opset > newest:
        raise ModelError(f"opset {opset} is newer than onnxruntime takes ({newest}); export it with opset {newest} or lower")
    load_checks.refuse_training(model)
    quantised = load_checks.holds_qdq(model)
    foreign = load_checks.foreign_node(model)
    if foreign is not None:
        _require_runnable(path, foreign)
    rewritten = raise_opset(model, WORKING_OPSET)
    if opset < WORKING_OPSET:
        notes.append(f"opset {opset} raised to {WORKING_OPSET} ({rewritten} nodes rewritten)")
    half = widen(model, directory)
    if half:
        notes.append(f"half-precision model computed in float32 ({half} tensors widened)")
    _drop_unused_imports(model)
    _name_nodes(model)
    if not load_checks.uses_types(model.graph, _LATE_TYPES):
        model.ir_version = IR_VERSION
    graph = read_model(model, directory, share=True)
    load_checks.refuse_bad_weights(graph)
    if opset < WORKING_OPSET or half:
        note = compare_models(path, graph, tolerance=2e-2 if half else 1e-4)
        if note is not None:
            notes.append(note)
    return Loaded(graph, sha256, notes, quantised)


def file_digest(path: Path, model: ModelProto, directory: Path) -> str:
    """SHA-256 of the model file (as sha256sum gives it); where it has external data, of the data files after it too."""
    digest = hashlib.sha256()
    names = sorted({location(t) for t in model.graph.initializer if is_external(t)})
    for file in [path, *(directory / name for name in names)]:
        if not file.is_file():
            raise ModelError(f"data file {file} is missing; put it beside the model")
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def newest_opset() -> int:
    """The newest opset of the default domain that the installed onnxruntime takes, found by trying."""
    for version in range(onnx.defs.onnx_opset_version(), WORKING_OPSET, -1):
        info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", [info], [out])
        probe = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=IR_VERSION)
        try:
            Session(probe, optimisation=Optimisation.OFF, threads=1)
        except ModelError:
            continue
        return version
    return WORKING_OPSET


def _require_runnable(path: Path, node: str) -> None:
    try:
        Session(path, optimisation=Optimisation.OFF)
    except ModelError as error:
        raise ModelError(
            f"node '{node}' has an operator that onnxruntime cannot run: {error}; export it in standard operators"
        ) from error


def _drop_unused_imports(model: ModelProto) -> None:
    used = load_checks.domains(model.graph) | {""}
    kept: dict[str, int] = {}
    for entry in model.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if domain in used:
            kept.setdefault(domain, entry.version)
    kept.setdefault("", WORKING_OPSET)
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in sorted(kept.items()))


def _name_nodes(model: ModelProto) -> None:
    """Every node gets a name of its own, so that options, reports and errors can point at it: `Conv_12` for the 12th."""
    taken = {n.name for n in model.graph.node}
    seen: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if node.name and node.name not in seen:
            seen.add(node.name)
            continue
        base = node.name or f"{node.op_type}_{index}"
        name, count = base, 0
        while name in taken or name in seen:
            count += 1
            name = f"{base}_{count}"
        node.name = name
        seen.add(name)
