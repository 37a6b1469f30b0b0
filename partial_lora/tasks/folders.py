"""Folders of images with one sub-folder a class."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
from datasets import Dataset, Features, Image, NamedSplit, Value

from partial_lora.errors import PartialLoraError

_SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
_FEW = 10  # folders that a message lists


def splits(key: str, folder: Path) -> dict[str, Dataset]:
    """The images of one folder: of its sub-folders train, test and validation (or val), or all of them as train.

    key: of the setting that names the folder, for messages. Raises PartialLoraError for splits without train, which
    would pass for classes, and for two that are both validation.
    """
    there = sorted(part.name for part in folder.iterdir() if part.is_dir())
    named = [name for name in there if name in _SPLITS]
    if "train" not in named:
        others = [name for name in there if name.lower() in _SPLITS]
        if others:
            listed = ", ".join(there[:_FEW]) + (", …" if len(there) > _FEW else "")
            raise PartialLoraError(
                f"{key}={folder}: it has a folder {others[0]} but none called train, only {listed}; call the one to "
                "train on train or, if all of them are classes, set task.data_files={train: FOLDER}"
            )
        return {"train": classes(key, folder, "train")}
    if {"val", "validation"} <= set(named):
        raise PartialLoraError(f"{key}={folder}: it has the folders val and validation, expected one of them")
    return {_SPLITS[name]: classes(key, folder / name, _SPLITS[name]) for name in named}


def classes(key: str, folder: Path, split: str) -> Dataset:
    """Every image in a sub-folder, at any depth, with the sub-folder's name as its label; in the order of names.

    Hidden files, and files whose name does not end as an image's does, are left out. Raises PartialLoraError for a
    folder without such images.
    """
    suffixes = PIL.Image.registered_extensions()
    images, labels = [], []
    for label in sorted(part for part in folder.iterdir() if part.is_dir() and not part.name.startswith(".")):
        for file in sorted(label.rglob("*")):
            if file.suffix.lower() in suffixes and not file.name.startswith(".") and file.is_file():
                images.append(str(file.absolute()))
                labels.append(label.name)
    if not images:
        raise PartialLoraError(f"{key}={folder}: no image in any sub-folder, expected one sub-folder a class")
    features = Features({"image": Image(), "label": Value("string")})
    return Dataset.from_dict({"image": images, "label": labels}, features=features, split=NamedSplit(split))
