"""Progress of a run: events from its worker to its parent, and what they look like on a terminal.

A worker may outlive its parent and may write from inside libraries that own the terminal, so progress does not go
through a pipe or a terminal bar: it is one JSON object a line, appended to a file that the parent reads.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

VARIABLE = "PARTIAL_LORA_PROGRESS"
_INTERVAL = 0.1  # seconds between two events of one stage; a bar drawn more often than that looks the same
_EVERY = 30.0  # seconds between two lines about a stage, where there is no bar
_ENOUGH = 0.05  # of a stage's work, or a minute of it, is done before it says how long the rest takes

_last: dict[str, float] = {}


def emit(stage: str, done: int, total: int, **detail: object) -> None:
    """Tell the parent that `done` of `total` units of a stage are finished.

    Free to call often: events of one stage closer than 0.1 s are dropped, except the first and the last. Does nothing
    outside a worker, on ranks other than 0, and where the file cannot be written.
    """
    now = time.monotonic()
    if done < total and now - _last.get(stage, -_INTERVAL) < _INTERVAL:
        return
    _last[stage] = now
    path = os.environ.get(VARIABLE)
    if not path or os.environ.get("RANK", "0") != "0":
        return
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "done": done, "total": total, **detail}) + "\n")
    except OSError:
        os.environ.pop(VARIABLE)  # a progress bar must not end a training over a full disk or a removed directory


class Reader:
    """The events appended to a progress file since the last look."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0

    def __iter__(self) -> Iterator[dict]:
        if not self.path.exists():
            return
        with open(self.path, encoding="utf-8") as file:
            file.seek(self._position)
            for line in iter(file.readline, ""):
                if not line.endswith("\n"):
                    break  # half a line: the rest comes with the next look
                self._position = file.tell()
                yield json.loads(line)


@dataclass
class _Stage:
    """A stage under way: its bar and lines, and the share of its work that was done at each time.

    bar: the number of its bar, on a terminal. printed: when the last line about it was. expected: when and how many
    seconds the stage was said to take, before its own pace showed.
    """

    printed: float
    bar: TaskID | None = None
    ended: bool = False
    expected: tuple[float, float] | None = None
    began: tuple[float, float] | None = None  # seconds and share at the first unit: what came before was no work of it
    lately: deque[tuple[float, float]] = field(default_factory=deque)

    def left(self, now: float, share: float | None) -> str:
        """Return the time that is left, as the last half of the time that has passed would have it.

        Before that shows, it is what the stage was said to take; "" if nothing is known.
        """
        seconds = None if share is None else self._by_its_pace(now, share)
        if seconds is None and self.expected:
            at, whole = self.expected
            seconds = whole - (now - at)
        return "" if seconds is None or seconds < 0 else f"{timedelta(seconds=round(seconds))} left"

    def _by_its_pace(self, now: float, share: float) -> float | None:
        if self.began is None or share < self.lately[-1][1]:  # it begins, or does so again
            self.began = now, share
            self.lately.clear()
        self.lately.append((now, share))
        began, at = self.began
        passed = now - began
        while len(self.lately) > 1 and self.lately[1][0] <= now - max(_EVERY, passed / 2):
            self.lately.popleft()
        since, before = self.lately[0]
        if share == before or not (share - at >= _ENOUGH or passed >= 2 * _EVERY):
            return None
        return (now - since) / (share - before) * (1 - share)


class Bars:
    """One bar for each stage; without a terminal, plain lines at a stage's start and end, and every 30 seconds."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = console
        self._stages: dict[str, _Stage] = {}
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]:>14}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
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
        """Draw one event of a worker: how many units of a stage are done, and of how many (None: not known).

        Units that take unlike time come with the `share` of the stage's work that is done, which then says when it has
        ended. `left`: the seconds that the stage is expected to take from now on.
        """
        name, done, total = event["stage"], event["done"], event["total"]
        if "note" in event:
            self.note(f"{name}: {event['note']}")
            if not total:  # a line alone
                return
        share = event.get("share", done / total if done and total else None)
        if name == "download":
            count = f"{done // 1_000_000}/{total // 1_000_000} MB"
        else:
            count = f"{100 * share:.0f} %" if event.get("share") is not None else f"{done}/{total or '?'}"
        detail = []
        if "module" in event:
            detail.append(f"{event['module']} {event['axis']} {event['sparsity']:.2f}")
        if "loss" in event:
            detail.append(f"loss {event['loss']:.3f}")
        if "tokens_per_second" in event:
            detail.append(f"{event['tokens_per_second']:,.0f} tokens/s")
        detail += [f"validation {metric} {value:.4f}" for metric, value in event.get("validation", {}).items()]
        now, is_new = time.monotonic(), name not in self._stages
        stage = self._stages.setdefault(name, _Stage(now))
        if "left" in event:
            stage.expected = now, event["left"]
        left = stage.left(now, share)
        if self._console.is_terminal:
            if is_new:
                stage.bar = self._progress.add_task(name, count="", left="", detail="")
            drawn = {"completed": done, "total": total} if share is None else {"completed": share, "total": 1.0}
            self._progress.update(stage.bar, **drawn, count=count, left=left, detail=", ".join(detail))
            return
        if is_new:
            self.note(f"{name} …")
        if stage.ended:  # validation begins again after every epoch
            return
        if share is not None and share >= 1:
            stage.ended = True
            self.note(f"{name} done")
        elif now - stage.printed >= _EVERY:
            stage.printed = now
            self.note(f"{name} {', '.join(filter(None, [count, *detail, left]))}")


@contextmanager
def bar(stage: str, *, shown: bool = True) -> Iterator[Callable[..., None]]:
    """Draw a bar on stderr if that is a terminal; yield the function (done, total, **detail) that advances it."""
    if not shown or not sys.stderr.isatty():
        yield lambda done, total, **detail: None
        return
    from rich.console import Console

    with Bars(Console(stderr=True)) as bars:
        yield lambda done, total, **detail: bars.update({"stage": stage, "done": done, "total": total, **detail})
