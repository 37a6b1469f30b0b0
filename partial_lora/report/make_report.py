"""The report of a folder of results: its runs read once, then tables, figures and the page of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType

from partial_lora.report import figures, filters, page, records, seed_groups, tables
from partial_lora.report.predictions import Predictions


@dataclass(frozen=True)
class Made:
    """A report that was written.

    Attributes:
        table: the runs, for a terminal.
        files: what was written, and the folder of figures.
        remarks: what was not drawn in full, a line each.
        is_whole: False where a record is broken.
    """

    table: RenderableType
    files: list[Path]
    remarks: list[str]
    is_whole: bool


def report(
    place: Path,
    *,
    where: Sequence[str],
    by: str | None,
    examples: int,
    command: str,
    note: Callable[[str], None],
) -> Made:
    """Write the report of the runs below `place` into place/report.

    Args:
        where: conditions on runs, KEY=VALUE each (`filters.where`).
        by: the keys, with commas between them, that rows of the table differ in; None for the usual ones.
        examples: how many of the hardest test examples the page shows for each row.
        command: the command line, for the head of every file.
        note: called with a line for each run that is left out, before anything is drawn.

    Raises PartialLoraError for a folder without runs, and for a key that no run has.
    """
    runs, left_out = records.read(place)
    for line in tables.said_of(left_out):
        note(line)
    predictions = Predictions(place)
    keys = filters.keys(runs, by) if by else []
    runs = filters.where(runs, where)
    frame = seed_groups.table(runs)
    for key in keys:
        frame[key] = [filters.value_of(run, key) for run in runs]
    table = seed_groups.group(frame)
    files = tables.write(frame, place, command=command, left_out=left_out, by=keys)
    drawn = figures.draw_gallery(runs, place, bool(where))
    whole = page.write(
        place,
        runs=runs,
        table=table,
        by=(keys, seed_groups.group(frame, keys)) if keys else None,
        predictions=predictions,
        gallery=drawn,
        command=command,
        origin=tables.origin(frame),
        left_out=left_out,
        examples=examples,
    )
    return Made(
        table=tables.on_screen(frame, by=keys),
        files=[*files, whole, *([drawn[0].files[0].parent] if drawn else [])],
        remarks=[f"figure {figure.files[0].stem}: {figure.cut}" for figure in drawn if figure.cut],
        is_whole=not any(run.is_broken for run in left_out),
    )
