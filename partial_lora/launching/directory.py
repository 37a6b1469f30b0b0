"""The directory of a run: its files, whole or absent; its one writer; its record. `paths` says where it is."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import socket
import subprocess
import time
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import yaml

from partial_lora.credentials import redacted
from partial_lora.errors import PartialLoraError, shortlist
from partial_lora.files import FORMAT, difference, entry, flatten, lock, mapped, other_format, read_json
from partial_lora.launching import run_record
from partial_lora.settings.versions import of_yaml
from partial_lora.training.trackers import FILE as TRACKERS_FILE
from partial_lora.training.trackers import TRACKERS

RESULT = "result.json"
CONFIG = "config.yaml"
CALIBRATION = "calibration.json"
PREDICTIONS = "predictions.parquet"
VALIDATION = "validation.parquet"  # as PREDICTIONS, of validation, where the run was last paused
ADAPTER = "adapter"
ASIDE = "adapter.earlier"  # the weights of a run that is done again since its files are in doubt
CHECKPOINTS = "checkpoints"
EARLIER = ".earlier.json"  # the record of an attempt that did not end, while the next one goes on from it
LOG = "train.log"
CURVES, SPARSITY = "curves.svg", "sparsity.svg"  # of a calibration
TRAINING = "training.svg"
PAGE = "index.html"
PICTURE = "predictions.png"  # test images, and what was predicted of them
EXAMPLE = "example.png"  # one of them, as an input for `partial-lora predict`
LOCK = ".lock"
LATEST = "latest"  # in a results directory, a link to the run that `train` finished last
RUNS = "runs/*/*/*/seed*"  # runs/task/model/method-id/seedK of a results directory
INTERRUPTED = "interrupted"  # the error of a run that was asked to stop
PAUSED = "paused"  # the status of a run that has come as far as trainer.until
_BROKEN = "result.json.broken"
_CARD = f"{ADAPTER}/README.md"  # for people, who may write in it
_OF_TRACKERS = {TRACKERS_FILE, *TRACKERS}  # some write into a folder of their name


def read_result(directory: Path, name: str = RESULT) -> run_record.Record | None:
    """Return the record of a run, or None where none can be read or it lacks a status.

    Raises PartialLoraError, naming the file, for one of another format.
    """
    try:
        return _record(read_json(Path(directory) / name))
    except OtherFormatError as error:
        raise PartialLoraError(f"{Path(directory) / name}: {error}") from error
    except (OSError, ValueError):
        return None


class OtherFormatError(ValueError):
    """A record of another format than this version reads."""


class UnfinishedError(ValueError):
    """A record of a run that failed, has not ended or only calibrated."""


def finished(result: object) -> run_record.Record:
    """Return the record of a training that ended well, as it is in JSON.

    Raises ValueError that says what it is instead, an UnfinishedError for a run that has not finished.
    """
    record = _record(result)
    if record["status"] != "finished":
        error = f": {record['error']}" if record.get("error") else ""
        raise UnfinishedError(INTERRUPTED if record.get("error") == INTERRUPTED else f"{record['status']}{error}")
    if not record.get("metrics"):
        raise UnfinishedError("calibrated only, nothing was trained")
    return record


def _record(result: object) -> run_record.Record:
    if not isinstance(result, dict):
        raise ValueError("foreign, no record of a run")
    if found := run_record.fault(result, run_record.HEAD):
        raise ValueError(f"foreign, {found}")
    writer = f"partial-lora {result.get('versions', {}).get('partial-lora', 'before 1.0')}"
    if fault := other_format(result.get("format"), writer):
        raise OtherFormatError(fault)
    return result


def find(name: Path | str) -> Path:
    """Return the directory of a run that a user names.

    name: its path; `latest`, of the results in ./results; or the start of its id, with `/seed1` behind it where runs
    differ in their seed alone. Another results directory may stand before `latest` or the id: DIR/latest, DIR/1f0e.
    Any other name is returned as it is. Raises PartialLoraError, with the paths, where several runs have that start.
    """
    place = Path(name)
    if os.path.islink(place) and place.name == LATEST:  # another run may become the latest while a command works
        return place.parent / os.readlink(place)
    if os.path.exists(place):  # which a name that is too long does not raise an error for
        return place
    start, seed = (place.parent, place.name) if re.fullmatch(r"seed\d+", place.name) else (place, "seed*")
    results = Path("results") if start.parent == Path() else start.parent
    if start.name == LATEST and (results / LATEST).is_dir():
        return find(results / LATEST)
    if not re.fullmatch(r"[0-9a-f]+", start.name):
        return place
    matches = [run for run in sorted(results.glob(f"runs/*/*/*/{seed}")) if id_of(run).startswith(start.name)]
    if len(matches) > 1:
        raise PartialLoraError(f"{name}: several runs, choose one: {shortlist([str(run) for run in matches])}")
    return matches[0] if matches else place


def id_of(run: Path) -> str:
    """Return the id of a run, out of its directory's name."""
    return run.parent.name.rpartition("-")[2]


