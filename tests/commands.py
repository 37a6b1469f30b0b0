"""Commands as a user types them: in an interpreter of their own, or in this one and forks of it.

An interpreter imports for longer than a tiny model trains. A fork has imported all that this process has, and is in
everything else a process of its own: with its environment, its session, its log and its end.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import accelerate.commands.launch  # noqa: F401  what a launcher imports: once, for all of them
import datasets
import evaluate  # noqa: F401
import huggingface_hub
import torch
from accelerate.state import AcceleratorState
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from transformers import conversion_mapping

import partial_lora.train  # noqa: F401  and what a worker does
from partial_lora import cli, signals, worker
from partial_lora.commands import train_or_calibrate
from partial_lora.launching import launch
from partial_lora.tasks import sources

sources.digits()  # what every process would make for itself: once, for all of them
conversion_mapping.get_checkpoint_conversion_mapping("")

PROGRAMS = {
    "partial_lora": lambda: sys.exit(cli.main(sys.argv[1:])),
    "partial_lora.worker": worker.main,
    "partial_lora.launching.launch": launch.main,
}


def environment(place: Path, **changes: str) -> dict[str, str]:
    """That of a command whose cache is its own, which is to reach no network, and whose tables are not cut short."""
    own = {"PARTIAL_LORA_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return os.environ | own | {"COLUMNS": "200"} | changes


def command(place: Path, *arguments: str, before: tuple[str, ...] = (), **changes: str) -> subprocess.CompletedProcess:
    """`partial-lora` in an interpreter of its own, in the folder `place`; changes: of its environment."""
    return subprocess.run(
        [*before, sys.executable, "-m", "partial_lora", *arguments],
        cwd=place,
        env=environment(place, **changes),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def begun(place: Path, *arguments: str, first: Callable[[], object] = lambda: None, **changes: str) -> subprocess.Popen:
    """The command under way, as a fork, with pipes for what it prints; its workers are forks, too. It draws nothing."""

    def before_all_else() -> None:
        train_or_calibrate._draw = lambda *given: None
        first()

    return forked(
        [sys.executable, "-m", "partial_lora", *arguments],
        first=before_all_else,
        cwd=place,
        env=environment(place, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def here(
    place: Path, *arguments: str, drawn: bool = False, first: Callable[[], object] = lambda: None, **changes: str
) -> subprocess.CompletedProcess:
    """What `command` gives, of the command in this process and its workers as forks.

    drawn: with the figures and the page, which take longer than a tiny model. first: called in every fork before all
    else.
    """
    out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(place)
    try:
        with (
            mock.patch.dict(os.environ, environment(place, **changes), clear=True),
            mock.patch.object(sys, "argv", list(sys.argv)),
            contextlib.nullcontext() if drawn else mock.patch.object(train_or_calibrate, "_draw"),
            forking(first),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = cli.main(arguments)
    finally:
        os.chdir(before)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def forking(first: Callable[[], object] = lambda: None):
    """Start what this package starts as forks, and reach no network, as the libraries would know from the start."""
    start = partial(forked, first=first)
    own = SimpleNamespace(Popen=start, TimeoutExpired=subprocess.TimeoutExpired, run=subprocess.run)
    with (
        mock.patch.object(launch, "subprocess", own),
        mock.patch.object(subprocess_handler, "Popen", start),  # the launcher's
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True),
    ):
        yield


def forked(
    args: list[str], *, env: Mapping[str, str], first: Callable[[], object] = lambda: None, **given
) -> subprocess.Popen:
    """A `Popen` of a program of this package, in which a fork of this process runs on where a new one would begin."""
    module, *words = args[args.index("-m") + 1 :]
    run = partial(_run, module, words, dict(env), _descriptors(), first)
    return subprocess.Popen(args, env=env, preexec_fn=run, restore_signals=False, **given)


def until(holds: Callable[[], object], running: subprocess.Popen | None = None, seconds: float = 120) -> None:
    """Wait for what holds soon, as long as the process runs that is to bring it about."""
    end = time.monotonic() + seconds
    while not holds():
        assert running is None or running.poll() is None, running.stderr and running.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _descriptors() -> set[int]:
    """The open ones, without that by which they are listed."""
    found = map(int, os.listdir("/dev/fd"))
    return {each for each in found if Path(f"/dev/fd/{each}").exists() or each < 3}


def _run(
    module: str, words: list[str], variables: dict[str, str], earlier: set[int], first: Callable[[], object]
) -> None:
    """Be `python -m MODULE …`, in a process that this one's tests have been in, and do not come back."""
    for descriptor in _descriptors() - earlier:  # at the end of one of them Popen waits for the program to begin
        os.close(descriptor)
    code = 1
    try:
        for number in signals.STOPPING:
            signal.signal(number, signal.SIG_DFL)  # of what its parent does about them it knows nothing
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(variables)
        sys.stdin = open(os.devnull)  # noqa: SIM115
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
        gc.enable()
        gc.freeze()  # what a new process would not have is not to be looked through again and again
        # A fork's first call into torch makes its pool anew, and two threads that make it at once (images are decoded
        # in several) fail with "Invalid thread pool!": so it is made here. A new process has no such pool.
        torch.set_num_threads(torch.get_num_threads())
        logging.getLogger().handlers.clear()  # the tests' own
        AcceleratorState._reset_state(reset_partial_state=True)  # else two processes would each take itself for the one
        sys.argv = [module, *words]
        sys.modules["__main__"] = ModuleType("__main__")  # not what pytest began as
        with forking(first):
            first()
            PROGRAMS[module]()
            code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else end.code is not None
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            threading._shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
