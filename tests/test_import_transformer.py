"""Transformers with Q/DQ around every operator, as onnxruntime's static quantiser writes them, leave in integers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
from core_models import sqnr
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from passes_helpers import parse
from runtime_marks import needs_conv_integer
from wide_models import Spec, outputs, samples, transformer

from qcompile.certificate import certify
from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph
from qcompile.interpret import Interpreter
from qcompile.passes.lower_wide import LowerWide
from qcompile.passes.wide_units import WideUnits
from qcompile.pipeline import compile_model
from qcompile.plan import Plan
from qcompile.runtime import Optimisation, Session

SPECS = {
    "gelu": Spec(blocks=1),
    "written-out erf": Spec(function="erf", blocks=1),
    "silu": Spec(function="silu", pool="mean", blocks=1),
    "any length": Spec(length=None, blocks=1),
}


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: list[dict[str, Array]]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> dict[str, Array] | None:
        return next(self.feeds, None)


@cache
def files(name: str) -> tuple[onnx.ModelProto, dict[str, onnx.ModelProto], dict[str, Any]]:
    """(what onnxruntime's quantiser wrote, its imports by format, the report of the integer one)."""
    spec = SPECS[name]
    with TemporaryDirectory() as folder:
        ready, source = Path(folder) / "ready.onnx", Path(folder) / "source.onnx"
        onnx.save(transformer(spec), ready)
        quant_pre_process(ready, ready, skip_symbolic_shape=True)
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(ready, source, _Reader(samples(spec, 40)), per_channel=True, **kinds)
        made, report = {}, {}
        for form in ("qdq", "qoperator", "integer"):
            compiled = compile_model(source, Path(folder) / f"{form}.onnx", format=form, target="vnni", progress=None)
            made[form], report = onnx.load(compiled.path), compiled.report
        return onnx.load(source), made, report


@needs_conv_integer
@pytest.mark.parametrize("name", list(SPECS))
def test_the_same_bits_in_integers_and_near_the_source(name: str) -> None:
    source, made, report = files(name)
    held_out = samples(SPECS[name], 40, seed=9)
    assert certify(made["integer"]).integer_only and report["integer_only"]["holds"]
    interpreter = Interpreter(made["integer"])
    expected = outputs(interpreter, list(held_out))
    assert interpreter.float_nodes == []
    assert len({float(v) for y in expected for v in y.ravel()}) > 9, "the outputs tell the inputs apart"
    for form in ("integer", "qoperator"):
        onnx.checker.check_model(made[form], full_check=True)
        for level in (Optimisation.OFF, Optimisation.ALL):
            for want, got in zip(expected, outputs(Session(made[form], optimisation=level), list(held_out)), strict=True):
                np.testing.assert_array_equal(got, want)
    float_outputs = outputs(Session(transformer(SPECS[name])), list(held_out))
    from_source = sqnr(float_outputs, outputs(Session(source), list(held_out)))
    from_import = sqnr(float_outputs, outputs(Session(made["qdq"]), list(held_out)))
    assert sqnr(float_outputs, expected) > min(from_source, from_import) - 1.5


def test_the_step_of_a_sum_has_room_for_what_comes_from_eight_bits() -> None:
    """x of 8 bits reaches 255 * 2; the constants are thousands of times smaller: their step must not decide alone."""
    model = parse(
        """g (float[2, 4] x) => (float[2, 4] y) {
            q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) total = Add(d, c)
            r = QuantizeLinear(total, s, z) y = DequantizeLinear(r, s, z) }""",
        s=np.float32(2),
        z=np.uint8(0),
        c=np.array([0.001, 0.002, 0.003, 0.004], np.float32),
    )
    graph, context = Graph.from_proto(model), Context(Settings(format="integer"))
    context.plan = Plan()
    WideUnits().run(graph, context)
    assert LowerWide().run(graph, context).rewrites >= 1
    x = np.arange(0, 512, 64, dtype=np.float32).reshape(2, 4)
    for level in (Optimisation.OFF, Optimisation.ALL):
        np.testing.assert_array_equal(Session(graph.to_proto(), optimisation=level).run({"x": x})["y"], x)
