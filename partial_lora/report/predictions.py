"""Predictions of runs, a row a test example, out of their own files or a pack, and the loss of every example."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow.parquet import ParquetFile

from partial_lora.errors import PartialLoraError
from partial_lora.launching import packs
from partial_lora.launching.directory import PREDICTIONS
from partial_lora.tasks.metrics import OF_ALL_TOGETHER, OF_TEXTS

_COMPARED = {"label", "prediction", "prediction_norm", *OF_TEXTS, "member", "loss", "tokens"}


class Predictions:
    """The predictions of the runs of a results directory, a row a test example.

    Every file is read once, and only the columns that are compared; those of packed runs come out of the pack.
    """

    def __init__(self, results_dir: Path) -> None:
        self._results_dir = Path(results_dir)
        self._frames: dict[tuple[str, int, bool], pd.DataFrame] = {}

    def of(self, group: str, seed: int, metric: str) -> pd.DataFrame:
        """Return what a run predicted: the columns that `metric` is computed from.

        Raises PartialLoraError where it has kept nothing, ValueError where its file is broken.
        """
        whole = metric in OF_ALL_TOGETHER
        if (group, seed, whole) not in self._frames:
            try:
                stored = _stored(self._file(group, seed).parent, None if whole else _COMPARED)
            except (OSError, ValueError) as error:
                raise ValueError(f"{group}/seed{seed}/{PREDICTIONS} cannot be read: {error}") from error
            if stored is None:
                raise PartialLoraError(f"{group}/seed{seed} has no {PREDICTIONS}; train it again with overwrite=true")
            self._frames[group, seed, whole] = stored.to_pandas()
        return self._frames[group, seed, whole]

    def _file(self, group: str, seed: int) -> Path:
        return self._results_dir / group / f"seed{seed}" / PREDICTIONS


def _stored(directory: Path, columns: Sequence[str] | None = None) -> pa.Table | None:
    """Return what a run predicted, out of its own file or its pack; None where neither has it."""
    file = directory / PREDICTIONS
    return read(file, columns) if file.is_file() else packs.predictions_of(directory)


def read_all(directories: Sequence[Path]) -> list[pa.Table]:
    """Return what the runs of these directories predicted, for those that kept it and agree about the examples."""
    tables: list[pa.Table] = []
    for directory in directories:
        try:
            table = _stored(Path(directory))
        except (OSError, ValueError):
            continue
        named = table is not None and {"label", "prediction"} <= set(table.column_names)
        if named and (not tables or table["label"].equals(tables[0]["label"])):
            tables.append(table)
    return tables


def read(file: Path, columns: Collection[str] | None = None) -> pa.Table:
    """Return what a run predicted, out of its own file: those of these columns that it has, or all.

    pandas' own reader takes ten times as long, and longer to make lists of logits.
    """
    with ParquetFile(file) as opened:
        names = [name for name in opened.schema_arrow.names if columns is None or name in columns]
        return opened.read(names, use_threads=False)


def losses_of(table: pa.Table) -> np.ndarray:
    """Return the loss of every example (N,); of a mixture by member, each with the columns that are its own."""
    columns = table.column_names
    if "loss" in columns and not table["loss"].null_count:  # of a packed run, or of responses
        return table["loss"].to_numpy().astype(float)
    if "member" in columns:
        losses, members = np.zeros(len(table)), np.array(table["member"].to_pylist())
        for member in dict.fromkeys(members.tolist()):
            rows = np.flatnonzero(members == member)
            part = table.take(pa.array(rows))
            absent = [name for name in part.column_names if part[name].null_count == len(part)]
            losses[rows] = losses_of(part.drop_columns(["member", *absent]))
        return losses
    if "scores" in columns:
        values, _, at_label = _end_to_end(table["scores"], table["label"])
        return -np.log(np.maximum(values[at_label], 1e-30))
    if "logits" in columns and "label_name" in columns:
        values, starts, at_label = _end_to_end(table["logits"], table["label"])
        lengths = np.diff(np.append(starts, len(values)))
        shifted = values - np.repeat(np.maximum.reduceat(values, starts), lengths)
        return np.log(np.add.reduceat(np.exp(shifted), starts)) - shifted[at_label]  # minus the logarithm of softmax
    if pa.types.is_floating(table.schema.field("label").type):
        return (table["prediction"].to_numpy().astype(float) - table["label"].to_numpy().astype(float)) ** 2
    pairs = zip(table["prediction"].to_pylist(), table["label"].to_pylist(), strict=True)
    return np.array([prediction != label for prediction, label in pairs], float)


def _end_to_end(lists: pa.ChunkedArray, label: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return lists of numbers, however long each is, end to end; where each begins, and where its label's number is.

    Raises ValueError where a list has no number for its label.
    """
    together = lists.combine_chunks()
    lengths = together.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    labels = label.to_numpy().astype(np.int64)
    if (labels < 0).any() or (labels >= lengths).any():
        raise ValueError("a label without an output of its own")
    starts = np.cumsum(lengths) - lengths
    return together.flatten().to_numpy(zero_copy_only=False).astype(float), starts, starts + labels
