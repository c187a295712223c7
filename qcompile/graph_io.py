"""Between ModelProto and Graph: reading, writing, copying, shape inference. Nothing is lost that a proto can hold."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper

from qcompile.errors import InputError, ModelError, PassError
from qcompile.graph import Const, Graph, Node, Tensor, Value
from qcompile.graph_parts import body_captures, body_names, node_bodies, rename_captures
from qcompile.tensors import byte_size, is_external, location, raw_bytes, with_data

_Proto = TypeVar("_Proto", TensorProto, SparseTensorProto, AttributeProto)
_PROTO_LIMIT = 2**31 - 2**20  # protobuf refuses messages of 2 GiB; one MiB is left for framing
_INLINE_LIMIT = 1024  # constants up to this many bytes stay in the model file


def load_file(path: Path) -> Graph:
    """Read an ONNX file without its external data. Raises ModelError naming the file."""
    return read_model(load_proto(path), path.resolve().parent, share=True)


def load_proto(path: Path) -> ModelProto:
    """The file's ModelProto; external data stay on disk. Raises ModelError naming the file where it is no model."""
    if path.is_dir():
        raise ModelError(f"{path}: a folder; give the path of an ONNX file in it")
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give the path of an ONNX model")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise ModelError(f"{path}: not an ONNX model, or truncated ({error}); export or download it again") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise ModelError(f"{path}: not an ONNX model: it has no graph; export or download it again")
    return model


def read_model(model: ModelProto, directory: Path, share: bool = False, constants: Mapping[str, Const] | None = None) -> Graph:
    """Link `model`. With `share` its protos are used as they are (the caller gives the model up).

    `constants` stand beside those in the model (they are linked anew, their protos shared). Raises ModelError where a
    tensor is written twice or read but never written.
    """
    if model.functions:
        model = inline_functions(model)
        share = True
    proto = model.graph
    graph = Graph(_shell(model))
    tensors: dict[str, Tensor] = {}

    def declare(made: Tensor) -> None:
        if made.name in tensors:
            raise ModelError(f"tensor '{made.name}' is declared twice; the model is not valid ONNX, export it again")
        tensors[made.name] = made
        if isinstance(made, Const):
            graph.constants[made.name] = made

    for const in (constants or {}).values():
        twin = Const(const.name, const.proto, const.directory)
        twin.info = const.info
        declare(twin)
    for dense in proto.initializer:
        declare(Const(dense.name, _own(dense, share), directory))
    for sparse in proto.sparse_initializer:
        declare(Const(sparse.values.name, _own(sparse, share), directory))
    infos = {info.name: info for info in [*proto.value_info, *proto.output]}
    for info in proto.input:
        if info.name in graph.constants:
            continue  # IR 3 lists initializers as inputs
        value = Value(info.name, info.type if info.HasField("type") else None)
        value.info = info
        declare(value)
        graph.inputs.append(value)
    written = set(tensors)

    def tensor(name: str) -> Tensor:
        if name == "":
            return Value("")
        if name not in tensors:
            value = Value(name)
            if name in infos:
                value.info = infos[name]
                value.type = infos[name].type if infos[name].HasField("type") else None
            tensors[name] = value
        return tensors[name]

    for source in proto.node:
        outputs: list[Value] = []
        for name in source.output:
            made = tensor(name)
            if isinstance(made, Const) or (name and name in written):
                raise ModelError(f"tensor '{name}' is written twice (node '{source.name}'); the model is not valid ONNX")
            written.add(name)
            outputs.append(made)
        attrs = {a.name: _own(a, share) for a in source.attribute}
        rest = NodeProto()
        rest.CopyFrom(source) if not share else rest.MergeFrom(source)
        del rest.input[:], rest.output[:], rest.attribute[:]
        inputs = [tensor(n) for n in source.input]
        node = Node(source.op_type, source.name, inputs, outputs, source.domain, attrs, rest)
        for body in node_bodies(source.attribute):
            names = sorted(body_captures(body))
            node.captured += [tensor(n) for n in names]
            node.captured_as += names
            graph.reserve(body_names(body))
        graph.nodes.append(node)
    graph.outputs = [tensor(o.name) for o in proto.output]
    for value, info in zip(graph.outputs, proto.output, strict=True):
        value.info = info
        if isinstance(value, Value) and value.type is None and info.HasField("type"):
            value.type = info.type
    missing = next((n for n in tensors if n not in written), None)
    if missing is not None:
        reader = next((n.label for n in graph.nodes if any(t.name == missing for t in [*n.inputs, *n.captured])), "graph output")
        raise ModelError(f"tensor '{missing}' is read ({reader}) but nothing computes it; the model is not valid ONNX")
    graph.reserve(tensors)
    graph.reserve(n.name for n in graph.nodes)
    return graph


def inline_functions(model: ModelProto) -> ModelProto:
    """Model-local functions written out in place of their calls. Raises ModelError where onnx cannot."""
    import onnx.inliner

    try:
        return onnx.inliner.inline_local_functions(model)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(f"its local functions cannot be inlined ({error}); export the model without functions") from error


