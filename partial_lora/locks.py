"""One process at a time, where several may want to make the same thing."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def alone(path: Path, purpose: str) -> Iterator[None]:
    """Hold the right to make `path`; waits for whoever holds it, and says so.

    purpose: what is done to it, a verb for the log. The lock is a file beside it, whose folder is made if need be; the
    kernel frees it when its holder dies. Raises OSError where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.parent / f".{path.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: another process is about to %s it; waiting", path, purpose)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
