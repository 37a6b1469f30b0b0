"""Identity of a run: the settings that it computes from, without those that change no result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import PurePath
from typing import Any

from omegaconf import OmegaConf

from partial_lora.files import flatten
from partial_lora.runs.schema import Config

# What a run computes does not depend on these: where its files are and go (rows enter as task.data_files), how its
# settings are called, what memory it may use, whose learning rate may stand in (trainer.tuned_elsewhere says whose
# does), and the device, launch, worker and tracker keys.
NOT_SETTINGS = {
    "seed",
    "results_dir",
    "overwrite",
    "keep_records",
    "data_dir",
    "preset",
    "task.classes",
    "task.cache_bytes",
    "calibration.memory",
    "trainer.tuned_on",
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


def computed_from(settings: Mapping) -> dict[str, Any]:
    """Return the settings that a run computes from and that are not the schema's defaults, each by its full key.

    The members of a mixture are among them as tasks are, and `task.members` is their names in order, which is that of
    the outputs.
    """
    names, standard = list(settings.get("task", {}).get("members") or ()), defaults()
    changed = {}
    for key, value in flatten(settings).items():
        own = plain(key, names)
        if own not in NOT_SETTINGS and value != standard.get(own):
            changed[key] = value
    return changed | ({"task.members": names} if names else {})


def plain(key: str, members: Sequence[str]) -> str:
    """Return the key of a task in place of that of one of a mixture's members; any other key as it is."""
    if not key.startswith("task.members."):
        return key
    of = max((name for name in members if key.startswith(f"task.members.{name}.")), key=len)  # a name may have dots
    return "task." + key.removeprefix(f"task.members.{of}.")


def wherever(key: str, value: Any) -> Any:
    """Return the value of one of the schema's keys, but of a task's file its name in place of its path.

    A record has paths, not what the files held; the same data set in another place is the same, so a folder's and a
    file's name stand for it. Of any other key the value as it is.
    """
    named = key.startswith("task.data_files") and isinstance(value, str)
    return "/".join(PurePath(value).parts[-2:]) if named else value


@cache
def defaults() -> Mapping[str, Any]:
    """Return the schema's defaults, each by its full key."""
    return flatten(OmegaConf.to_container(OmegaConf.structured(Config)))
