"""A task: inputs and their labels in three disjoint splits, whatever its rows are read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from datasets import Dataset

from partial_lora.errors import PartialLoraError
from partial_lora.tasks import questions, sources, splits
from partial_lora.tasks.splits import mislabelled

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("train", "validation", "test")
SETTINGS = (  # of the task group, as `load` takes them
    "name",
    "path",
    "subset",
    "revision",
    "train_split",
    "test_split",
    "data_files",
    "modality",
    "kind",
    "image_column",
    "text_columns",
    "label_column",
    "format",
    "prompt_columns",
    "option_columns",
    "answer_column",
    "response_column",
    "answer",
    "regression",
    "metrics",
    "train_samples",
    "test_samples",
    "validation_share",
    "split_seed",
    "label_noise",
)
_TEST_SHARE = 0.2  # of a source that comes without a test split
_METRICS = {  # that suit a task, by what its labels are
    "classes": ("accuracy", "f1", "matthews"),
    "real numbers": ("pearson", "spearman", "mse"),
    "places of options": ("accuracy", "accuracy_norm"),
    "texts": ("exact_match", "rouge_l", "perplexity"),
}


class Transform(Protocol):
    """How rows of a task become what a model reads (`tasks.ImageTransform`, `tasks.TextTransform`)."""

    lengths: bool

    def prepare(self, rows: Dataset, *, cache_bytes: int) -> Dataset: ...

    def collate(self, rows: Sequence[Mapping]) -> dict[str, Tensor]: ...

    def batches(self, rows: Dataset, size: int) -> list[dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Task:
    """A labelled data set in three disjoint splits.

    `train` is learned from, `validation` selects a checkpoint, `test` is looked at once, at the end. Their columns are
    `image`, or `text` and `text_pair`, and `label`; of kind "choice" `prompts`, `options` and `label`, the right one's
    place (`choices.read`); of kind "generation" `prompt` and `response`.

    modality: "image" or "text".
    labels: the names of the classes; none for regression, where `label` is a real number, and for any other kind.
    metrics: what predictions are measured by; the first one selects.
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
        """Of several tasks in one, how many classes each has; none of a single task."""
        return ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the classes are called, to be put into sentences."""
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
    answer: str | None = None,
    regression: bool | None = None,
    metrics: Sequence[str] = (),
    train_samples: int | None = None,
    test_samples: int | None = None,
    validation_share: float = 0.1,
    split_seed: int = 0,
    label_noise: float = 0.0,
) -> Task:
    """Read a task's rows and fix its splits.

    Args:
        path: a data set of the hub (`subset` of it, at `revision`), "bundled:digits" out of scikit-learn, or "files".
        data_files: files or folders by split, or one for all, read instead of the hub (`files.read`).
        kind: "label", "choice" or "generation".
        image_column, text_columns, label_column: their names; None or none takes the one column of that kind.
        format, prompt_columns, option_columns, answer_column: of a choice, as in `choices.read`.
        format, prompt_columns, response_column, answer: of a generation, as in `exchanges.read`.
        regression: whether labels are real numbers; None where they are fractions.
        metrics: none means accuracy, or Pearson's correlation for regression; both accuracies of a choice; of a
            generation exact matches where an `answer` is sought in it, else ROUGE-L, and the perplexity.
        train_samples, test_samples: at most so many rows, the same share of every class, before validation is cut off.
        validation_share: share of the training rows set aside, per class, where the source has no validation split.
        label_noise: share of the rows left to train on whose label becomes another class, drawn by split_seed;
            validation and test keep theirs.

    Raises:
        PartialLoraError: no network; a missing file, column, label or text; labels that do not fit; an empty split; a
            class too small to split.
    """
    cells = [*text_columns, *prompt_columns, *option_columns, *filter(None, (answer_column, response_column))]
    source = sources.read(name, path, subset, revision, data_files, cells, label_column, regression)
    places = _places(name, source, train_split, test_split, own_files=bool(data_files))
    found = {split: source[place] for split, place in places.items()}
    for split, rows in found.items():
        if len(rows) == 0:
            raise PartialLoraError(f"task={name}: the {split} split is empty, expected at least one row")
    names: tuple[str, ...] = ()
    if kind == "choice":
        found = questions.format_choices(found, name, format, prompt_columns, option_columns, answer_column)
    elif kind == "generation":
        found = questions.format_completions(found, name, format, prompt_columns, response_column, answer)
    else:
        for split, place in places.items():
            file = sources.file_of(data_files, place)
            by_name = (image_column, text_columns, label_column)
            found[split] = sources.select_columns(found[split], name, split, modality, *by_name, file)
        names, found = sources.encode_labels(found, name, regression)
    whole, least, taken = found["train"], len(SPLITS) - len(found) + 1, []
    if "test" not in found:
        found["train"], found["test"] = splits.cut(whole, _TEST_SHARE, split_seed, name, least=least)
        taken.append("the test split was cut off")
    if train_samples is not None and train_samples < len(found["train"]):
        found["train"] = splits.sample(found["train"], train_samples, split_seed, "train_samples")
        taken.append(f"task.train_samples={train_samples} rows were drawn")
    found["test"] = splits.sample(found["test"], test_samples, split_seed, "test_samples")
    if "validation" not in found:
        found["train"], found["validation"] = splits.cut(
            found["train"], validation_share, split_seed, name, least=least, whole=whole, taken=taken
        )
    found["train"] = mislabelled(found["train"], label_noise, split_seed, name)
    measured = _measured_by(metrics, name, _labelled_by(kind, names), answer)
    return Task(name=name, modality=modality, labels=names, metrics=measured, kind=kind, **found)


def _places(
    name: str, source: Mapping[str, Dataset], train_split: str, test_split: str, *, own_files: bool
) -> dict[str, str]:
    """Which split of the source each split of the task is; one that is lacking is cut from train."""
    places = {"train": "train", "validation": "validation", "test": "test"}
    if not own_files:
        places |= {"train": train_split, "test": test_split}
    train, test = places["train"], places["test"]
    if train not in source:
        raise PartialLoraError(f"task.train_split={train}: expected one of {_listed(source)}, the splits of {name}")
    if not own_files and len(source) > 1 and (test not in source or test == train):
        others = _listed(set(source) - {train})
        raise PartialLoraError(f"task.test_split={test}: expected one of {others}, the other splits of {name}")
    if "validation" in (train, test):  # what reports must not select: validation is cut from train instead
        del places["validation"]
    return {split: place for split, place in places.items() if place in source}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(sorted(names))


def _labelled_by(kind: str, names: Sequence[str]) -> str:
    if kind == "label":
        return "classes" if names else "real numbers"
    return {"choice": "places of options", "generation": "texts"}[kind]


def _measured_by(metrics: Sequence[str], name: str, labelled_by: str, answer: str | None) -> tuple[str, ...]:
    """The metrics of a task; those asked for have to suit its labels."""
    fitting = _METRICS[labelled_by]
    unfit = [metric for metric in metrics if metric not in fitting]
    if unfit:
        raise PartialLoraError(
            f"task.metrics: {name} has labels that are {labelled_by}, expected some of {', '.join(fitting)}, not "
            f"{unfit[0]}"
        )
    if metrics:
        return tuple(metrics)
    if labelled_by == "texts":
        return ("exact_match" if answer else "rouge_l", "perplexity")
    return fitting if labelled_by == "places of options" else fitting[:1]
