"""Resolving of composed settings: checked, and with members, data files and budget filled in."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from partial_lora.calibration.config import UNIFORM, CalibrationConfig
from partial_lora.errors import PartialLoraError, require
from partial_lora.files import at_home, mapped, plain_name
from partial_lora.masks import PAPER_BUDGET
from partial_lora.models.config import FROM_FILES, check_place
from partial_lora.models.skeleton import stored_settings
from partial_lora.settings.accelerate_file import accelerate_file
from partial_lora.settings.keys import no_such_key
from partial_lora.settings.schema import SECTIONS, Config, conf_dir
from partial_lora.settings.study_commands import chosen_from
from partial_lora.settings.versions import plain
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.kinds import kind_of
from partial_lora.tasks.metrics import FITTING
from partial_lora.training import optimizer_check
from partial_lora.training.trackers import TRACKERS

_OF_PHOTOGRAPHS, _OF_SETS = 98, 56  # pixels of model.image_size=null, both multiples of vit_s14's patch
OmegaConf.register_new_resolver("at_home", at_home, replace=True)  # for the folder of a sweep, which Hydra makes


def resolve(composed: DictConfig) -> Config:
    """Return the checked settings of a run: a mixture's members, data files and budget filled in.

    Raises PartialLoraError, in one line that names the key, for a missing value, a value out of range, and a file that
    is not there, and for an unknown key.
    """
    OmegaConf.set_struct(composed, False)
    if other := chosen_from(composed.pop("study", None) or ()):  # the runs that an experiment's file lists
        raise PartialLoraError(f"experiment: expected {other}, to train: this one only chooses among its runs")
    if unknown := next(_unknown(composed), None):
        raise PartialLoraError(no_such_key(unknown))
    _refuse_truths(composed)
    composed = _with_model(composed)
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise PartialLoraError(f"{missing[0]}: expected a value, its group file sets none")
    name, names = composed.importance.name, sorted(file.stem for file in (conf_dir() / "importance").glob("*.yaml"))
    require(name in names, "importance.name", name, f"one of {', '.join(names)}")
    config = OmegaConf.to_object(composed)  # runs every __post_init__
    _check_surroundings(config)
    task = _with_members(config.task, conf_dir() / "task")
    fits = not task.members or not kind_of(task).has_head or config.calibration.score in _SCORES
    require(fits, "calibration.score", config.calibration.score, f"one of {', '.join(sorted(_SCORES))}, for a mixture")
    if config.data_dir is not None:
        task = with_files(task, Path(config.data_dir))
    for each in (task, *task.members.values()) if isinstance(task.members, Mapping) else (task,):
        _refuse_results_among_rows(config.results_dir, each)
    calibration, model = _with_budget(config), config.model
    if model.image_size is None:
        is_own = task.path == "files" and task.classes is None  # conf/task says how many classes a known set has
        model = replace(model, image_size=_OF_PHOTOGRAPHS if is_own else _OF_SETS)
    resolved = replace(config, model=model, task=task, calibration=calibration)
    mapped(plain(resolved), _finite)
    return resolved


def _finite(key: str, value: object) -> None:
    """Refuse what JSON has no word for, in settings of any keys: records hold them."""
    require(not isinstance(value, float) or math.isfinite(value), key, value, "a finite number")


def _refuse_truths(composed: DictConfig) -> None:
    """Refuse a text that was a truth value: YAML reads no, off, yes and on so, and OmegaConf makes a text of it.

    A column of such a name may be: it is looked for in the rows.
    """

    def check(key: str, value: object) -> None:
        written = value in ("True", "False") and not re.search(r"_columns?\b", key)
        expected = 'a text; in YAML no, off, yes and on are none unless they are quoted: "no"'
        require(not written, key, value == "True", expected)

    mapped({key: value for key, value in OmegaConf.to_container(composed).items() if key != "hydra"}, check)


def _with_model(composed: DictConfig) -> DictConfig:
    """Return settings in which the files of a model say what is left to them (`FROM_FILES`)."""
    chosen, task = OmegaConf.to_container(composed.model), composed.task
    for key in ("weights", "text_weights"):
        check_place(f"model.{key}", at_home(chosen[key]))
    left = [key for key, nothing in FROM_FILES.items() if chosen[key] in (MISSING, nothing)]
    if "architecture" not in left or MISSING in (chosen["name"], chosen["weights"]):
        return OmegaConf.unsafe_merge(composed, {"model": {"blocks": None}}) if "blocks" in left else composed
    kind = None if task.modality == "image" or task.members else task.kind
    stored = stored_settings(chosen["weights"])
    if stored and stored["family"] == "causal" and chosen["family"] != "causal" and kind and kind_of(task).has_head:
        stored = {**stored, "family": "encoder", "head": "score"}  # it tells labels, as a folder of such a model does
    if stored is None:
        require(chosen["weights"] != "random", "model.architecture", MISSING, "a value, for model.weights=random")
        from partial_lora.models.from_files import settings_of  # needs torch

        stored = settings_of(chosen["name"], at_home(chosen["weights"]), kind)
    if chosen["family"] == "timm":  # the schema's default, where the group file has none
        left.append("family")
    values = {key: stored[key] for key in (*left, "weights") if key in stored}
    values["new_modules"] = chosen["new_modules"] or stored["new_modules"]
    values["model_args"] = stored["model_args"] | chosen["model_args"]
    return OmegaConf.unsafe_merge(composed, {"model": values})


def _unknown(composed: DictConfig) -> Iterator[str]:
    """Yield the keys that are no field, which `+key=value` puts past Hydra's own check."""
    for key in composed:
        if key not in _FIELDS[""]:
            yield key
        elif key in SECTIONS and not OmegaConf.is_missing(composed, key):
            yield from (f"{key}.{name}" for name in composed[key] if name not in _FIELDS[key])