def link_latest(results_dir: Path | str, run: Path) -> None:
    """Link `latest` in a results directory to a run; do nothing where no link can be made."""
    link = Path(results_dir) / LATEST
    temporary = link.with_name(f".{LATEST}.{os.getpid()}")
    with suppress(OSError):
        try:
            temporary.symlink_to(run.relative_to(results_dir), target_is_directory=True)
            os.replace(temporary, link)
        finally:
            temporary.unlink(missing_ok=True)


def is_finished(directory: Path) -> bool:
    """Return whether a training ended well and every file of its record is there, whole."""
    result = read_result(directory)
    return _is_trained(result) and not missing(directory, result)


def is_recorded(directory: Path) -> bool:
    """Return whether a training's record and predictions are there, whole, whatever became of its weights."""
    result = read_result(directory)
    if not _is_trained(result):
        return False
    return difference(Path(directory), {PREDICTIONS: (result.get("files") or {}).get(PREDICTIONS)}) is None


def is_calibrated(directory: Path) -> bool:
    """Return whether `partial-lora calibrate` ended well and its files are there."""
    result = read_result(directory)
    whole = bool(result) and result["status"] == "finished" and not missing(directory, result)
    return whole and (Path(directory) / CALIBRATION).is_file()


def is_drawn(directory: Path, stage: str) -> bool:
    """Return whether the drawing of a stage, "train" or "calibrate", came to its end."""
    return (Path(directory) / (PAGE if stage == "train" else CURVES)).is_file()


def _is_trained(result: Mapping | None) -> bool:
    """Return whether a record is of a training that ended well; `partial-lora calibrate` has no metrics."""
    return result is not None and result["status"] == "finished" and result.get("metrics") != {}


