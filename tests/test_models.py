"""The models that ship in `models/`: what they hold, how accurate they are, and that their data are kept apart."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qcompile.runtime import Array, Optimisation, Session

MODELS = Path(__file__).resolve().parents[1] / "models"
LEAST_ACCURACY = {"digits_cnn": 0.98, "digits_vit": 0.97}
NAMES = sorted(LEAST_ACCURACY)


def load(name: str) -> onnx.ModelProto:
    return onnx.load_model(MODELS / f"{name}.onnx", load_external_data=False)


def load_arrays(name: str) -> dict[str, Array]:
    with np.load(MODELS / name, allow_pickle=False) as file:
        return dict(file)


def nodes_of(model: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op_type]


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def constants(model: onnx.ModelProto) -> set[str]:
    """Names of initializers and of Constant outputs."""
    return {i.name for i in model.graph.initializer} | {n.output[0] for n in nodes_of(model, "Constant")}


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in model.graph.node for output in node.output}


def ancestors(model: onnx.ModelProto, tensor: str) -> set[str]:
    """All tensors that `tensor` is computed from, itself included."""
    made_by = producers(model)
    seen: set[str] = set()
    waiting = [tensor]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += made_by[name].input if name in made_by else []
    return seen


def residual_adds(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Adds of two activations of which one is computed from the other."""
    fixed = constants(model)
    return [
        node
        for node in nodes_of(model, "Add")
        if not fixed & set(node.input)
        and (node.input[0] in ancestors(model, node.input[1]) or node.input[1] in ancestors(model, node.input[0]))
    ]


def activation_matmuls(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """MatMuls of two activations: the two products of attention."""
    fixed = constants(model)
    return [node for node in nodes_of(model, "MatMul") if not fixed & set(node.input)]


@pytest.mark.parametrize("file", ["digits.npz", "digits_calib.npz", "digits_cnn.onnx", "digits_vit.onnx"])
def test_file_is_small(file: str) -> None:
    assert 0 < (MODELS / file).stat().st_size < 1_000_000


@pytest.mark.parametrize("name", NAMES)
def test_model_is_valid_and_whole(name: str) -> None:
    model = load(name)
    onnx.checker.check_model(model, full_check=True)
    assert all(i.data_location == onnx.TensorProto.DEFAULT for i in model.graph.initializer)
    assert all(np.isfinite(numpy_helper.to_array(i)).all() for i in model.graph.initializer)


@pytest.mark.parametrize("name", NAMES)
def test_interface(name: str) -> None:
    model = load(name)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    found = [
        (value.name, value.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim])
        for value in (*model.graph.input, *model.graph.output)
    ]
    assert found == [
        ("input", onnx.TensorProto.FLOAT, ["N", 1, 8, 8]),
        ("logits", onnx.TensorProto.FLOAT, ["N", 10]),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_no_trace_of_the_machine_it_was_made_on(name: str) -> None:
    model = load(name)
    items = (model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info)
    assert [item.doc_string for item in items if item.doc_string] == []
    assert [item.metadata_props for item in items if item.metadata_props] == []
    # In the raw bytes as well, so that no field is forgotten; node names such as /stem/Conv are no paths.
    assert re.findall(rb"site-packages|/home/|/root/|/tmp/|\.py\b", (MODELS / f"{name}.onnx").read_bytes()) == []


def test_cnn_keeps_a_batch_normalization_after_every_conv() -> None:
    model = load("digits_cnn")
    made_by = producers(model)
    norms = nodes_of(model, "BatchNormalization")
    assert [attribute(node, "training_mode", 0) for node in norms] == [0] * 5
    assert [made_by[node.input[0]].op_type for node in norms] == ["Conv"] * 5
    assert len(nodes_of(model, "Conv")) == 5


def test_cnn_batch_normalizations_do_something() -> None:
    # Identity statistics would make folding them a test of nothing.
    model = load("digits_cnn")
    values = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    for node in nodes_of(model, "BatchNormalization"):
        scale, shift, mean, variance = (values[name] for name in node.input[1:])
        assert min(np.std(v) for v in (scale, shift, mean, variance)) > 1e-4, node.name


def test_cnn_has_the_promised_blocks() -> None:
    model = load("digits_cnn")
    shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
    depthwise = [node for node in nodes_of(model, "Conv") if attribute(node, "group", 1) > 1]
    assert [(attribute(node, "group", 1), shapes[node.input[1]]) for node in depthwise] == [(32, (32, 1, 3, 3))]
    assert len(residual_adds(model)) == 1
    assert [len(nodes_of(model, op)) for op in ("Clip", "GlobalAveragePool", "Gemm")] == [1, 1, 1]


def test_vit_has_the_promised_blocks() -> None:
    model = load("digits_vit")
    blocks = 3
    assert len(nodes_of(model, "Conv")) == 1
    assert len(nodes_of(model, "LayerNormalization")) == 2 * blocks + 1
    assert len(nodes_of(model, "Erf")) == blocks
    assert len(residual_adds(model)) == 2 * blocks
    # Each Softmax lies between the two products of its attention.
    softmaxes = nodes_of(model, "Softmax")
    matmuls = activation_matmuls(model)
    assert (len(softmaxes), len(matmuls)) == (blocks, 2 * blocks)
    for node in softmaxes:
        assert any(node.input[0] in product.output for product in matmuls)
        assert any(node.output[0] in product.input for product in matmuls)


@pytest.mark.parametrize("level", [Optimisation.OFF, Optimisation.ALL], ids=lambda level: level.name.lower())
@pytest.mark.parametrize("name", NAMES)
def test_held_out_accuracy(name: str, level: Optimisation) -> None:
    data = load_arrays("digits.npz")
    session = Session(MODELS / f"{name}.onnx", optimisation=level, threads=1, label=name)
    logits = session.run({"input": data["input"]})["logits"]
    assert np.isfinite(logits).all()
    assert np.mean(logits.argmax(axis=1) == data["labels"]) >= LEAST_ACCURACY[name]


@pytest.mark.parametrize("name", NAMES)
def test_batch_is_dynamic(name: str) -> None:
    samples = load_arrays("digits_calib.npz")["input"][:5]
    session = Session(MODELS / f"{name}.onnx", threads=1, label=name)
    together = session.run({"input": samples})["logits"]
    alone = np.concatenate([session.run({"input": sample[None]})["logits"] for sample in samples])
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-4)


