"""Experiment trackers beside the local history: TensorBoard, MLflow, Weights & Biases, Trackio.

Each is one small class: opened with what a run is, told numbers, ended. It may raise whatever it likes (`tracking`).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Protocol

from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from partial_lora.files import flatten, one_writer, redacted, write_json

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
            # Two runs at once would both make the experiment.
            with nullcontext() if uri else one_writer(run.store / "experiments", "add to"):
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


# --- What experiment trackers are told while a run trains, and at its end.


class Tracking(TrainerCallback):
    """Tells trackers what Trainer measures and, at the end, what the run came to.

    As a context it tells them that the run has failed, where what it holds raises. Nothing that a tracker raises comes
    out of it.

    Args:
        names: of the trackers; none for any process but the first.
        directory: the run's, …/task/model/method-id/seed, by which trackers know it.
        record: the file with what each tracker calls the run, by which a resumed one goes on there.
        results_dir: where MLflow's local store is, if it has no other.
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
        self._waiting = list(names)
        self._open: dict[str, Tracker] = {}
        self._record = Path(record)
        self._directory, self._store = Path(directory).resolve(), Path(results_dir).resolve() / "mlruns"
        self._parameters = redacted(parameters)

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._log(rewrite_logs(_numbers(logs or {})), state.global_step)

    def finish(self, measured: Mapping[str, object], step: int) -> None:
        """Log plain data at any depth, a number by the path to it (`test/accuracy`), and end the run everywhere."""
        self._begin(step)
        self._log(_numbers(measured), step)
        self._end(well=True)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            self._end(well=False)

    def _begin(self, step: int) -> None:
        """Open the run at the trackers that it is not open at, where an earlier attempt at it left off."""
        if not self._waiting:
            return
        for variable, value in DEFAULTS.items():
            os.environ.setdefault(variable, value)
        known, run = _read(self._record), "/".join(self._directory.parts[-4:])
        waiting, self._waiting = self._waiting, []
        for name in waiting:
            with self._guarded(name):
                described = Described(run, self._parameters, self._directory, self._store, step, known.get(name))
                self._open[name] = TRACKERS[name](described)
                known[name] = self._open[name].known
                write_json(self._record, known)

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                tracker.log(metrics, step)

    def _end(self, well: bool) -> None:
        self._waiting = []
        while self._open:
            name, tracker = self._open.popitem()
            with self._guarded(name):
                tracker.end(well)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Let the tracker's exceptions end its own part in the run, and no more."""
        try:
            yield
        except Exception as error:  # of whatever kind: trackers are not what the run is for
            logger.warning("trainer.report_to: %s is left out from now on (%s)", name, said(error))
            self._open.pop(name, None)


def _numbers(measured: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers in plain data, each by the path to it."""
    numbers = {key: value for key, value in flatten(measured, "/").items() if isinstance(value, Real)}
    return {key: float(value) for key, value in numbers.items() if not isinstance(value, bool)}


def _read(file: Path) -> dict[str, str]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # no attempt before this one, or one that left no names
        return {}