def missing(directory: Path, result: Mapping) -> str | None:
    """Return which file of a finished record is missing or not as it was recorded, in words; None for none.

    Earlier records have sizes in place of digests, or no files at all.
    """
    names = [CONFIG] + ([CALIBRATION] if result.get("calibration") else [])
    if _is_trained(result):
        names += [PREDICTIONS, f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors"]
    recorded = dict(result.get("files") or {})
    recorded.pop(_CARD, None)
    return difference(Path(directory), dict.fromkeys(names) | recorded)


def entries(directory: Path) -> dict[str, dict]:
    """Return the files by which a finished run is known to be whole, with the size and SHA-256 of each."""
    paths = [directory / CONFIG, directory / PREDICTIONS, directory / CALIBRATION, *(directory / ADAPTER).rglob("*")]
    found = {path.relative_to(directory).as_posix(): path for path in paths if path.is_file()}
    return {name: entry(path) for name, path in found.items() if name != _CARD}


def tensor_files(folder: Path) -> list[Path]:
    """Return the files of an adapter or a model that hold its values."""
    return [file for kind in ("safetensors", "gguf") for file in folder.glob(f"*.{kind}")]


def prepare(directory: Path, *, overwrite: bool) -> list[str]:
    """Make a run's directory ready for another attempt; return a line about every file that was broken or missing.

    What an unfinished attempt left for the next one stays: checkpoints, sparsities, log, what trackers keep, and its
    record under another name. The weights of a run that is done again without being asked for are set aside. All else
    goes, result.json first: whatever is still there when this is interrupted belongs to no finished run. With
    `overwrite` nothing stays but the lock, which is held, and a broken record.
    """
    notes, record, asked = [], directory / RESULT, overwrite
    result = read_result(directory)
    if result is not None and result["status"] == "finished":  # overwritten, or it has lost files
        reason = None if overwrite else missing(directory, result)
        notes += [f"{directory}: {reason}; the run is done again"] if reason else []
        overwrite = True
    elif result is not None:
        os.replace(record, directory / EARLIER)
    elif record.exists():
        os.replace(record, directory / _BROKEN)
        notes.append(f"{record}: broken, no record of a run; set aside as {_BROKEN}")
    record.unlink(missing_ok=True)
    if not asked and (overwrite or result is None) and (directory / ADAPTER).is_dir():
        shutil.rmtree(directory / ASIDE, ignore_errors=True)
        os.replace(directory / ADAPTER, directory / ASIDE)
        notes.append(f"{directory / ADAPTER}: the weights that were there are set aside as {ASIDE}")
    stays = {LOCK, _BROKEN} | (
        set() if overwrite else {CHECKPOINTS, CALIBRATION, LOG, EARLIER, VALIDATION, *_OF_TRACKERS}
    )
    stays |= set() if asked else {ASIDE}
    for path in directory.iterdir():
        if path.name in stays:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return notes


def remove_refused(directory: Path, results_dir: Path | str) -> None:
    """Remove the directory of a run that never began, and those above it that are empty then."""
    shutil.rmtree(directory)
    with suppress(OSError):  # it is not empty, or another run has removed it
        for parent in directory.parents:
            if parent == Path(results_dir):
                return
            parent.rmdir()


def remove_checkpoints(directory: Path) -> None:
    """Remove what only a run that has not ended needs."""
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    (directory / EARLIER).unlink(missing_ok=True)


def unwritable(place: Path | str, error: OSError) -> PartialLoraError:
    """Return the error about a folder of results that cannot be written."""
    reason = f"cannot write to {place}: {error.strerror}"
    return PartialLoraError(f"results_dir: {reason}; set it to a folder that can be written")


def name_holder(descriptor: int, worker: int | None = None) -> None:
    """Write the holder into a lock: this process, and the worker that holds it on should this one die."""
    holder = f"pid {os.getpid()} on {socket.gethostname()}" + (f" (worker: pid {worker})" if worker else "")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{holder}\n".encode(), 0)


@contextmanager
def locked(directory: Path) -> Iterator[int]:
    """Hold a run's directory, made if need be, while the block lasts; yield the lock's file descriptor.

    A worker inherits the descriptor and holds the lock on, should its parent die. Raises PartialLoraError that names
    another holder.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise unwritable(directory, error) from error
    try:
        _take(descriptor, directory)
        yield descriptor
    finally:
        os.close(descriptor)


_MOMENT = 1.0  # seconds that a start waits for a lock: who looks whether it is held takes it for an instant


def _take(descriptor: int, directory: Path) -> None:
    end = time.monotonic() + _MOMENT
    try:
        while not lock(descriptor):
            if time.monotonic() > end:
                holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
                raise PartialLoraError(f"{directory} is in use by {holder}: wait for it to end, or stop it")
            time.sleep(0.05)
        name_holder(descriptor)
    except OSError as error:  # of a file system without locks, too
        raise unwritable(directory, error) from error


# --- The record of a run that becomes result.json (`shape.Record`).

LIBRARIES = ("partial-lora", "torch", "transformers", "timm", "peft", "accelerate", "datasets", "numpy")


def version(name: str) -> str:
    """Return the version of a package; or "not installed", as this package may be in a checkout."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def new(settings: Mapping, earlier: Mapping | None = None, digests: Mapping | None = None) -> run_record.Record:
    """Return the record of a run that has just begun.

    earlier: of the attempt before it, which gives when the run began and the seconds that need not be spent again.
    digests: of the files that the run reads, by key; None where they are not known.
    """
    record: run_record.Record = {
        "format": FORMAT,
        "status": "running",
        "seed": settings["seed"],
        "config": redacted(settings),
        "digests": digests,
        "places": places_of(settings, digests or ()),
        "preset": settings.get("preset"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "git_commit": git_commit(),
        "device": None,
        "attempts": 1,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": {"calibrate": 0.0, "train": 0.0, "evaluate": 0.0},
        "peak_memory_bytes": None,
        "parameters": {},
        "sparsity": {},
        "shapes": {},
        "calibration": None,
        "warnings": [],
        "metrics": {},
        "history": [],
    }
    if earlier is not None:
        record |= {"started": earlier.get("started", record["started"]), "attempts": earlier.get("attempts", 1) + 1}
        spent = earlier.get("seconds", {})  # a checkpoint knows those of training
        record["seconds"] |= {stage: spent[stage] for stage in ("calibrate", "reliability") if stage in spent}
        record["commits"] = earlier.get("commits") or {}  # of the models that it left its calibration and steps over
    return record


def places_of(settings: Mapping, keys: Iterable[str]) -> dict[str, str]:
    """Return where files and folders that settings name lie, by key: for this machine alone, so no pack has it."""
    named = flatten(settings)
    return {key: redacted(os.path.abspath(named[key])) for key in keys if key in named}


def finite(value: object) -> object:
    """Return plain data with None in place of NaN and infinity, for which JSON has no word."""
    return mapped(value, lambda _, number: None if isinstance(number, float) and not math.isfinite(number) else number)


@contextmanager
def timed(record: run_record.Record, stage: str) -> Iterator[None]:
    """Add the wall seconds of the block to those of a stage, earlier attempts among them."""
    start = time.perf_counter()
    yield
    record["seconds"][stage] = round(record["seconds"].get(stage, 0.0) + time.perf_counter() - start, 3)


def git_commit() -> str | None:
    """Return the commit of the checkout this package runs from; None where it is installed from a wheel."""
    package = Path(__file__).resolve().parents[1]
    if not (package.parent / ".git").exists():
        return None
    command = ["git", "-C", str(package), "rev-parse", "HEAD"]
    try:
        head = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return head.stdout.strip() or None


# --- The settings of a worker, from the parent that composed them: those in config.yaml are without credentials.

VARIABLE = "PARTIAL_LORA_SETTINGS"


def worker_variables(settings: Mapping, digests: Mapping) -> dict[str, str]:
    """Return the environment variable that hands settings, and the digests of their files, to a worker.

    Compressed: Linux starts no process with a variable of more than 128 KiB, and a file of settings may have 256.
    """
    text = yaml.safe_dump([dict(settings), dict(digests)], sort_keys=False)
    return {VARIABLE: b64encode(zlib.compress(text.encode())).decode()}


def worker_settings(directory: Path) -> tuple[dict, dict | None]:
    """Return the settings that were handed to this worker, and not on to its children, and the digests of their files.

    Without any, the settings are those in config.yaml.
    """
    handed = os.environ.pop(VARIABLE, None)
    if handed is not None:
        return tuple(yaml.safe_load(zlib.decompress(b64decode(handed))))
    return stored_settings(directory), None


def stored_settings(directory: Path) -> dict:
    """Return the settings in the config.yaml of a run; raises OSError, YAMLError, or PartialLoraError as `of_yaml`."""
    file = directory / CONFIG
    return of_yaml(yaml.safe_load(file.read_text(encoding="utf-8")), file)
