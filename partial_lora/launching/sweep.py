"""Many runs by one of Hydra's launchers: reported as they go, stopped together, and summed up at the end."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
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

from partial_lora import credentials, files
from partial_lora.errors import PartialLoraError, kind_and_line
from partial_lora.launching import directory, imports, launch, packs
from partial_lora.settings.compose import Plan
from partial_lora.settings.schema import Config
from partial_lora.signals import STOPPING, handling

_LOOK = 0.3  # seconds between two looks at the jobs
_PATIENCE = 3  # requests to stop after which the sweep leaves, whether its jobs have stopped or not


def sweep(plan: Plan, stage: str, run: Callable[..., launch.Outcome], hydra: Callable[[Job], None]) -> int:
    """Have Hydra call a job for every run of a plan, say what became of them, and return the exit code.

    The exit code is the highest of the runs: 0 finished or skipped, 1 failed, 2 refused, 128 and the signal's number
    where the sweep was stopped.

    Args:
        stage: of every run, "train" or "calibrate".
        run: runs a stage with settings, as `commands.train_or_calibrate.run` does; jobs in other processes import it
            by its name.
        hydra: sweeps with the job that it is given.

    """
    configs = [config for _, config in plan.runs]
    # This module reports failed jobs in place of the plug-ins, and Python handles signals in place of Ray.
    logging.getLogger("hydra_plugins").addHandler(logging.NullHandler())
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # Ray's would end this process, not its workers
    ledger = Ledger.new(plan.sweep_dir)
    with ledger.held():
        job = Job(stage, run, configs, ledger, this_process())
        if plan.launcher == "joblib":
            _end_processes_of_joblib(ledger)
        with _reporting(ledger, plan):
            trouble = _sweep(plan, ledger, partial(hydra, job))
            with suppress(SystemExit), _stopping(ledger):  # once more: launchers set handlers of their own
                _settle(ledger)
        entries, stops = ledger.entries(), ledger.stops()
    names = {number: plan.name(overrides) for number, (overrides, _) in enumerate(plan.runs)}
    runs = rows(entries, names, stops)
    if {row["status"] for row in runs} == {"skipped"}:
        number = "1 run is" if len(runs) == 1 else f"{len(runs)} runs are"
        done = f"{stage.removesuffix('e')}ed"
        print(f"{number} recorded, none was {done}; overwrite=true or another results_dir {stage}s them")
    else:
        Console().print(table(runs))
        print(counts(runs))
    if trouble:
        print(f"partial-lora: {trouble}", file=sys.stderr)
    stopped = 128 + stops[0] if stops else 0
    return max([stopped, 1 if trouble else 0, *(row["code"] for row in runs)])


def _sweep(plan: Plan, ledger: Ledger, hydra: Callable[[], None]) -> str | None:
    """Let Hydra do the sweep; return what went wrong beside the runs themselves, in a line."""
    try:
        with _stopping(ledger):
            hydra()
    except KeyboardInterrupt:  # from the launcher's handler, or from a run in this process, as is SystemExit
        if not ledger.stops():
            ledger.stop(signal.SIGINT)
    except SystemExit as stopped:
        number = stopped.code - 128 if isinstance(stopped.code, int) else 0
        if not ledger.stops():
            ledger.stop(number if number in STOPPING else signal.SIGTERM)  # launchers exit with codes of their own
    except PartialLoraError as error:  # out of Hydra
        return str(error)
    except Exception as error:  # out of a plug-in
        return f"hydra/launcher={plan.launcher}: {kind_and_line(error)}"
    return None


@contextmanager
def _stopping(ledger: Ledger) -> Iterator[None]:
    """On a request to stop, have all jobs stop, wait for them, and leave; a second one has them killed."""

    def stop(number: int, frame: object) -> None:
        ledger.stop(number)
        requests = len(ledger.stops())
        if requests == 1:
            print("partial-lora: stopping …", file=sys.stderr)
            _settle(ledger)
        if requests in (1, _PATIENCE):
            raise SystemExit(128 + ledger.stops()[0])

    with handling(stop):
        yield


def _settle(ledger: Ledger) -> None:
    """Wait until no job in another process is under way, nor the worker of one that died: that ends by itself."""
    while any(map(ledger.is_under_way, ledger.entries().values())):
        time.sleep(_LOOK)


@contextmanager
def _reporting(ledger: Ledger, plan: Plan) -> Iterator[None]:
    """Print a line for each job in another process that starts or ends, but of recorded runs, while the block lasts."""
    ended = threading.Event()

    def report() -> None:
        printed: dict[int, str] = {}
        last = False
        while not last:
            last = ended.wait(_LOOK)  # and one more look
            for number, entry in ledger.entries().items():
                if printed.get(number) == entry["status"] or not entry.get("is_new", True):
                    continue
                printed[number] = entry["status"]
                line = f"job {number}: {plan.name(entry['overrides'])}: {_in_words(entry)}"
                if entry["code"]:
                    print(f"partial-lora: {line}", file=sys.stderr)
                else:
                    print(line, flush=True)

    thread = threading.Thread(target=report, daemon=True)
    if plan.launcher != "basic":
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.ident:
            thread.join()


def _in_words(entry: Mapping) -> str:
    if entry["status"] == "running":
        return "started"
    if entry.get("test") is not None:
        return f"{entry['status']}, {entry['metric']} {entry['test']:.4f}"
    return f"{entry['status']}: {entry['reason']}" if entry.get("reason") else entry["status"]


# --- One job of a sweep: what Hydra's launchers call, in this process or, pickled, in another one.


def this_process() -> tuple[str, int]:
    """Return what tells this process from all others, on every machine."""
    return socket.gethostname(), os.getpid()


@dataclass(frozen=True)
class Job:
    """Runs a stage with the settings of one run, and leaves an entry about it in the sweep's ledger.

    Args:
        stage: "train" or "calibrate".
        run: as `sweep` takes it.
        configs: the settings of every job, by its number.
        ledger: of the sweep.
        parent: the process of the sweep (`this_process`); jobs elsewhere are silent.
    """

    stage: str
    run: Callable[..., launch.Outcome]
    configs: Sequence[Config]
    ledger: Ledger
    parent: tuple[str, int]

    def __call__(self, composed: object) -> None:
        """Run the job whose number Hydra has set; what it has composed is in `configs`."""
        with _at_work:
            self._run()

    def _run(self) -> None:
        from hydra.core.hydra_config import HydraConfig

        hydra, here = HydraConfig.get(), self.parent == this_process()
        if not here:
            if self.parent[0] == socket.gethostname():
                end_with_sweep(self.ledger)
            credentials.redact_output()
            imports.refuse_hub_code()
            with suppress(PermissionError):  # the launcher has started a session for it
                os.setpgid(0, 0)  # Ctrl-C reaches the sweep alone, which then stops all its jobs, once
            os.chdir(hydra.runtime.cwd)
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # others may start beside it, on the same cores
        number, entry = hydra.job.num, {"overrides": list(hydra.overrides.task), "begun": time.time()}
        if self.ledger.stops():
            return
        try:
            config = self.configs[number]
            place = launch.directory_of(config, self.stage)
            entry |= {"directory": str(place.resolve()), "is_new": not launch.is_done(config, self.stage, place)}
            end = self._end(number, config, entry, here)
        except PartialLoraError as error:
            end = {"status": "refused", "code": 2, "reason": str(error)}
            if here:
                print(f"partial-lora: {error}", file=sys.stderr)
        except Exception as error:  # it must not end the other jobs
            traceback.print_exc()
            end = {"status": "failed", "code": 1, "reason": kind_and_line(error)}
        if end is None:
            return
        self.ledger.write(number, **entry, **end, seconds=time.time() - entry["begun"])
        if here and end["status"] == "interrupted":
            raise SystemExit(end["code"])

    def _end(self, number: int, config: Config, entry: dict, here: bool) -> dict | None:
        """Return how the run ended, and its metrics; None where it did not start, since the sweep is stopping."""
        with self.ledger.claimed(Path(entry["directory"])) as had_before:
            if self.ledger.stops():
                return None
            self.ledger.write(number, **entry, status="running", code=0, here=here)
            if self.ledger.stops():  # whoever stops a sweep first writes that and then looks at what is running
                return {"status": "not started", "code": 0}
            if had_before:  # another job of this sweep has overwritten what was there
                config = replace(config, overwrite=False)
            shown = here and entry["is_new"]
            outcome = self.run(config, self.stage, shown=shown, stop=self.ledger.stops, slot=number)
        end = {"status": outcome.status, "code": outcome.exit_code}
        if end["code"]:
            return end | {"reason": outcome.signal if outcome.status == "interrupted" else outcome.reason}
        result = packs.recorded(outcome.directory)
        if outcome.status == directory.PAUSED:
            return end
        if not result["metrics"]:
            return end | {"metric": "joint score", "test": (result["calibration"] or {}).get("joint")}
        test = result["metrics"]["test"]
        return end | {"metric": f"test {test['primary']}", "test": test[test["primary"]]}


# --- What becomes of a sweep's jobs, through files: jobs run in other processes, perhaps on other machines. Hydra's
# JobReturn comes once all jobs have ended, and not at all when the process of one dies; its on_job_end callback runs in
# the job's process and would need these files, too.

_WAIT = 0.2  # seconds between two looks at a lock
_STOP = "stop"
_SWEEP = "sweep"  # a file that the process of the sweep has locked


@dataclass(frozen=True)
class Ledger:
    """The entries of one sweep's jobs, by their numbers."""

    folder: Path

    @classmethod
    def new(cls, sweep_dir: Path) -> Ledger:
        """Return a new ledger beside what Hydra writes of a sweep; raises PartialLoraError where nothing can be."""
        try:
            sweep_dir.mkdir(parents=True, exist_ok=True)
            return cls(Path(tempfile.mkdtemp(prefix=".jobs-", dir=sweep_dir)).resolve())
        except OSError as error:
            raise directory.unwritable(sweep_dir, error) from error

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the ledger while the block lasts, then remove it. The kernel ends the hold with this process."""
        with open(self.folder / _SWEEP, "w", encoding="utf-8") as file:
            files.lock(file.fileno())
            try:
                yield
            finally:
                self.close()

    def close(self) -> None:
        """Remove the folder: what is under way stops, and what has not started never will."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, job: int, **entry: object) -> None:
        """Write the entry of a job: its status, its overrides, and whatever else is known of it."""
        files.write_json(self.folder / f"{job}.json", entry)

    def entries(self) -> dict[int, dict]:
        """Return the entries so far, in the order of the jobs' numbers."""
        paths = {int(path.stem): path for path in self.folder.glob("[0-9]*.json")}
        return {job: files.read_json(paths[job]) for job in sorted(paths)}

    def stop(self, number: int) -> None:
        """Have every job stop, as a signal of that number would; a second time they are killed."""
        with open(self.folder / _STOP, "a", encoding="utf-8") as file:
            file.write(f"{number}\n")

    def stops(self) -> list[int]:
        """Return the numbers of the signals that the jobs are to treat as received, in their order."""
        try:
            return [int(line) for line in (self.folder / _STOP).read_text(encoding="utf-8").split()]
        except FileNotFoundError:
            return [] if self.folder.is_dir() else [signal.SIGTERM]

    @contextmanager
    def claimed(self, run: Path) -> Iterator[bool]:
        """Claim a run's directory among the jobs of this sweep; yield whether another of them has done it.

        Of several jobs for one run, one works and the others wait, unless they are to stop. The kernel ends a claim
        with the process that has it.
        """
        with open(self._claim(run), "a+", encoding="utf-8") as file:
            while not files.lock(file.fileno()) and not self.stops():
                time.sleep(_WAIT)
            file.seek(0)
            yield bool(file.read())
            file.write("had\n")

    def is_under_way(self, entry: Mapping) -> bool:
        """Return whether a job in another process works in a run's directory, or a worker whose job has died."""
        if entry["status"] != "running" or entry["here"]:  # a process must not wait for itself
            return False
        run = Path(entry["directory"])
        return files.is_locked(self._claim(run)) or files.is_locked(run / directory.LOCK)

    def _claim(self, run: Path) -> Path:
        return self.folder / f"{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]}.claim"


