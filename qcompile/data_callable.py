"""Data from a Python function: `path/to/file.py:function` or `package.module:function`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from qcompile.errors import DataError
from qcompile.samples import Row, closest


class CallableSource:
    """Rows of a function without arguments that gives an iterable of feeds or of (feeds, label).

    Feeds are {input name: array} with the batch axis that the model expects. The function is called anew for each
    iteration. While its code is imported and while it runs, the file's own directory (for a module: the working
    directory) stands first on the import path. Raises DataError, chained to what the function raised.
    """

    def __init__(self, module: str, function: str) -> None:
        self._spec = f"{module}:{function}"
        self._path = Path(module) if module.endswith(".py") else None
        self._directory = str(self._path.resolve().parent if self._path else Path.cwd())
        with user_code(self._spec, self._directory, "importing it"):
            loaded = _load_file(self._path, self._spec) if self._path else _load_module(module, self._spec)
        self._function = _without_arguments(_find(loaded, function, self._spec), self._spec)

    @property
    def count(self) -> int | None:
        """None: only running the function tells."""
        return None

    def rows(self, indices: Sequence[int] | None = None) -> Iterator[Row]:
        """All rows, in the order in which the function gives them; it cannot pick `indices`."""
        if indices is not None:
            raise ValueError("a callable has no known indices")
        with user_code(self._spec, self._directory, "calling it"):
            iterator = self._start()
        index = 0
        while True:
            with user_code(self._spec, self._directory, f"asking it for sample {index}"):
                item = next(iterator, _END)
            if item is _END:
                return
            origin = f"{self._spec}: sample {index}"
            yield Row(origin, *_split(item, origin))
            index += 1

    def _start(self) -> Iterator[Any]:
        result = self._function()
        if isinstance(result, Mapping) or not hasattr(result, "__iter__"):
            what = "one dict" if isinstance(result, Mapping) else type(result).__name__
            raise DataError(f"{self._spec}: returned {what}; it must yield feeds or return a list of feeds")
        return iter(result)


def load_function(spec: str) -> tuple[Callable[..., Any], str]:
    """The function `file.py:function` or `package.module:function`, and the directory its code runs with. Raises DataError."""
    module, _, function = spec.rpartition(":")
    path = Path(module) if module.endswith(".py") else None
    directory = str(path.resolve().parent if path else Path.cwd())
    with user_code(spec, directory, "importing it"):
        loaded = _load_file(path, spec) if path else _load_module(module, spec)
    return _find(loaded, function, spec), directory


@contextmanager
def user_code(spec: str, directory: str, doing: str) -> Iterator[None]:
    """Run a user's code with `directory` first on the import path; what it raises becomes a DataError that names `spec`."""
    sys.path.insert(0, directory)
    try:
        yield
    except DataError:
        raise
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        raise DataError(f"{spec}: {doing} raised {type(error).__name__}: {said}") from error
    finally:
        if directory in sys.path:
            sys.path.remove(directory)


_END = object()


def _split(item: object, origin: str) -> tuple[Mapping[str, Any], object]:
    feeds, label = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
    if not isinstance(feeds, Mapping):
        raise DataError(f"{origin}: is a {type(item).__name__}; yield a dict {{input name: array}}, or a pair of it and a label")
    return feeds, label


def _load_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise DataError(f"{spec}: no such file {path}")
    # The name must not hide an installed module, yet stand in sys.modules: dataclasses and pickle look there.
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    found = importlib.util.spec_from_file_location(f"qcompile_data_{path.stem}_{digest}", path)
    if found is None or found.loader is None:
        raise DataError(f"{spec}: {path} cannot be imported")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[found.name]
        raise
    return module


def _load_module(name: str, spec: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise DataError(f"{spec}: no such file, and {name!r} is no module name; give file.py:function")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and one that it imports is not
        raise DataError(f"{spec}: no module named {error.name!r}; give file.py:function or install it") from error


def _find(module: ModuleType, function: str, spec: str) -> Callable[..., Any]:
    found: Any = module
    for part in function.split("."):
        if not hasattr(found, part):
            hint = closest(part, [n for n in dir(found) if not n.startswith("_")])
            raise DataError(f"{spec}: there is no {part!r} in it{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise DataError(f"{spec}: {function!r} is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


def _without_arguments(found: Callable[..., Any], spec: str) -> Callable[[], Any]:
    try:
        parameters = inspect.signature(found).parameters.values()
    except (ValueError, TypeError):  # some builtins have no signature; a call then tells
        parameters = {}.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed:
        raise DataError(f"{spec}: takes the argument {needed[0]!r}; it must be callable without arguments")
    return found
