"""The nodes that weight-only INT4 is written with, in either spelling; which weights and integers is `weight_only`'s business."""

from __future__ import annotations

from onnx import TensorProto

from qcompile.block_grid import BlockGrid
from qcompile.block_packing import grid_tensors, nbits_weight, nbits_zero_points
from qcompile.context import WeightOnly
from qcompile.graph import Array, Const, Graph, Node, Tensor, Value
from qcompile.passes._products import product_bias

_MICROSOFT = "com.microsoft"


class Writer:
    """Puts blocks of 4 bits in the place of constants; every output keeps its name."""

    def __init__(self, graph: Graph, options: WeightOnly) -> None:
        self.graph, self.options = graph, options

    def matrix(self, const: Const, integers: Array, grid: BlockGrid) -> int:
        """Rewrite all readers of matrix `const`; `integers` [N, K]. Returns how many there were."""
        readers = const.consumers
        if self.options.spelling == "portable":
            weight = self._dequantised(const.name, integers, grid)
            for node in readers:
                self._plain_product(node, weight)
            return len(readers)
        stored = self.graph.constant(const.name + "_nbits", nbits_weight(integers, grid.block))
        scale = self.graph.constant(const.name + "_scale", grid.scale)
        packed = nbits_zero_points(grid)
        zero = None if packed is None else self.graph.constant(const.name + "_zero_point", packed)
        for node in readers:
            self._nbits_product(node, [stored, scale, zero], integers.shape)
        return len(readers)

    def _nbits_product(self, node: Node, weight: list[Const | None], shape: tuple[int, ...]) -> None:
        channels, width = shape
        x, output, label = node.inputs[0], node.outputs[0], node.label
        bias = product_bias(self.graph, node)
        vector = self._vector(bias, channels)
        self.graph.remove(node)
        inputs: list[Tensor | None] = [x, *weight]
        if vector is not None:
            inputs = [*inputs, None, vector]  # g_idx, which is deprecated, then the bias
        while inputs[-1] is None:
            inputs.pop()
        made = self.graph.node(
            "MatMulNBits",
            inputs,
            [output if bias is None or vector is not None else output.name + "_product"],
            domain=_MICROSOFT,
            K=width,
            N=channels,
            bits=4,
            block_size=self.options.block,
            accuracy_level=self.options.accuracy_level,
        )
        made.name = label  # free again, and what users know the node by
        if bias is not None and vector is None:
            self.graph.node("Add", [made.outputs[0], bias], [output], name=label + "_bias")

    def _vector(self, bias: Tensor | None, channels: int) -> Const | None:
        """`bias` as a constant [N], which MatMulNBits takes; None where it is computed or has another shape."""
        if not isinstance(bias, Const) or bias.dims not in ((channels,), (1, channels)):
            return None
        return bias if len(bias.dims) == 1 else self.graph.constant(bias.name + "_vector", bias.array().reshape(-1))

    def _dequantised(self, name: str, integers: Array, grid: BlockGrid) -> Value:
        """A blocked DequantizeLinear that gives the matrix [K, N]."""
        made, scale, zero = grid_tensors(integers, grid, transposed=True)
        inputs: list[Tensor | None] = [self.graph.constant(name + "_int4", made), self.graph.constant(name + "_scale", scale)]
        if zero is not None:
            inputs.append(self.graph.constant(name + "_zero_point", zero))
        node = self.graph.node("DequantizeLinear", inputs, [name + "_dequantized"], axis=0, block_size=grid.block)
        return node.outputs[0]

    def _plain_product(self, node: Node, weight: Value) -> None:
        x, output, label = node.inputs[0], node.outputs[0], node.label
        bias = product_bias(self.graph, node)
        self.graph.remove(node)
        made = self.graph.node("MatMul", [x, weight], [output if bias is None else output.name + "_product"])
        made.name = label
        if bias is not None:
            self.graph.node("Add", [made.outputs[0], bias], [output], name=label + "_bias")

    def table(self, const: Const, integers: Array, grid: BlockGrid) -> int:
        """Rewrite all look-ups in `const`; `integers` [rows, D]. Returns how many there were."""
        graph, name, readers = self.graph, const.name, const.consumers
        proto, scale_values, zero_proto = grid_tensors(integers, grid)
        stored, scale = graph.constant(name + "_int4", proto), graph.constant(name + "_scale", scale_values)
        zero = None if zero_proto is None else graph.constant(name + "_zero_point", zero_proto)
        if self.options.spelling == "portable":
            self._plain_look_ups(readers, stored, scale, zero)
            return len(readers)
        for node in readers:
            ids, output, label = node.inputs[1], node.outputs[0], node.label
            graph.remove(node)
            made = graph.node(
                "GatherBlockQuantized",
                [stored, ids, scale, *([] if zero is None else [zero])],
                [output],
                domain=_MICROSOFT,
                bits=4,
                block_size=grid.block,
                gather_axis=0,
                quantize_axis=1,
            )
            made.name = label
        return len(readers)

    def _plain_look_ups(self, readers: list[Node], stored: Const, scale: Const, zero: Const | None) -> None:
        graph = self.graph
        tables: list[Tensor] = [self._widened(stored), scale]
        if zero is not None:
            tables.append(self._widened(zero))
        for node in readers:
            ids, output, label = node.inputs[1], node.outputs[0], node.label
            graph.remove(node)
            rows = [graph.node("Gather", [table, ids], [table.name + "_rows"], axis=0).outputs[0] for table in tables]
            made = graph.node("DequantizeLinear", rows, [output], axis=-1, block_size=self.options.block)
            made.name = label

    def _widened(self, const: Const) -> Value:
        """8 bits of a 4-bit constant: no runtime looks rows of 4 bits up."""
        to = TensorProto.INT8 if const.elem_type == TensorProto.INT4 else TensorProto.UINT8
        return self.graph.node("Cast", [const], [const.name + "_widened"], to=to).outputs[0]
