"""The members of a mixture: their settings out of group files, and what a mixture is by what they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from partial_lora.errors import PartialLoraError
from partial_lora.runs.ranges import plain_name, require
from partial_lora.runs.schema import TaskConfig

_FOR_EACH = ("train_samples", "test_samples", "validation_share", "split_seed", "label_noise", "cache_bytes")
_OF_MIXTURE = {"name", "path", "members", "mixing", "data_files", *_FOR_EACH}
_FOUND = {"modality", "kind", "classes"}  # by what the members are
_OF_NUMBERS = {"pearson", "spearman", "mse"}
_SCORES = {"auto", "accuracy", "loss"}  # that are means of examples, each seen within its member's classes


def with_members(settings: Mapping, folder: Path) -> dict:
    """Settings whose mixture has its members' settings, {name: settings}, in place of names; others as they are.

    folder: of the group files. Raises PartialLoraError, in one line that names the member, for one that is not there,
    is wrong, or is of another modality or kind than the others.
    """
    task = dict(settings["task"])
    if not task["members"]:
        return dict(settings)
    defaults = OmegaConf.to_container(OmegaConf.structured(TaskConfig))
    for key in sorted(task.keys() - _OF_MIXTURE - _FOUND):
        require(task[key] == defaults[key], f"task.{key}", task[key], "nothing: it is each member's own")
    given, files = _given(task["members"], folder), task["data_files"] or {}
    by_member = isinstance(files, Mapping) and set(files) <= set(given)
    require(by_member, "task.data_files", files, f"files by member, {{{next(iter(given))}: {{train: PATH, …}}, …}}")
    for_each = {key: task[key] for key in _FOR_EACH if task[key] != defaults[key]}
    members = {}
    for name, own in given.items():
        of_files = {"data_files": files[name]} if name in files else {}
        require(own.get("name", name) == name, f"task.members.{name}.name", own.get("name"), f"{name}, or nothing")
        members[name] = _checked(name, {"name": name, **own, **for_each, **of_files})
    task |= {"members": members, "data_files": None} | _alike(members)
    score = settings["calibration"]["score"]
    fits = task["kind"] != "label" or score in _SCORES
    require(fits, "calibration.score", score, f"one of {', '.join(sorted(_SCORES))}, for a mixture")
    return {**settings, "task": task}


def _given(members: object, folder: Path) -> dict[str, dict]:
    """What is said of each member: its group file, or the settings that stand in its place."""
    if isinstance(members, Mapping):
        for name in members:
            plain_name("task.members", str(name))
        return {str(name): dict(own) for name, own in members.items()}
    names = list(members) if isinstance(members, Sequence) and not isinstance(members, str) else [members]
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    for name in names:
        require(name in known, "task.members", name, f"names out of {', '.join(known)}")
    require(len(set(names)) == len(names), "task.members", members, "every name once")
    return {name: yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")) for name in names}


def _checked(name: str, own: Mapping) -> dict:
    """The whole settings of a member."""
    unknown = sorted(own.keys() - {field.name for field in dataclasses.fields(TaskConfig)})
    if unknown:
        raise PartialLoraError(f"task.members.{name}.{unknown[0]}: no such key of a task")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TaskConfig), dict(own))
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise PartialLoraError(f"task.members.{name}.{key}: expected a value")
        OmegaConf.to_object(merged)  # runs its __post_init__
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0]
        raise PartialLoraError(f"task.members.{name}.{error.full_key}: {reason}") from error
    except PartialLoraError as error:
        raise PartialLoraError(f"task.members, {name}: {error}") from error
    found = OmegaConf.to_container(merged, resolve=True)
    require(not found["members"], "task.members", name, "tasks that are no mixtures")
    numbers = found["regression"] or _OF_NUMBERS & set(found["metrics"])
    require(not numbers, "task.members", name, "tasks of classes: an error squared is not to be added to cross entropy")
    return found


def _alike(members: Mapping[str, Mapping]) -> dict:
    """The modality and kind that all members share, and how many classes they have together, where all say it."""
    first, *others = members
    for other in others:
        for key in ("modality", "kind"):
            expected = f"tasks of one {key}: {first} is of {members[first][key]}, {other} of {members[other][key]}"
            require(members[other][key] == members[first][key], "task.members", list(members), expected)
    classes = [member["classes"] for member in members.values()]
    return {
        "modality": members[first]["modality"],
        "kind": members[first]["kind"],
        "classes": None if None in classes else sum(classes),
    }
