"""What `compare` saves, and at what risk: a quick search replayed on recorded ones, and seeds looked at one by one.

    python scripts/referee.py    # or `make referee`; some minutes of one core, from committed records alone

*Search*: the recorded searches of race and decided answer the search of `compare` in place of runs: a run's history has
its validation after a quarter of its steps. Counted are the cells (a set, a method, a size) in which it ends with the
full search's rate or one next to it, the run-seconds of all runs but those of the best rate, and what the
best score on test loses. A rate that the full search did not try counts as one that fails. Beside it stands the rate
that today's rule, which has seen all sets, gives without any search.

*Race*: the methods of a recorded study, set and size are searched as above and trained to a share of their steps; the
few of the least loss on validation are left, and the best of all may be among those that are not. Two sets stand apart,
which the rule was not made on (`make race ONLY=stage=unseen`).

*Seeds*: studies are drawn with the components of variance of results/decided, whose truth is known, and judged by
`report.sequential` look by look, beside 3 and 8 seeds for all. False is a study that calls a method worse that is not,
or as good though it is further off than the margin.

Writes referee.md and spread.csv into results/referee.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

import intervals
import numpy as np
import pandas as pd
import protocol
from scipy.special import stdtrit

from partial_lora import cli
from partial_lora.compare.rate_search import HALF, QUARTER, SURVIVORS, Asked, Search, Trial, early, quick, validation_of
from partial_lora.files import grouped, write_atomic
from partial_lora.report import ranking, records, sequential
from partial_lora.report.statistics import LEVEL
from partial_lora.settings import rates

RESULTS = Path("results")
SEARCHED = ("race", "decided")
UNSEEN = ("referee",)  # recorded after the rules were made
LEAST_RATES = 3  # of a cell that was searched
COUNT = 3  # rates that a search begins with


# --- The search.


@dataclass(frozen=True, eq=False)
class Cell:
    """A recorded search. runs: records by rate and seed; best: its rate; suits: the rate of today's rule."""

    study: str
    task: str
    form: str
    size: str
    runs: dict[tuple[float, int], dict]
    best: float
    suits: float

    @property
    def centre(self) -> float:
        """The rung nearest to what today's rule suits, of those that have recorded ones on both sides."""
        tried = sorted(rate for rate, seed in self.runs if seed == 0)[1:-1]
        return min(tried, key=lambda rate: abs(math.log2(rate / self.suits)))

    def replayed(self, searching: Search | Asked) -> tuple[float | list[float] | None, float]:
        """Return what a search ends with, and its cost in runs of the first seed."""
        reached: dict[float, float] = {}
        trials = next(searching)
        while True:
            answers = {trial: validation_of(self.runs.get((trial.rate, trial.seed)), trial.until) for trial in trials}
            for trial in trials:
                reached[trial.rate] = max(reached.get(trial.rate, 0), self._share(trial))
            try:
                trials = searching.send(answers)
            except StopIteration as end:
                return end.value, sum(reached.values())

    def _share(self, trial: Trial) -> float:
        """Return the share of its steps that a trial takes: up to the validation at which it is asked."""
        history = self.runs[trial[:2]]["history"] if trial[:2] in self.runs else []
        steps = [entry["step"] for entry in history if "eval_loss" in entry]
        seen = [step / steps[-1] for step in steps if step >= trial.until * steps[-1]]
        return seen[0] if seen else trial.until

    def scores(self, rate: float) -> float:
        """Return the score on test at a rate, over as many seeds as the best rate has."""
        best = fmean(_test(record) for (own, _), record in self.runs.items() if own == self.best)
        return best - self.lost(rate)

    def lost(self, rate: float) -> float:
        """Return what the best rate scores on test above another, the mean over the seeds that both have."""
        seeds = [seed for own, seed in self.runs if own == rate and (self.best, seed) in self.runs]
        return fmean(_test(self.runs[self.best, seed]) - _test(self.runs[rate, seed]) for seed in seeds)


def _test(record: dict) -> float:
    return record["metrics"]["test"][record["metrics"]["test"]["primary"]]


def cells(results: Path, studies: Sequence[str] = SEARCHED) -> list[Cell]:
    """Return the recorded searches of three rates or more, but for cells of several settings."""
    found = []
    for study in studies:
        table = _recorded(results / study)
        for (task, _, size, form), cell in table.groupby(["task", "model", "size", "form"], sort=False):
            runs = {(row.learning_rate, row.seed): row.run.record for row in cell.itertuples()}
            tried = {rate: {} for rate, _ in runs}
            for (rate, seed), record in runs.items():
                tried[rate][seed] = validation_of(record)
            if sum(0 in own for own in tried.values()) < LEAST_RATES or len(runs) < len(cell):  # two settings mixed
                continue
            record = next(iter(runs.values()))
            counts, shapes = record["parameters"], record["shapes"].values()
            density = counts["adapter_trainable"] / counts["adapter_dense"]
            width = rates.width(shapes) if shapes else 384  # records without shapes are of bundled models
            suits = rates.auto(record["config"], width=width, density=density)
            found.append(Cell(study, task, form, size, runs, rates.ranked(tried)[0], suits))
    return found


