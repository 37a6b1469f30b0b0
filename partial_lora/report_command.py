"""`partial-lora report`: what finished runs come to."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from partial_lora import comparison_table, report, runs, selection


def main(arguments: Sequence[str]) -> int:
    """Write the report of a folder of results; gives 0, or 1 where something had to be left out, which is named."""
    arguments = list(arguments)
    asked = _parser().parse_args(arguments)
    found, problems = runs.read(asked.results_dir)
    for problem in problems:
        print(f"partial-lora: {problem}", file=sys.stderr)
    by = selection.keys(found, asked.by) if asked.by else []
    found = selection.where(found, asked.where)
    frame = runs.table(found)
    for key in by:
        frame[key] = [selection.value_of(run, key) for run in found]
    command = " ".join(["partial-lora report", *map(shlex.quote, arguments or [str(asked.results_dir)])])
    how = {"by": by, "spread": asked.spread}
    written = report.write(frame, asked.results_dir, command=command, problems=problems, **how)
    written += comparison_table.write(frame, asked.results_dir, command=command)
    _tell(report.on_screen(frame, **how), written)
    return 1 if problems else 0


def _tell(tables: object, written: Sequence[Path]) -> None:
    from rich.console import Console

    console = Console()
    console.print(tables)
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="partial-lora report",
        description="Tables over the finished runs of a folder, written to RESULTS_DIR/report. A record that is broken "
        "or foreign is named and left out, and the exit code is then 1.",
    )
    parser.add_argument("results_dir", nargs="?", default=Path("results"), type=Path, metavar="RESULTS_DIR")
    parser.add_argument(
        "--where",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="only runs of that task, method, operating_point, seed, … or setting (method.rank=16); A,B is either",
    )
    parser.add_argument("--by", metavar="KEY,KEY", help="average over all that these keys do not tell apart")
    parser.add_argument(
        "--spread",
        choices=report.SPREADS,
        default=report.SPREADS[0],
        help="what follows ±: the standard deviation over runs, or half the 95 %% interval of their mean",
    )
    return parser
