"""The gradient of a loss for one layer's weights, by torch: what follows the layer is converted by onnx2fx, an FX graph of torch.

The converted part must give onnxruntime's outputs with the weights as they are; else it is refused. torch is an extra.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from qcompile.divergence import FloatArray
from qcompile.errors import DataError, InputError, ModelError
from qcompile.probing import Study
from qcompile.runtime import Array

_CLOSE = 1e-3  # of the outputs' size, by which torch's may differ from onnxruntime's
_BATCH = 32  # samples at once
_LEAST = 1e-30  # a probability of 0 in float32


def require_torch() -> None:
    """Raise InputError where torch or its converter is missing."""
    try:
        import onnx2fx  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError(
            '--eigenvalue differentiates with torch; pip install "qcompile[torch]" (Python 3.11 or newer)'
        ) from error


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: sums in one order, the same bits in whatever process."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Gradient:
    """Loss `study.loss` (see `divergence`) of the model on the study's probed samples, differentiated by a layer's weights.

    Raises ModelError for a layer behind which an operator cannot be converted, DataError for labels that do not fit.
    """

    def __init__(self, study: Study, layer: int) -> None:
        import onnx2fx
        from onnx2fx.exceptions import Onnx2FxError

        state = study.layer(layer)
        self.study, self.cut = study, state.cut
        self.weight: FloatArray = state.cut.weight.astype(np.float64)
        try:
            self._module: Callable[..., Any] = onnx2fx.convert(self.cut.model())
        except Onnx2FxError as error:
            raise ModelError(f"layer '{self.cut.spec.node}': --eigenvalue: {error}; leave --eigenvalue out") from error
        self.outputs = self.cut.made
        rows = [_Rows(self.cut.feed(i), state.clean[i], study.labels[i]) for i in state.probed]
        self._total = self._weigh(rows)
        self._batches = [batch for alike in _alike(rows, self._inputs(), self.outputs) for batch in self._verified(alike)]

    def __call__(self, weight: FloatArray) -> FloatArray:
        """The gradient at `weight`, in its shape."""
        import torch

        moved = torch.tensor(weight.astype(np.float32), requires_grad=True)
        total = np.zeros(weight.shape)
        for rows in self._batches:
            loss = self._loss(rows, self._run(rows, moved))
            if loss.requires_grad:
                (gradient,) = torch.autograd.grad(loss, moved)
                total += gradient.numpy().astype(np.float64)
        return total

    def _inputs(self) -> list[str]:
        return [name for name in self.cut.entries if name not in (self.cut.spec.weight, self.cut.spec.bias)]

    def _run(self, rows: _Rows, weight: Any = None) -> dict[str, Any]:
        """The outputs behind the layer, by name."""
        import torch

        feed = {name: torch.from_numpy(np.array(rows.feed[name])) for name in self.cut.entries}
        if weight is not None:
            feed[self.cut.spec.weight] = weight
        found = self._module(*feed.values())
        return dict(zip(self.outputs, found if isinstance(found, (tuple, list)) else (found,), strict=True))

    def _verified(self, alike: Sequence[_Rows]) -> list[_Rows]:
        """Samples together where that gives what each gives alone, else one by one."""
        together = [_joined(alike[i : i + _BATCH], self.cut.entries, self._inputs()) for i in range(0, len(alike), _BATCH)]
        if len(alike) > 1 and self._agrees(together[0], strict=False):
            return together
        if not self._agrees(alike[0], strict=True):
            raise ModelError(
                f"layer '{self.cut.spec.node}': --eigenvalue: torch does not compute what onnxruntime does behind it; "
                "leave --eigenvalue out, or the layer with --exclude"
            )
        return list(alike)

    def _agrees(self, rows: _Rows, *, strict: bool) -> bool:
        import torch

        try:
            with torch.no_grad():
                found = self._run(rows)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if strict:
                reason = " ".join(str(error).split())[:200]
                raise ModelError(
                    f"layer '{self.cut.spec.node}': --eigenvalue: torch cannot run the model ({reason}); leave --eigenvalue out"
                ) from error
            return False
        for name in self.outputs:
            wanted, got = rows.clean[name], found[name].numpy()
            if wanted.shape != got.shape:
                return False
            if wanted.dtype.kind == "f" and np.abs(wanted - got).max(initial=0) > _CLOSE * max(
                np.abs(wanted).max(initial=0), 1e-30
            ):
                return False
        return True

    def _weigh(self, rows: Sequence[_Rows]) -> float:
        """What sums are divided by: rows of classes, or the outputs' energy."""
        divergence = self.study.divergence
        if self.study.loss == "noise":
            return max(
                sum(float(np.square(v.astype(np.float64)).sum()) for r in rows for v in r.clean.values() if v.dtype.kind == "f"),
                1e-300,
            )
        if self.study.loss == "labels":
            return float(max(sum(divergence.loss(r.clean, r.label)[1] for r in rows), 1))
        return float(max(sum(divergence.kl(r.clean, r.clean)[1] for r in rows), 1))

    def _loss(self, rows: _Rows, outputs: Mapping[str, Any]) -> Any:
        import torch

        if self.study.loss == "noise":
            parts = [
                torch.square(outputs[n] - torch.from_numpy(rows.clean[n])).sum()
                for n in outputs
                if rows.clean[n].dtype.kind == "f"
            ]
            return torch.stack(parts).sum() / self._total
        name = self.study.divergence.classes
        if name is None or name not in outputs:
            return torch.zeros(())  # the layer does not reach the classes
        logs = self._logs(outputs[name])
        if self.study.loss == "labels":
            wanted = torch.from_numpy(np.asarray(rows.label, np.int64).reshape(-1))
            if len(wanted) != len(logs):
                raise DataError(f"labels do not fit output '{name}' of {len(logs)} rows")
            return -logs[torch.arange(len(logs)), wanted].sum() / self._total
        exact = self._logs(torch.from_numpy(rows.clean[name]))
        return (torch.exp(exact) * (exact - logs)).sum() / self._total

    def _logs(self, value: Any) -> Any:
        """log softmax [rows, classes]."""
        import torch

        while value.ndim > 2 and value.shape[-1] == 1:
            value = value[..., 0]
        value = value.reshape(-1, value.shape[-1])
        if self.study.divergence.probabilities:
            return torch.log(torch.clamp_min(value, _LEAST))
        return torch.log_softmax(value, 1)


