"""The claims of conf/experiment/decided.yaml, from finished runs: differences by set, verdicts at two points.

    python scripts/decided.py results/decided

Of every form the runs at the learning rate that is best on validation over the seeds that chose it. A claim is of the
mean of all such sets, whatever their model, and then of each set by itself: two sets say next to nothing of others. A
set at its ceiling, where dense LoRA errs on less than 3 % of test rows, is in no mean: there all methods are alike, and
the narrow intervals would weigh most.
With the scores stands what a form costs: seconds a step, memory, minutes of calibration. A table says how far
calibrated shares of two draws, two searches and two sets agree.
Test loss is a second endpoint. Writes RESULTS/tables/decided.md, decided.csv, verdicts.csv, loss.csv and
loss_from_dense.csv.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations, product
from pathlib import Path

import pandas as pd
from claims import (
    ALL_SETS,
    AS_GOOD,
    AVERAGE,
    BETTER,
    FIRST_LOOK,
    NO_RUNS,
    at_ceiling,
    by_loss,
    differences,
    in_one_table,
    interval,
    judged,
    readable_differences,
    readable_scores,
    scores,
    tabled,
)
from protocol import BUDGET, PARTIAL, THRESHOLD, UNIFORM, at_best_rates, forms, usual

from partial_lora import cli
from partial_lora.calibration.reliability import mean_difference
from partial_lora.files import write_atomic
from partial_lora.report import ranking
from partial_lora.report.pairs import Pair, between, by_seed
from partial_lora.report.records import Run
from partial_lora.report.rows import NONE

ELEMENT = "partial mask=element, PEFT's draw"
FLOW = "flow, equal shares"
SCALED_LORI, ATTENTION = "lori row_exponent=1", "lora on attn.qkv"
BY_GRADIENT, AT_ONE_RATE = f"{PARTIAL}, by gradient", f"{UNIFORM}, {PARTIAL}'s rate"
CAPS_OFF, MEAN = f"{PARTIAL}, caps at 0.99", f"{PARTIAL}, mean of draws"
REFERENCES = ("dense", "lora", UNIFORM)
# Differences that no planned claim is about.
BESIDE = [
    (UNIFORM, "dense"),
    ("lora", "dense"),
    (UNIFORM, "lora"),
    (BY_GRADIENT, PARTIAL),
    (BY_GRADIENT, UNIFORM),
    (PARTIAL, AT_ONE_RATE),
    *((form, other) for form in (CAPS_OFF, MEAN) for other in (PARTIAL, AT_ONE_RATE)),
    (MEAN, UNIFORM),
    ("shuffled", UNIFORM),
    ("targeted", "dense"),
    ("random_weights", "dense"),
    ("random_weights", "lora"),
    ("entries", UNIFORM),
    ("entries", "dense"),
    ("entries", "lora"),
    ("oft", "dense"),
    ("oft", "lora"),
    (ELEMENT, "entries"),
    *(("lori", other) for other in ("dense", UNIFORM)),
    *((ATTENTION, other) for other in ("dense", "lora", UNIFORM, "lori")),
    *((SCALED_LORI, other) for other in ("dense", "lora", UNIFORM)),
    *((f"{PARTIAL}, rank {rank}", f"{UNIFORM}, rank {rank}") for rank in (4, 8)),
    *((f"{form}, rank {rank}", form) for form in (PARTIAL, UNIFORM) for rank in (4, 8)),
]
PAPERS = [
    (PARTIAL, "dense", AS_GOOD, BUDGET),
    (PARTIAL, "targeted", AS_GOOD, BUDGET),
    (PARTIAL, UNIFORM, BETTER, BUDGET),
]
CLAIMS = [
    *PAPERS,
    (PARTIAL, "lora", AS_GOOD, BUDGET),
    (PARTIAL, "random_weights", AS_GOOD, BUDGET),
    (PARTIAL, "entries", AS_GOOD, BUDGET),
    (PARTIAL, ELEMENT, AS_GOOD, BUDGET),
    (PARTIAL, "partial, PEFT's draw", BETTER, BUDGET),
    (PARTIAL, f"{PARTIAL}, shrink 0.5", BETTER, BUDGET),
    (PARTIAL, f"{PARTIAL}, shrink 2", BETTER, BUDGET),
    (PARTIAL, "shuffled", BETTER, BUDGET),
    ("hira", "dense", AS_GOOD, BUDGET),
    ("hira", "lora", BETTER, BUDGET),
    ("lori", "lora", AS_GOOD, BUDGET),
    ("lori", PARTIAL, BETTER, BUDGET),
    (PARTIAL, "dense", AS_GOOD, THRESHOLD),
    (PARTIAL, "targeted", AS_GOOD, THRESHOLD),
]
# Of stages that were added later (measures, flow, plain LoRA at the threshold), corrected among themselves: the plan
# of the others was without them.
LATER = [(PARTIAL, "targeted", AS_GOOD, BUDGET), (UNIFORM, FLOW, AS_GOOD, BUDGET), (PARTIAL, "lora", BETTER, THRESHOLD)]

COLUMNS = ["claim", "where", "alone", "paper's", "verdict", "found"]


@cli.script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    options = parser.parse_args(arguments)
    every, problems = forms(options.results)
    runs = usual(every).assign(model="all", calibration_seconds=lambda own: own["run"].map(_calibrated_for))
    best, by_svd = at_best_rates(runs), runs["importance"] == ""
    one_rate = at_one_rate(runs[by_svd], best[best["importance"] == ""])
    write(pd.concat([best, one_rate], ignore_index=True), options.results, problems)


def at_one_rate(runs: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of one share everywhere at the rate of calibrated shares, where its own is another.

    At the best rate of each, shares and rates differ together; here shares alone do.
    """
    rows = [runs.iloc[:0]]
    for task, own in best[best["operating_point"] == BUDGET].groupby("task"):
        rates = own.groupby("method")["learning_rate"].first()
        if {PARTIAL, UNIFORM} <= set(rates.index) and rates[PARTIAL] != rates[UNIFORM]:
            of_task = runs[(runs["task"] == task) & (runs["operating_point"] == BUDGET)]
            same = of_task[(of_task["method"] == UNIFORM) & (of_task["learning_rate"] == rates[PARTIAL])]
            same = ranking.once(same, [task, UNIFORM])
            seeds = set(own.loc[own["method"] == PARTIAL, "seed"])
            if len(seeds & set(same["seed"])) >= min(FIRST_LOOK, len(seeds)):
                rows.append(same.assign(method=AT_ONE_RATE))
    return pd.concat(rows)


