"""Imports go down only, from package to package and from module to module inside one (docs/developing/house.md)."""

from __future__ import annotations

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import partial_lora

# From the ground up; names in one tuple stand side by side and import none of each other.
ORDER = (
    ("errors", "progress"),
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
    ("worker", "bars"),
    ("cli",),
    ("__main__",),
)
HEIGHT = {name: height for height, names in enumerate(ORDER) for name in names}
PACKAGE = Path(partial_lora.__file__).parent


FILES = {
    ".".join(("partial_lora", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in PACKAGE.rglob("*.py")
}


def imports() -> dict[str, set[str]]:
    """The modules of this package that each of them imports when it is loaded, by their full names."""
    found = {}
    for name, file in FILES.items():
        body = ast.parse(file.read_text(encoding="utf-8")).body
        body += [each for node in body if isinstance(node, (ast.Try, ast.With)) for each in node.body]
        given = [
            (node.module or "", each.name) for node in body if isinstance(node, ast.ImportFrom) for each in node.names
        ]
        own = {(f"{module}.{part}" if f"{module}.{part}" in FILES else module) for module, part in given}
        own |= {each.name for node in body if isinstance(node, ast.Import) for each in node.names}
        found[name] = own & FILES.keys() - {"partial_lora", name}
    return found


def test_every_public_name_is_there() -> None:
    for name, file in FILES.items():
        if "\n__all__ = " in file.read_text(encoding="utf-8"):
            module = importlib.import_module(name)
            assert [each for each in module.__all__ if not hasattr(module, each)] == []


def test_packages_import_downward_only() -> None:
    parts = [
        (name.split(".")[1], other.split(".")[1]) for name, own in imports().items() for other in own if "." in name
    ]
    assert len(parts) > 100
    assert {(own, other) for own, other in parts if own != other and HEIGHT[other] >= HEIGHT[own]} == set()


def test_modules_import_each_other_in_no_circle() -> None:
    TopologicalSorter(imports()).prepare()


def test_the_top_of_the_package_is_short() -> None:
    names = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    assert names - {"conf", "py"} <= HEIGHT.keys()
