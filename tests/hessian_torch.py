"""The exact trace and top eigenvalue of a network's Hessian by torch's double backward: an oracle for the estimates. Only for the
few operators of digits_cnn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from qcompile.compilation import open_data
from qcompile.context import Settings
from qcompile.cut_layer import LayerSpec
from qcompile.eigenvalue import top_eigenvalue
from qcompile.executors import workers
from qcompile.graph import Const, Graph, Node
from qcompile.hessian import traces
from qcompile.load import load_model
from qcompile.probing import Study
from qcompile.survey import survey

_SAMPLES = 8
_ROWS = 128
_LARGEST = 2100  # weights of a layer whose whole Hessian is made


def digits_traces(models: Path, loss: str = "kl") -> dict[str, tuple[float, float]]:
    """{layer: (estimate, exact)} of digits_cnn."""
    study = _study(models, loss)
    with workers(study) as pool:
        estimates = traces(pool, len(study.layers), tolerance=0.05, most=1024)
    result = {}
    for spec, estimate in zip(study.layers, estimates, strict=True):
        assert estimate is not None
        total = 0.0
        for index, rows in _hessian(study, spec):
            total += float(rows[torch.arange(len(index)), index].sum())
        result[spec.node] = (estimate.trace, total)
    return result


def digits_eigenvalues(models: Path) -> dict[str, tuple[float, float]]:
    """{layer: (by power iteration, of the exact Hessian)} of digits_cnn's smaller layers."""
    study = _study(models, "kl")
    result = {}
    for place, spec in enumerate(study.layers):
        if spec.weights <= _LARGEST:
            whole = torch.cat([rows for _, rows in _hessian(study, spec)])
            result[spec.node] = (top_eigenvalue(study, place).value, float(torch.linalg.eigvalsh(whole)[-1]))
    return result


def _study(models: Path, loss: str) -> Study:
    settings = Settings()
    loaded = load_model(models / "digits_cnn.onnx")
    given = open_data(loaded, str(models / "digits.npz"), None, None, None, settings)
    return survey(loaded, settings, given, samples=_SAMPLES, loss=loss).study


def _hessian(study: Study, spec: LayerSpec) -> Iterator[tuple[Any, Any]]:
    """(indices, their rows) of the Hessian of the cross-entropy by a layer's weights."""
    labels = torch.tensor([int(label) for label in study.labels])  # type: ignore[arg-type]
    x = torch.tensor(np.concatenate([f["input"] for f in study.feeds]), dtype=torch.float64)
    weight = torch.tensor(study.graph.constants[spec.weight].array(), dtype=torch.float64, requires_grad=True)
    logits = _run(study.graph, x, {spec.weight: weight})
    (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, labels), weight, create_graph=True)
    size = weight.numel()
    for start in range(0, size, _ROWS):
        index = torch.arange(start, min(start + _ROWS, size))
        basis = torch.zeros(len(index), size, dtype=torch.float64)
        basis[torch.arange(len(index)), index] = 1
        (rows,) = torch.autograd.grad(gradient.reshape(-1), weight, basis, retain_graph=True, is_grads_batched=True)
        yield index, rows.reshape(len(index), -1)


def _run(graph: Graph, x: Any, moved: dict[str, Any]) -> Any:
    values: dict[str, Any] = {graph.inputs[0].name: x}
    for node in graph.nodes:
        inputs = [_value(t, values, moved) for t in node.inputs]
        values[node.outputs[0].name] = _apply(node, inputs)
    return values[graph.outputs[0].name]


def _value(tensor: Any, values: dict[str, Any], moved: dict[str, Any]) -> Any:
    if tensor.name in moved:
        return moved[tensor.name]
    if isinstance(tensor, Const):
        array = tensor.array()
        return torch.tensor(array, dtype=torch.float64) if array.dtype.kind == "f" else torch.tensor(array)
    return values.get(tensor.name)


def _apply(node: Node, x: list[Any]) -> Any:
    if node.op == "Conv":
        pads = node.attr("pads", [0, 0, 0, 0])
        padded = functional.pad(x[0], (pads[1], pads[3], pads[0], pads[2]))
        return functional.conv2d(padded, x[1], x[2], tuple(node.attr("strides", [1, 1])), 0, 1, node.attr("group", 1))
    if node.op == "Gemm":
        return x[0] @ (x[1].T if node.attr("transB", 0) else x[1]) + x[2]
    if node.op == "Pad":
        begin, end = x[1].tolist()[: x[0].ndim], x[1].tolist()[x[0].ndim :]
        return functional.pad(x[0], [p for pair in zip(begin[::-1], end[::-1], strict=True) for p in pair])
    simple = {
        "Relu": lambda: torch.relu(x[0]),
        "Clip": lambda: torch.clamp(x[0], float(x[1]), float(x[2])),
        "Add": lambda: x[0] + x[1],
        "GlobalAveragePool": lambda: x[0].mean(dim=(2, 3), keepdim=True),
        "Flatten": lambda: x[0].flatten(1),
    }
    return simple[node.op]()
