"""Imports point one way: cli -> pipeline -> passes -> (kernels, rewrite) -> graph -> errors (DESIGN section 4)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"qcompile": ROOT / "qcompile", "qcompile.passes": ROOT / "passes", "qcompile.kernels": ROOT / "kernels"}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the three packages."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.glob("*.py")):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


MODULES = modules()


def at_module_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run on import: not those inside functions, nor under TYPE_CHECKING."""
    found: list[ast.stmt] = []
    stack: list[ast.stmt] = list(tree.body)
    while stack:
        statement = stack.pop()
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.dump(statement.test):
            continue
        found.append(statement)
        for child in ast.iter_child_nodes(statement):
            if isinstance(child, ast.stmt):
                stack.append(child)
            elif isinstance(child, ast.ExceptHandler):
                stack += child.body
    return found


def imports(name: str, everywhere: bool = False) -> set[str]:
    """Modules of the project that `name` imports: at module level, or with `everywhere` inside functions too."""
    tree = ast.parse(MODULES[name].read_text())
    statements = [n for n in ast.walk(tree) if isinstance(n, ast.stmt)] if everywhere else at_module_level(tree)
    found = set()
    for statement in statements:
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0, f"{name} imports relatively"
            base = statement.module or ""
            names = [f"{base}.{alias.name}" for alias in statement.names]
            names = [n if n in MODULES else base for n in names]
        else:
            continue
        found |= {n for n in names if n in MODULES and n != name}
    return found


GRAPH = {name: imports(name) for name in MODULES}


def reaches(start: str) -> set[str]:
    """Modules that importing `start` brings in, by module-level imports (packages' __init__ not counted)."""
    found: set[str] = set()
    stack = [start]
    while stack:
        for target in GRAPH[stack.pop()] - found:
            found.add(target)
            stack.append(target)
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_imports_itself_in_a_circle(name: str) -> None:
    assert name not in reaches(name)


def test_only_the_graph_layer_imports_graphsurgeon() -> None:
    users = {name for name, path in MODULES.items() if "onnx_graphsurgeon" in imported_packages(path)}
    assert users == {"qcompile.graph"}


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_only_the_runtime_creates_sessions() -> None:
    users = {name for name, path in MODULES.items() if "InferenceSession(" in path.read_text()}
    assert users == {"qcompile.runtime"}


ARROWS = [
    # (modules, what they must never bring in)
    ("qcompile.errors", {"*"}),
    (
        "qcompile.graph",
        {"qcompile.cli", "qcompile.pipeline", "qcompile.passes", "qcompile.kernels", "qcompile.rewrite", "qcompile.context"},
    ),
    ("qcompile.rewrite", {"qcompile.cli", "qcompile.pipeline", "qcompile.passes", "qcompile.kernels"}),
    ("qcompile.context", {"qcompile.cli", "qcompile.pipeline", "qcompile.passes"}),
    ("qcompile.kernels", {"qcompile.cli", "qcompile.pipeline", "qcompile.passes"}),
    ("qcompile.passes", {"qcompile.cli", "qcompile.pipeline"}),
    ("qcompile.pipeline", {"qcompile.cli", "qcompile.command_group", "qcompile.printing"}),
    ("qcompile.check", {"qcompile.cli", "qcompile.pipeline", "qcompile.passes"}),
    ("qcompile.interpret", {"qcompile.cli", "qcompile.pipeline", "qcompile.passes", "qcompile.solver", "qcompile.qparams"}),
]


@pytest.mark.parametrize(("name", "forbidden"), ARROWS, ids=[a[0] for a in ARROWS])
def test_arrows_point_one_way(name: str, forbidden: set[str]) -> None:
    for module in [m for m in MODULES if m == name or m.startswith(name + ".")]:
        got = reaches(module)
        if forbidden == {"*"}:
            assert got == set(), module
        else:
            assert not {g for g in got if any(g == f or g.startswith(f + ".") for f in forbidden)}, module


def test_late_imports_stay_below_their_own_layer() -> None:
    """Imports inside functions may defer work, not turn an arrow round: no pass or graph file reaches up by one."""
    for name in MODULES:
        if name.startswith("qcompile.passes") or name in ("qcompile.graph", "qcompile.graph_io", "qcompile.rewrite"):
            late = imports(name, everywhere=True)
            assert not late & {"qcompile.cli", "qcompile.pipeline"}, name


def test_passes_and_kernels_are_registered_in_one_place() -> None:
    """Passes see each other's helpers, but nobody below the pipeline imports the registry."""
    users = {name for name in MODULES if "qcompile.passes" in imports(name, everywhere=True)}
    assert users <= {"qcompile.pipeline", "qcompile.survey", "qcompile.cli", "qcompile.printing", "qcompile.command_group"}
