"""Rows of the user's own files: tables, and folders of images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
from datasets import Dataset, NamedSplit

from partial_lora.errors import PartialLoraError
from partial_lora.tasks import folders, written
from partial_lora.tasks.hub import first_line

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_KINDS = "parquet, csv, tsv, json or jsonl"


def read(
    data_files: Mapping[str, str] | str,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    regression: bool | None = None,
) -> dict[str, Dataset]:
    """The rows by split of {train: PATH, test: PATH}, or of one PATH: all of them, or a folder with one a split.

    Args:
        data_files: a PATH is a parquet, csv, tsv, json or jsonl file, or a folder with one sub-folder a class.
        text_columns: columns that hold texts, whatever they look like in a csv file.
        label_column, regression: which column of a csv file has labels, if not `label`, and whether they are real
            numbers: what they decide is in `written.labels`.

    Raises PartialLoraError that names the file which is missing, empty or something else than its name says.
    """
    delimited = partial(
        _delimited, text_columns=text_columns, label_column=label_column or "label", regression=regression
    )
    if not isinstance(data_files, Mapping):
        path = Path(data_files)
        if path.is_dir():
            return folders.splits("task.data_files", path)
        return {"train": _table("task.data_files", path, "train", delimited)}
    found = {}
    for split, file in data_files.items():
        key, path = f"task.data_files.{split}", Path(file)
        found[split] = folders.classes(key, path, split) if path.is_dir() else _table(key, path, split, delimited)
    return found


def file_of(data_files: Mapping[str, str] | str | None, split: str) -> Path | None:
    """The user's file or folder that a split is read from. None for rows that are none of the user's."""
    path = data_files.get(split) if isinstance(data_files, Mapping) else data_files
    return Path(path) if path else None


def _table(key: str, file: Path, split: str, delimited: Callable[[Path, str, str], Dataset]) -> Dataset:
    """The rows of one file; read together, files of one data set would all get the label names of the first."""
    suffix = file.suffix.lower()
    if not file.exists():
        raise PartialLoraError(f"{key}={file}: no such file")
    if file.stat().st_size == 0:
        raise PartialLoraError(f"{key}={file}: the file is empty")
    try:
        if suffix in _SEPARATORS:
            return delimited(file, _SEPARATORS[suffix], split)
        if suffix in (".json", ".jsonl"):
            return _objects(file, split)
        if suffix in (".parquet", ".pq"):
            return Dataset.from_parquet(str(file), split=NamedSplit(split))
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError, pa.ArrowException) as error:
        generated = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = first_line(error.__cause__ if generated and error.__cause__ else error)
        if isinstance(error, OSError) and error.filename not in (None, str(file)):  # the home, perhaps
            raise PartialLoraError(f"{key}={file}: {cause}; set HF_HOME to a folder that can be written") from error
        kind = "parquet" if suffix == ".pq" else suffix[1:]
        raise PartialLoraError(f"{key}={file}: expected a {kind} file ({cause})") from error
    raise PartialLoraError(f"{key}={file}: expected a {_KINDS} file, by the end of its name, or a folder of images")


def _delimited(
    file: Path,
    separator: str,
    split: str,
    *,
    text_columns: Sequence[str],
    label_column: str,
    regression: bool | None,
) -> Dataset:
    """A csv or tsv file with a header. An empty cell has no value; "NA", "None" and "nan" are words like others."""
    dtypes = dict.fromkeys([*text_columns, label_column], "str")
    frame = pd.read_csv(
        file, sep=separator, dtype=dtypes, keep_default_na=False, na_values=[""], low_memory=False, encoding="utf-8-sig"
    )
    if label_column in frame.columns and label_column not in text_columns:
        cells = [None if pd.isna(cell) else cell for cell in frame[label_column]]
        frame[label_column] = pd.Series(written.labels(cells, regression), dtype=object)
    return Dataset.from_pandas(frame, preserve_index=False, split=NamedSplit(split))


def _objects(file: Path, split: str) -> Dataset:
    """A json file that is one list of objects, or a file with one object a line."""
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = _parsed(text)
    else:
        rows = [_object(line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("not every row is an object with named columns")
    columns = {}
    for name in dict.fromkeys(column for row in rows for column in row):
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except pa.ArrowException as error:
            raise ValueError(f"column {name} has values of several types") from error
    return Dataset(pa.table(columns), split=NamedSplit(split))


def _object(line: str, number: int) -> object:
    try:
        return _parsed(line)
    except ValueError as error:
        raise ValueError(f"line {number} is no JSON object") from error


def _parsed(text: str) -> object:
    return json.loads(text, parse_constant=lambda _: None)  # NaN is no value
