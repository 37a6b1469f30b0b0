"""Where the rows of a task are read from: the user's files, an installed package or the hub."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Image, NamedSplit, Value
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from sklearn.datasets import load_digits

from partial_lora.errors import PartialLoraError

# --- Folders of images with one sub-folder a class.

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


# --- Rows of a data set on the hub, at a fixed revision.

_SECONDS = 10.0  # that the hub may take to answer at all


def read_hub(name: str, path: str, subset: str | None, revision: str | None) -> Mapping[str, datasets.Dataset]:
    """Every split of a data set; what the hub's own cache holds is not downloaded again.

    Args:
        path: a repository of the hub, or a local folder laid out like one.
        subset: the part of it that is read, where it has several.

    Raises PartialLoraError, without any wait for a hub that cannot be reached, with what needs no hub.
    """
    if not Path(path).is_dir() and not _cached(path):
        _reach(name, path, revision)
    try:
        return datasets.load_dataset(path, subset, revision=revision)
    except (OSError, HTTPError) as error:
        raise _unreachable(name, path, first_line(error)) from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = first_line(error.__cause__ or error)
        raise PartialLoraError(f"task={name}: cannot read {path} (task.subset={subset}): {cause}") from error


def _reach(name: str, path: str, revision: str | None) -> None:
    """Ask the hub once whether it has a data set; the library would ask for half a minute."""
    try:
        HfApi().dataset_info(path, revision=revision, timeout=_SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        reason = "no such data set or revision there, or no access to it"
        raise _unreachable(name, path, reason) from error
    except (OSError, HTTPError, HFValidationError) as error:
        raise _unreachable(name, path, first_line(error)) from error


def _cached(path: str) -> bool:
    """Whether an earlier run left the data set in the library's cache, so that it may do without the hub."""
    *owner, repository = path.split("/")
    folder = "___".join([*owner, camelcase_to_snakecase(repository)])
    return (Path(datasets.config.HF_DATASETS_CACHE) / folder).is_dir()


def _unreachable(name: str, path: str, reason: str) -> PartialLoraError:
    return PartialLoraError(
        f"task={name}: cannot fetch {path} from the model hub ({reason}); without one use the offline default "
        "model=vit_s14 task=digits, or task.data_files={train: FILE.parquet, test: FILE.parquet}"
    )


def first_line(error: BaseException) -> str:
    """An exception in one line: its kind and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


# --- Labels of a csv file, where everything is a text: which of them are numbers.

_TRUTHS = {"True": True, "TRUE": True, "true": True, "False": False, "FALSE": False, "false": False}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
_PLAIN = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d*)?", re.ASCII)  # what a number is written like that is read back as it was
_CODE = re.compile(r"[+-]?0\d", re.ASCII)  # 007
_UNKNOWN = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)  # among numbers: a missing one; among words: a word
_WHOLE, _FLOAT = 2**63, 2**53  # from here on, whole numbers do not fit a column, and floats are no longer exact


def labels(cells: Sequence[str | None], regression: bool | None) -> list[str | bool | int | float | None]:
    """What the texts of a column stand for: all true or false, all numbers, or all words, as they are written.

    Numbers where nothing is lost by it: no code has a leading zero, and no two texts of a class are the same number.
    Fractions may be written as they like (0.5 and 0.50), since they are no classes; so may all numbers where
    `regression` says that they are real. None is a cell without anything in it, and stays.
    """
    texts = {cell: cell.strip() for cell in cells if cell is not None}
    if texts and texts.keys() <= _TRUTHS.keys():
        return [_TRUTHS.get(cell) for cell in cells]
    numbers = _numbers(set(texts.values()))
    if not numbers or not (regression or _lossless(numbers, regression)):
        return list(cells)
    return [None if cell is None else numbers[texts[cell]] for cell in cells]


def _numbers(texts: set[str]) -> dict[str, int | float]:
    """The numbers that texts are written as, all whole or all floats; none where one is a word, or all are unknown."""
    if not all(_NUMBER.fullmatch(text) or _UNKNOWN.fullmatch(text) for text in texts):
        return {}
    if all(_UNKNOWN.fullmatch(text) for text in texts):
        return {}
    try:
        whole = {text: int(text) for text in texts}
    except ValueError:
        return {text: float(text) for text in texts}
    return whole if all(abs(number) < _WHOLE for number in whole.values()) else {text: float(text) for text in texts}


def _lossless(numbers: dict[str, int | float], regression: bool | None) -> bool:
    known = {text: number for text, number in numbers.items() if not _UNKNOWN.fullmatch(text)}
    if any(_CODE.match(text) for text in known):
        return False
    if regression is None and any(number % 1 for number in known.values()):
        return True
    exact = all(isinstance(number, int) or abs(number) < _FLOAT for number in known.values())
    return exact and all(map(_PLAIN.fullmatch, known)) and len(set(known.values())) == len(known)


# --- Rows of the user's own files: tables, and folders of images.

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_KINDS = "parquet, csv, tsv, json or jsonl"


def read_files(
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
            return splits("task.data_files", path)
        return {"train": _table("task.data_files", path, "train", delimited)}
    found = {}
    for split, file in data_files.items():
        key, path = f"task.data_files.{split}", Path(file)
        found[split] = classes(key, path, split) if path.is_dir() else _table(key, path, split, delimited)
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
        frame[label_column] = pd.Series(labels(cells, regression), dtype=object)
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


# --- Rows that an installed package brings along.


def digits() -> Dataset:
    """scikit-learn's digits: 1,797 grey images (8 x 8), the 17 grey levels stretched to 0..255."""
    read = load_digits()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    pixels = np.round(read.images * (255 / 16)).astype(np.uint8)
    data = {"image": list(pixels), "label": read.target.tolist()}
    return Dataset.from_dict(data, features=features, split=NamedSplit("train"))


