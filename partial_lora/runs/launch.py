"""Runs as processes: each one a fresh worker, started, watched and stopped by the parent that composed its settings.

A worker never composes settings and the parent never imports torch, so that one run's crash, memory or precision
setting touches no other, and a sweep starts its next run with nothing left over.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from partial_lora import files, progress
from partial_lora.errors import PartialLoraError, require
from partial_lora.files import redacted
from partial_lora.runs import directory as handover
from partial_lora.runs import schema
from partial_lora.runs.config import calibration_directory, plain, run_directory
from partial_lora.runs.schema import Config
from partial_lora.training.config import TrainerConfig

# --- Which of several processes failed first, and of what: each leaves word, and whoever started them reads it.

VARIABLE = "PARTIAL_LORA_FAILURES"  # names the folder; outside a launched run there is none
_EXITS = "exits.json"
_ASKED = (-signal.SIGTERM, 128 + signal.SIGTERM)
_CLOSE = 5.0  # seconds within which peers notice that a process is gone


@dataclass(frozen=True)
class Failure:
    """The process that failed first (None: the launcher), and why in one line; `said` where it said so itself."""

    rank: int | None
    reason: str
    said: bool = True


def report(reason: str) -> None:
    """Leave word of why this process failed. Does nothing outside a launched run or where that cannot be written."""
    rank = os.environ.get("RANK")
    _write(f"rank{rank}.json" if rank else "launcher.json", {"rank": rank and int(rank), "reason": reason})


def report_exits(exits: Mapping[int, tuple[int, float]]) -> None:
    """Leave word of how the workers of this machine ended: exit code and second of those that failed, by rank."""
    _write(_EXITS, {"exits": {rank: list(each) for rank, each in exits.items()}})


def first(folder: Path) -> Failure | None:
    """The failure that the others followed from; None where nobody left word.

    A process that is killed says nothing, and its peers then fail of a broken connection. What the launcher had to kill
    itself, since it was waiting for a peer that failed, ended long after that peer.
    """
    told = [_read(path) for path in sorted(folder.glob("*.json")) if path.name != _EXITS]
    told = sorted((each for each in told if each), key=lambda each: each["time"])
    exits = {int(rank): how for rank, how in _read(folder / _EXITS).get("exits", {}).items()}
    silent = exits.keys() - {each["rank"] for each in told}
    # Those that were asked to end, as the launcher asks the peers of a process that failed, come last.
    ended = sorted((code in _ASKED, second, rank, code) for rank in silent for code, second in [exits[rank]])
    if ended and (not told or (not ended[0][0] and ended[0][1] <= told[0]["time"] + _CLOSE)):
        return Failure(ended[0][2], _how(ended[0][3]), said=False)
    return Failure(told[0]["rank"], told[0]["reason"]) if told else None


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code} and did not say why"


def _write(name: str, content: dict) -> None:
    folder = os.environ.get(VARIABLE)
    if not folder:
        return
    path = Path(folder) / name
    with suppress(OSError):  # the folder went with whoever would have read it
        files.write_json(path, {"time": time.time(), **content})


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


# --- A process that is started, watched, told to stop and waited for.

_LOOK = 0.2  # seconds between two looks at a worker
_REMIND = 5.0  # seconds between two requests to stop


def run_process(
    command: list[str],
    environment: Mapping[str, str],
    log: Path,
    watch: Callable[[dict], None],
    *,
    lock: int | None = None,
    started: Callable[[int], None] = lambda pid: None,
    asked: Callable[[], Sequence[int]] = tuple,
) -> tuple[int, Failure | None]:
    """Run a command to its end; gives its exit code, and which of its processes failed first if they said so.

    Its output is added to `log`, its progress goes to `watch`, and it inherits the descriptor `lock`, which it holds on
    should this process die. The first signal that asks this process to stop is passed on; the code is then 128 more
    than its number. asked: gives the signals that count as received, whether or not this process was sent them.
    """
    events = progress.Reader(Path(environment[progress.VARIABLE])) if progress.VARIABLE in environment else None
    held = () if lock is None else (lock,)
    with tempfile.TemporaryDirectory(prefix="partial-lora-") as told, _stopping() as stop:
        told_here = {**environment, VARIABLE: told}
        with open(log, "ab") as file:
            worker = subprocess.Popen(
                command, stdout=file, stderr=file, env=told_here, pass_fds=held, start_new_session=True
            )
        stop.tell(worker)
        try:
            started(worker.pid)
            while worker.poll() is None:
                _tell(events, watch)
                for number in asked()[len(stop.received) :]:
                    stop(number, None)
                stop.remind()
                with suppress(subprocess.TimeoutExpired):
                    worker.wait(_LOOK)
        except BaseException:  # of `watch`, or of a launcher that ends its job: nobody would look after the worker
            worker.terminate()
            worker.wait()
            raise
        _tell(events, watch)
        failure = first(Path(told)) if worker.returncode else None
    if events is not None:
        events.path.unlink(missing_ok=True)
    return (128 + stop.received[0] if stop.received else worker.returncode), failure


def _tell(events: progress.Reader | None, watch: Callable[[dict], None]) -> None:
    for event in events or ():
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
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(self._worker.pid, signal.SIGKILL)


@contextmanager
def _stopping() -> Iterator[_Stop]:
    stop = _Stop()
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # nohup is to be heeded
    with progress.handling(stop, [number for number in progress.STOPPING if number not in ignored]):
        yield stop


# --- The processes of one run: how many there are, on which machines, and the command that starts those of this one

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainerConfig)}
_FROM_FILE = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")

_GRACE = 600  # seconds that several workers have to end well once they are asked to; a second request ends them at once


@dataclass(frozen=True)
class Cluster:
    """The processes that share a run, over one machine or several.

    processes: of all machines together. rank: of this machine; machine 0 has the run's directory. kind: "ddp", a whole
    model in every process; "fsdp"; or "deepspeed", which only a file can ask for.
    """

    processes: int
    machines: int = 1
    rank: int = 0
    address: str | None = None
    port: int = 0
    kind: str = "ddp"
    file: str | None = None
    hides_accelerators: bool = False

    @property
    def here(self) -> int:
        """How many of the processes run on this machine."""
        return self.processes // self.machines

    @property
    def is_launched(self) -> bool:
        """True where accelerate starts the processes; a lone one needs no launcher."""
        return self.processes > 1 or self.kind == "deepspeed"


def cluster_of(trainer: TrainerConfig, quantization: str | None = None) -> Cluster:
    """Return the processes that a run's settings ask for; `quantization` is that of its model.

    What `trainer.accelerate_config` says stands where a key has its default. Raises PartialLoraError where the two do
    not go together, or for a strategy that needs more processes, a library or another model.
    """
    said = schema.accelerate_file(trainer.accelerate_config) if trainer.accelerate_config else {}
    given = {key: getattr(trainer, key) for key in _FROM_FILE}
    given |= {key: said[key] for key in _FROM_FILE if given[key] == _DEFAULTS[key] and said.get(key) is not None}
    machines, address = given["num_machines"], given["main_process_ip"]
    if said:  # else the schema has checked them
        TrainerConfig(**given, batch_size=given["num_processes"] or 1)
    on_cpu = trainer.device == "cpu" or bool(said.get("use_cpu"))
    processes = given["num_processes"] or machines * _accelerators(on_cpu)
    kind = {"FSDP": "fsdp", "DEEPSPEED": "deepspeed"}.get(said.get("distributed_type"), trainer.strategy)
    parts = processes * trainer.gradient_accumulation_steps
    expected = f"a multiple of {parts}, of {processes} processes times trainer.gradient_accumulation_steps"
    require(trainer.batch_size % parts == 0, "trainer.batch_size", trainer.batch_size, expected)
    if kind == "fsdp":
        require(processes > 1, "trainer.strategy", kind, "ddp for a run of one process, which has nothing to share out")
        require(quantization is None, "model.quantization", quantization, "null, for trainer.strategy=fsdp")
    if kind == "deepspeed":
        found = importlib.util.find_spec("deepspeed") is not None
        require(found, schema.KEY, "DEEPSPEED", "a machine with DeepSpeed (`pip install deepspeed`)")
    several = machines > 1
    return Cluster(
        processes=processes,
        machines=machines,
        rank=given["machine_rank"],
        address=address if several else None,
        port=given["main_process_port"] if several else 0,
        kind=kind,
        file=trainer.accelerate_config,
        hides_accelerators=bool(said.get("use_cpu")),
    )


def command(cluster: Cluster, worker: list[str]) -> list[str]:
    """The command that starts this machine's workers, each of them `python *worker`."""
    if not cluster.is_launched:
        return [sys.executable, *worker]
    flags = {
        "num_processes": cluster.processes,
        "num_machines": cluster.machines,
        "machine_rank": cluster.rank,
        "main_process_port": cluster.port,  # 0: any that is free
        # The worker is told of its number format by the settings (trainer.mixed_precision), and compiles nothing.
        "mixed_precision": "no",
        "dynamo_backend": "no",
    }
    if cluster.address:
        flags["main_process_ip"] = cluster.address
    # Without a file named here accelerate takes the user's default one, which was made for other programs.
    flags |= {"config_file": Path(cluster.file).resolve()} if cluster.file else {"gpu_ids": "all"}
    launcher = [sys.executable, "-m", "partial_lora.runs.launcher"]
    if not (cluster.file and cluster.kind in ("fsdp", "deepspeed")):
        # This is what makes accelerate start several processes, on the CPU too, where the worker then sets use_cpu.
        launcher.append("--multi_gpu")
    return [*launcher, *(text for name, value in flags.items() for text in (f"--{name}", str(value))), *worker]


