"""Splits, few-shot draws and label noise: the same share of every class, and always the same rows for a seed."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Image

from partial_lora.errors import PartialLoraError, shortlist
from partial_lora.tasks.sources import first_line

LEAST = 128  # rows of a few-shot set that is a share of all

logger = logging.getLogger(__name__)


def cut(rows: Dataset, share: float, seed: int, name: str, *, least: int) -> tuple[Dataset, Dataset]:
    """Cut `share` of every class's rows off; return the rest, and the rows that were cut off.

    least: for messages, how many rows of a class are enough for every cut of the task. Raises PartialLoraError for a
    class too small to have rows on both sides.
    """
    from sklearn.model_selection import train_test_split  # half a second, and many tasks come with all their splits

    classes = class_names(rows)
    labels = np.asarray(rows["label"][:]) if classes else None
    try:
        rest, off = train_test_split(np.arange(len(rows)), test_size=share, random_state=seed, stratify=labels)
    except ValueError as error:
        single = [classes[label] for label in np.flatnonzero(np.bincount(labels) == 1)] if classes else []
        aside = math.ceil(share * len(rows))
        smaller = min(aside, len(rows) - aside)
        reason = first_line(error)
        if single:
            reason = (
                f"class {shortlist(single)} has a single row and needs at least {least} rows, or more if "
                "task.train_samples draws some: add rows, leave it out, or give a file for every split"
            )
        elif smaller < len(classes):
            reason = (
                f"{smaller} rows do not hold one of each of {len(classes)} classes: add rows, set "
                "task.validation_share or task.test_share, or give a file for every split"
            )
        per_class = " per class" if classes else ""
        raise PartialLoraError(
            f"task={name}: cannot set {share:.0%} of {len(rows)} rows aside{per_class}: {reason}"
        ) from error
    return rows.select(np.sort(rest)), rows.select(np.sort(off))


def sample(rows: Dataset, count: int | None, seed: int, key: str) -> Dataset:
    """Draw at most `count` of the rows; None is all of them. Raises PartialLoraError for less than one row a class."""
    if count is None or count >= len(rows):
        return rows
    classes = class_names(rows)
    if count < len(classes):
        raise PartialLoraError(f"task.{key}={count}: expected at least one row for each of {len(classes)} classes")
    labels = np.asarray(rows["label"][:]) if classes else np.zeros(len(rows), dtype=np.int64)
    return rows.select(np.sort(_in_turn(_shuffled(labels, np.random.default_rng(seed)))[:count]))


def class_names(rows: Dataset) -> list[str]:
    """Return the names of the classes; none where labels are none."""
    feature = rows.features.get("label")  # rows of a generation have none
    return feature.names if isinstance(feature, ClassLabel) else []


def _shuffled(labels: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
    """Return the rows of every class, in an order drawn at random."""
    return [generator.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]


def _in_turn(classes: Sequence[np.ndarray]) -> np.ndarray:
    """Return all rows in an order whose first n hold every class in proportion, for any n.

    The j-th of a class of m rows has its turn at j / m. So no class has a whole row more than its share of n, and every
    class comes at the start: none is left out unless there are more classes than n.
    """
    turns = np.concatenate([np.arange(len(rows)) / max(1, len(rows)) for rows in classes])
    return np.concatenate(classes)[np.argsort(turns, kind="stable")]


# --- Few-shot draws, for calibration.


@dataclass(frozen=True)
class Draws:
    """Two disjoint sets of training rows, as ascending indices.

    fit: rows for heads and gradients. scored: rows for scores, which decide the sparsities. warnings: sentences about
    classes that are too small.
    """

    fit: np.ndarray
    scored: np.ndarray
    warnings: tuple[str, ...] = ()


def strata(rows: Dataset) -> np.ndarray:
    """Return the labels by which draws of a task's rows are stratified; zeros (floats) for rows without labels."""
    return np.asarray(rows["label"][:]) if "label" in rows.column_names else np.zeros(len(rows))


def few_shot_draws(
    labels: Sequence[int] | Sequence[float],
    *,
    seed: int,
    shots: int | None = None,
    max_samples: int | None = None,
    share: float | None = None,
) -> Draws:
    """Draw rows for each of the two sets, the same ones for a seed.

    One of `share` and `shots` is given. With `share`, each set is that share of the rows of every class: at least 128
    rows, and at most half of all, with a warning. Labels that are real numbers have no classes: rows are drawn from all
    of them alike, as many as the share or `shots` says, 128 at least.

    With `shots` each set has that many examples a class. A class with fewer than 2 * shots examples is used whole, half
    in each set and an odd one in `scored`, with a warning; a single example goes to `fit`, since a head has to know the
    class. `max_samples` bounds each set, by going round the classes until it is full, and once at least.

    Raises PartialLoraError where one of the sets would be empty, or the rows are too few for one of each class.
    """
    labels = np.asarray(labels)
    has_classes = not np.issubdtype(labels.dtype, np.floating)
    if share is None and has_classes:
        draws = _shots(labels, seed, shots, max_samples)
    else:
        size, key = shots, f"calibration.shots={shots}"
        if share is not None:
            size, key = round(share * len(labels)), f"calibration.share={share}"
        if not has_classes:
            labels = np.zeros(len(labels), dtype=np.int64)
            key += f" (at least {LEAST} rows where there are no classes)" if size < LEAST else ""
        if len(labels) < 2:
            raise PartialLoraError(
                f"{key}: {len(labels)} training rows, expected at least one to fit and one to score; add rows"
            )
        draws = _shares(labels, seed, max(LEAST, size), key, max_samples)
        logger.info("%s: %d rows for each draw", key, len(draws.fit))
    for warning in draws.warnings:
        logger.warning("%s", warning)
    return draws


