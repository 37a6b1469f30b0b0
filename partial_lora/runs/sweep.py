"""Many runs by one of Hydra's launchers: told of as they go, stopped together, and summed up at the end."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from partial_lora import files as sealed
from partial_lora.errors import PartialLoraError
from partial_lora.files import redact_output
from partial_lora.progress import STOPPING, handling
from partial_lora.runs import directory as results
from partial_lora.runs import launch
from partial_lora.runs.compose import Plan
from partial_lora.runs.config import resolve
from partial_lora.runs.schema import Config

# --- What becomes of a sweep's jobs, told through files: jobs run in other processes, perhaps on other machines.

_SETTLE = 0.2  # seconds between two looks at a lock
_STOP = "stop"
_OWN: set[Path] = set()  # what this process has claimed


@dataclass(frozen=True)
class Ledger:
    """The entries of one sweep's jobs, by their numbers."""

    folder: Path

    @classmethod
    def opened(cls, sweep_dir: Path) -> Ledger:
        """A new ledger beside what Hydra writes of a sweep. Raises PartialLoraError where nothing can be written."""
        try:
            sweep_dir.mkdir(parents=True, exist_ok=True)
            return cls(Path(tempfile.mkdtemp(prefix=".jobs-", dir=sweep_dir)).resolve())
        except OSError as error:
            said = f"cannot write to {sweep_dir}: {error.strerror}; set it to a folder that can be written"
            raise PartialLoraError(f"results_dir: {said}") from error

    def close(self) -> None:
        """Remove the folder: what has not started never will."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, job: int, **entry: object) -> None:
        """Say how it stands with a job: its status, the overrides it is of, and whatever else there is to tell."""
        sealed.write_json(self.folder / f"{job}.json", entry)

    def entries(self) -> dict[int, dict]:
        """What the jobs have said so far, in the order of their numbers."""
        files = {int(path.stem): path for path in self.folder.glob("[0-9]*.json")}
        return {job: json.loads(files[job].read_text(encoding="utf-8")) for job in sorted(files)}

    def ask(self, number: int) -> None:
        """Have every job stop, as a signal of that number would; asked a second time they are killed."""
        with open(self.folder / _STOP, "a", encoding="utf-8") as file:
            file.write(f"{number}\n")

    def asked(self) -> list[int]:
        """The numbers of the signals that the jobs are to take for received, in their order."""
        try:
            return [int(line) for line in (self.folder / _STOP).read_text(encoding="utf-8").split()]
        except FileNotFoundError:
            return [] if self.folder.is_dir() else [signal.SIGTERM]

    @contextmanager
    def claimed(self, directory: Path) -> Iterator[bool]:
        """Have a run's directory to oneself among the jobs of this sweep; gives whether one of them had it before.

        Of jobs that are the same run one works and the others wait, unless they are asked to stop. The kernel ends a
        claim with the process that has it.
        """
        with open(self._claim(directory), "a+", encoding="utf-8") as file:
            while not sealed.lock(file.fileno()) and not self.asked():
                time.sleep(_SETTLE)
            file.seek(0)
            before = bool(file.read())
            _OWN.add(Path(file.name))
            try:
                yield before
            finally:
                _OWN.discard(Path(file.name))
            file.write("had\n")

    def is_under_way(self, directory: Path) -> bool:
        """True while a job in another process works in a run's directory, or a worker whose job has died."""
        if self._claim(directory) in _OWN:  # who asks is it: to wait for oneself would be without end
            return False
        return sealed.is_locked(self._claim(directory)) or sealed.is_locked(directory / results.LOCK)

    def is_orphaned(self, directory: Path) -> bool:
        """True where a worker is all that is left of a job."""
        return not sealed.is_locked(self._claim(directory)) and sealed.is_locked(directory / results.LOCK)

    def _claim(self, directory: Path) -> Path:
        return self.folder / f"{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]}.claim"


# --- One job of a sweep: what Hydra's launchers call, in this process or, pickled, in another one.


class JobFailedError(PartialLoraError):
    """What a sampler is told of a run that did not finish."""


def this_process() -> tuple[str, int]:
    """What tells this process from all others, on every machine."""
    return socket.gethostname(), os.getpid()


