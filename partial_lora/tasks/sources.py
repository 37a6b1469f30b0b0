"""Rows of a task, from the user's files and folders, an installed package or the hub; their columns and labels."""

from __future__ import annotations

import codecs
import csv
import functools
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image, NamedSplit, Value
from datasets.exceptions import DatasetGenerationError
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from partial_lora.errors import PartialLoraError, shortlist
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.image_folders import FILES, classes, is_image, split_folders
from partial_lora.tasks.kinds import kind_of

Label = str | int | float | bool

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_OTHER_SEPARATORS = (";", "\t", "|", ",")  # tried where a header lacks its own
_WORDS, _SHOWN = 4, 60  # spaces that a column's name may have; characters of a line in a message
_TIMEOUT = 10.0  # seconds that the hub may take to answer at all


class Layout(NamedTuple):
    """A layout of prompts and responses that a table's columns give away.

    prompt: the columns of the prompt; all but the first may be missing. response: the column of the response, or, where
    there is no prompt, of conversations.
    """

    name: str
    prompt: tuple[str, ...]
    response: str


LAYOUTS = (  # the first that fits is read
    Layout("conversations", (), "messages"),
    Layout("ShareGPT's conversations", (), "conversations"),
    Layout("Alpaca's instructions", ("instruction", "input"), "output"),
    Layout("prompts and completions", ("prompt",), "completion"),
    Layout("prompts and responses", ("prompt",), "response"),
)


def read(config: TaskConfig) -> Mapping[str, Dataset]:
    """Read the rows of a task by split, as the source has them; files replace any other source."""
    if config.data_files:
        answer_columns = filter(None, (config.answer_column, config.response_column))
        texts = [*config.text_columns, *config.prompt_columns, *config.option_columns, *answer_columns]
        if "texts" in kind_of(config).labelled_by:
            texts += [column for layout in LAYOUTS for column in (*layout.prompt, layout.response)]
        return read_files(config.data_files, texts, config.label_column, config.regression)
    if config.path == FILES:
        raise PartialLoraError(f"task.data_files: task={config.name} reads files of yours; name them")
    if config.path == "bundled:digits":
        return {"train": digits()}
    return read_hub(config.name, config.path, config.subset, config.revision)


@functools.cache  # encoding them as image files takes time
def digits() -> Dataset:
    """Return scikit-learn's digits: 1,797 grey images (8 x 8), the 17 grey levels stretched to 0..255."""
    from sklearn.datasets import load_digits  # half a second, with all of scikit-learn

    bunch = load_digits()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    data = {"image": list(pixels), "label": bunch.target.tolist()}
    return Dataset.from_dict(data, features=features, split=NamedSplit("train"))


def eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert a grey image of 16 bits, of whole numbers or of floats to one of 8 bits; return any other as it is.

    Pillow would clip its values to 255: white. Whole numbers of unknown width (mode I) count as 16 bits where one is
    above 255, and always in a PGM file, which Pillow scales to 16 bits. Raises ValueError for numbers outside of 16
    bits, and for floats outside of 0 and 1.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    low, high = values.min(), values.max()
    most = 1 if image.mode == "F" else 65535
    if not (low >= 0 and high <= most):  # also where one is NaN
        raise ValueError(f"grey values (mode {image.mode}) from {low} to {high}, expected all within 0 and {most}")
    if image.mode == "F":
        values = np.round(values * 255)
    elif image.mode != "I" or image.format == "PPM" or high > 255:
        values = values >> 8
    return PIL.Image.fromarray(values.astype(np.uint8))


