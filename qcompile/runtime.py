"""onnxruntime sessions: the one place that creates them, so that threads, levels and logging are the same everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from qcompile.errors import ModelError

Array: TypeAlias = npt.NDArray[Any]
Feeds: TypeAlias = Mapping[str, Array]


class Optimisation(Enum):
    """Graph optimisation level of a session, as onnxruntime names them."""

    OFF = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    BASIC = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    EXTENDED = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ALL = ort.GraphOptimizationLevel.ORT_ENABLE_ALL


class Session:
    """One model loaded in onnxruntime on the CPU.

    `model` is a path (external data is found beside it), serialised bytes or a ModelProto under 2 GiB.
    `fuse_qdq=False` runs Q/DQ as the float arithmetic that it spells: an unfinished Q/DQ graph (float weights) must not be
    quantised further by onnxruntime, which would round those weights per tensor.
    `profile`: what the name of a profile begins with; `end_profile` gives the whole name.
    Raises ModelError, naming `label`, where onnxruntime refuses the model.
    """

    def __init__(
        self,
        model: str | Path | bytes | onnx.ModelProto,
        *,
        optimisation: Optimisation = Optimisation.ALL,
        threads: int = 0,
        label: str = "model",
        optimised_path: str | Path | None = None,
        fuse_qdq: bool = True,
        profile: str | Path | None = None,
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = optimisation.value
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        if not fuse_qdq:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        if optimised_path is not None:
            options.optimized_model_filepath = str(optimised_path)
        source: str | bytes
        if isinstance(model, onnx.ModelProto):
            source = model.SerializeToString()
        elif isinstance(model, bytes):
            source = model
        else:
            source = str(model)
        try:
            self._session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a dozen pybind types with no common base but Exception
            raise ModelError(f"{label}: onnxruntime cannot load it: {_one_line(error)}") from error
        self._label = label
        self.input_names: list[str] = [i.name for i in self._session.get_inputs()]
        self.output_names: list[str] = [o.name for o in self._session.get_outputs()]

    def run(self, feeds: Feeds, outputs: Iterable[str] | None = None) -> dict[str, Array]:
        """Run on one feed; returns {output name: array}. Raises ModelError with onnxruntime's own words on failure."""
        names = self.output_names if outputs is None else list(outputs)
        try:
            values = self._session.run(names, dict(feeds))
        except Exception as error:
            raise ModelError(f"{self._label}: onnxruntime failed to run it: {_one_line(error)}") from error
        return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}

    def end_profile(self) -> Path:
        """Close the profile; its JSON file."""
        return Path(self._session.end_profiling())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


@cache
def runs_signed_conv_integer() -> bool:
    """Whether this onnxruntime has ConvInteger for uint8 inputs and int8 weights: 1.23 has not, 1.32 has."""
    x, w = (helper.make_tensor_value_info(n, t, [1, 1, 1, 1]) for n, t in (("x", TensorProto.UINT8), ("w", TensorProto.INT8)))
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [1, 1, 1, 1])
    graph = helper.make_graph([helper.make_node("ConvInteger", ["x", "w"], ["y"])], "probe", [x, w], [y])
    try:
        Session(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)]), label="probe")
    except ModelError:
        return False
    return True
