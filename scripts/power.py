"""Seeds that decide whether a method is as good as another to within one or two points, and steps to train.

    python scripts/power.py               # or `make power`; from committed records alone

*Seeds*: the components of variance of differences (scripts/interval_coverage.py), a set's committed runs, and the test
rows that `make decided` has give the error of S seeds; where the truth is 0, the interval lies above minus the margin
with the probability of a noncentral Student's t. Counted are the seeds with which that is 80 %, by itself and as the
hardest of twelve claims (Holm). *Steps*: what validation still gained in the last quarter of committed runs. Writes
OUT/power.md and .csv.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from interval_coverage import components, pairs
from scipy.special import nctdtr, stdtrit

from partial_lora import cli
from partial_lora.files import write_atomic
from partial_lora.report import race, records

MARGINS = (0.01, 0.02)
CLAIMS = 12
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


def error(variances: tuple[float, float, float], examples: int, seeds: int) -> tuple[float, float]:
    """Return the standard error of a mean difference, and Satterthwaite's degrees of freedom, as they are expected.

    variances: of seeds, of examples and of what is left (`interval_coverage.components`).
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


def power(
    variances: tuple[float, float, float], examples: int, seeds: int, margin: float, significance: float
) -> float:
    """Return the chance that the interval lies above -margin where the truth is 0."""
    deviation, freedom = error(variances, examples, seeds)
    return float(1 - nctdtr(freedom, margin / deviation, stdtrit(freedom, 1 - significance / 2)))


def needed(variances: tuple[float, float, float], examples: int, margin: float, significance: float) -> int | None:
    """Return the fewest seeds, of at most 64, that decide it with a chance of 80 %; None where no number does."""
    enough = (seeds for seeds in range(2, MOST + 1) if power(variances, examples, seeds, margin, significance) >= POWER)
    return next(enough, None)


def seeds_by_set(results_dir: Path) -> pd.DataFrame:
    """Return a row for each set: its components, and the seeds that decide each margin."""
    every: dict[str, list[tuple[float, float, float]]] = {}
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


def _half(variances: tuple[float, float, float], examples: int, seeds: int) -> float:
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
        for run, usual in zip(runs, records.table(runs)["usual"] if runs else (), strict=True):
            if not usual:
                continue
            metric, config = run.record["metrics"]["test"]["primary"], run.record["config"]
            curve = {each["step"]: each[f"eval_{metric}"] for each in run.record["history"] if f"eval_{metric}" in each}
            if len(curve) > 2 and not config["task"].get("members"):
                form = f"{race.form_of(config)}, {run.row['operating_point']}"
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


def page(seeds: pd.DataFrame, steps: pd.DataFrame, command: str) -> str:
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


def main(arguments: list[str] | None = None) -> int:
    """Write the tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="the folder of decided, longer, forms and cpu"
    )
    parser.add_argument("--out", type=Path, default=Path("results/power"))
    options = parser.parse_args(arguments)

    def command() -> int:
        seeds = seeds_by_set(options.results / "cpu")
        steps = steps_by_set(options.results / name for name in HISTORIES)
        options.out.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out / "power.csv", seeds.to_csv(index=False, float_format="%.5g"))
        text = page(seeds, steps, shlex.join(["python", "scripts/power.py", *(arguments or sys.argv[1:])]))
        write_atomic(options.out / "power.md", text)
        print(text)
        return 0

    return cli.guarded(command)


if __name__ == "__main__":
    sys.exit(main())
