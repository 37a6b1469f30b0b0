"""Commands as a user types them: in a process of their own, or in this one, where their workers are forks of it.

A worker that starts from nothing imports for longer than a tiny model trains. A fork has imported all that this process
has, and is in everything else a process of its own: with its environment, its session, its log and its end.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import huggingface_hub
import torch

import partial_lora.train  # noqa: F401  what a worker imports: once, for all of them
from partial_lora import cli, progress, worker
from partial_lora.runs import launch

WORKER = ["-m", "partial_lora.worker"]


def environment(place: Path, **changes: str) -> dict[str, str]:
    """That of a command whose cache is its own, which is to reach no network, and whose tables are not cut short."""
    own = {"PARTIAL_LORA_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return os.environ | own | {"COLUMNS": "200"} | changes


def command(place: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
    """`partial-lora` in a process of its own, in the folder `place`; changes: of its environment."""
    return subprocess.run(
        [sys.executable, "-m", "partial_lora", *arguments],
        cwd=place,
        env=environment(place, **changes),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def here(
    place: Path, *arguments: str, first: Callable[[], object] = lambda: None, **changes: str
) -> subprocess.CompletedProcess:
    """What `command` gives, without a new interpreter: a lone worker is a fork, several are started as ever.

    first: called in a worker before all else.
    """
    out, err, before = io.StringIO(), io.StringIO(), Path.cwd()

    def start(words: list[str], **given) -> Forked | subprocess.Popen:
        return Forked(words, first=first, **given) if words[1:3] == WORKER else popen(words, **given)

    popen = subprocess.Popen
    own = SimpleNamespace(Popen=start, TimeoutExpired=subprocess.TimeoutExpired)
    os.chdir(place)
    try:
        with (
            mock.patch.dict(os.environ, environment(place, **changes), clear=True),
            mock.patch.object(sys, "argv", list(sys.argv)),
            mock.patch.object(launch, "subprocess", own),
            mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),  # read as they were imported
            mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = cli.main(arguments)
    finally:
        os.chdir(before)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


class Forked:
    """A worker that is a fork of this process; in so far as its parent needs it, a `subprocess.Popen`."""

    def __init__(
        self,
        words: list[str],
        *,
        stdout: io.IOBase,
        stderr: io.IOBase,
        env: Mapping[str, str],
        pass_fds: tuple[int, ...],
        start_new_session: bool,
        first: Callable[[], object],
    ) -> None:
        assert stdout is stderr
        assert start_new_session
        begin = (words[3:], stdout.fileno(), dict(env), first)
        self._process = multiprocessing.get_context("fork").Process(target=_work, args=begin)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.pid, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()


def _work(words: list[str], log: int, variables: dict[str, str], first: Callable[[], object]) -> None:
    """Be a worker: what `python -m partial_lora.worker` does, in a process that this one's tests have been in."""
    for number in progress.STOPPING:
        signal.signal(number, signal.SIG_DFL)  # of what its parent does about them it knows nothing
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    gc.freeze()  # what a new process would not have is not to be looked through again and again
    # A fork's first call into torch makes its pool anew, and two threads that make it at once (images are decoded in
    # several) fail with "Invalid thread pool!": so it is made here. A worker that starts from nothing has no such pool.
    torch.set_num_threads(torch.get_num_threads())
    logging.getLogger().handlers.clear()  # the tests' own
    sys.argv = ["partial_lora.worker", *words]
    first()
    worker.main()
