"""All models of the onnx package's backend tests through the graph layer: nothing is lost, and they run as before."""

from __future__ import annotations

import pytest
from backend_cases import CHUNKS, all_cases, chunk, equal, outcome
from onnx import ModelProto

from qcompile.graph import Graph

# Operators that draw random numbers without a seed give other values on every run.
RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"}


def normal_form(model: ModelProto) -> ModelProto:
    """What the graph layer promises to change and nothing else: order of imports, IR at least 4, IR 3's inputs."""
    model = _copy(model)
    model.ir_version = max(model.ir_version, 4)
    imports = sorted(model.opset_import, key=lambda entry: entry.domain)
    del model.opset_import[:]
    model.opset_import.extend(imports)
    fixed = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in fixed]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return model


def _copy(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def random_nodes(model: ModelProto) -> bool:
    return any(node.op_type in RANDOM for node in model.graph.node)


def test_there_are_as_many_models_as_the_package_promises() -> None:
    assert len(all_cases()) >= 1500


@pytest.mark.parametrize("index", range(CHUNKS))
def test_written_proto_equals_the_one_read(index: int) -> None:
    lost = [
        c.name for c in chunk(index) if not c.model.functions and Graph.from_proto(c.model).to_proto() != normal_form(c.model)
    ]
    assert lost == []


@pytest.mark.parametrize("index", range(CHUNKS))
def test_copy_writes_the_same_bytes(index: int) -> None:
    for case in chunk(index):
        graph = Graph.from_proto(case.model)
        expected = graph.to_proto().SerializeToString(deterministic=True)
        assert graph.copy().to_proto().SerializeToString(deterministic=True) == expected, case.name


@pytest.mark.parametrize("index", range(CHUNKS))
def test_onnxruntime_gives_the_same_outputs(index: int) -> None:
    for case in chunk(index):
        before = outcome(case.model, case.inputs)
        after = outcome(Graph.from_proto(case.model).to_proto(), case.inputs)
        assert after.stage == before.stage, case.name
        if not random_nodes(case.model):
            assert equal(before.values, after.values), case.name


@pytest.mark.parametrize("index", range(CHUNKS))
def test_cleanup_and_shape_inference_keep_the_outputs(index: int) -> None:
    for case in chunk(index)[::4]:
        before = outcome(case.model, case.inputs)
        if before.stage != "done" or random_nodes(case.model):
            continue
        graph = Graph.from_proto(case.model)
        graph.cleanup()
        graph.infer_shapes()
        after = outcome(graph.to_proto(), case.inputs)
        assert after.stage == "done", case.name
        assert equal(before.values, after.values), case.name
