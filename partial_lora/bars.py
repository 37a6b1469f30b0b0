"""Progress of a run on a terminal: a bar for each stage, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_EVERY = 30.0  # seconds between two lines about a stage, where there is no bar


def _duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, whichever reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


@dataclass
class _Lines:
    """The plain lines about one stage: when its first event came, how far it was then, when the last line was."""

    began: float
    at: int
    printed: float
    ended: bool = False


class Bars:
    """One bar for each stage; without a terminal, plain lines at a stage's start and end, and every 30 seconds.

    clock: gives seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console, self._clock = console, clock
        self._tasks: dict[str, int] = {}
        self._lines: dict[str, _Lines] = {}
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]:>14}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
            redirect_stdout=not console.stderr,  # while bars are on stderr, stdout is for a file or a pipe
        )

    def __enter__(self) -> Bars:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def note(self, line: str) -> None:
        """Print a line beside the bars."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def update(self, event: Mapping) -> None:
        """Draw one event of a worker: how many units of a stage are done, and of how many (None: not known)."""
        stage, done, total = event["stage"], event["done"], event["total"]
        if "note" in event:
            self.note(f"{stage}: {event['note']}")
        if "expected" in event:
            self.note(f"{stage}: about {_duration(event['expected'])}")
        count = f"{done // 1_000_000}/{total // 1_000_000} MB" if stage == "download" else f"{done}/{total or '?'}"
        detail = []
        if "module" in event:
            detail.append(f"{event['module']} {event.get('axis', '')} {event.get('sparsity', 0):.2f}")
        if "loss" in event:
            detail.append(f"loss {event['loss']:.3f}")
        if "tokens_per_second" in event:
            detail.append(f"{event['tokens_per_second']:,.0f} tokens/s")
        detail += [f"validation {name} {value:.4f}" for name, value in event.get("validation", {}).items()]
        if not self._console.is_terminal:
            self._print_line(stage, done, total, [count, *detail])
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, count="", detail="")
        self._progress.update(self._tasks[stage], completed=done, total=total, count=count, detail=", ".join(detail))

    def _print_line(self, stage: str, done: int, total: int | None, words: Sequence[str]) -> None:
        now = self._clock()
        if stage not in self._lines:
            self._lines[stage] = _Lines(now, done, now)
            self.note(f"{stage} …")
        lines = self._lines[stage]
        if lines.ended:  # validation begins again after every epoch
            return
        if total is not None and done >= total:
            lines.ended = True
            self.note(f"{stage} done")
        elif now - lines.printed >= _EVERY and done > lines.at:
            lines.printed = now
            if total is not None:
                left = round((now - lines.began) / (done - lines.at) * (total - done))
                words = [*words, f"{timedelta(seconds=left)} left"]
            self.note(f"{stage} {', '.join(words)}")


@contextmanager
def bar(stage: str, *, shown: bool = True) -> Iterator[Callable[[int, int | None], None]]:
    """Draw a bar on stderr if that is a terminal; yield the function (done, total) that advances it."""
    if not shown or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console

    with Bars(Console(stderr=True)) as bars:
        yield lambda done, total: bars.update({"stage": stage, "done": done, "total": total})
