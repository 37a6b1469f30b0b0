"""What a run leaves behind: files that are whole or absent, one writer a directory, result.json."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import yaml

from partial_lora.errors import PartialLoraError
from partial_lora.files import lock, redacted

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


def name_holder(descriptor: int, worker: int | None = None) -> None:
    """Write into a held lock who holds it: this process, and the worker that holds it on should this one die."""
    whose = f"pid {os.getpid()} on {socket.gethostname()}" + (f" (worker: pid {worker})" if worker else "")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{whose}\n".encode(), 0)


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
        if not lock(descriptor):
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            raise PartialLoraError(f"{directory} is in use by {holder}: wait for it to end, or stop it")
        name_holder(descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


# --- The record of a run that becomes result.json: raw numbers, and enough to know where they come from.

_LIBRARIES = ("partial-lora", "torch", "transformers", "timm", "peft", "accelerate", "datasets", "numpy")


def new(settings: Mapping) -> dict:
    """The record of a run that has just begun (DESIGN, result.json)."""
    return {
        "status": "running",
        "seed": settings["seed"],
        "config": redacted(settings),
        "preset": settings.get("preset"),
        "tuning": _tuning(settings.get("trainer", {})),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in _LIBRARIES},
        "git_commit": _git_commit(),
        "device": None,
        "attempts": 1,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": {"calibrate": 0.0, "train": 0.0, "evaluate": 0.0},
        "peak_memory_bytes": None,
        "parameters": {},
        "sparsity": {},
        "shapes": {},
        "calibration": None,
        "metrics": {},
        "history": [],
    }


def finite(value: object) -> object:
    """The same plain data with None for every number that is none: JSON has no word for it."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def timed(record: dict, stage: str) -> Iterator[None]:
    """Note the wall seconds that a stage took, beside those of earlier attempts."""
    start = time.perf_counter()
    yield
    record["seconds"][stage] = round(record["seconds"].get(stage, 0.0) + time.perf_counter() - start, 3)


def carry_on(record: dict, earlier: Mapping) -> None:
    """Let the record of a run that is gone on with know of the attempts before: when they began, what they took."""
    record["started"] = earlier["started"]
    record["attempts"] = earlier.get("attempts", 1) + 1
    kept = {"calibrate", "reliability"} & earlier["seconds"].keys()  # a checkpoint knows the seconds of training
    record["seconds"] |= {stage: earlier["seconds"][stage] for stage in kept}


def _tuning(trainer: Mapping) -> str:
    """Whether the learning rate was searched for, and where if not for such a run, as tables say it."""
    if trainer.get("tuned") is None:
        return "untuned"
    return trainer.get("tuned_elsewhere") or "tuned"


def _git_commit() -> str | None:
    """The commit of the checkout this package runs from; None where it is installed from a wheel."""
    package = Path(__file__).resolve().parents[1]
    if not (package.parent / ".git").exists():
        return None
    command = ["git", "-C", str(package), "rev-parse", "HEAD"]
    try:
        head = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return head.stdout.strip() or None


# --- How a worker gets its settings from the parent that composed them.

_VARIABLE = "PARTIAL_LORA_SETTINGS"


def variables(settings: Mapping) -> dict[str, str]:
    """What the environment of a worker needs beside the parent's."""
    return {_VARIABLE: yaml.safe_dump(dict(settings), sort_keys=False)}


def taken(directory: Path) -> dict:
    """The settings that this worker was given, and its children will not be; else those in the run's config.yaml."""
    given = os.environ.pop(_VARIABLE, None)
    return yaml.safe_load(given or (directory / CONFIG).read_text(encoding="utf-8"))
