"""Candidates of a comparison: methods at their sizes, what each costs, and what has become of it."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import psutil
from joblib import cpu_count

from partial_lora.building.build import task_of
from partial_lora.building.info import outline
from partial_lora.building.memory import kept_by_step
from partial_lora.compare.options import CANDIDATES, EVERY, LIMITS, Options
from partial_lora.compare.rate_search import SURVIVORS, Trial, validation_of
from partial_lora.errors import PartialLoraError, require
from partial_lora.files import grouped
from partial_lora.launching import pool
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

SIZES = (1.0, 0.5, 0.25, 0.13, 0.06, 0.03, 0.015)  # shares of dense LoRA's parameters that are tried under a limit
_TIMED = ("seed=0", "trainer.max_steps=3", "trainer.save_steps=3", "keep_records=true", "overwrite=false")
_TIMES = "timed"  # folder of timed runs in the results directory


@dataclass(frozen=True, eq=False)
class Candidate:
    """A method at a size.

    overrides: its settings on the command line of `train`, all but the seed and the learning rate. group: what it has
    in common with those that it is compared with. centre: the learning rate where its search begins. parameters: that
    train; served: bytes of the file that is served. steps: of a run. tested: rows of test. overwrite: finished runs
    are made again. unfit: why it is not compared. timed: the record of a run of three steps, or of an earlier run.
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
    overwrite: bool = False
    unfit: str | None = None
    timed: dict | None = None
    _composed: dict[tuple[float, int], Config] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return f"{self.method}, {self.size}"

    def arguments(self, trials: Sequence[Trial], *more: str) -> list[str]:
        """Return the arguments of a sweep over trials of one seed and share; more: settings of them all."""
        rates = ",".join(f"{trial.rate!r}" for trial in trials)
        until = [] if trials[0].until == 1 else [f"trainer.until={trials[0].until:g}"]
        last = [f"seed={trials[0].seed}", f"trainer.learning_rate={rates}", *until, *more]
        keys = {setting.partition("=")[0] for setting in last}  # which would have no effect before these
        return ["-m", *(one for one in self.overrides if one.lstrip("+").partition("=")[0] not in keys), *last]

    def configs(self, trials: Sequence[Trial]) -> dict[Trial, Config]:
        """Return the settings of trials of one seed, each composed once, since that takes its time."""
        new = [trial for trial in trials if trial[:2] not in self._composed]
        if new:
            runs = checked(self.arguments(new)).runs
            self._composed.update({trial[:2]: config for trial, (_, config) in zip(new, runs, strict=True)})
        configs = {trial: self._composed[trial[:2]] for trial in trials}
        return {
            trial: replace(config, trainer=replace(config.trainer, until=trial.until))
            for trial, config in configs.items()
        }

    @property
    def usual(self) -> Config:
        """The settings of the first seed at the rate where the search is centred."""
        (config,) = self.configs([Trial(self.centre, 0)]).values()
        return config

    @property
    def seconds(self) -> float:
        """The seconds of a whole run, as its timed one has it."""
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


@dataclass(frozen=True)
class Half:
    """What a method came to after half a run. loss: on validation; last: that of the last that went on by its place."""

    rate: float
    loss: float
    place: int
    methods: int
    last: float

    @property
    def reason(self) -> str:
        """Why it went no further."""
        stood = f"after half a run at {self.rate:g} it had a validation loss of {self.loss:.4g}, place {self.place}"
        return f"dropped: {stood} of {self.methods}; place {SURVIVORS} had {self.last:.4g}"


@dataclass(eq=False)
class Entrant:
    """What has become of a candidate so far; `comparison` alone changes it.

    best: the learning rate, once it is found. failed: why it could not be trained. dropped: what it came to after half
    a run, if it went no further. killed: learning rates that were not
    tried, as their run was killed. records: of finished runs, by directory. made: rates and seeds of the runs that this
    comparison has made: where finished runs are overwritten, these are not.
    """

    candidate: Candidate
    best: float | None = None
    failed: str | None = None
    dropped: Half | None = None
    killed: list[float] = field(default_factory=list)
    records: dict[Path, dict] = field(default_factory=dict)
    made: set[tuple[float, int]] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def refused(self) -> str | None:
        """Why it is not among those that are compared, or is no more."""
        return self.candidate.unfit or self.failed or (self.dropped and self.dropped.reason)

    @property
    def seconds(self) -> float:
        """The seconds of a whole run: the mean of those that are done, or as its timed one has it."""
        done = [sum(record["seconds"].values()) for record in self.records.values()]
        return fmean(done) if done else self.candidate.seconds

    @property
    def seeds(self) -> int:
        """How many seeds are done at the best rate."""
        return len(self.best_places())

    def best_places(self) -> dict[int, Path]:
        """Return the directories of the runs at the best rate, by seed."""
        return {
            record["seed"]: place
            for place, record in self.records.items()
            if record["config"]["trainer"]["learning_rate"] == self.best
        }

    def of_seed(self, seed: int) -> dict | None:
        """Return the record of a seed at the best rate."""
        place = self.best_places().get(seed)
        return None if place is None else self.records[place]

    def configs(self, trials: Sequence[Trial]) -> dict[Trial, Config]:
        """Return the settings of trials of one seed; one that was made here goes on from where it has paused."""
        return {
            trial: replace(config, overwrite=config.overwrite and trial[:2] not in self.made)
            for trial, config in self.candidate.configs(trials).items()
        }

    def arguments(self, trials: Sequence[Trial]) -> list[str]:
        """Return the arguments of a sweep over trials of one seed and share."""
        goes_on = self.candidate.overwrite and all(trial[:2] in self.made for trial in trials)
        return self.candidate.arguments(trials, *(["overwrite=false"] if goes_on else []))

    def places(self, trials: Sequence[Trial]) -> dict[Trial, Path]:
        """Return the directory of every trial of one seed."""
        return {trial: run_directory(config) for trial, config in self.candidate.configs(trials).items()}


