"""The measuring of what language models forget: finished runs on test rows of other tasks, before and after training.

After is the run's model, before the untouched one, loaded anew: what an adapter leaves in a model that it is switched
off in does not enter. Both are judged as the objective judges: the loss of the answers' tokens, each given those before
it, as in training (`objectives.loss_of_tokens`); of questions with options the share that the model answers.
RUN/forgetting.json has what each row adds, so that nothing is measured twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from partial_lora.building import build
from partial_lora.errors import PartialLoraError, require
from partial_lora.files import write_json
from partial_lora.finished.evaluate import logits_of
from partial_lora.finished.predict import RunModel
from partial_lora.finished.run import finished_run
from partial_lora.finished.task import task_named
from partial_lora.launching import packs
from partial_lora.launching.directory import RESULT
from partial_lora.peers import Alone
from partial_lora.report.statistics import per_example
from partial_lora.settings.identity import run_id
from partial_lora.settings.schema import Config
from partial_lora.settings.versions import plain
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.kinds import kind_of
from partial_lora.training import objectives

ROWS = 200  # at most, of each set
_MEASURES = {"text": ("loss", ["perplexity"]), "option": ("accuracy_norm", ["accuracy_norm"])}  # no text is generated


@dataclass(frozen=True)
class Other:
    """Another set. metric: what is measured on it; id: of its rows and how they are read; task: its settings."""

    name: str
    metric: str
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
        answers = kind_of(task).answers
        require(answers in _MEASURES, "forgets", named, "a task of texts or of questions with options")
        metric, metrics = _MEASURES[answers]
        task = replace(task, metrics=metrics, test_samples=ROWS)
        _judge(config, task).test()  # reads and tokenises them
        return cls(task.name, metric, run_id({"task": plain(task)}), task)


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
            before |= {one.id: scores(untouched, run.config, one) for one in unknown}
            del untouched
            trained = RunModel(run, device)
            after = {one.id: scores(trained, run.config, one) for one in missing}
        except PartialLoraError as error:
            failed.append(f"forgetting was not measured: {error}")
            continue
        for one in missing:
            entry = {"id": one.id, "metric": one.metric, "before": before[one.id], "after": after[one.id]}
            known = known | {one.name: entry}
        write_json(place / packs.FORGETTING, {"version": packs.OF_FORGETTING, "sets": known})
    return failed


def scores(model: RunModel, config: Config, other: Other) -> list[float]:
    """Return what each row of a set adds to the metric of a model, the mean."""
    judge = _judge(config, other.task)

    @objectives.grouped
    def predict(rows):
        batches = DataLoader(rows, batch_size=config.trainer.eval_batch_size, collate_fn=judge.transform.collate)
        return logits_of(model, batches, judge.reduce, lambda done, total: None)

    rows = per_example(judge.judged(predict, model.model, "test").predictions, other.metric)
    if not np.isfinite(rows).all():
        raise PartialLoraError(f"{other.metric} on {other.name} is not finite")
    return np.round(rows, 9).tolist()


def _judge(config: Config, task: TaskConfig) -> objectives.Judge:
    config = replace(config, task=task)
    return build.judge_of(config, build.task_of(config), build.transform_of(config.model, task), Alone())
