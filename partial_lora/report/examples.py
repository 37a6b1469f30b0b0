"""The test examples that runs are most wrong about: an image or a text, what it is, and what was predicted."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow.parquet import ParquetFile

from partial_lora.errors import PartialLoraError
from partial_lora.launching import packs
from partial_lora.launching.directory import PREDICTIONS

_SIDE = 112  # pixels of an image at most
_LETTERS = 400  # of a text


@dataclass
class Example:
    """An example of the test split, by its row, and what every run predicted, in words; loss: its mean over the runs.

    image: a data URI; text: the input in words. Both are empty where the row could not be read back.
    """

    index: int
    label: str
    predicted: list[str]
    loss: float
    image: str = ""
    text: list[str] = field(default_factory=list)


def predictions(directories: Sequence[Path]) -> list[pa.Table]:
    """Return what the runs of these directories predicted, for those that kept it and agree about the examples."""
    tables: list[pa.Table] = []
    for directory in directories:
        file = Path(directory) / PREDICTIONS
        try:
            table = read(file) if file.is_file() else packs.predictions_of(directory)
        except (OSError, ValueError):
            continue
        named = table is not None and {"label", "prediction"} <= set(table.column_names)
        if named and (not tables or table["label"].equals(tables[0]["label"])):
            tables.append(table)
    return tables


def read(file: Path) -> pa.Table:
    """Return what a run predicted, out of its own file; pandas would take long to make lists of logits."""
    with ParquetFile(file) as opened:
        return opened.read(use_threads=False)


def hardest(tables: Sequence[pa.Table], count: int) -> list[Example]:
    """Return the examples with the highest loss, a mean over runs, the worst first; ties in their own order.

    tables: of `predictions`, one row an example. The loss is minus the log probability of the label for classes and
    options, the squared error of numbers, 1 minus ROUGE-L for texts, and else 1 for a wrong answer. Raises ValueError
    where the columns do not give it.
    """
    if not tables:
        return []
    losses = np.mean([losses_of(table) for table in tables], axis=0)
    worst = np.argsort(-losses, kind="stable")[:count].tolist()
    return [
        Example(
            row,
            _named(tables[0], "label", row),
            [_named(table, "prediction", row) for table in tables],
            float(losses[row]),
        )
        for row in worst
    ]


def with_inputs(examples: Sequence[Example], rows, labels: Sequence) -> list[Example]:
    """Return examples with their inputs out of `rows`, the task's test split; as they are if `rows` is another split.

    labels: what the run's predictions have as labels of all examples.
    """
    if not are_of(rows, labels):
        return list(examples)
    for example in examples:
        row = rows[example.index]
        if "image" in row:
            example.image = thumbnail(row["image"])
        texts = [row[name] for name in ("text", "text_pair", "prompt") if row.get(name)]
        if "options" in row:
            texts = [row["prompts"][0], *(f"– {option}" for option in row["options"])]
            answers = (row["options"][int(place)] for place in (example.label, *example.predicted))
            example.label, *example.predicted = answers
        example.text = [_short(str(text)) for text in texts]
    return list(examples)


def are_of(rows, labels: Sequence) -> bool:
    """Return whether rows have these labels, in that order."""
    column = next((name for name in ("label", "response") if name in rows.column_names), None)
    return len(rows) == len(labels) and (column is None or _alike(rows[column], labels))


def rows_of(settings: Mapping, *, fetch: bool = False):
    """Return the test split of a run's task where it can be read, without a network unless `fetch`; else None."""
    task = settings["task"]
    local = fetch or task.get("path") == "bundled:digits" or task.get("data_files")
    if task.get("members") or not local:
        return None
    import datasets

    from partial_lora import tasks
    from partial_lora.settings.stored import load

    datasets.disable_progress_bars()
    try:
        chosen = load(settings).task
        return tasks.load(chosen).test
    except (PartialLoraError, OSError, ValueError, KeyError):
        return None


def rgb(image):
    """Return an image in 8 bits a colour, as the model saw it."""
    from partial_lora.tasks.sources import eight_bits  # whoever has an image has loaded this

    return eight_bits(image).convert("RGB")


def thumbnail(image) -> str:
    """Return a small copy of an image as a data URI."""
    small = rgb(image)
    if max(small.size) < _SIDE // 2:  # pixels of a tiny image stay squares
        factor = _SIDE // max(small.size)
        small = small.resize((small.width * factor, small.height * factor), resample=0)
    small.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def losses_of(table: pa.Table) -> np.ndarray:
    """Return the loss of every example (N,); of a mixture by member, each with the columns that are its own."""
    columns = table.column_names
    if "loss" in columns:  # of a packed run
        return table["loss"].to_numpy().astype(float)
    if "member" in columns:
        losses, members = np.zeros(len(table)), np.array(table["member"].to_pylist())
        for member in dict.fromkeys(members.tolist()):
            rows = np.flatnonzero(members == member)
            own = table.take(pa.array(rows))
            absent = [name for name in own.column_names if own[name].null_count == len(own)]
            losses[rows] = losses_of(own.drop_columns(["member", *absent]))
        return losses
    if "scores" in columns:
        values, _, at_label = _end_to_end(table["scores"], table["label"])
        return -np.log(np.maximum(values[at_label], 1e-30))
    if "logits" in columns and "label_name" in columns:
        values, starts, at_label = _end_to_end(table["logits"], table["label"])
        lengths = np.diff(np.append(starts, len(values)))
        shifted = values - np.repeat(np.maximum.reduceat(values, starts), lengths)
        return np.log(np.add.reduceat(np.exp(shifted), starts)) - shifted[at_label]  # minus the logarithm of softmax
    if "rouge_l" in columns:
        return 1 - table["rouge_l"].to_numpy().astype(float)
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
    own = label.to_numpy().astype(np.int64)
    if (own < 0).any() or (own >= lengths).any():
        raise ValueError("a label without an output of its own")
    starts = np.cumsum(lengths) - lengths
    return together.flatten().to_numpy(zero_copy_only=False).astype(float), starts, starts + own


def _named(table: pa.Table, column: str, row: int) -> str:
    name = f"{column}_name" if f"{column}_name" in table.column_names else column
    value = table[name][row].as_py()
    if value is None:  # in a mixture, where members without class names stand beside others
        value = table[column][row].as_py()
    return f"{value:.4g}" if isinstance(value, float) else _short(str(value))


def _alike(labels: Sequence, others: Sequence) -> bool:
    pairs = zip(labels, others, strict=True)
    return all(one == other or (not isinstance(one, str) and abs(one - other) < 1e-6) for one, other in pairs)


def _short(text: str) -> str:
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"
