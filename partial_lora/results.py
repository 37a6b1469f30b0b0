"""What a run leaves behind: files that are whole or absent, one writer a directory, result.json."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from partial_lora.errors import PartialLoraError

RESULT = "result.json"
CONFIG = "config.yaml"
CALIBRATION = "calibration.json"
PREDICTIONS = "predictions.parquet"
ADAPTER = "adapter"
LOG = "train.log"
LOCK = ".lock"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader finds the old content or the new one, never a part.

    The content reaches the disk under a temporary name before the file takes its own.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write plain data as indented JSON, atomically; refuses NaN, which JSON has no word for."""
    write_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_result(directory: Path) -> dict | None:
    """The record of a run, or None where there is none that can be read and says what became of the run."""
    try:
        result = json.loads((Path(directory) / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and "status" in result else None


def is_finished(directory: Path) -> bool:
    """True where a run ended well and every file it promises is there."""
    result = read_result(directory)
    if not result or result["status"] != "finished":
        return False
    files = [CONFIG, PREDICTIONS, f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors"]
    if result.get("calibration"):
        files.append(CALIBRATION)
    return all((Path(directory) / name).is_file() for name in files)


def is_calibrated(directory: Path) -> bool:
    """True where `partial-lora calibrate` ended well and its artefact is there."""
    result = read_result(directory)
    return bool(result) and result["status"] == "finished" and (Path(directory) / CALIBRATION).is_file()


def clear(directory: Path) -> None:
    """Remove everything an earlier attempt left in a run's directory, except the lock that is held on it.

    result.json goes first: whatever is still there when this is interrupted belongs to no finished run.
    """
    (directory / RESULT).unlink(missing_ok=True)
    for entry in directory.iterdir():
        if entry.name == LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def name_holder(lock: int, worker: int | None = None) -> None:
    """Write into a held lock who holds it: this process, and the worker that holds it on should this one die."""
    whose = f"pid {os.getpid()} on {socket.gethostname()}" + (f" (worker: pid {worker})" if worker else "")
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{whose}\n".encode(), 0)


@contextmanager
def locked(directory: Path) -> Iterator[int]:
    """Hold a run's directory, made if need be, for as long as the block lasts; gives the lock's file descriptor.

    The kernel drops the lock when the last process that inherited the descriptor ends, so a dead holder never blocks
    a run and a worker that outlived its parent still does. Raises PartialLoraError that names the holder.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise PartialLoraError(f"results_dir: cannot write to {directory}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            raise PartialLoraError(f"{directory} is in use by {holder}: wait for it to end, or stop it") from error
        name_holder(descriptor)
        yield descriptor
    finally:
        os.close(descriptor)
