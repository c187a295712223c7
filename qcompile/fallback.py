"""Where a limit does not hold: raise the layers that cost most, to 8 bits, then to float, until it does.

The order comes from the diagnosis of the model as it stands: noise / signal of a layer's output where it alone is quantised,
divided by the bytes that raising it adds. Each stage (to 8 bits, to float) raises all layers first: if the limit does not hold
even so, the next stage starts from there; if it does, bisection finds the fewest in that order that hold it. n layers thus take
at most 1 + ceil(log2 n) compilations a stage, however many have to be raised.

The choice goes by one part of the evaluation samples; the verdict is on the others, which no choice has seen (on all of them
where nothing was raised: then there was none). The fewest layers that hold a limit on some samples do so by luck, in part: so
bisection asks for one standard error to spare (the rule of Breiman et al. 1984), and all stay raised where that cannot be had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

from qcompile.accuracy import Accuracy
from qcompile.context import FLOAT_BITS
from qcompile.limits import Limits
from qcompile.plan import LayerRecord

LEAST_SAMPLES = 20  # in the part that chooses: one sample is 5 % of it

_SPARE = 1.0  # standard errors

T = TypeVar("T")
Raised: TypeAlias = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Trial(Generic[T]):
    """One compilation with `raised` layers, measured on the part that chooses. `layers`: its diagnosis (None: there is none)."""

    raised: Raised
    accuracy: Accuracy
    layers: Sequence[LayerRecord] | None
    built: T


@dataclass(frozen=True)
class Move:
    """A layer raised `from_bits` -> `to_bits` (32: float), what the diagnosis said of it before, and the bytes that it adds.

    from_activation_bits: what it read; 8 bits are read from then on.
    """

    node: str
    op: str
    from_bits: int
    to_bits: int
    own_db: float | None
    sqnr_out_db: float | None
    bytes_added: int
    from_activation_bits: int = 8


@dataclass
class Found(Generic[T]):
    """How a search ended. best: the trial to keep; held: whether the limits hold for it; enough: whether there were samples to
    choose by; tried: one row a compilation."""

    best: Trial[T]
    held: bool
    enough: bool = True
    moves: list[Move] = field(default_factory=list)
    tried: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self, verdict_samples: int) -> dict[str, Any]:
        """The report's `fallback`."""
        accuracy = self.best.accuracy
        return {
            "held": self.held,
            "samples": {"search": accuracy.samples if self.enough else 0, "verdict": verdict_samples},
            "search": {"top1_agreement": accuracy.top1_agreement, "drop_points": accuracy.drop_points},
            "raised": [asdict(move) for move in self.moves],
            "tried": self.tried,
        }


def search(
    compile_with: Callable[[Raised], Trial[T]], limits: Limits, bits: int, *, may_raise: bool = True, to_float: bool = True
) -> Found[T]:
    """Compile as asked; where `limits` do not hold, with more and more layers raised.

    compile_with: compiles with these layers raised, and measures. bits: what weights have as asked, or activations where those
    have fewer. Nothing is raised without `may_raise` or with fewer than `LEAST_SAMPLES` to choose by; nothing becomes float
    without `to_float`.
    At most three trials are held at a time.
    """
    first = compile_with(())
    found = Found(first, limits.holds(first.accuracy))
    found.tried.append(_row(first, found.held))
    if not may_raise or first.accuracy.samples < LEAST_SAMPLES:
        found.enough = False
        return found
    for to_bits in [b for b in ((8, FLOAT_BITS) if to_float else (8,)) if b > bits]:
        if not found.held:
            _stage(compile_with, limits, to_bits, found)
    return found


def rank(layers: Iterable[LayerRecord], to_bits: int) -> list[Move]:
    """The layers that have or read fewer bits and have any error, by falling noise / signal for each byte added. Ties keep their
    order."""
    moves = [
        Move(
            layer.node,
            layer.op,
            layer.bits,
            to_bits,
            layer.own_db,
            layer.sqnr_out_db,
            _bytes_added(layer, to_bits),
            layer.activation_bits,
        )
        for layer in layers
        if (layer.bits < to_bits or layer.activation_bits < min(to_bits, 8)) and layer.own_db is not None
    ]
    return sorted(moves, key=lambda move: -(10 ** (-(move.own_db or 0.0) / 10)) / move.bytes_added)


def _bytes_added(layer: LayerRecord, to_bits: int) -> int:
    return max(1, layer.weights * (to_bits - layer.bits) // 8)


def _stage(compile_with: Callable[[Raised], Trial[T]], limits: Limits, to_bits: int, found: Found[T]) -> None:
    """Raise layers to `to_bits` on top of what `found.best` has raised; `found` becomes the fewest that hold, else all."""
    layers = found.best.layers or ()
    order = rank(layers, to_bits)
    if to_bits == FLOAT_BITS:
        order = order[: len(layers) - 1]  # one layer at least stays integer: else there is nothing to compile
    base = found.best.raised

    def attempt(count: int) -> Trial[T]:
        trial = compile_with(_merged(base, order[:count]))
        found.tried.append(_row(trial, limits.holds(trial.accuracy)))
        return trial

    if not order:
        return
    failed, count = 0, len(order)  # too few raised, and enough
    found.best = attempt(count)
    found.held = limits.holds(found.best.accuracy)
    to_spare = limits.holds(found.best.accuracy, _SPARE)
    while to_spare and count - failed > 1:
        middle = (failed + count) // 2
        trial = attempt(middle)
        if limits.holds(trial.accuracy, _SPARE):
            found.best, count = trial, middle
        else:
            failed = middle
    _add(found.moves, order[:count])


def _merged(base: Raised, moves: Iterable[Move]) -> Raised:
    return tuple(sorted({**dict(base), **{move.node: move.to_bits for move in moves}}.items()))


def _add(moves: list[Move], more: Iterable[Move]) -> None:
    """Append `more`; a layer raised twice becomes one move, with what was said of it first."""
    places = {move.node: index for index, move in enumerate(moves)}
    for move in more:
        if move.node not in places:
            moves.append(move)
            continue
        old = moves[places[move.node]]
        moves[places[move.node]] = Move(
            old.node,
            old.op,
            old.from_bits,
            move.to_bits,
            old.own_db,
            old.sqnr_out_db,
            old.bytes_added + move.bytes_added,
            old.from_activation_bits,
        )


def _row(trial: Trial[T], held: bool) -> dict[str, Any]:
    raised = [bits for _, bits in trial.raised]
    return {
        "raised_to_8": raised.count(8),
        "raised_to_float": raised.count(FLOAT_BITS),
        "top1_agreement": trial.accuracy.top1_agreement,
        "drop_points": trial.accuracy.drop_points,
        "held": held,
    }
