"""Folders of images: which files are images, and which sub-folders are splits; read without the libraries of tasks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from partial_lora.errors import PartialLoraError, shortlist
from partial_lora.files import leads_back

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


def classes(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """Yield every sub-folder with its files, at any depth, in the order of names; nothing that is hidden.

    Raises PartialLoraError for a link to a folder above it: all that is there would be images of a class.
    """
    for label in sorted(part for part in folder.iterdir() if part.is_dir() and not part.name.startswith(".")):
        paths = []
        for parent, folders, names in os.walk(label, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for part in (Path(parent), *(Path(parent, name) for name in folders)):
                if leads_back(part):
                    raise PartialLoraError(f"{part}: a link to {part.resolve()}, a folder above it; remove the link")
            paths += [Path(parent, name) for name in names if not name.startswith(".")]
        yield label.name, sorted(paths)


def left_out(data_files: Mapping[str, str] | str | None) -> list[str]:
    """Return a line about each folder of images with sub-folders or files that are left out."""
    named = data_files if isinstance(data_files, Mapping) else {"": data_files} if data_files else {}
    lines = []
    for split, folder in ((split, Path(path)) for split, path in named.items() if Path(path).is_dir()):
        parts = [folder] if split else split_folders(folder).values() or [folder]
        found = [(part / label, files) for part in parts for label, files in classes(part)]
        others = [file for _, files in found for file in files if not is_image(file)]
        empty = [label for label, files in found if not any(map(is_image, files))]
        for paths, why in ((empty, "a class without an image"), (others, "a name that does not end as an image's")):
            if paths:
                names = shortlist([path.relative_to(folder).as_posix() for path in paths], 3)
                lines.append(f"task.data_files{split and f'.{split}'}={folder}: left out: {names} ({why})")
    return lines


def split_folders(folder: Path) -> dict[str, Path]:
    """Return the sub-folder of each split of a folder; nothing for a folder whose sub-folders are all classes.

    Raises PartialLoraError, about task.data_files, where the two cannot be told apart, and for two folders of a split.
    """
    key = f"task.data_files={folder}"
    names = sorted(part.name for part in folder.iterdir() if part.is_dir() and not part.name.startswith("."))
    of_splits: dict[str, Path] = {}
    for name in names:
        split = _SPLITS.get(name.lower())
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
