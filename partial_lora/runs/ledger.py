"""What becomes of a sweep's jobs, told through files: jobs run in other processes, perhaps on other machines.

A folder that every job can reach holds an entry for each of them, a lock for each run directory, and the requests to
stop. A sweep whose folder is gone has ended, and no job of it starts any more.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from partial_lora import sealed
from partial_lora.errors import PartialLoraError
from partial_lora.runs import results

_LOOK = 0.2  # seconds between two looks at a lock
_STOP = "stop"
_OWN: set[Path] = set()  # what this process has claimed


@dataclass(frozen=True)
class Ledger:
    """The entries of one sweep's jobs, by their numbers."""

    folder: Path

    @classmethod
    def opened(cls, sweep_dir: Path) -> Ledger:
        """A new ledger beside what Hydra writes of a sweep. Raises PartialLoraError where nothing can be written."""
        try:
            sweep_dir.mkdir(parents=True, exist_ok=True)
            return cls(Path(tempfile.mkdtemp(prefix=".jobs-", dir=sweep_dir)).resolve())
        except OSError as error:
            said = f"cannot write to {sweep_dir}: {error.strerror}; set it to a folder that can be written"
            raise PartialLoraError(f"results_dir: {said}") from error

    def close(self) -> None:
        """Remove the folder: what has not started never will."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, job: int, **entry: object) -> None:
        """Say how it stands with a job: its status, the overrides it is of, and whatever else there is to tell."""
        sealed.write_json(self.folder / f"{job}.json", entry)

    def entries(self) -> dict[int, dict]:
        """What the jobs have said so far, in the order of their numbers."""
        files = {int(path.stem): path for path in self.folder.glob("[0-9]*.json")}
        return {job: json.loads(files[job].read_text(encoding="utf-8")) for job in sorted(files)}

    def ask(self, number: int) -> None:
        """Have every job stop, as a signal of that number would; asked a second time they are killed."""
        with open(self.folder / _STOP, "a", encoding="utf-8") as file:
            file.write(f"{number}\n")

    def asked(self) -> list[int]:
        """The numbers of the signals that the jobs are to take for received, in their order."""
        try:
            return [int(line) for line in (self.folder / _STOP).read_text(encoding="utf-8").split()]
        except FileNotFoundError:
            return [] if self.folder.is_dir() else [signal.SIGTERM]

    @contextmanager
    def claimed(self, directory: Path) -> Iterator[bool]:
        """Have a run's directory to oneself among the jobs of this sweep; gives whether one of them had it before.

        Of jobs that are the same run one works and the others wait, unless they are asked to stop. The kernel ends a
        claim with the process that has it.
        """
        with open(self._claim(directory), "a+", encoding="utf-8") as file:
            while not _taken(file.fileno()) and not self.asked():
                time.sleep(_LOOK)
            file.seek(0)
            before = bool(file.read())
            _OWN.add(Path(file.name))
            try:
                yield before
            finally:
                _OWN.discard(Path(file.name))
            file.write("had\n")

    def is_under_way(self, directory: Path) -> bool:
        """True while a job in another process works in a run's directory, or a worker whose job has died."""
        if self._claim(directory) in _OWN:  # who asks is it: to wait for oneself would be without end
            return False
        return _is_held(self._claim(directory)) or _is_held(directory / results.LOCK)

    def is_orphaned(self, directory: Path) -> bool:
        """True where a worker is all that is left of a job."""
        return not _is_held(self._claim(directory)) and _is_held(directory / results.LOCK)

    def _claim(self, directory: Path) -> Path:
        return self.folder / f"{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]}.claim"


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_held(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return not _taken(file.fileno())
    except FileNotFoundError:
        return False
