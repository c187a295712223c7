"""Between ModelProto and Graph: reading, writing, copying, shape inference. Nothing is lost that a proto can hold."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TypeVar

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper

from qcompile.errors import InputError, ModelError
from qcompile.graph import Const, Graph, Node, Tensor, Value, body_captures
from qcompile.tensors import byte_size, is_external, with_data

_Proto = TypeVar("_Proto", TensorProto, SparseTensorProto, AttributeProto)
_PROTO_LIMIT = 2**31 - 2**20  # protobuf refuses messages of 2 GiB; one MiB is left for the graph itself


def load_file(path: Path) -> Graph:
    """Read an ONNX file without its external data."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give the path of an ONNX model")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise ModelError(f"{path}: not an ONNX model, or truncated ({error}); export or download it again") from error
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise ModelError(f"{path}: not an ONNX model: it has no graph; export or download it again")
    return read_model(model, path.resolve().parent, share=True)


def read_model(model: ModelProto, directory: Path, share: bool = False) -> Graph:
    """Link `model`. With `share` its protos are used as they are (the caller gives the model up)."""
    if model.functions:
        import onnx.inliner

        model = onnx.inliner.inline_local_functions(model)
        share = True
    proto = model.graph
    shell = ModelProto()
    for field, value in model.ListFields():
        if field.name in ("graph", "functions"):
            continue
        if field.name in ("opset_import", "metadata_props", "training_info", "configuration"):
            getattr(shell, field.name).extend(value)
        else:
            setattr(shell, field.name, value)
    shell.graph.name = proto.name
    shell.graph.doc_string = proto.doc_string
    shell.graph.metadata_props.extend(proto.metadata_props)
    shell.graph.quantization_annotation.extend(proto.quantization_annotation)

    shell.ir_version = max(shell.ir_version, 4)  # before IR 4 every initializer had to be listed as an input too

    graph = Graph(shell)
    tensors: dict[str, Tensor] = {}
    for dense in proto.initializer:
        tensors[dense.name] = graph.constants[dense.name] = Const(dense.name, _own(dense, share), directory)
    for sparse in proto.sparse_initializer:
        name = sparse.values.name
        tensors[name] = graph.constants[name] = Const(name, _own(sparse, share), directory)
    infos = {info.name: info for info in [*proto.value_info, *proto.output]}
    for info in proto.input:
        if info.name in tensors:
            continue  # IR 3 lists initializers as inputs
        value = Value(info.name, info.type)
        value.info = info
        tensors[info.name] = value
        graph.inputs.append(value)

    def tensor(name: str) -> Tensor:
        if name == "":
            return Value("")
        if name not in tensors:
            value = Value(name)
            if name in infos:
                value.info = infos[name]
                value.type = infos[name].type
            tensors[name] = value
        return tensors[name]

    for source in proto.node:
        outputs: list[Value] = []
        for name in source.output:
            made = tensor(name)
            if isinstance(made, Const) or made.inputs:
                raise ModelError(f"tensor '{name}' is written twice (node '{source.name}'); the model is not valid ONNX")
            outputs.append(made)
        attrs = {a.name: _own(a, share) for a in source.attribute}
        rest = NodeProto()
        rest.CopyFrom(source) if not share else rest.MergeFrom(source)
        del rest.input[:], rest.output[:], rest.attribute[:]
        node = Node(
            source.op_type,
            source.name,
            [tensor(n) for n in source.input],
            outputs,
            source.domain,
            attrs,
            rest,
        )
        for attribute in attrs.values():
            bodies = [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
            for body in bodies:
                node.captured += [tensor(n) for n in sorted(body_captures(body))]
                graph.reserve(_names(body))
        graph.nodes.append(node)
    graph.outputs = [tensor(o.name) for o in proto.output]
    for value, info in zip(graph.outputs, proto.output, strict=True):
        if isinstance(value, Value) and value.type is None:
            value.type, value.info = info.type, info
    graph.reserve(tensors)
    graph.reserve(n.name for n in graph.nodes)
    return graph


def write_model(graph: Graph, share: bool = False) -> ModelProto:
    """The whole model as one proto. `share` is for a proto that is read back at once."""
    graph.sort()
    model = ModelProto()
    model.CopyFrom(graph.shell)
    imports = sorted(model.opset_import, key=lambda o: o.domain)
    del model.opset_import[:]
    model.opset_import.extend(imports)
    proto = model.graph
    proto.node.extend(_node(n) for n in graph.nodes)
    proto.input.extend(_info(v) for v in graph.inputs)
    proto.output.extend(_info(v) for v in graph.outputs)
    ends = {t.name for t in [*graph.inputs, *graph.outputs]}
    proto.value_info.extend(_info(v) for v in graph.values() if v.name not in ends and v.type is not None)
    for const in graph.constants.values():
        if isinstance(const.proto, SparseTensorProto):
            proto.sparse_initializer.append(const.proto)
        else:
            proto.initializer.append(const.proto)
    return model


def save_file(graph: Graph, path: Path) -> None:
    """Write beside `path` under a temporary name and rename, so that no half file is ever seen."""
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: its folder does not exist; create it or choose another output")
    total = sum(c.nbytes for c in graph.constants.values())
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another output") from error
    os.close(handle)
    temporary = Path(name)
    data = path.with_name(path.name + ".data")
    data_temporary = temporary.with_suffix(".data")
    try:
        if total < _PROTO_LIMIT:
            model = write_model(graph)
            _embed(graph, model)
            temporary.write_bytes(model.SerializeToString(deterministic=True))
        else:
            _save_streaming(graph, temporary, data_temporary, data.name)
            os.replace(data_temporary, data)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another output") from error
    finally:
        temporary.unlink(missing_ok=True)
        data_temporary.unlink(missing_ok=True)


def _embed(graph: Graph, model: ModelProto) -> None:
    for index, dense in enumerate(model.graph.initializer):
        if is_external(dense):
            model.graph.initializer[index].CopyFrom(with_data(dense, graph.constants[dense.name].directory))


def _save_streaming(graph: Graph, path: Path, data: Path, location: str) -> None:
    """Constants over 1 KiB go one by one into `data`, aligned to 4096 bytes as onnxruntime's memory mapping wants."""
    original = {name: const.proto for name, const in graph.constants.items()}
    try:
        with data.open("wb") as file:
            for const in graph.constants.values():
                if isinstance(const.proto, SparseTensorProto) or byte_size(const.proto) <= 1024:
                    continue
                proto = with_data(const.proto, const.directory) if is_external(const.proto) else const.proto
                raw = proto.raw_data or onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(proto)).raw_data
                file.seek(-file.tell() % 4096, os.SEEK_CUR)
                light = TensorProto(name=proto.name, data_type=proto.data_type, dims=proto.dims)
                light.data_location = TensorProto.EXTERNAL
                for key, value in (
                    ("location", location),
                    ("offset", str(file.tell())),
                    ("length", str(len(raw))),
                ):
                    light.external_data.add(key=key, value=value)
                file.write(raw)
                const.proto = light
        path.write_bytes(write_model(graph).SerializeToString(deterministic=True))
    finally:
        for name, proto in original.items():
            graph.constants[name].proto = proto