def cluster_environment(cluster: Cluster) -> dict[str, str]:
    """What the workers' environment has to have beside that of a lone worker on its own machine."""
    added = {"PET_SHUTDOWN_TIMEOUT": str(_GRACE)}
    if "OMP_NUM_THREADS" not in os.environ:
        added["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // cluster.here))
    if cluster.hides_accelerators:
        added["CUDA_VISIBLE_DEVICES"] = ""
    return added


def _accelerators(on_cpu: bool) -> int:
    """How many accelerators this machine shows, and at least one process."""
    if on_cpu or not any(Path("/dev").glob("nvidia[0-9]*")):
        return 1
    count = "import torch; print(max(1, torch.cuda.device_count()))"  # in a process of its own: the parent has no torch
    return int(subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True).stdout)


_WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FOREIGN = ("ACCELERATE_", "FSDP_", "PMI_", "PMIX_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")  # of other launchers
_ASKED_TO_STOP = [128 + number for number in progress.STOPPING]
_RECORD = 40.0  # seconds that the record of a run which has ended may take to say so


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished, skipped (it was finished before), failed or interrupted; and what it says of that."""

    directory: Path
    status: str
    message: str = ""


def launch(
    config: Config,
    directory: Path,
    *,
    stage: str,
    watch: Callable[[dict], None],
    finished: Callable[[Path], bool],
    asked: Callable[[], Sequence[int]] = tuple,
) -> Outcome:
    """Do a run in `directory` unless it is finished there, and say how it ended.

    Args:
        config: the settings (`config.resolve`).
        stage: "train" for a whole run, "calibrate" for its sparsities alone.
        watch: called with every progress event of the worker.
        finished: says whether a directory holds what the stage makes.
        asked: gives the signals that count as received, whether or not this process was sent them.

    Raises:
        PartialLoraError: another process holds the directory, or it cannot be written.
    """
    shared = cluster_of(config.trainer, config.model.quantization)
    if shared.rank:
        return _follow(config, directory, shared, stage=stage, finished=finished, asked=asked)
    with handover.locked(directory) as lock:
        if finished(directory) and not config.overwrite:
            handover.remove_checkpoints(directory)  # what ended it may have come between the last two steps
            return Outcome(directory, "skipped")
        for line in handover.prepare(directory, anew=config.overwrite):
            watch({"said": line})
        settings = plain(config)
        files.write_atomic(directory / handover.CONFIG, yaml.safe_dump(redacted(settings), sort_keys=False))
        command = _command(directory, stage, shared)
        environment = _environment(directory, shared.processes) | handover.variables(settings)
        code = _work(command, environment, directory, lock, watch, shared, asked)
        return _outcome(directory, code)


def _outcome(directory: Path, code: int) -> Outcome:
    result = handover.read_result(directory) or {}
    status = result.get("status")
    if status == "finished":
        return Outcome(directory, "finished")
    if code in _ASKED_TO_STOP and result.get("error") in (None, handover.INTERRUPTED):
        return Outcome(directory, "interrupted", signal.Signals(code - 128).name)
    if status == "failed":
        return Outcome(directory, "failed", result["error"])
    return Outcome(directory, "failed", _unsaid(code))


def _command(directory: Path, stage: str, shared: Cluster, *more: str) -> list[str]:
    """The command line of this machine's workers; several workers of one run are started by accelerate."""
    return command(shared, ["-m", "partial_lora.worker", str(directory.resolve()), "--stage", stage, *more])


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
        {**environment, **cluster_environment(shared)},
        directory / handover.LOG,
        watch,
        lock=lock,
        started=lambda worker: handover.name_holder(lock, worker),
        asked=asked,
    )
    if code and code not in _ASKED_TO_STOP:
        _blame(directory, failure, shared, code)
    return code