def _recorded(study: Path) -> pd.DataFrame:
    """Return the rows of a study; of the one protocol those of one task, under the usual condition and by svd."""
    if study.name != "decided":
        return ranking.rows_of(records.read(study)[0])
    runs = protocol.usual(protocol.forms(study)[0])
    runs = runs[runs["importance"] == ""]
    return runs.assign(form=runs["method"], size=[ranking.size_in(run.record) for run in runs["run"]])


def by_rule(cell: Cell) -> tuple[float, float]:
    """Return the recorded rate that is nearest to the rule's, and its cost."""
    return min({own for own, seed in cell.runs if seed == 0}, key=lambda own: abs(math.log2(own / cell.suits))), 1.0


POLICIES: dict[str, Callable[[Cell], tuple[float | None, float]]] = {  # of a cell: its rate, and the cost of it
    "two go on from a quarter (the default)": lambda cell: cell.replayed(quick(cell.centre, COUNT)),
    "the rule alone": by_rule,
}


def replay(all_cells: Sequence[Cell]) -> pd.DataFrame:
    """Return a row for each policy: how near it comes to the best rates, what it takes, and what it loses on test."""
    rows = []
    for name, policy in POLICIES.items():
        found = []
        for cell in all_cells:
            rate, cost = policy(cell)
            seconds = fmean(record["seconds"]["train"] for record in cell.runs.values())
            kept = sum(own == cell.best for own, _ in cell.runs)  # which are trained in any case
            spent, full = (cost - 1) * seconds, (len(cell.runs) - kept) * seconds
            found.append((abs(math.log2(rate / cell.best)), spent / 3600, full / 3600, 100 * cell.lost(rate)))
        apart, spent, full, lost = np.transpose(found)
        row = {"policy": name, "cells": len(all_cells)}
        row |= {"within a factor of two": (apart < 1.01).mean(), "same rate": (apart < 0.01).mean()}
        row |= {"hours": spent.sum(), "hours of the full search": full.sum(), "share": spent.sum() / full.sum()}
        rows.append(row | {"points lost": lost.mean(), "points lost by one in twenty": np.quantile(lost, 0.95)})
    return pd.DataFrame(rows)


# --- The race of methods.

LEAST_METHODS = 5  # of a race
LOOKED_AT = (QUARTER, HALF, 1.0)  # shares of their steps after which all but some methods are dropped
LEFT = (1, 2, 3, 4)


def races(all_cells: Sequence[Cell]) -> pd.DataFrame:
    """Return a row for each race, share and number of methods left, with what their best scores below the best of all.

    A method's score is the mean on test at the rate that its quick search ends with. dropped: the best of all, if it is
    not among those left. full: the same below the best method at the rate of its full search. runs: whole ones of the
    first seed for each method, searches included.
    """
    rows = []
    for (study, task, size), group in grouped(all_cells, lambda cell: (cell.study, cell.task, cell.size)).items():
        searched = {cell: cell.replayed(early(cell.centre, COUNT))[0] for cell in group}
        searched = {cell: by_loss for cell, by_loss in searched.items() if by_loss}
        if len(searched) < LEAST_METHODS:
            continue
        whole = {cell: cell.replayed(quick(cell.centre, COUNT)) for cell in searched}
        scores = {cell: cell.scores(rate) for cell, (rate, _) in whole.items()}
        best = max(scores, key=scores.__getitem__)
        full = max(cell.scores(cell.best) for cell in searched)
        for until, left in product(LOOKED_AT, LEFT):
            losses = {cell: -validation_of(cell.runs[rates[0], 0], until)[1] for cell, rates in searched.items()}
            kept = sorted(losses, key=losses.__getitem__)[:left]
            half = {cell: cell.replayed(early(cell.centre, COUNT))[1] + until - QUARTER for cell in searched}
            spent = sum(whole[cell][1] if cell in kept else half[cell] for cell in searched)
            rows.append(
                {"study": study, "set": task, "size": size, "methods": len(searched), "until": until, "left": left}
                | {"lost": 100 * (scores[best] - max(scores[cell] for cell in kept))}
                | {"full": 100 * (full - max(scores[cell] for cell in kept))}
                | {"dropped": "" if best in kept else best.form, "runs": spent / len(searched)}
            )
    return pd.DataFrame(rows)


