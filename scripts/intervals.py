"""Intervals of differences: how often they hold the truth, and how many seeds and steps decide a margin.

    python scripts/intervals.py coverage    # or `make coverage`; about seven minutes of one core
    python scripts/intervals.py power       # or `make power`; from committed records alone

*Coverage*: of 95 % intervals by components and by a bootstrap, with 2 to 8 seeds. Two kinds of experiments whose truth
is known. *Resampled*: predictions of two methods with eight seeds are all there is; an experiment draws seeds and test
examples of them, and the truth is their mean difference. *Fitted*: the components of variance of a set's committed runs
(medians over its pairs of methods), with seeds that are normal, or heavy-tailed as where a run collapses (Student's t
with three degrees of freedom, of the same variance). Then five sets with these components, of which the truth is the
mean of all such sets: the interval of random effects beside a bootstrap of the five at hand, as sets differ by 0, 1 and
3 points. Writes OUT/coverage.{md,csv,png,svg}.

*Power*: the same components and the test rows that `make decided` has give the error of S seeds; where the truth is 0,
the interval lies above minus the margin with the probability of a noncentral Student's t. Counted are the seeds with
which that is 80 %, by itself and as the hardest of twelve claims (Holm). *Steps*: what validation still gained in the
last quarter of committed runs. Writes OUT/power.{md,csv}.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.special import nctdtr, stdtrit

from partial_lora import cli
from partial_lora.errors import PartialLoraError
from partial_lora.files import write_atomic
from partial_lora.report import folders, ranking, records
from partial_lora.report.comparable import POINTS, gather
from partial_lora.report.drawing import save
from partial_lora.report.pairs import Pair, by_seed, differences_by_example
from partial_lora.report.rows import NONE
from partial_lora.report.statistics import bootstrap, ends_of, estimate, mean_squares, over_sets

SEEDS = (2, 3, 5, 8)
FEWEST = 3  # seeds of a pair that components are taken from
DRAWS = 300
COMPONENTS, BOOTSTRAP = "components", "bootstrap"
FIVE = "five sets"
MARGINS, CLAIMS = (0.01, 0.02), 12
POWER, SIGNIFICANCE, MOST = 0.8, 0.05, 64
TEST_ROWS = {
    "digits": 899,
    "cifar10": 2000,
    "flowers17": 340,
    "gtsrb": 860,
    "signdigits": 600,
    "sst2": 872,
    "trec": 500,
}
HISTORIES = (
    "decided",
    "longer",
    "forms",
    "cpu",
)  # whose runs say how long validation rises; the longest of a set count
STILL = 0.01  # a last quarter that gains less has stopped
Components = tuple[float, float, float]  # variances of seeds, of examples and of what is left
Experiment = Callable[[np.random.Generator, int], np.ndarray]
Held = dict[str, tuple[float, float]]  # by interval: how often it held the truth, and its mean width


def pairs(results_dir: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (task, "method − method, point", d (seeds, examples)) of all pairs of methods with three seeds or more.

    Of each set: dense methods and, at an operating point, what has masks or a budget by `svd`. Raises PartialLoraError
    where there are none.
    """
    found = False
    runs = gather(results_dir).comparable
    runs = runs[runs["importance"].isin(["svd", NONE]) & (runs["mixture"] == "") & (runs["metric"] == "accuracy")]
    runs = runs[~runs["method"].isin(["probe", "full"])]
    for task, of_task in runs.groupby("task", sort=False):
        for point in POINTS:
            at_point = of_task[of_task["operating_point"].isin([point, NONE])]
            sides = {name: by_seed(own) for name, own in at_point.groupby("method")}
            for first, second in combinations(sides, 2):
                pair = Pair(sides[first], sides[second], "accuracy")
                d = differences_by_example([pair], sorted(pair.seeds)) if len(pair.seeds) >= FEWEST else None
                if d is not None:  # None where predictions were not kept
                    found = True
                    yield task, f"{first} − {second}, {point}", d
    if not found:
        raise PartialLoraError(f"{results_dir}: expected two methods with predictions of {FEWEST} seeds on a task")


def components(d: np.ndarray) -> Components:
    """Return the variances of seeds, of examples and of what is left, of d (seeds, examples); none below zero."""
    (seeds, examples), (of_seeds, of_examples, left) = d.shape, mean_squares(d)
    return max(0.0, (of_seeds - left) / examples), max(0.0, (of_examples - left) / seeds), left


# --- Coverage.


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
    each = (draw(generator, seeds) for _ in range(repetitions))
    return _held((estimate(d).interval(), ends_of(bootstrap(d, generator, DRAWS))) for d in each)


def of_all_sets(draws: list[Experiment], seeds: int, repetitions: int) -> Held:
    """Return the same of the mean of sets: by random effects, and by a bootstrap of the sets at hand."""
    generator = np.random.default_rng(seeds)
    each = ([draw(generator, seeds) for draw in draws] for _ in range(repetitions))
    return _held(
        (
            over_sets([estimate(d) for d in sets]).interval(),
            ends_of(np.mean([bootstrap(d, generator, DRAWS) for d in sets], axis=0)),
        )
        for sets in each
    )