def first_line(error: BaseException) -> str:
    """Return an exception in one line: its kind and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


# --- The hub, at a fixed revision.


def read_hub(name: str, path: str, subset: str | None, revision: str | None) -> Mapping[str, Dataset]:
    """Read every split of a data set; what the hub's own cache holds is not downloaded again.

    Args:
        path: a repository of the hub, or a local folder laid out like one.
        subset: the part of it that is read, where it has several.

    Raises PartialLoraError, within seconds where the hub cannot be reached, and names tasks that need no hub.
    """
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise PartialLoraError(f"task.path={path}: expected a folder laid out as on the hub; none is there")
    *owner, repository = path.split("/")
    cached = Path(datasets.config.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(repository)])
    try:
        if not Path(path).is_dir() and not cached.is_dir():  # else the library would try to connect for half a minute
            HfApi().dataset_info(path, revision=revision, timeout=_TIMEOUT)
        return datasets.load_dataset(path, subset, revision=revision)
    except (OSError, HTTPError, HFValidationError) as error:
        missing = isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)
        reason = "no such data set or revision there, or no access to it" if missing else first_line(error)
        raise PartialLoraError(
            f"task={name}: cannot fetch {path} from the model hub ({reason}); without one use the offline default "
            "model=vit_s14 task=digits, or task.data_files={train: FILE.parquet, test: FILE.parquet}"
        ) from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = first_line(error.__cause__ or error)
        raise PartialLoraError(f"task={name}: cannot read {path} (task.subset={subset}): {cause}") from error


# --- The user's own files: tables, and folders of images.


def read_files(
    data_files: Mapping[str, str] | str, text_columns: Sequence[str], label_column: str | None, regression: bool | None
) -> dict[str, Dataset]:
    """Read rows by split: from {train: PATH, test: PATH}, from one PATH, or from a folder with a sub-folder a split.

    Args:
        data_files: a PATH is a parquet, csv, tsv, json or jsonl file, or a folder with one sub-folder a class.
        text_columns: columns that hold texts, whatever they look like in a csv file.
        label_column, regression: for `parse_labels`, the column of a csv file that has labels, if not `label`, and
            whether they are real numbers. Where the training rows' are words, those of other splits are, too.

    Raises PartialLoraError that names the file which is missing, empty or of another format than its name says.
    """
    table = (text_columns, label_column or "label", regression)
    if not isinstance(data_files, Mapping):
        path, key = Path(data_files), "task.data_files"
        if not path.is_dir():
            return {"train": _read_table(key, path, "train", *table)}
        of_splits = split_folders(path) or {"train": path}
        return {split: _image_folder(key, folder, split) for split, folder in of_splits.items()}
    rows: dict[str, Dataset] = {}
    for split in sorted(data_files, key=lambda split: split != "train"):
        key, path = f"task.data_files.{split}", Path(data_files[split])
        words = "train" in rows and _is_text(rows["train"].features.get(table[1]))
        rows[split] = (
            _image_folder(key, path, split) if path.is_dir() else _read_table(key, path, split, *table, words=words)
        )
    return {split: rows[split] for split in data_files}


def _image_folder(key: str, folder: Path, split: str) -> Dataset:
    """Read every image in a sub-folder, at any depth, with the sub-folder's name as its label; in the order of names.

    Hidden files and folders, and files whose name does not end as an image's does, are left out (`folders.left_out`).
    """
    # Not by datasets' imagefolder: it takes a class called test for a split, and labels by the innermost folder.
    images, labels = [], []
    for label, paths in classes(folder):
        for file in filter(is_image, paths):
            if not file.is_file():
                raise PartialLoraError(
                    f"{key}={folder}: {file.relative_to(folder)} is no file, or a link to one that is not there"
                )
            images.append(str(file.absolute()))
            labels.append(label)
    if not images:
        raise PartialLoraError(f"{key}={folder}: no image in any sub-folder, expected one sub-folder a class")
    features = Features({"image": Image(), "label": Value("string")})
    return Dataset.from_dict({"image": images, "label": labels}, features=features, split=NamedSplit(split))


def _read_table(
    key: str,
    file: Path,
    split: str,
    text_columns: Sequence[str],
    label_column: str,
    regression: bool | None,
    *,
    words: bool = False,
) -> Dataset:
    """Read one file; several read together would all get the label names of the first. words: labels stay texts."""
    suffix = file.suffix.lower()
    if not file.is_file():
        raise PartialLoraError(f"{key}={file}: no such file")
    if file.stat().st_size == 0:
        raise PartialLoraError(f"{key}={file}: the file is empty")
    try:
        if suffix in _SEPARATORS:
            frame = _delimited(file, _SEPARATORS[suffix], text_columns, label_column, regression, words)
            return Dataset.from_pandas(frame, preserve_index=False, split=NamedSplit(split))
        if suffix in (".json", ".jsonl"):
            return Dataset(_objects(file), split=NamedSplit(split))
        if suffix in (".parquet", ".pq"):
            metadata = pq.read_metadata(file)
            if not metadata.num_rows:  # of which datasets says nothing that helps
                raise PartialLoraError(f"{key}={file}: the file has no rows")
            _refuse_twice(metadata.schema.to_arrow_schema().names)
            return Dataset.from_parquet(str(file), split=NamedSplit(split))
    except (DatasetGenerationError, ValueError, OSError, RecursionError, pa.ArrowException) as error:
        generated = isinstance(error, DatasetGenerationError)
        cause = first_line(error.__cause__ if generated and error.__cause__ else error)
        kind = "parquet" if suffix == ".pq" else suffix[1:]
        raise PartialLoraError(f"{key}={file}: expected a {kind} file ({cause})") from error
    raise PartialLoraError(
        f"{key}={file}: expected a parquet, csv, tsv, json or jsonl file, by the end of its name, or a folder of images"
    )


def _delimited(
    file: Path, separator: str, text_columns: Sequence[str], label_column: str, regression: bool | None, words: bool
) -> pd.DataFrame:
    """Read a csv or tsv file with a header. An empty cell has no value; "NA", "None" and "nan" are words."""
    encoding = _encoding(file)
    with open(file, encoding=encoding, newline="") as lines:
        header = next(lines, "")
    if separator not in header:
        separator = max((separator, *_OTHER_SEPARATORS), key=header.count)
    _refuse_twice([name.strip() for name in next(csv.reader([header], delimiter=separator), [])])
    _check_quotes(file, encoding, separator)
    # Not by datasets' csv builder: it infers types from 10,000 rows at a time, and fails where later ones differ.
    frame = pd.read_csv(
        file,
        sep=separator,
        dtype=dict.fromkeys([*text_columns, label_column], "str"),
        keep_default_na=False,
        na_values=[""],
        low_memory=False,
        encoding=encoding,
    )
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes the first cells for names of the rows
        raise ValueError(
            f"its rows have more cells than its header, which has {len(frame.columns)}; quote texts with {separator!r}"
        )
    if not {label_column, *text_columns} & set(frame.columns) and _is_row(frame):
        raise ValueError(f"its first line is a row, {header.strip()[:_SHOWN]!r}; put the column names before it")
    if label_column in frame.columns and label_column not in text_columns:
        cells = [None if pd.isna(cell) else cell for cell in frame[label_column]]
        frame[label_column] = pd.Series(parse_labels(cells, regression, words=words), dtype=object)
    return frame


def _check_quotes(file: Path, encoding: str, separator: str) -> None:
    """Raise ValueError for a quotation mark that joins rows, as pandas reads them: a text that ends within a line."""
    csv.field_size_limit(2**31 - 1)  # characters of a text; 131,072 by default
    with open(file, encoding=encoding, newline="") as lines:
        rows, before = csv.reader(lines, delimiter=separator, strict=True), 0
        while True:
            try:
                next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                if rows.line_num > before + 1:
                    raise ValueError(
                        f"line {before + 1}: a quotation mark joins it with line {rows.line_num}; double the marks in "
                        f"quoted texts ({error})"
                    ) from error
            before = rows.line_num


def _encoding(file: Path) -> str:
    """Return the encoding of a file of text: UTF-8, or what its first bytes say; raises ValueError for any other."""
    content = file.read_bytes()
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if is_wide and not content.startswith(codecs.BOM_UTF32_LE):
        return "utf-16"
    if b"\0" in content:
        raise ValueError(
            "it is no text, or UTF-32, or UTF-16 without a byte order mark, which `iconv -f UTF-16LE -t UTF-8` converts"
        )
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"line {line} is not UTF-8; `iconv -f WINDOWS-1252 -t UTF-8` converts Windows-1252, which spreadsheets "
            "write"
        ) from error
    return "utf-8-sig"


def _is_row(frame: pd.DataFrame) -> bool:
    """Return whether the names of columns are values: a number, a sentence, or a value found again in its column."""
    names = [str(name).strip() for name in frame.columns]
    again = [name in set(frame.iloc[:, place].astype(str).str.strip()) for place, name in enumerate(names)]
    return any(again) or any(_NUMBER.fullmatch(name) or name.count(" ") > _WORDS for name in names)


def _objects(file: Path) -> pa.Table:
    """Read a json file that is one list of objects, or a file with one object a line."""
    # Not by datasets' json builder: texts that look like dates become dates, and it accepts columns of mixed types.
    text = file.read_text(encoding=_encoding(file))

    def parse(part: str) -> object:
        return json.loads(part, parse_constant=lambda _: None, object_pairs_hook=_object)  # NaN is no value

    if text.lstrip().startswith("["):
        rows = parse(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [parse(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON object") from error
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("not every row is an object with named columns")
    columns = {}
    for name in dict.fromkeys(column for row in rows for column in row):
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowException, OverflowError) as error:
            raise ValueError(f"column {name} has values of several types, or numbers of more than 64 bits") from error
    return pa.table(columns)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    _refuse_twice([name for name, _ in pairs])
    return dict(pairs)


def _refuse_twice(names: Sequence[str]) -> None:
    """Raise ValueError for two columns of one name, of which a reader would rename or drop one without a word."""
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise ValueError(f"it has the column {twice} twice; rename one of them")


# --- Labels of a csv file, where everything is a text. Types inferred by pandas or pyarrow will not do: to them 007 and
# 7, or 1 and 1.0, are one number.

_TRUTHS = {"True": True, "TRUE": True, "true": True, "False": False, "FALSE": False, "false": False}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
_PLAIN = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d*)?", re.ASCII)  # a number that is written back as it was read
_CODE = re.compile(r"[+-]?0\d", re.ASCII)  # 007
_UNKNOWN = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)  # among numbers: a missing one; among words: a word
_WHOLE, _FLOAT = 2**63, 2**53  # from here on, whole numbers do not fit a column, and floats are no longer exact


def parse_labels(cells: Sequence[str | None], regression: bool | None, *, words: bool = False) -> list[Label | None]:
    """Convert the texts of a column, None for an empty cell: all to booleans, or all to numbers, or none (`words`).

    They become numbers where that loses nothing: no code has a leading zero, and no two classes are the same number.
    Labels lose the spaces around them, which would make classes of their own; one of spaces alone is none.
    Fractions may be written in any way (0.5 and 0.50), since they are no classes; so may all numbers where `regression`
    says that they are real.
    """
    stripped: list[Label | None] = [cell.strip() or None if cell else None for cell in cells]
    texts = {text for text in stripped if text is not None}
    if not words and texts and texts <= _TRUTHS.keys():
        return [_TRUTHS.get(text) for text in stripped]
    labels = {text for text in texts if not _UNKNOWN.fullmatch(text)}
    if words or not labels or not all(map(_NUMBER.fullmatch, labels)):
        return stripped
    try:
        whole = all(abs(int(text)) < _WHOLE for text in texts)
    except ValueError:  # a fraction, or an unknown one
        whole = False
    number = int if whole else float
    if not regression and not _lossless({text: number(text) for text in labels}, regression):
        return stripped
    return [None if text is None else number(text) for text in stripped]


def _lossless(numbers: Mapping[str, int | float], regression: bool | None) -> bool:
    if any(map(_CODE.match, numbers)):
        return False
    if regression is None and any(number % 1 for number in numbers.values()):
        return True
    exact = all(isinstance(number, int) or abs(number) < _FLOAT for number in numbers.values())
    return exact and all(map(_PLAIN.fullmatch, numbers)) and len(set(numbers.values())) == len(numbers)


# --- The columns of a task: inputs and labels, by name or by type.


def labelled(splits: Mapping[str, Dataset], config: TaskConfig) -> dict[str, Dataset]:
    """Return every split's rows as `label` and `image`, or `label`, `text` and, for pairs, `text_pair`.

    Raises PartialLoraError as `select_columns` and `encode_labels` do.
    """
    rows = {split: select_columns(of_split, config, split) for split, of_split in splits.items()}
    return encode_labels(rows, config.name, config.regression)


def select_columns(rows: Dataset, config: TaskConfig, split: str) -> Dataset:
    """Return the rows with their inputs and labels under the names every task has, and nothing else.

    Paths of images in a table of the user's are relative to its folder. Raises PartialLoraError for a column that is
    not there or cannot be told from another, and for a row without input.
    """
    name, modality, file = config.name, config.modality, config.data_files
    file = Path(named) if (named := file.get(split) if isinstance(file, Mapping) else file) else None
    place = f"the {split} split of {name}" + (f" ({file})" if file else "")
    label = _label_column(rows, place, config.label_column)
    if modality == "text":
        inputs = dict(zip(("text", "text_pair"), _text_columns(rows, place, config.text_columns, label), strict=False))
    else:
        inputs = {"image": _image_column(rows, place, config.image_column, label)}
    named = list(inputs.values())
    rows = rows.select_columns([*named, label])
    for column in named:
        cells = _arrow_column(rows, column)
        if cells.null_count:
            row = cells.is_null().to_pylist().index(True) + 1
            raise PartialLoraError(f"{row_name(name, split, row)} has no {modality} (column {column})")
    renamed = {column: new for new, column in (inputs | {"label": label}).items() if column != new}
    rows = rows.rename_columns(renamed) if renamed else rows
    if modality == "image":
        return _with_images(rows, name, split, file.absolute().parent if file else None)
    for column in inputs:
        if rows.features[column].dtype != "string":  # Arrow has two types of texts
            rows = rows.cast_column(column, Value("string"))
    texts = (_arrow_column(rows, column).to_pylist() for column in inputs)
    for row, of_row in enumerate(zip(*texts, strict=True), 1):
        if not any(map(str.strip, of_row)):
            raise PartialLoraError(f"{row_name(name, split, row)} has no text but spaces (column {', '.join(named)})")
    return rows


def row_name(name: str, split: str, row: int) -> str:
    """Return the name of a row, counted from 1, with which a message about it begins."""
    return f"task={name}: row {row} of the {split} split"


def _arrow_column(rows: Dataset, column: str) -> pa.ChunkedArray:
    """Return a column as it is stored: images undecoded, missing values as nulls."""
    return rows.select_columns([column]).with_format("arrow")[:].column(column)


def guess_label_column(rows: Dataset, inputs: Sequence[str]) -> str | None:
    """Return the only column of few values, where another column is left for the inputs; else None.

    rows: the user's own table. inputs: columns that are known to have no labels. A label is a text, a whole number or a
    boolean; few means at most a quarter as many values as rows, or two.
    """
    named = [column for column, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    if named or "label" in rows.column_names:
        return None
    kinds = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
    few = [
        column
        for column, feature in rows.features.items()
        if column not in inputs
        and _is(feature, *kinds)
        and 2 <= len(_arrow_column(rows, column).unique()) <= max(2, len(rows) // 4)
    ]
    return few[0] if len(few) == 1 and len(rows.column_names) > 1 else None


def _label_column(rows: Dataset, place: str, named: str | None) -> str:
    classes = [column for column, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    if not classes and _is_label(rows.features.get("label")):
        classes = ["label"]
    return _column(rows, place, "label_column", named, _is_label, classes, "labels")


def _image_column(rows: Dataset, place: str, named: str | None, label: str) -> str:
    inputs = {column: feature for column, feature in rows.features.items() if column != label}
    images = [column for column, feature in inputs.items() if isinstance(feature, Image)]
    stored = [column for column, feature in inputs.items() if _is_stored_image(feature)]
    paths = [column for column, feature in inputs.items() if _is_text(feature)]
    return _column(rows, place, "image_column", named, _may_be_image, images or stored or paths, "images", label)


def _text_columns(rows: Dataset, place: str, named: Sequence[str], label: str) -> list[str]:
    if len(set(named)) < len(named):
        raise PartialLoraError(f"task.text_columns={list(named)}: expected different columns, or one alone")
    texts = [column for column, feature in rows.features.items() if _is_text(feature) and column != label]
    return [_column(rows, place, "text_columns", column, _is_text, texts, "texts", label) for column in named or [None]]


def _column(
    rows: Dataset,
    place: str,
    key: str,
    named: str | None,
    fits: Callable[[object], bool],
    candidates: Sequence[str],
    kind: str,
    label: str | None = None,
) -> str:
    """Return the column that the user named, which has to be of its kind and not the labels', or the only candidate."""
    types = {
        column: feature.dtype.removeprefix("large_") if isinstance(feature, Value) else type(feature).__name__
        for column, feature in rows.features.items()
    }
    if named is not None:
        if named != label and fits(rows.features.get(named)):
            return named
        fault = "has its labels there, expected a" if named == label else "has no such"
        raise PartialLoraError(f"task.{key}={named}: {place} {fault} column of {kind}; its columns are {types}")
    if len(candidates) != 1:
        unnamed = ", none called label" if kind == "labels" and "label" not in types else ""
        count = f"{len(candidates)} columns of {kind}" if candidates else f"no column of {kind}{unnamed}"
        raise PartialLoraError(f"task.{key}: {place} has {count}; name one of its columns, {types}")
    return candidates[0]