def write_functions_out(graph: Graph) -> None:
    """Replace every call of a function that the model holds by the function's nodes, in place."""
    if not graph.shell.functions:
        return
    local = {f.domain for f in graph.shell.functions}
    plain = copy_graph(graph)
    imports = [o for o in plain.shell.opset_import if o.domain not in local]
    del plain.shell.opset_import[:]
    plain.shell.opset_import.extend(imports)
    graph.shell, graph.nodes, graph.inputs, graph.outputs = plain.shell, plain.nodes, plain.inputs, plain.outputs
    graph.constants = plain.constants
    graph.reserve(t.name for t in plain.values())
    graph.reserve(n.name for n in plain.nodes)


def copy_graph(graph: Graph) -> Graph:
    """An independent graph whose constants share their protos with `graph`."""
    return read_model(write_model(graph, constants=False), Path(), share=True, constants=graph.constants)


def _shell(model: ModelProto) -> ModelProto:
    shell = ModelProto()
    for field, value in model.ListFields():
        if field.name in ("graph", "functions"):
            continue
        if field.name in ("opset_import", "metadata_props", "training_info", "configuration"):
            getattr(shell, field.name).extend(value)
        else:
            setattr(shell, field.name, value)
    proto = model.graph
    shell.graph.name = proto.name
    if proto.doc_string:
        shell.graph.doc_string = proto.doc_string
    shell.graph.metadata_props.extend(proto.metadata_props)
    shell.graph.quantization_annotation.extend(proto.quantization_annotation)
    shell.ir_version = max(shell.ir_version, 4)  # before IR 4 every initializer had to be listed as an input too
    return shell


def write_model(graph: Graph, constants: bool = True, embed: bool = False) -> ModelProto:
    """The model as one proto: without `constants` their values are left out, with `embed` external ones are read in.

    Raises PassError where a pass left two tensors of one name, or a read tensor that nothing computes.
    """
    graph.sort()
    _check_names(graph)
    model = ModelProto()
    model.CopyFrom(graph.shell)
    imports = sorted(model.opset_import, key=lambda o: o.domain)
    del model.opset_import[:]
    model.opset_import.extend(imports)
    proto = model.graph
    proto.node.extend(node_proto(n) for n in graph.nodes)
    proto.input.extend(_info(v) for v in graph.inputs)
    proto.output.extend(_info(v) for v in graph.outputs)
    ends = {t.name for t in [*graph.inputs, *graph.outputs]}
    inner = (v for v in graph.values() if v.name not in ends)
    proto.value_info.extend(_info(v) for v in inner if v.type is not None or v.info is not None)
    for const in graph.constants.values() if constants else ():
        if isinstance(const.proto, SparseTensorProto):
            proto.sparse_initializer.append(const.proto)
            proto.sparse_initializer[-1].values.name = const.name
        else:
            own = with_data(const.proto, const.directory) if embed and is_external(const.proto) else const.proto
            proto.initializer.append(own)
            proto.initializer[-1].name = const.name
    return model


def _check_names(graph: Graph) -> None:
    known: dict[str, Tensor] = {}
    own: list[Tensor] = [*graph.values(), *graph.constants.values()]
    for tensor in own:
        if known.setdefault(tensor.name, tensor) is not tensor:
            raise PassError(f"two tensors are named '{tensor.name}'; a pass must take its names from Graph.fresh_name")
    for node in graph.nodes:
        for tensor in [*node.inputs, *node.captured]:
            if tensor.name and known.get(tensor.name) is not tensor:
                raise PassError(f"node '{node.label}' reads tensor '{tensor.name}', which is not part of the graph")
    for tensor in graph.outputs:
        if known.get(tensor.name) is not tensor:
            raise PassError(f"graph output '{tensor.name}' is not part of the graph; a pass lost the node that computes it")


