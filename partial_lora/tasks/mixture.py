"""Mixtures: several tasks as one. Each row names its member task, and is prepared as that task's rows are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Value
from torch import Tensor

from partial_lora.errors import PartialLoraError
from partial_lora.tasks import splits
from partial_lora.tasks.kinds import kind_of
from partial_lora.tasks.splits import Draws, few_shot_draws, strata
from partial_lora.tasks.task import SPLITS, Task, Transform

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Mixture(Task):
    """Tasks of one kind and modality, their rows one task after the other.

    Rows stay where they are: each split has the columns `member` (the number of the task), `row` (in that task's split)
    and, except for generations, `label`. Labels are numbered across all members; a class is called MEMBER/CLASS.
    """

    members: tuple[Task, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of classes of each member; none where members have no classes."""
        return tuple(len(member.labels) for member in self.members) if self.labels else ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, without the member's name."""
        return tuple(label for member in self.members for label in member.labels)

    def rows_of(self, number: int, rows: Dataset) -> Dataset:
        """Return those rows that belong to one member, as in the member's own split."""
        places = np.asarray(rows["row"], dtype=np.int64)[np.asarray(rows["member"]) == number]
        return getattr(self.members[number], str(rows.split)).select(places)


def mix(name: str, members: Sequence[Task], *, mixing: str, seed: int) -> Mixture:
    """Make a mixture of tasks.

    mixing: "proportional" for all training rows, "equal" for as many of each member as the smallest has, the same share
    of every class of it, drawn by `seed`. Validation and test rows are all taken. Raises PartialLoraError for a member
    whose labels are real numbers.
    """
    for member in members:
        if "real numbers" in kind_of(member).labelled_by and not member.labels:
            raise PartialLoraError(
                f"task.members: the labels of {member.name} are real numbers, expected tasks of classes: a squared "
                "error cannot be added to cross entropy"
            )
    if mixing == "equal":
        fewest = min(len(member.train) for member in members)
        key = "mixing=equal, rows of each member"
        members = [
            dataclasses.replace(member, train=splits.sample(member.train, fewest, seed, key)) for member in members
        ]
    first, names = members[0], [f"{member.name}/{label}" for member in members for label in member.labels]
    rows = {split: _rows(split, [getattr(member, split) for member in members], names, members) for split in SPLITS}
    return Mixture(
        name=name,
        modality=first.modality,
        labels=tuple(names),
        metrics=("average",),
        kind=first.kind,
        members=tuple(members),
        **rows,
    )


def _rows(split: str, parts: Sequence[Dataset], names: Sequence[str], members: Sequence[Task]) -> Dataset:
    columns = {
        "member": np.repeat(np.arange(len(parts)), [len(rows) for rows in parts]),
        "row": np.concatenate([np.arange(len(rows)) for rows in parts]),
    }
    features = Features({"member": Value("int64"), "row": Value("int64")})
    if "label" in parts[0].column_names:
        firsts = starts([len(member.labels) for member in members])
        labels = [np.asarray(rows["label"]) + first for rows, first in zip(parts, firsts, strict=True)]
        columns["label"] = np.concatenate(labels)
        features["label"] = ClassLabel(names=list(names)) if names else Value("int64")
    return Dataset.from_dict(columns, features=features, split=split)


def member_draws(rows: Dataset, names: Sequence[str], **settings: object) -> Draws:
    """Draw few-shot rows of every member by itself, as `few_shot_draws` does for the task alone."""
    member, labels, draws = np.asarray(rows["member"]), strata(rows), []
    for number, name in enumerate(names):
        places = np.flatnonzero(member == number)
        try:
            drawn = few_shot_draws(labels[places], **settings)
        except PartialLoraError as error:
            raise PartialLoraError(f"{error} (task.members: {name})") from error
        warnings = tuple(f"{name}: {warning}" for warning in drawn.warnings)
        draws.append(Draws(places[drawn.fit], places[drawn.scored], warnings))
    return Draws(
        np.concatenate([drawn.fit for drawn in draws]),
        np.concatenate([drawn.scored for drawn in draws]),
        tuple(warning for drawn in draws for warning in drawn.warnings),
    )


class Joined:
    """Prepared rows of several tasks, one after the other, for a DataLoader; `starts` is added to each task's labels.

    `joined[column]` is a whole column, as of a Dataset.
    """

    def __init__(self, parts: Sequence[Dataset], starts: Sequence[int]) -> None:
        self._parts, self._starts = list(parts), list(starts)
        self.sizes = [len(part) for part in self._parts]
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, key: int | str) -> dict | list:
        if isinstance(key, str):
            return [value for part in self._parts for value in part[key]]
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int]) -> list[dict]:
        """Return the rows of a batch, read from each task in one go."""
        part = np.searchsorted(self._ends, keys, side="right")
        rows: list[dict] = [{} for _ in keys]
        for number in np.unique(part):
            places = np.flatnonzero(part == number)
            inner = [int(keys[place] - self._ends[number] + self.sizes[number]) for place in places]
            for place, row in zip(places, self._parts[number].__getitems__(inner), strict=True):
                rows[place] = row | ({"label": row["label"] + self._starts[number]} if "label" in row else {})
        return rows


