"""A comparison of methods at equal size: its entries, their sizes and times, and the runs that decide between them."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import psutil
from joblib import cpu_count

from partial_lora.building.build import task_of
from partial_lora.building.info import outline
from partial_lora.building.memory import kept_by_step
from partial_lora.compare.halving import (
    FINALISTS,
    QUARTER,
    Search,
    Trial,
    full,
    quick,
    runs_at_least,
    worth,
)
from partial_lora.compare.options import CANDIDATES, EVERY, FULL, LIMITS, TAKEN, Comparison
from partial_lora.errors import PartialLoraError, require
from partial_lora.files import grouped, is_locked
from partial_lora.launching import directory, launch
from partial_lora.launching.cluster import visible
from partial_lora.launching.packs import recorded
from partial_lora.launching.paths import at_other_rates, run_directory
from partial_lora.methods import METHODS
from partial_lora.settings import rates as learning_rates
from partial_lora.settings.compatibility import has_accelerator
from partial_lora.settings.compose import checked
from partial_lora.settings.schema import Config
from partial_lora.settings.versions import plain
from partial_lora.tasks.kinds import kind_of
from partial_lora.training.config import AUTO
from partial_lora.worker_events import handling

SIZES = (1.0, 0.5, 0.25, 0.13, 0.06, 0.03, 0.015)  # shares of dense LoRA's parameters that are tried under a limit
_TIMED = ("seed=0", "trainer.max_steps=3", "trainer.save_steps=3", "keep_records=true", "overwrite=false")
_TIMES = "timed"  # folder of timed runs in the results directory


@dataclass(eq=False)
class Entry:
    """A method at a size: its settings, where its search is centred, and what has become of it.

    overrides: on the command line of `train`, all but the seed and the learning rate. group: what it has in common with
    the entries that it is compared with. best: the learning rate, once it is found. refused: why it is not compared.
    killed: learning rates that were not tried, as their run was killed. overwrite: make finished runs again. done: the
    records of finished runs by directory. steps: of a run. tested: rows of test. timed: the record of a run of three
    steps, or of an earlier run.
    """

    method: str
    size: str
    overrides: tuple[str, ...]
    group: str = ""
    centre: float = 0.0
    parameters: int = 0
    served: int = 0
    steps: int = 0
    tested: int = 0
    best: float | None = None
    refused: str | None = None
    killed: list[float] = field(default_factory=list)
    overwrite: bool = False
    done: dict[Path, dict] = field(default_factory=dict)
    timed: dict | None = None
    composed: dict[tuple[float, int], Config] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.method}, {self.size}"

    def arguments(self, trials: Sequence[Trial]) -> list[str]:
        """Return the arguments of a sweep over trials of one seed."""
        rates = ",".join(f"{trial.rate!r}" for trial in trials)
        until = [] if trials[0].until == 1 else [f"trainer.until={trials[0].until:g}"]
        known = [self.composed.get(trial[:2]) for trial in trials]
        until += ["overwrite=false"] if self.overwrite and all(one and not one.overwrite for one in known) else []
        return ["-m", *self.overrides, f"seed={trials[0].seed}", f"trainer.learning_rate={rates}", *until]

    def configs(self, trials: Sequence[Trial]) -> dict[Trial, Config]:
        """Return the settings of trials of one seed, each composed once, since that takes its time."""
        new = [trial for trial in trials if trial[:2] not in self.composed]
        if new:
            runs = checked(self.arguments(new)).runs
            self.composed |= {trial[:2]: config for trial, (_, config) in zip(new, runs, strict=True)}
        configs = {trial: self.composed[trial[:2]] for trial in trials}
        return {
            trial: replace(config, trainer=replace(config.trainer, until=trial.until))
            for trial, config in configs.items()
        }

    @property
    def usual(self) -> Config:
        """The settings of the first seed at the rate where the search is centred."""
        (config,) = self.configs([Trial(self.centre, 0)]).values()
        return config

    def of_seed(self, seed: int) -> dict | None:
        """Return the record of a seed at the best rate."""
        records = (record for record in self.done.values() if record["config"]["trainer"]["learning_rate"] == self.best)
        return next((record for record in records if record["seed"] == seed), None)

    @property
    def seconds(self) -> float:
        """The seconds of a whole run: the mean of those that are done, or as its timed one has it."""
        if self.done:
            return fmean(sum(record["seconds"].values()) for record in self.done.values())
        if not self.timed:
            return 0.0
        seconds, steps = self.timed["seconds"], self.timed["training"]["steps"]
        step = self.step_seconds or 0.0
        apart = sum(seconds.values()) - min(steps * step, seconds["train"])
        return apart + _START + self.steps * step * (1 + _VALIDATION)

    @property
    def step_seconds(self) -> float | None:
        return (self.timed or {}).get("cost", {}).get("step_seconds")


_START, _VALIDATION = 5.0, 0.1  # seconds in which a run starts; time of validations, as a share of that of steps


def entries_of(methods: Sequence[str], budgets: Sequence[float], overrides: Sequence[str]) -> list[Entry]:
    """Return each method at every budget, or once if no budget resizes it, each entry checked as `train` checks it.

    overrides: settings of all of them. Raises PartialLoraError for what `train` would refuse. Responses count by their
    perplexity unless a metric is named, and then no texts are generated.
    """
    if not methods:
        return []
    (_, config), *_ = checked(["-m", *overrides, f"method={methods[0]}"]).runs
    kind = kind_of(config.task)
    if kind.answers == "text" and not config.task.metrics:
        overrides = (*overrides, f"task.metrics=[{kind.selects}]")
    own_calibration = any(override.startswith("calibration=") for override in overrides)
    result, rows = [], (0, 0)
    for method in dict.fromkeys(methods):
        traits = METHODS.get(method)
        if traits is None:  # a file that gives a method another name
            _, config = checked(["-m", *overrides, f"method={method}"]).runs[0]
            traits = config.method.traits
        for budget in [None] if traits.size == "own" else dict.fromkeys(budgets):
            chosen = [f"method={method}"]
            if budget is not None and traits.size_alone and not own_calibration:
                chosen.append("calibration=fixed")
            if traits.size != "own":
                chosen.append(f"calibration.budget={'null' if budget is None else budget}")
            size = "own size" if budget is None else str(budget)
            entry = Entry(method, size, (*overrides, *chosen))
            ((_, config),) = checked(["-m", *entry.overrides]).runs
            if not result:
                # All runs read these rows: what is wrong with them is said once, now.
                task = task_of(config, mixtures=True)
                rows = len(task.train), len(task.test)
            entry.overwrite, entry.group = config.overwrite, f"{config.task.name}, {config.model.name}, {size}"
            try:
                _measure(entry, config, *rows)
            except PartialLoraError as error:  # the method has no such size, or does not fit this model
                entry.refused = str(error)
            result.append(entry)
    return result


def _measure(entry: Entry, config: Config, trained: int, tested: int) -> None:
    """Fill in an entry's sizes, its steps, and the rung nearest to the learning rate that suits it.

    Rungs are a factor of two apart, for all methods from dense LoRA's rate on: its own, or the one that is set.
    """
    run = outline(config)
    usual = learning_rates.dense_rate(run.width)
    suited = learning_rates.auto(plain(config), width=run.width, density=run.density)
    dense = usual if config.trainer.learning_rate == AUTO else config.trainer.learning_rate
    entry.centre = dense * 2.0 ** round(math.log2(suited / usual))
    entry.parameters, entry.served = run.counts["adapter_trainable"], run.counts["adapter_bytes"]
    entry.steps, entry.tested = config.trainer.steps(trained), tested


Make = Callable[[Sequence[tuple[Entry, Trial]]], int]  # makes runs, returns an exit code


def prepared(comparison: Comparison, overrides: Sequence[str]) -> tuple[list[Entry], list[str]]:
    """Return the entries of a comparison, each at its size, and a line on each method that is left out.

    `methods=auto` takes the first candidates that have such a size, and the reference.
    """
    is_auto = comparison.methods == [EVERY]
    methods, lines = list(CANDIDATES) if is_auto else comparison.methods, []
    if comparison.serve:
        unserved = [method for method in methods if not _is_served(method, overrides)]
        methods = [method for method in methods if method not in unserved]
        lines += [f"{method}: left out, servers load LoRA's B and A alone" for method in unserved]
    chosen = entries_of(methods, SIZES if comparison.limit else comparison.budgets, overrides)
    share_threads(comparison.jobs or jobs_at_once(chosen))
    if comparison.limit:
        chosen = fitting(chosen, comparison.limit)
    if is_auto:
        alive = list(dict.fromkeys(entry.method for entry in chosen if entry.refused is None))
        lines += [f"{entry.name}: left out, {entry.refused}" for entry in chosen if entry.method not in alive]
        taken = [method for place, method in enumerate(alive) if place < TAKEN or method == comparison.reference]
        if later := ", ".join(method for method in alive if method not in taken):
            lines.append(f"{later}: left out, behind the others in the records (results/race); methods=[…] takes them")
        chosen = [entry for entry in chosen if entry.method in taken]
    return chosen, lines


def refuse_twins(entries: Sequence[Entry]) -> None:
    """Raise PartialLoraError for entries that one verdict cannot tell apart, or whose runs lie in several folders."""
    names = Counter((entry.group, entry.name) for entry in entries)
    for group, name in (twin for twin, count in names.items() if count > 1):
        raise PartialLoraError(
            f"methods: {name} is there twice in {group}, and one verdict cannot tell them apart; make each comparison "
            "by itself (python scripts/study.py NAME does)"
        )
    folders = {entry.usual.results_dir for entry in entries if entry.refused is None}
    require(len(folders) < 2, "results_dir", " and ".join(sorted(folders)), "one folder for a comparison")


def _is_served(method: str, overrides: Sequence[str]) -> bool:
    """Return whether servers can load what a method trains: products B A of LoRA."""
    (_, config), *_ = checked(["-m", *overrides, f"method={method}"]).runs
    chosen, traits = config.method, config.method.traits
    of_peft = chosen.peft_type == "LORA" and not (chosen.peft or {}).get("use_dora")
    return traits.product and (of_peft or chosen.peft_type is None)


def fitting(entries: Sequence[Entry], limit: Mapping[str, float]) -> list[Entry]:
    """Return each method at the largest of its sizes that meets a limit; one that none does is refused."""
    ((name, most),) = limit.items()
    kept = []
    for tried in grouped(entries, lambda entry: entry.method).values():
        tried = [entry for entry in tried if entry.refused is None] or tried[-1:]
        entry = next((entry for entry in tried if _meets(entry, name, most)), tried[-1])
        entry.group = entry.group.removesuffix(entry.size) + in_words(limit)  # still of one task and model
        kept.append(entry)
    return kept


def in_words(limit: Mapping[str, float]) -> str:
    """Return what entries under a limit have in common in place of a size."""
    ((name, most),) = limit.items()
    return f"{LIMITS[name][0]}, at most {in_units(name, most)}"


def _meets(entry: Entry, name: str, most: float) -> bool:
    """Return whether an entry keeps to a limit; one that does not, or cannot be told, is refused."""
    if entry.refused is None:
        value = cost_of(entry, name)
        if value is not None and value <= most:
            return True
        nearest = "unknown" if value is None else in_units(name, value)
        entry.refused = entry.refused or (
            f"limit.{name}={in_units(name, most)}: at {entry.size} of dense LoRA's parameters it takes {nearest}"
        )
    return False


def cost_of(entry: Entry, name: str) -> float | None:
    """Return what a limit is on, of an entry: in bytes or seconds."""
    if name == "served":
        return entry.served
    if name == "kept":
        return kept_by_step(entry.usual)
    time_entry(entry)
    if entry.timed is None:
        return None
    return entry.timed["peak_memory_bytes"] if name == "memory" else entry.step_seconds


def in_units(name: str, value: float) -> str:
    """Return a limit's value in words."""
    return f"{value:.3g} s" if LIMITS[name][1] == "seconds" else f"{value / 1e6:.3g} MB"