def _is(feature: object, *types: Callable[[pa.DataType], bool]) -> bool:
    return isinstance(feature, Value) and any(of_type(feature.pa_type) for of_type in types)


def _is_text(feature: object) -> bool:
    return _is(feature, pa.types.is_string, pa.types.is_large_string)


def _is_label(feature: object) -> bool:
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    return isinstance(feature, ClassLabel) or _is_text(feature) or _is(feature, *numbers)


def _is_stored_image(feature: object) -> bool:
    """Return True for files of images: as bytes, or as the pairs that the library stores without its type Image."""
    pair = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    return pair or _is(feature, pa.types.is_binary, pa.types.is_large_binary)


def _may_be_image(feature: object) -> bool:
    return isinstance(feature, Image) or _is_stored_image(feature) or _is_text(feature)


def _with_images(rows: Dataset, name: str, split: str, folder: Path | None) -> Dataset:
    """Return the rows with `image` as images, made of paths, bytes or images; paths are relative to `folder`."""
    if not isinstance(rows.features["image"], Image):
        rows = rows.cast_column("image", Image())
    images = _arrow_column(rows, "image")
    if folder is None or not all(chunk.field("bytes").null_count == len(chunk) for chunk in images.chunks):
        return rows
    paths = [os.path.join(folder, image["path"] or "") for image in images.to_pylist()]
    for row, path in enumerate(paths, 1):
        if not os.path.isfile(path):
            raise PartialLoraError(f"{row_name(name, split, row)}: no such image file, {path}")
    order = rows.column_names
    rows = rows.remove_columns("image").add_column("image", paths).cast_column("image", Image())
    return rows.select_columns(order)


