"""The options of mixed precision, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qcompile.assignment import require_scipy
from qcompile.context import FLOAT_BITS, WIDTHS, Settings
from qcompile.errors import InputError
from qcompile.options_activations import INT8, activation_bits_of
from qcompile.planner import LIMITS, UNIFORM, Mixing
from qcompile.sensitivity import MEASURES, Effort

BY = ("best", *MEASURES)
_USUAL = ("noise", "hessian", UNIFORM)


def whole_bits(bits: int | str) -> int:
    """`bits` as a number. Raises InputError where it is none."""
    if isinstance(bits, str) and not bits.isdigit():
        raise InputError(f"--bits {bits}: give one of {', '.join(map(str, WIDTHS[::-1]))}, mixed, or 32 for float")
    return int(bits)


def mixing_of(
    bits: int | str,
    limit: str | Sequence[str] | Mapping[str, float],
    widths: str | Sequence[int | str] | None,
    mixed_by: str,
    pareto: int,
    effort: Effort,
    activations: str | int = "int8",
    activation_widths: str | Sequence[int | str] | None = None,
) -> Mixing | None:
    """The options of `--bits mixed`; None for other `bits`. Raises InputError where they cannot be."""
    if bits != "mixed":
        given = {"limit": limit or None, "widths": widths, "pareto": pareto or None, "max-seconds": effort.max_seconds}
        given["activation-widths"] = activation_widths
        given |= {"workers": None if effort.workers == 1 else effort.workers, "scheduler": effort.scheduler}
        first = next((name for name, value in given.items() if value is not None), None)
        if first is not None:
            raise InputError(f"--{first} is for mixed precision; give --bits mixed with it")
        return None
    require_scipy()
    effort.check()
    limits = parse_limits(limit)
    if not limits:
        raise InputError(f"--bits mixed needs a limit: --limit NAME=VALUE with {', '.join(LIMITS)}, such as --limit avg-bits=5")
    if mixed_by not in BY:
        raise InputError(f"--mixed-by {mixed_by}: choose one of {', '.join(BY)}")
    if pareto < 0:
        raise InputError(f"--pareto {pareto}: give a whole number of at least 0")
    offered = parse_widths(widths, floats="latency" in limits)
    read = parse_activation_widths(activation_widths, activations)
    return Mixing(tuple(sorted(limits.items())), offered, _USUAL if mixed_by == "best" else (mixed_by,), pareto, effort, read)


def parse_limits(limit: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """{name: value} of `NAME=VALUE` texts. Raises InputError."""
    pairs: list[tuple[str, str | float]]
    if isinstance(limit, Mapping):
        pairs = [(str(k), v) for k, v in limit.items()]
    else:
        texts = [limit] if isinstance(limit, str) else list(limit)
        pairs = [(name.strip(), value) for name, _, value in (text.partition("=") for text in texts)]
    found: dict[str, float] = {}
    for name, value in pairs:
        if name not in LIMITS:
            raise InputError(f"--limit {name}: give NAME=VALUE with one of {', '.join(LIMITS)}")
        try:
            number = float(value)
        except ValueError as error:
            raise InputError(f"--limit {name}={value}: give a number, as in --limit {name}=0.5") from error
        if not 0 < number < float("inf"):
            raise InputError(f"--limit {name}={value}: give a number above 0")
        if name in found:
            raise InputError(f"--limit {name}: is given twice")
        found[name] = number
    return found


def parse_widths(widths: str | Sequence[int | str] | None, *, floats: bool) -> tuple[int, ...]:
    """Rising widths from `2,4,float` or a list; all integer ones (and float where `floats`) without any. Raises InputError."""
    if widths is None:
        return (*WIDTHS, FLOAT_BITS) if floats else WIDTHS
    parts = [p.strip() for p in widths.split(",")] if isinstance(widths, str) else [str(p) for p in widths]
    found = []
    for part in parts:
        bits = FLOAT_BITS if part == "float" else int(part) if part.isdigit() else 0
        if bits not in (*WIDTHS, FLOAT_BITS):
            raise InputError(
                f"--widths {part or widths}: give some of {', '.join(map(str, WIDTHS))}, float, with commas between them"
            )
        found.append(bits)
    if set(found) == {FLOAT_BITS}:
        raise InputError("--widths float: nothing would be quantised; give a width of integers with it")
    return tuple(sorted(set(found)))


def parse_activation_widths(widths: str | Sequence[int | str] | None, activations: str | int) -> tuple[int, ...]:
    """Rising widths from `4,8,float` or a list, 32 for float; that of `--activations` without any. Raises InputError."""
    if widths is None:
        return (activation_bits_of(activations),)
    if activations != INT8:
        raise InputError(f"--activations {activations} --activation-widths: leave --activations out, or give one width with it")
    parts = [p.strip() for p in widths.split(",")] if isinstance(widths, str) else [str(p) for p in widths]
    allowed = (*map(str, WIDTHS), "float")
    for part in parts or [""]:
        if part not in allowed:
            raise InputError(f"--activation-widths {part}: give some of {', '.join(allowed)} with commas between them")
    if set(parts) == {"float"}:
        raise InputError("--activation-widths float: no layer would compute in integers; give a width of integers with it")
    return tuple(sorted({FLOAT_BITS if p == "float" else int(p) for p in parts}))


def check_mixing(mixing: Mixing, settings: Settings, *, has_data: bool) -> None:
    """Raise InputError for what mixed precision does not go with."""
    if not has_data:
        raise InputError("--bits mixed measures each layer on samples; give --data")
    if settings.weight_only is not None:
        raise InputError("--bits mixed --activations float: widths are chosen for integer layers; leave --activations out")
    if settings.format == "integer" and FLOAT_BITS in mixing.widths:
        raise InputError("--bits mixed --format integer: no layer may stay float; give --widths without float")
    if FLOAT_BITS in mixing.activations and settings.format == "integer":
        raise InputError("--activation-widths float --format integer: no float may stand between the ends; leave float out")
    if settings.target == "tensorrt" and not set(mixing.widths) <= {4, 8, FLOAT_BITS}:
        raise InputError("--bits mixed --target tensorrt: it takes plain INT4 and INT8 weights; give --widths 4,8")
    if settings.target == "tensorrt" and set(mixing.activations) != {8}:
        raise InputError("--activation-widths --target tensorrt: it takes activations of 8 bits alone; leave it out")
    if settings.opset is not None and settings.opset < 21 and min(mixing.widths) < 8:
        raise InputError(f"--bits mixed --opset {settings.opset}: packed weights need opset 21; leave --opset out")
