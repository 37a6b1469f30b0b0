"""Experiment trackers beside the local history, by the names of TRACKERS in training/config.py."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from pkgutil import resolve_name
from typing import Protocol

from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from partial_lora.errors import one_line
from partial_lora.files import flatten, one_writer, redacted, write_json
from partial_lora.training.config import TRACKERS

PROJECT = "partial-lora"  # MLflow calls it an experiment
DEFAULTS = {  # environment variables, where the user has not set them
    "MLFLOW_ALLOW_FILE_STORE": "true",
    # A service that does not answer holds the run up by some seconds before it is left out.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "WANDB_INIT_TIMEOUT": "30",
    "WANDB_FINISH_TIMEOUT": "60",
    "WANDB_SILENT": "true",
}
_PARAMETER_LENGTH, _PARAMETERS_PER_REQUEST = 500, 100  # the limits of any MLflow

logger = logging.getLogger(__name__)

# transformers' own callbacks were tried in place of the four classes below, behind tests/training/test_trackers.py:
# half of the tests fail. They record TrainingArguments and the model's config, not this run's settings without their
# credentials; they close the run when training ends, before test is evaluated; MLflow's uses the process-wide active
# run, by which a failed run ends as "FINISHED". Only the lines that log numbers would have remained of each callback.


@dataclass(frozen=True)
class Run:
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

    def __init__(self, run: Run) -> None:
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

    def __init__(self, run: Run) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(uri or run.store.as_uri())
        if run.tracked_as is not None and self._reopen(run.tracked_as):
            self.run_id = run.tracked_as
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

    def _reopen(self, run_id: str) -> bool:
        """Set the run of an earlier attempt running again; return False where the store no longer has it."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

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

    def __init__(self, run: Run) -> None:
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
            logger.warning("wandb: %s; written to %s for `wandb sync`", _in_one_line(error), run.directory / "wandb")
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

    def __init__(self, run: Run) -> None:
        import trackio

        self.run_id = run.name
        resume = "never" if run.tracked_as is None else "allow"
        self._run = trackio.init(PROJECT, run.name, config=dict(run.parameters), resume=resume, embed=False)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def end(self, succeeded: bool) -> None:
        self._run.finish()


class Tracking(TrainerCallback):
    """Pass what Trainer measures to trackers and, at the end, the run's results.

    As a context it marks the run as failed at the trackers where the block raises. A tracker that raises is left out
    from then on, and ends nothing else.

    Args:
        names: the trackers; none in any process but the first.
        directory: the run's, …/task/model/method-id/seed, by which trackers name it.
        record: the file with what each tracker calls the run, by which a resumed one continues there.
        results_dir: the place of MLflow's local store.
        parameters: the run's settings, flat; their credentials are hidden here.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        directory: Path,
        record: Path,
        results_dir: Path,
        parameters: Mapping[str, object],
    ) -> None:
        self._unopened = list(names)
        self._open: dict[str, Tracker] = {}
        self._directory, self._record = Path(directory).resolve(), Path(record)
        self._store = Path(results_dir).resolve() / "mlruns"
        self._parameters = redacted(parameters)

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._log(rewrite_logs(_numbers(logs or {})), state.global_step)

    def finish(self, results: Mapping[str, object], step: int) -> None:
        """Log the numbers in plain data, each by the path to it (`test/accuracy`), and end the run everywhere."""
        self._begin(step)
        self._log(_numbers(results), step)
        self._end(succeeded=True)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            self._end(succeeded=False)

    def _begin(self, step: int) -> None:
        """Open the run at the trackers that have not opened it yet, where an earlier attempt left off."""
        if not self._unopened:
            return
        for variable, value in DEFAULTS.items():
            os.environ.setdefault(variable, value)
        try:
            run_ids = dict(json.loads(self._record.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # the first attempt, or one that left no ids
            run_ids = {}
        run_name = "/".join(self._directory.parts[-4:])
        unopened, self._unopened = self._unopened, []
        for name in unopened:
            with self._guarded(name):
                run = Run(run_name, self._parameters, self._directory, self._store, step, run_ids.get(name))
                self._open[name] = resolve_name(f"{__package__}.{TRACKERS[name][1]}")(run)
                run_ids[name] = self._open[name].run_id
                write_json(self._record, run_ids)

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                tracker.log(metrics, step)

    def _end(self, succeeded: bool) -> None:
        self._unopened = []
        while self._open:
            name, tracker = self._open.popitem()
            with self._guarded(name):
                tracker.end(succeeded)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Leave a tracker out from now on where it raises, and let the run continue."""
        try:
            yield
        except Exception as error:  # of any kind: a run must not end for its trackers
            logger.warning("trainer.report_to: %s is left out from now on (%s)", name, _in_one_line(error))
            self._open.pop(name, None)


def _in_one_line(error: BaseException) -> str:
    return redacted(f"{type(error).__name__}: {one_line(error)}")


def _numbers(values: Mapping[str, object]) -> dict[str, float]:
    numbers = {key: value for key, value in flatten(values, "/").items() if isinstance(value, Real)}
    return {key: float(value) for key, value in numbers.items() if not isinstance(value, bool)}
