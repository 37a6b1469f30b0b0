"""The task that a finished run is used on: its own, a member of it, or what other settings make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from partial_lora.errors import PartialLoraError
from partial_lora.finished.run import FinishedRun
from partial_lora.settings.arguments import in_grammar, parsed, refuse_group_lists
from partial_lora.settings.compose import in_one_line, register_schema
from partial_lora.settings.identity import digests
from partial_lora.settings.resolving import check_files, with_files
from partial_lora.settings.schema import Config, conf_dir
from partial_lora.settings.versions import plain
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.image_folders import split_folders
from partial_lora.tasks.kinds import kind_of
from partial_lora.training.config import TrainerConfig


@dataclass(frozen=True)
class OneTask:
    """A single task, and the places of its classes among the outputs of the run's model.

    member: its name in the run's mixture; None where it is the run's own task.
    config: the run's settings, with this task.
    labels: the names of its classes; empty for a regression, a choice or a generation.
    outputs: the places of its classes among the model's logits; None for all that there are.
    """

    member: str | None
    config: Config
    labels: list[str]
    outputs: list[int] | None


def one_task(run: FinishedRun, member: str | None = None, *, of_another: bool = False) -> OneTask:
    """Return the task that a run is used on.

    of_another: the run is used on another task than its own; a causal language model, having no heads, then needs no
    member. Raises PartialLoraError, in one line, for a mixture without a member or with a name that is no member (the
    line lists them), and for a member of a run that is no mixture.
    """
    task = run.config.task
    members = task.members or {}
    if not members:
        if member is not None:
            raise PartialLoraError(f"--member {member}: the run has one task, {task.name}; leave it out")
        return OneTask(None, run.config, run.labels(), None)
    if member is None and of_another and not kind_of(task).has_head:
        return OneTask(None, run.config, [], None)
    listed = " or ".join(members)
    if member is None:
        raise PartialLoraError(f"{run.directory}: the run has several tasks; name one: --member {listed}")
    if member not in members:
        raise PartialLoraError(f"--member {member}: no member of the run's mixture, expected --member {listed}")
    config = replace(run.config, task=members[member])
    if not kind_of(task).has_head:
        return OneTask(member, config, [], None)
    prefix = f"{config.task.name}/"
    labels = {place: label for place, label in enumerate(run.labels()) if label.startswith(prefix)}
    return OneTask(member, config, [label.removeprefix(prefix) for label in labels.values()], list(labels))


# --- The task that a finished run is evaluated on: its own, or what Hydra overrides make of it.

_TRAINER = ("device", "eval_batch_size")  # the keys that may be set beside the task
# Splits that are cut in another way would hold rows that the run was trained on.
CUT_FIRST = ("split_seed", "test_share", "train_split")  # test rows come off before all others
CUTS = (*CUT_FIRST, "validation_share", "train_samples")


def evaluation_settings(
    run: FinishedRun, overrides: Sequence[str], member: str | None = None, *, reads_rows: bool = True
) -> tuple[TaskConfig, TrainerConfig]:
    """Return the task and the trainer of a finished run's settings, changed by Hydra overrides.

    `task=NAME` takes that group file in place of the run's own task, and its files out of `data_dir`, or of the run's
    where that has them. member: as `one_task` takes it. reads_rows: the task's files have to be there. Raises
    PartialLoraError, in one line, for any other key, and as `resolving.resolve` does.
    """
    overrides = [in_grammar(override) for override in overrides]
    keys = {override.partition("=")[0] for override in overrides}
    of_another = "task" in keys
    trained = one_task(run, member, of_another=of_another)
    if trained.member and of_another and trained.outputs is None:
        raise PartialLoraError(
            f"--member {trained.member}: the run's model has no heads; leave it out to evaluate another task"
        )
    allowed = {f"trainer.{key}" for key in _TRAINER} | ({"data_dir"} if of_another else set())
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise PartialLoraError(f"{override!r}: expected KEY=VALUE")
        if key != "task" and not key.startswith("task.") and key not in allowed:
            listed = ", ".join(sorted(allowed))
            raise PartialLoraError(f"{key}: a finished run keeps it; expected task=NAME, task.KEY=VALUE, {listed}")
    refuse_group_lists(overrides)
    recorded = trained.config.task
    trainer = {key: getattr(trained.config.trainer, key) for key in _TRAINER}
    if trainer["device"] == "cuda":  # the run trained there, and this machine may have none
        trainer["device"] = "auto"
    node = {"trainer": trainer, "data_dir": run.config.data_dir}
    if not of_another:
        for name in CUTS:
            if f"task.{name}" in keys:
                raise PartialLoraError(
                    f"task.{name}: a finished run keeps it, else splits would hold rows it was trained on"
                )
        files, overrides = _with_files(recorded.data_files, overrides)
        node["task"] = plain(recorded) | {"data_files": files}
    with in_one_line(overrides):
        task, trainer, folder = _composed(node, overrides)
        if of_another and folder and ("data_dir" in keys or Path(folder, task.name, "train.parquet").is_file()):
            task = with_files(task, Path(folder))
        if reads_rows:
            _check_rows(task)
    if not of_another and not _is_copy(run, trained, task):
        _refuse_another_cut(recorded.data_files, task.data_files)
    return task, trainer


def task_named(name: str, data_dir: str | None) -> TaskConfig:
    """Return the settings of a task by itself; its files are those that `data_dir` has for it, if it has any.

    Raises PartialLoraError, in one line, for a name that is no task's, and for files that are not there.
    """
    with in_one_line([override := f"task={name}"]):
        task, _, folder = _composed({"data_dir": data_dir}, [override])
        if folder and Path(folder, task.name, "train.parquet").is_file():
            task = with_files(task, Path(folder))
        check_files(task)
    return task


def _composed(node: Mapping, overrides: Sequence[str]) -> tuple[TaskConfig, TrainerConfig, str | None]:
    """Return the task, the trainer and `data_dir` that overrides make of settings."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    register_schema()
    ConfigStore.instance().store(name="evaluated", node={"defaults": ["schema", "_self_", {"task": None}], **node})
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = compose("evaluated", list(overrides))
    task, trainer = (OmegaConf.to_object(composed[group]) for group in ("task", "trainer"))  # runs __post_init__
    return task, trainer, composed.data_dir


