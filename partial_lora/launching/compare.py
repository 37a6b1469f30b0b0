"""A comparison of methods at equal size: which runs it takes, and which learning rates go on to the next seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from partial_lora.building.build import task_of
from partial_lora.building.info import outline
from partial_lora.errors import PartialLoraError
from partial_lora.files import is_locked
from partial_lora.launching.directory import LOCK
from partial_lora.launching.packs import recorded
from partial_lora.launching.places import at_other_rates, run_directory
from partial_lora.methods import METHODS
from partial_lora.settings import rates as learning_rates
from partial_lora.settings.compose import Plan, in_one_line, plan
from partial_lora.settings.rates import Worth, ranked
from partial_lora.settings.schema import Config
from partial_lora.settings.stored import plain
from partial_lora.tasks.metrics import LOWER_IS_BETTER
from partial_lora.training.config import AUTO

_MOST_RATES = 12  # of a search whose best rate is at an edge again and again

Runs = list[tuple[float, int]]  # learning rate and seed


def search(
    centre: float, count: int, seeds: int, known: Collection[float] = ()
) -> Generator[Runs, Mapping[tuple[float, int], Worth], float | None]:
    """Yield the runs to make next, be sent what they are worth, and return the best learning rate; None if all failed.

    The first seed tries `count` rates a factor of two apart around the centre; or the rates that an earlier search has
    tried with it (known), if they are as many, so that another centre does not begin the search again. It tries more
    while the best of them, by score or by loss, is at an edge: where no rate has learned anything yet, the loss alone
    knows which way to go. The better half goes on to the next seed, by the mean over the seeds so far, and so on
    (successive halving, Jamieson and Talwalkar 2016, with seeds as the resource). So the best has been trained with all
    seeds.
    """
    rates = [centre * 2.0**power for power in range(-(count // 2), count - count // 2)]
    rates = sorted(known) if len(known) >= count else rates
    tried: dict[float, dict[int, Worth]] = {}

    def run(rates: list[float], seed: int) -> Generator[Runs, Mapping[tuple[float, int], Worth], None]:
        for (rate, _), worth in (yield [(rate, seed) for rate in rates]).items():
            tried.setdefault(rate, {})[seed] = worth

    yield from run(rates, 0)
    while len(tried) < _MOST_RATES:
        by_loss = {rate: {0: worth[0] and worth[0][::-1]} for rate, worth in tried.items()}
        edges = [best for best in (*ranked(by_loss)[:1], *ranked(tried)[:1]) if best in (min(tried), max(tried))]
        if not edges:
            break
        yield from run([edges[0] / 2 if edges[0] == min(tried) else edges[0] * 2], 0)
    rates = ranked(tried)[: math.ceil(len(tried) / 2)]
    for seed in range(1, seeds):
        if not rates:
            return None
        yield from run(rates, seed)
        rates = ranked(tried)[: math.ceil(len(rates) / 2)]
    return rates[0] if rates else None


def runs_at_least(count: int, seeds: int) -> int:
    """Return how many runs a search makes whose best rate is never at an edge."""
    total = 0
    for _ in range(seeds):
        total, count = total + count, math.ceil(count / 2)
    return total


@dataclass
class Entry:
    """A method at a size: its settings, where its search is centred, and what has become of it.

    overrides: on the command line of `train`, all but the seed and the learning rate. best: the learning rate, once it
    is found. refused: why it is not compared. overwrite: make finished runs again. done: the records of finished runs
    by directory.
    """

    method: str
    size: str
    overrides: tuple[str, ...]
    centre: float = 0.0
    parameters: int = 0
    best: float | None = None
    refused: str | None = None
    overwrite: bool = False
    done: dict[Path, dict] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.method}, {self.size}"

    def arguments(self, runs: Runs) -> list[str]:
        """Return the arguments of a sweep over runs of one seed."""
        rates = ",".join(f"{rate:g}" for rate, _ in runs)
        return ["-m", *self.overrides, f"seed={runs[0][1]}", f"trainer.learning_rate={rates}"]


def entries(methods: Sequence[str], budgets: Sequence[float], overrides: Sequence[str]) -> list[Entry]:
    """Return each method at every budget, or once if no budget resizes it, each entry checked as `train` checks it.

    overrides: settings of all of them. Raises PartialLoraError for what `train` would refuse.
    """
    own_calibration = any(override.startswith("calibration=") for override in overrides)
    made = []
    for method in dict.fromkeys(methods):
        known = METHODS.get(method)
        if known is None:  # a file that gives a method another name
            _, config = checked(["-m", *overrides, f"method={method}"]).runs[0]
            known = config.method.traits
        for budget in [None] if known.is_fixed else dict.fromkeys(budgets):
            chosen = [f"method={method}"]
            if budget is not None:
                chosen = list(known.at_budget) or chosen
                if known.size_alone and not own_calibration:
                    chosen.append("calibration=fixed")
                chosen.append(f"calibration.budget={budget}")
            size = "own size" if budget is None else str(budget)
            entry = Entry(method, size, (*overrides, *chosen, "trainer.tuned=null"))
            planned = checked(["-m", *entry.overrides])
            if planned.swept:
                keys = ", ".join(sorted(planned.swept))
                raise PartialLoraError(f"{keys}: expected one value; compare sweeps learning rates and seeds by itself")
            ((_, config),) = planned.runs
            if not made:
                task_of(config, mixtures=True)  # all runs read these rows: what is wrong with them is said once, now
            entry.overwrite = config.overwrite
            try:
                entry.parameters, entry.centre = _parameters_and_centre(config)
            except PartialLoraError as error:  # the method has no such size, or does not fit this model
                entry.refused = str(error)
            made.append(entry)
    return made


def _parameters_and_centre(config: Config) -> tuple[int, float]:
    """Return the parameters of an entry, and the rung nearest to the learning rate that suits it.

    Rungs are a factor of two apart, for all methods from dense LoRA's rate on: its own, or the one that is set.
    """
    run = outline(config)
    usual = learning_rates.dense_rate(run.width)
    suited = learning_rates.auto(plain(config), width=run.width, density=run.density)
    dense = usual if config.trainer.learning_rate == AUTO else config.trainer.learning_rate
    return run.counts["adapter_trainable"], dense * 2.0 ** round(math.log2(suited / usual))


def checked(arguments: Sequence[str]) -> Plan:
    """Return the runs of a sweep; raises PartialLoraError where one is refused."""
    with in_one_line(arguments):
        planned = plan(arguments)
    for reason in planned.refused:
        raise PartialLoraError(reason)
    return planned


def compare(
    chosen: Sequence[Entry],
    *,
    rates: int,
    seeds: int,
    launch: Callable[[list[str]], int],
    say: Callable[[str], None],
) -> int:
    """Search for the learning rate of every entry that is not refused; return the exit code.

    Runs that are finished are not made again. launch: makes the runs of a sweep of `train`, given its arguments, and
    returns its exit code; after an interrupted sweep no further run is made.
    """
    searched = [entry for entry in chosen if entry.refused is None]
    took: list[float] = []  # seconds of every run that was not finished before
    for others, entry in zip(reversed(range(len(searched))), searched, strict=True):
        searching = search(entry.centre, rates, seeds, [] if entry.overwrite else known_rates(entry))
        runs = next(searching)
        tried = 0  # rates that the seed under way has tried
        while True:
            places = places_of(entry, runs)
            new = [run for run, place in places.items() if entry.overwrite or worth(recorded(place)) is None]
            seed = runs[0][1]
            tried = len(runs) if seed else tried + len(runs)
            left = len(new) - tried + runs_at_least(tried, seeds - seed) + others * runs_at_least(rates, seeds)
            time = f"some {left * sum(took) / len(took) / 60:.0f} min" if took else "the first ones say how long"
            known = f"{len(runs)} runs of seed {seed}, {len(runs) - len(new)} finished"
            say(f"{entry.name}: {known}; at least {left} left, {time}")
            if new:  # a record is enough: what is compared needs no weights
                began = monotonic()
                code = launch(entry.arguments(new))
                if code > 2:
                    return code
                if held := [str(places[run]) for run in new if is_locked(places[run] / LOCK)]:
                    raise PartialLoraError(f"{held[0]} is in use by another process: run this again when it has ended")
                took += [(monotonic() - began) / len(new)] * len(new)
            found = {run: recorded(place) for run, place in places.items()}
            entry.done |= {places[run]: record for run, record in found.items() if worth(record) is not None}
            try:
                runs = searching.send({run: worth(record) for run, record in found.items()})
            except StopIteration as end:
                entry.best = end.value
                break
        if entry.best is None:
            errors = [record["error"] for record in found.values() if record and record.get("error")]
            entry.refused = errors[0] if errors else "no run of it finished"
    return 0


def places_of(entry: Entry, runs: Runs) -> dict[tuple[float, int], Path]:
    """Return the directory of every run."""
    configs = [config for _, config in checked(entry.arguments(runs)).runs]
    return {run: run_directory(config) for run, config in zip(runs, configs, strict=True)}


def known_rates(entry: Entry) -> list[float]:
    """Return the learning rates at which runs of an entry's first seed are recorded."""
    ((_, config),) = checked(entry.arguments([(entry.centre, 0)])).runs
    records = (recorded(place) for place in at_other_rates(config))
    known = {record["config"]["trainer"]["learning_rate"] for record in records if worth(record) is not None}
    return sorted(known - {AUTO})


def worth(record: Mapping | None) -> Worth:
    """Return a run's score and loss on validation, the larger the better; None where one of them is no number."""
    if not record or record["status"] != "finished":
        return None
    validation = record["metrics"]["validation"]
    score, loss = validation[validation["primary"]], validation["loss"]
    if score is None or loss is None:
        return None
    return (-score if validation["primary"] in LOWER_IS_BETTER else score), -loss
