"""A model that is one call of a kernel, run in onnxruntime, in onnx's own evaluator and in the interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, inliner
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from qcompile.interpret import Interpreter
from qcompile.kernels._protocol import OPSET, Array, Kernel
from qcompile.runtime import Optimisation, Session

LEVELS = (Optimisation.OFF, Optimisation.ALL)


def model_of(kernel: Kernel, inputs: Sequence[Array]) -> ModelProto:
    """A model that is one call of the kernel: inputs of any size, the kernel's constants as initializers."""
    names = [f"in{i}" for i in range(len(inputs))]
    constants = kernel.constants()
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
        for name, value in zip(names, inputs, strict=True)
    ]
    kind = kernel.reference(*inputs).dtype
    rank = max(value.ndim for value in inputs)
    made = helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(kind), [None] * rank)
    graph = helper.make_graph(
        [kernel.node(names, ["y"])], "kernel", given, [made], [onnx.numpy_helper.from_array(v, k) for k, v in constants.items()]
    )
    function = kernel.lower()
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(function.domain, 1)]
    opsets += [o for o in function.opset_import if o.domain not in ("", function.domain)]
    return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)


def feeds_of(inputs: Sequence[Array]) -> dict[str, Array]:
    """The inputs by the names that `model_of` gives them."""
    return {f"in{i}": value for i, value in enumerate(inputs)}


class GatherElements(OpRun):
    """onnx's own evaluator gives up beyond 32 entries."""

    op_domain = ""

    def _run(self, data: Array, indices: Array, axis: int | None = None) -> tuple[Array]:
        return (np.take_along_axis(data, indices, axis=0 if axis is None else axis),)


def evaluate(model: ModelProto, inputs: Sequence[Array]) -> Array:
    """The output by onnx's reference evaluator; look-ups are written out first, as functions do not see `new_ops`."""
    if any(node.op_type == "GatherElements" for node in model.functions[0].node):
        model = inliner.inline_local_functions(model)
    result = ReferenceEvaluator(model, new_ops=None if model.functions else [GatherElements]).run(None, feeds_of(inputs))
    return np.asarray(result[0])


def assert_lowered_equals_reference(kernel: Kernel, x: Array) -> None:
    """Bit for bit, type included, with graph optimisation off and on."""
    expected = kernel.reference(x)
    model = model_of(kernel, [x])
    for level in LEVELS:
        got = Session(model, optimisation=level, threads=1).run(feeds_of([x]))["y"]
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected, err_msg=f"{kernel.name}, {level.name}")


def assert_other_evaluators_agree(kernel: Kernel, x: Array) -> None:
    """onnx.reference and the project's interpreter: in numpy integers, where a value that wraps would show."""
    expected, model = kernel.reference(x), model_of(kernel, [x])
    np.testing.assert_array_equal(evaluate(model, [x]), expected)
    interpreter = Interpreter(model)
    np.testing.assert_array_equal(interpreter.run(feeds_of([x]))["y"], expected)
    assert interpreter.float_nodes == []


def element_types(kernel: Kernel, x: Array) -> set[int]:
    """The types of all tensors that the kernel computes (not its literals), by onnx's inference on the inlined model."""
    model = onnx.shape_inference.infer_shapes(inliner.inline_local_functions(model_of(kernel, [x])), strict_mode=True)
    made = {name for node in model.graph.node if node.op_type != "Constant" for name in node.output}
    typed = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    return {typed[name] for name in made}


def widest_int32(kernel: Kernel, x: Array) -> dict[str, int]:
    """max(v, -1 - v) of every int32 value v inside the kernel, computed with all of them in int64: below 2^31 if none wraps."""
    inlined = onnx.shape_inference.infer_shapes(inliner.inline_local_functions(model_of(kernel, [x])), strict_mode=True)
    narrow = [v.name for v in inlined.graph.value_info if v.type.tensor_type.elem_type == TensorProto.INT32]
    model = inliner.inline_local_functions(model_of(kernel, [x]))
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
    values = ReferenceEvaluator(model).run(None, feeds_of([x.astype(np.int64)]))
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
