"""The width of integer activations, `--activations`, checked before any work."""

from __future__ import annotations

from qcompile.context import FLOAT_BITS, WIDTHS, Settings
from qcompile.errors import InputError

INT8 = "int8"
FLOAT = "float"
CHOICES = (INT8, *map(str, WIDTHS[::-1]), FLOAT)


def activation_bits_of(activations: str | int) -> int:
    """The bits of integer activations that `activations` asks for; 8 for `float`, which has none. Raises InputError."""
    text = str(activations)
    if text not in CHOICES:
        raise InputError(f"--activations {text}: choose one of {', '.join(CHOICES)}")
    return 8 if text in (INT8, FLOAT) else int(text)


def check_activations(settings: Settings) -> None:
    """Raise InputError for what activations of fewer than 8 bits, or of float, do not go with."""
    if settings.weight_only is None and settings.stores_any:
        _check_stored(settings)
    if not settings.narrow_activations or settings.weight_only is not None:
        return
    asked = next((f"[nodes] {pattern}: activations {bits}" for pattern, bits in settings.node_activations if bits < 8), "")
    option = f"--activations {settings.activation_bits}" if settings.activation_bits < 8 else asked
    if settings.bits == FLOAT_BITS:
        raise InputError(f"{option} --bits 32: nothing is quantised; leave one of them out")
    if settings.target == "tensorrt":
        raise InputError(f"{option} --target tensorrt: it takes no Clip on integers; use --activations int8")


def _check_stored(settings: Settings) -> None:
    pattern = next((pattern for pattern, bits in settings.node_activations if bits == FLOAT_BITS), "")
    option = f'[nodes] {pattern}: activations "float"'
    if settings.bits == FLOAT_BITS:
        raise InputError(f"{option} --bits 32: nothing is quantised; leave one of them out")
    if settings.format == "integer":
        raise InputError(f"{option} --format integer: no float may stand between the ends; use --format qdq or qoperator")
    if settings.target == "tensorrt":
        raise InputError(f"{option} --target tensorrt: it wants Q/DQ at both operands of a layer; write float = true")


def check_calibrated(settings: Settings, kind: str) -> None:
    """Raise InputError where activations get their scales as they come, or from a source that holds them; `kind`: of the data."""
    if not (settings.narrow_activations or settings.stores_any) or kind not in ("dynamic", "imported"):
        return
    if kind == "imported":
        raise InputError(
            "--activations: the model already holds Q/DQ with widths of its own; leave it out, or give the float one"
        )
    raise InputError("activations: without samples all of them are quantised at run time, in 8 bits; give --data")
