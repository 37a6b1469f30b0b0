"""A task: inputs and their labels in three disjoint splits, wherever its rows come from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Protocol

from datasets import Dataset

from partial_lora.errors import PartialLoraError
from partial_lora.tasks import sources, splits
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.kinds import Kind, kind_of
from partial_lora.tasks.metrics import FITTING

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")


class Transform(Protocol):
    """Conversion of rows to the inputs of a model.

    lengths: True where prepared rows have a column `length`, of tokens. warnings: sentences on what was cut or left
    out, known once rows are prepared.
    """

    lengths: bool
    warnings: Sequence[str]

    def prepare(self, rows: Dataset, *, cache_bytes: int) -> Dataset: ...

    def collate(self, rows: Sequence[Mapping]) -> dict[str, Tensor]: ...

    def batches(self, rows: Dataset, size: int) -> list[dict[str, Tensor]]: ...

    def training_batches(self, rows: Dataset, size: int) -> list[dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Task:
    """A labelled data set in three disjoint splits.

    `train` is learned from, `validation` selects a checkpoint, `test` is evaluated once, at the end. Their columns are
    those that its kind's `rows` make (`kinds.KINDS`).

    labels: the names of the classes; none for regression, where `label` is a real number, and for any other kind.
    metrics: names of the metrics; the first one selects.
    """

    name: str
    modality: str
    labels: tuple[str, ...]
    train: Dataset
    validation: Dataset
    test: Dataset
    metrics: tuple[str, ...]
    kind: str = "label"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of classes of each member of a mixture; none of a single task."""
        return ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, for sentences about them."""
        return self.labels


def load(config: TaskConfig, seed: int = 0) -> Task:
    """Load a task's rows in fixed splits.

    seed: draws training and validation rows where `config.split_seed` is None; test rows are then those of seed 0.
    Raises PartialLoraError for no network; a missing file, column, label or text; labels that do not fit; an empty
    split; a class too small to split.
    """
    name, kind = config.name, kind_of(config)
    source, config = _source(config)
    of_source = places(name, source, config.train_split, config.test_split, own_files=bool(config.data_files))
    rows = {split: source[place] for split, place in of_source.items()}
    for split in rows:
        if len(rows[split]) == 0:
            raise PartialLoraError(f"task={name}: the {split} split is empty, expected at least one row")
    rows = resolve_name(f"{__package__}.{kind.rows}")(rows, config)
    labels = tuple(splits.class_names(rows["train"]))
    test_seed, seed = (0, seed) if config.split_seed is None else (config.split_seed,) * 2
    rows = _three_splits(rows, config, test_seed, seed)
    rows["train"] = splits.with_label_noise(rows["train"], config.label_noise, seed, name)
    metrics = _metrics(config, kind, kind.labelled_by[0 if labels else -1])
    return Task(name=name, modality=config.modality, labels=labels, metrics=metrics, kind=config.kind, **rows)


def _source(config: TaskConfig) -> tuple[Mapping[str, Dataset], TaskConfig]:
    """Return the splits of the source, and the settings with the column of labels if the values tell it."""
    source = sources.read(config)
    if config.data_files and kind_of(config).has_head and config.label_column is None:
        column = sources.guess_label_column(source["train"], [*config.text_columns, config.image_column])
        if column:
            logger.info("task=%s: the labels are column %s, the one of few values", config.name, column)
            config = replace(config, label_column=column)
            source = sources.read(config)
    return source, config


def places(
    name: str, source: Mapping[str, Dataset], train_split: str, test_split: str, *, own_files: bool
) -> dict[str, str]:
    """Return the source's split for each of the task's splits that it has; the others are cut from train."""
    if own_files:
        train_split, test_split = "train", "test"
    if train_split not in source:
        raise PartialLoraError(
            f"task.train_split={train_split}: expected one of {', '.join(sorted(source))}, the splits of {name}"
        )
    if not own_files and len(source) > 1 and (test_split not in source or test_split == train_split):
        splits = ", ".join(sorted(set(source) - {train_split}))
        raise PartialLoraError(f"task.test_split={test_split}: expected one of {splits}, the other splits of {name}")
    wanted = {"train": train_split, "test": test_split}
    if "validation" not in wanted.values():  # unless it is the test split, which must not select
        wanted["validation"] = "validation"
    return {split: place for split, place in wanted.items() if place in source}


def _three_splits(rows: dict[str, Dataset], config: TaskConfig, test_seed: int, seed: int) -> dict[str, Dataset]:
    """Sample rows where their number is limited, and cut missing splits off the training rows."""
    rows, name = dict(rows), config.name
    least = len(SPLITS) - len(rows) + 1
    if "test" not in rows:
        rows["train"], rows["test"] = splits.cut(rows["train"], config.test_share, test_seed, name, least=least)
    rows["train"] = splits.sample(rows["train"], config.train_samples, seed, "train_samples")
    rows["test"] = splits.sample(rows["test"], config.test_samples, test_seed, "test_samples")
    if "validation" not in rows:
        rows["train"], rows["validation"] = splits.cut(rows["train"], config.validation_share, seed, name, least=least)
    return rows


def _metrics(config: TaskConfig, kind: Kind, labelled_by: str) -> tuple[str, ...]:
    """Return the chosen metrics, which have to fit the labels, or the usual ones."""
    fitting = FITTING[labelled_by]
    unfit = [metric for metric in config.metrics if metric not in fitting]
    if unfit:
        raise PartialLoraError(
            f"task.metrics: {config.name} has labels that are {labelled_by}, expected some of {', '.join(fitting)}, "
            f"not {unfit[0]}"
        )
    usual = ("exact_match", *kind.metrics[1:]) if config.answer else kind.metrics
    return tuple(config.metrics) or usual or fitting[:1]