class _Rows:
    """One sample or several: what the part is fed, the model's outputs, and labels."""

    def __init__(self, feed: Mapping[str, Array], clean: Mapping[str, Array], label: Any) -> None:
        self.feed, self.clean, self.label = feed, clean, label

    def shapes(self, inputs: Sequence[str], outputs: Sequence[str]) -> tuple[Any, ...]:
        return (*(self.feed[n].shape for n in inputs), *(self.clean[n].shape for n in outputs))


def _alike(rows: Sequence[_Rows], inputs: Sequence[str], outputs: Sequence[str]) -> list[list[_Rows]]:
    """Samples that may run together, as far as shapes tell: equal ones with a batch axis of 1; the others by themselves."""
    found: dict[Any, list[_Rows]] = {}
    for index, row in enumerate(rows):
        shapes = row.shapes(inputs, outputs)
        found.setdefault(shapes if all(s[:1] == (1,) for s in shapes) else index, []).append(row)
    return list(found.values())


def _joined(rows: Sequence[_Rows], entries: Sequence[str], inputs: Sequence[str]) -> _Rows:
    if len(rows) == 1:
        return rows[0]
    feed = {n: np.concatenate([r.feed[n] for r in rows]) if n in inputs else rows[0].feed[n] for n in entries}
    clean = {n: np.concatenate([np.atleast_1d(r.clean[n]) for r in rows]) for n in rows[0].clean}
    labels = None if rows[0].label is None else np.concatenate([np.asarray(r.label).reshape(-1) for r in rows])
    return _Rows(feed, clean, labels)