def candidates_of(methods: Sequence[str], budgets: Sequence[float], overrides: Sequence[str]) -> list[Candidate]:
    """Return each method at every budget, or once if no budget resizes it, each checked as `train` checks it.

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
            ((_, config),) = checked(["-m", *overrides, *chosen]).runs
            if not result:
                # All runs read these rows: what is wrong with them is said once, now.
                task = task_of(config, mixtures=True)
                rows = len(task.train), len(task.test)
            group = f"{config.task.name}, {config.model.name}, {size}"
            candidate = Candidate(method, size, (*overrides, *chosen), group, overwrite=config.overwrite)
            try:
                result.append(_sized(candidate, config, *rows))
            except PartialLoraError as error:  # the method has no such size, or does not fit this model
                result.append(replace(candidate, unfit=str(error)))
    return result


def _sized(candidate: Candidate, config: Config, trained: int, tested: int) -> Candidate:
    """Return a candidate with its sizes, its steps, and the rung nearest to the learning rate that suits it.

    Rungs are a factor of two apart, for all methods from dense LoRA's rate on: its own, or the one that is set.
    trained, tested: rows.
    """
    run = outline(config)
    usual = learning_rates.dense_rate(run.width)
    suited = learning_rates.auto(plain(config), width=run.width, density=run.density)
    dense = usual if config.trainer.learning_rate == AUTO else config.trainer.learning_rate
    return replace(
        candidate,
        centre=dense * 2.0 ** round(math.log2(suited / usual)),
        parameters=run.counts["adapter_trainable"],
        served=run.counts["adapter_bytes"],
        steps=config.trainer.steps(trained),
        tested=tested,
    )


def prepared(options: Options, overrides: Sequence[str]) -> tuple[list[Candidate], list[str]]:
    """Return the candidates of a comparison, each at its size, and a line on each method that is left out.

    `methods=auto` takes all candidates that have such a size.
    """
    is_auto = options.methods == [EVERY]
    methods, lines = list(CANDIDATES) if is_auto else options.methods, []
    if options.serve:
        unserved = [method for method in methods if not _is_served(method, overrides)]
        methods = [method for method in methods if method not in unserved]
        lines += [f"{method}: left out, servers load LoRA's B and A alone" for method in unserved]
    chosen = candidates_of(methods, SIZES if options.limit else options.budgets, overrides)
    pool.share_threads(options.jobs or jobs_at_once(chosen))
    if options.limit:
        chosen = fitting(chosen, options.limit)
    if is_auto:
        fit = {candidate.method for candidate in chosen if candidate.unfit is None}
        lines += [f"{each.name}: left out, {each.unfit}" for each in chosen if each.method not in fit]
        chosen = [candidate for candidate in chosen if candidate.method in fit]
    return chosen, lines


def refuse_twins(candidates: Sequence[Candidate]) -> None:
    """Raise PartialLoraError for candidates that one verdict cannot tell apart, or with results in several folders."""
    names = Counter((candidate.group, candidate.name) for candidate in candidates)
    for group, name in (twin for twin, count in names.items() if count > 1):
        raise PartialLoraError(
            f"methods: {name} is there twice in {group}, and one verdict cannot tell them apart; make each comparison "
            "by itself (python scripts/study.py NAME does)"
        )
    folders = {candidate.usual.results_dir for candidate in candidates if candidate.unfit is None}
    require(len(folders) < 2, "results_dir", " and ".join(sorted(folders)), "one folder for a comparison")


def _is_served(method: str, overrides: Sequence[str]) -> bool:
    """Return whether servers can load what a method trains: products B A of LoRA."""
    (_, config), *_ = checked(["-m", *overrides, f"method={method}"]).runs
    chosen, traits = config.method, config.method.traits
    of_peft = chosen.peft_type == "LORA" and not (chosen.peft or {}).get("use_dora")
    return traits.product and (of_peft or chosen.peft_type is None)


def fitting(candidates: Sequence[Candidate], limit: Mapping[str, float]) -> list[Candidate]:
    """Return each method at the largest of its sizes that meets a limit; one that none does is unfit."""
    ((name, most),) = limit.items()
    kept = []
    for tried in grouped(candidates, lambda candidate: candidate.method).values():
        chosen = tried[-1]
        for candidate in tried:  # the largest first
            if candidate.unfit is None:
                chosen = _held_to(candidate, name, most)
                if chosen.unfit is None:
                    break
        group = chosen.group.removesuffix(chosen.size) + limit_text(limit)  # still of one task and model
        kept.append(replace(chosen, group=group))
    return kept


def _held_to(candidate: Candidate, name: str, most: float) -> Candidate:
    """Return a candidate, unfit where it does not keep to a limit or that cannot be told."""
    if name in ("memory", "seconds"):
        candidate = timed(candidate)
    value = cost_of(candidate, name)
    if candidate.unfit is not None or (value is not None and value <= most):
        return candidate
    nearest = "unknown" if value is None else cost_text(name, value)
    reason = f"at {candidate.size} of dense LoRA's parameters it takes {nearest}"
    return replace(candidate, unfit=f"limit.{name}={cost_text(name, most)}: {reason}")


def cost_of(candidate: Candidate, name: str) -> float | None:
    """Return what a limit is on, of a candidate: in bytes or seconds; None of one that has not been timed."""
    if name == "served":
        return candidate.served
    if name == "kept":
        return kept_by_step(candidate.usual)
    if name == "seconds":
        return candidate.step_seconds
    return candidate.timed["peak_memory_bytes"] if candidate.timed else None


def limit_text(limit: Mapping[str, float]) -> str:
    """Return what candidates under a limit have in common in place of a size."""
    ((name, most),) = limit.items()
    return f"{LIMITS[name][0]}, at most {cost_text(name, most)}"


def cost_text(name: str, value: float) -> str:
    """Return a limit's value with its unit."""
    return f"{value:.3g} s" if LIMITS[name][1] == "seconds" else f"{value / 1e6:.3g} MB"


