"""Experiment trackers beside the local history: TensorBoard, MLflow, Weights & Biases, Trackio.

Each is one small class: opened with what a run is, told numbers, ended. It may raise whatever it likes (`tracking`).
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from partial_lora.locks import alone
from partial_lora.redaction import redacted

PROJECT = "partial-lora"  # an experiment, as MLflow says
DEFAULTS = {  # environment variables that a user's own go before
    "MLFLOW_ALLOW_FILE_STORE": "true",
    # What does not answer holds a run up by some seconds at most before it is left out.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "WANDB_INIT_TIMEOUT": "30",
    "WANDB_FINISH_TIMEOUT": "60",
    "WANDB_SILENT": "true",
}
_LONGEST, _AT_ONCE = 500, 100  # characters of a parameter, and parameters in a request, that any MLflow takes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Described:
    """A run as a tracker gets to know it.

    Args:
        name: task/model/method-id/seed.
        parameters: its settings, flat and without credentials.
        directory: the run's.
        store: the folder of MLflow's local store.
        step: optimizer steps done before; more than 0 where the run is resumed.
        known: what the tracker called the run when it was told of it before; None where it was not.
    """

    name: str
    parameters: Mapping[str, object]
    directory: Path
    store: Path
    step: int
    known: str | None


class Tracker(Protocol):
    """A run that is open at a tracker, which calls it `known`."""

    known: str

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take numbers measured after `step` optimizer steps."""

    def end(self, well: bool) -> None:
        """Close the run; `well` unless it failed."""


class TensorBoard:
    """Event files in the run's directory; what was measured after the checkpoint that a run resumes from is dropped."""

    known = "tensorboard"

    def __init__(self, run: Described) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run.directory / "tensorboard", purge_step=run.step + 1 if run.known else None)
        table = ["| key | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in run.parameters.items())]
        self._writer.add_text("settings", "\n".join(table))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self, well: bool) -> None:
        self._writer.close()


class MLflow:
    """A run of an experiment, at MLFLOW_TRACKING_URI or else in a store of files in results_dir.

    By way of MLflow's client, since its functions end what they call the active run at exit, and call that finished.
    """

    def __init__(self, run: Described) -> None:
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(uri or run.store.as_uri())
        self.known = run.known
        if self.known is None or not self._goes_on():
            with nullcontext() if uri else alone(run.store / "experiments", "add to"):  # which two at once would both
                experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
            self.known = self._client.create_run(experiment, run_name=run.name).info.run_id
            self._log_parameters(run.parameters)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.known, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def end(self, well: bool) -> None:
        self._client.set_terminated(self.known, "FINISHED" if well else "FAILED")

    def _goes_on(self) -> bool:
        """Open the run that is known again; False where the store has it no more."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(self.known, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def _experiment(self, name: str) -> str:
        """The id of an experiment, made if need be."""
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run was faster
                    raise
                found = self._client.get_experiment_by_name(name)
        return found.experiment_id

    def _log_parameters(self, parameters: Mapping[str, object]) -> None:
        from mlflow.entities import Param

        listed = [Param(key, str(value)[:_LONGEST]) for key, value in parameters.items()]
        for first in range(0, len(listed), _AT_ONCE):
            self._client.log_batch(self.known, params=listed[first : first + _AT_ONCE])


class Wandb:
    """A run of a project; where the service cannot be had it is kept in files, for `wandb sync`."""

    def __init__(self, run: Described) -> None:
        import wandb

        self.known = run.known or secrets.token_hex(8)
        settings = {
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "name": run.name,
            "id": self.known,
            "resume": "allow",
            "dir": str(run.directory),
            "config": dict(run.parameters),
            "settings": wandb.Settings(console="off", save_code=False),  # train.log has it, without credentials
        }
        try:
            self._run = wandb.init(**settings)
        except Exception as error:
            logger.warning("wandb: %s; it is kept in %s for `wandb sync`", said(error), run.directory / "wandb")
            wandb.teardown()  # which forgets the attempt: the run's id would count as taken
            self._run = wandb.init(**settings, mode="offline")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log({**metrics, "step": step})

    def end(self, well: bool) -> None:
        self._run.finish(exit_code=0 if well else 1)


class Trackio:
    """A run of a project in Trackio's local store, or where Trackio's own environment variables say."""

    def __init__(self, run: Described) -> None:
        import trackio

        self.known = run.name
        goes_on = "never" if run.known is None else "allow"
        self._run = trackio.init(PROJECT, run.name, config=dict(run.parameters), resume=goes_on, embed=False)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def end(self, well: bool) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Described], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": Wandb,
    "trackio": Trackio,
}


def said(error: BaseException) -> str:
    """An exception in one line of some length, without credentials."""
    return redacted(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