_FIELDS = {key: {field.name for field in dataclasses.fields(kind)} for key, kind in {"": Config, **SECTIONS}.items()}


def _with_budget(config: Config) -> CalibrationConfig:
    """Return the settings of calibration, with PAPER_BUDGET for a budget of null where a size is to be met without one.

    A method that only spends a budget ignores `calibration.sparsity`, which becomes null. Ranks are met by method.rank.
    """
    calibration, traits = config.calibration, config.method.traits
    if traits.size == "budget":
        calibration = replace(calibration, sparsity=None)
    elif calibration.sparsity != UNIFORM:
        return calibration
    sized = calibration.budget or traits.own_ranks or not traits.is_sparse
    return calibration if sized else replace(calibration, budget=PAPER_BUDGET)


def _check_surroundings(config: Config) -> None:
    """Raise PartialLoraError, naming the key, for a file, folder or package that a run names and that is not there."""
    trainer, calibration, data_dir = config.trainer, config.calibration.file, config.data_dir
    require(bool(config.results_dir), "results_dir", "", "a folder; . is the one that you are in")
    exists = calibration is None or Path(calibration).is_file()
    require(exists, "calibration.file", calibration, "an existing calibration.json")
    missing = [TRACKERS[name][0] for name in trainer.report_to if not _installed(name)]
    to_do = f"trackers that are installed: `pip install {' '.join(missing)}` (all: partial-lora's extra `trackers`)"
    require(not missing, "trainer.report_to", trainer.report_to, to_do)
    optimizer_check.check(trainer)
    if trainer.accelerate_config is not None:
        accelerate_file(trainer.accelerate_config)  # launching.cluster checks it together with the keys of the trainer
    exists = data_dir is None or os.path.isdir(data_dir)  # Path("") is the working folder
    require(exists, "data_dir", data_dir, "a folder of NAME/{train,validation,test}.parquet")
    check_files(config.task)


def _installed(module: str) -> bool:
    """Return whether a package can be imported; a mere folder of that name, as wandb leaves behind, does not count."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def check_files(task: TaskConfig) -> None:
    """Raise PartialLoraError for a file of a task's rows that is not there; a mixture has its files in its members."""
    for key, path in _files_of(task):
        require(os.path.isfile(path) or os.path.isdir(path), key, path, "an existing file or folder")


def _files_of(task: TaskConfig) -> Iterator[tuple[str, str]]:
    """Give the key and the path of each of a task's files and folders."""
    files = task.data_files
    if files is None or task.path == "members":
        return
    for split, path in files.items() if isinstance(files, Mapping) else [(None, files)]:
        yield f"task.data_files.{split}" if split else "task.data_files", str(path)


def _refuse_results_among_rows(results_dir: str, task: TaskConfig) -> None:
    """Refuse results in a folder of images: their pictures would become rows, and each run would change the ids."""
    place = Path(results_dir).resolve()
    for key, path in _files_of(task):
        folder = Path(path).resolve()
        if folder.is_dir() and place.is_relative_to(folder):
            hidden = any(part.startswith(".") for part in place.relative_to(folder).parts)
            require(hidden, "results_dir", results_dir, f"a folder outside of {key}={path}")


# --- The members of a mixture.

_FOR_EACH = ("train_samples", "test_samples", "validation_share", "test_share", "split_seed", "label_noise")
_FOR_EACH += ("cache_bytes",)
_OF_MIXTURE = {"name", "path", "members", "mixing", "data_files", *_FOR_EACH}
_FROM_MEMBERS = {"modality", "kind", "classes"}
_SCORES = {"auto", "accuracy", "loss"}  # scores that are means over examples, each within its member's classes


