"""Intervals of differences: how often they hold the truth.

    python scripts/intervals.py    # or `make coverage`; some minutes of one core

Coverage is of 95 % intervals by components and by Student's t over the seeds alone, with 2 to 8 seeds.
Two kinds of experiments whose truth is known. *Resampled*: predictions of two forms with eight seeds are all there is;
an experiment draws seeds and test examples of them, and the truth is their mean difference. *Fitted*: the components of
variance of a set's runs of the one protocol (protocol.py; medians over its pairs of forms), with seeds that are normal,
or heavy-tailed as where a run collapses (Student's t with three degrees of freedom, of the same variance). Then five
sets (OF_FIVE) with these components, of which the truth is the mean of all such sets: the interval of random effects,
as sets differ by 0, 1 and 3 points. *Races*: twelve forms beside one reference,
which all comparisons share, with the same components; counted are the races in which anything is decided of forms that
are as good as the reference. Writes OUT/coverage.{md,csv,svg} and OUT/races.csv.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from protocol import BUDGET, at_best_rates, forms, usual
from scipy.special import stdtr

from partial_lora import cli
from partial_lora.errors import PartialLoraError
from partial_lora.files import write_atomic
from partial_lora.report.drawing import save
from partial_lora.report.pairs import Pair, by_seed, differences_by_example
from partial_lora.report.rows import NONE
from partial_lora.report.statistics import LEVEL, by_sides, estimate, mean_squares, over_sets

SEEDS = (2, 3, 4, 5, 6, 7, 8)
FEWEST = 3  # seeds of a pair that components are taken from
COMPONENTS, ALONE = "components", "seeds alone"
FIVE, OF_FIVE = "five sets", ("digits", "gtsrb", "signdigits", "sst2", "trec")  # those of them that are there
FORMS, FAR, RACES = 12, 0.2, 2000  # beside the reference; how far those are that differ; races of each kind
RULES = (
    "components, Holm",
    "components, each side by Holm",
    "components, uncorrected",
    "seeds alone, Holm",
    "components with Satterthwaite's freedom, Holm",
)
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


# --- Races: many comparisons with one reference.


def race(
    variances: Components, examples: int, seeds: int, differing: int, *, heavy: bool, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the seeds' mean differences (races, seeds, forms), and the mean squares of examples and of what is left.

    Of a difference a form and the reference have half of each component. The last `differing` forms are far better than
    the reference, all others as good. Sums of squares over examples are not drawn entry by entry: those of normal
    numbers of all forms together have Wishart's distribution, and Bartlett's factor of it has a row a form.
    """
    of_seeds, of_examples, left = (math.sqrt(variance / 2) for variance in variances)
    shape = (RACES, seeds, FORMS + 1)
    luck = generator.standard_t(3, shape) / math.sqrt(3) if heavy else generator.normal(size=shape)
    means = of_seeds * luck + left / math.sqrt(examples) * generator.normal(size=shape)
    means += of_examples / math.sqrt(examples) * generator.normal(size=(RACES, 1, FORMS + 1))
    means[..., FORMS + 1 - differing :] += FAR

    def mean_square(deviation: float, freedom: int) -> np.ndarray:
        factor = np.tril(generator.normal(size=(RACES, FORMS + 1, FORMS + 1)), -1)
        diagonal = np.arange(FORMS + 1)
        factor[:, diagonal, diagonal] = np.sqrt(generator.chisquare(freedom - diagonal, size=(RACES, FORMS + 1)))
        return deviation**2 * ((factor[:, 1:] - factor[:, :1]) ** 2).sum(axis=-1) / freedom

    by_example = mean_square(math.sqrt(seeds * of_examples**2 + left**2), examples - 1)
    return means[..., 1:] - means[..., :1], by_example, mean_square(left, (seeds - 1) * (examples - 1))


