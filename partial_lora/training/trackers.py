"""Experiment trackers beside the local history: a class each, and TRACKERS, by which they are chosen."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from partial_lora.credentials import redacted
from partial_lora.errors import kind_and_line
from partial_lora.files import one_writer

PROJECT = "partial-lora"  # MLflow calls it an experiment
FILE = "trackers.json"  # what they call the run, so that a resumed run goes on in the same place
_PARAMETER_LENGTH, _PARAMETERS_PER_REQUEST = 500, 100  # the limits of any MLflow

logger = logging.getLogger(__name__)

# transformers' own callbacks were tried in place of the four classes below, behind tests/training/test_trackers.py:
# half of the tests fail. They record TrainingArguments and the model's config, not this run's settings without their
# credentials; they close the run when training ends, before test is evaluated; MLflow's uses the process-wide active
# run, by which a failed run ends as "FINISHED". Only the lines that log numbers would have remained of each callback.


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker is opened with it.

    Args:
        name: task/model/method-id/seed.
        parameters: the settings, flat and without credentials.
        directory: the run's.
        store: the folder of MLflow's local store.
        step: optimizer steps already made; more than 0 where the run is resumed.
        tracked_as: what this tracker called the run in an earlier attempt; None in the first.
    """

    name: str
    parameters: Mapping[str, object]
    directory: Path
    store: Path
    step: int
    tracked_as: str | None


class Tracker(Protocol):
    """A run that is open at a tracker, which calls it `run_id`. Any method may raise anything (`Tracking`)."""

    run_id: str

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers measured after `step` optimizer steps."""

    def end(self, succeeded: bool) -> None:
        """Close the run."""


class TensorBoard:
    """Event files in the run's directory; points after the checkpoint that a run resumes from are dropped."""

    run_id = "tensorboard"

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = run.step + 1 if run.tracked_as else None
        self._writer = SummaryWriter(run.directory / "tensorboard", purge_step=purge_step)
        table = ["| key | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in run.parameters.items())]
        self._writer.add_text("settings", "\n".join(table))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self, succeeded: bool) -> None:
        self._writer.close()


class MLflow:
    """A run of an experiment, at MLFLOW_TRACKING_URI or else in a store of files in results_dir."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(uri or run.store.as_uri())
        if run.tracked_as is not None:
            self.run_id = run.tracked_as
            self._client.update_run(self.run_id, status="RUNNING")
            return
        # Two runs at once would both create the experiment.
        with nullcontext() if uri else one_writer(run.store / "experiments", "add to"):
            experiment = self._experiment_id(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self.run_id = self._client.create_run(experiment, run_name=run.name).info.run_id
        parameters = [Param(key, str(value)[:_PARAMETER_LENGTH]) for key, value in run.parameters.items()]
        for first in range(0, len(parameters), _PARAMETERS_PER_REQUEST):
            self._client.log_batch(self.run_id, params=parameters[first : first + _PARAMETERS_PER_REQUEST])

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def end(self, succeeded: bool) -> None:
        self._client.set_terminated(self.run_id, "FINISHED" if succeeded else "FAILED")

    def _experiment_id(self, name: str) -> str:
        """Return the id of an experiment, created if need be."""
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return self._client.create_experiment(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run was faster
                    raise
                experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id


class Wandb:
    """A run of a project; written to files, for `wandb sync`, where the service cannot be reached."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self.run_id = run.tracked_as or secrets.token_hex(8)
        settings = {
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "name": run.name,
            "id": self.run_id,
            "resume": "allow",
            "dir": str(run.directory),
            "config": dict(run.parameters),
            "settings": wandb.Settings(console="off", save_code=False),  # train.log has the output, without credentials
        }
        try:
            self._run = wandb.init(**settings)
        except Exception as error:
            logger.warning("wandb: %s; written to %s for `wandb sync`", in_words(error), run.directory / "wandb")
            wandb.teardown()  # otherwise the run's id counts as taken by the failed attempt
            self._run = wandb.init(**settings, mode="offline")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log({**metrics, "step": step})

    def end(self, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


class Trackio:
    """A run of a project in Trackio's local store, or where Trackio's own environment variables point."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self.run_id = run.name
        resume = "never" if run.tracked_as is None else "allow"
        self._run = trackio.init(PROJECT, run.name, config=dict(run.parameters), resume=resume, embed=False)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def end(self, succeeded: bool) -> None:
        self._run.finish()


TRACKERS = {  # the package of each, as pip calls it, and what reports to it
    "tensorboard": ("tensorboard", TensorBoard),
    "mlflow": ("mlflow-skinny", MLflow),
    "wandb": ("wandb", Wandb),
    "trackio": ("trackio", Trackio),
}


def in_words(error: BaseException) -> str:
    """Return an error of a tracker in one line, without credentials."""
    return redacted(kind_and_line(error))