def _with_members(task: TaskConfig, folder: Path) -> TaskConfig:
    """Return a mixture whose members are {name: TaskConfig}, in place of names; another task as it is.

    folder: of the group files. Raises PartialLoraError, in one line that names the member, for a member that is not
    there, is wrong, or is of another modality or kind than the others.
    """
    if not task.members:
        return task
    usual = TaskConfig()
    for field in sorted(dataclasses.fields(task), key=lambda field: field.name):
        key, value = field.name, getattr(task, field.name)
        allowed = key in _OF_MIXTURE | _FROM_MEMBERS or value == getattr(usual, key)
        require(allowed, f"task.{key}", value, "nothing: it is each member's own")
    settings, files = _member_settings(task.members, folder), task.data_files or {}
    by_member = isinstance(files, Mapping) and set(files) <= set(settings)
    expected = f"files by member, {{{next(iter(settings))}: {{train: PATH, …}}, …}}"
    require(by_member, "task.data_files", files, expected)
    for_each = {key: getattr(task, key) for key in _FOR_EACH if getattr(task, key) != getattr(usual, key)}
    members = {}
    for name, entry in settings.items():
        of_files = {"data_files": files[name]} if name in files else {}
        require(entry.get("name", name) == name, f"task.members.{name}.name", entry.get("name"), f"{name}, or nothing")
        members[name] = _member(name, {"name": name, **entry, **for_each, **of_files})
    (first, one), *others = members.items()
    for other, its in others:
        kinds = [kind_of(member) for member in (one, its)]
        expected = f"tasks of one kind: {first} asks for {kinds[0].asked}, {other} for {kinds[1].asked}"
        require(kinds[0] is kinds[1], "task.members", list(members), expected)
    classes = [member.classes for member in members.values()]
    return replace(
        task,
        members=members,
        data_files=None,
        modality=one.modality,
        kind=one.kind,
        classes=None if None in classes else sum(classes),
    )


def _member_settings(members: object, folder: Path) -> dict[str, dict]:
    """Return the settings of each member as they are written: in its group file, or in place of its name."""
    if isinstance(members, Mapping):
        for name, values in members.items():
            plain_name("task.members", str(name))
            require(isinstance(values, Mapping), f"task.members.{name}", values, "settings of a task")
        return {str(name): dict(values) for name, values in members.items()}
    names = list(members) if isinstance(members, Sequence) and not isinstance(members, str) else [members]
    available = sorted(file.stem for file in folder.glob("*.yaml"))
    for name in names:
        require(name in available, "task.members", name, f"names out of {', '.join(available)}")
    require(len(set(names)) == len(names), "task.members", members, "every name once")
    return {name: yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")) for name in names}


def _member(name: str, values: Mapping) -> TaskConfig:
    try:
        member = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TaskConfig), dict(values)))
        check_files(member)
    except OmegaConfBaseException as error:
        key_exists = not isinstance(error, ConfigKeyError)
        reason = str(error.msg or error).splitlines()[0] if key_exists else "no such key of a task"
        raise PartialLoraError(f"task.members.{name}.{error.full_key}: {reason}") from error
    except PartialLoraError as error:
        raise PartialLoraError(f"task.members, {name}: {error}") from error
    require(not member.members, "task.members", name, "tasks that are no mixtures")
    numbers = member.regression or set(FITTING["real numbers"]) & set(member.metrics)
    require(not numbers, "task.members", name, "tasks with classes: squared errors and cross entropies cannot be added")
    return member


# --- A folder of many tasks' rows, NAME/{train,validation,test}.parquet, so that a sweep can be over tasks.


def with_files(task: TaskConfig, folder: Path) -> TaskConfig:
    """Return a task that reads the files that `data_dir` has for it; of a mixture each member does.

    A task out of a package, and a task with `task.data_files` of its own, stay as they are. Raises PartialLoraError, in
    one line, where the folder has no training rows of a task.
    """
    if task.members:
        return replace(task, members={name: with_files(member, folder) for name, member in task.members.items()})
    if task.path.startswith("bundled:") or task.data_files is not None:
        return task
    files = {split: folder / task.name / f"{split}.parquet" for split in ("train", "validation", "test")}
    if not files["train"].is_file():
        raise PartialLoraError(
            f"data_dir={folder}: expected {files['train']} with the training rows of task={task.name}; put them "
            "there, set task.data_files, or leave data_dir out"
        )
    return replace(task, data_files={split: str(file) for split, file in files.items() if file.is_file()})
