"""A process that is started, watched, told to stop and waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from partial_lora import progress
from partial_lora.runs import failures

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK = 0.2  # seconds between two looks at a worker
_REMIND = 5.0  # seconds between two requests to stop


def run_process(
    command: list[str],
    environment: Mapping[str, str],
    log: Path,
    watch: Callable[[dict], None],
    *,
    lock: int | None = None,
    started: Callable[[int], None] = lambda pid: None,
    asked: Callable[[], Sequence[int]] = tuple,
) -> tuple[int, failures.Failure | None]:
    """Run a command to its end; gives its exit code, and which of its processes failed first if they said so.

    Its output is added to `log`, its progress goes to `watch`, and it inherits the descriptor `lock`, which it holds on
    should this process die. The first signal that asks this process to stop is passed on; the code is then 128 more
    than its number. asked: gives the signals that count as received, whether or not this process was sent them.
    """
    events = progress.Reader(Path(environment[progress.VARIABLE])) if progress.VARIABLE in environment else None
    held = () if lock is None else (lock,)
    with tempfile.TemporaryDirectory(prefix="partial-lora-") as told, _stopping() as stop:
        told_here = {**environment, failures.VARIABLE: told}
        with open(log, "ab") as file:
            worker = subprocess.Popen(
                command, stdout=file, stderr=file, env=told_here, pass_fds=held, start_new_session=True
            )
        stop.tell(worker)
        try:
            started(worker.pid)
            while worker.poll() is None:
                _tell(events, watch)
                for number in asked()[len(stop.received) :]:
                    stop(number, None)
                stop.remind()
                with suppress(subprocess.TimeoutExpired):
                    worker.wait(_LOOK)
        except BaseException:  # of `watch`, or of a launcher that ends its job: nobody would look after the worker
            worker.terminate()
            worker.wait()
            raise
        _tell(events, watch)
        failure = failures.first(Path(told)) if worker.returncode else None
    if events is not None:
        events.path.unlink(missing_ok=True)
    return (128 + stop.received[0] if stop.received else worker.returncode), failure


def _tell(events: progress.Reader | None, watch: Callable[[dict], None]) -> None:
    for event in events or ():
        watch(event)


class _Stop:
    """Passes the first request to stop on to the worker, and ends the worker's whole group on the second.

    The worker is told again until it ends: Python drops an exception that a signal raises inside a finalizer.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._worker: subprocess.Popen | None = None
        self._told = float("-inf")

    def tell(self, worker: subprocess.Popen) -> None:
        """Name the worker; it hears at once of what was received before it was started."""
        self._worker = worker
        self.remind()

    def remind(self) -> None:
        """Tell the worker what it has been asked to, if it was not told in the last seconds."""
        if self.received and time.monotonic() - self._told > _REMIND:
            self._told = time.monotonic()
            self._worker.send_signal(self.received[0])

    def __call__(self, number: int, frame: object) -> None:
        self.received.append(number)
        if self._worker is None:
            return
        if len(self.received) == 1:
            self.remind()
        else:
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(self._worker.pid, signal.SIGKILL)


@contextmanager
def _stopping() -> Iterator[_Stop]:
    stop = _Stop()
    heard = [number for number in STOPPING if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}  # nohup is to be heeded
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