def time_entry(entry: Entry) -> None:
    """Give an entry the record of an earlier run of it, or else of one of three steps, made now.

    An entry whose run of three steps fails is refused. Raises SystemExit where that run was asked to stop.
    """
    if entry.timed is not None or entry.refused is not None:
        return
    for place in (run_directory(entry.usual), *at_other_rates(entry.usual)):
        record = recorded(place)
        if record and record["status"] == "finished" and record.get("cost"):
            entry.timed = record
            return
    short = [*entry.overrides, *_TIMED, f"results_dir={Path(entry.usual.results_dir) / _TIMES}"]
    ((_, config),) = checked(["-m", *short, f"trainer.learning_rate={entry.centre:g}"]).runs
    outcome = _one(config, 1.0)
    if outcome.status == "interrupted":
        print(f"{entry.name}: {outcome.reason}", file=sys.stderr)
        raise SystemExit(outcome.exit_code)
    record = recorded(run_directory(config))
    if record and record["status"] == "finished":
        entry.timed = record
    elif record and record["status"] == "failed":
        entry.refused = record["error"]


def jobs_at_once(chosen: Sequence[Entry]) -> int:
    """Return how many runs go side by side: as many as cores and free memory allow, or one for each accelerator.

    Where a run is not set to one process, it has all of them.
    """
    alive = [entry for entry in chosen if entry.refused is None]
    if not alive:
        return 1
    trainers = [entry.usual.trainer for entry in alive]
    if any(one.device != "cpu" and has_accelerator() for one in trainers):
        return len(visible()) if all(one.num_processes == 1 for one in trainers) else 1
    if any((one.num_processes or 1) > 1 for one in trainers):
        return 1
    largest = max((entry.timed["peak_memory_bytes"] for entry in alive if entry.timed), default=0)
    room = psutil.virtual_memory().available // largest if largest else cpu_count()
    return max(1, min(cpu_count(), room))


