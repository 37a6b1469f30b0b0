"""Folders of images: which files are images, and which sub-folders are splits; read without the libraries of tasks."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from partial_lora.errors import PartialLoraError, shortlist

FILES = "files"  # the path of a task that has only the user's files

# By the names of their folders, in any case.
_SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "val", "valid", "dev"), "validation")


@cache
def _suffixes() -> frozenset[str]:
    from PIL import Image

    kinds = Image.registered_extensions().items()
    return frozenset(
        suffix for suffix, kind in kinds if kind in Image.OPEN and Image.MIME.get(kind, "").startswith("image/")
    )


def is_image(file: str | os.PathLike) -> bool:
    """Return whether a file's name ends as that of an image that Pillow reads; films, pages and data are none."""
    return os.path.splitext(file)[1].lower() in _suffixes()


def split_folders(folder: Path) -> dict[str, Path]:
    """Return the sub-folder of each split of a folder; nothing for a folder whose sub-folders are all classes.

    Raises PartialLoraError, about task.data_files, where the two cannot be told apart, and for two folders of a split.
    """
    key = f"task.data_files={folder}"
    names = sorted(part.name for part in folder.iterdir() if part.is_dir() and not part.name.startswith("."))
    of_splits: dict[str, Path] = {}
    for name in names:
        split = _SPLITS.get(name.lower())
        if split in of_splits:
            raise PartialLoraError(
                f"{key}: it has the folders {of_splits[split].name} and {name}, expected one of them"
            )
        if split:
            of_splits[split] = folder / name
    if of_splits and (len(of_splits) < len(names) or "train" not in of_splits):
        first = next(iter(of_splits.values())).name
        lacks = "beside others:" if "train" in of_splits else "but none called train, only"
        raise PartialLoraError(
            f"{key}: it has a folder {first} {lacks} {shortlist(names)}; call the folders of splits train, validation "
            "and test or, if all of them are classes, set task.data_files={train: FOLDER}"
        )
    return of_splits
