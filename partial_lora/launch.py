"""Runs as processes: each one a fresh worker, started, watched and stopped by the parent that composed its settings.

A worker never composes settings and the parent never imports torch, so that one run's crash, memory or precision
setting touches no other, and a sweep starts its next run with nothing left over.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from partial_lora import progress, results
from partial_lora.errors import PartialLoraError

_WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK = 0.2  # seconds between two looks at a worker
_REMIND = 5.0  # seconds between two requests to stop


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished, skipped (it was finished before), failed or interrupted; and what it says of that."""

    directory: Path
    status: str
    message: str = ""


def launch(
    settings: Mapping, directory: Path, *, stage: str, watch: Callable[[dict], None], finished: Callable[[Path], bool]
) -> Outcome:
    """Do a run in `directory` unless it is finished there, and say how it ended.

    Args:
        settings: resolved settings (`config.resolve`).
        stage: "train" for a whole run, "calibrate" for its sparsities alone.
        watch: called with every progress event of the worker.
        finished: says whether a directory holds what the stage makes.

    Raises:
        PartialLoraError: another process holds the directory, or it cannot be written.
    """
    with results.locked(directory) as lock:
        if finished(directory) and not settings["overwrite"]:
            results.remove_checkpoints(directory)  # what ended it may have come between the last two steps
            return Outcome(directory, "skipped")
        for line in results.prepare(directory, anew=settings["overwrite"]):
            watch({"said": line})
        results.write_atomic(directory / results.CONFIG, yaml.safe_dump(dict(settings), sort_keys=False))
        processes = _processes(settings)
        command = _command(directory, stage, processes)
        code = _work(command, _environment(directory, processes), directory, lock, watch)
        return _outcome(directory, code)


def _outcome(directory: Path, code: int) -> Outcome:
    result = results.read_result(directory) or {}
    status = result.get("status")
    if code in (128 + number for number in _STOPPING):
        return Outcome(directory, "interrupted", signal.Signals(code - 128).name)
    if status == "finished":
        return Outcome(directory, "finished")
    if status == "failed":
        return Outcome(directory, "failed", result["error"])
    ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return Outcome(directory, "failed", f"the worker was ended {ended} before it could say why")


def _processes(settings: Mapping) -> int:
    """How many workers share a run: as many as asked for, else one an accelerator, else one."""
    trainer = settings["trainer"]
    if trainer["num_processes"]:
        return trainer["num_processes"]
    if trainer["device"] == "cpu" or not any(Path("/dev").glob("nvidia[0-9]*")):
        return 1
    count = "import torch; print(max(1, torch.cuda.device_count()))"  # in a process of its own: the parent has no torch
    return int(subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True).stdout)


def _command(directory: Path, stage: str, processes: int) -> list[str]:
    """The worker's command line; several workers of one run are started by accelerate."""
    worker = ["-m", "partial_lora.worker", str(directory.resolve()), "--stage", stage]
    if processes == 1:
        return [sys.executable, *worker]
    # --multi_gpu is what makes accelerate start several processes, on the CPU too, where the worker then sets use_cpu.
    accelerate = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, *accelerate, *plain, *worker]


def _environment(directory: Path, processes: int) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key not in _WORLD}
    environment[progress.VARIABLE] = str((directory / ".progress").resolve())
    environment["PARTIAL_LORA_WORLD"] = str(processes)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    # Threads that spin while they wait are a little faster on an idle machine, and many times slower on a busy one.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if processes == 1:  # Trainer would spread the batch of one worker over every device that it sees
        environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    environment["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def _work(
    command: list[str], environment: Mapping[str, str], directory: Path, lock: int, watch: Callable[[dict], None]
) -> int:
    """Run a worker to its end and give its exit code; its output is the run's log, its lock outlives the parent."""
    events = progress.Reader(Path(environment[progress.VARIABLE]))
    with _stopping() as stop:
        with open(directory / results.LOG, "ab") as log:
            worker = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, pass_fds=(lock,), start_new_session=True
            )
        stop.tell(worker)
        results.name_holder(lock, worker.pid)
        while worker.poll() is None:
            _tell(events, watch)
            stop.remind()
            try:
                worker.wait(_LOOK)
            except subprocess.TimeoutExpired:
                continue
        _tell(events, watch)
    events.path.unlink(missing_ok=True)
    return 128 + stop.received[0] if stop.received else worker.returncode


def _tell(events: progress.Reader, watch: Callable[[dict], None]) -> None:
    for event in events:
        watch(event)


class _Stop:
    """Passes the first request to stop on to the worker, and ends the worker's whole group on the second.

    The worker is told again until it ends: Python drops an exception that a signal raises inside a finalizer.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._worker: subprocess.Popen | None = None
        self._told = float("-inf")

    def tell(self, worker: subprocess.Popen) -> None:
        """Name the worker; it hears at once of what was received before it was started."""
        self._worker = worker
        self.remind()

    def remind(self) -> None:
        """Tell the worker what it has been asked to, if it was not told in the last seconds."""
        if self.received and time.monotonic() - self._told > _REMIND:
            self._told = time.monotonic()
            self._worker.send_signal(self.received[0])

    def __call__(self, number: int, frame: object) -> None:
        self.received.append(number)
        if self._worker is None:
            return
        if len(self.received) == 1:
            self.remind()
        else:
            os.killpg(self._worker.pid, signal.SIGKILL)


@contextmanager
def _stopping() -> Iterator[_Stop]:
    stop = _Stop()
    before = {number: signal.signal(number, stop) for number in _STOPPING}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refuse_foreign_world() -> None:
    """Raises PartialLoraError inside a world that torchrun or accelerate has already started."""
    size = os.environ.get("WORLD_SIZE")
    if size is not None and "RANK" in os.environ:
        raise PartialLoraError(
            f"WORLD_SIZE={size}: started inside a torchrun or accelerate world; partial-lora starts its own workers: "
            f"run `partial-lora train trainer.num_processes={size}` without a launcher"
        )
