"""Weight-only INT4: matrices and embedding tables in blocks of 4 bits, activations float (`--activations float`).

    y = x W [+ C]        ->   MatMulNBits(x, W_uint4, s[, z][, C])            spelling `matmulnbits`, com.microsoft
                         or   MatMul(x, DequantizeLinear(W_int4, s[, z], axis=0, block_size)) [+ C]      `portable`, opset 21
    Gather(E, ids)       ->   GatherBlockQuantized(E_int4, ids, s[, z])
                         or   DequantizeLinear(Gather(Cast(E_int4), ids), Gather(s, ids)[, Gather(z, ids)], axis=-1, block_size)

Both spellings hold the same integers, scales and zero points. The portable look-up takes rows first: a DequantizeLinear of the
whole table would run again for every sample, while the Cast is folded when the model is loaded.

Rounding: block scales by least squared error (`qcompile.block_grid`), each weight's counted with the power of its input; then
second order on that grid (GPTQ: Frantar et al. 2022), with the second moment of what reaches the layer when all before it are
rounded. It is about zero and not about the mean, since no bias is corrected here. Without calibration data, for effort `fast`
and for tables: round to nearest.

It must not fire, and counts the reason, on convolutions, on products that have no constant float32 matrix on their right, on a
matrix that anything else reads, that is so small that 4 bits need more room, on small tables, nor on what `--exclude` names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from qcompile.block_grid import BlockGrid, round_blocks
from qcompile.context import Context, WeightOnly
from qcompile.errors import DataError, ModelError
from qcompile.graph import Array, Const, Graph, Node, Value
from qcompile.moments import input_moment, input_power
from qcompile.passes._match import is_op
from qcompile.passes._products import product_matrix, product_refusal
from qcompile.passes._weight_only_nodes import Writer
from qcompile.passes.quantise_embeddings import table_refusal
from qcompile.ranges import Thinned
from qcompile.rewrite import Lossy, Promise, Report
from qcompile.rounding import WIDEST, second_order_round
from qcompile.walk import Stream

_SAMPLE_BYTES = 64 << 20
_MOST_SAMPLES = 256  # a sentence has some tens of rows, and a second moment wants several times K of them
_WIDE = "reduction too wide for a second moment in memory: rounded to nearest"
_DONE = ("MatMulNBits", "GatherBlockQuantized", "DequantizeLinear")


@dataclass(frozen=True)
class WeightOnlyInt4:
    """4-bit weights in blocks for matrix products and look-ups; everything else stays float."""

    damping: float = 0.01
    name: str = "weight_only"
    keeps: Promise = field(default_factory=Lossy)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a product or look-up. Raises ModelError where there is none and none was done before."""
        report = Report()
        options = context.settings.weight_only
        if options is None:
            return report
        graph.infer_shapes()
        matrices = _matrices(graph, context, options, report)
        tables = _tables(graph, context, report)
        if not matrices and not tables and not any(n.op in _DONE for n in graph.nodes):
            raise ModelError("no weight can be stored in 4 bits: there is no MatMul or Gemm with a constant matrix; use --bits 8")
        if not matrices and not tables:
            return report
        rounded = _Rounding(graph, context, options, self.damping, report).run(matrices, tables)
        writer = Writer(graph, options)
        for const in tables:
            report.rewrites += writer.table(const, *rounded[const.name])
        for const in matrices:
            report.rewrites += writer.matrix(const, *rounded[const.name])
        graph.cleanup()
        graph.sort()
        return report


def _matrices(graph: Graph, context: Context, options: WeightOnly, report: Report) -> list[Const]:
    """The constants that become matrices of 4 bits, in the order of their first readers."""
    found: dict[Const, None] = {}
    for node in graph.nodes:
        if is_op(node, "Conv", "ConvTranspose"):
            report.refuse(node.label, "weight-only 4 bits are for matrix products: a convolution stays float")
        if not is_op(node, "MatMul", "Gemm"):
            continue
        const = node.constant(1)
        reason = product_refusal(node, context)
        if reason is None and const is not None:
            reason = _matrix_refusal(graph, node, const, context, options)
        if reason is not None:
            report.refuse(node.label, reason)
        elif const is not None:
            found[const] = None
    return list(found)


def _matrix_refusal(graph: Graph, node: Node, const: Const, context: Context, options: WeightOnly) -> str | None:
    readers = const.consumers
    if graph.is_pinned(const) or any(not is_op(n, "MatMul", "Gemm") or n.constant(1) is not const for n in readers):
        return "the weight is read by more than matrix products"
    if any(product_refusal(n, context) is not None or _layout(n) != _layout(node) for n in readers):
        return "the weight is shared with a product that reads it in another way or stays float"
    source = node.inputs[0]
    if isinstance(source, Value) and source.dims is not None and len(source.dims) < 2:
        return "a product of one vector without a batch axis"
    width, channels = reversed(const.dims) if node.op == "Gemm" and node.attr("transB", 0) else const.dims
    if width * channels == 0 or options.stored_bytes(channels, width) >= const.nbytes:
        return "so small that 4 bits in blocks need more room"
    return None


