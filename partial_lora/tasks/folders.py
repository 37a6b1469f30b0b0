"""Folders of images with one sub-folder a class."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
from datasets import Dataset, Features, Image, NamedSplit, Value

from partial_lora.errors import PartialLoraError

_SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


def splits(key: str, folder: Path) -> dict[str, Dataset]:
    """The images of one folder: of its sub-folders train, test and validation (or val), or all of them as train.

    key: of the setting that names the folder, for messages.
    """
    parts = {split: folder / name for name, split in _SPLITS.items() if (folder / name).is_dir()}
    if "train" not in parts:
        return {"train": classes(key, folder, "train")}
    return {split: classes(key, part, split) for split, part in parts.items()}


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
