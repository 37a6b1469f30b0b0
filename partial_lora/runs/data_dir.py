"""A folder of many tasks' rows, NAME/{train,validation,test}.parquet, so that a sweep can be over tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from partial_lora.errors import PartialLoraError

_SPLITS = ("train", "validation", "test")


def with_files(settings: Mapping) -> dict:
    """Settings whose task, or each member of a mixture, reads the files that `data_dir` has for it.

    A task that came out of a package and one that has `task.data_files` of its own stay as they are. Raises
    PartialLoraError, in one line, where the folder has no training rows of a task.
    """
    if settings["data_dir"] is None:
        return dict(settings)
    folder, task = Path(settings["data_dir"]), settings["task"]
    if not task["members"]:
        return {**settings, "task": _found(folder, task)}
    members = {name: _found(folder, own) for name, own in task["members"].items()}
    return {**settings, "task": {**task, "members": members}}


def _found(folder: Path, task: Mapping) -> dict:
    if task["path"].startswith("bundled:") or task["data_files"] is not None:
        return dict(task)
    files = {split: folder / task["name"] / f"{split}.parquet" for split in _SPLITS}
    if not files["train"].is_file():
        raise PartialLoraError(
            f"data_dir={folder}: expected {files['train']} with the training rows of task={task['name']}; put them "
            "there, set task.data_files, or leave data_dir out"
        )
    return {**task, "data_files": {split: str(file) for split, file in files.items() if file.is_file()}}
