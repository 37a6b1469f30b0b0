"""`partial-lora report`: what finished runs come to."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from partial_lora.report import figures as gallery
from partial_lora.report import page, records
from partial_lora.report import tables as comparison_files
from partial_lora.report.records import Predictions
from partial_lora.report.statistics import best
from partial_lora.runs.directory import RESULT


def report(arguments: Sequence[str]) -> int:
    """Write the report of a folder of results; gives 0, or 1 where something had to be left out, which is named."""
    arguments = list(arguments)
    asked = _report_parser().parse_args(arguments)
    if (asked.results_dir / RESULT).is_file():
        _tell(None, [], [page.write_run(records.one(asked.results_dir), examples=asked.examples)])
        return 0
    found, problems = records.read(asked.results_dir)
    for problem in problems:
        print(f"partial-lora: {problem}", file=sys.stderr)
    command = " ".join(["partial-lora report", *map(shlex.quote, arguments or [str(asked.results_dir)])])
    failed = _report(asked, found, problems, command)
    return 1 if problems or failed else 0


def _report(
    asked: argparse.Namespace, found: Sequence[records.Run], problems: Sequence[str], command: str
) -> Sequence[str]:
    """Write and show everything; gives what should have been compared and could not be."""
    place, predictions = asked.results_dir, Predictions(asked.results_dir)
    by = records.keys(found, asked.by) if asked.by else []
    found = records.where(found, asked.where)
    frame = records.table(found)
    for key in by:
        frame[key] = [records.value_of(run, key) for run in found]
    folders = records.group(frame)
    grouped = records.group(frame, by) if by else folders
    marked = set() if by or frame.empty else best(folders, predictions)
    how = {"by": by, "spread": asked.spread, "marked": marked}
    written = comparison_files.write(frame, place, command=command, problems=problems, **how)
    compared = comparison_files.differences(found, predictions)
    written += comparison_files.write_differences(compared, place, command=command)
    figures = gallery.draw_gallery(found, folders, compared.rows, predictions, place)
    tables = {"Results": (comparison_files.readable(grouped, **how), comparison_files.notes(grouped, **how))}
    if compared.known:
        tables["Differences from partial"] = (
            comparison_files.readable_differences(compared.rows),
            comparison_files.notes_of_differences(compared),
        )
    written.append(
        page.write(
            place,
            found=found,
            tables=tables,
            command=command,
            origin=comparison_files.origin(frame),
            problems=problems,
            uncompared=compared.uncompared,
            figures=figures + gallery.analyses(place),
            examples=asked.examples,
        )
    )
    if figures:
        written.append(figures[0].files[0].parent)
    said = [f"not compared: {each}" for each in compared.uncompared]
    said += [f"comparison: {remark}" for remark in compared.remarks]
    said += [f"figure {each.files[0].stem}: {each.cut}" for each in figures if each.cut]
    _tell(comparison_files.on_screen(frame, by=by, spread=asked.spread), said, written)
    return compared.problems


def _tell(tables: object, said: Sequence[str], written: Sequence[Path]) -> None:
    from rich.console import Console

    console = Console()
    if tables is not None:
        console.print(tables)
    for line in (*said, *(f"wrote {path}" for path in written)):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="partial-lora report",
        description="Tables, figures and one self-contained page over the finished runs of a folder, written to "
        "RESULTS_DIR/report. A record that is broken or foreign is named and left out, what should have been compared "
        "and could not be is named, and the exit code is then 1. "
        "Of a run's own directory: its page, RUN_DIR/index.html.",
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
        choices=comparison_files.SPREADS,
        default=comparison_files.SPREADS[0],
        help="what follows ±: the standard deviation over runs, or half the 95 %% interval of their mean",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=page.EXAMPLES,
        metavar="N",
        help="how many of the hardest test examples the page shows for each row (default: %(default)s; 0: none)",
    )
    return parser
