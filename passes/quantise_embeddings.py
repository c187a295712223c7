"""Embedding tables in 8 bits, each row with its own scale (4 bits for `--bits 4`): they are half of a small transformer's file.

    Gather(E float [V, D], ids)  ->  Cast(Gather(E_int8 [V, D], ids)) * Gather(scale [V, 1], ids)

Only the rows that are looked up are turned to float. A row's scale is max|row| / 127 (for 4 bits the one of least squared error):
no kernel multiplies these integers, so neither the dyadic grid nor the pair rule applies. Refused, with the reason: tables
below 16 Ki values or 8 columns, tables that anything but a Gather along axis 0 reads, the model's own outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from qcompile.context import Context
from qcompile.graph import Array, Const, Graph, Node, Value
from qcompile.passes._match import is_op
from qcompile.rewrite import Lossy, Promise, Report

_LEAST = 1 << 14  # values: below, the extra nodes cost more than they save
_NARROWEST = 8  # values in a row: its scale adds 4 bytes
_ROWS = 1 << 12  # rows rounded at a time
_FOUR_BIT_FACTORS = np.linspace(1.0, 0.6, 17)


@dataclass(frozen=True)
class QuantiseEmbeddings:
    """Store the tables that Gather looks rows up in as integers."""

    name: str = "quantise_embeddings"
    keeps: Promise = field(default_factory=lambda: Lossy(10.0))

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a Gather."""
        report = Report()
        tables = {n.inputs[0]: None for n in graph.nodes if is_op(n, "Gather") and isinstance(n.inputs[0], Const)}
        for table in tables:
            assert isinstance(table, Const)
            if table.elem_type != TensorProto.FLOAT or len(table.dims) != 2:
                continue
            reason = table_refusal(graph, table, context)
            if reason is not None:
                report.refuse(table.name, reason)
                continue
            readers = list(table.consumers)
            integers, scale = round_rows(table.array(), max(context.settings.top_for(n.name) for n in readers))
            _rewrite(graph, table.name, readers, integers, scale)
            report.rewrites += len(readers)
        if report.rewrites:
            graph.cleanup()
            graph.sort()
        return report


def table_refusal(graph: Graph, table: Const, context: Context) -> str | None:
    """None where float matrix `table` can be stored as integers that are looked up by row, else why not."""
    if int(np.prod(table.dims)) < _LEAST:
        return "a small table"
    if table.dims[1] < _NARROWEST:
        return "rows too short to share a scale"
    if graph.is_pinned(table) or not all(_looks_up(n, table) for n in table.consumers):
        return "the table is read by more than look-ups"
    return next((r for r in (context.settings.why_float(n.name) for n in table.consumers) if r is not None), None)


def _looks_up(node: Node, table: Const) -> bool:
    """A Gather of whole rows by computed indices, which may be negative: row and scale wrap alike."""
    return is_op(node, "Gather") and node.inputs[0] is table and node.attr("axis", 0) == 0 and isinstance(node.inputs[1], Value)


def round_rows(values: Array, top: int) -> tuple[Array, Array]:
    """(int8 [V, D], float32 [V, 1]) of float rows; a few thousand rows at a time."""
    integers = np.empty(values.shape, np.int8)
    scales = np.empty((values.shape[0], 1), np.float32)
    for start in range(0, values.shape[0], _ROWS):
        rows = values[start : start + _ROWS].astype(np.float64)
        peak = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
        best = np.full(peak.shape, np.inf)
        for factor in _FOUR_BIT_FACTORS if top < 100 else (1.0,):
            scale = np.where(peak > 0, peak * factor / top, 1.0).astype(np.float32)
            q = np.clip(np.rint(rows / scale), -top, top)
            error = np.square(rows - q * scale).sum(axis=1, keepdims=True)
            better = error < best
            best = np.where(better, error, best)
            integers[start : start + _ROWS] = np.where(better, q, integers[start : start + _ROWS])
            scales[start : start + _ROWS] = np.where(better, scale, scales[start : start + _ROWS])
    return integers, scales


def _rewrite(graph: Graph, name: str, readers: list[Node], integers: Array, scale: Array) -> None:
    table = graph.constant(name + "_int8", integers)
    factors = graph.constant(name + "_row_scale", scale)
    for node in readers:
        ids, output = node.inputs[1], node.outputs[0]
        node.inputs[0] = table
        node.outputs[0] = Value(graph.fresh_name(output.name + "_rows"))
        widened = graph.node("Cast", [node.outputs[0]], [output.name + "_rows_float"], to=TensorProto.FLOAT)
        scales = graph.node("Gather", [factors, ids], [output.name + "_row_scale"], axis=0)
        graph.node("Mul", [widened.outputs[0], scales.outputs[0]], [output])
