"""Tracking of a run: what Trainer measures, and at the end the results, passed to the trackers that it names."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from partial_lora.credentials import redacted
from partial_lora.files import flatten, read_json, write_json
from partial_lora.training.trackers import FILE, TRACKERS, TrackedRun, Tracker, in_words

DEFAULTS = {  # environment variables, where the user has not set them
    "MLFLOW_ALLOW_FILE_STORE": "true",
    # A service that does not answer holds the run up by some seconds before it is left out.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "WANDB_INIT_TIMEOUT": "30",
    "WANDB_FINISH_TIMEOUT": "60",
    "WANDB_SILENT": "true",
}

logger = logging.getLogger(__name__)


class Tracking(TrainerCallback):
    """Pass what Trainer measures to trackers and, at the end, the run's results.

    As a context it marks the run as failed at the trackers where the block raises. A tracker that raises is left out
    from then on, and ends nothing else.

    Args:
        names: the trackers; none in any process but the first.
        directory: the run's, …/task/model/method-id/seed, by which trackers name it; a file in it (`FILE`) says what
            each tracker calls the run, so that a resumed one continues there.
        settings: the run's; their credentials are hidden here. MLflow's local store is in their results_dir.
    """

    def __init__(self, names: Sequence[str], directory: Path, settings: Mapping[str, object]) -> None:
        self._unopened = list(names)
        self._open: dict[str, Tracker] = {}
        self._directory, self._record = Path(directory).resolve(), Path(directory) / FILE
        self._store = Path(settings["results_dir"]).resolve() / "mlruns"
        self._parameters = redacted(flatten(settings))

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
            run_ids = dict(read_json(self._record))
        except (OSError, ValueError, TypeError):  # the first attempt, or one that left no ids
            run_ids = {}
        run_name = "/".join(self._directory.parts[-4:])
        unopened, self._unopened = self._unopened, []
        for name in unopened:
            with self._guarded(name):
                run = TrackedRun(run_name, self._parameters, self._directory, self._store, step, run_ids.get(name))
                self._open[name] = TRACKERS[name][1](run)
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
            logger.warning("trainer.report_to: %s is left out from now on (%s)", name, in_words(error))
            self._open.pop(name, None)


def _numbers(values: Mapping[str, object]) -> dict[str, float]:
    numbers = {key: value for key, value in flatten(values, "/").items() if isinstance(value, Real)}
    return {key: float(value) for key, value in numbers.items() if not isinstance(value, bool)}