def _shares(labels: np.ndarray, seed: int, size: int, key: str, max_samples: int | None) -> Draws:
    """Draw two disjoint sets of equal size, each with every other row of a class, so that their proportions agree.

    size: rows of each set. key: the setting it comes from, for messages.
    """
    classes = _shuffled(labels, np.random.default_rng(seed))
    size = max(size if max_samples is None else min(size, max_samples), len(classes))
    count = min(size, len(labels) // 2)
    if count < len(classes):
        raise PartialLoraError(
            f"{key}: {count} rows for each of the two draws, expected at least one for each of {len(classes)} classes; "
            "add rows"
        )
    fit, scored = (_in_turn([rows[start::2] for rows in classes]) for start in (0, 1))
    warnings = []
    if count < size:
        warnings.append(f"{key}: {count} rows for each draw, half of the training rows, in place of {size}")
    single = [str(labels[rows[0]]) for rows in classes if len(rows) == 1]
    if single:
        warnings.append(f"{key}: a single training example, fitted on and never scored: class {shortlist(single)}")
    return Draws(np.sort(fit[:count]), np.sort(scored[:count]), tuple(warnings))


def _shots(labels: np.ndarray, seed: int, shots: int, max_samples: int | None) -> Draws:
    classes = np.unique(labels)
    most = None if max_samples is None else max(max_samples, len(classes))
    fit, scored, small, single = [], [], [], []
    for label, rows in zip(classes, _shuffled(labels, np.random.default_rng(seed)), strict=True):
        count = min(shots, (len(rows) + 1) // 2) if len(rows) > 1 else 0
        scored.append(rows[:count])
        fit.append(rows[count : count + shots])
        if len(rows) < 2 * shots:
            (small if count else single).append(str(label))
    if not any(map(len, scored)):
        raise PartialLoraError(
            f"calibration.shots={shots}: no class has 2 training examples, one to fit and one to score; add rows"
        )
    warnings = []
    if small:
        warnings.append(
            f"calibration.shots={shots}: too small for both draws, so used whole, half to fit and half to score: "
            f"class {shortlist(small)}"
        )
    if single:
        warnings.append(
            f"calibration.shots={shots}: a single training example, fitted on and never scored: "
            f"class {shortlist(single)}"
        )
    return Draws(_round_robin(fit, most), _round_robin(scored, most), tuple(warnings))


def _round_robin(classes: list[np.ndarray], limit: int | None) -> np.ndarray:
    """Return at most `limit` rows, one of each class in turn."""
    turns = [rows[turn] for turn in range(max(map(len, classes))) for rows in classes if turn < len(rows)]
    return np.sort(np.asarray(turns[:limit], dtype=np.int64))


# --- Label noise.


def with_label_noise(rows: Dataset, share: float, seed: int | Sequence[int], name: str) -> Dataset:
    """Return the rows with a share of their labels, to the nearest row, replaced by another class at random.

    share: from 0 to 1; the wrong rows of a smaller one are among those of a larger one, with the same wrong labels.
    Raises PartialLoraError for labels that are real numbers, and for a single class.
    """
    if share == 0:
        return rows
    label = rows.features["label"]
    classes = len(getattr(label, "names", ()))
    if classes < 2:
        have = "a single class" if classes else "real numbers"
        raise PartialLoraError(f"task.label_noise={share}: {name} has {have} as labels, expected two classes or more")
    labels = np.array(rows["label"][:], dtype=np.int64)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    steps = generator.integers(1, classes, len(labels))  # 1 to classes - 1 places further: never its own class
    wrong = order[: int(share * len(labels) + 0.5)]
    labels[wrong] = (labels[wrong] + steps[wrong]) % classes
    return rows.remove_columns("label").add_column("label", labels.tolist(), feature=label)


# --- Rows that two splits share.

_MANY = 200_000  # rows that take too long to compare


def shared_inputs(rows: Dataset, others: Dataset) -> int:
    """Count the rows whose image, texts or prompt occurs in `others`, to the byte; 0 where there are too many rows."""
    if len(rows) + len(others) > _MANY:
        return 0
    if "image" not in rows.column_names:
        names = [name for name in rows.column_names if name not in ("label", "response", "messages")]
        inputs, other_inputs = (map(str, table.select_columns(names)) for table in (rows, others))
        other_inputs = set(other_inputs)
        return sum(text in other_inputs for text in inputs)
    sizes, other_sizes = (list(map(_size, _stored(table))) for table in (rows, others))
    common = {*sizes} & {*other_sizes}  # images of other sizes need not be read

    def digests(table: Dataset, sizes: Sequence[int]) -> Iterator[bytes]:
        same_size = np.flatnonzero([size in common for size in sizes])
        return map(_digest, _stored(table.select(same_size)))

    other_digests = set(digests(others, other_sizes))
    return sum(digest in other_digests for digest in digests(rows, sizes))


_AT_ONCE = 16  # images in memory: those that a table embeds may be larger than it, all together


def _stored(rows: Dataset) -> Iterator[bytes | Path]:
    """Yield each image as it is stored: its bytes, or its file."""
    for batch in rows.select_columns("image").cast_column("image", Image(decode=False)).iter(_AT_ONCE):
        yield from (Path(image["path"]) if image["bytes"] is None else image["bytes"] for image in batch["image"])


def _size(image: bytes | Path) -> int:
    return image.stat().st_size if isinstance(image, Path) else len(image)


def _digest(image: bytes | Path) -> bytes:
    return hashlib.sha256(image.read_bytes() if isinstance(image, Path) else image).digest()
