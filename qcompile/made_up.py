"""No data given: which way to quantise all the same, and the inputs that are made up for it.

- dynamic: models of matrix products (or of tokens) quantise their activations at run time; made-up inputs serve checks only;
- synthetic: static ranges from BatchNormalization statistics and made-up inputs;
- weight-only files need no ranges: their made-up inputs serve checks only;
- imported models hold their own scales: made-up inputs, as wide as those say, serve checks only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from onnx import TensorProto

from qcompile.context import Settings
from qcompile.data import Dataset
from qcompile.errors import InputError
from qcompile.graph import Graph
from qcompile.import_read import EIGHT_BIT, read
from qcompile.input_statistics import input_moments, vocabularies
from qcompile.samples import InputInfo
from qcompile.synthetic import DEVIATIONS, InputMoments, needs_vocabulary, synthetic_dataset

SAMPLES = 32
_MOMENT_SAMPLES = 8
_DYNAMIC_TARGETS = ("any", "wasm", "vnni", "arm")


@dataclass(frozen=True)
class MadeUp:
    """kind: synthetic | dynamic; what was made up, and what the user must be told."""

    kind: str
    dataset: Dataset
    warnings: tuple[str, ...]


def make_up(graph: Graph, inputs: Sequence[InputInfo], settings: Settings) -> MadeUp:
    """Choose the way without data and make the inputs up. `graph` is the model as loaded; it is not changed.

    Raises InputError where the format or target needs static ranges and an input holds tokens, or where ranges are to be
    percentiles; DataError where an input cannot be made up.
    """
    if settings.weight_only is not None:
        made_up = synthetic_dataset(inputs, SAMPLES, settings.seed, vocabularies=vocabularies(graph))
        warning = "no --data: 4-bit weights are rounded to nearest; give samples for second-order rounding"
        return MadeUp("synthetic", made_up, (warning,))
    if settings.ranges == "percentile":
        raise InputError("--ranges percentile: percentiles of made-up inputs mean nothing; give --data")
    dynamic_offered = settings.format == "qdq" and settings.target in _DYNAMIC_TARGETS
    tokens = next((i.name for i in inputs if needs_vocabulary(i)), None)
    if tokens is not None and not dynamic_offered:
        option = f"--format {settings.format}" if settings.format != "qdq" else f"--target {settings.target}"
        raise InputError(
            f"input '{tokens}': {option} needs static ranges, which made-up tokens cannot give; give --data, or use --format qdq"
            + ("" if settings.format != "qdq" else " --target any")
        )
    if dynamic_offered and (tokens is not None or is_matrix_model(graph)):
        dataset = synthetic_dataset(inputs, SAMPLES, settings.seed, vocabularies=vocabularies(graph))
        return MadeUp("dynamic", dataset, ("no --data: activations are quantised at run time; give samples for static ranges",))
    unit = synthetic_dataset(inputs, SAMPLES, settings.seed)
    moments = input_moments(graph, [s.feeds for s in islice(unit, _MOMENT_SAMPLES)])
    told = any(n.op == "BatchNormalization" for n in graph.nodes)
    source = "BatchNormalization statistics and synthetic inputs" if told else "synthetic inputs alone"
    warnings = [f"no --data: ranges come from {source}; give representative samples for the best accuracy"]
    unknown = [i.name for i in inputs if i.name not in moments]
    if unknown:
        names = ", ".join(f"'{n}'" for n in unknown)
        warnings.append(f"no --data: mean 0 and deviation 1 are assumed for input {names}; where they differ much, give --data")
    return MadeUp("synthetic", synthetic_dataset(inputs, SAMPLES, settings.seed, moments=moments), tuple(warnings))


def make_up_for_import(graph: Graph, inputs: Sequence[InputInfo], settings: Settings) -> MadeUp:
    """Inputs to compare an imported Q/DQ model with its result on. Float inputs fill the range of their own QuantizeLinear.

    Raises DataError where an input cannot be made up.
    """
    moments, sizes = {}, vocabularies(graph)
    for value in graph.inputs:
        for node in value.consumers:
            if node.op == "DequantizeLinear" and value.elem_type in (TensorProto.UINT8, TensorProto.INT8):
                sizes[value.name] = 256 if value.elem_type == TensorProto.UINT8 else 128
            elif node.op == "QuantizeLinear" and node.constant(1) is not None and node.constant(2) is not None:
                found = read(node)
                if found.per_tensor and found.elem_type in EIGHT_BIT:
                    low, high = found.mark().bounds
                    moments[value.name] = InputMoments(np.array([(low + high) / 2]), (high - low) / (2 * DEVIATIONS))
    made_up = synthetic_dataset(inputs, SAMPLES, settings.seed, moments=moments, vocabularies=sizes)
    return MadeUp("imported", made_up, ("no --data and no --eval: the result was compared on made-up inputs; give real ones",))


def is_matrix_model(graph: Graph) -> bool:
    """Whether products with constant matrices outnumber convolutions more than two to one, as in transformers."""
    products = sum(n.op in ("MatMul", "Gemm") and n.constant(1) is not None for n in graph.nodes)
    convolutions = sum(n.op in ("Conv", "ConvTranspose") for n in graph.nodes)
    return products > 2 * convolutions
