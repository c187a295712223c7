"""What every kernel of the registry promises: the lowering equals the reference bit for bit, the reference is near the oracle."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from kernel_cases import CASES, Case
from kernel_models import evaluate, feeds_of, model_of
from onnx import ModelProto, TensorProto, inliner
from runtime_marks import needs_empty_products

from qcompile.graph import Graph
from qcompile.kernels import KERNELS
from qcompile.kernels._protocol import Array
from qcompile.runtime import Optimisation, Session
from qcompile.sessions import graph_session

every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
standard_cases = pytest.mark.parametrize(
    "case", [c for c in CASES.values() if not c.runtime_only], ids=[k for k, c in CASES.items() if not c.runtime_only]
)
INTEGERS = {getattr(TensorProto, name) for name in ("INT8", "UINT8", "INT16", "UINT16", "INT32", "UINT32", "INT64", "BOOL")}


def test_every_kernel_is_tried() -> None:
    assert {type(case.kernel) for case in CASES.values()} == set(KERNELS)
    assert len(set(KERNELS)) == len(KERNELS)


@every_case
@pytest.mark.parametrize("level", [Optimisation.OFF, Optimisation.ALL], ids=["off", "on"])
def test_lowered_equals_reference(case: Case, level: Optimisation) -> None:
    sessions: dict[tuple[int, ...], Session] = {}
    for inputs in case.inputs():
        ranks = tuple(value.ndim for value in inputs)
        if ranks not in sessions:
            sessions[ranks] = Session(model_of(case.kernel, inputs), optimisation=level, threads=1)
        expected = case.kernel.reference(*inputs)
        got = sessions[ranks].run(feeds_of(inputs))["y"]
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


@standard_cases
def test_lowered_equals_reference_in_onnx_own_evaluator(case: Case) -> None:
    for inputs in case.inputs():
        few = tuple(value[:50] for value in inputs)
        np.testing.assert_array_equal(evaluate(model_of(case.kernel, few), few), case.kernel.reference(*few))


@every_case
def test_reference_is_within_tolerance_of_the_oracle(case: Case) -> None:
    worst = 0.0
    for inputs in case.inputs():
        real, oracle = case.kernel.real(case.kernel.reference(*inputs)), case.kernel.oracle(*inputs)
        assert real.shape == oracle.shape
        worst = max(worst, float(np.abs(real - oracle).max(initial=0)))
    assert worst <= case.kernel.tolerance
    assert worst >= case.kernel.tolerance / case.slack, "a tolerance that wide would let a wrong kernel through"


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=k, marks=needs_empty_products if c.row_sums else ()) for k, c in CASES.items()]
)
def test_no_rows_give_no_rows(case: Case) -> None:
    inputs = tuple(value[:0] for value in case.inputs()[0])
    for level in (Optimisation.OFF, Optimisation.ALL):
        got = Session(model_of(case.kernel, inputs), optimisation=level, threads=1).run(feeds_of(inputs))["y"]
        np.testing.assert_array_equal(got, case.kernel.reference(*inputs))


@standard_cases
def test_the_body_is_valid_and_integer(case: Case) -> None:
    """Written out, with full shape inference, every tensor has an integer type, and int64 serves what the case allows."""
    model = model_of(case.kernel, case.inputs()[0])
    onnx.checker.check_model(model, full_check=True)
    flat = onnx.shape_inference.infer_shapes(inliner.inline_local_functions(model), strict_mode=True)
    onnx.checker.check_model(flat, full_check=True)
    assert not flat.functions
    types = {info.name: info.type.tensor_type.elem_type for info in [*flat.graph.value_info, *flat.graph.output]}
    assert {name for node in flat.graph.node for name in node.output} <= set(types)
    assert set(types.values()) <= INTEGERS
    wide = {node.op_type for node in flat.graph.node for name in node.output if types[name] == TensorProto.INT64}
    assert wide <= case.long_ops


def test_kernels_of_one_name_share_one_body() -> None:
    bodies: dict[str, bytes] = {}
    for case in CASES.values():
        body = case.kernel.lower().SerializeToString(deterministic=True)
        assert bodies.setdefault(case.kernel.name, body) == body
    assert len(bodies) > len(KERNELS)


@every_case
def test_one_body_one_set_of_attributes(case: Case) -> None:
    function = case.kernel.lower()
    assert function.name == case.kernel.name
    assert list(function.attribute) == list(case.kernel.attributes())
    assert list(function.input)[len(function.input) - len(case.kernel.constants()) :] == list(case.kernel.constants())


@every_case
def test_the_graph_layer_writes_it_out(case: Case) -> None:
    """Loading inlines functions: the attributes of each call must arrive in its body."""
    inputs = tuple(value[:50] for value in case.inputs()[0])
    graph = Graph.from_proto(model_of(case.kernel, inputs))
    assert {node.domain for node in graph.nodes} == ({"", "com.microsoft"} if case.runtime_only else {""})
    got = graph_session(graph, threads=1).run(feeds_of(inputs))["y"]
    np.testing.assert_array_equal(got, case.kernel.reference(*inputs))


def test_two_calls_of_one_function_keep_their_own_scales() -> None:
    """The function stands once in the file; the nodes differ by their attributes."""
    first, second = CASES["IGelu 0.03"].kernel, CASES["IGelu 0.1"].kernel
    x = np.arange(-200, 200, dtype=np.int32)
    model = model_of(first, [x])
    model.graph.node.append(second.node(["in0"], ["z"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", TensorProto.INT32, [None]))
    _same(model, x, first.reference(x), second.reference(x))


def _same(model: ModelProto, x: Array, y: Array, z: Array) -> None:
    for level in (Optimisation.OFF, Optimisation.ALL):
        got = Session(model, optimisation=level, threads=1).run({"in0": x})
        np.testing.assert_array_equal(got["y"], y)
        np.testing.assert_array_equal(got["z"], z)
