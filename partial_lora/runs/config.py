"""Settings: what Hydra composed, checked and made plain; the id they give a run, and where its files go."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from partial_lora.errors import PartialLoraError
from partial_lora.runs import identity
from partial_lora.runs.data_dir import with_files
from partial_lora.runs.members import with_members
from partial_lora.runs.schema import Config
from partial_lora.runs.tuning import tuned
from partial_lora.runs.unknown_key import no_such_key
from partial_lora.sealed import file_sha256

GROUPS = ("model", "task", "method", "importance", "calibration", "mask", "trainer", "preset", "experiment")

_FILES = {"calibration.file", "task.data_files"}
_PLACES = {"model.weights", "model.text_weights", "task.path"}  # names, or folders


def conf_dir() -> Path:
    """The folder of group files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def resolve(composed: DictConfig) -> dict:
    """The plain, checked settings of a composed config.

    Raises PartialLoraError, in one line that names the key, for an unknown key, a missing value, a value of another
    type or out of range.
    """
    unknown = _unknown_keys(composed, OmegaConf.structured(Config))
    if unknown:
        raise PartialLoraError(no_such_key(unknown[0]))
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise PartialLoraError(f"{missing[0]}: expected a value, its group file sets none")
    for group in ("method", "importance"):
        name, known = composed[group].name, sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))
        if name not in known:
            raise PartialLoraError(f"{group}.name={name}: expected one of {', '.join(known)}")
    OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), composed))  # runs every __post_init__
    settings = with_files(with_members(OmegaConf.to_container(composed, resolve=True), conf_dir() / "task"))
    if settings["trainer"]["tuned"] is not None:  # before the run has its id, which is of the rate
        settings["trainer"] |= tuned(settings["trainer"]["tuned"], settings, settings["trainer"]["tuned_on"])
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
    members, changed = list(settings.get("task", {}).get("members") or ()), identity.computed_from(settings)
    for key, value in changed.items():
        own = identity.plain(key, members)
        is_file = own in _FILES or own.startswith("task.data_files.")
        if is_file or (own in _PLACES and Path(value).is_dir()):
            changed[key] = _digest(Path(value))
    if "trainer.tuned" in changed:  # whichever file it was: the rate found there is among the settings
        changed["trainer.tuned"] = True
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


def _digest(path: Path) -> str:
    """The SHA-256 of a file's content, or of the names and contents of all files in a folder that are not hidden."""
    if not path.is_dir():
        return file_sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    content = [(file.relative_to(path).as_posix(), file_sha256(file)) for file in files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