def prices(runs: pd.DataFrame) -> pd.DataFrame:
    """Return by set and form, at one size, the score, its lead over the references, and what a run costs (medians)."""
    rows = []
    for task, own in runs[runs["operating_point"].isin([BUDGET, NONE])].groupby("task", sort=False):
        forms = dict(iter(own.groupby("method", sort=False)))
        for form, each in sorted(forms.items(), key=lambda item: -item[1]["test"].mean()):
            leads = {f"− {name}": _lead(each, forms.get(name)) for name in REFERENCES}
            rows.append(
                {"set": task, "form": form, "test": f"{100 * each['test'].mean():.2f}"}
                | {"rate": f"{each['learning_rate'].iloc[0]:g}", **leads}
                | {"seeds": len(each), "parameters": f"{each['adapter_parameters'].median():,.0f}"}
                | {"saturated modules, median": _saturated(each)}
                | {"kept for the backward pass, MB": f"{each['saved_activation_bytes'].median() / 1e6:.1f}"}
                | {"seconds a step": f"{each['step_seconds'].median():.3f}"}
                | {"minutes of calibration": _minutes(each["calibration_seconds"], own["calibration_seconds"])}
            )
    return pd.DataFrame(rows)


def agreements(runs: pd.DataFrame) -> pd.DataFrame:
    """Return by set how far calibrated shares of partial agree (means over pairs of calibrations at one size).

    A share that says something of a set agrees with another draw of it more than with a draw of another set, and with
    another search more than with another draw.
    """
    rows, draws = [], {PARTIAL: {}, BY_GRADIENT: {}}  # by form, set and seed
    for (form, task), own in runs[runs["operating_point"] == BUDGET].groupby(["method", "task"]):
        if form in draws:
            draws[form][task] = {run.seed: run.run.record["sparsity"] for run in own.itertuples()}
    for task, searched in draws[PARTIAL].items():
        predicted = draws[BY_GRADIENT].get(task, {})
        both = [(searched[seed], predicted[seed]) for seed in searched.keys() & predicted.keys()]
        rows.append((task, "the search and gradients, one draw", both))
        rows.append((task, "the search, two draws", combinations(searched.values(), 2)))
        rows.append((task, "gradients, two draws", combinations(predicted.values(), 2)))
    for (one, first), (other, second) in combinations(draws[PARTIAL].items(), 2):
        of_one_model = [pair for pair in product(first.values(), second.values()) if pair[0].keys() == pair[1].keys()]
        rows.append((f"{one} and {other}", "the search, a draw of each", of_one_model))
    table = pd.DataFrame([{"set": task, "pairs of": name, **_alike(pairs)} for task, name, pairs in rows])
    return table[table["pairs"] > 0] if rows else table