FILES = "files"  # the path of a task that is nothing but the user's files


def read(
    name: str,
    path: str,
    subset: str | None,
    revision: str | None,
    data_files: Mapping[str, str] | str | None,
    text_columns: Sequence[str],
    label_column: str | None,
    regression: bool | None,
) -> Mapping[str, Dataset]:
    """The rows of a task by split, as the source has them; files stand in for any other source."""
    if data_files:
        return read_files(data_files, text_columns, label_column, regression)
    if path == FILES:
        raise PartialLoraError(
            f"task={name} reads files of yours: set task.data_files={{train: PATH, test: PATH}}, or one PATH that a "
            "test split is cut from"
        )
    if path == "bundled:digits":
        return {"train": digits()}
    return read_hub(name, path, subset, revision)


# --- The columns of a task: which ones hold inputs and labels, and what of them is missing.

_TEXTS = ("string", "large_string")
_BYTES = ("binary", "large_binary")
_NUMBERS = ("int", "uint", "float", "double", "bool")


def chosen(
    rows: Dataset,
    name: str,
    split: str,
    modality: str,
    image_column: str | None,
    text_columns: Sequence[str],
    label_column: str | None,
    file: Path | None,
) -> Dataset:
    """The rows with their inputs and labels under the names every task has, and nothing else.

    file: the user's own that they are read from; paths of images in a table are relative to its folder.

    Raises PartialLoraError for a column that is not there or cannot be told from another, and for a row without input.
    """
    place = f"the {split} split of {name}" + (f" ({file})" if file else "")
    label = _label_column(rows, place, label_column)
    if modality == "text":
        inputs = dict(zip(("text", "text_pair"), _text_columns(rows, place, text_columns, label), strict=False))
    else:
        inputs = {"image": _image_column(rows, place, image_column, label)}
    rows = rows.select_columns([*inputs.values(), label])
    for column in inputs.values():
        missing = _first_null(rows, column)
        if missing is not None:
            raise PartialLoraError(
                f"task={name}: row {missing + 1} of the {split} split has no {modality} (column {column})"
            )
    renamed = {column: new for new, column in (inputs | {"label": label}).items() if column != new}
    rows = rows.rename_columns(renamed) if renamed else rows
    folder = file.absolute().parent if file else None
    return _pictures(rows, name, split, folder) if modality == "image" else _strings(rows)


def stored(rows: Dataset, column: str) -> pa.ChunkedArray:
    """A column as it is stored: images undecoded, missing values as nulls."""
    return rows.select_columns([column]).with_format("arrow")[:].column(column)


