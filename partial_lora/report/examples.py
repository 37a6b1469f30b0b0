"""The test examples that runs are most wrong about: an image or a text, what it is, and what was predicted."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from partial_lora.errors import PartialLoraError
from partial_lora.report.predictions import losses_of

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


def hardest(tables: Sequence[pa.Table], count: int) -> list[Example]:
    """Return the examples with the highest loss, a mean over runs, the worst first; ties in their own order.

    tables: of `predictions`, one row an example. The loss is minus the log probability of the label for classes and
    options, the squared error of numbers, a mean over the tokens of a response, and else 1 for a wrong answer. Raises
    ValueError where the columns do not give it.
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
        example.text = [shortened(str(text)) for text in texts]
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
    from partial_lora.settings.versions import load

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


def _named(table: pa.Table, column: str, row: int) -> str:
    name = f"{column}_name" if f"{column}_name" in table.column_names else column
    value = table[name][row].as_py()
    if value is None:  # in a mixture, where members without class names stand beside others
        value = table[column][row].as_py()
    return f"{value:.4g}" if isinstance(value, float) else shortened(str(value))


def _alike(labels: Sequence, others: Sequence) -> bool:
    pairs = zip(labels, others, strict=True)
    return all(one == other or (not isinstance(one, str) and abs(one - other) < 1e-6) for one, other in pairs)


def shortened(text: str, most: int = _LETTERS) -> str:
    """Return a text, cut off where it has more letters than `most`."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
