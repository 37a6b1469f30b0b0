"""Rows read one by one, so that what is wrong with one of them can be named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from datasets import Dataset

from partial_lora.errors import PartialLoraError
from partial_lora.tasks.labels import name_of

Read = TypeVar("Read")


def place(name: str, split: str, row: int) -> str:
    """A row in words, counted from 1: how a message about it begins."""
    return f"task={name}: row {row} of the {split} split"


def read(
    rows: Dataset, name: str, split: str, read_one: Callable[[Mapping[str, Any]], Read], known: str
) -> Iterator[tuple[int, Read]]:
    """What `read_one` makes of every row, and the row's number; `read_one` is given the columns that have a value.

    known: how a message calls what `read_one` reads. Raises PartialLoraError for a column that it looked up in vain.
    """
    for number, row in enumerate(rows, 1):
        try:
            yield number, read_one({column: value for column, value in row.items() if value is not None})
        except KeyError as error:
            column = error.args[0]
            if column in rows.column_names:
                raise PartialLoraError(f"{place(name, split, number)} has no value in its column {column}") from None
            raise PartialLoraError(
                f"task={name}: {known} reads a column {column}; the columns of the {split} split are "
                f"{', '.join(rows.column_names)}"
            ) from None


def named(rows: Dataset, name: str, key: str, columns: Sequence[str]) -> None:
    """Raise PartialLoraError unless the setting `key` names columns, all of which are there."""
    there = ", ".join(rows.column_names)
    if not columns:
        raise PartialLoraError(f"task.{key}: {name} needs it, set it to some of the columns {there}")
    for column in columns:
        if column not in rows.column_names:
            raise PartialLoraError(f"task.{key}={column}: {name} has no such column; its columns are {there}")


def text_of(value: object) -> str:
    """A cell as text, without space around it; 3.0 is 3, and what has no value is nothing."""
    return "" if value is None else name_of(value).strip()


def joined(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """The texts of several columns, a line each, without those that are empty."""
    texts = [name_of(row[column]) for column in columns if text_of(row.get(column))]
    return "\n".join(texts)
