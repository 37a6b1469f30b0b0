"""A finished run on another split or another task that it can answer; what the run recorded stays as it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
from datasets import Dataset
from torch.utils.data import DataLoader

from partial_lora.building import build
from partial_lora.calibration.peers import Alone
from partial_lora.errors import PartialLoraError, require, shortlist
from partial_lora.files import write_atomic, write_json
from partial_lora.finished.predict import RunModel
from partial_lora.finished.run import FinishedRun
from partial_lora.finished.target_task import CUT_FIRST, CUTS, files_by_split, one_task
from partial_lora.launching import directory
from partial_lora.settings.identity import run_id
from partial_lora.settings.schema import Config
from partial_lora.settings.versions import plain
from partial_lora.tasks import SPLITS, Task, shared_inputs
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.kinds import kind_of
from partial_lora.training import objectives

FOLDER = "evaluations"
EVALUATION = "evaluation.json"


def evaluate_run(
    run: FinishedRun,
    task: TaskConfig,
    *,
    member: str | None = None,
    split: str,
    device: str,
    batch_size: int,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Path, dict]:
    """Measure a run on a split and write RUN/evaluations/TASK-SPLIT-ID/{evaluation.json, predictions.parquet}.

    Return that folder, and the record in it.

    Args:
        task: the settings of a task, the run's own or another. Its labels are matched by name; a causal model, which
            has none, chooses options or writes texts, whichever the task asks for.
        member: of a mixture, the task whose head and labels are meant.
        advance: called with the number of rows that are done, and of all.

    The metrics are those of `task`. A second call for the same writes the same files again.
    Raises PartialLoraError where the task's labels or inputs are not those of the run.
    """
    start = time.perf_counter()
    trained = one_task(run, member, of_another=not task.members)
    trained_task = trained.config.task
    is_own = task == trained_task
    if split != "test" and task.name == trained_task.name and "test" in files_by_split(task.data_files):
        require(
            "test" in files_by_split(trained_task.data_files),
            "task.data_files.test",
            files_by_split(task.data_files)["test"],
            f"none for --split {split}: it was cut from rows that the run's test split had left",
        )
    if _source(task, split) in {_source(trained_task, name) for name in SPLITS}:
        refuse_changed_files(run)
        keys = CUT_FIRST if split == "test" else CUTS
        for key in keys if split not in files_by_split(task.data_files) else ():
            kept = getattr(trained_task, key)
            require(getattr(task, key) == kept, f"task.{key}", getattr(task, key), f"{kept}, as the run cut these rows")
    config = replace(run.config, task=task, trainer=replace(run.config.trainer, eval_batch_size=batch_size))
    if is_own and trained.member:  # its rows, as the run was trained and evaluated on them
        place = list(run.config.task.members).index(trained.member)
        evaluated = build.task_of(run.config, mixtures=True).members[place]
    else:
        evaluated = build.task_of(config)
    places = _places(trained.labels, evaluated) if kind_of(task).has_head else None
    if places is not None:
        evaluated = replace(evaluated, labels=tuple(trained.labels))  # by which predictions are named
    model = RunModel(run, device)
    transform = build.transform_of(config.model, task)
    judge = build.judge_of(config, evaluated, transform, Alone())

    @objectives.grouped
    def predict(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
        batches = DataLoader(rows, batch_size=batch_size, collate_fn=transform.collate)  # in order
        logits, references = logits_of(model, batches, judge.reduce, advance)
        logits = logits if trained.outputs is None else logits[:, trained.outputs]
        return logits, references if places is None else places[references]

    judged = judge.judged(predict, model.model, split)
    names = dict.fromkeys(filter(None, [trained.member, task.name]))
    folder = run.directory / FOLDER / f"{'-'.join(names)}-{split}-{run_id({'task': plain(task)})}"
    record = {
        **({"member": trained.member} if trained.member else {}),
        "task": plain(task),
        "split": split,
        "examples": len(getattr(evaluated, split)),
        "labels": trained.labels,
        "warnings": [*transform.warnings, *_trained_on(trained.config, evaluated, split, is_own=is_own)],
        "metrics": directory.finite(judged.metrics),  # NaN, as of a model that broke down, is null in JSON
        "device": model.device,
        "mixed_precision": model.precision,
        "seconds": round(time.perf_counter() - start, 3),
    }
    write(folder, record, judged.predictions)
    return folder, record


def _trained_on(config: Config, task: Task, split: str, *, is_own: bool) -> list[str]:
    """Return a line on rows that the run was trained on, too; none for rows to train on, or where those are gone.

    config: of the run and its task. is_own: the rows are that task's.
    """
    if split == "train":
        return []
    try:
        train = (task if is_own else build.task_of(config)).train
    except PartialLoraError:  # evaluating other rows does not need them
        return []
    rows = getattr(task, split)
    shared = shared_inputs(rows, train) if rows.column_names == train.column_names else 0
    return [f"{shared} of {len(rows)} rows are rows that the run was trained on"] if shared else []


def _source(task: TaskConfig, split: str) -> str:
    """Return the source of a split's rows: its own file, else the training rows' file, else a data set."""
    files = files_by_split(task.data_files)
    return files.get(split) or files.get("train") or f"{task.path} {task.subset}"


def refuse_changed_files(run: FinishedRun) -> None:
    """Raise PartialLoraError where the run's files have changed: splits cut from them would have other rows."""
    try:
        key = run.changed("task")
    except FileNotFoundError:  # whoever reads them reports it
        return
    if key is not None:
        raise PartialLoraError(
            f"{key}: the file has changed since the run, so its splits cannot be cut again; restore it, or name rows "
            "that the run has not seen: task.data_files.test=FILE"
        )


def _places(expected: list[str], task: Task) -> np.ndarray | None:
    """Return the place of each of the task's labels among those that the run knows; None for a regression."""
    labels = list(task.labels)
    if bool(expected) != bool(labels):
        kinds = {True: "labels", False: "numbers"}
        raise PartialLoraError(
            f"task={task.name} has {kinds[bool(labels)]}, and the run predicts {kinds[bool(expected)]}: choose another "
            "task"
        )
    if not expected:
        return None
    unknown, missing = shortlist(sorted(set(labels) - set(expected))), shortlist(sorted(set(expected) - set(labels)))
    if unknown or missing:
        faults = [f"the run does not know {unknown}"] * bool(unknown) + [f"the task lacks {missing}"] * bool(missing)
        raise PartialLoraError(f"task={task.name}: expected the labels of the run, but {' and '.join(faults)}")
    return np.array([expected.index(label) for label in labels])


def logits_of(
    model: RunModel, batches: DataLoader, reduce: Callable | None, advance: Callable[[int, int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Return a model's logits (N, outputs) of all rows, reduced if asked for, and the labels (N,), empty if reduced."""
    logits, references, done = [], [], 0
    for batch in batches:
        logits.append(model.logits(batch, reduce))
        references.append(batch["labels"].numpy() if reduce is None else np.empty(0))
        done += len(logits[-1])
        advance(done, len(batches.dataset))
    return np.concatenate(logits), np.concatenate(references)


def write(folder: Path, record: dict, predictions: pandas.DataFrame) -> None:
    """Write an evaluation; evaluation.json goes first and comes last, so that predictions beside it are its own.

    There are no predictions of texts that were judged by their likelihood alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EVALUATION).unlink(missing_ok=True)
    if len(predictions):
        write_atomic(folder / directory.PREDICTIONS, predictions.to_parquet(index=False))
    write_json(folder / EVALUATION, record)
