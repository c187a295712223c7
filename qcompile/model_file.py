"""A model file read as it is: the proto without its external data, and the names of its nodes."""

from __future__ import annotations

from pathlib import Path

import onnx

from qcompile.errors import ModelError


def read_model(path: str | Path) -> onnx.ModelProto:
    """The model without its external data. Raises ModelError where the file is missing or is no ONNX model."""
    try:
        return onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); give the path of an ONNX file") from error
    except Exception as error:  # protobuf's DecodeError differs between its implementations
        raise ModelError(f"{path}: is not an ONNX model, or is cut off; export it again") from error


def list_nodes(path: str | Path) -> list[tuple[str, str, str]]:
    """(name, operator type, first output) of each node of the main graph, in the file's order. Raises ModelError."""
    return [(n.name, n.op_type, next(iter(n.output), "")) for n in read_model(path).graph.node]
