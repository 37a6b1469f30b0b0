"""A task: inputs and their labels in three disjoint splits, wherever its rows come from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Protocol

from datasets import Dataset

from partial_lora.errors import PartialLoraError
from partial_lora.tasks import questions, sources, splits
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


@dataclass(frozen=True)
class Task:
    """A labelled data set in three disjoint splits.

    `train` is learned from, `validation` selects a checkpoint, `test` is evaluated once, at the end. Their columns are
    `label` and `image`, or `label`, `text` and `text_pair`. Kind "choice" has `prompts`, `options` and `label`, the
    right option's place (`questions.format_choices`). Kind "generation" has `prompt` and `response`; a conversation
    also has `messages`, of which the last is the response and all before it are the prompt.

    modality: "image" or "text".
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


def load(
    *,
    name: str,
    path: str,
    subset: str | None = None,
    revision: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    data_files: Mapping[str, str] | str | None = None,
    modality: str = "image",
    kind: str = "label",
    image_column: str | None = None,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    format: str | None = None,
    prompt_columns: Sequence[str] = (),
    option_columns: Sequence[str] = (),
    answer_column: str | None = None,
    response_column: str | None = None,
    messages_column: str | None = None,
    answer: str | None = None,
    regression: bool | None = None,
    metrics: Sequence[str] = (),
    train_samples: int | None = None,
    test_samples: int | None = None,
    validation_share: float = 0.1,
    test_share: float = 0.2,
    split_seed: int | tuple[int, int] | None = 0,
    label_noise: float = 0.0,
) -> Task:
    """Load a task's rows in fixed splits.

    Args:
        path: a data set of the hub (`subset` of it, at `revision`), "bundled:digits" out of scikit-learn, or "files".
        data_files: files or folders by split, or one for all, read instead of the hub (`sources.read_files`).
        kind: "label", "choice" or "generation".
        image_column, text_columns, label_column: their names; by default, the one column of that kind.
        format, prompt_columns, option_columns, answer_column: of a choice (`questions.format_choices`).
        format, prompt_columns, response_column, messages_column, answer: of a generation
            (`questions.format_completions`).
        regression: whether labels are real numbers; None: they are where some are fractions.
        metrics: by default accuracy; Pearson's correlation for regression; both accuracies for a choice; for a
            generation, exact match where an `answer` is sought in it, else ROUGE-L, and then perplexity.
        train_samples, test_samples: at most so many rows, the same share of every class, before validation is cut off.
        validation_share: share of the training rows set aside, per class, where the source has no validation split.
        test_share: share of all rows, per class, where the source has no test split.
        split_seed: of every cut and sample; of a pair, the first for test rows, the second for all others. None is 0.
        label_noise: share of the rows left to train on whose label becomes another class, drawn by split_seed;
            validation and test keep theirs.

    Raises:
        PartialLoraError: no network; a missing file, column, label or text; labels that do not fit; an empty split; a
            class too small to split.
    """
    cells = [*text_columns, *prompt_columns, *option_columns, *filter(None, (answer_column, response_column))]
    if kind == "generation":
        cells += [column for layout in questions.LAYOUTS for column in (*layout.prompt, layout.response)]
    source = sources.read(name, path, subset, revision, data_files, cells, label_column, regression)
    own_table = bool(data_files) and kind == "label" and label_column is None
    if own_table and (label_column := sources.guess_label_column(source["train"], [*text_columns, image_column])):
        logger.info("task=%s: the labels are column %s, the one of few values", name, label_column)
        source = sources.read(name, path, subset, revision, data_files, cells, label_column, regression)
    of_source = places(name, source, train_split, test_split, own_files=bool(data_files))
    rows = {split: source[place] for split, place in of_source.items()}
    for split in rows:
        if len(rows[split]) == 0:
            raise PartialLoraError(f"task={name}: the {split} split is empty, expected at least one row")
    labels: tuple[str, ...] = ()
    if kind == "choice":
        rows = questions.format_choices(rows, name, format, prompt_columns, option_columns, answer_column)
    elif kind == "generation":
        columns = (prompt_columns, response_column, answer, messages_column)
        rows = questions.format_completions(rows, name, format, *columns)
    else:
        for split, place in of_source.items():
            file = sources.file_of(data_files, place)
            columns = (image_column, text_columns, label_column)
            rows[split] = sources.select_columns(rows[split], name, split, modality, *columns, file)
        labels, rows = sources.encode_labels(rows, name, regression)
    test_seed, seed = split_seed if isinstance(split_seed, tuple) else (split_seed or 0,) * 2
    rows = _three_splits(rows, name, train_samples, test_samples, validation_share, test_share, test_seed, seed)
    rows["train"] = splits.with_label_noise(rows["train"], label_noise, seed, name)
    labelled_by = {"choice": "places of options", "generation": "texts"}.get(
        kind, "classes" if labels else "real numbers"
    )
    chosen = _metrics(metrics, name, labelled_by, answer)
    return Task(name=name, modality=modality, labels=labels, metrics=chosen, kind=kind, **rows)


SETTINGS = tuple(signature(load).parameters)  # the keys of the group `task` that decide which rows there are


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
        others = ", ".join(sorted(set(source) - {train_split}))
        raise PartialLoraError(f"task.test_split={test_split}: expected one of {others}, the other splits of {name}")
    wanted = {"train": train_split, "test": test_split}
    if "validation" not in wanted.values():  # unless it is the test split, which must not select
        wanted["validation"] = "validation"
    return {split: place for split, place in wanted.items() if place in source}


def _three_splits(
    rows: dict[str, Dataset],
    name: str,
    train_samples: int | None,
    test_samples: int | None,
    validation_share: float,
    test_share: float,
    test_seed: int,
    seed: int,
) -> dict[str, Dataset]:
    """Sample rows where their number is limited, and cut missing splits off the training rows."""
    rows = dict(rows)
    least = len(SPLITS) - len(rows) + 1
    if "test" not in rows:
        rows["train"], rows["test"] = splits.cut(rows["train"], test_share, test_seed, name, least=least)
    rows["train"] = splits.sample(rows["train"], train_samples, seed, "train_samples")
    rows["test"] = splits.sample(rows["test"], test_samples, test_seed, "test_samples")
    if "validation" not in rows:
        rows["train"], rows["validation"] = splits.cut(rows["train"], validation_share, seed, name, least=least)
    return rows


def _metrics(chosen: Sequence[str], name: str, labelled_by: str, answer: str | None) -> tuple[str, ...]:
    """Return the chosen metrics, which have to fit the labels, or the default ones."""
    fitting = FITTING[labelled_by]
    unfit = [metric for metric in chosen if metric not in fitting]
    if unfit:
        raise PartialLoraError(
            f"task.metrics: {name} has labels that are {labelled_by}, expected some of {', '.join(fitting)}, not "
            f"{unfit[0]}"
        )
    if chosen:
        return tuple(chosen)
    if labelled_by == "texts":
        return ("exact_match" if answer else "rouge_l", "perplexity")
    return fitting if labelled_by == "places of options" else fitting[:1]
