"""Where the rows of a task are read from: the user's files, an installed package or the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from datasets import Dataset

from partial_lora.errors import PartialLoraError
from partial_lora.tasks import bundled, files, hub

FILES = "files"  # the path of a task that is nothing but the user's files


def read(
    name: str,
    path: str,
    subset: str | None,
    revision: str | None,
    data_files: Mapping[str, str] | str | None,
    text_columns: Sequence[str],
    label_column: str | None,
    regression: bool | None,
) -> Mapping[str, Dataset]:
    """The rows of a task by split, as the source has them; files stand in for any other source."""
    if data_files:
        return files.read(data_files, text_columns, label_column, regression)
    if path == FILES:
        raise PartialLoraError(
            f"task={name} reads files of yours: set task.data_files={{train: PATH, test: PATH}}, or one PATH that a "
            "test split is cut from"
        )
    if path == "bundled:digits":
        return {"train": bundled.digits()}
    return hub.read(name, path, subset, revision)
