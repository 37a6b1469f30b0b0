"""Settings: what Hydra composed, checked and made plain; the id they give a run, and where its files go."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from partial_lora.errors import PartialLoraError
from partial_lora.members import with_members
from partial_lora.schema import Config
from partial_lora.sealed import file_sha256
from partial_lora.tuning import tuned_rate

GROUPS = ("model", "task", "method", "importance", "calibration", "mask", "trainer", "experiment")

# What a run computes does not depend on these: where its files go, what memory it may use, and the device, launch,
# worker and tracker keys.
_NOT_SETTINGS = {
    "seed",
    "results_dir",
    "overwrite",
    "task.classes",
    "task.cache_bytes",
    "calibration.memory",
    "trainer.device",
    "trainer.save_total_limit",
    "trainer.gradient_accumulation_steps",
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
_FILES = {"calibration.file", "task.data_files"}
_PLACES = {"model.weights", "model.text_weights", "task.path"}  # names, or folders


def conf_dir() -> Path:
    """The folder of group files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def resolve(composed: DictConfig) -> dict:
    """The plain, checked settings of a composed config.

    Raises PartialLoraError, in one line that names the key, for an unknown key, a missing value, a value of another
    type or out of range.
    """
    unknown = _unknown_keys(composed, OmegaConf.structured(Config))
    if unknown:
        raise PartialLoraError(f"{unknown[0]}: no such key; `partial-lora train --cfg job` lists the keys there are")
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise PartialLoraError(f"{missing[0]}: expected a value, its group file sets none")
    for group in ("method", "importance"):
        name, known = composed[group].name, sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))
        if name not in known:
            raise PartialLoraError(f"{group}.name={name}: expected one of {', '.join(known)}")
    OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), composed))  # runs every __post_init__
    settings = with_members(OmegaConf.to_container(composed, resolve=True), conf_dir() / "task")
    if settings["trainer"]["tuned"] is not None:  # before the run has its id, which is of the rate
        settings["trainer"]["learning_rate"] = tuned_rate(settings["trainer"]["tuned"], settings)
    return settings


def _unknown_keys(node: DictConfig, schema: DictConfig, prefix: str = "") -> list[str]:
    """Keys that the schema does not have; `+key=value` can put them past Hydra's own check."""
    known = set(schema.keys())  # `key in schema` is False for a key whose value is missing
    unknown = [f"{prefix}{key}" for key in node if key not in known]
    for key in known & set(node.keys()):
        inner = schema._get_node(key)
        # A free mapping (model_args) and one that stands for no schema (data_files) have no keys to check.
        if OmegaConf.is_dict(inner) and OmegaConf.get_type(inner) is not dict:
            unknown += _unknown_keys(node[key], inner, f"{prefix}{key}.")
    return unknown


def run_id(settings: Mapping) -> str:
    """Eight hex digits that name everything a run computes from, its seed apart.

    The SHA-256 of the settings that differ from the schema's defaults, as sorted JSON. Files enter by content, so a
    copy elsewhere gives the same id and an edited file another one. The members of a mixture enter as tasks do, and in
    their order, which is that of the outputs.
    """
    defaults = flatten(OmegaConf.to_container(OmegaConf.structured(Config)))
    names, changed = list(settings.get("task", {}).get("members") or ()), {}
    for key, value in flatten(settings).items():
        plain = key
        if key.startswith("task.members."):  # a name may have dots in it
            of = max((name for name in names if key.startswith(f"task.members.{name}.")), key=len)
            plain = "task." + key.removeprefix(f"task.members.{of}.")
        if plain in _NOT_SETTINGS or value == defaults.get(plain):
            continue
        is_file = plain in _FILES or plain.startswith("task.data_files.")
        is_file = is_file or (plain in _PLACES and Path(value).is_dir())
        changed[key] = _digest(Path(value)) if is_file else value
    if "trainer.tuned" in changed:  # whichever file it was: the rate found there is among the settings
        changed["trainer.tuned"] = True
    if names:
        changed["task.members"] = names
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]


def with_defaults(settings: Mapping) -> dict:
    """Recorded settings with the defaults of keys that came later."""
    defaults = OmegaConf.to_container(OmegaConf.structured(Config))
    return {
        key: {**value, **settings.get(key, {})} if isinstance(value, dict) else settings.get(key, value)
        for key, value in defaults.items()
    }


def run_directory(settings: Mapping) -> Path:
    """Where a run's files go: results_dir/runs/task/model/method-id/seed."""
    names = settings["task"]["name"], settings["model"]["name"], f"{settings['method']['name']}-{run_id(settings)}"
    return Path(settings["results_dir"]).joinpath("runs", *names, f"seed{settings['seed']}")


def calibration_directory(settings: Mapping) -> Path:
    """Where `partial-lora calibrate` puts the sparsities of a model and task; each seed that draws has its own."""
    chosen = settings["calibration"]
    if chosen["seed"] is None:
        settings = {**settings, "calibration": {**chosen, "seed": settings["seed"]}}
    names = settings["task"]["name"], settings["model"]["name"], f"{settings['importance']['name']}-{run_id(settings)}"
    return Path(settings["results_dir"]).joinpath("calibrations", *names)


def flatten(settings: Mapping, prefix: str = "") -> dict[str, Any]:
    """Settings in one mapping, each by its full key."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _digest(path: Path) -> str:
    """The SHA-256 of a file's content, or of the names and contents of all files in a folder that are not hidden."""
    if not path.is_dir():
        return file_sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    content = [(file.relative_to(path).as_posix(), file_sha256(file)) for file in files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
