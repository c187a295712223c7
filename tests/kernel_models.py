"""A model that is one call of a kernel, run in onnxruntime, in onnx's own evaluator and in the interpreter."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, inliner
from onnx.reference import ReferenceEvaluator

from qcompile.interpret import Interpreter
from qcompile.kernels._protocol import OPSET, Array, Kernel
from qcompile.runtime import Optimisation, Session

LEVELS = (Optimisation.OFF, Optimisation.ALL)


def model_with(kernel: Kernel, x: Array) -> ModelProto:
    """One input `x` of that type and rank, one output `y`."""
    kind = kernel.reference(x).dtype
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), [None] * x.ndim)
        for name, dtype in (("x", x.dtype), ("y", kind))
    ]
    constants = [onnx.numpy_helper.from_array(v, k) for k, v in kernel.constants().items()]
    graph = helper.make_graph([kernel.node(["x"], ["y"])], "kernel", infos[:1], infos[1:], constants)
    opsets = [helper.make_opsetid(d, v) for d, v in (("", OPSET), ("qcompile", 1), ("com.microsoft", 1))]
    model = helper.make_model(graph, opset_imports=opsets, functions=[kernel.lower()], ir_version=10)
    onnx.checker.check_model(model)
    return model


def assert_lowered_equals_reference(kernel: Kernel, x: Array) -> None:
    """Bit for bit, type included, with graph optimisation off and on."""
    expected = kernel.reference(x)
    model = model_with(kernel, x)
    for level in LEVELS:
        got = Session(model, optimisation=level, threads=1).run({"x": x})["y"]
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected, err_msg=f"{kernel.name}, {level.name}")


def assert_other_evaluators_agree(kernel: Kernel, x: Array) -> None:
    """onnx.reference and the project's interpreter: in numpy integers, where a value that wraps would show."""
    expected, model = kernel.reference(x), model_with(kernel, x)
    np.testing.assert_array_equal(np.asarray(ReferenceEvaluator(model).run(None, {"x": x})[0]), expected)
    interpreter = Interpreter(model)
    np.testing.assert_array_equal(interpreter.run({"x": x})["y"], expected)
    assert interpreter.float_nodes == []


def element_types(kernel: Kernel, x: Array) -> set[int]:
    """The types of all tensors that the kernel computes (not its literals), by onnx's inference on the inlined model."""
    model = onnx.shape_inference.infer_shapes(inliner.inline_local_functions(model_with(kernel, x)), strict_mode=True)
    made = {name for node in model.graph.node if node.op_type != "Constant" for name in node.output}
    typed = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    return {typed[name] for name in made}


def widest_int32(kernel: Kernel, x: Array) -> dict[str, int]:
    """max(v, -1 - v) of every int32 value v inside the kernel, computed with all of them in int64: below 2^31 if none wraps."""
    inlined = onnx.shape_inference.infer_shapes(inliner.inline_local_functions(model_with(kernel, x)), strict_mode=True)
    narrow = [v.name for v in inlined.graph.value_info if v.type.tensor_type.elem_type == TensorProto.INT32]
    model = inliner.inline_local_functions(model_with(kernel, x))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.INT32:
                attribute.i = TensorProto.INT64
            if attribute.HasField("t") and attribute.t.data_type == TensorProto.INT32:
                attribute.t.CopyFrom(_as_int64(attribute.t))
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT32:
            tensor.CopyFrom(_as_int64(tensor))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in narrow)
    values = ReferenceEvaluator(model).run(None, {"x": x.astype(np.int64)})
    assert all(np.asarray(v).dtype == np.int64 for v in values)
    return {name: int(np.maximum(v, -1 - np.asarray(v)).max(initial=0)) for name, v in zip(narrow, values, strict=True)}


def _as_int64(tensor: TensorProto) -> TensorProto:
    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.int64), tensor.name)


def masked_keys_do_not_count(plain: Kernel, masked: Kernel, row: list[int], keep: Array) -> Array:
    """Asserts that `masked` gives 0 where `keep` is not set, else what `plain` makes of the kept keys alone; what it gives."""
    scores = np.array(row, np.int32)
    got = masked.reference(scores[None], keep[None])[0]
    assert not got[~keep].any()
    if keep.any():
        np.testing.assert_array_equal(got[keep], plain.reference(scores[keep][None])[0])
    return got