def estimates(
    means: np.ndarray, by_example: np.ndarray, rest: np.ndarray, examples: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return differences and errors, as `statistics.estimate` does of one, and the degrees of freedom of Satterthwaite.

    means: of the seeds (races, seeds, forms). Satterthwaite's freedom, which `estimate` does not take, is that of all
    parts together; seeds that happen to differ less than what is left are taken for seeds that do not differ.
    """
    seeds = means.shape[1]
    spread = means.var(axis=1, ddof=1) / seeds
    by_example, left = by_example / (seeds * examples), rest / (seeds * examples)
    extra, free = np.maximum(0, by_example - left), (seeds - 1) * (examples - 1)
    variance = np.maximum(spread, left) + extra
    squares = np.where(spread < left, left**2 / free, spread**2 / (seeds - 1))
    squares += np.where(extra > 0, by_example**2 / (examples - 1) + left**2 / free, 0)
    return means.mean(axis=1), np.sqrt(variance), variance**2 / squares


def falsely_decided(
    variances: Components, examples: int, seeds: int, differing: int, *, heavy: bool, generator: np.random.Generator
) -> dict[str, float]:
    """Return by RULES the share of races that decide anything of forms that are as good as the reference."""
    means, by_example, rest = race(variances, examples, seeds, differing, heavy=heavy, generator=generator)
    difference, error, satterthwaite = estimates(means, by_example, rest, examples)
    alone = means.std(axis=1, ddof=1) / math.sqrt(seeds)
    above, below = (np.minimum(1, 2 * stdtr(seeds - 1, side * difference / error)) for side in (-1, 1))
    both, equal = np.minimum(above, below), FORMS - differing  # the equal forms are the first

    def share(*sides: np.ndarray) -> float:
        """Return the share of races in which an equal form is within its level; those of one side are Holm's."""
        return fmean(
            any(
                p <= level
                for ends, levels in zip(race[:equal], by_sides(race), strict=False)
                for p, level in zip(ends, levels, strict=True)
            )
            for race in np.stack(sides, axis=-1).tolist()
        )

    found = (
        share(both),
        share(above, below),
        float((both[:, :equal] <= 1 - LEVEL).any(axis=1).mean()),
        share(2 * stdtr(seeds - 1, -abs(difference) / alone)),
        share(2 * stdtr(satterthwaite, -abs(difference) / error)),
    )
    return dict(zip(RULES, found, strict=True))


def races(every: Mapping[str, list[np.ndarray]]) -> pd.DataFrame:
    """Return a row for each kind of race, set, number of seeds and rule, with the share that decides falsely."""
    rows = []
    for heavy, (task, of_pairs), differing in product((False, True), every.items(), (0, FORMS // 2)):
        variances, generator = np.median([components(d) for d in of_pairs], axis=0), np.random.default_rng(0)
        named = {"seeds' tails": "heavy" if heavy else "normal", "forms that differ": differing, "set": task}
        for seeds in SEEDS[1:]:
            found = falsely_decided(variances, of_pairs[0].shape[1], seeds, differing, heavy=heavy, generator=generator)
            rows += [named | {"seeds": seeds, "rule": rule, "false": share} for rule, share in found.items()]
    return pd.DataFrame(rows)


def draw(numbers: pd.DataFrame, out: Path) -> Path:
    """Draw the coverage of the intervals by the number of seeds, a panel for each kind of experiment."""
    five = numbers["set"] == FIVE
    panels = [*numbers[~five].groupby("experiments", sort=False), (FIVE, numbers[five])]
    figure = Figure(figsize=(3.2 * len(panels), 3.6), layout="constrained")
    looks = {COMPONENTS: ("C0", "o"), ALONE: ("C2", "^")}
    for axes, (title, part) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        axes.axhline(0.95, color="0.4", linestyle=":", linewidth=1)
        for (name, *_), own in part.groupby(["interval", "experiments", "set"], sort=False):
            color, marker = looks[name]
            axes.plot(own["seeds"], own["coverage"], color=color, marker=marker, markersize=4, linewidth=1, alpha=0.7)
        axes.set(title=title, xlabel="seeds", xticks=SEEDS)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("share of intervals that hold the truth")
    handles = [figure.axes[0].plot([], [], color=color, marker=mark)[0] for color, mark in looks.values()]
    figure.legend(handles, list(looks), loc="outside lower center", ncols=2, frameon=False)
    return save(figure, out / "coverage.svg")


def coverage_page(
    numbers: pd.DataFrame, fits: pd.DataFrame, raced: pd.DataFrame, command: str, repetitions: int
) -> str:
    """Return the tables as Markdown: coverage and mean width by the number of seeds, the components, and races."""
    cells = [f"{held:.3f} ({width:.1f})" for held, width in zip(numbers["coverage"], numbers["width"], strict=True)]
    shown = by_seeds(numbers.assign(cell=cells), ["experiments", "set", "interval"])
    columns = ["seeds' tails", "forms that differ", "rule"]
    over_sets = raced.groupby([*columns, "seeds"], sort=False)["false"].agg(["min", "max"]).reset_index()
    ends = zip(over_sets["min"], over_sets["max"], strict=True)
    shares = over_sets.assign(cell=[f"{100 * low:.1f} to {100 * high:.1f} %" for low, high in ends])
    parts = [
        f"    {command}",
        "# How often 95 % intervals hold the truth",
        f"Coverage over {repetitions} experiments, and in brackets the mean width in points. Resampled: "
        f"{2 * repetitions} experiments, out of the predictions of all pairs of methods with eight seeds. Fitted: with "
        f"the components below. Five sets: {math.ceil(repetitions / 2)} experiments; the truth is the mean of all sets "
        "like them. Seeds alone: Student's t over the seeds' scores, as where predictions were not kept.",
        shown.to_markdown(index=False),
        "Components of a difference, standard deviations in points, medians over pairs of a set's methods:",
        fits.round({"of seeds": 2, "of examples": 1, "left": 1}).to_markdown(index=False),
        "# How often a race decides something falsely",
        f"{FORMS} forms beside one reference, {RACES:,} races for each of the sets above, with its components; cells "
        "have the lowest and the highest set's share. Counted are races in which a form is called better or worse that "
        "is as good as the reference; forms that differ are far better, so that Holm's steps get past them. Components "
        "with Holm is the rule of rankings, each side by Holm that of claims. Degrees of freedom of Satterthwaite take "
        "seeds that happen to agree for seeds that do not differ. Only `compare` uses them, where all "
        "methods together say how far seeds spread.",
        by_seeds(shares, columns).to_markdown(index=False),
    ]
    return "\n\n".join(parts) + "\n"


def by_seeds(cells: pd.DataFrame, rows: list[str]) -> pd.DataFrame:
    """Return the column `cell` with a column for each number of seeds."""
    cells = cells.assign(order=cells.groupby(rows, sort=False).ngroup(), seeds=cells["seeds"].astype(str) + " seeds")
    table = cells.pivot(index=["order", *rows], columns="seeds", values="cell")
    return table.reset_index().drop(columns="order")


# --- The command.


@cli.script
def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/decided"))
    parser.add_argument("--out", type=Path, default=Path("results/coverage"))
    parser.add_argument("--repetitions", type=int, default=500, help="of an experiment")
    options = parser.parse_args(arguments)
    every = differences(options.results)
    raced, (numbers, fits) = races(every), simulate(every, options.repetitions)
    options.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "scripts/intervals.py", *arguments])
    page = coverage_page(numbers, fits, raced, command, options.repetitions)
    write_atomic(options.out / "coverage.csv", numbers.to_csv(index=False, float_format="%.5g"))
    write_atomic(options.out / "coverage.md", page)
    write_atomic(options.out / "races.csv", raced.to_csv(index=False, float_format="%.5g"))
    draw(numbers, options.out)
    print(page)


if __name__ == "__main__":
    sys.exit(main())