_THREADS = "OMP_NUM_THREADS"
_SHARED: dict[str, str] = {}  # what `share_threads` has set


def share_threads(jobs: int) -> None:
    """Have runs that go side by side share this machine's cores, unless the user has set OMP_NUM_THREADS."""
    if os.environ.get(_THREADS) == _SHARED.get(_THREADS) and (jobs > 1 or _SHARED):
        os.environ[_THREADS] = _SHARED[_THREADS] = str(max(1, cpu_count() // jobs))


def search_rates(chosen: Sequence[Entry], comparison: Comparison, make: Make, say: Callable[[str], None]) -> int:
    """Find the learning rate of every entry that is not refused, the searches side by side; return the exit code."""
    until = 1.0 if comparison.search == FULL else QUARTER
    searches: dict[Entry, Search] = {}
    trials: dict[Entry, list[Trial]] = {}
    for entry in chosen:
        if entry.refused is not None:
            continue
        rates = [] if entry.overwrite else known_rates(entry, until)
        if comparison.search == FULL:
            searches[entry] = full(entry.centre, comparison.rates, comparison.seeds, rates)
        else:
            searches[entry] = quick(entry.centre, comparison.rates, rates)
        trials[entry] = next(searches[entry])
    while trials:
        code = make_missing([(entry, trial) for entry, batch in trials.items() for trial in batch], make)
        if code > 2:
            return code
        for entry, batch in list(trials.items()):
            records = {trial: recorded(place) for trial, place in places_of(entry, batch).items()}
            entry.killed += [trial.rate for trial, record in records.items() if _was_killed(record)]
            try:
                trials[entry] = searches[entry].send({trial: worth(records[trial], trial.until) for trial in batch})
                continue
            except StopIteration as end:
                entry.best = end.value
            del trials[entry]
            if entry.best is None:
                errors = [record["error"] for record in records.values() if record and record.get("error")]
                entry.refused = errors[0] if errors else "no run of it finished"
            say(f"{entry.name}: " + (entry.refused or f"learning rate {entry.best:g}"))
    return 0


def make_missing(runs: Sequence[tuple[Entry, Trial]], make: Make) -> int:
    """Make those of the runs that are not recorded, and add them to the entries' records; return the exit code."""
    places = {
        (entry, trial): place for entry, trials in _by_entry(runs) for trial, place in places_of(entry, trials).items()
    }
    new = [
        run
        for run, place in places.items()
        if (run[0].overwrite and place not in run[0].done) or worth(recorded(place), run[1].until) is None
    ]
    code = make(new) if new else 0  # a record is enough: what is compared needs no weights
    for entry, trial in new:  # which goes on where it has paused, and does not begin again
        entry.composed[trial[:2]] = replace(entry.composed[trial[:2]], overwrite=False)
    if code > 2:
        return code
    if held := [str(places[run]) for run in new if is_locked(places[run] / directory.LOCK)]:
        raise PartialLoraError(f"{held[0]} is in use by another process: run this again when it has ended")
    for (entry, _), place in places.items():
        record = recorded(place)
        if worth(record) is not None:
            entry.done[place] = record
    return code


def _by_entry(runs: Sequence[tuple[Entry, Trial]]) -> list[tuple[Entry, list[Trial]]]:
    """Return the trials of each entry, of one seed and one share each."""
    parts = grouped(runs, lambda run: (run[0], run[1].seed, run[1].until))
    return [(entry, [trial for _, trial in part]) for (entry, *_), part in parts.items()]


def by_sweeps(runs: Sequence[tuple[Entry, Trial]], sweep: Callable[[list[str]], int]) -> int:
    """Make runs by sweeps of `train`, whose launcher may be that of a cluster; return the exit code."""
    codes = [0]
    for entry, trials in _by_entry(runs):
        codes.append(sweep(entry.arguments(trials)))
        if codes[-1] > 2:
            break
    return max(codes)


def side_by_side(
    runs: Sequence[tuple[Entry, Trial]], jobs: int, ended: Callable[[Entry, Trial, launch.Outcome], None]
) -> int:
    """Make runs on this machine, so many at a time, which share its cores; return the exit code.

    A request to stop goes on to all that are under way.
    """
    requests: list[int] = []
    waiting = [
        (entry, trial, config) for entry, trials in _by_entry(runs) for trial, config in entry.configs(trials).items()
    ]
    under_way: dict[Future, tuple[Entry, Trial]] = {}
    slots: dict[Future, int] = {}
    for _, _, config in waiting[:1]:
        launch.ready_to_fork(config)
    with ThreadPoolExecutor(jobs) as pool, handling(lambda number, frame: requests.append(number)):
        try:
            while under_way or (waiting and not requests):
                while waiting and len(under_way) < jobs and not requests:
                    entry, trial, config = waiting.pop(0)
                    slot = min({*range(jobs)} - {slots[run] for run in under_way})
                    run = pool.submit(_one, config, trial.until, lambda: requests, slot)
                    under_way[run], slots[run] = (entry, trial), slot
                for future in wait(under_way, timeout=_LOOK, return_when=FIRST_COMPLETED).done:
                    ended(*under_way.pop(future), future.result())
        except BaseException:
            requests.append(signal.SIGTERM)
            raise
    return 128 + requests[0] if requests else 0


def _one(config: Config, until: float, stop: Callable[[], Sequence[int]] = tuple, slot: int = 0) -> launch.Outcome:
    """Make a run, once no other process has it; one that came as far there is not made again."""
    place = run_directory(config)
    while not stop():
        if is_locked(place / directory.LOCK):
            time.sleep(_LOOK)
            continue
        if not config.overwrite and worth(recorded(place), until) is not None:
            break
        try:
            return launch.launch(config, "train", stop=stop, slot=slot)
        except PartialLoraError:
            if not is_locked(place / directory.LOCK):
                raise
    return launch.Outcome(place, "skipped")


_LOOK = 0.3  # seconds between two looks at requests to stop


def in_time(seconds: float) -> str:
    """Return a time in words."""
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"


def runs_of_each(comparison: Comparison, seeds: int) -> float:
    """Return how many whole runs a method takes, search included, if so many seeds decide; more at edges."""
    if comparison.search == FULL:
        return runs_at_least(comparison.rates, seeds)
    return comparison.rates * QUARTER + FINALISTS * (1 - QUARTER) + seeds - 1


def places_of(entry: Entry, trials: Sequence[Trial]) -> dict[Trial, Path]:
    """Return the directory of every trial of one seed."""
    return {trial: run_directory(config) for trial, config in entry.configs(trials).items()}


def known_rates(entry: Entry, until: float) -> list[float]:
    """Return the learning rates at which runs of an entry's first seed are recorded, up to a share of their steps.

    Those of runs that were killed are among them, to be tried again; a rate that made its run fail is not.
    """
    records = (recorded(place) for place in at_other_rates(entry.usual))
    tried = (record for record in records if worth(record, until) is not None or _was_killed(record))
    return sorted({record["config"]["trainer"]["learning_rate"] for record in tried} - {AUTO})


def _was_killed(record: Mapping | None) -> bool:
    return bool(record and record.get(directory.KILLED))
