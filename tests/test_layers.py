"""Imports go down only, from package to package and from module to module inside one (docs/developing/house.md)."""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import partial_lora

# From the ground up; names in one tuple stand side by side and import none of each other.
ORDER = (
    ("errors", "signals", "progress"),
    ("credentials", "files", "ranges"),
    ("masks",),
    ("budget",),
    ("adapter", "tasks"),
    ("models",),
    ("calibration",),
    ("methods",),
    ("training",),
    ("settings",),
    ("building",),
    ("launching",),
    ("finished",),
    ("report",),
    ("train", "compare"),
    ("worker", "completion"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {name: height for height, names in enumerate(ORDER) for name in names}
PACKAGE = Path(partial_lora.__file__).parent


def test_every_public_name_is_there() -> None:
    for name, file in modules().items():
        if "\n__all__ = " in file.read_text(encoding="utf-8"):
            module = importlib.import_module(name)
            assert [each for each in module.__all__ if not hasattr(module, each)] == []


def modules() -> dict[str, Path]:
    names = {}
    for file in PACKAGE.rglob("*.py"):
        parts = ("partial_lora", *file.relative_to(PACKAGE).with_suffix("").parts)
        names[".".join(parts).removesuffix(".__init__")] = file
    return names


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of this package that one imports, inside functions, too; not those for types alone."""
    found = set()
    for node in statements(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "partial_lora":
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in full}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
    return found - {"partial_lora"}


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements but those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).removeprefix("typing.") == "TYPE_CHECKING":
            continue
        yield child
        yield from statements(child)


@functools.cache
def edges() -> dict[str, set[str]]:
    """The modules of this package that each of them imports."""
    known = set(modules())
    trees = {name: without_main_guard(ast.parse(file.read_text("utf-8"))) for name, file in modules().items()}
    return {name: imports(tree, known) for name, tree in trees.items()}


def without_main_guard(tree: ast.Module) -> ast.Module:
    """`python -m partial_lora.train` is the command line under another name, so its guard may call it."""
    guard = "__name__ == '__main__'"
    kept = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == guard)]
    return ast.Module(body=kept, type_ignores=[])


def test_packages_import_downward_only() -> None:
    upward = set()
    for name, others in edges().items():
        own = name.split(".")[1] if "." in name else None
        for other in others if own else ():
            theirs = other.split(".")[1]
            if theirs != own and HEIGHT[theirs] >= HEIGHT[own]:
                upward.add((own, theirs))
    assert upward == set()


def test_modules_import_each_other_in_no_circle() -> None:
    TopologicalSorter({name: others - {name} for name, others in edges().items()}).prepare()


def test_the_top_of_the_package_is_short() -> None:
    names = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    assert names - {"conf", "py"} <= HEIGHT.keys()