_at_work = threading.Lock()  # of the one job that a process can have at a time


@functools.cache  # once in a process, whatever number of jobs it gets
def end_with_sweep(ledger: Ledger) -> None:
    """Have this process stop its job, if any, and end once the sweep's process has ended, by kill -9 too."""

    def wait() -> None:
        with suppress(FileNotFoundError), open(ledger.folder / _SWEEP, "r+b") as file:  # NFS locks what may be written
            files.lock(file.fileno(), wait=True)
        ledger.close()
        with _at_work:
            os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _end_processes_of_joblib(ledger: Ledger) -> None:
    """Have joblib's processes end with the sweep before they get a job, too: some never do, and wait for minutes."""
    from joblib.parallel import LokyBackend, register_parallel_backend

    backend = partial(LokyBackend, initializer=end_with_sweep, initargs=(ledger,))
    register_parallel_backend("loky", backend)


# --- The runs of a sweep as a table, or a line.

_NONE = "–"  # for what does not apply
_LONGEST = 160  # characters of a reason in a table


def rows(entries: Mapping[int, Mapping], names: Mapping[int, str], stops: Sequence[int]) -> list[dict]:
    """Return name, status and exit code of every run, and its seconds, metric and test score, or reason.

    entries: of the jobs, by their numbers. names: of all runs there should be, by their jobs' numbers. stops: the
    signals that stopped the sweep.
    """
    table = []
    for number, name in names.items():
        entry = entries.get(number)
        if entry is None:
            end = {"status": "not started", "code": 0 if stops else 1}
        elif entry["status"] != "running":
            end = entry
        elif stops:  # its job did not live to write more
            reason = f"interrupted by {signal.Signals(stops[0]).name}; run the command again to redo it"
            end = {"status": "interrupted", "code": 128 + stops[0], "reason": reason}
        else:
            end = {"status": "failed", "code": 1, "reason": "its process was ended before it could say why"}
        table.append({**end, "name": name or (entry or {}).get("directory", "")})
    return table


