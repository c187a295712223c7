"""Recipes: options of a compilation or check in a file, `qcompile.toml`, or in the report of an earlier run.

    [compile]
    data = "models/digits_calib.npz"
    effort = "best"
    exclude = ["/stem/*"]

    [check]
    max-drop = 1.0

    [nodes."/block1/*"]      # a name or a shell pattern; the last that matches counts
    bits = 4                 # of its weights: 8, 6, 5, 4, 3 or 2
    [nodes."/head/Gemm"]
    float = true             # stays float
    [nodes."/conv3/Conv"]
    activations = 4          # bits of what it reads: 8, 6, 5, 4, 3 or 2; "float": only its weights are stored in fewer bits
    range = [-1.0, 6.0]      # of its output (a Relu behind it included), or of the graph input of that name

Keys are the names of the options, with `-` or `_`; paths are relative to the working directory. A report holds the same under
`recipe`, so that `qcompile MODEL --recipe report.json` writes the same bytes again.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

from qcompile.context import FLOAT_BITS, WIDTHS
from qcompile.errors import InputError
from qcompile.samples import closest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT = Path("qcompile.toml")
TABLES = ("compile", "check", "nodes")
_NODE_KEYS = ("bits", "activations", "float", "range")
_RENAMED = {"eval": "eval_data"}
_NO_RECIPE = {
    "dump_passes",
    "latency",
    "compare_targets",
    "diagnose",
    "nodes",
    "progress",
    "workers",
    "scheduler",
}  # change no byte, or stand apart
_NEGATED = {"no-bias-correction": "bias_correction", "no-latency": "latency"}


@dataclass(frozen=True)
class NodeSettings:
    """What [nodes] says, as `Settings` takes it: (pattern, bits) of weights and of activations that are read, patterns that stay
    float, (pattern, low, high)."""

    bits: tuple[tuple[str, int], ...] = ()
    exclude: tuple[str, ...] = ()
    ranges: tuple[tuple[str, float, float], ...] = ()
    activations: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Recipe:
    """The tables of a recipe, their keys spelt with `-`. origin: where it came from, for messages."""

    origin: str
    compile: dict[str, Any] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def compile_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `compile_model`, which checks their values. Keys are taken as they are: a recipe for the command
        line alone (`report`, `quiet`) gives arguments that `compile_model` does not have."""
        found = {_python_name(key): value for key, value in self.compile.items() if key not in _NEGATED}
        found |= {_NEGATED[key]: not value for key, value in self.compile.items() if key in _NEGATED}
        return {**found, "nodes": self.nodes}


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a TOML file, or in a JSON file (a report, or a recipe alone). Raises InputError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: the recipe cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the recipe is no text file") from error
    tables: Any
    try:
        tables = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: the recipe cannot be read: {' '.join(str(error).split())}") from error
    if path.suffix.lower() == ".json":
        if not isinstance(tables, dict) or not ({"recipe", *TABLES} & set(tables)):
            raise InputError(f"{path}: holds no recipe; give a qcompile.toml, or a report that --report wrote")
        tables = tables.get("recipe", tables)
    return recipe_of(tables, str(path))


def recipe_of(tables: Any, origin: str) -> Recipe:
    """A recipe from plain tables. Raises InputError for unknown tables and for what no table is."""
    if not isinstance(tables, Mapping):
        raise InputError(f"{origin}: the recipe is no table; write [compile], [check] and [nodes]")
    _check_keys(tables, TABLES, f"{origin}: [{{}}] is no table of a recipe")
    for name in TABLES:
        if not isinstance(tables.get(name, {}), Mapping):
            raise InputError(f"{origin}: {name} is no table; write [{name}]")
    nodes = {str(key): value for key, value in tables.get("nodes", {}).items()}
    node_settings(nodes, origin)
    compiling, checking = ({_key(k): v for k, v in tables.get(name, {}).items()} for name in ("compile", "check"))
    return Recipe(origin, compiling, checking, {key: dict(value) for key, value in nodes.items()})


