"""The identity of a run: the settings that it computes from, its id, and the folder that it shares with other seeds."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from partial_lora.calibration.config import BUDGETED, CALIBRATED, RANKED
from partial_lora.errors import PartialLoraError
from partial_lora.files import file_sha256, flatten, walk
from partial_lora.runs import packs
from partial_lora.runs.config import load, plain
from partial_lora.runs.directory import CONFIG, RESULT
from partial_lora.runs.schema import NOT_SETTINGS, Config, computed_from, task_key, wherever
from partial_lora.training.config import AUTO

_FILES = {"calibration.file", "task.data_files"}
_PLACES = {"model.weights", "model.text_weights", "task.path"}  # names, or folders


def run_id(config: Config | Mapping) -> str:
    """Return eight hex digits that name everything a run computes from, its seed apart.

    They are of all settings but those that the method has no use for. Files enter by content, so a copy elsewhere gives
    the same id and an edited file another one. The members of a mixture enter as tasks do, in the order of the outputs.
    A new key changes ids; runs are found all the same.
    """
    settings = config if isinstance(config, Mapping) else plain(config)
    return _hex(computed(settings, digests(settings)))


def _hex(settings: Mapping) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def computed(settings: Mapping, contents: Mapping[str, str], *, unused: bool = False) -> dict[str, Any]:
    """Return the settings that a run computes from, by full key.

    contents: the digests of files by key (`digests`); a file without one enters by its name and its folder's. unused:
    keep the settings that the method has no use for.
    """
    members, method = list(settings.get("task", {}).get("members") or ()), settings.get("method")
    chosen, is_auto = {}, settings.get("trainer", {}).get("learning_rate") == AUTO
    left_out = NOT_SETTINGS - ({"method.rate_factor"} if is_auto else set())  # which multiplies the rate
    for key, value in flatten(settings).items():
        plain_key = task_key(key, members)
        is_used = unused or method is None or _uses(method, key)  # settings of a task alone have no method
        if is_used and plain_key not in left_out:
            chosen[key] = contents.get(key, wherever(plain_key, value))
    shares = settings.get("calibration", {}).get("sparsity")
    if isinstance(shares, Mapping):
        chosen["calibration.sparsity"] = list(shares)  # their order counts: the first pattern that matches decides
    return chosen | ({"task.members": members} if members else {})


def _uses(method: Mapping, key: str) -> bool:
    """Return whether a setting changes what a method does.

    mask.seed draws VeRA's matrices and what other tuners of PEFT draw; calibration.budget sets the size of tuners.
    """
    if method["name"] in {*CALIBRATED, *BUDGETED, *RANKED}:
        return True
    is_tuner = method.get("peft_type") is not None
    used = {"mask.seed": is_tuner or method["name"] == "vera", "calibration.budget": is_tuner}
    return used.get(key, not key.startswith(("calibration.", "importance.", "mask.")))


def digests(settings: Mapping) -> dict[str, str]:
    """Return the SHA-256 of every file and folder that a run reads, by the key that names it.

    Raises FileNotFoundError for one that is not there.
    """
    members = list(settings.get("task", {}).get("members") or ())
    found = {}
    for key, value in computed_from(settings).items():
        plain_key = task_key(key, members)
        is_file = plain_key in _FILES or plain_key.startswith("task.data_files.")
        if is_file or (plain_key in _PLACES and Path(value).is_dir()):
            found[key] = _digest(Path(value))
    return found


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, or of the names and contents of a folder's files that are not hidden."""
    if not path.is_dir():
        return _hashed(path)
    shown = (Path(parent, name) for parent, _, names in walk(path) for name in names if not name.startswith("."))
    files = {file.relative_to(path): file for file in shown if file.is_file()}  # a class may be a link to a folder
    content = [(name.as_posix(), _hashed(files[name])) for name in sorted(files)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _hashed(file: Path) -> str:
    """Return the SHA-256 of a file's content, read once while it has the same size and time."""
    known = file.stat()
    return _hashed_once(file.resolve(), known.st_size, known.st_mtime_ns)


@functools.cache
def _hashed_once(file: Path, size: int, changed: int) -> str:
    return file_sha256(file)


# --- Where a run's files go, or are: a recorded run is found by what it was set to, whatever it was called then.


def run_directory(config: Config) -> Path:
    """Return a run's directory, results_dir/runs/task/model/method-id/seed.

    Where runs with these settings are recorded, in folders or in a pack, it is among them, whatever id they have: first
    where this seed is, else beside other seeds.
    """
    results_dir, settings = Path(config.results_dir), plain(config)
    contents = digests(settings)
    identifier, seed = _hex(computed(settings, contents)), f"seed{config.seed}"
    parent = results_dir.joinpath("runs", config.task.name, config.model.name)
    place = parent / f"{config.method.name}-{identifier}" / seed
    if place.is_dir():
        return place
    alike = list(_alike(config, contents))
    there = [run for runs in alike for run in runs if run.name == seed]
    there += [runs[0].with_name(seed) for runs in alike]
    return there[0] if there else place


_RATE = "trainer.learning_rate"


def at_other_rates(config: Config) -> list[Path]:
    """Return the directories of recorded runs that differ from a config in nothing but their learning rate."""
    alike = _alike(config, digests(plain(config)), apart=(_RATE, "method.rate_factor"))
    return [run for runs in alike for run in runs if run.name == f"seed{config.seed}"]


def _alike(config: Config, contents: Mapping[str, str], apart: Collection[str] = ()) -> Iterator[list[Path]]:
    """Yield the directories of recorded runs, a list a folder, that were set to what a config says, seeds apart.

    contents: the digests of its files. apart: further keys in which they may differ.
    """
    results_dir, settings = Path(config.results_dir), plain(config)
    parent = results_dir.joinpath("runs", config.task.name, config.model.name)
    own = {False: computed(settings, {}), True: computed(settings, contents)}  # by names, and by content
    for runs in _folders(results_dir, parent, config.method.name):
        stored, has_digests = _stored(runs[0], _stamp(runs[0], results_dir)) or ({}, False)
        differing = {
            key for key in stored.keys() | own[has_digests].keys() if stored.get(key) != own[has_digests].get(key)
        }
        if stored and differing <= {*apart}:
            yield runs


def _folders(results_dir: Path, parent: Path, method: str) -> list[list[Path]]:
    """Return the directories of a method's recorded runs by folder; those of packed runs come last."""
    pack, start = packs.pack_of(results_dir), f"{(parent / method).relative_to(results_dir).as_posix()}-"
    loose = (place for place in sorted(parent.glob(f"{method}-*/seed*")) if place.is_dir())
    packed = (results_dir / path for path in (pack.paths if pack else ()) if path.startswith(start))
    folders: dict[Path, list[Path]] = {}
    for place in [*loose, *packed]:
        if place.parent.name.rpartition("-")[0] == method:
            folders.setdefault(place.parent, []).append(place)
    return list(folders.values())


def _stamp(place: Path, results_dir: Path) -> int:
    """Return when what is recorded of a run was written."""
    for file in (place / RESULT, place / CONFIG, results_dir / packs.RUNS_TABLE):
        with suppress(OSError):
            return file.stat().st_mtime_ns
    return 0


@functools.lru_cache(maxsize=4096)
def _stored(place: Path, stamp: int) -> tuple[dict, bool] | None:
    """Return what a recorded run has computed from, and whether its files are in that by content; None for no settings.

    Records of 0.2 and before do not have the digests of files. A run that has not ended may have a config.yaml alone.
    """
    record = packs.recorded(place)
    try:
        if record is None:
            record = {"config": yaml.safe_load((place / CONFIG).read_text(encoding="utf-8"))}
        contents = record.get("digests")
        return computed(plain(load(record["config"])), contents or {}), contents is not None
    except (OSError, yaml.YAMLError, PartialLoraError, KeyError, TypeError, AttributeError):
        return None  # or with settings that no run can have any more


def calibration_directory(config: Config) -> Path:
    """Return where `partial-lora calibrate` puts the sparsities of a model and task; each seed of the draws has one."""
    config = replace(config, calibration=replace(config.calibration, seed=config.calibration_seed))
    settings = plain(config)
    identifier = _hex(computed(settings, digests(settings), unused=True))
    names = config.task.name, config.model.name, f"{config.importance.name}-{identifier}"
    return Path(config.results_dir).joinpath("calibrations", *names)