def _check_rows(task: TaskConfig) -> None:
    """Raise PartialLoraError for a file of rows that is not there, with the key that says where it is now."""
    try:
        check_files(task)
    except PartialLoraError as error:
        files = task.data_files
        now = f"{{{', '.join(f'{split}: PATH' for split in files)}}}" if isinstance(files, Mapping) else "PATH"
        raise PartialLoraError(f"{error}; task.data_files={now} says where the run's rows are now") from error


def _is_copy(run: FinishedRun, trained: OneTask, task: TaskConfig) -> bool:
    """Return whether the files of a task are those that the run was trained on, at another place."""
    prefix = f"task.members.{trained.member}.data_files" if trained.member else "task.data_files"
    recorded = (run.result.get("digests") or {}).items()
    before = {key.removeprefix(prefix): digest for key, digest in recorded if key.startswith(prefix)}
    try:
        now = digests({"task": plain(task)}) if before else {}
    except OSError:
        return False
    return bool(before) and before == {
        key.removeprefix("task.data_files"): digest for key, digest in now.items() if "data_files" in key
    }


def _with_files(recorded: str | Mapping | None, overrides: list[str]) -> tuple[str | dict | None, list[str]]:
    """Return the run's files, those of single splits replaced as overrides say, and the other overrides.

    Where a split gets another file, a single PATH for all splits stands for the training rows; a folder with a
    sub-folder for each split stands for these.
    """
    prefix = "task.data_files."
    named = dict(_path(override.removeprefix(prefix)) for override in overrides if override.startswith(prefix))
    others = [override for override in overrides if not override.startswith(prefix)]
    if not named:
        return recorded, others
    if recorded is None and "train" not in named:
        split = next(iter(named))
        raise PartialLoraError(
            f"task.data_files.{split}: the run's rows came without files; expected task.data_files={{train: FILE, "
            "test: FILE}"
        )
    return files_by_split(recorded) | named, others


def _path(override: str) -> tuple[str, str]:
    """Return the key and the text of KEY=PATH, which may be in quotes."""
    key, _, text = override.partition("=")
    read = parsed(override)
    return key, read.value() if read is not None and isinstance(read.value(), str) else text


def files_by_split(data_files: str | Mapping | None) -> dict[str, str]:
    """Return the file or folder of each split that has its own; other splits are cut from the training rows' file."""
    if not isinstance(data_files, str):
        return dict(data_files or {})
    of_splits = split_folders(Path(data_files)) if Path(data_files).is_dir() else {}
    return {split: str(part) for split, part in of_splits.items()} or {"train": data_files}


def _refuse_another_cut(recorded: str | Mapping | None, files: str | Mapping | None) -> None:
    """Refuse a test split that is cut from other training rows: they may hold rows that the run was trained on."""
    if files is not None and files != recorded and "test" not in files_by_split(files):
        raise PartialLoraError(
            "task.data_files.train: a finished run keeps it, else splits would hold rows it was trained on; expected "
            "task.data_files.test=FILE"
        )
