"""A folder of images with one sub-folder a split; read without the libraries that read images."""

from __future__ import annotations

from pathlib import Path

from partial_lora.errors import PartialLoraError, shortlist

_SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}  # by their folders' names


def split_folders(folder: Path) -> dict[str, Path]:
    """Return the sub-folder of each split of a folder; nothing for a folder whose sub-folders are all classes.

    Raises PartialLoraError, about task.data_files, where the two cannot be told apart.
    """
    key = f"task.data_files={folder}"
    names = sorted(part.name for part in folder.iterdir() if part.is_dir())
    splits = [name for name in names if name in _SPLITS]
    if "train" not in splits:
        similar = [name for name in names if name.lower() in _SPLITS]
        if similar:  # they would pass for classes
            raise PartialLoraError(
                f"{key}: it has a folder {similar[0]} but none called train, only {shortlist(names)}; call the "
                "training folder train or, if all of them are classes, set task.data_files={train: FOLDER}"
            )
        return {}
    if {"val", "validation"} <= set(splits):
        raise PartialLoraError(f"{key}: it has the folders val and validation, expected one of them")
    return {_SPLITS[name]: folder / name for name in splits}
