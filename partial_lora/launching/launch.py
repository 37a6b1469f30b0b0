"""Runs as processes: each one a fresh worker, started, watched and stopped by the parent that composed its settings.

A worker never composes settings, and a parent of `train` or `calibrate` never imports torch, so that one run's crash,
memory or precision setting touches no other, and a sweep starts its next run with nothing left over.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from partial_lora import files, progress, signals
from partial_lora.credentials import redacted
from partial_lora.errors import PartialLoraError, kind_and_line
from partial_lora.launching import directory, first_failure, packs
from partial_lora.launching.cluster import Cluster, cluster_environment, cluster_of, command, visible
from partial_lora.launching.fork import Forked, can_fork, fork, ready
from partial_lora.launching.paths import calibration_directory, run_directory
from partial_lora.settings.editor import write_settings
from partial_lora.settings.identity import digests
from partial_lora.settings.schema import Config
from partial_lora.settings.versions import plain

_WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FOREIGN = ("ACCELERATE_", "FSDP_", "PMI_", "PMIX_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")  # of other launchers
_STOPPED = [128 + number for number in signals.STOPPING]  # exit codes of what was asked to stop
_RECORD = 40.0  # seconds that may pass until the record says that a run has ended


@dataclass(frozen=True)
class Outcome:
    """The end of a run: finished, paused (trainer.until), skipped (it was finished before), failed or interrupted.

    signal: the name of what interrupted it. error: why it failed. elsewhere: where the results are, on a machine that
    has none of them.
    """

    directory: Path
    status: str
    signal: str = ""
    error: str = ""
    elsewhere: str = ""

    @property
    def exit_code(self) -> int:
        """The exit code of a command whose only run ended so."""
        if self.status == "interrupted":
            return 128 + signal.Signals[self.signal]
        return 1 if self.status == "failed" else 0

    @property
    def reason(self) -> str:
        """Why the run did not end well, in a line that says where to read on."""
        if self.status == "interrupted":
            return f"interrupted by {self.signal}; the same command, without overwrite=true, goes on from there"
        log = self.directory / directory.LOG
        return f"{self.error} (log: {log})" if log.is_file() else self.error


def launch(
    config: Config,
    stage: str,
    *,
    watch: Callable[[dict], None] = lambda event: None,
    note: Callable[[str], None] = lambda line: None,
    stop: Callable[[], Sequence[int]] = tuple,
    slot: int = 0,
) -> Outcome:
    """Run a stage of a run, unless it is finished, and return how it ended.

    Args:
        config: the settings (`resolving.resolve`).
        stage: "train" for a whole run, "calibrate" for its sparsities alone.
        watch: called with every progress event of the worker.
        note: called with a line for each file that an earlier attempt left broken, and for each warning about the
            settings.
        stop: gives the signals that count as received, whether or not this process was sent them.
        slot: its number among runs side by side, by which a run of one process gets one of the accelerators.

    Raises:
        PartialLoraError: another process holds the directory, or it cannot be written.
    """
    place = directory_of(config, stage)
    if not place.is_dir() and is_done(config, stage, place):
        return Outcome(place, "skipped")  # a pack has it
    cluster = cluster_of(config.trainer, config.model.quantization)
    if cluster.rank:
        return _follow(config, stage, place, cluster, stop)
    with directory.locked(place) as lock:
        if is_done(config, stage, place):
            directory.remove_checkpoints(place)  # they stay where a run was ended right after its record was written
            return Outcome(place, "skipped")
        is_new = {entry.name for entry in place.iterdir()} == {directory.LOCK}
        for line in directory.prepare(place, overwrite=config.overwrite):
            note(line)
            with open(place / directory.LOG, "a", encoding="utf-8") as log:  # a sweep shows no notes
                log.write(f"{line}\n")
        for line in config.warnings if stage == "train" else ():
            note(f"beware: {line}")
        write_settings(place / directory.CONFIG, redacted(plain(config)), Path(config.results_dir))
        code, failure = _run_process(
            _command(place, stage, cluster),
            _environment(config, place, cluster, slot),
            place / directory.LOG,
            start=fork if can_fork(config, cluster) else _start,
            watch=watch,
            lock=lock,
            stop=stop,
        )
        if code and code not in _STOPPED:
            _record_failure(place, failure, cluster, code)
        outcome = _outcome(place, code)
        if is_new and outcome.status == "failed" and (directory.read_result(place) or {}).get("refused"):
            directory.remove_refused(place, config.results_dir)
        return outcome


def ready_to_fork(config: Config) -> None:
    """Start the process that forks runs like this one, before threads make them (`fork.ready`)."""
    cluster = cluster_of(config.trainer, config.model.quantization)
    if can_fork(config, cluster):
        ready(_environment(config, run_directory(config), cluster))


def directory_of(config: Config, stage: str) -> Path:
    """Return the directory of a stage's files."""
    return run_directory(config) if stage == "train" else calibration_directory(config)


