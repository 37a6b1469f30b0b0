"""Settings of every version, as plain data in config.yaml and result.json: older ones keep their meaning."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Optional

from partial_lora.credentials import redacted
from partial_lora.files import mapped
from partial_lora.settings.schema import SECTIONS, Config
from partial_lora.tasks.config import TaskConfig

# --- Settings that are older than this version.


@dataclass(frozen=True)
class Change:
    """A change of a key, and the meaning of settings that are older.

    Attributes:
        version: the first one with the key as it is now.
        key: its full name.
        before: the value of settings that lack the key.
        name: what the key was called before.
    """

    version: str
    key: str
    before: Any = None
    name: Optional[str] = None


# Settings are stored whole. So a change of a default needs an entry only for settings that are older than its key.
CHANGES = (
    Change("0.3.0", "mask.fan_in", before="dense"),
    Change("0.3.0", "mask.row_exponent", before=0.0),
    Change("0.4.0", "trainer.select_within", before=0.0),
    Change("0.4.0", "trainer.warmup_ratio", before=0.1, name="trainer.warmup"),
    Change("0.4.0", "trainer.optimizer", before=None),
    Change("0.4.0", "trainer.patience", before=None),
    Change("0.4.0", "trainer.args", before=None),
    Change("0.5.0", "mask.rows", before="masked"),
    Change("0.5.0", "calibration.kept", before=None),
)


# Of the trainer, in earlier records: a file of learning rates that a run took its own from, and notes on that. The rate
# that it took is in learning_rate.
OF_TUNING = ("tuned", "tuned_on", "tuned_elsewhere")


def upgraded(record: Mapping) -> dict:
    """Return a record, or anything with the settings of a run as its `config`, with the settings in today's terms."""
    settings = record.get("config")
    return {**record, "config": upgraded_settings(settings)} if isinstance(settings, Mapping) else dict(record)


def upgraded_settings(settings: Mapping) -> dict:
    """Return stored settings of a run, nested, in today's terms (CHANGES); groups that they lack stay missing."""
    current = dict(settings)
    for change in CHANGES:
        group, _, name = change.key.rpartition(".")
        section = current.get(group)
        if isinstance(section, Mapping) and name not in section:
            former = change.name and change.name.rpartition(".")[2]
            kept = {key: value for key, value in section.items() if key != former}
            kept[name] = section.get(former, change.before) if former else change.before
            current |= {group: kept}
    trainer = current.get("trainer")
    if isinstance(trainer, Mapping):
        current["trainer"] = {key: value for key, value in trainer.items() if key not in OF_TUNING}
    method = current.get("method")
    if isinstance(method, Mapping) and "ranks" in method:  # which said whether the rank had been auto
        kept = {key: value for key, value in method.items() if key != "ranks"}
        current["method"] = kept | ({"rank": "auto"} if method["ranks"] == "auto" else {})
    if isinstance(method, Mapping) and method.get("name") == "lorafa" and "rows" not in _group(settings, "mask"):
        # Before 0.5.0: dense LoRA with A frozen, trained on the gradient that LoRA-FA projects.
        current["method"] = {**current["method"], "name": "lorafa_projected", "peft_type": "LORA"}
    return current


def _group(settings: Mapping, name: str) -> Mapping:
    group = settings.get(name)
    return group if isinstance(group, Mapping) else {}


# --- Settings as plain data: config.yaml, and `config` in result.json.


def plain(config: Config | TaskConfig) -> dict[str, Any]:
    """Return settings as nested mappings."""
    return dataclasses.asdict(config)


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
    """Return the Config of nested mappings, as in config.yaml or a record of any version (`CHANGES`)."""
    settings = upgraded_settings(settings)

    def instance(kind: type, values: Mapping) -> Any:
        return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values})

    task = settings.get("task", {})
    if isinstance(task.get("members"), Mapping):
        members = {name: instance(TaskConfig, member) for name, member in task["members"].items()}
        settings = {**settings, "task": {**task, "members": members}}
    groups = {name: instance(kind, settings[name]) for name, kind in SECTIONS.items() if name in settings}
    return instance(Config, {**settings, **groups})
