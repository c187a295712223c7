"""The reference: runs an emitted model in plain numpy integers, reading every scale from the file.

It shares no code with the passes that wrote the file. A DequantizeLinear is not computed but remembered; Conv, Gemm,
MatMul, Add, Mul and GlobalAveragePool of remembered values give exact integer results, which the next
QuantizeLinear rescales by b/2^c (or by p/q) in integers. QLinear operators and integer operators run as they stand.
Anything else runs in float32, one node at a time, and is named in `Interpreter.float_nodes`: exactness ends there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper

from qcompile.dyadic import Array
from qcompile.errors import InputError, ModelError, QcompileError
from qcompile.interpret_integers import (
    INTEGER_OPS,
    REDUCTIONS,
    cast,
    clip,
    conv_integer,
    is_integer,
    matmul_integer,
    reduce_integers,
)
from qcompile.interpret_linear import COMPUTE, QLINEAR, params_of
from qcompile.interpret_movement import MOVEMENTS, pad
from qcompile.interpret_nodes import SingleNodeRunner, Step, steps_of
from qcompile.interpret_values import INTEGERS, Linear, Pending, Quantised, QuantParams, Value

_MICROSOFT = "com.microsoft"
# Linear operators whose float result is still exact: the runtime ends them in fl(acc) * fl(Sx*Sw). Conv does not.
_EXACT_FLOAT_END = ("Gemm", "MatMul")


class Interpreter:
    """A model file, run in integers.

    `strict` (default) refuses a rescale that is not exact; otherwise it is rounded in float32 as onnxruntime on x86
    rounds it, and its node is listed in `float_nodes`. Raises ModelError where the model cannot be read.
    """

    def __init__(self, model: onnx.ModelProto | str | Path, *, strict: bool = True) -> None:
        self._model = load(model)
        self._strict = strict
        self._steps = steps_of(self._model)
        if self._model.graph.sparse_initializer:
            raise ModelError("sparse initializers are not supported: write them out as dense ones")
        self._constants = {t.name: _array(t) for t in self._model.graph.initializer}
        self._runner = SingleNodeRunner(self._model)
        inputs = [i for i in self._model.graph.input if i.name not in self._constants]
        self._inputs = {i.name: i for i in inputs}
        self._static = self._static_names()
        self._lapsed: set[str] = set()
        self.output_names: list[str] = [o.name for o in self._model.graph.output]
        self.float_nodes: list[str] = []

    @property
    def input_names(self) -> list[str]:
        """Names of the graph inputs that must be fed."""
        return list(self._inputs)

    def run(self, feeds: Mapping[str, Array], outputs: Iterable[str] | None = None) -> dict[str, Array]:
        """Run once; returns {name: array} of all graph outputs, or of the tensors named in `outputs`.

        Afterwards `float_nodes` names the nodes of this run that were computed in float. Raises InputError for
        wrong feeds or names, ModelError (naming the node) for a model that cannot be run exactly.
        """
        wanted = self.output_names if outputs is None else list(outputs)
        self._check_feeds(feeds)
        self.float_nodes, self._lapsed = [], set()
        values: dict[str, Value] = {**self._constants, **{k: np.asarray(v) for k, v in feeds.items()}}
        uses = Counter(name for step in self._steps for name in step.inputs if name)
        uses.update(wanted)
        with np.errstate(over="ignore"):  # integer tensors wrap around in their type, as in the runtime
            for step in self._steps:
                try:
                    results = self._execute(step, [values[n] if n else None for n in step.inputs])
                except KeyError as error:
                    raise step.error(f"the tensor or attribute {error.args[0]!r} is not there") from error
                except QcompileError as error:
                    if step.name in str(error):
                        raise
                    raise type(error)(f"node {step.name} ({step.op}): {error}") from error
                # numpy makes scalars of 0-d results; they must stay arrays of their type
                kept = (v if isinstance(v, Quantised | Pending) else np.asarray(v) for v in results)
                values.update((n, v) for n, v in zip(step.outputs, kept, strict=False) if n)
                for name in step.inputs:
                    uses[name] -= 1
                    if uses[name] == 0 and name not in self._constants:
                        values.pop(name, None)
        missing = [name for name in wanted if name not in values]
        if missing:
            raise InputError(f"the model has no tensor {missing[0]!r}")
        return {name: self._plain(values[name]) for name in wanted}

    def _check_feeds(self, feeds: Mapping[str, Array]) -> None:
        for name, info in self._inputs.items():
            if name not in feeds:
                raise InputError(f"input {name!r} is not fed; the model needs {self.input_names}")
            expected = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            if np.asarray(feeds[name]).dtype != expected:
                raise InputError(f"input {name!r} is {np.asarray(feeds[name]).dtype}, the model takes {expected}")
        known = {i.name for i in self._model.graph.input}
        for name in feeds:
            if name not in known:
                raise InputError(f"{name!r} is not an input of the model, which has {self.input_names}")

    def _static_names(self) -> set[str]:
        """Tensors that depend on no graph input: what computes them is no float work at run time."""
        static = set(self._constants)
        for step in self._steps:
            if all(not n or n in static for n in step.inputs):
                static.update(step.outputs)
        return static

    def _execute(self, step: Step, inputs: list[Value | None]) -> list[Value]:
        op = step.op
        if op in ("QuantizeLinear", "DequantizeLinear") and step.domain in ("", _MICROSOFT):
            return [self._quantize(step, inputs) if op == "QuantizeLinear" else self._dequantize(step, inputs)]
        if (step.domain, op) in QLINEAR:
            result, exact = QLINEAR[step.domain, op](step, [self._array(step, v) for v in inputs], self._strict)
            if not exact:
                self._record(step.name)
            return [result]
        if step.domain == "":
            for method in (self._compute, self._clamp, self._move, self._join, self._integer):
                results = method(step, inputs)
                if results is not None:
                    return results
        return self._run_float(step, inputs)

    # --- the two ends of a quantised tensor -----------------------------------------------------------------

    def _params(self, step: Step, inputs: list[Value | None], dtype: np.dtype[Any]) -> QuantParams:
        scale = self._array(step, inputs[1])
        zero = self._array(step, inputs[2]) if len(inputs) > 2 else None
        if scale is None:
            raise step.error("its scale is missing")
        return params_of(step, scale, zero, step.attributes.get("axis", 1), dtype)

    def _quantize(self, step: Step, inputs: list[Value | None]) -> Value:
        x = inputs[0]
        if len(inputs) > 2 and inputs[2] is not None:
            dtype = self._plain(inputs[2]).dtype
        else:
            declared = step.attributes.get("output_dtype", 0)
            dtype = np.dtype(np.uint8) if not declared else helper.tensor_dtype_to_np_dtype(declared)
        if dtype not in INTEGERS or step.attributes.get("block_size", 0):
            return self._run_float(step, inputs)[0]
        params = self._params(step, inputs, dtype)
        if isinstance(x, Quantised) and x.params.same_grid(params):
            return x.data  # |q - zp| < 2^16: (q - zp)*S / S rounds back to q - zp
        if isinstance(x, Pending) and (isinstance(x, Linear) or params.axis is None):
            result, exact = x.requantize(params, self._strict)
            if not exact:
                self._record(x.node)
            return result
        if isinstance(x, Quantised | Pending):
            self._record(step.name)
            return params.quantize(self._plain(x))
        if x is None or is_integer(x):
            raise step.error("its input is not a float tensor")
        if step.inputs[0] in self._lapsed:
            self._record(step.name)
        return params.quantize(x)

    def _dequantize(self, step: Step, inputs: list[Value | None]) -> Value:
        data = self._array(step, inputs[0])
        if data is None:
            raise step.error("its input is missing")
        if data.dtype in INTEGERS and not step.attributes.get("block_size", 0):
            return Quantised(data, self._params(step, inputs, data.dtype))
        if data.dtype.name not in ("int4", "uint4"):
            return self._run_float(step, inputs)[0]
        # 4-bit weights straight into DequantizeLinear: the runtime computes with their float values.
        scale = self._array(step, inputs[1])
        zero = self._array(step, inputs[2]) if len(inputs) > 2 else None
        axis, block = step.attributes.get("axis", 1), step.attributes.get("block_size", 0)
        if scale is None:
            raise step.error("its scale is missing")

        def shaped(v: Array) -> Array:
            if block and v.ndim == data.ndim:
                return np.repeat(v, block, axis).take(np.arange(data.shape[axis]), axis)
            return v.reshape([-1 if i == axis % data.ndim else 1 for i in range(data.ndim)]) if v.ndim else v

        integers = data.astype(np.int32) - (0 if zero is None else shaped(zero.astype(np.int32)))
        return np.asarray(integers.astype(np.float32) * shaped(np.asarray(scale, np.float32)))

    # --- operators, each returns None where it does not apply ------------------------------------------------

    def _compute(self, step: Step, inputs: list[Value | None]) -> list[Value] | None:
        if step.op not in COMPUTE:
            return None
        quantised = [v if isinstance(v, Quantised) else None for v in inputs]
        if any(q is None and v is not None for q, v in zip(quantised, inputs, strict=True)):
            return None
        result = COMPUTE[step.op](step, quantised)
        return None if result is None else [result]

    def _clamp(self, step: Step, inputs: list[Value | None]) -> list[Value] | None:
        if step.op not in ("Relu", "Clip"):
            return None
        x = inputs[0]
        bounds = [self._array(step, v) for v in (*inputs[1:], None, None)[:2]]
        if isinstance(x, Quantised | Pending):
            attributes = [step.attributes.get(a) for a in ("min", "max")]
            low, high = (
                None if b is None and a is None else np.float32(a if b is None else b)
                for b, a in zip(bounds, attributes, strict=True)
            )
            if step.op == "Relu":
                low, high = np.float32(0), None
            if isinstance(x, Pending):
                return [x.clip(low, high)]
            if step.op == "Relu" and x.params.axis is None:
                return [Quantised(np.maximum(x.data, x.params.zero_point), x.params)]
            return None
        return [clip(x, *bounds)] if step.op == "Clip" and x is not None and is_integer(x) else None

    def _move(self, step: Step, inputs: list[Value | None]) -> list[Value] | None:
        if step.op == "Shape" and inputs[0] is not None:
            start, end = step.attributes.get("start", 0), step.attributes.get("end")
            return [np.asarray(_shape(inputs[0])[start:end], np.int64)]
        movable = step.op in MOVEMENTS or step.op == "Pad"
        if not movable or step.attributes.get("mode", b"nearest") in (b"linear", b"cubic"):
            return None
        x = inputs[0]
        others = [self._array(step, v) for v in inputs[1:]]
        quantised = isinstance(x, Quantised) and (x.params.axis is None or step.op == "Transpose")
        data = x.data if isinstance(x, Quantised) and quantised else self._array(step, x)
        if data is None:
            raise step.error("its input is missing")
        if step.op == "Pad":
            fill = others[1] if len(others) > 1 else None
            value = np.asarray(step.attributes.get("value", 0.0) if fill is None else fill).reshape(())
            if isinstance(x, Quantised) and quantised:
                stored = x.params.quantize(value)
                if Quantised(stored, x.params).to_float() != value:  # the constant lies off the grid
                    data, quantised = x.to_float(), False
                else:
                    value = stored
            results = [pad(step, data, others, value)]
        else:
            results = MOVEMENTS[step.op](step, data, others)
        if isinstance(x, Quantised) and quantised:
            return [Quantised(r, _moved(step, x)) for r in results]
        if not isinstance(x, np.ndarray) or step.inputs[0] in self._lapsed:
            self._lapsed.update(step.outputs)
        return list(results)

    def _join(self, step: Step, inputs: list[Value | None]) -> list[Value] | None:
        """Concat, and Max/Min: on one grid they act on the integers."""
        if step.op not in ("Concat", "Max", "Min"):
            return None
        first = inputs[0]
        quantised = [v for v in inputs if isinstance(v, Quantised)]
        shared = len(quantised) == len(inputs) and all(v.params.same_grid(quantised[0].params) for v in quantised)
        if step.op == "Concat":
            arrays = [v.data for v in quantised] if shared else [self._need(step, v) for v in inputs]
            joined = np.concatenate(arrays, axis=step.attributes["axis"])
            if not shared and any(
                not isinstance(v, np.ndarray) or n in self._lapsed for n, v in zip(step.inputs, inputs, strict=True)
            ):
                self._lapsed.update(step.outputs)
        elif shared and isinstance(first, Quantised):
            function = np.maximum if step.op == "Max" else np.minimum
            joined = first.data
            for other in quantised[1:]:
                joined = function(joined, other.data)
        else:
            return None
        return [Quantised(joined, quantised[0].params) if shared else joined]

    def _integer(self, step: Step, inputs: list[Value | None]) -> list[Value] | None:
        present = [v for v in inputs if v is not None]
        arrays = [v for v in present if isinstance(v, np.ndarray)]
        if len(arrays) != len(present) or not arrays:
            return None
        positional = [v if isinstance(v, np.ndarray) else None for v in inputs]
        if step.op == "MatMulInteger":
            return [matmul_integer(step, positional)]
        if step.op == "ConvInteger":
            return [conv_integer(step, positional)]
        if step.op == "Cast":
            result = cast(step, arrays[0])
            return None if result is None else [result]
        if not all(is_integer(a) for a in arrays):
            return None
        if step.op in REDUCTIONS:
            return [reduce_integers(step, arrays[0], positional[1] if len(positional) > 1 else None)]
        return [INTEGER_OPS[step.op](step, arrays)] if step.op in INTEGER_OPS else None

    def _run_float(self, step: Step, inputs: list[Value | None]) -> list[Value]:
        """One node in onnxruntime, on float values."""
        results = self._runner.run(step, [self._array(step, v) for v in inputs])
        static = all(not n or n in self._static for n in step.inputs)
        values = [v for v in (*inputs, *results) if v is not None]
        if not static and any(not isinstance(v, np.ndarray) or v.dtype.kind == "f" for v in values):
            self._record(step.name)
        return list(results)

    # --- values ----------------------------------------------------------------------------------------------

    def _array(self, step: Step, value: Value | None) -> Array | None:
        return None if value is None else self._plain(value)

    def _need(self, step: Step, value: Value | None) -> Array:
        if value is None:
            raise step.error("an input is missing")
        return self._plain(value)

    def _plain(self, value: Value) -> Array:
        """A plain tensor; a pending result that the runtime ends in float arithmetic is recorded."""
        if isinstance(value, np.ndarray):
            return value
        if isinstance(value, Pending) and not (isinstance(value, Linear) and value.op in _EXACT_FLOAT_END):
            self._record(value.node)
        return value.to_float()

    def _record(self, name: str) -> None:
        if name not in self.float_nodes:
            self.float_nodes.append(name)


def load(model: onnx.ModelProto | str | Path) -> onnx.ModelProto:
    """The model with its functions inlined (a ModelProto given is not changed). Raises ModelError."""
    if not isinstance(model, onnx.ModelProto):
        try:
            model = onnx.load(str(model))
        except (OSError, DecodeError, onnx.checker.ValidationError) as error:
            raise ModelError(f"{model}: cannot be read as an ONNX model: {' '.join(str(error).split())}") from error
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def _array(tensor: onnx.TensorProto) -> Array:
    return np.asarray(numpy_helper.to_array(tensor))


def _shape(value: Value) -> tuple[int, ...]:
    if isinstance(value, np.ndarray):
        return value.shape
    return value.data.shape if isinstance(value, Quantised) else value.to_float().shape


def _moved(step: Step, x: Quantised) -> QuantParams:
    """Parameters after a movement: only Transpose moves a per-axis scale."""
    params = x.params
    if params.axis is None:
        return params
    perm = step.attributes.get("perm") or list(reversed(range(x.data.ndim)))
    return QuantParams(params.scale, params.zero_point, params.dtype, list(perm).index(params.axis % x.data.ndim))
