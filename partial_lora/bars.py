"""Progress of a run on a terminal: a bar for each stage, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Task

_EVERY = 30.0  # seconds between two lines about a stage, where there is no bar


def _duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, whichever reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class Bars:
    """One bar for each stage; without a terminal, plain lines at a stage's start and end, and every 30 seconds.

    clock: gives seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console, self._clock = console, clock
        self._tasks: dict[str, Task] = {}
        self._printed: dict[str, float] = {}  # when the last line was, of stages that have not ended
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]:>14}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
            get_time=clock,
            speed_estimate_period=600,
            redirect_stdout=not console.stderr,  # while bars are on stderr, stdout is for a file or a pipe
        )

    def __enter__(self) -> Bars:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def note(self, line: str) -> None:
        """Print a line beside the bars."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def update(self, event: Mapping) -> None:
        """Draw one event of a worker: how many units of a stage are done, and of how many (None: not known)."""
        stage, done, total = event["stage"], event["done"], event["total"]
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
        if stage not in self._tasks:
            self._progress.add_task(stage, total=total, count="", detail="")
            self._tasks[stage] = self._progress.tasks[-1]
            self._print(stage, "…")
        task = self._tasks[stage]
        self._progress.update(task.id, completed=done, total=total, count=count, detail=", ".join(detail))
        if stage in self._printed and task.finished:
            self._print(stage, "done")
            del self._printed[stage]
        elif stage in self._printed and self._clock() - self._printed[stage] >= _EVERY:
            left = [] if task.time_remaining is None else [f"{timedelta(seconds=task.time_remaining)} left"]
            self._print(stage, ", ".join([count, *detail, *left]))

    def _print(self, stage: str, text: str) -> None:
        if not self._console.is_terminal:
            self._printed[stage] = self._clock()
            self.note(f"{stage} {text}")


@contextmanager
def bar(stage: str, *, shown: bool = True) -> Iterator[Callable[[int, int | None], None]]:
    """Draw a bar on stderr if that is a terminal; yield the function (done, total) that advances it."""
    if not shown or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console

    with Bars(Console(stderr=True)) as bars:
        yield lambda done, total: bars.update({"stage": stage, "done": done, "total": total})
