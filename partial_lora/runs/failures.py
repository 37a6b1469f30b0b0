"""Which of several processes failed first, and of what: each leaves word, and whoever started them reads it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "PARTIAL_LORA_FAILURES"  # names the folder; outside a launched run there is none
_EXITS = "exits.json"
_ASKED = (-signal.SIGTERM, 128 + signal.SIGTERM)
_CLOSE = 5.0  # seconds within which peers notice that a process is gone


@dataclass(frozen=True)
class Failure:
    """The process that failed first (None: the launcher), and why in one line; `said` where it said so itself."""

    rank: int | None
    reason: str
    said: bool = True


def report(reason: str) -> None:
    """Leave word of why this process failed. Does nothing outside a launched run or where that cannot be written."""
    rank = os.environ.get("RANK")
    _write(f"rank{rank}.json" if rank else "launcher.json", {"rank": rank and int(rank), "reason": reason})


def report_exits(exits: Mapping[int, tuple[int, float]]) -> None:
    """Leave word of how the workers of this machine ended: exit code and second of those that failed, by rank."""
    _write(_EXITS, {"exits": {rank: list(each) for rank, each in exits.items()}})


def first(folder: Path) -> Failure | None:
    """The failure that the others followed from; None where nobody left word.

    A process that is killed says nothing, and its peers then fail of a broken connection. What the launcher had to kill
    itself, since it was waiting for a peer that failed, ended long after that peer.
    """
    told = [_read(path) for path in sorted(folder.glob("*.json")) if path.name != _EXITS]
    told = sorted((each for each in told if each), key=lambda each: each["time"])
    exits = {int(rank): how for rank, how in _read(folder / _EXITS).get("exits", {}).items()}
    silent = exits.keys() - {each["rank"] for each in told}
    # Those that were asked to end, as the launcher asks the peers of a process that failed, come last.
    ended = sorted((code in _ASKED, second, rank, code) for rank in silent for code, second in [exits[rank]])
    if ended and (not told or (not ended[0][0] and ended[0][1] <= told[0]["time"] + _CLOSE)):
        return Failure(ended[0][2], _how(ended[0][3]), said=False)
    return Failure(told[0]["rank"], told[0]["reason"]) if told else None


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code} and did not say why"


def _write(name: str, content: dict) -> None:
    folder = os.environ.get(VARIABLE)
    if not folder:
        return
    path = Path(folder) / name
    try:
        path.with_suffix(".tmp").write_text(json.dumps({"time": time.time(), **content}), encoding="utf-8")
        path.with_suffix(".tmp").rename(path)
    except OSError:  # the folder went with whoever would have read it
        return


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