class MixtureTransform:
    """Converts the rows of each member of a mixture by the member's own transform.

    Batches of few-shot draws hold rows of one member. mixture: may be None where no rows are converted.
    """

    def __init__(self, transforms: Sequence, mixture: Mixture | None) -> None:
        self.transforms, self._mixture = list(transforms), mixture
        self.lengths = self.transforms[0].lengths
        self.collate: Callable[[Sequence[Mapping]], dict[str, Tensor]] = self.transforms[0].collate  # the same for all

    @property
    def warnings(self) -> list[str]:
        return [warning for transform in self.transforms for warning in transform.warnings]

    def prepare(self, rows: Dataset, *, cache_bytes: int) -> Joined:
        """Return rows for `collate`, as the members' own transforms prepare them."""
        parts = self._parts_of(rows)
        prepared = [transform.prepare(member_rows, cache_bytes=cache_bytes) for member_rows, transform, _ in parts]
        return Joined(prepared, [start for *_, start in parts])

    def batches(self, rows: Dataset, size: int) -> Batches:
        """Return all rows in order, at most `size` a batch."""
        return self._by_member(rows, lambda member_rows, transform: transform.batches(member_rows, size))

    def training_batches(self, rows: Dataset, size: int) -> Batches:
        """Return all rows in order as in training."""
        return self._by_member(rows, lambda member_rows, transform: transform.training_batches(member_rows, size))

    def _by_member(self, rows: Dataset, batches: Callable[[Dataset, Transform], Batches]) -> Batches:
        """Return the batches of each member's rows and transform; labels are numbered across all members."""
        return [
            batch | {"labels": batch["labels"] + start} if start else batch
            for member_rows, transform, start in self._parts_of(rows)
            for batch in batches(member_rows, transform)
        ]

    def _parts_of(self, rows: Dataset) -> list[tuple[Dataset, Transform, int]]:
        """Return, for each member with any of the rows: its rows, its transform, and its first label's number."""
        firsts = starts(self._mixture.sizes, len(self.transforms))
        parts = [self._mixture.rows_of(number, rows) for number in range(len(firsts))]
        return [each for each in zip(parts, self.transforms, firsts, strict=True) if len(each[0])]


# --- Heads of several tasks side by side in one linear layer: an example has only the outputs of its own task


def starts(sizes: Sequence[int], count: int | None = None) -> list[int]:
    """Return the first output of each task; 0 for each of `count` tasks where none has outputs of its own."""
    return [sum(sizes[:number]) for number in range(len(sizes) if count is None else count)]


def owners(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Return the number of the task that each output belongs to (outputs,)."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.as_tensor(list(sizes))).to(device)


def within(logits: Tensor, labels: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return logits (N, outputs) in float32; those of other tasks than the row's own are so low that softmax gives 0.

    They stay finite, so that logits which are not finite still show a model that broke down. labels: (N,).
    """
    owner, labels, logits = owners(sizes, logits.device), labels.to(logits.device), logits.float()
    return logits.masked_fill(owner != owner[labels][:, None], torch.finfo(logits.dtype).min)
