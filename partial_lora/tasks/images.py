"""Image classification: rows from a package, the hub or local files, and the pixels a model expects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.transforms import v2

from partial_lora.errors import PartialLoraError

SETTINGS = (  # of the task group, as `load` takes them
    "name",
    "path",
    "revision",
    "test_split",
    "data_files",
    "image_column",
    "label_column",
    "validation_share",
    "split_seed",
)
_TEST_SHARE = 0.2  # of a source that comes in one piece


@dataclass(frozen=True)
class Task:
    """A labelled data set in three disjoint splits, each with the columns `image` and `label`.

    `train` is learned from, `validation` selects a checkpoint, `test` is looked at once, at the end.
    """

    name: str
    labels: tuple[str, ...]
    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset


def load(
    *,
    name: str,
    path: str,
    revision: str | None = None,
    test_split: str = "test",
    data_files: Mapping[str, str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_share: float = 0.1,
    split_seed: int = 0,
) -> Task:
    """Read a task's rows and fix its splits.

    Args:
        path: a data set of the hub, or "bundled:digits" out of scikit-learn.
        data_files: local parquet files by split, read instead of the hub.
        image_column, label_column: their names; None takes the one column of that kind.
        validation_share: share of the training rows set aside, per class, where the source has no validation split.

    Raises:
        PartialLoraError: no network, a missing column, an empty split, a class too small to split.
    """
    source = _read(name, path, revision, data_files)
    places = {"train": "train", "validation": "validation", "test": "test" if data_files else test_split}
    if len(source) > 1 and (places["test"] not in source or places["test"] == "train"):
        others = ", ".join(sorted(set(source) - {"train"}))
        raise PartialLoraError(f"task.test_split={test_split}: expected one of {others}, the other splits of {name}")
    if places["test"] == places["validation"]:  # what reports must not select: validation is cut from train instead
        del places["validation"]
    splits = {
        split: _columns(source[place], name, image_column, label_column)
        for split, place in places.items()
        if place in source
    }
    if "test" not in splits:
        splits["train"], splits["test"] = _split(splits["train"], _TEST_SHARE, split_seed, name)
    if "validation" not in splits:
        splits["train"], splits["validation"] = _split(splits["train"], validation_share, split_seed, name)
    for split, rows in splits.items():
        if len(rows) == 0:
            raise PartialLoraError(f"task={name}: the {split} split is empty, expected at least one row")
    labels = splits["train"].features["label"].names
    for split, rows in splits.items():
        if rows.features["label"].names != labels:
            raise PartialLoraError(
                f"task={name}: the {split} split has the labels {rows.features['label'].names}, "
                f"expected those of the training rows, {labels}"
            )
    return Task(name, tuple(labels), **splits)


def _read(name: str, path: str, revision: str | None, data_files: Mapping[str, str] | None) -> Mapping:
    if data_files:
        return {split: _parquet(split, file) for split, file in data_files.items()}
    if path == "bundled:digits":
        return {"train": _digits()}
    try:
        return datasets.load_dataset(path, revision=revision)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise PartialLoraError(
            f"task={name}: cannot fetch {path} from the model hub ({_first_line(error)}); without one use the "
            "offline default model=vit_s14 task=digits, or task.data_files={train: FILE.parquet, test: FILE.parquet}"
        ) from error


def _parquet(split: str, file: str) -> datasets.Dataset:
    """The rows of one file; read together, files of one data set would all get the label names of the first."""
    try:
        return datasets.Dataset.from_parquet(file)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        cause = _first_line(error.__cause__ or error)
        raise PartialLoraError(f"task.data_files.{split}={file}: expected a parquet file ({cause})") from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _digits() -> datasets.Dataset:
    """scikit-learn's digits: 1,797 grey images (8 x 8), the 17 grey levels stretched to 0..255."""
    digits = load_digits()
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return datasets.Dataset.from_dict({"image": list(pixels), "label": digits.target.tolist()}, features=features)


def _columns(rows: datasets.Dataset, name: str, image_column: str | None, label_column: str | None) -> datasets.Dataset:
    """The rows with their image and label columns under those names, and no other."""
    image = _column(rows, name, "image_column", image_column, datasets.Image)
    label = _column(rows, name, "label_column", label_column, datasets.ClassLabel)
    rows = rows.select_columns([image, label])
    if (image, label) != ("image", "label"):
        rows = rows.rename_columns({image: "image", label: "label"})
    return rows


def _column(rows: datasets.Dataset, name: str, key: str, column: str | None, kind: type) -> str:
    there = {column: type(feature).__name__ for column, feature in rows.features.items()}
    if column is not None:
        if not isinstance(rows.features.get(column), kind):
            raise PartialLoraError(
                f"task.{key}={column}: {name} has no such column of type {kind.__name__}; its columns are {there}"
            )
        return column
    matching = [column for column, feature in rows.features.items() if isinstance(feature, kind)]
    if len(matching) != 1:
        raise PartialLoraError(
            f"task.{key}: {name} has {len(matching)} columns of type {kind.__name__}, name one; its columns are {there}"
        )
    return matching[0]


def _split(rows: datasets.Dataset, share: float, seed: int, name: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Cut `share` of the rows off, the same share of every class, always the same rows for a seed."""
    labels = np.asarray(rows["label"])
    try:
        kept, cut = train_test_split(np.arange(len(rows)), test_size=share, random_state=seed, stratify=labels)
    except ValueError as error:
        raise PartialLoraError(
            f"task={name}: cannot set {share:.0%} of {len(rows)} rows aside per class: {_first_line(error)}"
        ) from error
    return rows.select(np.sort(kept)), rows.select(np.sort(cut))


class ImageTransform:
    """Turns rows into what a model reads: pixel_values (N, 3, S, S) float32, normalised, and labels (N,).

    The shorter side is resized to `image_size` pixels and the middle square kept, so a square image is only resized.
    """

    def __init__(self, *, image_size: int, mean: Sequence[float], std: Sequence[float], interpolation: str) -> None:
        self._transform = v2.Compose(
            [
                v2.RGB(),
                v2.Resize(image_size, interpolation=v2.InterpolationMode(interpolation)),
                v2.CenterCrop(image_size),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
            ]
        )

    def __call__(self, rows: Mapping[str, Sequence]) -> dict[str, list]:
        return {"pixel_values": [self._transform(image) for image in rows["image"]], "labels": rows["label"]}

    def batches(self, rows: datasets.Dataset, size: int) -> list[dict[str, torch.Tensor]]:
        """All rows as tensors, `size` rows a batch: for few-shot draws, which fit in memory."""
        batches = []
        for start in range(0, len(rows), size):
            batch = self(rows[start : start + size])
            batches.append(
                {"pixel_values": torch.stack(batch["pixel_values"]), "labels": torch.tensor(batch["labels"])}
            )
        return batches
