"""Signals that ask a process to stop."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
