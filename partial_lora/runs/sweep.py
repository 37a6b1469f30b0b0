"""Many runs by one of Hydra's launchers: told of as they go, stopped together, and summed up at the end."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from rich.console import Console

from partial_lora.errors import PartialLoraError
from partial_lora.runs import results, summing
from partial_lora.runs.job import Job, JobFailedError, this_process
from partial_lora.runs.ledger import Ledger
from partial_lora.runs.plan import Plan

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK = 0.3  # seconds between two looks at what the jobs say
_PATIENCE = 3  # requests to stop after which jobs that do not are left alone


def sweep(plan: Plan, stage: str, resolve: Callable[[object], dict], hydra: Callable[[Job], None]) -> int:
    """Have Hydra call a job for every run of a plan, end with a table of what became of them, and give the exit code.

    The exit code is the highest of the runs: 0 finished or skipped, 1 failed, 2 refused, 128 and the signal's number
    where the sweep was stopped. hydra: sweeps with the job that it is given. Raises PartialLoraError where a sampler
    has nothing to go by.
    """
    _check_sampler(plan, stage)
    ledger, console = Ledger.opened(plan.sweep_dir), Console()
    job = Job(stage, resolve, ledger, this_process(), plan.is_sampled)
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
    found = summing.rows(entries, names, asked)
    console.print(summing.table(found))
    console.print(summing.counted(found), highlight=False, soft_wrap=True)
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
    return number if number in _STOPPING else signal.SIGTERM  # launchers that handle it exit with codes of their own


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

    before = {number: signal.signal(number, stop) for number in _STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
            line = f"job {number}: {plan.name(entry['overrides'])}: {summing.said(entry)}"
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