def _blame(directory: Path, failure: Failure | None, shared: Cluster, code: int) -> None:
    """Put into the record of a run that failed which process did first; process 0 may not have lived to write it."""
    result = handover.read_result(directory)
    if result is None:
        result = handover.new(yaml.safe_load((directory / handover.CONFIG).read_text(encoding="utf-8")))
    recorded = failure is None or (failure.rank == 0 and failure.said)
    if result["status"] == "running" or (result["status"] == "failed" and not recorded):
        reason = _unsaid(code) if failure is None else _who(failure, shared)
        files.write_json(directory / handover.RESULT, result | {"status": "failed", "error": redacted(reason)})


def _unsaid(code: int) -> str:
    ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return f"the worker was ended {ended} before it could say why"


def _who(failure: Failure, shared: Cluster) -> str:
    if failure.rank is None:
        return failure.reason
    return f"process {failure.rank} of {shared.processes} {'failed: ' if failure.said else ''}{failure.reason}"


def _follow(
    config: Config,
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
    if finished(directory) and not config.overwrite:
        return Outcome(directory, "skipped")
    before = handover.read_result(directory)
    environment = _environment(directory, shared.processes) | cluster_environment(shared)
    environment |= handover.variables(plain(config))
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
    result, machine = handover.read_result(directory) or {}, f"machine {shared.rank} of {shared.machines}"
    if result.get("status") == "finished" and (code == 0 or result != before):
        return Outcome(directory, "finished", f"{machine}: finished; the results are machine 0's: {directory}")
    reason = _unsaid(code) if failure is None else _who(failure, shared)
    if result.get("status") == "failed" and result != before and (failure is None or failure.said):
        reason = result["error"]  # of which this machine's failure is the echo
    return Outcome(directory, "failed", f"{machine}: {reason}")


def _await_record(directory: Path) -> None:
    """Wait until the run's record says how it ended, as long as one that has ended may take on a shared file system."""
    end = time.monotonic() + _RECORD
    while time.monotonic() < end and (handover.read_result(directory) or {}).get("status") == "running":
        time.sleep(0.5)


def refuse_foreign_world() -> None:
    """Raises PartialLoraError inside a world that torchrun or accelerate has already started."""
    size = os.environ.get("WORLD_SIZE")
    if size is not None and "RANK" in os.environ:
        raise PartialLoraError(
            f"WORLD_SIZE={size}: started inside a torchrun or accelerate world; partial-lora starts its own workers: "
            f"run `partial-lora train trainer.num_processes={size}` without a launcher"
        )


# --- A run as a command: launched, watched on the terminal, and what is said of it at its end.


def directory(config: Config, stage: str) -> Path:
    """Where the files of a stage ("train" or "calibrate") go."""
    return run_directory(config) if stage == "train" else calibration_directory(config)


def run(config: Config, stage: str, *, shown: bool = True, asked: Callable[[], Sequence[int]] = tuple) -> Outcome:
    """Launch a run and say how it ended.

    shown: on the terminal, with bars while it lasts and a table at its end; else silently. asked: the signals that the
    run is to take for received. Raises PartialLoraError as `launch.launch` does, and inside a foreign world.
    """
    refuse_foreign_world()
    place = directory(config, stage)
    finished = _finished(config) if stage == "train" else handover.is_calibrated
    if not shown:
        return launch(config, place, stage=stage, watch=_silent, finished=finished, asked=asked)
    from rich.console import Console

    from partial_lora import watch

    console = Console()
    console.print(f"{stage} {place}", highlight=False)
    with watch.Bars(console) as bars:
        outcome = launch(config, place, stage=stage, watch=bars.update, finished=finished, asked=asked)
    _show(outcome, stage, console)
    return outcome


def _finished(config: Config) -> Callable[[Path], bool]:
    """What says that a training needs not be run: that it left all its files, or that what it measured is kept."""
    if not config.keep_records:
        return handover.is_finished
    return lambda place: handover.is_finished(place) or handover.is_recorded(place)


def code(outcome: Outcome) -> int:
    """The exit code of a command whose only run ended so."""
    if outcome.status == "interrupted":
        return 128 + signal.Signals[outcome.message]
    return 1 if outcome.status == "failed" else 0


def reason(outcome: Outcome) -> str:
    """Why a run did not end well, in a line that says where to read on."""
    if outcome.status == "interrupted":
        return f"interrupted by {outcome.message}; the same command goes on from there"
    return f"{outcome.message} (log: {outcome.directory / handover.LOG})"


def _silent(event: dict) -> None:
    """Show nothing: other runs use the terminal, too."""


def _show(outcome: Outcome, stage: str, console) -> None:
    """Say how a run ended: why it did not end well, or the short table of its results."""
    from partial_lora.report import summary

    if outcome.status in ("interrupted", "failed"):
        print(f"partial-lora: {reason(outcome)}", file=sys.stderr)
        return
    if outcome.status == "skipped":
        console.print("finished before, not run again (overwrite=true runs it again)")
    if outcome.message:  # of one of several machines, whose results another one has
        console.print(outcome.message, highlight=False, soft_wrap=True)
        return
    result = handover.read_result(outcome.directory)
    closing = summary.summary if stage == "train" else summary.calibration_summary
    console.print(closing(result, outcome.directory))


# --- No code of the model hub runs here: what is fetched from it is data.

_ASKS_FOR_KERNELS = "bitsandbytes.backends.cpu.ops"  # the logger that tells the user to install them


def refuse_hub_code() -> None:
    """Keep libraries from fetching compiled kernels from the hub; to be called before any of them is imported.

    transformers does so for some kinds of attention, bitsandbytes on some processors as soon as it is imported, both by
    way of the package `kernels`; it computes without them, and its advice to install them is kept from the terminal.
    Code of a repository's own (trust_remote_code) is never asked for.
    """
    os.environ["USE_HUB_KERNELS"] = "NO"
    sys.modules.setdefault("kernels", None)  # for `import` and `find_spec` the same as not installed
    logging.getLogger(_ASKS_FOR_KERNELS).setLevel(logging.ERROR)
