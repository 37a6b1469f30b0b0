"""Intervals of differences: how often they hold the truth.

    python scripts/intervals.py    # or `make coverage`; some minutes of one core

Coverage is of 95 % intervals by components and by Student's t over the seeds alone, with 2 to 8 seeds.
Two kinds of experiments whose truth is known. *Resampled*: predictions of two forms with eight seeds are all there is;
an experiment draws seeds and test examples of them, and the truth is their mean difference. *Fitted*: the components of
variance of a set's runs of the one protocol (protocol.py; medians over its pairs of forms), with seeds that are normal,
or heavy-tailed as where a run collapses (Student's t with three degrees of freedom, of the same variance). Then five
sets (OF_FIVE) with these components, of which the truth is the mean of all such sets: the interval of random effects,
as sets differ by 0, 1 and 3 points. Writes OUT/coverage.{md,csv}.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from protocol import BUDGET, at_best_rates, forms, usual

from partial_lora import cli
from partial_lora.errors import PartialLoraError
from partial_lora.files import write_atomic
from partial_lora.report.pairs import Pair, by_seed, differences_by_example
from partial_lora.report.rows import NONE
from partial_lora.report.statistics import estimate, mean_squares, over_sets

SEEDS = (2, 3, 4, 5, 6, 7, 8)
FEWEST = 3  # seeds of a pair that components are taken from
COMPONENTS, ALONE = "components", "seeds alone"
FIVE, OF_FIVE = "five sets", ("digits", "gtsrb", "signdigits", "sst2", "trec")  # those of them that are there
Components = tuple[float, float, float]  # variances of seeds, of examples and of what is left
Experiment = Callable[[np.random.Generator, int], np.ndarray]
Held = dict[str, tuple[float, float]]  # by interval: how often it held the truth, and its mean width


def differences(results_dir: Path) -> dict[str, list[np.ndarray]]:
    """Return by task d (seeds, examples) of all pairs of forms with FEWEST seeds, each form at its best rate.

    Forms are those at the budget and those that are not calibrated, under the usual condition, with masks by svd.
    Raises PartialLoraError where there are none.
    """
    runs, every = usual(forms(results_dir)[0]), {}
    runs = runs[runs["operating_point"].isin((BUDGET, NONE)) & (runs["importance"] == "")]
    runs = runs[runs["metric"] == "accuracy"]
    for task, of_task in runs.groupby("task", sort=False):
        sides = [by_seed(own) for _, own in at_best_rates(of_task).groupby("method")]
        if found := by_example(combinations(sides, 2), "accuracy", FEWEST):
            every[task] = found
    if not every:
        raise PartialLoraError(f"{results_dir}: expected two forms with predictions of {FEWEST} seeds on a task")
    return every


def by_example(pairs: Iterable[Sequence[dict]], metric: str, fewest: int) -> list[np.ndarray]:
    """Return d (seeds, examples) of pairs of methods, outcomes by seed, with so many seeds and with predictions."""
    pairs = [pair for pair in (Pair(*both, metric) for both in pairs) if len(pair.seeds) >= fewest]
    return [d for pair in pairs if (d := differences_by_example(pair, sorted(pair.seeds))) is not None]


def components(d: np.ndarray) -> Components:
    """Return the variances of seeds, of examples and of what is left, of d (seeds, examples); none below zero."""
    (seeds, examples), (of_seeds, of_examples, left) = d.shape, mean_squares(d)
    return max(0.0, (of_seeds - left) / examples), max(0.0, (of_examples - left) / seeds), left


def resampled(population: np.ndarray) -> Experiment:
    """Return what draws seeds and examples out of a population (seeds, examples), less its mean."""

    def draw(generator: np.random.Generator, seeds: int) -> np.ndarray:
        rows = generator.integers(len(population), size=seeds)
        columns = generator.integers(population.shape[1], size=population.shape[1])
        return population[np.ix_(rows, columns)] - population.mean()

    return draw


def fitted(variances: Components, examples: int, *, heavy: bool = False, between: float = 0) -> Experiment:
    """Return what draws an experiment (seeds, examples) of these variances whose truth is 0.

    heavy: seeds by Student's t with three degrees of freedom. between: the standard deviation of sets about the truth.
    """
    of_seeds, of_examples, left = map(math.sqrt, variances)

    def draw(generator: np.random.Generator, seeds: int) -> np.ndarray:
        luck = generator.standard_t(3, size=(seeds, 1)) / math.sqrt(3) if heavy else generator.normal(size=(seeds, 1))
        shared, rest = generator.normal(size=examples), generator.normal(size=(seeds, examples))
        return between * generator.normal() + of_seeds * luck + of_examples * shared + left * rest

    return draw


def of_one_set(draw: Experiment, seeds: int, repetitions: int) -> Held:
    """Return how often intervals held the truth 0 of repeated experiments, and their mean width."""
    generator = np.random.default_rng(seeds)
    each = [draw(generator, seeds) for _ in range(repetitions)]
    return _held(
        {COMPONENTS: estimate(d).interval(), ALONE: estimate(d.mean(axis=1, keepdims=True)).interval()} for d in each
    )


def of_all_sets(draws: list[Experiment], seeds: int, repetitions: int) -> Held:
    """Return the same of the mean of sets, by random effects."""
    generator = np.random.default_rng(seeds)
    each = [[draw(generator, seeds) for draw in draws] for _ in range(repetitions)]
    return _held({COMPONENTS: over_sets([estimate(d) for d in sets]).interval()} for sets in each)


def _held(ends: Iterable[Mapping[str, tuple[float, float]]]) -> Held:
    held = {}
    for name, of_interval in pd.DataFrame(ends).items():
        low, high = np.array(list(of_interval)).T
        held[name] = float(((low <= 0) & (high >= 0)).mean()), float((high - low).mean())
    return held


def simulate(every: Mapping[str, list[np.ndarray]], repetitions: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a row for each kind of experiment, set, number of seeds and interval; and the components of each set.

    every: differences (seeds, examples) of the pairs of each set.
    """
    rows, fits = [], []

    def add(kind: str, task: str, seeds: int, found: Held) -> None:
        for name, (held, width) in found.items():
            named = {"experiments": kind, "set": task, "seeds": seeds, "interval": name}
            rows.append(named | {"coverage": held, "width": 100 * width})

    def fit(task: str, **settings: float) -> Experiment:
        return fitted(np.median([components(d) for d in every[task]], axis=0), every[task][0].shape[1], **settings)

    for task, of_pairs in every.items():
        deviations = 100 * np.sqrt(np.median([components(d) for d in of_pairs], axis=0))
        named = {"set": task, "pairs": len(of_pairs), "test examples": of_pairs[0].shape[1]}
        fits.append(named | dict(zip(("of seeds", "of examples", "left"), deviations, strict=True)))
        whole = [d for d in of_pairs if len(d) >= max(SEEDS)]
        for seeds in SEEDS:
            each = [of_one_set(resampled(d), seeds, math.ceil(2 * repetitions / len(whole))) for d in whole]
            if each:
                add("resampled", task, seeds, {name: np.mean([one[name] for one in each], axis=0) for name in each[0]})
            add("fitted, normal", task, seeds, of_one_set(fit(task), seeds, repetitions))
            add("fitted, heavy tails", task, seeds, of_one_set(fit(task, heavy=True), seeds, repetitions))
    for between in (0, 0.01, 0.03):
        draws = [fit(task, between=between) for task in OF_FIVE if task in every]
        for seeds in SEEDS if draws else ():
            kind = f"differing by {100 * between:g} points"
            add(kind, FIVE, seeds, of_all_sets(draws, seeds, math.ceil(repetitions / 2)))
    return pd.DataFrame(rows), pd.DataFrame(fits)


