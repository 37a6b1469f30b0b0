"""A worker that is forked from a process which has imported everything (trainer.start=fork)."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running

from partial_lora import progress
from partial_lora.launching import directory, imports
from partial_lora.launching.cluster import Cluster
from partial_lora.settings.schema import Config

_PRELOADED = ["partial_lora.launching.fork_preload", "partial_lora.train", "datasets", "timm", "sklearn.linear_model"]
_STARTED: list[bool] = []
_OF_ONE_RUN = (progress.VARIABLE, directory.VARIABLE)


def can_fork(config: Config, cluster: Cluster) -> bool:
    """Return whether a run is to be forked, and can be: else it gets a fresh interpreter.

    Several processes have a launcher of their own, a quantised model or an optimizer may need a library that the
    forking process has hidden, and trackers end in handlers that a forked process does not run.
    """
    return (
        config.trainer.start == "fork"
        and "forkserver" in multiprocessing.get_all_start_methods()
        and not (cluster.is_launched or config.trainer.report_to or imports.may_need_bitsandbytes(config))
    )


class Forked:
    """A forked worker, with as much of subprocess.Popen as `launch` calls."""

    def __init__(self, process: multiprocessing.Process) -> None:
        self._process, self.pid = process, process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> None:
        """Wait for its end, at most so many seconds."""
        self._process.join(timeout)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


def ready(environment: Mapping[str, str]) -> None:
    """Start the process that forks, unless it has started; where runs are made in threads, before the first of them.

    It inherits what libraries read while they are imported from this process, whose variables change for a moment.
    """
    if _STARTED:
        return
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    shared = {key: value for key, value in environment.items() if key not in _OF_ONE_RUN}
    with imports.variables(shared):
        ensure_running()
    _STARTED.append(True)


def fork(command: list[str], environment: Mapping[str, str], log: int, lock: int) -> Forked:
    """Have a worker forked, as `launch` starts one.

    The process that forks is multiprocessing's fork server. It has imported what runs need, computes nothing, lives as
    long as this one, and hands on how a worker ended.
    """
    ready(environment)
    arguments = command[command.index("-m") + 1 :]
    passed = (Connection(os.dup(descriptor)) for descriptor in (log, lock))  # by which a descriptor reaches a process
    process = multiprocessing.get_context("forkserver").Process(
        target=_be_forked, args=(arguments, dict(environment), *passed)
    )
    process.start()
    return Forked(process)


def _be_forked(arguments: list[str], environment: Mapping[str, str], log: Connection, lock: Connection) -> None:
    """Be `python -m *arguments` with an environment, a session and a log of its own; `lock` is held until the end."""
    os.setsid()
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log.fileno(), stream.fileno())
    log.close()
    os.environ.clear()
    os.environ.update(environment)
    take_threads(environment)
    multiprocessing.set_start_method(None, force=True)  # processes that load data start as they do elsewhere
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def take_threads(environment: Mapping[str, str]) -> None:
    """Compute with as many threads as OMP_NUM_THREADS says; the process that forked may have read another number."""
    import torch

    if (threads := environment.get("OMP_NUM_THREADS", "")).isdigit():
        torch.set_num_threads(int(threads))
