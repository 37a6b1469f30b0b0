"""What a run leaves behind: files that are whole or absent, one writer a directory, result.json."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from partial_lora.errors import PartialLoraError

RESULT = "result.json"
CONFIG = "config.yaml"
CALIBRATION = "calibration.json"
PREDICTIONS = "predictions.parquet"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
TRACKERS = "trackers.json"  # what trackers call the run, so that a resumed one goes on in the same place
EARLIER = ".earlier.json"  # the record of an attempt that did not end, while it is gone on with
LOG = "train.log"
LOCK = ".lock"
INTERRUPTED = "interrupted"  # the error of a run that was asked to stop
_BROKEN = "result.json.broken"
_OF_TRACKERS = {TRACKERS, "tensorboard", "wandb"}


def read_result(directory: Path, name: str = RESULT) -> dict | None:
    """The record of a run, or None where there is none that can be read and says what became of the run."""
    try:
        result = json.loads((Path(directory) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and "status" in result else None


def is_finished(directory: Path) -> bool:
    """True where a run ended well and every file it promises is there, whole."""
    result = read_result(directory)
    ended = bool(result) and result["status"] == "finished" and not _sparsities_alone(result)
    return ended and not lost(directory, result)


def is_recorded(directory: Path) -> bool:
    """True where a run ended well and its record and predictions are there, whole, whatever became of its weights."""
    result = read_result(directory)
    if result is None or result["status"] != "finished" or _sparsities_alone(result):
        return False
    predictions = Path(directory) / PREDICTIONS
    size = (result.get("files") or {}).get(PREDICTIONS)
    return predictions.is_file() and size in (None, predictions.stat().st_size)


def lost(directory: Path, result: Mapping) -> str | None:
    """What a finished run's directory lacks of what its record promises, naming the file; None where nothing."""
    trained = [PREDICTIONS, f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors"]
    promised = [CONFIG] + ([] if _sparsities_alone(result) else trained)
    promised += [CALIBRATION] if result.get("calibration") else []
    sizes = dict.fromkeys(promised) | (result.get("files") or {})  # earlier records know names alone
    for name, size in sizes.items():
        file = Path(directory) / name
        if not file.is_file():
            return f"{name} is missing"
        if size is not None and file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    return None


def _sparsities_alone(result: Mapping) -> bool:
    """Whether a record is of `partial-lora calibrate`, which measures nothing trained."""
    return result.get("metrics") == {}


def files(directory: Path) -> dict[str, int]:
    """The files by which a finished run is known to be whole, and their sizes in bytes."""
    directory = Path(directory)
    found = [directory / CONFIG, directory / PREDICTIONS, directory / CALIBRATION, *(directory / ADAPTER).rglob("*")]
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in found if path.is_file()}


def is_calibrated(directory: Path) -> bool:
    """True where `partial-lora calibrate` ended well and its artefact is there."""
    result = read_result(directory)
    whole = bool(result) and result["status"] == "finished" and not lost(directory, result)
    return whole and (Path(directory) / CALIBRATION).is_file()


def prepare(directory: Path, *, anew: bool) -> list[str]:
    """Make a run's directory ready for another attempt; gives what there is to say of what was found, a line each.

    What an attempt that did not end left for the next one stays: checkpoints, sparsities, log, what trackers keep, and
    its record under another name. All else goes, result.json first: whatever is still there when this is interrupted
    belongs to no finished run. With `anew` nothing stays but the lock, which is held.
    """
    said, record = [], directory / RESULT
    result = read_result(directory)
    if result is not None and result["status"] == "finished":  # overwritten, or it has lost files
        reason = None if anew else lost(directory, result)
        said += [f"{directory}: {reason}; the run is done again"] if reason else []
        anew = True
    elif result is not None:
        os.replace(record, directory / EARLIER)
    elif record.exists():
        os.replace(record, directory / _BROKEN)
        said.append(f"{record}: broken, no record of a run; set aside as {_BROKEN}")
    record.unlink(missing_ok=True)
    stays = {LOCK} if anew else {LOCK, CHECKPOINTS, CALIBRATION, LOG, EARLIER, _BROKEN, *_OF_TRACKERS}
    for entry in directory.iterdir():
        if entry.name in stays:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return said


def remove_checkpoints(directory: Path) -> None:
    """Drop what only a run that has not ended needs."""
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    (directory / EARLIER).unlink(missing_ok=True)


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
        raise PartialLoraError(
            f"results_dir: cannot write to {directory}: {error.strerror}; set it to a folder that can be written"
        ) from error
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
