"""Runs as processes: each one a fresh worker, started, watched and stopped by the parent that composed its settings.

A worker never composes settings and the parent never imports torch, so that one run's crash, memory or precision
setting touches no other, and a sweep starts its next run with nothing left over.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from partial_lora import progress, sealed
from partial_lora.errors import PartialLoraError
from partial_lora.redaction import redacted
from partial_lora.runs import cluster, handover, record, results
from partial_lora.runs.cluster import Cluster
from partial_lora.runs.failures import Failure
from partial_lora.runs.processes import STOPPING, run_process

_WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FOREIGN = ("ACCELERATE_", "FSDP_", "PMI_", "PMIX_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")  # of other launchers
_ASKED_TO_STOP = [128 + number for number in STOPPING]
_RECORD = 40.0  # seconds that the record of a run which has ended may take to say so


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished, skipped (it was finished before), failed or interrupted; and what it says of that."""

    directory: Path
    status: str
    message: str = ""


def launch(
    settings: Mapping,
    directory: Path,
    *,
    stage: str,
    watch: Callable[[dict], None],
    finished: Callable[[Path], bool],
    asked: Callable[[], Sequence[int]] = tuple,
) -> Outcome:
    """Do a run in `directory` unless it is finished there, and say how it ended.

    Args:
        settings: resolved settings (`config.resolve`).
        stage: "train" for a whole run, "calibrate" for its sparsities alone.
        watch: called with every progress event of the worker.
        finished: says whether a directory holds what the stage makes.
        asked: gives the signals that count as received, whether or not this process was sent them.

    Raises:
        PartialLoraError: another process holds the directory, or it cannot be written.
    """
    shared = cluster.cluster_of(settings)
    if shared.rank:
        return _follow(settings, directory, shared, stage=stage, finished=finished, asked=asked)
    with results.locked(directory) as lock:
        if finished(directory) and not settings["overwrite"]:
            results.remove_checkpoints(directory)  # what ended it may have come between the last two steps
            return Outcome(directory, "skipped")
        for line in results.prepare(directory, anew=settings["overwrite"]):
            watch({"said": line})
        sealed.write_atomic(directory / results.CONFIG, yaml.safe_dump(redacted(settings), sort_keys=False))
        command = _command(directory, stage, shared)
        environment = _environment(directory, shared.processes) | handover.variables(settings)
        code = _work(command, environment, directory, lock, watch, shared, asked)
        return _outcome(directory, code)


def _outcome(directory: Path, code: int) -> Outcome:
    result = results.read_result(directory) or {}
    status = result.get("status")
    if status == "finished":
        return Outcome(directory, "finished")
    if code in _ASKED_TO_STOP and result.get("error") in (None, results.INTERRUPTED):
        return Outcome(directory, "interrupted", signal.Signals(code - 128).name)
    if status == "failed":
        return Outcome(directory, "failed", result["error"])
    return Outcome(directory, "failed", _unsaid(code))


def _command(directory: Path, stage: str, shared: Cluster, *more: str) -> list[str]:
    """The command line of this machine's workers; several workers of one run are started by accelerate."""
    return cluster.command(shared, ["-m", "partial_lora.worker", str(directory.resolve()), "--stage", stage, *more])


def _environment(directory: Path, processes: int) -> dict[str, str]:
    environment = {
        key: value for key, value in os.environ.items() if key not in _WORLD and not key.startswith(_FOREIGN)
    }
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
    command: list[str],
    environment: Mapping[str, str],
    directory: Path,
    lock: int,
    watch: Callable[[dict], None],
    shared: Cluster,
    asked: Callable[[], Sequence[int]],
) -> int:
    """Run the workers to their end and give their exit code; their output is the run's log."""
    code, failure = run_process(
        command,
        {**environment, **cluster.environment(shared)},
        directory / results.LOG,
        watch,
        lock=lock,
        started=lambda worker: results.name_holder(lock, worker),
        asked=asked,
    )
    if code and code not in _ASKED_TO_STOP:
        _blame(directory, failure, shared, code)
    return code


def _blame(directory: Path, failure: Failure | None, shared: Cluster, code: int) -> None:
    """Put into the record of a run that failed which process did first; process 0 may not have lived to write it."""
    result = results.read_result(directory)
    if result is None:
        result = record.new(yaml.safe_load((directory / results.CONFIG).read_text(encoding="utf-8")))
    recorded = failure is None or (failure.rank == 0 and failure.said)
    if result["status"] == "running" or (result["status"] == "failed" and not recorded):
        reason = _unsaid(code) if failure is None else _who(failure, shared)
        sealed.write_json(directory / results.RESULT, result | {"status": "failed", "error": redacted(reason)})


def _unsaid(code: int) -> str:
    ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return f"the worker was ended {ended} before it could say why"


def _who(failure: Failure, shared: Cluster) -> str:
    if failure.rank is None:
        return failure.reason
    return f"process {failure.rank} of {shared.processes} {'failed: ' if failure.said else ''}{failure.reason}"


def _follow(
    settings: Mapping,
    directory: Path,
    shared: Cluster,
    *,
    stage: str,
    finished: Callable[[Path], bool],
    asked: Callable[[], Sequence[int]],
) -> Outcome:
    """Do this machine's part of a run whose directory is machine 0's: only the workers touch it, and not before its.

    What this machine has to say of the end is one line, from the run's record and its own workers.
    """
    if finished(directory) and not settings["overwrite"]:
        return Outcome(directory, "skipped")
    before = results.read_result(directory)
    environment = _environment(directory, shared.processes) | cluster.environment(shared)
    environment |= handover.variables(settings)
    del environment[progress.VARIABLE]  # process 0 tells machine 0
    log = directory.resolve() / f"train.machine{shared.rank}.log"
    with tempfile.TemporaryDirectory(prefix="partial-lora-") as own:
        command = _command(directory, stage, shared, "--log", str(log))
        own_log = Path(own) / "launcher.log"
        code, failure = run_process(command, environment, own_log, lambda event: None, asked=asked)
    if code in _ASKED_TO_STOP:
        return _outcome(directory, code)
    if code == 0 or failure is None or failure.said:
        _await_record(directory)
    result, machine = results.read_result(directory) or {}, f"machine {shared.rank} of {shared.machines}"
    if result.get("status") == "finished" and (code == 0 or result != before):
        return Outcome(directory, "finished", f"{machine}: finished; the results are machine 0's: {directory}")
    reason = _unsaid(code) if failure is None else _who(failure, shared)
    if result.get("status") == "failed" and result != before and (failure is None or failure.said):
        reason = result["error"]  # of which this machine's failure is the echo
    return Outcome(directory, "failed", f"{machine}: {reason}")


def _await_record(directory: Path) -> None:
    """Wait until the run's record says how it ended, as long as one that has ended may take on a shared file system."""
    end = time.monotonic() + _RECORD
    while time.monotonic() < end and (results.read_result(directory) or {}).get("status") == "running":
        time.sleep(0.5)


def refuse_foreign_world() -> None:
    """Raises PartialLoraError inside a world that torchrun or accelerate has already started."""
    size = os.environ.get("WORLD_SIZE")
    if size is not None and "RANK" in os.environ:
        raise PartialLoraError(
            f"WORLD_SIZE={size}: started inside a torchrun or accelerate world; partial-lora starts its own workers: "
            f"run `partial-lora train trainer.num_processes={size}` without a launcher"
        )