@dataclass(frozen=True)
class Job:
    """Does a run with a composed config, and leaves an entry about it in the sweep's ledger.

    Args:
        stage: "train" or "calibrate".
        configs: the settings of every job by its number; empty where a sampler chooses them.
        ledger: of the sweep.
        parent: the process of the sweep (`this_process`); jobs elsewhere are silent.
        sampled: a sampler chooses the jobs. It is given the validation metric, and an exception for a run that failed,
            to make of it what it does; a sweep over given combinations goes on instead.
    """

    stage: str
    configs: Sequence[Config]
    ledger: Ledger
    parent: tuple[str, int]
    sampled: bool

    def __call__(self, composed) -> float | None:
        """The primary metric on validation, or None where nothing was trained."""
        from hydra.core.hydra_config import HydraConfig

        hydra, here = HydraConfig.get(), self.parent == this_process()
        if not here:
            redact_output()
            launch.refuse_hub_code()
            _leave_the_terminal()
            os.chdir(hydra.runtime.cwd)
        number, entry = hydra.job.num, {"overrides": list(hydra.overrides.task), "begun": time.time()}
        if self.ledger.asked():
            return None
        try:
            config = self.configs[number] if self.configs else resolve(composed)
            entry |= {"directory": str(launch.directory(config, self.stage).resolve())}
            found = self._run(number, config, entry, here)
        except PartialLoraError as error:
            found = {"status": "refused", "code": 2, "reason": str(error)}
            if here:
                print(f"partial-lora: {error}", file=sys.stderr)
        except Exception as error:  # no other job is to hear of it
            traceback.print_exc()
            found = {"status": "failed", "code": 1, "reason": f"{type(error).__name__}: {error}"}
        if found is None:
            return None
        self.ledger.write(number, **entry, **found, seconds=time.time() - entry["begun"])
        if here and found["status"] == "interrupted":
            raise SystemExit(found["code"])
        if self.sampled and found["code"]:
            raise JobFailedError(found["reason"])
        return found.get("validation")

    def _run(self, number: int, config: Config, entry: dict, here: bool) -> dict | None:
        """How the run ended, and its metrics; None where it did not start, since the sweep is stopping."""
        with self.ledger.claimed(Path(entry["directory"])) as had_before:
            if self.ledger.asked():
                return None
            self.ledger.write(number, **entry, status="running", code=0)
            if self.ledger.asked():  # whoever stops a sweep asks first and then looks at what is running
                return {"status": "not started", "code": 0}
            if had_before:  # by another job of this sweep, which has overwritten what was there
                config = replace(config, overwrite=False)
            outcome = launch.run(config, self.stage, shown=here, asked=self.ledger.asked)
        found = {"status": outcome.status, "code": launch.code(outcome)}
        if found["code"]:
            interrupted = outcome.status == "interrupted"
            return found | {"reason": outcome.message if interrupted else launch.reason(outcome)}
        return found | _metrics(results.read_result(outcome.directory))


def _metrics(result: dict) -> dict:
    """What a table and a sampler want to know of a finished run or calibration."""
    if not result["metrics"]:
        return {"metric": "joint score", "test": (result["calibration"] or {}).get("joint")}
    test, validation = result["metrics"]["test"], result["metrics"]["validation"]
    return {
        "metric": f"test {test['primary']}",
        "test": test[test["primary"]],
        "validation": validation[validation["primary"]],
    }


def _leave_the_terminal() -> None:
    """Have Ctrl-C reach the sweep alone, which then asks its jobs: once, and those that have not begun, too."""
    with suppress(PermissionError):  # the launcher has started a session for it
        os.setpgid(0, 0)


# --- What became of the runs of a sweep, as a table.

_NONE = "–"  # for what does not apply
_LOST = "its process was ended before it could say why"
_LONGEST = 160  # characters of a reason in a table


@dataclass(frozen=True)
class Row:
    """One run: its name, how it ended, its exit code, and what there is to tell of it."""

    name: str
    status: str
    code: int
    seconds: float | None = None
    metric: str = ""
    test: float | None = None
    reason: str = ""


def rows(entries: Mapping[int, Mapping], names: Mapping[int, str], asked: Sequence[int]) -> list[Row]:
    """A row for every run.

    entries: what the jobs say, by their numbers. names: of all runs there should be, by their jobs' numbers. asked: the
    signals that stopped the sweep.
    """
    return [_row(name, entries.get(number), asked) for number, name in names.items()]


def _row(name: str, entry: Mapping | None, asked: Sequence[int]) -> Row:
    if entry is None:
        return Row(name, "not started", 0 if asked else 1)
    name = name or entry.get("directory") or " ".join(entry["overrides"])
    if entry["status"] == "running":  # its job did not live to say more
        stopped = f"interrupted by {signal.Signals(asked[0]).name}; run the command again to redo it" if asked else ""
        return (
            Row(name, "interrupted", 128 + asked[0], reason=stopped) if asked else Row(name, "failed", 1, reason=_LOST)
        )
    skipped = entry["status"] == "skipped"
    seconds = None if skipped else entry.get("seconds")
    metric, test, reason = entry.get("metric", ""), entry.get("test"), entry.get("reason", "")
    return Row(name, entry["status"], entry["code"], seconds, metric, test, reason)


