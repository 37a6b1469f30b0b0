"""The identity of a run: the settings that it computes from, and its id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from partial_lora import methods
from partial_lora.files import flatten, sha256_once, walk
from partial_lora.settings.schema import Config, defaults
from partial_lora.settings.versions import plain, wherever
from partial_lora.training.config import AUTO

# What a run computes does not depend on these: where its files are and go (rows enter as task.data_files), the names of
# its settings, what memory it may use, and the device, launch, worker and tracker
# keys.
NOT_SETTINGS = {
    "seed",
    "results_dir",
    "overwrite",
    "keep_records",
    "data_dir",
    "preset",
    "method.rate_factor",
    "method.rate_power",
    "task.classes",
    "task.cache_bytes",
    "calibration.memory",
    "trainer.device",
    "trainer.start",
    "trainer.until",
    "trainer.save_total_limit",
    "trainer.gradient_accumulation_steps",
    "trainer.packing",
    "trainer.num_processes",
    "trainer.num_machines",
    "trainer.machine_rank",
    "trainer.main_process_ip",
    "trainer.main_process_port",
    "trainer.accelerate_config",
    "trainer.num_workers",
    "trainer.strategy",
    "trainer.report_to",
}


def computed_from(settings: Mapping) -> dict[str, Any]:
    """Return the settings that a run computes from and that are not the schema's defaults, each by its full key.

    The members of a mixture enter as tasks do, and `task.members` is the list of their names, in the order of the
    outputs.
    """
    names, standard = list(settings.get("task", {}).get("members") or ()), defaults()
    changed = {}
    for key, value in flatten(settings).items():
        plain_key = task_key(key, names)
        if plain_key not in NOT_SETTINGS and value != standard.get(plain_key):
            changed[key] = value
    return changed | ({"task.members": names} if names else {})


def task_key(key: str, members: Sequence[str]) -> str:
    """Return the task's key that a key of a mixture's member stands for; any other key as it is."""
    if not key.startswith("task.members."):
        return key
    member = max((name for name in members if key.startswith(f"task.members.{name}.")), key=len)  # a name may have dots
    return "task." + key.removeprefix(f"task.members.{member}.")


# --- The id: a digest of these settings, and of the content of files.

_FILES = {"calibration.file", "task.data_files"}
_PLACES = {"model.weights", "model.text_weights", "task.path"}  # names, or folders
_WORDS = {"files", "members", "random"}  # which name no folder, whatever lies in the working directory


def run_id(config: Config | Mapping) -> str:
    """Return eight hex digits that name everything a run computes from, its seed apart.

    They are of all settings but those that the method has no use for. Files enter by content, so a copy elsewhere gives
    the same id and an edited file another one. The members of a mixture enter as tasks do, in the order of the outputs.
    A new key changes ids; runs are found all the same.
    """
    settings = config if isinstance(config, Mapping) else plain(config)
    return short_digest(computed(settings, digests(settings)))


def short_digest(settings: Mapping) -> str:
    """Return eight hex digits that name these settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def computed(settings: Mapping, contents: Mapping[str, str], *, unused: bool = False) -> dict[str, Any]:
    """Return the settings that a run computes from, by full key.

    contents: the digests of files by key (`digests`); a file without one enters by its name and its folder's. unused:
    keep the settings that the method has no use for.
    """
    members, method = list(settings.get("task", {}).get("members") or ()), settings.get("method")
    chosen, is_auto = {}, settings.get("trainer", {}).get("learning_rate") == AUTO
    left_out = NOT_SETTINGS - ({"method.rate_factor", "method.rate_power"} if is_auto else set())  # which decide it
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

    Where no sparsities say what is kept, a budget may set the size, and mask.seed draws ranks and what is frozen. A
    method that only spends a budget draws no examples and searches nothing, unless it ranks rows and columns.
    """
    traits = methods.called(method["name"])
    if traits.size == "budget" and not traits.ranked and key.startswith("calibration."):
        return key in ("calibration.budget", "calibration.kept")
    if traits.is_sparse or (traits.size == "rank" and key in ("mask.seed", "calibration.budget")):
        return True
    return not key.startswith(("calibration.", "importance.", "mask."))


def digests(settings: Mapping) -> dict[str, str]:
    """Return the SHA-256 of every file and folder that a run reads, by the key that names it.

    Raises FileNotFoundError for one that is not there.
    """
    members = list(settings.get("task", {}).get("members") or ())
    contents = {}
    for key, value in computed_from(settings).items():
        plain_key = task_key(key, members)
        is_file = plain_key in _FILES or plain_key.startswith("task.data_files.")
        if is_file or (plain_key in _PLACES and value not in _WORDS and Path(value).is_dir()):
            contents[key] = _digest(Path(value))
    return contents


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, or of the names and contents of a folder's files that are not hidden."""
    if not path.is_dir():
        return sha256_once(path)
    visible = (Path(parent, name) for parent, _, names in walk(path) for name in names if not name.startswith("."))
    files = {file.relative_to(path): file for file in visible if file.is_file()}  # a class may be a link to a folder
    content = [(name.as_posix(), sha256_once(files[name])) for name in sorted(files)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