def node_settings(nodes: Mapping[str, Any], origin: str = "nodes") -> NodeSettings:
    """What [nodes] asks for. Raises InputError for unknown keys and for values that no node can have."""
    bits: list[tuple[str, int]] = []
    activations: list[tuple[str, int]] = []
    exclude, ranges = [], []
    for pattern, table in nodes.items():
        where = f'{origin}: [nodes."{pattern}"]'
        if not isinstance(table, Mapping) or not table:
            raise InputError(f"{where}: give bits, activations, float or range")
        _check_keys(table, _NODE_KEYS, f"{where}: {{!r}} is unknown")
        if "float" in table:
            if not isinstance(table["float"], bool):
                raise InputError(f"{where}: float is {table['float']!r}; give true or false")
            if table["float"] and len(table) > 1:
                raise InputError(f"{where}: float goes with neither bits, activations nor range")
            exclude += [pattern] if table["float"] else []
        if "bits" in table:
            bits.append((pattern, _width(table["bits"], f"{where}: bits")))
        if "activations" in table:
            kept = table["activations"] == "float"
            activations.append((pattern, FLOAT_BITS if kept else _width(table["activations"], f"{where}: activations")))
        if "range" in table:
            ranges.append((pattern, *_range(table["range"], where)))
    return NodeSettings(tuple(bits), tuple(exclude), tuple(ranges), tuple(activations))


def converted(table: Mapping[str, Any], convert: Mapping[str, Callable[[Any], Any]], origin: str, name: str) -> dict[str, Any]:
    """Values of a table as the command line would take them, by the converter of each key.

    Raises InputError, naming table and key, for keys that no option has, with a suggestion, and for values that it refuses.
    """
    _check_keys(table, convert, f"{origin}: [{name}] {{!r}} is no option")
    found = {}
    for key, value in table.items():
        try:
            found[key] = convert[key](value)
        except ValueError as error:
            raise InputError(f"{origin}: [{name}] {key}: {error}") from error
    return found


def _check_keys(given: Iterable[Any], known: Iterable[str], message: str) -> None:
    names = list(known)
    for key in given:
        if _key(key) not in names:
            hint = closest(_key(key), names) or f"; known are {', '.join(sorted(names))}"
            raise InputError(message.format(str(key)) + hint)


def _width(value: Any, where: str) -> int:
    if value not in WIDTHS or isinstance(value, bool):
        hint = "; for a layer that stays float write float = true" if value == "float" else ""
        allowed = ", ".join(map(str, WIDTHS[::-1])) + (', or "float"' if where.endswith("activations") else "")
        raise InputError(f"{where} is {value!r}; give one of {allowed}{hint}")
    return int(value)


def _range(value: Any, where: str) -> tuple[float, float]:
    good = isinstance(value, list | tuple) and len(value) == 2
    good = good and all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in value)
    if not good or not value[0] < value[1] or value[0] > 0 or value[1] < 0:
        raise InputError(f"{where}: range is {value!r}; give [low, high] with low <= 0 <= high and low < high")
    return float(value[0]), float(value[1])


def _key(name: object) -> str:
    return str(name).replace("_", "-")


def _python_name(key: str) -> str:
    return _RENAMED.get(key, key.replace("-", "_"))


def embedded(asked: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """The report's `recipe` of a call of `compile_model` (`function`) with the arguments `asked`, in a recipe's spelling.

    Holds what is not the default and decides about the written bytes; a Dataset stands by its SPEC.
    """
    names = {python: key for key, python in _RENAMED.items()}
    negated = {python: key for key, python in _NEGATED.items()}
    found: dict[str, Any] = {}
    for parameter in signature(function).parameters.values():
        name = parameter.name
        if parameter.kind is not parameter.KEYWORD_ONLY or name in _NO_RECIPE:
            continue
        value = getattr(asked[name], "spec", asked[name])
        value = str(value) if isinstance(value, Path) else value
        value = tuple(value) if name == "exclude" else value
        value = tuple(f"{k}={v:g}" for k, v in value.items()) if isinstance(value, Mapping) else value
        if value is None or value == parameter.default:
            continue
        plain = list(value) if isinstance(value, tuple) else value
        found[negated.get(name, names.get(name, _key(name)))] = True if name in negated else plain
    nodes = {pattern: dict(table) for pattern, table in (asked["nodes"] or {}).items()}
    return {"compile": found, **({"nodes": nodes} if nodes else {})}