def over_races(found: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each share and number: points lost, how often the best is dropped, and what a method takes."""
    rules = found.assign(dropped=found["dropped"] != "").groupby(["until", "left"], sort=False)
    table = rules.agg(races=("lost", "size"), lost=("lost", "mean"), most=("lost", "max"), dropped=("dropped", "mean"))
    return table.assign(runs=rules["runs"].mean()).reset_index()


# --- The seeds.

MARGIN, REPETITIONS, ROWS = 0.01, 4000, 100
PLANS = {"looks": sequential.LOOKS, "3 seeds": (3,), "8 seeds": (8,)}
KINDS = ("normal", "heavy", "uneven", "tailed", "one falls")
AT_ONCE = 250  # studies
FALL, FALLING = 0.1, 1 / 8  # what a run of a tail is too low by, and how many are
TRUTHS = {  # points
    "all equal": (0, 0, 0),
    "one worse by just the margin": (0, 0, -1.001),
    "clear gaps": (0, -3, -10),
    "one far behind": (0, -0.5, -10),
    "six equal": (0,) * 6,
    "twelve equal": (0,) * 12,
    "six, spread": (0, -1, -2, -4, -8, -16),
}


def components(results: Path) -> dict[str, tuple[float, float, float, int]]:
    """Return by set the standard deviations of a difference, and its rows: of seeds, of rows and of both together."""
    found = {}
    for task, every in intervals.differences(results / "decided").items():
        if len(every) < 3:  # cifar10 and signdigits have two forms
            continue
        rows = every[0].shape[1]
        parts = [np.divide(intervals.components(d), (1, rows, rows)) for d in every]
        found[task] = *np.sqrt(np.median(parts, axis=0)), rows
    return found


def spread(parts: dict[str, tuple[float, float, float, int]]) -> pd.DataFrame:
    """Return by set by how many points a seed moves a difference, one test row for all seeds, and one for one seed."""
    sets = [
        (task, rows, *np.multiply(100, (seed, own * rows**0.5, left * rows**0.5)))
        for task, (seed, own, left, rows) in parts.items()
    ]
    return pd.DataFrame(sets, columns=["set", "rows", "seed", "row", "row of one seed"])


def drawn(
    truth: Sequence[float],
    parts: tuple[float, float, float, int],
    generator: np.random.Generator,
    kind: str,
    studies: int,
) -> np.ndarray:
    """Return the outputs of studies (studies, methods, seeds, rows).

    heavy: seeds by t(3). uneven: one method moves three times as far, of twelve ten times. tailed: one run in eight
    ends ten points low, as some of the records do. one falls: of one method alone, whose other runs make up for it.
    """
    shape = (studies, len(truth), max(sequential.LOOKS))
    of_seed, of_rows, left = (part / math.sqrt(2) for part in parts[:3])  # of one method
    luck = generator.standard_t(3, size=shape) / math.sqrt(3) if kind == "heavy" else generator.normal(size=shape)
    luck[:, 0] *= 1 if kind != "uneven" else 10 if len(truth) > 6 else 3
    fallen = FALL * (generator.random(shape) < FALLING) * (kind in ("tailed", "one falls"))
    if kind == "one falls":
        fallen[:, 1:], fallen[:, 0] = 0, fallen[:, 0] - FALL * FALLING
    shared, rest = generator.normal(size=(*shape[:2], 1, ROWS)), generator.normal(size=(*shape, ROWS))
    scores = np.array(truth)[:, None] / 100 + of_seed * luck - fallen
    return scores[..., None] + math.sqrt(ROWS) * (of_rows * shared + left * rest)


@dataclass(frozen=True)
class Judged:
    """What `sequential.decide` decides of many studies, at once, by the same intervals.

    leader: of each study. verdict, against, seeds: of each method (studies, methods).
    """

    leader: np.ndarray
    verdict: np.ndarray
    against: np.ndarray
    seeds: np.ndarray

    @classmethod
    def of(cls, outputs: np.ndarray, looks: Sequence[int]) -> Judged:
        """Return the decisions on outputs (studies, methods, seeds, rows)."""
        studies, methods = outputs.shape[:2]
        every, scores = np.arange(studies), outputs.mean(axis=-1)
        levels = sequential.levels_of(tuple(looks), (1 - LEVEL) / math.comb(methods, 2))
        verdict = np.full((studies, methods), sequential.OPEN, dtype="<U8")
        against, seeds_of = np.zeros((2, studies, methods), int)
        alive, leader = np.ones((studies, methods), bool), np.zeros(studies, int)
        for seeds, level in zip(looks, levels, strict=True):
            goes_on = alive.sum(axis=1) > 1
            alive &= goes_on[:, None]
            means = np.where(alive, scores[:, :, :seeds].mean(axis=-1), -np.inf)
            leader = np.where(goes_on, means.argmax(axis=1), leader)
            seeds_of[alive] = seeds
            pooled = _pooled(scores, alive, seeds_of, seeds)
            alone = sequential.Spread.of(outputs[every, leader, None, :seeds] - outputs[:, :, :seeds])
            pair, freedom = pooled.pair(alone, seeds)
            estimate, wide = pair.estimate(seeds, freedom), level / 2
            half = estimate.error * stdtrit(estimate.freedom, 1 - wide)
            hoped = alone.estimate(looks[-1], freedom / (seeds - 1) * (looks[-1] - 1))
            hope = hoped.error * stdtrit(hoped.freedom, 1 - levels[-1] / 2) - sequential.HOPE * estimate.error
            judged = alive & (np.arange(methods) != leader[:, None])
            against = np.where(judged, leader[:, None], against)
            worse = judged & (estimate.difference > half)
            as_good = judged & ~worse & (estimate.difference + half < MARGIN)
            may = (estimate.difference > hope) | (estimate.difference + hope < MARGIN)
            verdict[worse], verdict[as_good] = sequential.WORSE, sequential.AS_GOOD
            alive &= ~(worse | as_good | (judged & ~may))
        return cls(leader, verdict, against, seeds_of)

    def is_false(self, truth: Sequence[float]) -> np.ndarray:
        """Return of each study whether it says something that is not so."""
        truth = np.array(truth)
        behind = (truth[self.against] - truth) / 100
        worse, as_good = self.verdict == sequential.WORSE, self.verdict == sequential.AS_GOOD
        return ((worse & (behind <= 0)) | (as_good & (behind > MARGIN))).any(axis=1)


def _pooled(scores: np.ndarray, alive: np.ndarray, seeds_of: np.ndarray, seeds: int) -> sequential.Seeds:
    """Return what seeds move of each study (studies, 1): of those alive or, where they are few, of all methods."""
    counts = alive.sum(axis=1)
    freedom = np.maximum(counts - 1, 1) * (seeds - 1)
    kept = scores[:, :, :seeds] * alive[..., None]
    of_seed, of_method = kept.sum(axis=1, keepdims=True) / np.maximum(counts, 1)[:, None, None], kept.mean(axis=2)
    grand = of_seed.mean(axis=2, keepdims=True)
    left = (kept - of_method[..., None] - of_seed + grand) * alive[..., None]
    moved = 2 * (left**2).sum(axis=(1, 2)) / freedom
    for study in np.flatnonzero((freedom < sequential.ENOUGH) & (counts > 1) & (counts < alive.shape[1])):
        runs = {
            str(one): dict(enumerate(own[:count]))
            for one, (own, count) in enumerate(zip(scores[study], seeds_of[study], strict=True))
        }
        of_all = sequential.Seeds.of(runs)
        moved[study], freedom[study] = of_all.moved, of_all.freedom
    return sequential.Seeds(moved[:, None], freedom[:, None].astype(float))


def simulate(parts: dict[str, tuple[float, float, float, int]], repetitions: int) -> pd.DataFrame:
    """Return a row for each truth, kind, set and plan; all plans have the same studies."""
    rows = []
    for (title, truth), kind, (task, own) in (
        (named, kind, part)
        for named in TRUTHS.items()
        for kind in KINDS[: len(KINDS) if "equal" in named[0] else 1]
        for part in parts.items()
    ):
        generator, found = np.random.default_rng(list(parts).index(task)), {plan: [] for plan in PLANS}
        for done in range(0, repetitions, AT_ONCE):
            outputs = drawn(truth, own, generator, kind, min(AT_ONCE, repetitions - done))
            for plan, looks in PLANS.items():
                judged = Judged.of(outputs, looks)
                settled = (judged.verdict != sequential.OPEN).sum(axis=1) / (len(truth) - 1)
                found[plan].append((judged.seeds.mean(axis=1), judged.is_false(truth), settled))
        for plan, several in found.items():
            seeds, false, settled = (np.concatenate(one).mean() for one in zip(*several, strict=True))
            row = {"truth": title, "seeds are": kind, "set": task, "plan": plan, "seeds a method": seeds}
            rows.append(row | {"false studies": false, "decided": settled})
    return pd.DataFrame(rows)


def page(searched: pd.DataFrame, raced: pd.DataFrame, unseen: pd.DataFrame, seeds: pd.DataFrame) -> str:
    """Return the tables as Markdown; of the sets of a simulation, the mean."""
    policies = searched.drop(columns=["cells", "hours of the full search"])
    for name, digits in (("within a factor of two", 1), ("same rate", 0), ("share", 0)):
        policies[name] = [f"{100 * value:.{digits}f} %" for value in policies[name]]
    cells, hours = searched[["cells", "hours of the full search"]].iloc[0]
    means = seeds.groupby(["truth", "seeds are", "plan"], sort=False).mean(numeric_only=True).reset_index()
    means["worst set"] = seeds.groupby(["truth", "seeds are", "plan"], sort=False)["false studies"].max().values
    for name in ("false studies", "worst set", "decided"):
        means[name] = [f"{100 * value:.1f} %" for value in means[name]]
    parts = [
        "    python scripts/referee.py",
        "# What `compare` saves, and at what risk",
        f"The search for a learning rate, replayed on {cells:.0f} recorded ones, whose runs but those of the best rate "
        f"took {hours:.1f} hours of one core. A share is of these. Points lost are on test, over seeds that both have.",
        policies.round(2).to_markdown(index=False),
        *_of_races(raced),
        *_of_unseen(unseen),
        f"Seeds in turn beside 3 and 8 for all: {REPETITIONS:,} studies of each kind and set, with the variances of "
        f"{', '.join(seeds['set'].unique())}, {ROWS} test rows that weigh as those do, and a margin of one point. "
        "Truths are in points below the best. Heavy: seeds by Student's t with three degrees of freedom. Uneven: one "
        "method moves three times as far, of twelve ten times. Tailed: one run in eight ends ten points low. One "
        "falls: so do those of one method alone, whose other runs make up for it; before one has fallen nothing tells. "
        "Decided: methods called worse, or as good within the margin.",
        means.round(1).to_markdown(index=False),
    ]
    return "\n\n".join(parts) + "\n"


def _of_races(found: pd.DataFrame) -> list[str]:
    """Return what a race comes to, and the races that the default loses by."""
    table = over_races(found)
    names = {"lost": "points lost", "most": "at most", "dropped": "best dropped", "runs": "runs a method"}
    shown = table.assign(dropped=[f"{100 * share:.0f} %" for share in table["dropped"]]).rename(columns=names)
    default = found[(found["until"] == HALF) & (found["left"] == SURVIVORS)]
    missed = default[default["dropped"] != ""].sort_values("lost", ascending=False)
    columns = ["study", "set", "size", "methods", "dropped", "lost"]
    return [
        "The race of methods: after a share of their steps (until) at the best rate of a quarter, the few of the least "
        "loss on validation are left. Points lost are on test: the best method of all less the best of those left, "
        f"each at the rate of its quick search, over {len(default)} races of {LEAST_METHODS} methods or more. A run is "
        "a whole one, searches included, before any second seed. Losses of single validation rows are not recorded: "
        "`compare` lets methods go on, too, that these do not tell from the third.",
        shown.round(2).to_markdown(index=False),
        f"Races in which {SURVIVORS} after half a run drop the best method:",
        missed[columns].round(2).to_markdown(index=False),
    ]


def _of_unseen(found: pd.DataFrame) -> list[str]:
    """Return what the default loses in races on sets that it was not made on."""
    default = found[(found["until"] == HALF) & (found["left"] == SURVIVORS)]
    columns = ["set", "methods", "dropped", "lost", "full", "runs"]
    names = {"dropped": "best dropped", "lost": "points lost", "full": "from full searches", "runs": "runs a method"}
    return [
        "The same on sets that the rule was not made on (`make race ONLY=stage=unseen`), one seed. The best of all is "
        "the best on test here, which luck helps, too. From full searches: below the best method, each method at the "
        f"best rate of its full search; {default['full'].mean():.1f} points on the mean.",
        default[columns].rename(columns=names).round(2).to_markdown(index=False),
    ]


@cli.script
def main() -> None:
    all_cells = cells(RESULTS)
    searched, raced, unseen = replay(all_cells), races(all_cells), races(cells(RESULTS, UNSEEN))
    parts = components(RESULTS)
    seeds = simulate(parts, REPETITIONS)
    out = RESULTS / "referee"
    out.mkdir(exist_ok=True)
    write_atomic(out / "spread.csv", spread(parts).to_csv(index=False, float_format="%.4g"))
    write_atomic(out / "referee.md", page(searched, raced, unseen, seeds))
    print(out / "referee.md")


if __name__ == "__main__":
    sys.exit(main())
