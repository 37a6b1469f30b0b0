"""A process as the launcher starts it: it says who it is, and once it is asked to stop takes its time to end well."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from partial_lora.worker import end_with_launcher

heard: list[int] = []


def main(folder: Path, seconds: float) -> None:
    """Work until asked to stop, then until there is FOLDER/end (seconds: for so long; 0: do not wait to be asked)."""
    end_with_launcher()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: heard.append(number))
    own = {key: value for key, value in os.environ.items() if key.startswith(("ACCELERATE_", "FSDP_", "WORLD"))}
    rank = os.environ["RANK"]

    def say(what: str, told: object) -> None:
        (folder / f"{what}_{rank}.tmp").write_text(json.dumps(told))
        (folder / f"{what}_{rank}.tmp").rename(folder / f"{what}_{rank}.json")

    def wait_for(happened: Callable[[], object]) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not happened():
            time.sleep(0.05)

    say("began", own | {"pid": os.getpid()})
    wait_for(lambda: heard)
    say("ending", list(heard))
    wait_for((folder / "end").exists)
    say("ended", heard)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