def table(runs: Sequence[Mapping]) -> Table:
    """Return the rows as they are printed; long reasons, printed in full when they came up, are cut short."""
    metrics = {row["metric"] for row in runs if "metric" in row}
    one = metrics.pop() if len(metrics) == 1 else None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("run", overflow="fold")
    table.add_column("status", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column(one or "score", justify="right")
    if with_reasons := any("reason" in row for row in runs):
        table.add_column("why", overflow="fold")
    for row in runs:
        seconds = f"{row['seconds']:,.1f}" if "seconds" in row and row["status"] != "skipped" else _NONE
        test = _NONE if row.get("test") is None else f"{'' if one else row['metric']} {row['test']:.4f}".lstrip()
        reason = [Text(textwrap.shorten(row.get("reason", ""), _LONGEST, placeholder=" …"))] if with_reasons else []
        table.add_row(Text(row["name"]), row["status"], seconds, test, *reason)
    return table


def counts(runs: Sequence[Mapping]) -> str:
    """Return how many runs ended in which way, in a line."""
    ends = Counter("skipped (finished before)" if row["status"] == "skipped" else row["status"] for row in runs)
    number = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    missing = any(row["code"] or row["status"] == "not started" for row in runs)
    line = f"{number}: {', '.join(f'{count} {status}' for status, count in ends.items())}"
    return line + ("; the same command again does what is missing" if missing else "")
