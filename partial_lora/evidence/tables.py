"""The tables of evidence by name, and the page of claims that is made of their verdicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from partial_lora.evidence import table1, table2, table3, table4, table5, table6, table7
from partial_lora.evidence.artefact import Artefact
from partial_lora.evidence.comparable import comparable
from partial_lora.evidence.recorded import BESIDE, Evidence, collect
from partial_lora.results import write_atomic

TABLES: dict[str, Callable[[Evidence], Artefact]] = {
    module.__name__.rpartition(".")[2]: module.make
    for module in (table1, table2, table3, table4, table5, table6, table7)
}


def gather(results_dir: Path) -> Evidence:
    """The evidence in a preset's results directory, and in what lies beside it."""
    results_dir = Path(results_dir)
    beside = [results_dir.parent / name for name in BESIDE.get(results_dir.name, ())]
    runs, problems = collect(results_dir, *beside)
    kept, notes = comparable(runs)
    return Evidence(results_dir, runs, kept, (*problems, *notes))


def claims(found: list[Artefact], command: str, folder: Path) -> Path:
    """Write folder/claims.md: for each table the paper's claim and what was found of it. Gives the file."""
    parts = [f"    {command}", "# What the tables say of the paper's claims"]
    for table in found:
        parts.append(f"- [{table.name}]({table.name}.md), the paper: {table.claim}\n  Here: {table.verdict}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "claims.md", "\n\n".join(parts) + "\n")
    return folder / "claims.md"
