"""After channels are gone: each layer's weights fitted anew, so that it gives the dense model's outputs from what reaches it now.

    V = W_k + (W C + D - W_k S) (S + l I)^-1,    b' = b + E[W x + s - s' - V x']
    C = Cov(x, x'), S = Cov(x', x'), D = Cov(s - s', x')

x is the layer's input in the dense model, x' what is left of it in the pruned one with all layers before it refitted, W_k the
columns that are left. Where the output is added to a residual stream, s and s' are that stream in both models, so that the layer
also takes back what went wrong before (else D = 0). l is chosen on samples that were left out, as in `qcompile.compensation`; the
bias takes what the lost channels contributed on average. Without a bias C, S and D are moments about zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile import compensation
from qcompile.graph import Array, Graph, Node, Tensor, Value
from qcompile.moments import rows_of
from qcompile.passes._linear import Linear, bias_of, output_axis, with_bias, write
from qcompile.passes._match import is_op
from qcompile.passes._prune_implant import Part
from qcompile.passes._prune_scores import weight_rows
from qcompile.passes.round_weights import weight_tensor
from qcompile.walk import Stream

_STRENGTHS = (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0)
_ROWS_PER_COLUMN = 32
_LEAST_ROWS, _MOST_ROWS = 8192, 49152


@dataclass
class _Sums:
    """Sums over rows: x' x'^T, t x'^T, of x' and of t, for wanted outputs t without their bias."""

    rows: int
    noisy: Array
    cross: Array
    mean: Array
    wanted: Array

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.rows + other.rows,
            self.noisy + other.noisy,
            self.cross + other.cross,
            self.mean + other.mean,
            self.wanted + other.wanted,
        )

    def moments(self, centred: bool) -> tuple[Array, Array]:
        """E[x' x'^T] [K', K'] and E[t x'^T] [rows, K'], about the means where `centred`."""
        mean, wanted = centred * self.mean / self.rows, centred * self.wanted / self.rows
        return self.noisy / self.rows - np.outer(mean, mean), self.cross / self.rows - np.outer(wanted, mean)


class Refit:
    """One walk over the dense model and the pruned one, layer after layer."""

    def __init__(self, graph: Graph, dense: Graph, samples: list[dict[str, Array]], seed: int) -> None:
        self.graph, self.seed = graph, seed
        self.originals = {n.outputs[0].name: n for n in dense.nodes}
        self.worlds = Stream(dense, samples), Stream(graph, samples)
        self.done: set[Tensor] = set(graph.inputs)  # tensors of the pruned graph that exist before the layer at hand

    def passed(self, node: Node) -> None:
        """The walk is behind `node`."""
        self.done.update(node.outputs)

    def layer(self, part: Part) -> bool:
        """Refit a layer from the rows and columns that it has of the dense one. Returns whether it moved."""
        node, rows, columns = part.node, part.rows, part.columns
        original = self.originals[part.source]
        weight, old = node.constant(1), original.constant(1)
        source, reached = original.inputs[0], node.inputs[0]
        if weight is None or old is None or not isinstance(source, Value) or not isinstance(reached, Value):
            return False
        exact, noisy = self.worlds[0].values(source), self.worlds[1].values(reached)
        same = all(a.shape == b.shape and np.array_equal(a, b) for a, b in zip(exact, noisy, strict=True))
        if (same and not part.implant) or len(noisy) < 2 or columns.size > compensation.WIDEST:
            return False
        linear = with_bias(self.graph, node)
        bias = None if linear is None else bias_of(linear)
        wanted = weight_rows(original, old.array())[rows]
        folds = self._folds(original, node, wanted, exact, noisy, self._skips(linear, rows))
        fitted = _fit(wanted[:, columns], folds, centred=bias is not None)
        axis = output_axis(node)
        tensor = weight_tensor(fitted, weight.dims, node.op, axis)
        if linear is None or bias is None:
            node.inputs[1] = self.graph.constant(weight.name, tensor.astype(np.float32))
            return True
        whole = folds[0] + folds[1]
        bias = bias + (whole.wanted - fitted @ whole.mean) / whole.rows
        write(self.graph, linear, tensor, bias)
        return True

    def _skips(self, linear: Linear | None, rows: Array) -> tuple[list[Array], list[Array]] | None:
        """The residual stream that the layer's output is added to, in both models (the dense one's kept channels)."""
        if linear is None or len(linear.output.consumers) != 1 or not is_op(linear.output.consumers[0], "Add"):
            return None
        total = linear.output.consumers[0]
        place = next(i for i, x in enumerate(total.inputs) if x is not linear.output) if len(set(total.inputs)) == 2 else -1
        twin = self.originals.get(total.outputs[0].name)
        skip, origin = (total.inputs[place], twin.inputs[place]) if place >= 0 and twin is not None else (None, None)
        if not isinstance(skip, Value) or not isinstance(origin, Value) or skip not in self.done:
            return None
        exact, noisy = self.worlds[0].values(origin), self.worlds[1].values(skip)
        axis = 1 if linear.channel_axis == 1 else exact[0].ndim - 1
        if exact[0].shape[axis] <= int(rows.max()) or noisy[0].shape[axis] != rows.size:
            return None
        return [np.take(x, rows, axis=axis) for x in exact], noisy

    def _folds(
        self,
        original: Node,
        node: Node,
        wanted: Array,
        exact: list[Array],
        noisy: list[Array],
        skips: tuple[list[Array], list[Array]] | None,
    ) -> list[_Sums]:
        """Sums in two halves of the samples, which take turns, at positions drawn alike in all tensors."""
        dims = [const.dims for n in (original, node) if (const := n.constant(1)) is not None]
        draws = [np.random.default_rng(self.seed) for _ in range(4)]
        width = wanted.shape[1]
        count = max(1, min(max(_ROWS_PER_COLUMN * width, _LEAST_ROWS), _MOST_ROWS) // len(exact))
        plain = Node("Conv" if node.op == "Conv" else "MatMul", "stream", [], [])
        rows = wanted.shape[0]
        shape = (rows, rows, *[1] * (len(dims[1]) - 2)) if node.op == "Conv" else (rows, rows)
        sums: list[_Sums | None] = [None, None]
        for index, (left, right) in enumerate(zip(exact, noisy, strict=True)):
            x, reached = rows_of(original, dims[0], left, count, draws[0])[0], rows_of(node, dims[1], right, count, draws[1])[0]
            target = x.astype(np.float64) @ wanted.T
            if skips is not None:
                for values, sign, draw in zip(skips, (1.0, -1.0), draws[2:], strict=True):
                    target = target + sign * rows_of(plain, shape, values[index], count, draw)[0]
            inputs = reached.astype(np.float64)
            part = _Sums(len(inputs), inputs.T @ inputs, target.T @ inputs, inputs.sum(axis=0), target.sum(axis=0))
            known = sums[index % 2]
            sums[index % 2] = part if known is None else known + part
        return [s for s in sums if s is not None]


def _fit(kept: Array, folds: list[_Sums], *, centred: bool) -> Array:
    """V [rows, K'] around W_k = `kept`; centred: a bias takes the means."""
    moments = [f.moments(centred) for f in folds]
    errors = np.zeros(len(_STRENGTHS))
    for train, (noisy, cross) in zip(reversed(moments), moments, strict=True):
        for index, strength in enumerate(_STRENGTHS):
            v = _solve(kept, *train, strength)
            # E|V x' - t|^2 but for E|t|^2, which is the same for all.
            errors[index] += float(np.einsum("ck,ck->", v @ noisy, v) - 2 * np.einsum("ck,ck->", cross, v))
    return _solve(kept, *(folds[0] + folds[1]).moments(centred), _STRENGTHS[int(np.argmin(errors))])


def _solve(kept: Array, noisy: Array, cross: Array, strength: float) -> Array:
    level = max(float(np.einsum("kk->k", noisy).mean()), 1e-30)
    damped = noisy + strength * level * np.eye(noisy.shape[0])
    return np.asarray(kept + np.linalg.solve(damped, (cross - kept @ noisy).T).T)