def save_file(graph: Graph, path: Path) -> None:
    """Write beside `path` under a temporary name and rename, so that no half file is ever seen.

    Past protobuf's 2 GiB the constants go to `<path>.data`, renamed just before the model itself. Raises InputError.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: its folder does not exist; create it or choose another output")
    if path.is_dir():
        raise InputError(f"{path}: a folder; choose a file name for the output")
    data = path.with_name(path.name + ".data")
    light = write_model(graph, constants=False)
    sizes = {name: const.nbytes + 128 + len(name) for name, const in graph.constants.items()}
    streaming = light.ByteSize() + sum(sizes.values()) >= _PROTO_LIMIT
    if streaming:
        _refuse_own_data(graph, data)
    temporary = data_temporary = None
    try:
        temporary = _temporary(path)
        if streaming:
            data_temporary = _temporary(data)
            light.graph.initializer.extend(_stream(graph, data_temporary, data.name))
            sparse = (c.proto for c in graph.constants.values() if isinstance(c.proto, SparseTensorProto))
            light.graph.sparse_initializer.extend(sparse)
            temporary.write_bytes(light.SerializeToString(deterministic=True))
            os.replace(data_temporary, data)
        else:
            temporary.write_bytes(write_model(graph, embed=True).SerializeToString(deterministic=True))
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another output") from error
    finally:
        for left in (temporary, data_temporary):
            if left is not None:
                left.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    umask = os.umask(0)  # mkstemp makes files private; the result should be what open() would have made
    os.umask(umask)
    os.chmod(name, 0o666 & ~umask)
    return Path(name)


def _refuse_own_data(graph: Graph, data: Path) -> None:
    for const in graph.constants.values():
        if isinstance(const.proto, TensorProto) and is_external(const.proto):
            source = const.directory / location(const.proto)
            if source.resolve() == data.resolve():
                raise InputError(f"{data}: holds weights of the model being read; choose another output name")


def _stream(graph: Graph, data: Path, name: str) -> Iterator[TensorProto]:
    """Dense constants, those over 1 KiB written one by one into `data`, aligned to 4096 bytes as memory mapping wants."""
    with data.open("wb") as file:
        for const in graph.constants.values():
            if isinstance(const.proto, SparseTensorProto):
                continue
            proto = with_data(const.proto, const.directory) if is_external(const.proto) else const.proto
            if byte_size(proto) <= _INLINE_LIMIT or proto.data_type == TensorProto.STRING:
                own = TensorProto()
                own.CopyFrom(proto)
                own.name = const.name
                yield own
                continue
            raw = raw_bytes(proto)
            file.seek(-file.tell() % 4096, os.SEEK_CUR)
            light = TensorProto(name=const.name, data_type=proto.data_type, dims=proto.dims, doc_string=proto.doc_string)
            light.metadata_props.extend(proto.metadata_props)
            light.data_location = TensorProto.EXTERNAL
            for key, value in (("location", name), ("offset", file.tell()), ("length", len(raw))):
                light.external_data.add(key=key, value=str(value))
            file.write(raw)
            yield light


def infer_types(graph: Graph, embed_limit: int) -> None:
    """Run onnx's shape inference on the graph without its large constants and take the types over."""
    graph.sort()
    light = ModelProto()
    light.CopyFrom(graph.shell)
    proto = light.graph
    proto.node.extend(node_proto(n) for n in graph.nodes)
    proto.input.extend(_info(v) for v in graph.inputs)
    proto.output.extend(_info(v) for v in graph.outputs)
    for const in graph.constants.values():
        if not isinstance(const.proto, SparseTensorProto) and const.nbytes <= embed_limit:
            small = with_data(const.proto, const.directory) if is_external(const.proto) else const.proto
            proto.initializer.append(small)
        else:
            proto.input.append(helper.make_tensor_value_info(const.name, const.elem_type, const.dims))
    try:
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())
        raise ModelError(f"shape inference failed: {message}; check the model with onnx.checker") from error
    types = {i.name: i.type for i in inferred.value_info}
    ends = {o.name: o.type for o in inferred.output}
    for value in graph.values():
        found = types.get(value.name) or (ends.get(value.name) if value.type is None or value.dims is None else None)
        if found is not None:
            value.type = found


def forget_inner_types(graph: Graph) -> None:
    """Drop the types of inner tensors, which every runtime infers again: a small model's file is a third smaller without.

    Names that shape inference made up for dynamic dimensions also make onnxruntime 1.32 plan worse (5 % on a small transformer).
    """
    ends = {v.name for v in [*graph.inputs, *graph.outputs]}
    for value in graph.values():
        if value.name not in ends:
            value.type = value.info = None


def node_proto(node: Node) -> NodeProto:
    """One node as a proto of its own, its bodies included."""
    proto = NodeProto()
    if node.source is not None:
        proto.CopyFrom(node.source)
    proto.op_type = node.op
    if node.name != proto.name:
        proto.name = node.name
    if (node.domain or "") != proto.domain:
        proto.domain = node.domain or ""
    proto.input.extend(t.name for t in node.inputs)
    proto.output.extend(t.name for t in node.outputs)
    proto.attribute.extend(node.attrs.values())
    names = {old: t.name for old, t in zip(node.captured_as, node.captured, strict=False) if t.name != old}
    for body in node_bodies(proto.attribute) if names else ():
        rename_captures(body, names)
    return proto


def _info(value: Tensor) -> onnx.ValueInfoProto:
    info = onnx.ValueInfoProto()
    if value.info is not None:
        info.CopyFrom(value.info)
    info.name = value.name
    if isinstance(value, Value):
        if value.type is not None:
            info.type.CopyFrom(value.type)
    elif not info.HasField("type"):
        info.type.CopyFrom(helper.make_tensor_type_proto(value.elem_type, value.dims))
    return info


def _own(proto: _Proto, share: bool) -> _Proto:
    if share:
        return proto
    copy = type(proto)()
    copy.CopyFrom(proto)
    return copy