def _held(ends: Iterable[tuple[tuple[float, float], tuple[float, float]]]) -> Held:
    low, high = np.moveaxis(np.array(list(ends)), -1, 0)
    held, width = ((low <= 0) & (high >= 0)).mean(axis=0), (high - low).mean(axis=0)
    return {name: (float(held[at]), float(width[at])) for at, name in enumerate((COMPONENTS, BOOTSTRAP))}


def simulate(results_dir: Path, repetitions: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a row for each kind of experiment, set, number of seeds and interval; and the components of each set."""
    rows, fits, every = [], [], {}
    for task, _, d in pairs(results_dir):
        every.setdefault(task, []).append(d)

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
        draws = [fit(task, between=between) for task in list(every)[:5]]
        for seeds in SEEDS:
            kind = f"differing by {100 * between:g} points"
            add(kind, FIVE, seeds, of_all_sets(draws, seeds, math.ceil(repetitions / 2)))
    return pd.DataFrame(rows), pd.DataFrame(fits)


def draw(numbers: pd.DataFrame, out: Path) -> Path:
    """Draw the coverage of both intervals by the number of seeds, a panel for each kind of experiment."""
    five = numbers["set"] == FIVE
    panels = [*numbers[~five].groupby("experiments", sort=False), (FIVE, numbers[five])]
    figure = Figure(figsize=(3.2 * len(panels), 3.6), layout="constrained")
    looks = {COMPONENTS: ("C0", "o"), BOOTSTRAP: ("C1", "s")}
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


def coverage_page(numbers: pd.DataFrame, fits: pd.DataFrame, command: str, repetitions: int) -> str:
    """Return the table as Markdown: coverage and mean width by the number of seeds, and the components."""
    rows = {}
    for row in numbers.itertuples():
        cells = rows.setdefault((row.experiments, row.set), {"experiments": row.experiments, "set": row.set})
        cells[f"{row.interval}, {row.seeds} seeds"] = f"{row.coverage:.3f} ({row.width:.1f})"
    shown = fits.round({"of seeds": 2, "of examples": 1, "left": 1})
    parts = [
        f"    {command}",
        "# How often 95 % intervals hold the truth",
        f"Coverage over {repetitions} experiments, and in brackets the mean width in points. Resampled: "
        f"{2 * repetitions} experiments, out of the predictions of all pairs of methods with eight seeds. Fitted: with "
        f"the components below. Five sets: {math.ceil(repetitions / 2)} experiments; the truth is the mean of all sets "
        "like them.",
        pd.DataFrame(rows.values()).to_markdown(index=False),
        "Components of a difference, standard deviations in points, medians over pairs of a set's methods:",
        shown.to_markdown(index=False),
    ]
    return "\n\n".join(parts) + "\n"


# --- Power.


def error(variances: Components, examples: int, seeds: int) -> tuple[float, float]:
    """Return the standard error of a mean difference, and Satterthwaite's degrees of freedom, as they are expected.

    variances: of seeds, of examples and of what is left (`components`).
    """
    of_seeds, of_examples, left = variances
    total = seeds * examples
    squares = [  # expected mean squares, as shares of the variance of the mean, with their degrees of freedom
        ((examples * of_seeds + left) / total, seeds - 1),
        ((seeds * of_examples + left) / total, examples - 1),
        (left / total, (seeds - 1) * (examples - 1)),
    ]
    variance = squares[0][0] + squares[1][0] - squares[2][0]
    return math.sqrt(variance), variance**2 / sum(share**2 / freedom for share, freedom in squares)


def power(variances: Components, examples: int, seeds: int, margin: float, significance: float) -> float:
    """Return the chance that the interval lies above -margin where the truth is 0."""
    deviation, freedom = error(variances, examples, seeds)
    return float(1 - nctdtr(freedom, margin / deviation, stdtrit(freedom, 1 - significance / 2)))


def needed(variances: Components, examples: int, margin: float, significance: float) -> int | None:
    """Return the fewest seeds, of at most 64, that decide it with a chance of 80 %; None where no number does."""
    enough = (seeds for seeds in range(2, MOST + 1) if power(variances, examples, seeds, margin, significance) >= POWER)
    return next(enough, None)


def seeds_by_set(results_dir: Path) -> pd.DataFrame:
    """Return a row for each set: its components, and the seeds that decide each margin."""
    every: dict[str, list[Components]] = {}
    most: dict[str, int] = {}  # examples that its committed runs have
    for task, _, d in pairs(results_dir):
        every.setdefault(task, []).append(components(d))
        most[task] = d.shape[1]
    rows = []
    for task, each in every.items():
        variances = tuple(np.median(each, axis=0))
        examples = TEST_ROWS.get(task, most[task])
        row = {"set": task, "pairs": len(each), "test rows": examples}
        row |= dict(zip(("of seeds", "of examples", "left"), 100 * np.sqrt(variances), strict=True))
        row["half interval, 8 seeds"] = 100 * _half(variances, examples, 8)
        for margin in MARGINS:
            for claims in (1, CLAIMS):
                among = "" if claims == 1 else f", among {claims}"
                row[f"{100 * margin:g} point{'s' * (margin > 0.01)}{among}"] = needed(
                    variances, examples, margin, SIGNIFICANCE / claims
                )
        rows.append(row)
    return pd.DataFrame(rows)


def _half(variances: Components, examples: int, seeds: int) -> float:
    deviation, freedom = error(variances, examples, seeds)
    return float(stdtrit(freedom, 1 - SIGNIFICANCE / 2) * deviation)


def steps_by_set(results_dirs: Iterable[Path]) -> pd.DataFrame:
    """Return a row for each set: steps, and what validation gained in the last quarter, the mean over its methods.

    Of each method at an operating point the runs at the learning rate that ends best count, under the usual conditions;
    of each set the folder of the longest runs.
    """
    rows = []
    for folder in results_dirs:
        curves: dict[tuple, list[dict[int, float]]] = {}
        runs = records.read(folder)[0]
        for run, usual in zip(runs, folders.table(runs)["usual"] if runs else (), strict=True):
            if not usual:
                continue
            metric, config = run.record["metrics"]["test"]["primary"], run.record["config"]
            curve = {each["step"]: each[f"eval_{metric}"] for each in run.record["history"] if f"eval_{metric}" in each}
            if len(curve) > 2 and not config["task"].get("members"):
                form = f"{ranking.form_of(config)}, {run.row['operating_point']}"
                key = (config["task"]["name"], form, float(config["trainer"]["learning_rate"]))
                curves.setdefault(key, []).append(curve)
        best: dict[tuple, tuple[float, int, float]] = {}
        for (task, form, _), each in curves.items():
            if not (steps := sorted(set.intersection(*map(set, each)))):
                continue
            mean = [np.mean([curve[step] for curve in each]) for step in steps]
            before = np.interp(0.75 * steps[-1], steps, mean)
            best[task, form] = max(
                best.get((task, form), (-math.inf, 0, 0.0)), (mean[-1], steps[-1], mean[-1] - before)
            )
        for task in dict.fromkeys(task for task, _ in best):
            own = [found for (name, _), found in best.items() if name == task]
            longest = max(steps for _, steps, _ in own)
            gains = [gain for _, steps, gain in own if steps == longest]
            rows.append(
                {"set": task, "records": folder.name, "steps": longest, "methods": len(gains), "gain": np.mean(gains)}
            )
    table = pd.DataFrame(rows).sort_values("steps", ascending=False, kind="stable").drop_duplicates("set")
    return table.assign(stopped=table["gain"] < STILL).reset_index(drop=True)


def power_page(seeds: pd.DataFrame, steps: pd.DataFrame, command: str) -> str:
    """Return both tables as Markdown."""
    shown = seeds.round({"of seeds": 2, "of examples": 1, "left": 1, "half interval, 8 seeds": 2})
    for name in shown.columns[shown.columns.str.contains("point")]:
        shown[name] = [f"more than {MOST}" if np.isnan(each) else f"{each:.0f}" for each in shown[name].astype(float)]
    rising = steps.assign(gain=[f"{100 * each:+.1f}" for each in steps["gain"]]).rename(
        columns={"gain": "gain of the last quarter, points"}
    )
    parts = [
        f"    {command}",
        "# Seeds that decide a margin",
        f"With a chance of {POWER:.0%}, where two methods are equally good. Components are standard deviations in "
        "points, medians over the pairs of a set's methods after 75 steps.",
        shown.to_markdown(index=False),
        "# Steps until validation stops rising",
        f"Stopped: the last quarter of the longest committed runs gained less than {100 * STILL:g} point.",
        rising.to_markdown(index=False),
    ]
    return "\n\n".join(parts) + "\n"


def coverage(options: argparse.Namespace, command: str) -> None:
    """Write the table of coverage, its numbers and the figure."""
    numbers, fits = simulate(options.results / "cpu", options.repetitions)
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / "coverage.csv", numbers.to_csv(index=False, float_format="%.5g"))
    write_atomic(options.out / "coverage.md", coverage_page(numbers, fits, command, options.repetitions))
    draw(numbers, options.out)


def seeds_and_steps(options: argparse.Namespace, command: str) -> None:
    """Write the tables of seeds and of steps."""
    seeds = seeds_by_set(options.results / "cpu")
    steps = steps_by_set(options.results / name for name in HISTORIES)
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / "power.csv", seeds.to_csv(index=False, float_format="%.5g"))
    write_atomic(options.out / "power.md", power_page(seeds, steps, command))


WHAT = {"coverage": coverage, "power": seeds_and_steps}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of cpu and of other studies")
    parser.add_argument("--out", type=Path, help="default: results/coverage, results/power")
    parser.add_argument("--repetitions", type=int, default=500, help="of an experiment")
    options = parser.parse_args(arguments)
    options.out = options.out or Path("results", options.what)

    def command() -> int:
        WHAT[options.what](options, shlex.join(["python", "scripts/intervals.py", *arguments]))
        print((options.out / f"{options.what}.md").read_text(encoding="utf-8"))
        return 0

    return cli.guarded(command)


if __name__ == "__main__":
    sys.exit(main())
