"""Progress of a run, from its worker to its parent, and requests to stop, which go the other way as signals.

A worker may outlive its parent and may write from inside libraries that own the terminal, so progress does not go
through a pipe or a terminal bar: it is one JSON object a line, appended to a file that the parent reads.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "PARTIAL_LORA_PROGRESS"
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the signals that ask a process to stop
_INTERVAL = 0.1  # seconds between two events of one stage; a bar drawn more often than that looks the same

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


@contextmanager
def handling(handler: Callable, numbers: Sequence[int] = STOPPING) -> Iterator[None]:
    """Handle signals by a function while the block lasts.

    A SIGHUP that is ignored stays ignored, as `nohup` asks. Only the main thread of a process is sent signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers = [number for number in numbers if number != signal.SIGHUP]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def leave(number: int, frame: object) -> None:
    """End the process at a signal by raising SystemExit, so that nothing is left half-written."""
    sys.exit(128 + number)
