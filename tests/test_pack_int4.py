"""INT4 storage: the same integers, half the bytes, the same fused kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from int4_files import unpacked
from onnx import TensorProto

from qcompile import compile_model
from qcompile.audit import audit
from qcompile.interpret import Interpreter
from qcompile.runtime import Optimisation, Session

MODELS = Path(__file__).resolve().parents[1] / "models"


@pytest.fixture(scope="module", params=["qdq", "qoperator"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int4") / f"{request.param}.onnx"
    compile_model(
        MODELS / "digits_cnn.onnx",
        path,
        bits=4,
        format=request.param,
        data=str(MODELS / "digits_calib.npz"),
        latency=False,
    )
    return path


def test_every_weight_is_packed_and_runs_in_an_integer_kernel(packed: Path) -> None:
    model = onnx.load(packed)
    int4 = [i for i in model.graph.initializer if i.data_type == TensorProto.INT4]
    assert len(int4) == 6
    assert all(len(i.raw_data) == (int(np.prod(i.dims)) + 1) // 2 for i in int4)
    assert not [i for i in model.graph.initializer if i.data_type == TensorProto.INT8 and len(i.dims) > 1]
    audited = audit(packed)
    assert audited.not_fused == []
    assert audited.float_weight_bytes == 0


def test_same_bits_as_the_same_integers_in_int8_and_as_the_interpreter(packed: Path) -> None:
    model = onnx.load(packed)
    plain, four, reference = Session(unpacked(model)), Session(packed), Interpreter(packed)
    images = np.load(MODELS / "digits.npz")["input"][:20]
    for image in images:
        feed = {"input": image[None]}
        expected = reference.run(feed)["logits"]
        assert np.array_equal(four.run(feed)["logits"], expected)
        assert np.array_equal(plain.run(feed)["logits"], expected)
    if "qoperator" in packed.name:
        off = Session(packed, optimisation=Optimisation.OFF)
        assert np.array_equal(off.run({"input": images[:1]})["logits"], four.run({"input": images[:1]})["logits"])


def test_learned_rounding_gains_two_decibels(tmp_path: Path) -> None:
    reports = {
        effort: compile_model(
            MODELS / "digits_cnn.onnx",
            tmp_path / f"{effort}.onnx",
            bits=4,
            effort=effort,
            data=str(MODELS / "digits_calib.npz"),
            eval_data=str(MODELS / "digits.npz"),
            latency=False,
        ).report
        for effort in ("fast", "default")
    }
    assert reports["default"]["accuracy"]["sqnr_db"] >= reports["fast"]["accuracy"]["sqnr_db"] + 2
    assert reports["default"]["size_bytes"]["quantised"] < 0.25 * reports["default"]["size_bytes"]["float"]
