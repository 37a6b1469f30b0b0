"""Searches for a learning rate: which runs to make next, by validation of the last ones, and which rate is the best.

A search is a generator that knows no run: it yields trials and is sent their validation. `scripts/referee.py` asks the
same generators about runs that are recorded.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Mapping
from typing import NamedTuple

from partial_lora.launching.directory import PAUSED
from partial_lora.settings.rates import Validation, ranked
from partial_lora.tasks.metrics import LOWER_IS_BETTER

QUARTER = 0.25  # of its steps, after which a quick search looks at a run
FINALISTS = 2  # rates that a quick search trains to the end
HALF = 0.5  # of its steps, after which a race of methods looks at a run
SURVIVORS = 3  # methods that a race lets go on, and those that validation does not tell from the last of them
_GAIN = 0.001  # of the loss, without which a quick search does not look beyond its rates
_MOST_RATES = 12  # of a search whose best rate is at an edge again and again


class Trial(NamedTuple):
    """A run of a search; until: the share of its steps after whose validation it is paused."""

    rate: float
    seed: int
    until: float = 1.0


Asked = Generator[list[Trial], Mapping[Trial, Validation], list[float]]  # ends with rates, the best first
Search = Generator[list[Trial], Mapping[Trial, Validation], float | None]


def quick(centre: float, count: int, earlier: Collection[float] = ()) -> Search:
    """Yield the trials to make next, be sent their validation, and return the best learning rate; None if all fail.

    Rates a factor of two apart train for a quarter of their steps, at their full schedule, and more while the best is
    at an edge. The two of the least loss on validation go on to the end. results/referee/referee.md says how often that
    is the rate of a full search. earlier: as `full` takes it.
    """
    by_loss = yield from early(centre, count, earlier)
    best = (yield from final(by_loss[:FINALISTS])) if by_loss else []
    return best[0] if best else None


def early(centre: float, count: int, earlier: Collection[float] = ()) -> Asked:
    """Yield trials of a quarter of their steps, be sent their validation, and return the rates, the least loss first.

    Arguments as `quick` takes them.
    """
    tried = yield from _first_seed(centre, count, earlier, QUARTER)
    return ranked({rate: {0: validation} for rate, validation in tried.items()})


def final(rates: Collection[float]) -> Asked:
    """Yield whole trials of the first seed at these rates, be sent their validation, and return them, ranked."""
    validations = yield [Trial(rate, 0) for rate in rates]
    return ranked({trial.rate: {0: validation} for trial, validation in validations.items()})


def full(centre: float, count: int, seeds: int, earlier: Collection[float] = ()) -> Search:
    """Yield the trials to make next, be sent their validation, and return the best learning rate; None if all fail.

    The first seed tries `count` rates a factor of two apart around the centre; or the rates that an earlier search has
    tried with it (earlier), if they are as many, so that another centre does not begin the search again. It tries more
    while the best of them, by score or by loss, is at an edge: where no rate has learned anything yet, the loss alone
    knows which way to go. The better half goes on to the next seed, by the mean over the seeds so far, and so on
    (successive halving, Jamieson and Talwalkar 2016, with seeds as the resource). So the best has been trained with all
    seeds.
    """
    first = yield from _first_seed(centre, count, earlier, 1.0)
    tried = {rate: {0: validation} for rate, validation in first.items()}
    rates = ranked(tried)[: math.ceil(len(tried) / 2)]
    for seed in range(1, seeds):
        if not rates:
            return None
        validations = yield [Trial(rate, seed) for rate in rates]
        for trial, validation in validations.items():
            tried[trial.rate][seed] = validation
        rates = ranked(tried)[: math.ceil(len(rates) / 2)]
    return rates[0] if rates else None


def _first_seed(
    centre: float, count: int, earlier: Collection[float], until: float
) -> Generator[list[Trial], Mapping[Trial, Validation], dict[float, Validation]]:
    """Yield trials of the first seed until the best of them is inside of their rates; return their validation by rate.

    The best is that of the least loss and, of whole runs, that of the best score.
    """
    rates = [_rung(centre, power) for power in range(-(count // 2), count - count // 2)]
    rates = sorted(earlier) if len(earlier) >= count else rates
    tried: dict[float, Validation] = {}
    while rates:
        validations = yield [Trial(rate, 0, until) for rate in rates]
        tried |= {trial.rate: validation for trial, validation in validations.items()}
        by_loss = ranked({rate: {0: validation and validation[::-1]} for rate, validation in tried.items()})[:1]
        by_score = ranked({rate: {0: validation} for rate, validation in tried.items()})[:1] if until == 1 else []
        edges = [best for best in (*by_loss, *by_score) if best in (min(tried), max(tried))]
        if until < 1 and not _stands_out(tried):
            edges = []
        room = len(tried) < _MOST_RATES and edges
        rates = [_rung(edges[0], -1 if edges[0] == min(tried) else 1)] if room else []
    return tried


def _rung(rate: float, power: int) -> float:
    """Return a rate so many factors of two away, as records and command lines have it."""
    return float(f"{rate * 2.0**power:g}")


def _stands_out(tried: Mapping[float, Validation]) -> bool:
    """Return whether the least loss is less than all others by one part in a thousand: else no rate stands out yet."""
    first, *others = sorted(-validation[1] for validation in tried.values() if validation) or [math.inf]
    return not others or first < (1 - _GAIN) * others[0]


def runs_at_least(count: int, seeds: int) -> int:
    """Return how many runs a full search makes whose best rate is never at an edge."""
    total = 0
    for _ in range(seeds):
        total, count = total + count, math.ceil(count / 2)
    return total


def validation_of(record: Mapping | None, until: float = 1.0) -> Validation:
    """Return a run's score and loss on validation, the larger the better; None where one of them is no number.

    until: the share of its steps after which it is asked; before the end the loss of the first validation from then on
    stands for both.
    """
    if not record or record["status"] not in ("finished", PAUSED):
        return None
    if until < 1:
        steps = record["training"]["steps"]
        seen = (
            entry["eval_loss"] for entry in record["history"] if entry["step"] >= until * steps and "eval_loss" in entry
        )
        loss = next(seen, None)
        return None if loss is None else (-loss, -loss)
    if record["status"] == PAUSED:
        return None
    validation = record["metrics"]["validation"]
    score, loss = validation[validation["primary"]], validation["loss"]
    if score is None or loss is None:
        return None
    return (-score if validation["primary"] in LOWER_IS_BETTER else score), -loss
