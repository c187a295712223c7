"""Options checked before any work: values, combinations, and where the output goes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from qcompile.context import FLOAT_BITS, WIDTHS, Settings, WeightOnly, matches
from qcompile.criteria import CRITERIA
from qcompile.errors import InputError
from qcompile.options_activations import FLOAT
from qcompile.options_sparsity import check_float

CHOICES: dict[str, tuple[str, ...]] = {
    "format": ("qdq", "qoperator", "integer"),
    "target": ("any", "wasm", "vnni", "arm", "tensorrt"),
    "ranges": ("mse", "minmax", "percentile"),
    "effort": ("fast", "default", "best"),
    "inputs_as": ("float32", "uint8"),
    "io": ("float", "integer"),
    "criterion": tuple(CRITERIA),
    "sparsity_scope": ("layer", "global"),
    "sparse_storage": ("compressed", "dense"),
    "kernels": ("table", "ibert"),
}
BLOCKS = (32, 64, 128)
SPELLINGS = ("matmulnbits", "portable")


def check_settings(settings: Settings, max_drop: float | None, has_evaluation: bool, min_agreement: float | None = None) -> None:
    """Raise InputError for a value that is not offered, or options that cannot go together."""
    if settings.bits not in (*WIDTHS, FLOAT_BITS):
        widths = ", ".join(map(str, WIDTHS[::-1]))
        raise InputError(f"--bits {settings.bits}: weights have {widths} bits, or 32 for float; use one of them")
    if settings.bits == FLOAT_BITS:
        check_float(settings)
    narrow = min(settings.widths)
    if narrow < 8 and settings.opset is not None and settings.opset < 21:
        raise InputError(f"--bits {narrow} --opset {settings.opset}: packed weights need opset 21; leave --opset out")
    if settings.weight_only is not None and (settings.node_bits or settings.node_ranges or settings.node_activations):
        raise InputError("--activations float: bits, activations and range of nodes are for integer activations; leave them out")
    for name, offered in CHOICES.items():
        if getattr(settings, name) not in offered:
            raise InputError(f"--{name.replace('_', '-')} {getattr(settings, name)}: choose one of {', '.join(offered)}")
    if settings.format != "qdq" and settings.target in ("arm", "tensorrt"):
        raise InputError(
            f"--format {settings.format} --target {settings.target}: s8 operators are slow or missing in onnxruntime; "
            "use --format qdq"
        )
    if settings.format == "integer" and settings.target == "wasm":
        raise InputError("--format integer --target wasm: no node may stay float; use --format qdq or qoperator")
    if settings.format == "integer" and settings.exclude:
        raise InputError(
            f"--format integer --exclude {settings.exclude[0]}: no node may stay float; use --format qoperator or qdq"
        )
    if settings.io == "integer" and settings.format != "integer":
        raise InputError(f"--io integer --format {settings.format}: only integer files have integer ends; give --format integer")
    if settings.kernels != "table" and not settings.integer_kernels:
        raise InputError(
            f"--kernels {settings.kernels} --format {settings.format}: it computes GELU and Softmax in float; "
            "give --format qoperator or integer"
        )
    if settings.inline and settings.format != "integer":
        raise InputError(f"--inline --format {settings.format}: only integer files call functions; leave --inline out")
    if settings.weight_only is not None:
        _check_weight_only(settings, settings.weight_only)
    if max_drop is not None and not has_evaluation:
        raise InputError("--max-drop compares with the true answers; give --eval data with labels")
    if max_drop is not None and not 0 <= max_drop <= 100:
        raise InputError(f"--max-drop {max_drop:g}: give percentage points between 0 and 100")
    if min_agreement is not None and not has_evaluation:
        raise InputError("--min-agreement compares both models on samples; give them with --eval")
    if min_agreement is not None and not 0 < min_agreement <= 1:
        raise InputError(f"--min-agreement {min_agreement:g}: give a share above 0 and at most 1, such as .99")


def check_node_names(nodes: Sequence[str], inputs: Sequence[str], settings: Settings) -> None:
    """Raise InputError where a name or pattern that stands for nodes of the model matches none."""
    lists = "`qcompile inspect MODEL --nodes` lists their names"
    for pattern in settings.exclude:
        if not any(matches(name, pattern) for name in nodes):
            raise InputError(f"--exclude {pattern}: no node of the model matches; {lists}")
    for pattern in [p for p, _ in (*settings.node_bits, *settings.node_activations)]:
        if not any(matches(name, pattern) for name in nodes):
            raise InputError(f"[nodes] {pattern}: no node of the model matches; {lists}")
    for pattern in [p for p, *_ in settings.node_ranges]:
        if not any(matches(name, pattern) for name in (*nodes, *inputs)):
            raise InputError(f"[nodes] {pattern}: no node and no input of the model matches; {lists}")


def check_import(settings: Settings, quantised: bool, max_requant_loss: float | None) -> None:
    """Raise InputError where options do not suit a source that already holds Q/DQ (`quantised`), or one that does not."""
    if max_requant_loss is not None and not quantised:
        raise InputError("--max-requant-loss is for models that already hold Q/DQ; for a float model use --max-drop")
    if max_requant_loss is not None and not 0 <= max_requant_loss < float("inf"):
        raise InputError(f"--max-requant-loss {max_requant_loss:g}: give decibels from 0 on, such as 35")
    if quantised and settings.node_ranges:
        raise InputError(
            "[nodes] range: the model already holds Q/DQ with ranges of its own; leave it out, or give the float model"
        )
    if quantised and settings.weight_only is not None:
        raise InputError("--activations float: the model already holds Q/DQ; leave it out, or give the float model")
    if quantised and (settings.sparsity is not None or settings.pruning is not None):
        option = "--sparsity" if settings.sparsity is not None else "--prune-channels"
        raise InputError(f"{option}: the model already holds Q/DQ, whose integers are kept; give the float model")


def weight_only_of(
    activations: str, block: int | None, symmetric: bool | None, spelling: str | None, accuracy_level: int | None
) -> WeightOnly | None:
    """The options of `--activations float`, defaults filled in; None for integers. Raises InputError where nothing takes them."""
    given = {"block": block, "symmetric": symmetric, "spelling": spelling, "accuracy-level": accuracy_level}
    first = next((name for name, value in given.items() if value is not None), None)
    if activations != FLOAT:
        if first is not None:
            raise InputError(f"--{first} is for weight-only files; give --bits 4 --activations float with it")
        return None
    usual = WeightOnly()
    spelling = usual.spelling if spelling is None else spelling
    if spelling == "portable" and accuracy_level is not None:
        raise InputError("--accuracy-level is an attribute of MatMulNBits; leave it out with --spelling portable")
    level = usual.accuracy_level if accuracy_level is None else accuracy_level
    return WeightOnly(
        block=usual.block if block is None else block,
        symmetric=usual.symmetric if symmetric is None else symmetric,
        spelling=spelling,
        accuracy_level=None if spelling == "portable" else level,
    )


def _check_weight_only(settings: Settings, options: WeightOnly) -> None:
    """Raise InputError for what `--activations float` does not go with: nothing but weights is rounded."""
    if settings.bits != 4:
        raise InputError(f"--activations float --bits {settings.bits}: weight-only files have weights of 4 bits; give --bits 4")
    if options.block not in BLOCKS:
        raise InputError(f"--block {options.block}: choose one of {', '.join(map(str, BLOCKS))}")
    if options.spelling not in SPELLINGS:
        raise InputError(f"--spelling {options.spelling}: choose one of {', '.join(SPELLINGS)}")
    if options.accuracy_level is not None and not 0 <= options.accuracy_level <= 4:
        raise InputError(f"--accuracy-level {options.accuracy_level}: give a whole number from 0 (float32) to 4 (int8)")
    if settings.format != "qdq":
        raise InputError(f"--activations float --format {settings.format}: its operators take integers; use --format qdq")
    if settings.inputs_as != "float32":
        raise InputError(f"--activations float --inputs-as {settings.inputs_as}: inputs stay float; leave --inputs-as out")
    if settings.target == "tensorrt" and not (options.spelling == "portable" and options.symmetric):
        raise InputError(
            "--activations float --target tensorrt: it takes INT4 without zero points behind DequantizeLinear; "
            "add --spelling portable --symmetric"
        )


def output_path(source: Path, output: str | Path | None, bits: int | str) -> Path:
    """The file to write: `output`, or MODEL.int8.onnx beside the source. Raises InputError where it cannot be written."""
    suffix = ".pruned.onnx" if bits == FLOAT_BITS else ".mixed.onnx" if bits == "mixed" else f".int{bits}.onnx"
    path = Path(output) if output is not None else source.with_suffix(suffix)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a file name with -o")
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"{path}: its folder does not exist; create it or choose another output with -o")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise InputError(f"{path}: cannot be written; choose another output with -o")
    if source.exists() and path.exists() and path.samefile(source):
        raise InputError(f"{path}: is the input itself, which is never overwritten; choose another output with -o")
    return path