def infer_types(graph: Graph, embed_limit: int) -> None:
    """Run onnx's shape inference on the graph without its large constants and take the types over."""
    graph.sort()
    light = ModelProto()
    light.CopyFrom(graph.shell)
    proto = light.graph
    proto.node.extend(_node(n) for n in graph.nodes)
    proto.input.extend(_info(v) for v in graph.inputs)
    proto.output.extend(_info(v) for v in graph.outputs)
    for const in graph.constants.values():
        if not isinstance(const.proto, SparseTensorProto) and const.nbytes <= embed_limit:
            small = with_data(const.proto, const.directory) if is_external(const.proto) else const.proto
            proto.initializer.append(small)
        else:
            proto.input.append(helper.make_tensor_value_info(const.name, const.elem_type, const.dims))
    inferred = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    types = {i.name: i.type for i in inferred.value_info}
    ends = {o.name: o.type for o in inferred.output}
    for value in graph.values():
        found = types.get(value.name) or (ends.get(value.name) if value.type is None or value.dims is None else None)
        if found is not None:
            value.type = found


def _node(node: Node) -> NodeProto:
    proto = NodeProto()
    if node.source is not None:
        proto.CopyFrom(node.source)
    proto.op_type, proto.name = node.op, node.name
    if node.domain:
        proto.domain = node.domain
    else:
        proto.ClearField("domain")
    proto.input.extend(t.name for t in node.inputs)
    proto.output.extend(t.name for t in node.outputs)
    proto.attribute.extend(node.attrs.values())
    return proto


def _info(value: Tensor) -> onnx.ValueInfoProto:
    if isinstance(value, Const):
        return helper.make_tensor_value_info(value.name, value.elem_type, value.dims)
    info = onnx.ValueInfoProto()
    if value.info is not None:
        info.CopyFrom(value.info)
    info.name = value.name
    if value.type is not None:
        info.type.CopyFrom(value.type)
    return info


def _names(body: GraphProto) -> set[str]:
    names = {i.name for i in [*body.input, *body.initializer]}
    for node in body.node:
        names.update(node.output)
        names.add(node.name)
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                names |= _names(inner)
    return names


def _own(proto: _Proto, share: bool) -> _Proto:
    if share:
        return proto
    copy = type(proto)()
    copy.CopyFrom(proto)
    return copy
