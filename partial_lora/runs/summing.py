"""What became of the runs of a sweep, as a table."""

from __future__ import annotations

import signal
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

_NONE = "–"  # for what does not apply
_LOST = "its process was ended before it could say why"
_LONGEST = 160  # characters of a reason in a table


@dataclass(frozen=True)
class Row:
    """One run: its name, how it ended, its exit code, and what there is to tell of it."""

    name: str
    status: str
    code: int
    seconds: float | None = None
    metric: str = ""
    test: float | None = None
    reason: str = ""


def rows(entries: Mapping[int, Mapping], names: Mapping[int, str], asked: Sequence[int]) -> list[Row]:
    """A row for every run.

    entries: what the jobs say, by their numbers. names: of all runs there should be, by their jobs' numbers. asked: the
    signals that stopped the sweep.
    """
    return [_row(name, entries.get(number), asked) for number, name in names.items()]


def _row(name: str, entry: Mapping | None, asked: Sequence[int]) -> Row:
    if entry is None:
        return Row(name, "not started", 0 if asked else 1)
    name = name or entry.get("directory") or " ".join(entry["overrides"])
    if entry["status"] == "running":  # its job did not live to say more
        stopped = f"interrupted by {signal.Signals(asked[0]).name}; run the command again to redo it" if asked else ""
        return (
            Row(name, "interrupted", 128 + asked[0], reason=stopped) if asked else Row(name, "failed", 1, reason=_LOST)
        )
    skipped = entry["status"] == "skipped"
    seconds = None if skipped else entry.get("seconds")
    metric, test, reason = entry.get("metric", ""), entry.get("test"), entry.get("reason", "")
    return Row(name, entry["status"], entry["code"], seconds, metric, test, reason)


def said(entry: Mapping) -> str:
    """An entry in a few words."""
    if entry["status"] == "running":
        return "started"
    if entry.get("test") is not None:
        return f"{entry['status']}, {entry['metric']} {entry['test']:.4f}"
    return f"{entry['status']}: {entry['reason']}" if entry.get("reason") else entry["status"]


def table(found: Sequence[Row]) -> Table:
    """The rows as they are printed; long reasons, said in full when they came up, are cut short."""
    metrics = {row.metric for row in found if row.metric}
    one = metrics.pop() if len(metrics) == 1 else None
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    drawn.add_column("run", overflow="fold")
    drawn.add_column("status", no_wrap=True)
    drawn.add_column("seconds", justify="right", no_wrap=True)
    drawn.add_column(one or "score", justify="right")
    if told := any(row.reason for row in found):
        drawn.add_column("why", overflow="fold")
    for row in found:
        seconds = _NONE if row.seconds is None else f"{row.seconds:,.1f}"
        test = _NONE if row.test is None else f"{row.test:.4f}" if one else f"{row.metric} {row.test:.4f}"
        reason = textwrap.shorten(row.reason, _LONGEST, placeholder=" …")
        drawn.add_row(Text(row.name), row.status, seconds, test, *([Text(reason)] if told else []))
    return drawn


def counted(found: Sequence[Row]) -> str:
    """How many runs ended in which way."""
    counts = Counter("skipped (finished before)" if row.status == "skipped" else row.status for row in found)
    runs = "1 run" if len(found) == 1 else f"{len(found)} runs"
    missing = any(row.code or row.status == "not started" for row in found)
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"{runs}: {told}" + ("; the same command again does what is missing" if missing else "")
