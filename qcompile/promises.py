"""The check after every pass: the outputs before and after, on samples, against what the pass promises to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from qcompile.errors import ModelError, PassError
from qcompile.graph import Graph
from qcompile.graph_io import write_model
from qcompile.rewrite import Close, Exact, Lossy, Pass
from qcompile.runtime import Array, Feeds, Optimisation
from qcompile.sessions import graph_session

_KERNEL_CHOICE = 2e-6
_ROUGH_DB = -30.0
_VISIBLE = 1e-5  # of a tensor's size: what marks the place of a broken promise, above float32 noise

Outputs = list[dict[str, Array]]


@dataclass(frozen=True)
class Signature:
    """Names, types and shapes of a model's inputs and outputs: a promise to its users."""

    inputs: tuple[tuple[str, int, object], ...]
    outputs: tuple[tuple[str, int, object], ...]

    @staticmethod
    def of(graph: Graph) -> Signature:
        """The signature of `graph`."""
        ends = [tuple((v.name, v.elem_type, v.dims) for v in values) for values in (graph.inputs, graph.outputs)]
        return Signature(*ends)

    def allows(self, other: Signature) -> bool:
        """Whether `other` is the same, or says a type or shape that was not declared here (shape inference found it)."""
        pairs = [
            (a, b)
            for mine, new in ((self.inputs, other.inputs), (self.outputs, other.outputs))
            for a, b in zip(mine, new, strict=False)
        ]
        same_count = (len(self.inputs), len(self.outputs)) == (len(other.inputs), len(other.outputs))
        return same_count and all(
            a[0] == b[0] and a[1] in (TensorProto.UNDEFINED, b[1]) and (a[2] is None or a[2] == b[2]) for a, b in pairs
        )


class Verifier:
    """Holds the outputs of the model so far on a few feeds, and compares each new state with them."""

    def __init__(self, graph: Graph, feeds: Sequence[Feeds]) -> None:
        self.feeds = list(feeds)
        self.signature = Signature.of(graph)
        self._plain: dict[bool, Outputs] = {}  # of the present model, by `Exact.fused`; idle passes share them
        self._copy: Graph | None = None  # the present model, for finding where a promise broke
        self._fast = self._run(graph, Optimisation.ALL, finished=False)
        self._original = self._fast

    def before(self, graph: Graph, step: Pass) -> None:
        """Remember what an Exact pass needs: the outputs in the form in which it keeps every bit."""
        if isinstance(step.keeps, Exact) and step.keeps.fused not in self._plain:
            self._plain[step.keeps.fused] = self._exact_run(graph, step.keeps.fused, step)
        if self._copy is None:
            self._copy = graph.copy()

    def after(self, graph: Graph, step: Pass, finished: bool, rough: bool = False) -> float | None:
        """Check the promise of `step`; returns the SQNR in dB against the model before it (None: no difference).

        `finished`: whether every weight is integer, so that onnxruntime may fuse Q/DQ; `rough`: whether so few bits were asked
        for that a Lossy pass may leave little but noise, which is reported and no fault of the pass. Raises PassError naming pass
        and output.
        """
        _check(graph, step)
        if not self.signature.allows(Signature.of(graph)):
            raise PassError(f"pass '{step.name}' changed the model's inputs or outputs; please report this model")
        now = self._run(graph, Optimisation.ALL, finished, step)
        _compare_kinds(self._fast, now, step)
        before, self._plain = self._plain, {}
        try:
            if isinstance(step.keeps, Exact):
                fused = step.keeps.fused
                self._plain[fused] = self._exact_run(graph, fused, step)
                _compare_exact(before[fused], self._plain[fused], step, 0.0 if fused else _KERNEL_CHOICE)
            elif isinstance(step.keeps, Close):
                _compare_close(self._fast, now, step.keeps.rtol, step)
        except PassError as error:
            place = self._first_difference(graph)
            raise PassError(f"{error}; it shows first at node '{place}'" if place is not None else str(error)) from error
        self._copy = None
        ratio = sqnr_db(self._fast, now)
        kept = sqnr_db(self._original, now) if isinstance(step.keeps, Lossy) else None
        least = step.keeps.least_sqnr_db if isinstance(step.keeps, Lossy) else -np.inf
        if kept is not None and not kept > (min(least, _ROUGH_DB) if rough else least):
            raise PassError(
                f"pass '{step.name}' left {kept:.1f} dB of the float model's signal, less than {least:g} dB; "
                "give representative --data, or keep the worst nodes float with --exclude"
            )
        self._fast = now
        if isinstance(step.keeps, Lossy) and step.keeps.asked_for:
            self._original = now
        return ratio

    def _first_difference(self, graph: Graph) -> str | None:
        """The first node, in graph order, whose output differs from that of its name before the pass; None where none does."""
        assert self._copy is not None
        results = []
        names = {v.name for v in self._copy.values()} & {v.name for v in graph.values()}
        for model in (self._copy, graph.copy()):
            present = {o.name for o in model.outputs}
            model.outputs += [v for v in model.values() if v.name in names - present and v.producer is not None]
            results.append(graph_session(model, optimisation=Optimisation.OFF, fuse_qdq=False).run(self.feeds[0]))
        old, new = results
        for node in graph.nodes:
            for value in node.outputs:
                a, b = old.get(value.name), new.get(value.name)
                if a is None or b is None or a.dtype.kind != "f":
                    continue
                if a.shape != b.shape or not np.allclose(
                    a, b, rtol=0, atol=_VISIBLE * float(np.abs(a).max(initial=0.0)), equal_nan=True
                ):
                    return node.label
        return None

    def _exact_run(self, graph: Graph, fused: bool, step: Pass) -> Outputs:
        return self._run(graph, Optimisation.ALL if fused else Optimisation.OFF, fused, step)

    def _run(self, graph: Graph, level: Optimisation, finished: bool, step: Pass | None = None) -> Outputs:
        try:
            session = graph_session(graph, optimisation=level, fuse_qdq=finished)
            return [session.run(feed) for feed in self.feeds]
        except ModelError as error:
            if step is None:
                raise
            raise PassError(f"pass '{step.name}' left a model that does not run: {error}") from error


