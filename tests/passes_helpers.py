"""What every test of a float pass does: run it, then judge the result by onnx's checker and by onnxruntime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from qcompile.context import Context, Settings
from qcompile.graph import Array, Graph
from qcompile.rewrite import Close, Exact, Pass, Report
from qcompile.runtime import Optimisation, Session

HEADER = '<ir_version: 10, opset_import: ["" : {opset}]>\n'


#: What of a Context keeps passes from deciding by measured errors.
UNMEASURED = [
    pytest.param({"synthetic": True}, id="synthetic"),
    pytest.param({"settings": Settings(effort="fast")}, id="fast"),
    pytest.param({"samples": []}, id="no samples"),
]


def parse(text: str, opset: int = 21, **constants: Array) -> ModelProto:
    """A model from onnx's text form without its header; `constants` become initializers."""
    model = onnx.parser.parse_model(HEADER.format(opset=opset) + text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    return model


def check_pass(
    pass_: Pass, model: ModelProto, feeds: Mapping[str, Array] | Sequence[Mapping[str, Array]] = ()
) -> tuple[Report, Graph]:
    """Run `pass_`; asserts a valid model, the same ends, the promise (optimisation off and on) and an idle second run."""
    graph = Graph.from_proto(model)
    report = pass_.run(graph, Context())
    result = graph.to_proto()
    onnx.checker.check_model(result, full_check=True)
    assert [i.name for i in result.graph.input] == [i.name for i in model.graph.input]
    assert [o.name for o in result.graph.output] == [o.name for o in model.graph.output]
    for level in (Optimisation.OFF, Optimisation.ALL):
        before, after = Session(model, optimisation=level), Session(result, optimisation=level)
        for feed in [feeds] if isinstance(feeds, Mapping) else feeds:
            expected, got = before.run(feed), after.run(feed)
            for name, value in expected.items():
                assert got[name].dtype == value.dtype
                assert got[name].shape == value.shape
                if isinstance(pass_.keeps, Exact) and level is Optimisation.OFF:
                    assert got[name].tobytes() == value.tobytes(), f"{name} is not the same bit for bit"
                elif value.dtype.kind == "f":
                    assert isinstance(pass_.keeps, Exact | Close)
                    scale = float(np.abs(value).max(initial=1e-30))
                    np.testing.assert_allclose(got[name], value, rtol=0, atol=5e-6 * scale, err_msg=name)
                else:
                    np.testing.assert_array_equal(got[name], value)
    assert pass_.run(graph, Context()).rewrites == 0, "a second run rewrote something"
    return report, graph


def ops(graph: Graph) -> dict[str, int]:
    """How many nodes of each operator."""
    return dict(Counter(n.op for n in graph.nodes))


def floats(*shape: int, seed: int = 0) -> Array:
    """Standard normal float32 numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