def _label_column(rows: Dataset, place: str, column: str | None) -> str:
    if column is not None:
        return _named(rows, place, "label_column", column, _is_label, "labels")
    marked = [column for column, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    if not marked and _is_label(rows.features.get("label")):
        return "label"
    return _only(rows, place, "label_column", marked, "labels")


def _image_column(rows: Dataset, place: str, column: str | None, label: str) -> str:
    if column is not None:
        return _named(rows, place, "image_column", column, _may_be_image, "images", label)
    others = {column: feature for column, feature in rows.features.items() if column != label}
    images = [column for column, feature in others.items() if isinstance(feature, Image)]
    raw = [column for column, feature in others.items() if _is_stored_image(feature)]
    paths = [column for column, feature in others.items() if _is_text(feature)]
    return _only(rows, place, "image_column", images or raw or paths, "images")


def _text_columns(rows: Dataset, place: str, columns: Sequence[str], label: str) -> list[str]:
    if len(set(columns)) < len(columns):
        raise PartialLoraError(f"task.text_columns={list(columns)}: expected different columns, or one alone")
    if columns:
        return [_named(rows, place, "text_columns", column, _is_text, "texts", label) for column in columns]
    texts = [column for column, feature in rows.features.items() if _is_text(feature) and column != label]
    return [_only(rows, place, "text_columns", texts, "texts")]


def _named(
    rows: Dataset,
    place: str,
    key: str,
    column: str,
    fits: Callable[[object], bool],
    kind: str,
    label: str | None = None,
) -> str:
    """The column, where there is one of that name and kind which is not the one of the labels."""
    if column == label:
        raise PartialLoraError(
            f"task.{key}={column}: {place} has its labels there, expected a column of {kind}; its columns are "
            f"{_there(rows)}"
        )
    if not fits(rows.features.get(column)):
        raise PartialLoraError(
            f"task.{key}={column}: {place} has no such column of {kind}; its columns are {_there(rows)}"
        )
    return column


def _only(rows: Dataset, place: str, key: str, columns: Sequence[str], kind: str) -> str:
    if not columns:
        unnamed = ", none called label" if kind == "labels" and "label" not in rows.features else ""
        raise PartialLoraError(
            f"task.{key}: {place} has no column of {kind}{unnamed}; name one of its columns, {_there(rows)}"
        )
    if len(columns) > 1:
        raise PartialLoraError(
            f"task.{key}: {place} has {len(columns)} columns of {kind}, name one; its columns are {_there(rows)}"
        )
    return columns[0]


def _there(rows: Dataset) -> dict[str, str]:
    return {
        column: feature.dtype.removeprefix("large_") if isinstance(feature, Value) else type(feature).__name__
        for column, feature in rows.features.items()
    }


def _is_text(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype in _TEXTS


def _is_label(feature: object) -> bool:
    plain = isinstance(feature, Value) and (feature.dtype in (*_TEXTS, "null") or feature.dtype.startswith(_NUMBERS))
    return isinstance(feature, ClassLabel) or plain


def _is_stored_image(feature: object) -> bool:
    """Whether a column holds files of images: as bytes, or as the library writes images that it knows nothing of."""
    pair = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    return pair or (isinstance(feature, Value) and feature.dtype in _BYTES)


def _may_be_image(feature: object) -> bool:
    return isinstance(feature, Image) or _is_stored_image(feature) or _is_text(feature)


def _first_null(rows: Dataset, column: str) -> int | None:
    values = stored(rows, column)
    return values.is_null().to_pylist().index(True) if values.null_count else None


def _strings(rows: Dataset) -> Dataset:
    """The rows with texts as one type, whichever of Arrow's two they came in."""
    for column in ("text", "text_pair"):
        if column in rows.features and rows.features[column].dtype != "string":
            rows = rows.cast_column(column, Value("string"))
    return rows


def _pictures(rows: Dataset, name: str, split: str, folder: Path | None) -> Dataset:
    """The rows with `image` as images, whether it held paths, bytes or images; paths are looked up from `folder`."""
    if _is_text(rows.features["image"]) or _is_stored_image(rows.features["image"]):
        rows = rows.cast_column("image", Image())
    images = stored(rows, "image")
    if folder is None or not all(chunk.field("bytes").null_count == len(chunk) for chunk in images.chunks):
        return rows
    paths = [os.path.join(folder, image["path"] or "") for image in images.to_pylist()]
    for row, path in enumerate(paths, 1):
        if not os.path.isfile(path):
            raise PartialLoraError(f"task={name}: row {row} of the {split} split: no such image file, {path}")
    order = rows.column_names
    rows = rows.remove_columns("image").add_column("image", paths).cast_column("image", Image())
    return rows.select_columns(order)


# --- Labels: the classes, found over the training rows, or real numbers.

_FEW_LABELS = 20  # labels that a message lists

Label = str | int | float | bool


def read_labels(
    splits: dict[str, Dataset], name: str, regression: bool | None
) -> tuple[tuple[str, ...], dict[str, Dataset]]:
    """The names of the classes, and the rows of every split with `label` as their number; no names for real labels.

    Labels that the source names stay as they are. Others become classes in their order, numbers as numbers, over the
    training rows; but where there are fractions they are real labels, and so are whole numbers, 1.0 as well as 1, where
    `regression` says so.

    Raises PartialLoraError that names the split, and the row or the label, for a row without one, for a label that no
    training row has, and for labels that cannot be what was asked for.
    """
    feature = splits["train"].features["label"]
    if isinstance(feature, ClassLabel):
        if regression:
            raise PartialLoraError(f"task.regression=true: the labels of {name} are classes, expected numbers")
        return tuple(feature.names), {split: _marked(rows, feature, name, split) for split, rows in splits.items()}
    values = {split: _plain(rows, name, split) for split, rows in splits.items()}
    fractions = any(isinstance(label, float) and not label.is_integer() for label in values["train"])
    if fractions if regression is None else regression:
        return (), {split: _real(rows, values[split], name, split) for split, rows in splits.items()}
    return _found(splits, values, name)


def name_of(label: Label) -> str:
    """A label as the name of a class: 3.0 is the class 3."""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _marked(rows: Dataset, feature: ClassLabel, name: str, split: str) -> Dataset:
    """Rows whose source names their labels, the same ones as in the training rows, and has one for each row."""
    if not isinstance(rows.features["label"], ClassLabel):
        names = {label: number for number, label in enumerate(feature.names)}
        return _numbered(rows, _plain(rows, name, split), names, name, split)
    found = rows.features["label"].names
    if found != feature.names:
        raise PartialLoraError(
            f"task={name}: the {split} split has the labels {found}, expected those of the training rows, "
            f"{feature.names}"
        )
    numbers = stored(rows, "label").to_numpy()
    unlabelled = np.flatnonzero(~(numbers >= 0))  # the hub's -1, or nothing at all
    if len(unlabelled):
        raise PartialLoraError(
            f"task={name}: {len(unlabelled)} rows of the {split} split have no label, the first is row "
            f"{unlabelled[0] + 1}; choose another split (task.test_split) or add labels"
        )
    return rows


def _plain(rows: Dataset, name: str, split: str) -> list[Label]:
    """Labels as they are written; none may be missing."""
    labels = stored(rows, "label").to_pylist()
    for row, label in enumerate(labels, 1):
        if label is None or (isinstance(label, float) and not math.isfinite(label)):
            raise PartialLoraError(f"task={name}: row {row} of the {split} split has no label, it is {label}")
    return labels


def _real(rows: Dataset, labels: Sequence[Label], name: str, split: str) -> Dataset:
    wrong = next(((row, label) for row, label in enumerate(labels, 1) if isinstance(label, str | bool)), None)
    if wrong is not None:
        raise PartialLoraError(
            f"task={name}: row {wrong[0]} of the {split} split has the label {wrong[1]!r}, expected a number, since "
            "this is regression (task.regression)"
        )
    return rows.cast_column("label", Value("float32"))


def _found(
    splits: dict[str, Dataset], values: dict[str, list[Label]], name: str
) -> tuple[tuple[str, ...], dict[str, Dataset]]:
    names = tuple(name_of(label) for label in sorted(set(values["train"])))
    numbers = {label: number for number, label in enumerate(names)}
    return names, {split: _numbered(rows, values[split], numbers, name, split) for split, rows in splits.items()}


def _numbered(rows: Dataset, labels: Sequence[Label], numbers: dict[str, int], name: str, split: str) -> Dataset:
    """The rows with the numbers of their labels' names."""
    found = []
    for row, label in enumerate(labels, 1):
        number = numbers.get(name_of(label))
        if number is None:
            listed = ", ".join(list(numbers)[:_FEW_LABELS]) + (", …" if len(numbers) > _FEW_LABELS else "")
            raise PartialLoraError(
                f"task={name}: row {row} of the {split} split has the label {name_of(label)}, which no training row "
                f"has; those there are: {listed}"
            )
        found.append(number)
    return rows.remove_columns("label").add_column("label", found, feature=ClassLabel(names=list(numbers)))


# --- Rows read one by one, so that what is wrong with one of them can be named.

Read = TypeVar("Read")


def place(name: str, split: str, row: int) -> str:
    """A row in words, counted from 1: how a message about it begins."""
    return f"task={name}: row {row} of the {split} split"


def read_given(
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