def sqnr_db(before: Outputs, after: Outputs) -> float | None:
    """10 log10(sum f^2 / sum (f - q)^2) over all float outputs and feeds, float64; None where there is no difference."""
    signal = noise = 0.0
    for old, new in zip(before, after, strict=True):
        for name, value in old.items():
            if value.dtype.kind != "f":
                continue
            finite = np.isfinite(value)
            f, q = value[finite].astype(np.float64), new[name][finite].astype(np.float64)
            signal += float(np.square(f).sum())
            noise += float(np.square(f - q).sum())
    if noise == 0:
        return None
    return float(10 * np.log10(signal / noise)) if signal > 0 else -np.inf


def _check(graph: Graph, step: Pass) -> None:
    try:
        model = write_model(graph)
        if sum(c.nbytes for c in graph.constants.values()) < 2**30:
            onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise PassError(f"pass '{step.name}' left an invalid model: {' '.join(str(error).split())[:300]}") from error
    except (ModelError, PassError) as error:  # a cycle, a lost tensor, a name given twice
        raise PassError(f"pass '{step.name}' left an invalid model: {error}") from error


def _compare_kinds(before: Outputs, after: Outputs, step: Pass) -> None:
    """What the signature cannot tell: shapes where they are dynamic, types where none was declared."""
    for old, new in zip(before, after, strict=True):
        for name, value in old.items():
            if (value.shape, value.dtype) != (new[name].shape, new[name].dtype):
                raise PassError(
                    f"pass '{step.name}' made output '{name}' {new[name].dtype} {new[name].shape}, "
                    f"it was {value.dtype} {value.shape}; please report this model"
                )


def _compare_exact(before: Outputs, after: Outputs, step: Pass, allowed: float) -> None:
    """Same bits, or the few ulps by which onnxruntime's kernels for packed constants and for computed operands differ."""
    same = all(
        np.array_equal(value, new[name], equal_nan=value.dtype.kind == "f")
        for old, new in zip(before, after, strict=True)
        for name, value in old.items()
    )
    if not same:
        _compare_close(before, after, allowed, step)


def _compare_close(before: Outputs, after: Outputs, rtol: float, step: Pass) -> None:
    for old, new in zip(before, after, strict=True):
        for name, value in old.items():
            if value.dtype.kind != "f":
                if not np.array_equal(value, new[name]):
                    raise PassError(f"pass '{step.name}' changed the integer output '{name}'; please report this model")
                continue
            finite = np.isfinite(value)
            scale = float(np.abs(value[finite]).max(initial=0.0))
            worst = float(np.abs(value[finite] - new[name][finite]).max(initial=0.0))
            same = np.array_equal(value[~finite], new[name][~finite], equal_nan=True)
            if not (same and worst <= rtol * scale):  # a difference of NaN lands here too
                raise PassError(
                    f"pass '{step.name}' moved output '{name}' by {worst:.3g}, more than {rtol:g} of its size {scale:.3g}; "
                    "please report this model"
                )
