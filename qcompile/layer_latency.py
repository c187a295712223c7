"""How long single layers take on this machine, in integers and in float: what a latency limit is judged by before compiling.

Each layer runs as a model of its own on its real input, in integers as DequantizeLinear -> node -> QuantizeLinear, which
onnxruntime fuses; both forms of all layers are timed in turn. Narrow weights run as int8: widths below 8 take the same time.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from qcompile.cut_layer import CutLayer, LayerSpec
from qcompile.graph import Array
from qcompile.graph_io import node_proto
from qcompile.latency import measure_latency
from qcompile.planner import LayerTimes
from qcompile.probing import Study
from qcompile.runtime import Feeds

_ROUNDS = 5
_SLOT = 0.004


def measure_layers(study: Study) -> LayerTimes:
    """Times of every layer on the study's first sample (tables count nothing), and of the whole float model, on one thread."""
    models: list[ModelProto] = []
    feeds: list[Feeds] = []
    linear = [s for s in study.layers if s.kind == "linear"]
    for spec in linear:
        layer = CutLayer(study.graph, spec, study.feeds[:1])
        for quantised in (False, True):
            models.append(_model(study, layer, spec, quantised=quantised))
            feeds.append({"x": _integers(layer.inputs[0]) if quantised else layer.inputs[0]})
    models.append(ModelProto.FromString(study.model))
    feeds.append(study.feeds[0])
    median = measure_latency(models, feeds, rounds=_ROUNDS, slot_seconds=_SLOT).median_ms
    times = {s.node: (median[2 * i + 1], median[2 * i]) for i, s in enumerate(linear)}
    both = [times.get(s.node, (0.0, 0.0)) for s in study.layers]
    return LayerTimes(tuple(a for a, _ in both), tuple(b for _, b in both), median[-1])


def _integers(x: Array) -> Array:
    return np.asarray(np.clip(np.rint(x / _scale(x)) + 128, 0, 255).astype(np.uint8))


def _scale(x: Array) -> Array:
    return np.array(max(float(np.abs(x).max(initial=0)), 1e-6) / 127, np.float32)


def _model(study: Study, layer: CutLayer, spec: LayerSpec, *, quantised: bool) -> ModelProto:
    """x -> the layer -> y, with float or uint8 ends."""
    proto = node_proto(layer.node)
    x, w, b = layer.inputs[0], layer.weight, layer.bias
    constants: dict[str, Array] = {}
    nodes = []
    shape = list(x.shape)
    if not quantised:
        constants["w"] = w
        inputs = ["x", "w"]
        if b is not None:
            constants["b"] = b
            inputs.append("b")
        proto_inputs = inputs
    else:
        step = np.full(spec.channels, max(float(np.abs(w).max(initial=0)), 1e-6) / 127, np.float32)
        sizes = [1] * w.ndim
        sizes[spec.axis] = -1
        constants |= {"xs": _scale(x), "xz": np.array(128, np.uint8), "ws": step, "wz": np.zeros(spec.channels, np.int8)}
        constants["w"] = np.rint(w / step.reshape(sizes)).astype(np.int8)
        constants |= {"ys": np.array(_output_scale(x, w), np.float32), "yz": np.array(128, np.uint8)}
        nodes.append(helper.make_node("DequantizeLinear", ["x", "xs", "xz"], ["xd"]))
        nodes.append(helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=spec.axis))
        proto_inputs = ["xd", "wd"]
        if b is not None:
            scale = constants["xs"] * step
            constants |= {"bs": scale, "bz": np.zeros(spec.channels, np.int32)}
            constants["b"] = np.clip(np.rint(b.reshape(-1) / scale), -(2**30), 2**30).astype(np.int32)
            nodes.append(helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], axis=0))
            proto_inputs.append("bd")
    del proto.input[:], proto.output[:]
    proto.input.extend(proto_inputs)
    proto.output.append("y0" if quantised else "y")
    nodes.append(proto)
    if quantised:
        nodes.append(helper.make_node("QuantizeLinear", ["y0", "ys", "yz"], ["y"]))
    kind = TensorProto.UINT8 if quantised else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=list(study.graph.shell.opset_import))


def _output_scale(x: Array, w: Array) -> float:
    """Any scale of the right order: the time does not depend on it."""
    width = w.size / max(w.shape[0], 1)
    return max(float(np.abs(x).mean()) * float(np.abs(w).mean()) * float(np.sqrt(width)), 1e-6) / 32