def test_data_shapes_and_values() -> None:
    data = load_arrays("digits.npz")
    assert {key: (value.shape, value.dtype.name) for key, value in data.items()} == {
        "input": ((500, 1, 8, 8), "float32"),
        "labels": ((500,), "int64"),
        "calib_input": ((200, 1, 8, 8), "float32"),
    }
    for key in ("input", "calib_input"):
        sixteenths = data[key] * 16
        assert np.array_equal(sixteenths, np.round(sixteenths))
        assert (sixteenths.min(), sixteenths.max()) == (0, 16)


def test_held_out_classes_are_balanced() -> None:
    counts = np.bincount(load_arrays("digits.npz")["labels"], minlength=10)
    assert len(counts) == 10
    # scikit-learn's digits have 174 to 183 of each class, so 500 of 1797 hold 48.4 to 50.9 of each.
    assert 48 <= counts.min() <= counts.max() <= 51


def test_calibration_samples_are_not_held_out_samples() -> None:
    data = load_arrays("digits.npz")
    held_out = {sample.tobytes() for sample in data["input"]}
    calibration = {sample.tobytes() for sample in data["calib_input"]}
    assert (len(held_out), len(calibration)) == (500, 200)
    assert not held_out & calibration


def test_calibration_file_holds_the_same_samples() -> None:
    calibration = load_arrays("digits_calib.npz")
    assert list(calibration) == ["input"]
    assert np.array_equal(calibration["input"], load_arrays("digits.npz")["calib_input"])


def test_samples_and_labels_are_scikit_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn (the `train` extra)")
    pixels, targets = datasets.load_digits(return_X_y=True)
    label_of = {row.tobytes(): int(label) for row, label in zip(pixels.astype(np.uint8), targets, strict=True)}
    data = load_arrays("digits.npz")
    rows = (data["input"].reshape(-1, 64) * 16).astype(np.uint8)
    assert [label_of[row.tobytes()] for row in rows] == data["labels"].tolist()
    calibration = (data["calib_input"].reshape(-1, 64) * 16).astype(np.uint8)
    assert all(row.tobytes() in label_of for row in calibration)
