"""Imports go down only: a module never imports one of a higher layer (DESIGN, "Where things live")."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import partial_lora

LAYERS = (
    {
        "config",
        "schema",
        "sparsity_schema",
        "trainer_schema",
        "ranges",
        "errors",
        "progress",
        "results",
        "ledger",
        "cache",
        "sealed",
        "locks",
        "redaction",
        "remote_code",
        "handover",
    }
    | {"members", "data_dir", "tuning", "rate_settings", "operating_point", "identity", "unknown_key"}
    | {"accelerate_file", "failures"},
    {"importance", "leverage", "pruning", "saliency", "masks", "runs", "finished", "asked_task", "places"}
    | {"conditions", "wellformed", "predicted"}
    | {"reliability", "stability", "retest", "inputs", "selection", "grouping"},
    {"adapter", "models", "tasks", "targets", "saved_model"},
    {"scoring", "rubric", "metric", "likelihood", "ordering", "reuse", "slices"}
    | {"fewshot", "heads", "loading"}
    | {"calibration", "calibration_file", "curves", "points", "search", "store", "peers", "scopes", "question"}
    | {"budget", "repair", "findings"},
    {
        "methods",
        "fit",
        "checkpoints",
        "resuming",
        "by_length",
        "data_workers",
        "callbacks",
        "trackers",
        "tracking",
        "evaluation",
        "report",
        "figures",
        "parameters",
        "record",
        "world",
        "watch",
    }
    | {"export", "formats", "proof", "outline", "inference", "answering", "evaluate_run"}
    | {"judges", "mixture_judge", "losses", "options", "generation", "memory", "fsdp"}
    | {"cost", "activations", "comparison", "comparison_table", "comparison_files", "pairing"}
    | {"marking", "series", "report_figures", "report_maps", "report_panels", "gallery"}
    | {"hardest", "page", "page_drawings", "method_comparison"}
    | {"closing", "calibration_figures"},
    {"launch", "cluster", "processes", "running", "summing"},
    {"calibrating"},
    {"train"},
    {
        "worker",
        "launcher",
        "cli",
        "composition",
        "evaluate_command",
        "predict_command",
        "report_command",
    }
    | {"plan", "sweep", "job"},
    {"__main__", "__init__"},
)
PACKAGE = Path(partial_lora.__file__).parent


def imported(tree: ast.AST) -> set[str]:
    """The first-level names of this package that a module imports, wherever it does."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "partial_lora":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("partial_lora."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("partial_lora.")}
    return names


def graph() -> dict[str, set[str]]:
    """What every module (adapter, models and tasks as one each) imports of this package."""
    edges: dict[str, set[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).with_suffix("").parts[0]
        tree = without_main_guard(ast.parse(file.read_text(encoding="utf-8")))
        edges.setdefault(name, set()).update(imported(tree) - {name})
    return edges


def without_main_guard(tree: ast.Module) -> ast.Module:
    """`python -m partial_lora.train` is the command line under another name, so its guard may call it."""
    guard = "__name__ == '__main__'"
    kept = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == guard)]
    return ast.Module(body=kept, type_ignores=[])


def test_every_module_has_a_layer_and_imports_none_above_it() -> None:
    layer = {name: height for height, names in enumerate(LAYERS) for name in names}
    edges = graph()
    assert not edges.keys() - layer.keys()
    upward = [(name, other) for name in edges for other in edges[name] if layer.get(other, -1) > layer[name]]
    assert not upward


def test_no_imports_go_round_in_a_circle() -> None:
    edges = graph()
    list(TopologicalSorter({name: others & edges.keys() for name, others in edges.items()}).static_order())