def coverage_page(numbers: pd.DataFrame, fits: pd.DataFrame, command: str, repetitions: int) -> str:
    """Return the tables as Markdown: coverage and mean width by the number of seeds, and the components."""
    cells = [f"{held:.3f} ({width:.1f})" for held, width in zip(numbers["coverage"], numbers["width"], strict=True)]
    rows = ["experiments", "set", "interval"]
    shown = numbers.assign(cell=cells, order=numbers.groupby(rows, sort=False).ngroup())
    shown = shown.assign(seeds=shown["seeds"].astype(str) + " seeds").pivot(
        index=["order", *rows], columns="seeds", values="cell"
    )
    parts = [
        f"    {command}",
        "# How often 95 % intervals hold the truth",
        f"Coverage over {repetitions} experiments, and in brackets the mean width in points. Resampled: "
        f"{2 * repetitions} experiments, out of the predictions of all pairs of methods with eight seeds. Fitted: with "
        f"the components below. Five sets: {math.ceil(repetitions / 2)} experiments; the truth is the mean of all sets "
        "like them. Seeds alone: Student's t over the seeds' scores, as where predictions were not kept.",
        shown.reset_index().drop(columns="order").to_markdown(index=False),
        "Components of a difference, standard deviations in points, medians over pairs of a set's methods:",
        fits.round({"of seeds": 2, "of examples": 1, "left": 1}).to_markdown(index=False),
    ]
    return "\n\n".join(parts) + "\n"


# --- The command.


@cli.script
def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/decided"))
    parser.add_argument("--out", type=Path, default=Path("results/coverage"))
    parser.add_argument("--repetitions", type=int, default=500, help="of an experiment")
    options = parser.parse_args(arguments)
    numbers, fits = simulate(differences(options.results), options.repetitions)
    options.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "scripts/intervals.py", *arguments])
    page = coverage_page(numbers, fits, command, options.repetitions)
    write_atomic(options.out / "coverage.csv", numbers.to_csv(index=False, float_format="%.5g"))
    write_atomic(options.out / "coverage.md", page)
    print(page)


if __name__ == "__main__":
    sys.exit(main())
