"""The columns of a task: which ones hold inputs and labels, and what of them is missing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
from datasets import ClassLabel, Dataset, Image, Value

from partial_lora.errors import PartialLoraError

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