def summary_lines(entry: Mapping) -> str:
    """An entry in a few words."""
    if entry["status"] == "running":
        return "started"
    if entry.get("test") is not None:
        return f"{entry['status']}, {entry['metric']} {entry['test']:.4f}"
    return f"{entry['status']}: {entry['reason']}" if entry.get("reason") else entry["status"]


def table(found: Sequence[Row]) -> Table:
    """The rows as they are printed; long reasons, said in full when they came up, are cut short."""
    metrics = {row.metric for row in found if row.metric}
    one = metrics.pop() if len(metrics) == 1 else None
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    drawn.add_column("run", overflow="fold")
    drawn.add_column("status", no_wrap=True)
    drawn.add_column("seconds", justify="right", no_wrap=True)
    drawn.add_column(one or "score", justify="right")
    if told := any(row.reason for row in found):
        drawn.add_column("why", overflow="fold")
    for row in found:
        seconds = _NONE if row.seconds is None else f"{row.seconds:,.1f}"
        test = _NONE if row.test is None else f"{row.test:.4f}" if one else f"{row.metric} {row.test:.4f}"
        reason = textwrap.shorten(row.reason, _LONGEST, placeholder=" …")
        drawn.add_row(Text(row.name), row.status, seconds, test, *([Text(reason)] if told else []))
    return drawn


def counted(found: Sequence[Row]) -> str:
    """How many runs ended in which way."""
    counts = Counter("skipped (finished before)" if row.status == "skipped" else row.status for row in found)
    runs = "1 run" if len(found) == 1 else f"{len(found)} runs"
    missing = any(row.code or row.status == "not started" for row in found)
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"{runs}: {told}" + ("; the same command again does what is missing" if missing else "")


_LOOK = 0.3  # seconds between two looks at what the jobs say
_PATIENCE = 3  # requests to stop after which jobs that do not are left alone


def sweep(plan: Plan, stage: str, hydra: Callable[[Job], None]) -> int:
    """Have Hydra call a job for every run of a plan, end with a table of what became of them, and give the exit code.

    The exit code is the highest of the runs: 0 finished or skipped, 1 failed, 2 refused, 128 and the signal's number
    where the sweep was stopped. hydra: sweeps with the job that it is given. Raises PartialLoraError where a sampler
    has nothing to go by.
    """
    _check_sampler(plan, stage)
    ledger, console = Ledger.opened(plan.sweep_dir), Console()
    configs = [] if plan.is_sampled else [config for _, config in plan.runs]
    job = Job(stage, configs, ledger, this_process(), plan.is_sampled)
    _quieten()
    begun = time.time()
    try:
        with _told(ledger, plan, console):
            trouble = _worked_through(plan, ledger, partial(hydra, job))
            with suppress(SystemExit), _stopping(ledger):  # once more: launchers set handlers of their own
                _settle(ledger)
        entries, asked = ledger.entries(), ledger.asked()
    finally:
        ledger.close()
    names = {number: plan.name(entry["overrides"]) for number, entry in entries.items()}
    if not plan.is_sampled:
        names = {number: plan.name(overrides) for number, (overrides, _) in enumerate(plan.runs)}
    found = rows(entries, names, asked)
    console.print(table(found))
    console.print(counted(found), highlight=False, soft_wrap=True)
    if plan.is_sampled:
        _tell_best(plan, begun, console)
    if trouble:
        print(f"partial-lora: {trouble}", file=sys.stderr)
    stopped = 128 + asked[0] if asked else 0
    return max([stopped, 1 if trouble else 0, *(row.code for row in found)])


def _worked_through(plan: Plan, ledger: Ledger, hydra: Callable[[], None]) -> str | None:
    """Let Hydra do the sweep; gives what went wrong beside the runs themselves, in a line."""
    try:
        with _stopping(ledger):
            hydra()
    except JobFailedError:
        at = " (hydra.sweeper.max_failure_rate says how many may)" if plan.sweeper == "optuna" else ""
        return f"hydra/sweeper={plan.sweeper} ended the sweep since a run failed{at}"
    except (SystemExit, KeyboardInterrupt) as stopped:
        if not ledger.asked():  # a handler of the launcher's, or a run in this process
            ledger.ask(_number(stopped))
    except PartialLoraError as error:  # out of Hydra
        return str(error)
    except Exception as error:  # out of a plug-in
        what = " ".join(str(error).split())
        return f"hydra/launcher={plan.launcher} hydra/sweeper={plan.sweeper}: {type(error).__name__}: {what}"
    return None