def timed(candidate: Candidate) -> Candidate:
    """Return a candidate with the record of an earlier run of it, or else of one of three steps, made now.

    One whose run of three steps fails is unfit. Raises SystemExit where that run was asked to stop.
    """
    if candidate.timed is not None or candidate.unfit is not None:
        return candidate
    usual = candidate.usual
    for place in (run_directory(usual), *at_other_rates(usual)):
        record = recorded(place)
        if record and record["status"] == "finished" and record.get("cost"):
            return replace(candidate, timed=record)
    short = [*candidate.overrides, *_TIMED, f"results_dir={Path(usual.results_dir) / _TIMES}"]
    ((_, config),) = checked(["-m", *short, f"trainer.learning_rate={candidate.centre:g}"]).runs
    outcome = pool.alone(config, is_made)
    if outcome.status == "interrupted":
        print(f"{candidate.name}: {outcome.reason}", file=sys.stderr)
        raise SystemExit(outcome.exit_code)
    record = recorded(run_directory(config))
    if record and record["status"] == "finished":
        return replace(candidate, timed=record)
    return replace(candidate, unfit=record["error"]) if record and record["status"] == "failed" else candidate


def is_made(config: Config) -> bool:
    """Return whether a run is recorded as far as its settings ask for."""
    return validation_of(recorded(run_directory(config)), config.trainer.until) is not None


def jobs_at_once(candidates: Iterable[Candidate]) -> int:
    """Return how many runs go side by side: as many as cores and free memory allow, or one for each accelerator.

    Where a run is not set to one process, it has all of them.
    """
    fit = [candidate for candidate in candidates if candidate.unfit is None]
    if not fit:
        return 1
    trainers = [candidate.usual.trainer for candidate in fit]
    if any(one.device != "cpu" and has_accelerator() for one in trainers):
        return len(visible()) if all(one.num_processes == 1 for one in trainers) else 1
    if any((one.num_processes or 1) > 1 for one in trainers):
        return 1
    largest = max((candidate.timed["peak_memory_bytes"] for candidate in fit if candidate.timed), default=0)
    room = psutil.virtual_memory().available // largest if largest else cpu_count()
    return max(1, min(cpu_count(), room))


def known_rates(candidate: Candidate, until: float) -> list[float]:
    """Return the learning rates at which runs of a candidate's first seed are recorded, up to a share of their steps.

    Those of runs that were killed are among them, to be tried again; a rate that made its run fail is not. Where
    finished runs are made again there are none.
    """
    if candidate.overwrite:
        return []
    records = (recorded(place) for place in at_other_rates(candidate.usual))
    tried = (record for record in records if validation_of(record, until) is not None or was_killed(record))
    return sorted({record["config"]["trainer"]["learning_rate"] for record in tried} - {AUTO})


def was_killed(record: Mapping | None) -> bool:
    return bool(record and record.get("killed"))
