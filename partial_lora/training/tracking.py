"""What experiment trackers are told while a run trains, and at its end.

Trainer's own integrations are not used: they end a tracker's run before the test split is looked at, log Trainer's
arguments in place of the run's settings, and end a training with whatever a tracker raises. Here a tracker that raises
is warned of, once, and left out from then on.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from partial_lora.redaction import redacted
from partial_lora.runs.results import TRACKERS as KNOWN
from partial_lora.sealed import write_json
from partial_lora.training.trackers import DEFAULTS, TRACKERS, Described, Tracker, said

logger = logging.getLogger(__name__)


class Tracking(TrainerCallback):
    """Tells trackers what Trainer measures and, at the end, what the run came to.

    As a context it tells them that the run has failed, where what it holds raises. Nothing that a tracker raises comes
    out of it.

    Args:
        names: of the trackers; none for any process but the first.
        directory: the run's, …/task/model/method-id/seed, by which trackers know it.
        results_dir: where MLflow's local store is, if it has no other.
        parameters: the run's settings, flat; their credentials are hidden here.
    """

    def __init__(
        self, names: Sequence[str], *, directory: Path, results_dir: Path, parameters: Mapping[str, object]
    ) -> None:
        self._waiting = list(names)
        self._open: dict[str, Tracker] = {}
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
        known, run = _read(self._directory / KNOWN), "/".join(self._directory.parts[-4:])
        waiting, self._waiting = self._waiting, []
        for name in waiting:
            with self._guarded(name):
                described = Described(run, self._parameters, self._directory, self._store, step, known.get(name))
                self._open[name] = TRACKERS[name](described)
                known[name] = self._open[name].known
                write_json(self._directory / KNOWN, known)

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


def _numbers(measured: Mapping[str, object], path: str = "") -> dict[str, float]:
    """The numbers in plain data, each by the path to it."""
    found = {}
    for key, value in measured.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{path}{key}/")
        elif isinstance(value, Real) and not isinstance(value, bool):
            found[f"{path}{key}"] = float(value)
    return found


def _read(file: Path) -> dict[str, str]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # no attempt before this one, or one that left no names
        return {}
