"""Settings as plain data: those of config.yaml, and `config` in result.json."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from partial_lora.credentials import redacted
from partial_lora.errors import PartialLoraError
from partial_lora.files import FORMAT, mapped, other_format
from partial_lora.settings.schema import SECTIONS, Config
from partial_lora.tasks.config import TaskConfig


def plain(config: Config | TaskConfig) -> dict[str, Any]:
    """Return settings as nested mappings."""
    return dataclasses.asdict(config)


def as_yaml(settings: Mapping) -> str:
    """Return settings as config.yaml has them, with the number of the format."""
    return yaml.safe_dump({"format": FORMAT, **settings}, sort_keys=False)


def of_yaml(content: Mapping, file: Path | str) -> dict[str, Any]:
    """Return the settings in what a config.yaml holds; raises PartialLoraError that names it, for another format."""
    if fault := other_format(content.get("format")):
        raise PartialLoraError(f"{file}: {fault}")
    return {key: value for key, value in content.items() if key != "format"}


_FILES = re.compile(
    r"data_dir|results_dir|calibration\.file|trainer\.accelerate_config|task\.(members\..+\.)?data_files(\..+)?"
)
_WEIGHTS_OR_ROWS = re.compile(r"model\.(text_)?weights|task\.(members\..+\.)?path")  # of a hub, or a folder


def without_places(settings: Mapping) -> object:
    """Return settings in which a file or folder of this machine has its name alone."""

    def named(key: str, value: object) -> object:
        return Path(value).absolute().name if _is_place(key, value) else value

    return redacted(mapped(settings, named))


def _is_place(key: str, value: object) -> bool:
    if not isinstance(value, str):
        return False
    if _WEIGHTS_OR_ROWS.fullmatch(key):  # OWNER/NAME@REVISION is none, unless there is such a folder
        return Path(value).is_absolute() or Path(value).is_dir() or value.partition("@")[0].count("/") > 1
    return Path(value).is_absolute() or _FILES.fullmatch(key) is not None


def load(settings: Mapping) -> Config:
    """Return the Config of nested mappings, as in config.yaml or a record."""

    def instance(kind: type, values: Mapping) -> Any:
        return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values})

    task = settings.get("task", {})
    if isinstance(task.get("members"), Mapping):
        members = {name: instance(TaskConfig, member) for name, member in task["members"].items()}
        settings = {**settings, "task": {**task, "members": members}}
    groups = {name: instance(kind, settings[name]) for name, kind in SECTIONS.items() if name in settings}
    return instance(Config, {**settings, **groups})
