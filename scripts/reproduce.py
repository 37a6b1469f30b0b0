"""The tables and figures of the evidence, from the records of finished runs; nothing is trained.

    python scripts/reproduce.py table1 fig3 --results results/cpu
    python scripts/reproduce.py claims --results results/cpu     # what the tables say of the paper's claims

Tables go to RESULTS/tables/NAME.{md,csv,tex}, figures to RESULTS/figures. What is missing is said, and what is there is
made; `make reproduce-NAME` trains what a table or figure is made of.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

from partial_lora.errors import PartialLoraError
from partial_lora.evidence import artefact, tables

CLAIMS = "claims"
FIGURES = tuple(f"fig{number}" for number in range(1, 8))  # as figures.NAMES, without loading matplotlib


def main(arguments: list[str] | None = None) -> int:
    """Make what was asked for, and say which files that is and which runs are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*tables.TABLES, *FIGURES, CLAIMS]
    parser.add_argument("names", nargs="+", choices=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--results", type=Path, default=Path("results/cpu"), metavar="RESULTS")
    asked = parser.parse_args(arguments)
    try:
        for name in dict.fromkeys(asked.names):
            _figure(name, asked.results) if name in FIGURES else _tables(name, asked.results)
    except PartialLoraError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    return 0


def _tables(name: str, results_dir: Path) -> None:
    evidence, folder = tables.gather(results_dir), results_dir / "tables"
    if name == CLAIMS:
        found = [make(evidence) for make in tables.TABLES.values()]
        for table in found:
            print(table.verdict)
        _wrote([tables.claims(found, _command(name, results_dir), folder)])
        return
    table = dataclasses.replace(tables.TABLES[name](evidence), made=_command(name, results_dir))
    _wrote(artefact.write(table, folder))
    for line in table.missing:
        print(f"missing: {line}")
    print(table.verdict)


def _figure(name: str, results_dir: Path) -> None:
    from partial_lora.evidence import figures

    _wrote(figures.make(name, results_dir, results_dir / "figures"))


def _command(name: str, results_dir: Path) -> str:
    return shlex.join(["python", "scripts/reproduce.py", name, "--results", str(results_dir)])


def _wrote(files: list[Path]) -> None:
    for file in files:
        print(f"wrote {file}")


if __name__ == "__main__":
    sys.exit(main())