def _alike(pairs: Iterable[tuple[Mapping, Mapping]]) -> dict[str, str | int]:
    alike = mean_difference(pairs)
    known = {key: alike[key] for key in ("pearson", "spearman", "mean_absolute")}
    return {key: NONE if value is None else f"{value:.2f}" for key, value in known.items()} | {"pairs": alike["pairs"]}


def _saturated(own: pd.DataFrame) -> str:
    """Return how many modules train at least as many numbers as they can change entries of W (median), of how many.

    Older records do not say it.
    """
    counts = pd.DataFrame([run.record["parameters"] for run in own["run"]])
    if "saturated_modules" not in counts:
        return NONE
    return f"{counts['saturated_modules'].median():.0f} of {counts['adapted_modules'].median():.0f}"


def _calibrated_for(run: Run) -> float:
    """Return the seconds of a run's calibration: 0 if it has reused another run's, NaN without one."""
    calibration = run.record.get("calibration") or {}
    return 0.0 if calibration.get("cached") else calibration.get("seconds", math.nan)


def _minutes(own: pd.Series, all_forms: pd.Series) -> str:
    """Return what a calibration takes (median): of a form or, if it has reused those of others, of all forms."""
    if own.isna().all():
        return NONE
    made = next((each[each > 0] for each in (own, all_forms) if (each > 0).any()), own)
    return f"{made.median() / 60:.1f}"


def _lead(own: pd.DataFrame, other: pd.DataFrame | None) -> str:
    """Return a form's difference to another, with its interval; a dash for itself and where no seed has both."""
    if other is None or own is other:
        return NONE
    pair = Pair(by_seed(own), by_seed(other), own["metric"].iloc[0])
    return interval({"metric": pair.metric, **asdict(between(pair))}) if pair.seeds else NONE


