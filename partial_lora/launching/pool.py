"""Runs side by side on this machine: so many at a time, which share its cores and stop together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from joblib import cpu_count

from partial_lora.errors import PartialLoraError
from partial_lora.files import is_locked
from partial_lora.launching import directory, launch
from partial_lora.launching.paths import run_directory
from partial_lora.settings.schema import Config
from partial_lora.signals import handling

IsMade = Callable[[Config], bool]  # whether a run is recorded as far as it is to go

_LOOK = 0.3  # seconds between two looks at requests to stop
_THREADS = "OMP_NUM_THREADS"
_SHARED: dict[str, str] = {}  # what `share_threads` has set


def side_by_side(
    configs: Sequence[Config], jobs: int, is_made: IsMade, then: Callable[[int, launch.Outcome], None]
) -> int:
    """Make runs, so many at a time; return the exit code. then: is told the place in `configs` of each that has ended.

    A request to stop goes on to all that are under way.
    """
    requests: list[int] = []
    waiting = list(enumerate(configs))
    under_way: dict[Future, tuple[int, int]] = {}  # of each its place and its slot
    if configs:
        launch.ready_to_fork(configs[0])
    with ThreadPoolExecutor(jobs) as pool, handling(lambda number, frame: requests.append(number)):
        try:
            while under_way or (waiting and not requests):
                while waiting and len(under_way) < jobs and not requests:
                    place, config = waiting.pop(0)
                    slot = min({*range(jobs)} - {slot for _, slot in under_way.values()})
                    under_way[pool.submit(alone, config, is_made, lambda: requests, slot)] = place, slot
                for future in wait(under_way, timeout=_LOOK, return_when=FIRST_COMPLETED).done:
                    then(under_way.pop(future)[0], future.result())
        except BaseException:
            requests.append(signal.SIGTERM)
            raise
    return 128 + requests[0] if requests else 0


def alone(config: Config, is_made: IsMade, stop: Callable[[], Sequence[int]] = tuple, slot: int = 0) -> launch.Outcome:
    """Make a run, once no other process has it; one that came as far there is not made again.

    stop, slot: as `launch` takes them.
    """
    place = run_directory(config)
    while not stop():
        if is_locked(place / directory.LOCK):
            time.sleep(_LOOK)
            continue
        if not config.overwrite and is_made(config):
            break
        try:
            return launch.launch(config, "train", stop=stop, slot=slot)
        except PartialLoraError:
            if not is_locked(place / directory.LOCK):
                raise
    return launch.Outcome(place, "skipped")


def share_threads(jobs: int) -> None:
    """Have runs that go side by side share this machine's cores, unless the user has set OMP_NUM_THREADS."""
    if os.environ.get(_THREADS) == _SHARED.get(_THREADS) and (jobs > 1 or _SHARED):
        os.environ[_THREADS] = _SHARED[_THREADS] = str(max(1, cpu_count() // jobs))
