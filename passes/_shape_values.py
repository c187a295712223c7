"""Symbolic dimensions of all tensors, and the symbolic contents of small integer tensors that hold shapes.

A dimension is a monomial, factor * symbol * symbol ...: enough to follow batch and length through Reshape, Flatten and attention
heads. onnx's own inference supplies what is static or named after a dimension of a graph input (equal names there mean equal
sizes, by the ONNX specification). What it leaves open gets a symbol of its own, which then travels on through the rules below;
two symbols are only ever called equal when they come from the same place, so an unknown can never be confused with another.
Everything is worked out once, in topological order, when `Shapes` is made; it describes the graph at that moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from qcompile.graph import Const, Graph, Node, Tensor, Value
from qcompile.passes._dims import Dim, Dims, volume
from qcompile.passes._match import is_op
from qcompile.passes._shape_rules import INTEGERS, LARGEST, VALUES, propose


class Shapes:
    """`dims` and `values` of every tensor of a graph; `sources` says which tensor and axis each symbol is the size of."""

    def __init__(self, graph: Graph) -> None:
        graph.infer_shapes()
        graph.sort()
        self.sources: dict[str, tuple[Tensor, int]] = {}
        self._opaque: set[str] = set()  # symbols that are numbers in a tensor, not sizes: they may be negative
        self._dims: dict[Tensor, Dims | None] = {}
        self._values: dict[Tensor, Dims] = {}
        for value in graph.inputs:
            for axis, dim in enumerate(value.dims or ()):
                if isinstance(dim, str):
                    self.sources.setdefault(dim, (value, axis))
        self._named = frozenset(self.sources)
        for value in graph.inputs:
            self._settle(value, None)
        for node in graph.nodes:
            proposals = propose(node, self)
            for index, output in enumerate(node.outputs):
                if output.name:
                    self._settle(output, proposals[index] if index < len(proposals) else None)
            self._follow_values(node)

    def dims(self, tensor: Tensor | None) -> Dims | None:
        """The shape, None where the rank is unknown."""
        if isinstance(tensor, Const):
            return tuple(Dim(d) for d in tensor.dims)
        return self._dims.get(tensor) if tensor is not None else None

    def dim(self, tensor: Tensor, axis: int) -> Dim | None:
        """One dimension; where the rank is unknown, a symbol for an axis counted from the front."""
        dims = self.dims(tensor)
        if dims is not None:
            return dims[axis] if -len(dims) <= axis < len(dims) else None
        return self._fresh(tensor, axis) if axis >= 0 else None

    def values(self, tensor: Tensor | None) -> Dims | None:
        """The elements of an integer tensor of rank 0 or 1, None where it cannot be followed."""
        if isinstance(tensor, Const):
            if tensor.elem_type not in INTEGERS or len(tensor.dims) > 1 or prod(tensor.dims) > LARGEST:
                return None
            return tuple(Dim(int(v)) for v in tensor.array().reshape(-1))
        return self._values.get(tensor) if tensor is not None else None

    def define(self, tensor: Tensor, dims: Dims | None) -> None:
        """Tell the shape of a tensor that was added since."""
        self._dims[tensor] = dims

    def is_size(self, dim: Dim) -> bool:
        """Whether `dim` is certainly not negative."""
        return dim.factor >= 0 and not self._opaque.intersection(dim.symbols)

    def _fresh(self, tensor: Tensor, axis: int) -> Dim:
        symbol = f"{tensor.name}:{axis}"
        self.sources.setdefault(symbol, (tensor, axis))
        return Dim(1, (symbol,))

    def _settle(self, value: Value, proposal: Sequence[Dim | None] | None) -> None:
        known = value.dims
        if known is None or (proposal is not None and len(known) != len(proposal)):
            known = None if proposal is None else (None,) * len(proposal)
        if known is None:
            self._dims[value] = None
            return
        dims: list[Dim] = []
        for axis, dim in enumerate(known):
            own = proposal[axis] if proposal is not None else None
            if isinstance(dim, int):
                dims.append(Dim(dim))
            elif isinstance(dim, str) and dim in self._named:
                dims.append(Dim(1, (dim,)))
            else:
                dims.append(own if own is not None else self._fresh(value, axis))
        self._dims[value] = tuple(dims)

    def _follow_values(self, node: Node) -> None:
        output = node.outputs[0] if node.outputs else None
        if output is None or output.elem_type not in INTEGERS:
            return
        dims = self._dims.get(output)
        if (dims is None or len(dims) > 1) and not (dims is None and is_op(node, "Gather")):
            return
        rule = VALUES.get(node.op) if node.domain in ("", "ai.onnx") else None
        found = rule(node, self) if rule is not None else None
        if found is None and dims is not None and volume(dims).static and volume(dims).factor <= LARGEST:
            names = [f"{output.name}[{i}]" for i in range(volume(dims).factor)]
            self._opaque.update(names)
            found = tuple(Dim(1, (name,)) for name in names)
        if found is not None and len(found) <= LARGEST:
            self._values[output] = found
