"""2:4 weights in the semi-structured layout of CUTLASS, which torch's sparse tensors hold: `qcompile inspect --export-2:4`.

    weight [rows, K]  ->  values [rows, K/2], codes [rows, K/4]: first place + 4 * second place of each block
    meta   [rows, K/(4n)]: n codes an element, the first in the lowest bits; int8: n = 8 in an int32, half precision: n = 4 in an
    int16

The elements of `meta` are then moved as the tensor cores read them (reorder_meta, CUTLASS tools/util host_reorder.h): rows within
groups of 16 (int32) or 32 (int16), 2 x 2 blocks turned over, columns interleaved in twos. cuSPARSELt makes its own opaque form of
the dense matrix on the device; `codes` in plain row order serve any other reader.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.errors import InputError
from qcompile.layer_counts import LayerCount, count_layers
from qcompile.sparse_storage import places_of
from qcompile.sparsity import Array

_ROWS = 32


@dataclass(frozen=True)
class SemiStructured:
    """One weight: `values` [rows, K/2] int8 or float16, `codes` [rows, K/4] uint8, `meta` int32 or int16 as CUTLASS orders it."""

    values: Array
    codes: Array
    meta: Array


def layout_refusal(layer: LayerCount) -> str:
    """Why `layer` has no semi-structured form; empty where it has."""
    refusal = layer.sparse_refusal()
    if refusal:
        return refusal
    if layer.weight_bits <= 8 and layer.matrix.size and not -128 <= int(layer.matrix.min()) <= int(layer.matrix.max()) <= 127:
        return "integers beyond int8"
    rows, columns = layer.matrix.shape
    multiple = 64 if layer.weight_bits <= 8 else 32
    if rows % _ROWS or columns % multiple:
        return f"{rows} x {columns} is not made of tiles of {_ROWS} x {multiple}"
    return ""


def semi_structured(weight: Array) -> SemiStructured:
    """`weight` [rows, K], 2:4 along K, int8 or float (becomes float16). Raises ValueError for shapes that do not fit."""
    dense = weight if weight.dtype == np.int8 else weight.astype(np.float16)
    rows, width = dense.shape
    kind, each = (np.dtype(np.uint32), 8) if dense.dtype == np.int8 else (np.dtype(np.uint16), 4)
    columns = width // (4 * each)
    if rows % _ROWS or width % (8 * each):
        raise ValueError(f"{rows} x {width} is not made of tiles of {_ROWS} x {8 * each}")
    blocks = dense.reshape(-1, 4)
    if int(np.count_nonzero(blocks, axis=1).max(initial=0)) > 2:
        raise ValueError("the weight is not 2:4")
    places = places_of(blocks)
    codes = (places[:, 0] + 4 * places[:, 1]).astype(np.uint8).reshape(rows, -1)
    shifts = (4 * np.arange(each)).astype(np.uint32)
    packed = (codes.reshape(rows, columns, each).astype(np.uint32) << shifts).sum(axis=2).astype(kind)  # no two share a bit
    meta = np.empty(rows * columns, kind)
    meta[_offsets(rows, columns, kind.itemsize).reshape(-1)] = packed.reshape(-1)
    signed = np.int32 if each == 8 else np.int16
    values = np.take_along_axis(blocks, places, axis=1).reshape(rows, -1)
    return SemiStructured(values, codes, meta.reshape(rows, columns).view(signed))


def _offsets(rows: int, columns: int, size: int) -> Array:
    """Where element [row, column] of the plain metadata goes in memory."""
    group, spread = (32, 4) if size == 2 else (16, 2)
    row, column = np.indices((rows, columns))
    row = row // group * group + row % 8 * spread + row % group // 8
    turned = (row % 2 == 0) * (column % 2 == 1) * 1 - (row % 2 == 1) * (column % 2 == 0) * 1
    row, column = row + turned, column - turned
    return np.asarray(column // 2 * rows * 2 + row * 2 + column % 2)


def export(model: str | Path, folder: str | Path) -> dict[str, Any]:
    """Write each 2:4 layer of the file into `folder` as an .npz, and `manifest.json`; returns the manifest.

    Raises InputError where nothing can be exported or written, ModelError where the file cannot be read.
    """
    folder = Path(folder)
    layers = count_layers(model)
    able = [(i, x) for i, x in enumerate(layers) if not layout_refusal(x)]
    if not able:
        raise InputError(f"{model}: no layer can be exported ({_why(layers)}); make it sparse with --sparsity 2:4 first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = [_write(folder / f"layer_{i:03d}.npz", x) for i, x in able]
        skipped = [{"node": x.node, "op": x.op, "reason": layout_refusal(x)} for x in layers if layout_refusal(x)]
        manifest = {"layout": "CUTLASS reorder_meta, ColumnMajorInterleaved<2>", "layers": written, "skipped": skipped}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another folder with --export-2:4") from error
    return manifest


def _write(path: Path, layer: LayerCount) -> dict[str, Any]:
    made = semi_structured(layer.matrix.astype(np.int8) if layer.weight_bits <= 8 else layer.matrix)
    np.savez(path, values=made.values, codes=made.codes, meta=made.meta)
    rows, width = layer.matrix.shape
    return {
        "node": layer.node,
        "op": layer.op,
        "file": path.name,
        "rows": rows,
        "columns": width,
        "dtype": str(made.values.dtype),
    }


def _why(layers: Sequence[LayerCount]) -> str:
    reasons = [layout_refusal(x) for x in layers]
    return max(dict.fromkeys(reasons), key=reasons.count) if reasons else "it has no Conv, Gemm or MatMul with constant weights"
