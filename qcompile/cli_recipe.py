"""`--recipe` of a command: its table becomes the defaults of its options, which the command line overrides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from qcompile.recipe import DEFAULT, Recipe, converted, read_recipe

_NEVER = {"recipe", "version", "help", "traceback", "model", "float-model", "quantised"}


def _load(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> Recipe | None:
    if path is None and not DEFAULT.is_file():
        return None
    recipe = read_recipe(DEFAULT if path is None else path)
    name = str(ctx.command.name)
    convert, places = _converters(ctx)
    table = recipe.compile if name == "compile" else recipe.check
    ctx.default_map = {places[key]: value for key, value in converted(table, convert, recipe.origin, name).items()}
    return recipe


RECIPE = click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    metavar="FILE",
    is_eager=True,
    callback=_load,
    help="Options from a TOML file or an earlier report; the command line wins.  [qcompile.toml, where there is one]",
)


def _converters(ctx: click.Context) -> tuple[dict[str, Callable[[Any], Any]], dict[str, str]]:
    """For each option, by its long name without dashes: how a value is taken, and the name of its parameter."""
    convert: dict[str, Callable[[Any], Any]] = {}
    places: dict[str, str] = {}
    for parameter in ctx.command.params:
        if not isinstance(parameter, click.Option):
            continue
        long = next(name for name in parameter.opts if name.startswith("--"))
        key = long.removeprefix("--")
        if key not in _NEVER:
            convert[key], places[key] = _converter(parameter, ctx), str(parameter.name)
    return convert, places


def _converter(option: click.Option, ctx: click.Context) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if option.is_flag:
            if not isinstance(value, bool):
                raise ValueError(f"{value!r} is not true or false")
            return value
        values = value if option.multiple and isinstance(value, list | tuple) else [value]
        if any(isinstance(v, bool | list | tuple | dict) for v in values):
            raise ValueError(f"{value!r} is not a value of this option")
        try:
            for one in values:
                option.type.convert(str(one), option, ctx)
        except click.BadParameter as error:
            raise ValueError(error.message) from error
        return [str(v) for v in values] if option.multiple else str(value)

    return convert
