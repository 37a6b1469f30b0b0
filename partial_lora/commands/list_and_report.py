"""runs, pack and report: what runs there are, and what the finished ones come to."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from partial_lora.commands.common import add_where, libraries, parser_of_results, whole
from partial_lora.errors import PartialLoraError, escaped
from partial_lora.launching import directory, packs
from partial_lora.report import EXAMPLES


def runs(arguments: Sequence[str]) -> int:
    """List the runs of a results directory, the last one last; return the exit code."""
    parser = parser_of_results(
        "runs",
        "List the runs of a results directory, the last one last: when it began, task, model, method, "
        "operating point, seed, test score (or how the run stands), path. Other commands take the path, the start of "
        "the run's id, or `latest`.",
    )
    place = parser.parse_args(list(arguments)).results_dir
    from partial_lora.report import summary

    found = [(path, packs.recorded(path)) for path in packs.directories(place)]
    found.sort(key=lambda run: str((run[1] or {}).get("started") or ""))  # an ISO time in UTC
    rows = [[*map(escaped, summary.run_line(path, result))] for path, result in found]
    if not rows:
        raise PartialLoraError(f"{place}: expected runs in {place}/runs; `partial-lora train` makes them")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def pack(arguments: Sequence[str]) -> int:
    """Pack the finished runs of a results directory into two tables; return 1 where something broken is left out."""
    parser = parser_of_results(
        "pack",
        "Write the finished runs of a results directory into two tables: RESULTS_DIR/runs.parquet, a row a "
        "run with its whole record, and predictions.parquet, a row a test example. Runs that are packed already stay; "
        "report, runs, compare and train read them. Runs that failed or have not ended are counted and left out.",
    )
    parser.add_argument(
        "--remove",
        action="store_true",
        help="then remove the folders of packed runs, their weights included, once the pack is read back and compared",
    )
    parsed = parser.parse_args(list(arguments))
    with libraries():
        from partial_lora.report import tables, write_pack
    done = write_pack.pack(parsed.results_dir, remove=parsed.remove)
    for line in tables.said_of(done.left_out):
        print(f"partial-lora: {line}", file=sys.stderr)
    removed = f", {len(done.removed)} folders removed" if parsed.remove else ""
    print(f"{parsed.results_dir / packs.RUNS_TABLE}: {done.runs} runs, {done.added} new{removed}")
    return int(any(each.is_broken for each in done.left_out))


def report(arguments: Sequence[str]) -> int:
    """Write the report of a folder of results; return 1 where something had to be left out, which is named, else 0."""
    parser = parser_of_results(
        "report",
        "Make tables, figures and one self-contained page of the finished runs of a folder, in "
        "RESULTS_DIR/report. Runs that failed or have not ended are counted and left out. A record that is broken or "
        "foreign is named, and the exit code is then 1. For the directory of one run, its page is made: "
        "RUN_DIR/index.html. `partial-lora compare RESULTS_DIR` says who is better.",
    )
    add_where(parser)
    parser.add_argument("--by", metavar="KEY,KEY", help="average over everything else than these keys")
    parser.add_argument(
        "--examples",
        type=whole,
        default=EXAMPLES,
        metavar="N",
        help="how many of the hardest test examples the page shows for each row (default: %(default)s; 0: none)",
    )
    parsed = parser.parse_args(list(arguments))
    with libraries():
        from partial_lora.report import make_report, page, records
    place = directory.find(parsed.results_dir)
    if (place / directory.RESULT).is_file():
        if parsed.where or parsed.by:
            raise PartialLoraError(f"{place}: --where and --by choose among runs, and this is one; leave them out")
        print(f"wrote {page.write_run(records.one(place), examples=parsed.examples)}")
        return 0
    made = make_report.report(
        place,
        where=parsed.where,
        by=parsed.by,
        examples=parsed.examples,
        command=" ".join(["partial-lora report", *map(shlex.quote, arguments or [str(place)])]),
        note=lambda line: print(f"partial-lora: {line}", file=sys.stderr),
    )
    from rich.console import Console

    Console().print(made.table)
    print(*made.remarks, *(f"wrote {path}" for path in made.files), sep="\n")
    return 0 if made.is_whole else 1