def _quieten() -> None:
    """Leave to this module what plug-ins would say of failed jobs, and signals to Python."""
    logging.getLogger("hydra_plugins").addHandler(logging.NullHandler())
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # it ends the process, its workers running on


def _check_sampler(plan: Plan, stage: str) -> None:
    if not plan.is_sampled:
        return
    if stage == "calibrate":
        raise PartialLoraError(f"hydra/sweeper={plan.sweeper}: calibrate has no validation metric; use it with train")
    task = plan.runs[0][1]["task"]
    by_perplexity = task["kind"] == "generation"
    metric = "perplexity" if by_perplexity else (task["metrics"] or ["accuracy"])[0]
    better = "minimize" if metric in ("perplexity", "mse") else "maximize"
    if not task["members"] and plan.direction not in (None, better):
        warning = f"hydra.sweeper.direction={plan.direction} seeks the worst {metric}; expected {better}"
        print(f"partial-lora: beware: {warning}", file=sys.stderr)


def _number(stopped: BaseException) -> int:
    if isinstance(stopped, KeyboardInterrupt):
        return signal.SIGINT
    number = stopped.code - 128 if isinstance(stopped.code, int) else 0
    return number if number in STOPPING else signal.SIGTERM  # launchers that handle it exit with codes of their own


@contextmanager
def _stopping(ledger: Ledger) -> Iterator[None]:
    """On a request to stop, have all jobs stop, wait for them, and leave; a second one has them killed."""

    def stop(number: int, frame: object) -> None:
        ledger.ask(number)
        asked = len(ledger.asked())
        if asked == 1:
            print("partial-lora: stopping …", file=sys.stderr)
            _settle(ledger)
        if asked in (1, _PATIENCE):
            raise SystemExit(128 + ledger.asked()[0])

    with handling(stop):
        yield


def _settle(ledger: Ledger) -> None:
    """Wait until no job is under way, and stop the workers of jobs that died: nobody would look after them."""
    told: set[Path] = set()
    while True:
        running = [Path(each["directory"]) for each in ledger.entries().values() if each["status"] == "running"]
        for directory in set(running) - told:
            if ledger.is_orphaned(directory) and _stop_worker(directory):
                told.add(directory)
        if not any(ledger.is_under_way(directory) for directory in running):
            return
        time.sleep(_LOOK)


def _stop_worker(directory: Path) -> bool:
    """Ask the worker that holds a directory's lock to stop; False where it is on another machine, or not named."""
    holder = (directory / results.LOCK).read_text(encoding="utf-8", errors="replace")
    found = re.search(r"on (\S+) \(worker: pid (\d+)\)", holder)
    if not found or found[1] != socket.gethostname():
        return False
    with suppress(ProcessLookupError):
        os.kill(int(found[2]), signal.SIGTERM)
    return True


@contextmanager
def _told(ledger: Ledger, plan: Plan, console: Console) -> Iterator[None]:
    """Say a line for each job in another process that starts or ends, while the block lasts."""
    ended = threading.Event()
    thread = threading.Thread(target=_tell, args=(ledger, plan, console, ended), daemon=True)
    if plan.launcher != "basic":
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.ident:
            thread.join()


def _tell(ledger: Ledger, plan: Plan, console: Console, ended: threading.Event) -> None:
    said: dict[int, str] = {}
    last = False
    while not last:
        last = ended.wait(_LOOK)  # and one more look
        for number, entry in ledger.entries().items():
            if said.get(number) == entry["status"]:
                continue
            said[number] = entry["status"]
            line = f"job {number}: {plan.name(entry['overrides'])}: {summary_lines(entry)}"
            if entry["code"]:
                print(f"partial-lora: {line}", file=sys.stderr)
            else:
                console.print(line, highlight=False, markup=False, soft_wrap=True)


def _tell_best(plan: Plan, begun: float, console: Console) -> None:
    """What the sampler found, if it wrote it down."""
    from omegaconf import OmegaConf

    file = plan.sweep_dir / "optimization_results.yaml"
    if file.is_file() and file.stat().st_mtime >= begun:
        found: Mapping = OmegaConf.to_container(OmegaConf.load(file))
        params = " ".join(f"{key}={value}" for key, value in (found.get("best_params") or {}).items())
        if params:
            best = f"best on validation: {found['best_value']:.4f} with {params}"
            console.print(best, highlight=False, markup=False, soft_wrap=True)