# --- Labels: classes, which the training rows decide, or real numbers.


def encode_labels(splits: dict[str, Dataset], name: str, regression: bool | None) -> dict[str, Dataset]:
    """Return the rows with `label` as a class's number, or a real one.

    Labels that the source names stay as they are. Others become classes, the sorted labels of the training rows, with
    numbers in numeric order. But where some are fractions, all are real labels; so are whole numbers, 1.0 as well as 1,
    where `regression` says so.

    Raises PartialLoraError that names the split, and the row or the label, for a row without one, for a label that no
    training row has, and for labels that do not fit `regression`.
    """
    feature = splits["train"].features["label"]
    if isinstance(feature, ClassLabel):
        if regression:
            raise PartialLoraError(f"task.regression=true: the labels of {name} are classes, expected numbers")
        return {
            split: _check_classes(rows, feature.names, name, split)
            if isinstance(rows.features["label"], ClassLabel)
            else _numbered(rows, _plain_labels(rows, name, split), feature.names, name, split)
            for split, rows in splits.items()
        }
    labels = {split: _plain_labels(rows, name, split) for split, rows in splits.items()}
    fractions = any(isinstance(label, float) and not label.is_integer() for label in labels["train"])
    if fractions if regression is None else regression:
        for split in splits:
            for row, label in enumerate(labels[split], 1):
                if isinstance(label, str | bool):
                    raise PartialLoraError(
                        f"{row_name(name, split, row)} has the label {label!r}, expected a number, since this is "
                        "regression (task.regression)"
                    )
        if len(set(labels["train"])) == 1:
            raise PartialLoraError(
                f"task={name}: all training rows have the label {labels['train'][0]}, expected several numbers "
                "(task.label_column)"
            )
        return {
            split: rows.remove_columns("label").add_column("label", np.asarray(labels[split], np.float32))
            for split, rows in splits.items()
        }
    names = tuple(label_name(label) for label in sorted(set(labels["train"])))
    if len(names) == 1:
        raise PartialLoraError(
            f"task={name}: all training rows have the label {names[0]}, expected two classes or more (of a folder of "
            "images, one sub-folder a class)"
        )
    return {split: _numbered(rows, labels[split], names, name, split) for split, rows in splits.items()}


