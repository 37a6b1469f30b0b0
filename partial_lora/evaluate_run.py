"""A finished run on another split or another task of the same labels; what the run recorded stays as it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from partial_lora import config, evaluation, loading, results
from partial_lora.errors import PartialLoraError
from partial_lora.finished import FinishedRun
from partial_lora.inference import RunModel
from partial_lora.tasks import Task

SPLITS = ("test", "validation", "train")
FOLDER = "evaluations"
EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """How a run did on a split: the folder that has it all, and the record there."""

    folder: Path
    record: dict


def evaluate_run(
    run: FinishedRun,
    *,
    task: Mapping | None = None,
    split: str = "test",
    device: str = "auto",
    batch_size: int | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure a run on a split and write RUN/evaluations/TASK-SPLIT-ID/{evaluation.json, predictions.parquet}.

    Args:
        task: the settings of a task, all of its keys; None is the run's own. Its labels are matched by name.
        batch_size: None takes the run's own.
        advance: told how many rows of how many are done.

    The metrics are those of the task that is asked about. A second call for the same writes the same files again.
    Raises PartialLoraError where the task's labels or inputs are not those of the run.
    """
    start = time.perf_counter()
    asked = run.settings | {"task": dict(task or run.settings["task"])}
    if asked["task"]["modality"] != run.settings["task"]["modality"]:
        raise PartialLoraError(
            f"task={asked['task']['name']} has {asked['task']['modality']}s, and the run's model reads "
            f"{run.settings['task']['modality']}s: choose another task"
        )
    if asked["task"] == run.settings["task"]:
        _check_files(run)
    other = loading.task_of(asked)
    places = _places(run, other, is_own=asked["task"] == run.settings["task"])
    model = RunModel(run, device)
    size = batch_size or run.settings["trainer"]["eval_batch_size"]
    transform = loading.transform_of(run.settings["model"])
    rows = transform.prepare(getattr(other, split), cache_bytes=asked["task"]["cache_bytes"])
    batches = DataLoader(rows, batch_size=size, collate_fn=transform.collate)  # in order, the last one smaller
    logits, references = _said(model, batches, advance)
    if places is not None:
        references = places[references]
    folder = run.directory / FOLDER / f"{asked['task']['name']}-{split}-{config.run_id({'task': asked['task']})}"
    record = {
        "task": asked["task"],
        "split": split,
        "examples": len(references),
        "labels": run.labels(),
        "metrics": _finite(evaluation.split_metrics(other.metrics, logits, references)),
        "device": model.device,
        "mixed_precision": model.precision,
        "seconds": round(time.perf_counter() - start, 3),
    }
    _write(folder, record, logits, references)
    return Evaluation(folder, record)


def _check_files(run: FinishedRun) -> None:
    """Raises PartialLoraError where the run's files have changed: what is cut from them would be other rows.

    A run's folder is named by an id of its settings and of what its files hold; one that was renamed says nothing.
    """
    name, _, identifier = run.directory.resolve().parent.name.rpartition("-")
    try:
        changed = name == run.method and config.run_id(run.settings) != identifier
    except FileNotFoundError:  # which whoever reads them says
        return
    if changed:
        raise PartialLoraError(
            f"task.data_files={run.settings['task']['data_files']}: not the rows that the run was trained on, so that "
            "its splits would be others; expected task.data_files.test=FILE with rows it has not seen"
        )


def _places(run: FinishedRun, task: Task, *, is_own: bool) -> np.ndarray | None:
    """Where each of the task's labels is among the run's; None for a regression.

    The run's own labels are in their places, even where a record of an earlier version does not name all of them.
    """
    known, asked = run.labels(), list(task.labels)
    if bool(known) != bool(asked):
        kinds = {True: "labels", False: "numbers"}
        raise PartialLoraError(
            f"task={task.name} has {kinds[bool(asked)]}, and the run predicts {kinds[bool(known)]}: choose another task"
        )
    if not known:
        return None
    if is_own and "labels" not in run.result and len(known) == len(asked):
        return np.arange(len(known))
    unknown, missing = _names(set(asked) - set(known)), _names(set(known) - set(asked))
    if unknown or missing:
        said = [f"the run does not know {unknown}"] * bool(unknown) + [f"the task lacks {missing}"] * bool(missing)
        raise PartialLoraError(f"task={task.name}: expected the labels of the run, but {' and '.join(said)}")
    return np.array([known.index(label) for label in asked])


def _names(labels: set[str], most: int = 10) -> str:
    names = sorted(labels)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _said(model: RunModel, batches: DataLoader, advance: Callable[[int, int], None]) -> tuple[np.ndarray, np.ndarray]:
    """The logits (N, outputs) of all rows, and their labels (N,)."""
    logits, references, done = [], [], 0
    for batch in batches:
        logits.append(model.logits(batch))
        references.append(batch["labels"].numpy())
        done += len(references[-1])
        advance(done, len(batches.dataset))
    return np.concatenate(logits), np.concatenate(references)


def _finite(metrics: Mapping) -> dict:
    """None for what is no number, such as a correlation with labels that are all the same: JSON has no word for it."""
    return {name: value if isinstance(value, str) or math.isfinite(value) else None for name, value in metrics.items()}


def _write(folder: Path, record: dict, logits: np.ndarray, references: np.ndarray) -> None:
    """evaluation.json goes first and comes last: where it is, the predictions beside it are its own."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / EVALUATION).unlink(missing_ok=True)
        evaluation.write_predictions(folder / results.PREDICTIONS, logits, references, record["labels"])
        results.write_json(folder / EVALUATION, record)
    except OSError as error:
        raise PartialLoraError(f"{folder} cannot be written ({error.strerror or error})") from error
