"""A process as the launcher starts it: it says who it is, and takes its time to end well once it is asked to."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from partial_lora.worker import end_with_launcher

heard: list[int] = []


def main(folder: Path, seconds: float) -> None:
    """Work until asked to stop (seconds: how long the end then takes; 0: do not wait to be asked)."""
    end_with_launcher()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: heard.append(number))
    own = {key: value for key, value in os.environ.items() if key.startswith(("ACCELERATE_", "FSDP_", "WORLD"))}
    rank = os.environ["RANK"]
    (folder / f"began_{rank}.tmp").write_text(json.dumps(own | {"pid": os.getpid()}))
    (folder / f"began_{rank}.tmp").rename(folder / f"began_{rank}.json")
    end = time.monotonic() + 60
    while seconds and not heard and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(seconds)
    (folder / f"ended_{rank}.json").write_text(json.dumps(heard))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