_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_AS_MISSING = {"nan", "none", "null", "na", "n/a", "#n/a"}  # what tables hold in place of a value


def label_warnings(labels: Sequence[str], config: TaskConfig) -> list[str]:
    """Return a line about classes that may be one, about one that may be none, and about numbers that are no classes.

    labels: the names of the classes; none for real numbers.
    """
    alike: dict[str, list[str]] = {}
    for name in labels:
        seen = (char for char in unicodedata.normalize("NFKC", name) if unicodedata.category(char) != "Cf")
        alike.setdefault("".join("".join(seen).casefold().split()), []).append(name)
    warnings = [
        f"task={config.name}: classes that look alike, but for case or spaces: {shortlist(list(map(ascii, names)))}; "
        "each is learned as a class of its own"
        for names in alike.values()
        if len(names) > 1
    ]
    if missing := [name for name in labels if name.strip().casefold() in _AS_MISSING]:
        warnings.append(
            f"task={config.name}: {shortlist(list(map(repr, missing)))} is learned as a class; leave out rows "
            "without a label"
        )
    if labels and all(map(_DECIMAL_COMMA.fullmatch, labels)):
        warnings.append(
            f"task={config.name}: its labels, such as {labels[0]}, are numbers with a comma, and are learned as "
            "classes; with points they are numbers"
        )
    if not labels and config.data_files and config.regression is None and kind_of(config).has_head:
        warnings.append(
            f"task={config.name}: its labels are numbers, some with fractions, so that numbers are learned, and no "
            "classes; task.regression=false makes classes of them, true ends this warning"
        )
    return warnings


