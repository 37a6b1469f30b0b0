"""The measuring of what language models forget: finished runs on test rows of other tasks, before and after training.

After is the run's model, before the untouched one, loaded anew: nothing of a run is in it. Both have the loss of
training (`objectives.loss_of_tokens`), a mean over the tokens of responses or right options, each given those before
it. RUN/forgetting.json has what each row adds, so nothing is measured twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset
from torch.utils.data import DataLoader

from partial_lora.building import build
from partial_lora.errors import PartialLoraError, require
from partial_lora.files import write_json
from partial_lora.finished.evaluate import logits_of
from partial_lora.finished.predict import RunModel
from partial_lora.finished.run import finished_run
from partial_lora.finished.target_task import task_named
from partial_lora.launching import packs
from partial_lora.launching.directory import RESULT
from partial_lora.report.forgetting import LOSS
from partial_lora.settings.identity import run_id
from partial_lora.settings.schema import Config
from partial_lora.settings.versions import plain
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.kinds import kind_of
from partial_lora.tasks.task import Transform
from partial_lora.training import objectives
from partial_lora.training.offline_metrics import log_likelihoods

ROWS = 200  # at most, of each set


@dataclass(frozen=True)
class Other:
    """Another set. id: of its rows and how they are read; task: its settings."""

    name: str
    id: str
    task: TaskConfig

    @classmethod
    def of(cls, named: str, config: Config) -> Other:
        """Return the set of a file or a task's name, for runs of these settings, once its rows have been read.

        Raises PartialLoraError for a model that is no causal language model, and for rows that it cannot be judged by.
        """
        model = config.model
        expected = f"nothing for model={model.name}: it is no causal language model, whose loss on other texts says it"
        require(model.family == "causal", "forgets", named, expected)
        if Path(named).suffix:
            require(Path(named).is_file(), "forgets", named, "an existing file, or the name of a task")
            files = {"train": named, "test": named}
            task = replace(task_named("text_generation", None), name=Path(named).stem, data_files=files)
        else:
            task = task_named(named, config.data_dir)
        expected = "a task of responses or of questions with options"
        require(not kind_of(task).has_head, "forgets", named, expected)
        task = replace(task, test_samples=ROWS)
        _rows(config, task)  # reads and tokenises them
        return cls(task.name, run_id({"task": plain(task)}), task)


def measure(places: Sequence[Path], others: Sequence[Other]) -> list[str]:
    """Measure what the runs of one model have changed on other sets, where it is not recorded; return what cannot be.

    What is recorded of a run that is packed, and so has no weights, counts under its name.
    """
    before: dict[str, list[float]] = {}
    recorded = {place: packs.forgetting(place) for place in places}
    for known in recorded.values():
        before |= {entry["id"]: entry["before"] for entry in known.values()}
    failed = []
    for place, known in recorded.items():
        is_packed = not (place / RESULT).is_file()
        missing = [one for one in others if (known.get(one.name) or {}).get("id") != one.id]
        missing = [one for one in missing if not (is_packed and one.name in known)]
        if not missing:
            continue
        try:
            run = finished_run(place)
            device = "auto" if run.config.trainer.device == "cuda" else run.config.trainer.device
            unknown = [one for one in missing if one.id not in before]
            untouched = RunModel(run, device, adapted=False) if unknown else None
            before |= {one.id: losses(untouched, run.config, one) for one in unknown}
            del untouched
            trained = RunModel(run, device)
            after = {one.id: losses(trained, run.config, one) for one in missing}
        except PartialLoraError as error:
            failed.append(f"forgetting was not measured: {error}")
            continue
        for one in missing:
            entry = {"id": one.id, "metric": LOSS, "before": before[one.id], "after": after[one.id]}
            known = known | {one.name: entry}
        write_json(place / packs.FORGETTING, {"version": packs.OF_FORGETTING, "sets": known})
    return failed


def losses(model: RunModel, config: Config, other: Other) -> list[float]:
    """Return what each row of a set adds to a model's loss, the mean."""
    rows, transform = _rows(config, other.task)

    @objectives.grouped
    def predict(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
        batches = DataLoader(rows, batch_size=config.trainer.eval_batch_size, collate_fn=transform.collate)
        return logits_of(model, batches, log_likelihoods, lambda done, total: None)

    likelihoods, tokens = predict(rows)[0].T
    added = -likelihoods / tokens.mean()
    if not np.isfinite(added).all():
        raise PartialLoraError(f"the loss on {other.name} is not finite")
    return added.round(9).tolist()


def _rows(config: Config, task: TaskConfig) -> tuple[Dataset, Transform]:
    """Return the test rows of another task as a run's model is trained on rows, and what makes batches of them."""
    transform = build.transform_of(config.model, task)
    test = build.task_of(replace(config, task=task)).test
    return transform.to_judge(test, cache_bytes=task.cache_bytes), transform
