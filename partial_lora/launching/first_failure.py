"""Failures of processes: each of several leaves word of its own, and the parent picks the one that caused the others.

torchelastic's error files and ChildFailedError have times in whole seconds, and only the processes that had exited at
one look: they often name the echo of a failure in its place.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from partial_lora import files

VARIABLE = "PARTIAL_LORA_FAILURES"  # names the folder; outside a launched run there is none
_EXITS = "exits.json"
_TERMINATED = (-signal.SIGTERM, 128 + signal.SIGTERM)
_CLOSE = 5.0  # seconds within which peers notice that a process is gone


@dataclass(frozen=True)
class Failure:
    """The process that failed first (None: the launcher), and why in one line; explained: it left that line itself."""

    rank: int | None
    reason: str
    explained: bool = True

    def text(self, processes: int) -> str:
        """Return the failure as the record of a run of so many processes has it."""
        if self.rank is None:
            return self.reason
        return f"process {self.rank} of {processes} {'failed: ' if self.explained else ''}{self.reason}"


def report(reason: str) -> None:
    """Leave word of why this process failed. Does nothing outside a launched run or where that cannot be written."""
    rank = os.environ.get("RANK")
    _leave_word(f"rank{rank}.json" if rank else "launcher.json", {"rank": rank and int(rank), "reason": reason})


def report_exits(exits: Mapping[int, tuple[int, float]]) -> None:
    """Leave word of how the workers of this machine ended: exit code and second of those that failed, by rank."""
    _leave_word(_EXITS, {"exits": {rank: list(end) for rank, end in exits.items()}})


def _leave_word(name: str, content: dict) -> None:
    folder = os.environ.get(VARIABLE)
    if folder:
        with suppress(OSError):  # the folder went with whoever would have read it
            files.write_json(Path(folder) / name, {"time": time.time(), **content})


def first(folder: Path) -> Failure | None:
    """Return the failure that caused the others; None where nobody left word.

    A process that is killed leaves no word, and its peers then fail of a broken connection. Processes that waited for a
    peer that failed, and that the launcher had to kill, ended long after that peer.
    """
    words = {path.name: files.read_json(path) for path in folder.glob("[!.]*.json")}
    exits = {int(rank): tuple(end) for rank, end in words.pop(_EXITS, {"exits": {}})["exits"].items()}
    explained = min(words.values(), key=lambda word: word["time"], default=None)
    silent = exits.keys() - {word["rank"] for word in words.values()}
    # Those that were terminated, as the launcher does with the peers of a process that failed, come last.
    ended = min(((exits[rank][0] in _TERMINATED, exits[rank][1], rank) for rank in silent), default=None)
    if ended and (explained is None or (not ended[0] and ended[1] <= explained["time"] + _CLOSE)):
        code = exits[ended[2]][0]
        by_signal = f"was ended by {signal.Signals(-code).name}" if code < 0 else None
        return Failure(ended[2], by_signal or f"ended with code {code} and did not say why", explained=False)
    return explained and Failure(explained["rank"], explained["reason"])
