"""A finished causal run on tasks of EleutherAI's lm-evaluation-harness, which the harness itself asks and scores."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas

from partial_lora import models
from partial_lora.errors import PartialLoraError, one_line
from partial_lora.files import read_yaml
from partial_lora.finished.evaluate import FOLDER, write
from partial_lora.finished.predict import RunModel
from partial_lora.finished.run import FinishedRun
from partial_lora.launching.directory import finite


def evaluate_by_harness(run: FinishedRun, tasks: Sequence[str], *, device: str, batch_size: int) -> tuple[Path, dict]:
    """Measure a run on tasks of the harness and write RUN/evaluations/lm-eval-TASKS/evaluation.json.

    tasks: the names of the harness, or YAML files of tasks and groups. Prompts are those of the harness, without a chat
    template. The record has {task: {metric: {value, error}}}, where error is the harness's standard error or null.
    Raises PartialLoraError without the harness, for a run that is no language model's, and for an unknown task.
    """
    run.check_causal("--lm-eval")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise PartialLoraError(
            f"--lm-eval: needs lm-eval ({one_line(error)}): partial-lora's extra lm-eval, in a checkout "
            "`pip install '.[lm-eval]'`"
        ) from error
    start, files = time.perf_counter(), [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [task for task in tasks if Path(task) not in files]
    names += map(_name_in, files)
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise PartialLoraError(f"--lm-eval: {unknown[0]} is no task of lm-eval; `lm-eval ls tasks` lists them")
    model = RunModel(run, device)
    of_run = run.config.model
    tokenizer = models.tokenizer(name=of_run.name, weights=of_run.weights, family=of_run.family)
    harness_model = HFLM(pretrained=model.model, tokenizer=tokenizer, batch_size=batch_size)
    outcome = lm_eval.simple_evaluate(model=harness_model, tasks=names, task_manager=manager)
    record = {
        "lm_eval": lm_eval.__version__,
        "versions": outcome["versions"],
        "shots": outcome["n-shot"],
        "examples": {name: counts["effective"] for name, counts in outcome["n-samples"].items()},
        "metrics": {name: _measured(values) for name, values in outcome["results"].items()},
        "device": model.device,
        "mixed_precision": "no",  # the harness asks the model itself
        "seconds": round(time.perf_counter() - start, 3),
    }
    folder = run.directory / FOLDER / f"lm-eval-{'-'.join(names)}"
    write(folder, record, pandas.DataFrame())
    return folder, record


def _name_in(file: Path) -> str:
    """Return the name of the task, or of the group of tasks, that a YAML file is of."""
    content = read_yaml(file, f"--lm-eval {file}")
    names = [content.get(key) for key in ("group", "task")] if isinstance(content, Mapping) else []
    name = next((name for name in names if isinstance(name, str)), None)
    if name is None:
        raise PartialLoraError(
            f"--lm-eval {file}: expected a task's file with task: NAME, or a group's with group: NAME"
        )
    return name


def _measured(values: Mapping[str, object]) -> dict[str, dict[str, float | None]]:
    """Return a task's metrics with their errors; the harness calls them NAME,FILTER and NAME_stderr,FILTER."""
    measured = {}
    for key, value in values.items():
        name, comma, filtered = key.partition(",")
        if comma and not name.endswith("_stderr"):
            error = values.get(f"{name}_stderr,{filtered}")
            metric = name if filtered == "none" else f"{name}, {filtered}"
            measured[metric] = {"value": value, "error": error if isinstance(error, float) else None}
    return finite(measured)