def by_set(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Return verdicts of single sets with a row for each claim and a column for each set.

    A cell has the difference in points, its verdict among all, and where they are others the verdict among the paper's
    claims and the verdict alone.
    """
    if verdicts.empty:
        return verdicts
    places = verdicts["where"].str.split(", ", n=1, expand=True)
    cells = [_judged(row) for row in verdicts.to_dict("records")]
    table = pd.DataFrame({"claim": verdicts["claim"], "at": places[1], "set": places[0], "cell": cells})
    table["order"] = table.groupby(["claim", "at"], sort=False).ngroup()
    table = table.pivot(index=["order", "claim", "at"], columns="set", values="cell").fillna(NONE)
    return table.reset_index().drop(columns="order")


def _judged(verdict: Mapping[str, str]) -> str:
    among = verdict["verdict"].partition(", among")[0]
    others = {"among the paper's": verdict["paper's"].partition(", among")[0], "alone": verdict["alone"]}
    beside = "; ".join(f"{name}: {word}" for name, word in others.items() if word not in ("", among))
    return verdict["found"].partition(" points")[0] + f": {among}" + f" ({beside})" * bool(beside)


def write(runs: pd.DataFrame, results_dir: Path, problems: Sequence[str] = ()) -> None:
    """Write the verdicts, the scores and the differences of runs at their best rates."""
    folder = results_dir / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [*dict.fromkeys((first, second) for first, second, *_ in (*CLAIMS, *LATER)), *BESIDE]
    table = scores(runs)
    table = table[table["task"] != AVERAGE]  # the claims are of sets and of their mean
    full = at_ceiling(table)
    numbers = pd.concat([table, differences(runs, pairs, not_in_means=full)], ignore_index=True)
    several, later = numbers["task"].eq(ALL_SETS), (numbers["importance"] != "") | (numbers["second"] == FLOW)
    later |= (numbers["second"] == "lora") & (numbers["operating_point"] == THRESHOLD)
    parts = [f"    python scripts/decided.py {results_dir}"]
    parts += [f"At its ceiling, and in no mean: {', '.join(full)}."] if full else []
    decided, planned = [], []
    for plan, own, claims in (("", ~later, CLAIMS), (", of stages that were added later", later, LATER)):
        for of, chosen in (("as means over sets", several), ("of each set by itself", ~several)):
            alone = numbers[own & chosen]
            alone = alone if chosen is several else alone.assign(model=alone["task"])
            shown = tabled(judged(alone, *claims))
            papers = tabled(judged(alone, *(PAPERS if claims is CLAIMS else ()))).rename(columns={"verdict": "paper's"})
            shown = shown.merge(papers[["claim", "where", "paper's"]], how="left").fillna("")
            planned += [[f"{row.claim} ({row.where})" for row in shown[shown["found"] == NO_RUNS].itertuples()]]
            shown = shown[shown["found"] != NO_RUNS]
            decided.append(shown)
            if len(shown):
                parts.append(f"# The claims at a margin of two points, {of}{plan}, among {shown['among'].max()}")
                readable = shown[COLUMNS] if chosen is several else by_set(shown)
                parts.append(readable.to_markdown(index=False, disable_numparse=True))
    missing = ("No runs on two sets so far", planned[0]) if several.any() else ("Without runs so far", planned[1])
    parts += [f"{missing[0]}: {'; '.join(missing[1])}."] if missing[1] else []
    tables = readable_scores(numbers) | readable_differences(numbers)
    runs = runs[runs["importance"] == ""]
    parts += ["# What each costs, and what it gains", prices(runs).to_markdown(index=False, disable_numparse=True)]
    at_budget = runs[runs["operating_point"].isin([BUDGET, NONE]) & (runs["method"] != AT_ONE_RATE)]
    if not at_budget.empty:
        at_budget = at_budget.assign(form=at_budget["method"], size="0.13")
        for reference, name in {"lora": "loss", "dense": "loss_from_dense"}.items():
            losses = by_loss(at_budget, reference)
            parts += [f"# Test loss less {reference}'s, in nats", in_one_table(losses)]
            write_atomic(folder / f"{name}.csv", losses.to_csv(index=False, float_format="%.6g"))
    if not (alike := agreements(runs)).empty:
        parts += ["# How far shares agree", alike.to_markdown(index=False, disable_numparse=True)]
    parts += [
        f"**{title}**\n\n{table.to_markdown(index=False, disable_numparse=True)}" for title, table in tables.items()
    ]
    parts += ["\n".join(f"- {line}" for line in problems)] if problems else []
    write_atomic(folder / "decided.md", "\n\n".join(parts) + "\n")
    write_atomic(folder / "decided.csv", numbers.to_csv(index=False))
    write_atomic(folder / "verdicts.csv", pd.concat(decided)[COLUMNS].to_csv(index=False))
    print(pd.concat(decided)[COLUMNS].to_string(index=False))


if __name__ == "__main__":
    sys.exit(main())
