"""Write a vector of symbolic sizes: a constant where one size at most is not a number, else Concat of Shape(x, start, end)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.graph import Graph, Tensor
from qcompile.passes._dims import Dim, Dims
from qcompile.passes._match import set_type
from qcompile.passes._shape_values import Shapes

Piece = int | tuple[Tensor, int, int]  # a number, or (x, start, end) of Shape(x)


def pieces_of(shapes: Shapes, vector: Dims) -> list[Piece] | None:
    """Numbers and runs of consecutive dimensions of one tensor, the longest first found; None where an element is neither."""
    sources: dict[Tensor, None] = {}
    for size in vector:
        if size.static:
            continue
        source = shapes.sources.get(size.symbols[0]) if size == Dim(1, size.symbols[:1]) else None
        if source is None:
            return None
        sources[source[0]] = None
    pieces: list[Piece] = []
    place = 0
    while place < len(vector):
        if vector[place].static:
            pieces.append(vector[place].factor)
            place += 1
            continue
        length, tensor, axis = max((_longest(shapes, t, vector[place:]) for t in sources), key=lambda found: found[0])
        if length == 0:  # a tensor of unknown rank has sizes but no dims
            tensor, axis = shapes.sources[vector[place].symbols[0]]
            length = 1
        pieces.append((tensor, axis, axis + length))
        place += length
    return pieces


def _longest(shapes: Shapes, tensor: Tensor, vector: Dims) -> tuple[int, Tensor, int]:
    """(length, tensor, axis) of the longest start of `vector` among the dimensions of `tensor`, ending in a symbol."""
    dims = shapes.dims(tensor) or ()
    best = (0, tensor, 0)
    for axis in range(len(dims)):
        length = 0
        for count in range(1, min(len(vector), len(dims) - axis) + 1):
            if dims[axis + count - 1] != vector[count - 1]:
                break
            if not vector[count - 1].static:
                length = count
        best = max(best, (length, tensor, axis), key=lambda found: found[0])
    return best


def shape_vector(graph: Graph, shapes: Shapes, vector: Dims, base: str) -> Tensor | None:
    """A rank-1 int64 tensor that holds `vector`, None where that takes more than Shape and Concat."""
    pieces = pieces_of(shapes, vector)
    if pieces is None:
        return None
    parts: list[Tensor] = []
    numbers: list[int] = []
    for piece in [*pieces, None]:
        if isinstance(piece, int):
            numbers.append(piece)
            continue
        if numbers:
            parts.append(graph.constant(base + "_sizes", np.array(numbers, np.int64)))
            numbers = []
        if piece is not None:
            parts.append(_sizes(graph, piece, base))
    if len(parts) == 1:
        return parts[0]
    joined = graph.node("Concat", parts, [base + "_shape"], axis=0).outputs[0]
    set_type(joined, 7, (len(vector),))
    return joined


def _sizes(graph: Graph, piece: tuple[Tensor, int, int], base: str) -> Tensor:
    tensor, start, end = piece
    if (graph.opset() or 0) >= 15:
        sizes = graph.node("Shape", [tensor], [base + "_sizes"], start=start, end=end).outputs[0]
    else:
        whole = graph.node("Shape", [tensor], [base + "_dims"]).outputs[0]
        set_type(whole, 7, None)
        limits = [graph.constant(base + "_" + word, np.array([at], np.int64)) for word, at in (("start", start), ("end", end))]
        sizes = graph.node("Slice", [whole, *limits], [base + "_sizes"]).outputs[0]
    set_type(sizes, 7, (end - start,))
    return sizes


@dataclass
class Targets:
    """Second inputs of Reshape, each made once: equal vectors of sizes share one tensor."""

    graph: Graph
    shapes: Shapes
    made: dict[Dims, Tensor] = field(default_factory=dict)

    def get(self, vector: Dims, base: str) -> Tensor | None:
        """The tensor for `vector`; None where its sizes cannot be written down, or one of them is 0 (which would copy)."""
        if Dim(0) in vector:
            return None
        if vector not in self.made:
            dynamic = [d for d in vector if not d.static]
            if len(dynamic) <= 1:
                numbers = [d.factor if d.static else -1 for d in vector]
                self.made[vector] = self.graph.constant(base + "_shape", np.array(numbers, np.int64))
            else:
                made = shape_vector(self.graph, self.shapes, vector, base)
                if made is None:
                    return None
                self.made[vector] = made
        return self.made[vector]