def is_done(config: Config, stage: str, place: Path) -> bool:
    """Return whether a stage need not run: its files are whole, or its record is and suffices."""
    if config.overwrite:
        return False
    if stage == "calibrate":
        return directory.is_calibrated(place)
    if directory.is_finished(place):
        return True
    return config.keep_records and (directory.is_recorded(place) or packs.packed(place) is not None)


def _outcome(place: Path, code: int) -> Outcome:
    """Return how a run ended: by its record, or else by the worker's exit code."""
    result = directory.read_result(place) or {}
    status = result.get("status")
    if status in ("finished", directory.PAUSED):
        return Outcome(place, status)
    if code in _STOPPED and result.get("error") in (None, directory.INTERRUPTED):
        return Outcome(place, "interrupted", signal=signal.Signals(code - 128).name)
    return Outcome(place, "failed", error=result["error"] if status == "failed" else _silent_end(code))


def _silent_end(code: int) -> str:
    ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return f"the worker was ended {ended} before it could say why"


def _command(place: Path, stage: str, cluster: Cluster, *more: str) -> list[str]:
    return command(cluster, ["-m", "partial_lora.worker", str(place.resolve()), "--stage", stage, *more])


def _environment(config: Config, place: Path, cluster: Cluster, slot: int = 0) -> dict[str, str]:
    """Return the environment of a run's workers: this process's without another world, and with the settings."""
    environment = {
        key: value for key, value in os.environ.items() if key not in _WORLD and not key.startswith(_FOREIGN)
    }
    environment[progress.VARIABLE] = str((place / ".progress").resolve())
    environment["PARTIAL_LORA_WORLD"] = str(cluster.processes)
    if cluster.processes == 1:  # Trainer would spread the batch of one worker over every device that it sees
        devices = visible(counted=slot > 0 and config.trainer.device != "cpu")
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    environment["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    environment["PYTHONUNBUFFERED"] = "1"
    settings = plain(config)
    return environment | cluster_environment(cluster) | directory.worker_variables(settings, digests(settings))


def refuse_foreign_world() -> None:
    """Raise PartialLoraError inside a world that torchrun or accelerate has already started."""
    size = os.environ.get("WORLD_SIZE")
    if size is not None and "RANK" in os.environ:
        raise PartialLoraError(
            f"WORLD_SIZE={size}: started inside a torchrun or accelerate world; partial-lora starts its own workers: "
            f"run `partial-lora train trainer.num_processes={size}` without a launcher"
        )


def _follow(config: Config, stage: str, place: Path, cluster: Cluster, stop: Callable[[], Sequence[int]]) -> Outcome:
    """Run this machine's part of a run whose directory is machine 0's: only workers touch it, once machine 0 has begun.

    Why it failed is one line, from the run's record and this machine's workers.
    """
    if is_done(config, stage, place):
        return Outcome(place, "skipped")
    before = directory.read_result(place)
    environment = _environment(config, place, cluster)
    del environment[progress.VARIABLE]  # process 0 reports to machine 0
    log = place.resolve() / f"train.machine{cluster.rank}.log"
    with tempfile.TemporaryDirectory(prefix="partial-lora-") as folder:
        workers = _command(place, stage, cluster, "--log", str(log))
        code, failure = _run_process(workers, environment, Path(folder) / "launcher.log", stop=stop)
    if code in _STOPPED and directory.read_result(place) == before:  # the record is of an earlier attempt
        return Outcome(place, "interrupted", signal=signal.Signals(code - 128).name)
    if code in _STOPPED:
        return _outcome(place, code)
    if code == 0 or failure is None or failure.explained:  # the final record may take its time to arrive here
        end = time.monotonic() + _RECORD
        while time.monotonic() < end and (directory.read_result(place) or {}).get("status") == "running":
            time.sleep(0.5)
    result, machine = directory.read_result(place) or {}, f"machine {cluster.rank} of {cluster.machines}"
    if result.get("status") == "finished" and (code == 0 or result != before):
        return Outcome(place, "finished", elsewhere=f"{machine}: finished; the results are machine 0's: {place}")
    reason = _silent_end(code) if failure is None else failure.text(cluster.processes)
    if result.get("status") == "failed" and result != before and (failure is None or failure.explained):
        reason = result["error"]  # this machine's failure is only the echo of it
    return Outcome(place, "failed", error=f"{machine}: {reason}")


# --- A process that is started, watched, asked to stop and waited for.

_LOOK = 0.2  # seconds between two looks at a worker
_REMIND = 5.0  # seconds between two requests to stop


def _run_process(
    command: list[str],
    environment: Mapping[str, str],
    log: Path,
    *,
    start: Callable[..., subprocess.Popen | Forked] | None = None,
    watch: Callable[[dict], None] = lambda event: None,
    lock: int | None = None,
    stop: Callable[[], Sequence[int]] = tuple,
) -> tuple[int, first_failure.Failure | None]:
    """Run a command to its end; return its exit code, and which of its processes failed first if they left word.

    Its output is added to `log`, and its progress goes to `watch`. It inherits the descriptor `lock`, into which its
    pid is written, and so holds the lock to its end, even if this process dies. The first signal that asks this process
    to stop is passed on; the code is then 128 plus the signal's number. start: `_start`, the default, or `fork`. stop:
    as `launch` takes it.
    """
    events_file = environment.get(progress.VARIABLE)
    events = progress.Reader(Path(events_file)) if events_file else None

    def look() -> None:
        for event in events or ():
            watch(event)

    requests = _StopRequests()
    with signals.handling(requests), tempfile.TemporaryDirectory(prefix="partial-lora-") as words:
        with open(log, "ab") as file:
            worker = (start or _start)(command, {**environment, first_failure.VARIABLE: words}, file.fileno(), lock)
        requests.worker = worker
        try:
            if lock is not None:
                directory.name_holder(lock, worker.pid)
            while worker.returncode is None:  # until `wait` has seen its end
                look()
                for number in stop()[len(requests.received) :]:
                    requests(number, None)
                requests.remind()
                with suppress(subprocess.TimeoutExpired):
                    worker.wait(_LOOK)
        except BaseException:  # from `watch`, or a launcher that ends its job: nobody would look after the worker
            worker.send_signal(signal.SIGTERM)
            worker.wait()
            raise
        look()
        failure = first_failure.first(Path(words)) if worker.returncode else None
    if events is not None:
        events.path.unlink(missing_ok=True)
    return (128 + requests.received[0] if requests.received else worker.returncode), failure


_PARENT = "PARTIAL_LORA_PARENT"  # names the process that started a worker or their launcher


def _start(command: list[str], environment: Mapping[str, str], log: int, lock: int | None) -> subprocess.Popen:
    """Start a command in a session of its own, with its output in the file of the descriptor `log`."""
    return subprocess.Popen(
        command,
        stdout=log,
        stderr=log,
        env={**environment, _PARENT: str(os.getpid())},
        pass_fds=() if lock is None else (lock,),
        start_new_session=True,
    )


def end_with_parent() -> None:
    """Ask this process to stop once its parent is gone (kill -9, out of memory).

    A thread watches the parent and repeats the request, since Python drops an exception that a signal raises inside a
    finalizer.
    """
    forked_for, parent = multiprocessing.parent_process(), os.environ.get(_PARENT)
    if forked_for is None and parent is None:  # started by hand
        return

    def look() -> None:
        if forked_for is not None:
            forked_for.join()
        while forked_for is None and os.getppid() == int(parent):
            time.sleep(_LOOK)
        while True:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(_REMIND)

    threading.Thread(target=look, daemon=True).start()


class _StopRequests:
    """Passes the first request to stop on to the worker, and kills the worker's whole group on the second.

    The worker is reminded until it ends: Python drops an exception that a signal raises inside a finalizer.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.worker: subprocess.Popen | Forked | None = None
        self._last = float("-inf")

    def remind(self) -> None:
        """Pass the first request on, unless that was done in the last seconds."""
        if self.received and time.monotonic() - self._last > _REMIND:
            self._last = time.monotonic()
            self.worker.send_signal(self.received[0])

    def __call__(self, number: int, frame: object) -> None:
        self.received.append(number)
        if self.worker is None:
            return
        if len(self.received) == 1:
            self.remind()
        else:
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(self.worker.pid, signal.SIGKILL)


def _record_failure(place: Path, failure: first_failure.Failure | None, cluster: Cluster, code: int) -> None:
    """Write into the record of a run which process failed first; process 0 may not have lived to do so."""
    result = directory.read_result(place)
    if result is None:
        settings = directory.stored_settings(place)
        result = directory.new(settings, directory.read_result(place, directory.EARLIER))
    recorded = failure is None or (failure.rank == 0 and failure.explained)
    if result["status"] == "running" or (result["status"] == "failed" and not recorded):
        reason = _silent_end(code) if failure is None else failure.text(cluster.processes)
        result |= {"status": "failed", "error": redacted(reason)}
        killed = failure is None or not failure.explained
        files.write_json(place / directory.RESULT, result | ({"killed": True} if killed else {}))


# --- The launcher between a parent and several workers.


def main() -> None:
    """Be `accelerate launch`, leave word of which worker failed, and hear a request to stop once.

    `python -m partial_lora.launching.launch …` takes what `accelerate launch …` takes. torchrun, which accelerate
    calls, turns every failure into exit code 1, and a second signal while it waits for its workers would make it leave
    them behind. Exits with 0, 1, or 128 and the number of the signal that asked to stop.
    """
    end_with_parent()
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # this process handles the others itself
    from accelerate.commands import launch as accelerate
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def stop(number: int, frame: object) -> None:
        # torchrun passes the signal on, waits as long as PET_SHUTDOWN_TIMEOUT says, and kills what is left then: all of
        # that while it handles this exception. One that Python or a library has dropped is raised again.
        handled = sys.exc_info()[1]
        while handled is not None and not isinstance(handled, SignalException):
            handled = handled.__context__
        if handled is not None:
            return
        raise SignalException(f"asked to stop by {signal.Signals(number).name}", signal.Signals(number))

    for number in signals.STOPPING:
        signal.signal(number, stop)
    try:
        accelerate.main()
    except ChildFailedError as error:
        first_failure.report_exits(
            {rank: (failure.exitcode, failure.timestamp) for rank, failure in error.failures.items()}
        )
        sys.exit(1)
    except SignalException as stopped:
        for number in signals.STOPPING:
            signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + stopped.sigval)
    except Exception as error:
        first_failure.report(redacted(f"accelerate launch: {kind_and_line(error, None)}"))
        raise


if __name__ == "__main__":
    main()
