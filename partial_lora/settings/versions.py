"""Settings as plain data: those of config.yaml, and `config` in result.json."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
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


_ROWS = re.compile(r"task\.(members\..+\.)?data_files(\..+)?")
_FILES = re.compile(rf"data_dir|results_dir|calibration\.file|trainer\.accelerate_config|{_ROWS.pattern}")
_WEIGHTS_OR_ROWS = re.compile(r"model\.(text_)?weights|task\.(members\..+\.)?path")  # of a hub, or a folder


def without_places(settings: Mapping) -> object:
    """Return settings in which a file or folder of this machine has its name alone."""

    def named(key: str, value: object) -> object:
        return Path(value).absolute().name if _is_place(key, value) else value

    return redacted(mapped(settings, named))


def wherever(key: str, value: Any) -> Any:
    """Return the value of a setting as it is on every machine: of a file or folder its name.

    A record has paths, not the content of files. A data set stays the same in another place, so the names of folder and
    file stand for a task's rows: many a file is called train.
    """
    if not _is_place(key, value):
        return value
    path = PurePath(value)
    return "/".join(path.relative_to(path.anchor).parts[-2:]) if _ROWS.fullmatch(key) else Path(value).absolute().name


def record_for_others(record: Mapping) -> dict:
    """Return the record of a run without the folders of the machine that made it (`wherever`)."""
    config, kept = record["config"], {key: value for key, value in record.items() if key not in ("config", "places")}
    folders = dict(record.get("places") or {})
    mapped(config, lambda key, value: folders.setdefault(key, value) if _is_place(key, value) else None)
    absolute = sorted(
        (path for path in folders.values() if Path(path).is_absolute() and Path(path).name), key=len, reverse=True
    )

    def named(_: str, value: object) -> object:
        for path in absolute if isinstance(value, str) else ():
            value = value.replace(path, Path(path).name)
        return value

    told = mapped(kept, named) | {"config": mapped(config, wherever)}
    return {key: told[key] for key in record if key in told}


def _is_place(key: str, value: object) -> bool:
    if not isinstance(value, str):
        return False
    if _WEIGHTS_OR_ROWS.fullmatch(key):  # OWNER/NAME@REVISION is none, unless there is such a folder
        is_path = Path(value).is_absolute() or value.startswith((".", "~")) or value.partition("@")[0].count("/") > 1
        return is_path or Path(value).is_dir()
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
