"""The test examples that a run is most wrong about: an image or a text, what it is, and what was said of it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from partial_lora.errors import PartialLoraError
from partial_lora.results import PREDICTIONS

_SIDE = 112  # pixels of an image at most
_LETTERS = 400  # of a text


@dataclass
class Example:
    """index: the row of the test split. label, said: in words, `said` of every run. loss: its mean over the runs.

    image: a data URI; text: the input in words. Both are empty where the row could not be read back.
    """

    index: int
    label: str
    said: list[str]
    loss: float
    image: str = ""
    text: list[str] = field(default_factory=list)


def predictions(directories: Sequence[Path]) -> list[pd.DataFrame]:
    """What the runs of these directories predicted, of those that kept it and agree about the examples."""
    frames = []
    for directory in directories:
        try:
            frame = pd.read_parquet(directory / PREDICTIONS)
        except (OSError, ValueError):
            continue
        if {"label", "prediction"} <= set(frame) and (not frames or frame["label"].equals(frames[0]["label"])):
            frames.append(frame)
    return frames


def hardest(frames: Sequence[pd.DataFrame], count: int) -> list[Example]:
    """The examples with the highest loss, a mean over runs, those first that are the worst; ties by their order.

    frames: of `predictions`, one row an example. The loss is the label's surprise where classes or options are chosen,
    the squared error of numbers, what a text lacks of ROUGE-L or else of being right.
    """
    if not frames:
        return []
    losses = np.mean([_losses(frame) for frame in frames], axis=0)
    order = np.argsort(-losses, kind="stable")[:count]
    return [
        Example(
            int(row),
            _named(frames[0], "label", row),
            [_named(frame, "prediction", row) for frame in frames],
            float(losses[row]),
        )
        for row in order
    ]


def shown(examples: Sequence[Example], rows, labels: Sequence) -> list[Example]:
    """The same with their inputs out of `rows`, the task's test split; unchanged where those are not the same examples.

    labels: what the run's predictions have as labels of all examples.
    """
    column = next((name for name in ("label", "response") if name in rows.column_names), None)
    if len(rows) != len(labels) or (column and not _alike(rows[column], labels)):
        return list(examples)
    for example in examples:
        row = rows[example.index]
        if "image" in row:
            example.image = thumbnail(row["image"])
        example.text = [_short(value) for value in _texts(row)]
        if "options" in row:
            example.label, *example.said = (row["options"][int(place)] for place in (example.label, *example.said))
    return list(examples)


def rows_of(settings: Mapping):
    """The test split of a run's task where it can be read without a network; None where it cannot."""
    task = settings["task"]
    local = task.get("path") == "bundled:digits" or task.get("data_files")
    if task.get("members") or not local:
        return None
    import datasets

    from partial_lora import loading  # torch: for this alone
    from partial_lora.config import with_defaults

    datasets.disable_progress_bars()
    try:
        return loading.task_of(with_defaults(settings)).test
    except (PartialLoraError, OSError, ValueError, KeyError):
        return None


def thumbnail(image) -> str:
    """A small copy of an image as a data URI."""
    small = image.convert("RGB")
    if max(small.size) < _SIDE // 2:  # pixels of a tiny image stay squares
        factor = _SIDE // max(small.size)
        small = small.resize((small.width * factor, small.height * factor), resample=0)
    small.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def _losses(frame: pd.DataFrame) -> np.ndarray:
    if "scores" in frame:
        chances = [scores[label] for scores, label in zip(frame["scores"], frame["label"], strict=True)]
        return -np.log(np.maximum(np.asarray(chances, float), 1e-30))
    if "logits" in frame and "label_name" in frame:
        logits = np.stack(frame["logits"]).astype(float)
        logits -= logits.max(axis=1, keepdims=True)
        chances = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return -chances[np.arange(len(frame)), frame["label"]]
    if "rouge_l" in frame:
        return 1 - frame["rouge_l"].to_numpy(float)
    if pd.api.types.is_float_dtype(frame["label"]):
        return (frame["prediction"] - frame["label"]).to_numpy(float) ** 2
    return (frame["prediction"] != frame["label"]).to_numpy(float)


def _named(frame: pd.DataFrame, column: str, row: int) -> str:
    value = frame.get(f"{column}_name", frame[column])[row]
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else _short(str(value))


def _alike(labels: Sequence, others: Sequence) -> bool:
    pairs = zip(labels, others, strict=True)
    return all(one == other or (not isinstance(one, str) and abs(one - other) < 1e-6) for one, other in pairs)


def _texts(row: Mapping) -> list[str]:
    if "prompts" in row:
        return [str(row["prompts"][0]), *(f"– {option}" for option in row["options"])]
    return [str(row[name]) for name in ("text", "text_pair", "prompt") if row.get(name)]


def _short(text: str) -> str:
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"