def _layout(node: Node) -> tuple[int, float]:
    return (node.attr("transB", 0), node.attr("alpha", 1.0)) if node.op == "Gemm" else (0, 1.0)


def _tables(graph: Graph, context: Context, report: Report) -> list[Const]:
    """The constants that become embedding tables of 4 bits."""
    found = []
    for const in dict.fromkeys(n.inputs[0] for n in graph.nodes if is_op(n, "Gather")):
        if not isinstance(const, Const) or const.elem_type != TensorProto.FLOAT or len(const.dims) != 2 or _holds_scales(const):
            continue
        reason = table_refusal(graph, const, context)
        if reason is not None:
            report.refuse(const.name, reason)
        else:
            found.append(const)
    return found


def _holds_scales(table: Const) -> bool:
    """Whether what is looked up are the scales of rows of integers."""
    rows = [n.outputs[0] for n in table.consumers if n.outputs]
    return any(is_op(n, "DequantizeLinear") and n.inputs[1] is row for row in rows for n in row.consumers)


class _Rounding:
    """The integers and grids of all weights, by one walk over a copy of the graph whose weights are rounded as it goes."""

    def __init__(self, graph: Graph, context: Context, options: WeightOnly, damping: float, report: Report) -> None:
        self.context, self.options, self.damping, self.report = context, options, damping, report
        self.world = graph.copy()
        self.samples: list[dict[str, Array]] = []
        if not context.synthetic and context.settings.effort != "fast":
            thinned = Thinned(budget_bytes=_SAMPLE_BYTES, most=_MOST_SAMPLES)
            context.calibrated = sum(1 for _ in thinned.passing(context.calibration()))
            self.samples = thinned.kept
        self._power: tuple[Value, Array] | None = None
        self._moment: tuple[Value, Array] | None = None

    def run(self, matrices: list[Const], tables: list[Const]) -> dict[str, tuple[Array, BlockGrid]]:
        """{name of the constant: (integers [rows, K], grid)}; rows are a matrix' columns, or a table's own rows."""
        options = self.options
        rounded: dict[str, tuple[Array, BlockGrid]] = {}
        for table in tables:
            grid, integers = round_blocks(table.array(), options.block, symmetric=options.symmetric)
            rounded[table.name] = (integers, grid)
            self.world.constants[table.name].assign(grid.dequantise(integers))
        stream = Stream(self.world, self.samples) if self.samples else None  # sorts its graph
        wanted = {const.name for const in matrices}
        for node in self.world.nodes:
            const = node.constant(1) if is_op(node, "MatMul", "Gemm") else None
            if const is None or const.name not in wanted or const.name in rounded:
                continue
            if self.context.progress is not None:
                self.context.progress("rounding weights")
            integers, grid = self._matrix(node, const, stream)
            rounded[const.name] = (integers, grid)
            _assign(const, grid.dequantise(integers).T)
        return rounded

    def _matrix(self, node: Node, const: Const, stream: Stream | None) -> tuple[Array, BlockGrid]:
        options, matrix = self.options, product_matrix(node).T
        if stream is None:
            grid, nearest = round_blocks(matrix, options.block, symmetric=options.symmetric)
            return nearest, grid
        source, width = node.inputs[0], matrix.shape[1]
        assert isinstance(source, Value)
        power, moment = self._statistics(node, const, source, stream, width)
        grid, nearest = round_blocks(matrix, options.block, symmetric=options.symmetric, importance=power)
        if moment is None:
            self.report.refuse(node.label, _WIDE)
            return nearest, grid
        scale, zero = grid.columns(width)
        offset = zero.astype(np.int64)
        keep = matrix != 0 if self.context.settings.sparsity is not None else np.ones(matrix.shape, np.bool_)
        q = second_order_round(
            matrix[None],
            scale[None],
            moment,
            (nearest - offset)[None],
            pair_rule=False,
            damping=self.damping,
            limits=(-offset[None] * keep, (15 - offset[None]) * keep),
        )[0]
        return (q + offset).astype(np.uint8), grid

    def _statistics(self, node: Node, const: Const, source: Value, stream: Stream, width: int) -> tuple[Array, Array | None]:
        """(power [K], second moment [1, K, K], or None where it would be too large) of what `node` reads.

        Those of the tensor asked for last are kept: query, key and value read the same.
        """
        if self._power is None or self._power[0] is not source:
            values, seed = stream.values(source), self.context.settings.seed
            if not all(np.isfinite(v).all() for v in values):
                raise DataError(f"node '{node.label}': the calibration data make its input NaN or infinite; check --data")
            if width > WIDEST:
                self._power, self._moment = (source, input_power(node, const.dims, values, len(values), seed)[0]), None
            else:
                moment = input_moment(node, const.dims, values, len(values), seed)
                self._power, self._moment = (source, np.einsum("kk->k", moment[0]).copy()), (source, moment)
        return self._power[1], None if self._moment is None else self._moment[1]


def _assign(const: Const, matrix: Array) -> None:
    """Let all readers of `const` multiply by `matrix` [K, N]."""
    transposed = False
    for node in const.consumers:
        if node.op == "Gemm":
            node.set_attr("alpha", 1.0)
            transposed = bool(node.attr("transB", 0))
    const.assign(matrix.T if transposed else matrix)
