"""The tables and figures of the evidence, from the records of finished runs; nothing is trained.

    python scripts/reproduce.py table1 fig3 --results results/cpu
    python scripts/reproduce.py claims --results results/cpu     # what the tables say of the paper's claims

Tables go to RESULTS/tables/NAME.{md,csv}, figures to RESULTS/figures. What is missing is named;
`make reproduce-NAME` trains what a table or figure is made of.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
from pathlib import Path

from evidence import tables
from evidence.runs import gather

from partial_lora.errors import PartialLoraError

_gathered = functools.cache(gather)  # all tables are of the same records
CLAIMS = "claims"
FIGURES = tuple(f"fig{number}" for number in range(1, 8))  # as figures.FIGURES, without loading matplotlib


def main(arguments: list[str] | None = None) -> int:
    """Make what is named, and print which files that is and which runs are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*tables.TABLES, *FIGURES, CLAIMS]
    parser.add_argument("names", nargs="+", choices=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--results", type=Path, default=Path("results/cpu"), metavar="RESULTS")
    options = parser.parse_args(arguments)
    try:
        for name in dict.fromkeys(options.names):
            _figure(name, options.results) if name in FIGURES else _tables(name, options.results)
    except PartialLoraError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    return 0


def _tables(name: str, results_dir: Path) -> None:
    evidence, folder = _gathered(results_dir), results_dir / "tables"
    command = shlex.join(["python", "scripts/reproduce.py", name, "--results", str(results_dir)])
    made = [make(evidence) for each, make in tables.TABLES.items() if name in (each, CLAIMS)]
    _print_files(
        [tables.write_claims(made, folder, command)] if name == CLAIMS else tables.write(*made, folder, command)
    )
    for table in made:
        for line in table.missing if name != CLAIMS else ():
            print(f"missing: {line}")
        for verdict in table.verdicts:
            print(f"{table.name}: {verdict.claim} ({verdict.where}): {tables.in_words(verdict)}; {verdict.found}")


def _figure(name: str, results_dir: Path) -> None:
    from evidence import figures

    _print_files(figures.make(name, results_dir))


def _print_files(files: list[Path]) -> None:
    for file in files:
        print(f"wrote {file}")


if __name__ == "__main__":
    sys.exit(main())