def label_name(label: Label) -> str:
    """Return the name of a class: 3.0 is the class 3."""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _check_classes(rows: Dataset, names: Sequence[str], name: str, split: str) -> Dataset:
    """Return rows whose source names their labels; raise unless the names are the training rows' and all have one."""
    if rows.features["label"].names != names:
        raise PartialLoraError(
            f"task={name}: the {split} split has the labels {rows.features['label'].names}, expected those of the "
            f"training rows, {names}"
        )
    unlabelled = np.flatnonzero(~(_arrow_column(rows, "label").to_numpy() >= 0))  # the hub's -1, or nothing at all
    if len(unlabelled):
        raise PartialLoraError(
            f"task={name}: {len(unlabelled)} rows of the {split} split have no label, the first is row "
            f"{unlabelled[0] + 1}; choose another split (task.test_split) or add labels"
        )
    return rows


def _plain_labels(rows: Dataset, name: str, split: str) -> list[Label]:
    """Return the labels as they are written; raises where one is missing."""
    labels = _arrow_column(rows, "label").to_pylist()
    for row, label in enumerate(labels, 1):
        if label is None or label == "" or (isinstance(label, float) and not math.isfinite(label)):
            raise PartialLoraError(f"{row_name(name, split, row)} has no label, it is {label!r}")
    return labels


def _numbered(rows: Dataset, labels: Sequence[Label], names: Sequence[str], name: str, split: str) -> Dataset:
    """Return the rows with each label as the place of its name among the names of the training rows."""
    numbers = {label: number for number, label in enumerate(names)}
    for row, label in enumerate(labels, 1):
        if label_name(label) not in numbers:
            raise PartialLoraError(
                f"{row_name(name, split, row)} has the label {label_name(label)}, which no training row has; those "
                f"there are: {shortlist(names)}"
            )
    column = [numbers[label_name(label)] for label in labels]
    return rows.remove_columns("label").add_column("label", column, feature=ClassLabel(names=list(numbers)))
