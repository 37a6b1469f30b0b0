"""Imports go down only, from package to package and from module to module inside one (docs/developing/house.md)."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import partial_lora

# From the ground up; names in one tuple stand side by side and import none of each other.
ORDER = (
    ("errors", "progress", "bars"),
    ("files",),
    ("masks",),
    ("tasks", "adapter"),
    ("models",),
    ("calibration",),
    ("methods",),
    ("training",),
    ("runs",),
    ("finished",),
    ("report", "train"),
    ("worker",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {name: height for height, names in enumerate(ORDER) for name in names}
PACKAGE = Path(partial_lora.__file__).parent


def test_the_page_draws_the_same_order() -> None:
    page = (PACKAGE.parent / "docs" / "developing" / "house.md").read_text(encoding="utf-8")
    block = page.split("## Packages")[1].split("```")[1]
    drawn: dict[int, set[str]] = {}
    for indent, names in re.findall(r"^( *)((?:\w+(?:\.py|/) {0,2})+)", block, re.MULTILINE):
        drawn.setdefault(len(indent), set()).update(name.strip("/").removesuffix(".py") for name in names.split())
    assert [drawn[indent] for indent in sorted(drawn, reverse=True)] == [set(names) for names in ORDER[:-1]]


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
    """The modules of this package that one imports when it is loaded."""
    found = set()
    for node in loaded(tree.body):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "partial_lora":
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in full}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
    return found - {"partial_lora"}


def loaded(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is loaded, those under `try`, `if` and `with` among them."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test).removeprefix("typing.") == "TYPE_CHECKING":
            yield from loaded(node.orelse)
        elif isinstance(node, (ast.Try, ast.If, ast.With)):
            parts = (node, *getattr(node, "handlers", ()))
            for name in ("body", "orelse", "finalbody"):
                yield from (each for part in parts for each in loaded(getattr(part, name, [])))


def trees() -> dict[str, ast.Module]:
    return {name: without_main_guard(ast.parse(file.read_text(encoding="utf-8"))) for name, file in modules().items()}


def without_main_guard(tree: ast.Module) -> ast.Module:
    """`python -m partial_lora.train` is the command line under another name, so its guard may call it."""
    guard = "__name__ == '__main__'"
    kept = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == guard)]
    return ast.Module(body=kept, type_ignores=[])


def test_packages_import_downward_only() -> None:
    known = set(modules())
    upward = set()
    for name, tree in trees().items():
        own = name.split(".")[1] if "." in name else None
        for other in imports(tree, known) if own else ():
            theirs = other.split(".")[1]
            if theirs != own and HEIGHT[theirs] >= HEIGHT[own]:
                upward.add((own, theirs))
    assert upward == set()


def test_modules_import_each_other_in_no_circle() -> None:
    known = set(modules())
    edges = {name: imports(tree, known) - {name} for name, tree in trees().items()}
    TopologicalSorter(edges).prepare()


def test_the_top_of_the_package_is_short() -> None:
    names = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    assert names - {"conf", "py"} <= HEIGHT.keys()
