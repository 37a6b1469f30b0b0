"""Tables 1 to 7: what finished runs say of each of the paper's claims, from their records; nothing is trained.

    python scripts/paper_tables.py table1 table4 --results results/cpu
    python scripts/paper_tables.py claims --results results/cpu     # what all of them say of the paper's claims

Writes RESULTS/tables/NAME.{md,csv}. What is missing is named; `make reproduce-NAME` trains what a table is made of.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pandas as pd
from claims import (
    ALL_SETS,
    AS_GOOD,
    AVERAGE,
    BETTER,
    DIFFERENCE,
    DIFFERENCES,
    FAILS,
    HOLDS,
    OPEN,
    ROW,
    SCORE,
    WHERE,
    Verdict,
    bootstrapped,
    counted,
    differences,
    in_words,
    interval,
    judged,
    of_all,
    paired_rows,
    part_of,
    plain,
    readable,
    readable_differences,
    readable_scores,
    scores,
    tabled,
)
from comparable import BUDGET, CELL, POINTS, THRESHOLD, Evidence, analyses, at_points, draw_of, gather

from partial_lora import cli, methods
from partial_lora.calibration.search import threshold_of
from partial_lora.errors import require
from partial_lora.files import read_json, write_atomic
from partial_lora.launching import packs
from partial_lora.report.pairs import EXAMPLES, SEEDS
from partial_lora.report.rows import COSTS, NONE, number, point_order
from partial_lora.report.statistics import MARGIN, half_interval, reliability, together
from partial_lora.report.summary import cell, measured
from partial_lora.report.tables import origin, tabulated
from partial_lora.tasks.metrics import SHARES

UNCALIBRATED = tuple(name for name, method in methods.METHODS.items() if method.size == "own")
CLAIMS = "claims"
ABOUT = {  # the title of each table, and the claim of the paper that it tests
    "table1": (
        "Table 1: images, dense against sparse adapters",
        "sparse subnetworks of LoRA match dense LoRA with up to 87 % fewer trainable parameters (eight sets "
        "of images).",
    ),
    "table2": (
        "Table 2: random against deterministic masks",
        "which rows and columns are kept does not matter: random masks reach 81.78 % on average, chosen ones 81.48 %.",
    ),
    "table3": (
        "Table 3: language, dense against sparse adapters",
        "sparse subnetworks of LoRA match dense LoRA on language, too (twelve tasks).",
    ),
    "table4": (
        "Table 4: controls of equal size, at 13 % of dense LoRA's parameters",
        "how much each layer keeps matters, which entries it keeps does not, and no repair of the flow is needed.",
    ),
    "table5": (
        "Table 5: calibration",
        "each layer's sparsity can be found by itself, from few-shot data and the frozen model, without repair.",
    ),
    "table6": (
        "Table 6: one adapter for several tasks",
        "sparse subnetworks of LoRA match dense LoRA where one adapter learns several tasks, too.",
    ),
    "table7": ("Table 7: time, memory and bytes", "what is saved is counted in trainable parameters."),
}
_CEILING = 0.98


@dataclass(frozen=True)
class Table:
    """One table, perhaps of several parts.

    claim: the paper's. numbers: as measured, a row a number, `part` saying of which part. shown: {title: what is read}.
    missing: what it would also show. origin: of the runs, preset, tuning, commit and device.
    """

    name: str
    title: str
    claim: str
    verdicts: Sequence[Verdict]
    numbers: pd.DataFrame
    shown: Mapping[str, pd.DataFrame]
    notes: Sequence[str] = ()
    missing: Sequence[str] = ()
    origin: str = ""


# Files


def write(table: Table, folder: Path, command: str) -> list[Path]:
    """Write folder/NAME.md and .csv, each whole or not at all; gives the files."""
    folder.mkdir(parents=True, exist_ok=True)
    above = [line for line in (command, table.origin) if line]
    contents = {
        "md": markdown(table, command),
        "csv": "".join(f"# {line}\n" for line in above) + table.numbers.convert_dtypes().to_csv(index=False),
    }
    for suffix, content in contents.items():
        write_atomic(folder / f"{table.name}.{suffix}", content)
    return [folder / f"{table.name}.{suffix}" for suffix in contents]


def markdown(table: Table, command: str) -> str:
    """The command, the claim, what was found of it, the parts, notes."""
    parts = [f"    {command}", table.origin, f"# {table.title}", f"The paper: {table.claim}", _of_verdicts(table)]
    for title, shown in table.shown.items():
        parts += [f"**{title}**", _tabulated(shown)]
    parts.append("\n".join(f"- {note}" for note in table.notes))
    parts.append("\n".join(f"- missing: {line}" for line in table.missing))
    return "\n\n".join(filter(None, parts)) + "\n"


def write_claims(tables: Sequence[Table], folder: Path, command: str) -> Path:
    """Write folder/claims.md: for each table the paper's claim and what was found of it. Gives the file."""
    parts = [f"    {command}", "# What the tables say of the paper's claims"]
    for table in tables:
        parts += [f"**[{table.name}]({table.name}.md)**, the paper: {table.claim}", _of_verdicts(table)]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "claims.md", "\n\n".join(parts) + "\n")
    return folder / "claims.md"


def _of_verdicts(table: Table) -> str:
    shown = tabled(table.verdicts)
    several = bool(shown["among"].max() > 1)
    return _tabulated(shown[["claim", "where", *["alone"] * several, "verdict", "found"]])


def _tabulated(shown: pd.DataFrame) -> str:
    words = {"mixture", "importance", "difference", "over", "what", "claim", "where", "found", "alone"}
    return tabulated(shown, "pipe", [name for name in shown if name in words or name.startswith("among")])


# Notes

_INTERVALS = (
    "Differences are paired by seed and test example, with 95 % intervals over both from variance components "
    f"(Student's t); better: the interval is above zero; matches: it is above −{100 * MARGIN:g} point; worse: it is "
    "below zero, and not above that; undecided: else, and of one seed always. bootstrap: the interval of seeds and "
    "examples that are drawn again, too narrow of few seeds that differ (results/coverage)."
)
_EACH = (
    "Each interval is at 95 % by itself. The last column has what is left of its verdict among the {count} of this "
    "table, by Holm's correction."
)
_OF_SETS = (
    "Over sets a difference is the mean of all sets of which these are a sample (random effects), with the interval of "
    "Hartung and Knapp; up and down count those on which the first is above and below."
)
_OF_TASKS = "The average over a mixture's members is of these alone, each counting alike, over the same seeds."
_OVER = {
    SEEDS: "Where differences are over seeds alone, predictions were not kept (or are of other examples).",
    EXAMPLES: "Where differences are over examples alone, there is one seed, and how much seeds differ is not known.",
    NONE: "Of one seed without predictions there is no interval.",
}
_BEST = "Bold: better than every other of its task and operating point, by such an interval."


def notes_of(numbers: pd.DataFrame, runs: pd.DataFrame, evidence: Evidence) -> list[str]:
    """Notes below scores and differences: intervals, ceilings, learning rates, calibrations, other runs."""
    paired, scored = part_of(numbers, DIFFERENCE), part_of(numbers, SCORE)
    notes = [_BEST] if len(scored) and scored["best"].any() else []
    if len(paired):
        notes += [_INTERVALS, _EACH.format(count=int(paired["among"].max()))]
        notes += [_OF_SETS] if (paired["task"] == ALL_SETS).any() else []
        notes += [_OF_TASKS] if (paired["task"] == AVERAGE).any() else []
        notes += [note for word, note in _OVER.items() if word in set(paired["over"])]
    if at_ceiling := saturated(numbers):
        notes.append(f"Every adapter is at 98 % or above on {', '.join(at_ceiling)}: such a task tells little apart.")
    return [*notes, *learning_rates(runs), *shared_calibrations(runs), *left_out(runs, evidence)]


def saturated(numbers: pd.DataFrame) -> list[str]:
    """The tasks that tell nothing apart: every method but the head alone is at 98 % or above."""
    scored = part_of(numbers, SCORE)
    scored = scored[scored["metric"].isin(SHARES) & (scored["method"] != "probe")] if len(scored) else scored
    lowest = scored.groupby("task", sort=False)["mean"].min() if len(scored) else pd.Series(dtype=float)
    return lowest.index[lowest >= _CEILING].tolist()


def _task_or_mixture(runs: pd.DataFrame) -> pd.Series:
    return runs["task"].where(runs["mixture"] == "", runs["mixture"])


def learning_rates(runs: pd.DataFrame) -> list[str]:
    """A line for each choice of rates and the tasks of a model that share it, where there are several rates."""
    notes = []
    for model, of_model in runs.groupby("model", sort=False):
        if of_model["learning_rate"].nunique() < 2:
            continue
        tasks: dict[str, list[str]] = {}
        for task, part in of_model.groupby(_task_or_mixture(of_model), sort=False):
            several = len(set(part["importance"]) - {NONE}) > 1
            names: dict[float, dict[str, None]] = {}
            for (method, measure, point), own in part.groupby(["method", "importance", "operating_point"], sort=False):
                where = ", ".join(word for word in ((measure, point) if several else (point,)) if word != NONE)
                for rate in own["learning_rate"]:
                    names.setdefault(rate, {})[f"{method} ({where})" if where else method] = None
            rates = "; ".join(f"{rate:g}: {', '.join(names[rate])}" for rate in sorted(names))
            tasks.setdefault(rates, []).append(task)
        notes += [f"Learning rates of {model} on {', '.join(on)}: {rates}." for rates, on in tasks.items()]
    return notes


def shared_calibrations(runs: pd.DataFrame) -> list[str]:
    """A line that names the tasks on which seeds share a calibration, whose variance an interval then lacks."""
    known = runs[runs["importance"] != NONE]
    named = []
    for task, of_task in known.groupby(_task_or_mixture(known), sort=False):
        shared = {
            measure: None
            for (measure, _), own in of_task.groupby(["importance", "method"], sort=False)
            if len({draw_of(run.record) for run in own["run"]}) < own["seed"].nunique()
        }
        every = len(shared) == of_task["importance"].nunique()
        named += [task if every else f"{task} ({', '.join(shared)})"] if shared else []
    if not named:
        return []
    return [f"On {', '.join(named)} seeds share a calibration, whose own variance the intervals do not hold."]


def left_out(runs: pd.DataFrame, evidence: Evidence) -> list[str]:
    """The notes of the evidence that are of a table's tasks, or of tasks that no table has any runs of."""
    tasks = set(runs["task"]) | set(runs["mixture"]) | (set(evidence.runs["task"]) - set(evidence.comparable["task"]))
    named = [re.compile(rf"(?<![\w+]){re.escape(task)}(?![\w+])") for task in tasks if task]
    return [note for note in evidence.notes if any(name.search(note) for name in named)]


def origin_of(runs: pd.DataFrame) -> str:
    """Preset, tuning, commit and device of a table's runs, their precision where it is not fp32; nothing of none."""
    if runs.empty:
        return ""
    known = runs.fillna(dict.fromkeys(("preset", "commit", "device"), NONE))
    return origin(known.assign(precision=known["precision"].replace("fp32", NONE)))


# What is missing


def planned(
    methods: Iterable[str], points: Sequence[str], importance: Sequence[str] = ("svd",)
) -> list[tuple[str, str, str]]:
    """(method, importance, operating point) of all runs that methods are planned with."""
    rows = []
    for method in methods:
        calibrated = [(method, measure, point) for measure in importance for point in points]
        rows += [(method, NONE, NONE)] if method in UNCALIBRATED else calibrated
    return rows


def missing(runs: pd.DataFrame, wanted: Sequence[tuple[str, ...]], command: str) -> list[str]:
    """A line for each task that lacks rows of `wanted`, or seeds that others have; command: for none at all."""
    lines = [] if len(runs) else [f"no runs; {command}"]
    for (model, mixture, task), part in runs.groupby(["model", "mixture", "task"], sort=False):
        have = {key: set(own["seed"]) for key, own in part.groupby(CELL)}
        seeds = set().union(*(have[row] for row in wanted if row in have))
        lacking = []
        for row in wanted:
            name = " ".join(word for word in row if word != NONE)
            fewer = sorted(seeds - have.get(row, set()))
            if row not in have:
                lacking.append(name)
            elif fewer:
                lacking.append(f"{name} seed {' '.join(map(str, fewer))}")
        if lacking:
            lines.append(f"{', '.join(filter(None, (model, mixture, task)))}: {', '.join(lacking)}")
    return lines


# The tables

_DENSE_AND_SPARSE = ("lora", "targeted", "partial")
_PAIRS = (("partial", "lora"), ("targeted", "lora"), ("partial", "targeted"))


def _of_methods(
    name: str,
    evidence: Evidence,
    runs: pd.DataFrame,
    numbers: pd.DataFrame,
    verdicts: Sequence[Verdict],
    lacking: Sequence[str],
    notes: Sequence[str] = (),
    shown: Mapping[str, pd.DataFrame] | None = None,
) -> Table:
    """A table of scores and differences (or what is shown in their place), with all that has to be known of them."""
    shown = readable_scores(numbers) | readable_differences(numbers) if shown is None else shown
    every = [*notes, *notes_of(numbers, runs, evidence)]
    return Table(name, *ABOUT[name], verdicts, numbers, shown, every, lacking, origin_of(runs))


def _together(*parts: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([part for part in parts if len(part)] or list(parts), ignore_index=True)


def table1(evidence: Evidence) -> Table:
    """Table 1, images: dense LoRA beside calibrated masks of random and of the most important rows and columns."""
    runs = at_points(evidence.comparable, _DENSE_AND_SPARSE, POINTS)
    runs = runs[(runs["kind"] == "images") & (runs["mixture"] == "")]
    numbers = pd.concat([scores(runs), differences(runs, _PAIRS)], ignore_index=True)
    lacking = missing(runs, planned(_DENSE_AND_SPARSE, POINTS), "make reproduce-table1")
    return _of_methods("table1", evidence, runs, numbers, _as_good(numbers, "partial", "lora"), lacking)


def _as_good(numbers: pd.DataFrame, first: str, second: str) -> list[Verdict]:
    return judged(numbers, *((first, second, AS_GOOD, point) for point in POINTS))


_MEASURES = ("svd", "snip", "imp")


def table2(evidence: Evidence) -> Table:
    """Table 2: random masks against those of the most important rows and columns, by three measures of importance."""
    methods, command = ("targeted", "partial"), "make reproduce-table2"
    runs = at_points(evidence.comparable, methods, POINTS, _MEASURES)
    runs = runs[(runs["kind"] == "images") & (runs["mixture"] == "")]
    paired = together(_together(differences(runs, [("partial", "targeted")]), over_measures(runs)))
    numbers = _together(scores(runs), paired)
    lacking = missing(runs, planned(methods, POINTS), command)
    closely = runs[runs["task"].isin(runs.loc[runs["importance"] != "svd", "task"])]
    lacking += missing(closely, planned(methods, POINTS[:1], _MEASURES[1:]), command)
    notes = [
        "The paper's averages, 81.78 − 81.48 = +0.30 points, are of other models and tasks: only the difference can be "
        "set beside these.",
        "Means over measures of importance are of differences on the same examples and seeds.",
    ]
    return _of_methods("table2", evidence, runs, numbers, _as_good(numbers, *reversed(methods)), lacking, notes)


def over_measures(runs: pd.DataFrame) -> pd.DataFrame:
    """partial less targeted, the mean over the measures of importance that a model and point have, on every task."""
    rows = []
    for (model, point), part in runs.groupby(["model", "operating_point"], sort=False):
        by_measure = {measure: own for measure, own in part.groupby("importance") if own["method"].nunique() == 2}
        measures = [measure for measure in _MEASURES if measure in by_measure]
        if len(measures) < 2:
            continue
        sides = [
            tuple(own[own["method"] == method] for method in ("partial", "targeted"))
            for own in map(by_measure.get, measures)
        ]
        name = f"mean over {', '.join(measures[:-1])} and {measures[-1]}"
        rows += paired_rows(sides, dict(zip(WHERE, (model, "", name, point), strict=True)), "partial", "targeted")
    return pd.DataFrame(rows, columns=list(DIFFERENCES))


def table3(evidence: Evidence) -> Table:
    """Table 3, language: encoders that classify, causal models on multiple choice, the frozen model beside them."""
    runs = at_points(evidence.comparable, _DENSE_AND_SPARSE, POINTS)
    runs = runs[runs["mixture"] == ""]
    generated, runs = runs[runs["kind"] == "generation"], runs[runs["kind"].isin(["texts", "causal"])]
    files = evidence.files("zero_shot.json") or evidence.files("causal/zero_shot.json")
    frozen = zero_shot(runs, read_json(files[0]) if files else {})
    numbers = _together(frozen, scores(runs), differences(runs, _PAIRS))
    lacking = missing(runs, planned(_DENSE_AND_SPARSE, POINTS), "make reproduce-table3")
    known = set(zip(frozen["model"], frozen["task"], strict=True)) if len(frozen) else set()
    causal = runs.loc[runs["kind"] == "causal", ["model", "task"]].drop_duplicates().itertuples(index=False)
    lacking += [f"{model}, {task}: zero-shot" for model, task in causal if (model, task) not in known]
    notes = ["zero-shot: the frozen model, by `python scripts/zero_shot.py`."] if len(frozen) else []
    if len(generated):
        tasks = ", ".join(sorted(set(generated["task"])))
        runs_of = counted(len(generated), "run")
        notes.append(f"Left out, as their answers are generated and not chosen: {runs_of} on {tasks}.")
    return _of_methods("table3", evidence, runs, numbers, _as_good(numbers, "partial", "lora"), lacking, notes)


def zero_shot(runs: pd.DataFrame, frozen: Mapping) -> pd.DataFrame:
    """The frozen models as a method of causal models' tasks: scores, and their average where a model has all of them.

    frozen: {task: {model, package: {metric: score}}} of scripts/zero_shot.py. A score is shown beside runs of the model
    that it is of, and of no other.
    """
    causal, rows = runs[runs["kind"] == "causal"], []
    for model, part in causal.groupby("model", sort=False):
        metrics = dict(zip(part["task"], part["metric"], strict=True))
        named = {"part": SCORE, "model": model, "mixture": "", "importance": NONE, "operating_point": NONE}
        named |= {"method": "zero-shot", "n": 0, "parameters": 0.0, "share": 0.0, "best": False}
        own = {task: record["package"] for task, record in frozen.items() if record.get("model") == model}
        means = {task: own[task][metric] for task, metric in metrics.items() if metric in own.get(task, {})}
        rows += [named | {"task": task, "metric": metrics[task], "mean": mean} for task, mean in means.items()]
        if len(means) == len(metrics) > 1:
            rows.append(named | {"task": AVERAGE, "metric": AVERAGE, "mean": sum(means.values()) / len(means)})
    return pd.DataFrame(rows)


_HOW_MUCH = ("uniform", "shuffled", "inverted")
_WHICH = ("targeted", "flow", "low_rank", "random_weights", "partial (element)")
_OF_THREE_SEEDS = ("flow", "partial (element)", *(name for name in UNCALIBRATED if name != "lora"))


def table4(evidence: Evidence) -> Table:
    """Table 4: controls with partial's trainable parameters at the sparser point, and how reliable the sparsities are.

    It is of the tasks that have controls of how much is kept.
    """
    methods, command = ("partial", *_HOW_MUCH, *_WHICH, *UNCALIBRATED), "make reproduce-table4"
    runs = at_points(evidence.comparable, methods, (BUDGET,))
    tasks = set(runs.loc[runs["method"].isin(_HOW_MUCH), "task"])
    runs = runs[runs["task"].isin(tasks) & (runs["mixture"] == "")]
    scored = scores(runs)
    reliable = {key: reliability(run.record for run in own) for key, own in runs.groupby([*ROW, "task"])["run"]}
    keys = zip(*(scored[name] for name in (*ROW, "task")), strict=True)
    scored["reliability"] = [reliable.get(key, math.nan) for key in keys]
    numbers = pd.concat([scored, differences(runs, [("partial", other) for other in methods[1:]])], ignore_index=True)
    most = [name for name in methods if name not in _OF_THREE_SEEDS]
    lacking = missing(runs, planned(most, (BUDGET,)), command)
    lacking += missing(runs, planned(_OF_THREE_SEEDS, (BUDGET,)), command)
    claims = [*((name, BETTER) for name in _HOW_MUCH), *((name, AS_GOOD) for name in _WHICH)]
    verdicts = judged(numbers, *(("partial", name, claim, BUDGET) for name, claim in claims))
    notes = [
        "Reliability is of the calibrated sparsities: how far those of different seeds, each with examples of its own, "
        "correlate over modules and axes; where a run calibrated on halves of its draw, the Spearman–Brown "
        "correlation.",
        "A score is over all n seeds of its method, a difference over those that partial has, too.",
    ]
    return _of_methods("table4", evidence, runs, numbers, verdicts, lacking, notes, _readable_controls(numbers))


def _readable_controls(numbers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """A row a method: its score, what partial has over it, its parameters, how reliable its sparsities are."""
    scored = part_of(numbers, SCORE)
    beside = {(row["model"], row["task"], row["second"]): row for row in _rows(numbers, DIFFERENCE)}

    def other(row: Mapping, text: Callable[[Mapping], str]) -> str:
        pair = beside.get((row["model"], row["task"], row["method"]))
        return text(pair) if pair else NONE

    def score(row: Mapping) -> str:
        text = measured(row["metric"], row["mean"], row["std"])
        return f"**{text}**" if row["best"] else text

    return readable(
        "Beside partial",
        scored[scored["task"] != AVERAGE],
        {
            **{name: name for name in ("model", "task", "method")},
            "n": ("n", ".0f"),
            "score": score,
            "partial − it [95 %]": lambda row: other(row, interval),
            "bootstrap": lambda row: other(row, bootstrapped),
            "over seeds": lambda row: other(row, lambda pair: f"{pair['seeds']:.0f}"),
            "partial is": lambda row: other(row, lambda pair: pair["verdict"]),
            of_all(part_of(numbers, DIFFERENCE)): lambda row: other(row, lambda pair: pair["together"]),
            "parameters": ("parameters", ",.0f"),
            "of dense": ("share", ".1%"),
            "reliability": ("reliability", ".2f"),
        },
    )


def _rows(numbers: pd.DataFrame, part: str) -> list[dict]:
    return part_of(numbers, part).to_dict("records")


JOINT, REPAIR = "joint", "repair"
ANALYSES = {
    "cost": "Cost of the search",
    "reliability": "Split halves of the scored draw",
    "stability": "Stability of the sparsities",
}
_CALIBRATION = ["task", "model", "importance", "operating_point"]


def table5(evidence: Evidence) -> Table:
    """Table 5, calibration: what it costs, what all sparsities do at once, what repair gives back, how stable it is."""
    runs = at_points(
        evidence.comparable, ("partial",), POINTS, ("svd", "snip", "imp", "magnitude", "activation", "random")
    )
    repaired = repairs(calibrations(evidence.results_dir))
    found = {name: analyses(evidence.results_dir, name) for name in ANALYSES}
    measured = pd.DataFrame(
        [row for finished, _ in found.values() for analysis in finished for row in of_analysis(*analysis)]
    )
    numbers = pd.concat([joint(runs), repaired, measured], ignore_index=True)
    lacking = [] if len(runs) else ["calibrated runs of partial; make reproduce-table1"]
    lacking += [] if len(repaired) else ["calibrations with calibration.repair=true; make reproduce-table5"]
    for name, (finished, unfinished) in found.items():
        lacking += [f"{file}: not finished; make calibration-analyses" for file in unfinished]
        lacking += [] if finished or unfinished else [f"analysis of {name}; make calibration-analyses"]
    notes = [
        "Share kept: the frozen model's few-shot score with all sparsities at once, of its intact score; ± is half the "
        "95 % interval of the mean over calibrations (Student's t).",
        "seconds: of calibrations that were made, not those found in the cache.",
    ]
    return Table(
        "table5",
        *ABOUT["table5"],
        _score_is_kept(_rows(numbers, JOINT)),
        numbers,
        _readable_calibrations(numbers) | _readable_analyses(numbers),
        notes + left_out(runs, evidence),
        lacking,
        origin_of(runs),
    )


def joint(runs: pd.DataFrame) -> pd.DataFrame:
    """For each task and point: what share of its score the frozen model keeps with all sparsities at once.

    n, and the interval, are of calibrations: seeds that share one count once.
    """
    known = runs.assign(task=_task_or_mixture(runs)).dropna(subset=["joint", "baseline"])
    scored = zip(known["joint"], known["baseline"], strict=True)
    known = known.assign(ratio=[threshold_of(joint, baseline=baseline) for joint, baseline in scored])
    known = known.assign(draw=[draw_of(run.record) for run in known["run"]])
    # Of runs that share a calibration the one that made it says how long that took; the others found it in the cache.
    made = known.sort_values("calibrate_seconds", na_position="last", kind="stable")
    known = known.loc[made.drop_duplicates([*_CALIBRATION, "draw"]).index.sort_values()]
    means = known.groupby(_CALIBRATION, sort=False).agg(
        n=("draw", "size"),
        **{name: (name, "mean") for name in ("baseline", "joint", "chance", "ratio")},
        deviation=("ratio", "std"),
        kept=("share_of_dense", "mean"),
        seconds=("calibrate_seconds", "mean"),
    )
    halves = [half_interval(row.deviation, row.n) for row in means.itertuples()]
    return means.assign(part=JOINT, low=means["ratio"] - halves, high=means["ratio"] + halves).reset_index()


def calibrations(results_dir: Path) -> list[dict]:
    """The records of all calibrations, of runs or by themselves."""
    folders = [*packs.directories(results_dir), *sorted(results_dir.glob("calibrations/*/*/*"))]
    records = [record for folder in folders if (record := packs.recorded(folder))]
    return [record for record in records if record["status"] == "finished" and record.get("calibration")]


def repairs(records: Iterable[Mapping]) -> pd.DataFrame:
    """Return what repairs did to the joint score, and in how many steps, as means over calibrations."""
    rows = []
    for record in records:
        config, calibration = record["config"], record["calibration"]
        if not (repaired := calibration.get("repaired")):
            continue
        rows.append(
            {
                "part": REPAIR,
                "seed": draw_of(record),
                **{name: config[name]["name"] for name in ("task", "model", "importance")},
                "operating_point": f"threshold {calibration['threshold']:g}",
                "baseline": number(calibration["baseline"]),
                "before": number(repaired.get("joint_before")),
                "joint": number(calibration.get("joint")),
                "steps": number(repaired.get("steps")),
                "kept": 1 - number((record.get("parameters") or {}).get("adapter_sparsity")),
            }
        )
    if not rows:
        return pd.DataFrame()
    once = pd.DataFrame(rows).drop_duplicates([*_CALIBRATION, "seed"])  # methods share a calibration
    means = {name: (name, "mean") for name in ("baseline", "before", "joint", "steps", "kept")}
    return once.groupby(["part", *_CALIBRATION], sort=False).agg(n=("seed", "size"), **means).reset_index()


def _score_is_kept(rows: Sequence[Mapping]) -> list[Verdict]:
    """Judge whether the model still scores 90 % with all sparsities at once, as it does with each of them alone.

    The claim is of every task: one whose interval is below 90 % refutes it, whatever the others say.
    """
    claim = "with all sparsities at once the frozen model keeps 90 % of its score"
    rows = [row for row in rows if row["operating_point"] == THRESHOLD]
    if not rows:
        return [Verdict(claim, THRESHOLD, OPEN, "no calibrations")]
    holding = sum(row["low"] >= 0.9 for row in rows)  # of one calibration there is no interval: neither of both
    failing = sum(row["high"] < 0.9 for row in rows)
    lowest = min(rows, key=lambda row: row["ratio"])
    ends = "" if math.isnan(lowest["low"]) else f" [{lowest['low']:.1%}, {lowest['high']:.1%}]"
    of = f"{lowest['task']}, {lowest['importance']}, {counted(lowest['n'], 'calibration')}"
    counts = f"on {holding} of {len(rows)} tasks and measures, refuted on {failing}"
    finding = f"{counts}; lowest {lowest['ratio']:.1%}{ends} ({of})"
    return [Verdict(claim, THRESHOLD, FAILS if failing else HOLDS if holding == len(rows) else OPEN, finding)]


def _readable_calibrations(numbers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    def share_kept(row: Mapping) -> str:
        half = "" if math.isnan(row["high"]) else f" ± {100 * (row['high'] - row['ratio']):.1f}"
        return cell(row["ratio"], ".1%") + half

    first = {name.replace("_", " "): name for name in _CALIBRATION} | {"n": ("n", ".0f"), "intact": ("baseline", ".4f")}
    kept = {"parameters kept": ("kept", ".1%")}
    together = {"all at once": ("joint", ".4f"), "guessing": ("chance", ".4f"), "share kept": share_kept}
    repair = {"before": ("before", ".4f"), "after": ("joint", ".4f"), "steps": ("steps", ",.1f")}
    shown = readable(
        "All sparsities at once", part_of(numbers, JOINT), first | together | kept | {"seconds": ("seconds", ",.0f")}
    )
    return shown | readable("Repair", part_of(numbers, REPAIR), first | repair | kept)


def of_analysis(analysis: Mapping, model: str) -> list[dict]:
    """A row a number of analysis.json: {part, task, model, condition, quantity, value, deviation}."""
    config, summary, rows = analysis["config"], analysis["summary"], []

    def add(condition: str, quantity: str, value: float | None, deviation: float | None = None) -> None:
        named = {"part": analysis["what"], "task": config["task"]["name"], "model": model}
        named |= {"condition": condition, "quantity": quantity}
        rows.append(named | {"value": number(value), "deviation": number(deviation)})

    if analysis["what"] == "cost":
        names = {"passes": "passes", "sample_blocks": "sample-block evaluations", "seconds": "seconds"}
        for search, cost in summary["searches"].items():
            for key, quantity in names.items() if cost is not None else ():
                add(search, quantity, cost[key])
    elif analysis["what"] == "reliability":
        names = {"spearman_brown": "corrected", "pearson": "Pearson"}
        names |= {"rows": "Pearson, rows", "columns": "Pearson, columns"}
        for key, quantity in names.items():
            add(f"{summary['splits']} splits", quantity, summary[key]["mean"], summary[key]["deviation"])
    else:
        for line in summary["conditions"]:
            noise = f", {line['noise']:.0%} wrong" if line["noise"] else ""
            condition, seeds = f"{line['shots']} shots{noise}, {line['seeds']} seeds", line["between_seeds"]
            add(condition, "Pearson between seeds", seeds["pearson"])
            add(condition, "mean absolute difference", seeds["mean_absolute"])
            add(condition, "density", line["density"]["mean"], line["density"]["deviation"])
            add(condition, "score of the frozen model", line["baseline"]["mean"], line["baseline"]["deviation"])
    return rows


def _readable_analyses(numbers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """{title: a row a condition, a column a quantity}."""
    shown = {}
    for what, title in ANALYSES.items():
        rows: dict[tuple, dict] = {}
        for row in _rows(numbers, what):
            where = {"task": row["task"], "model": row["model"], "what": row["condition"]}
            deviation = "" if math.isnan(row["deviation"]) else f" ± {row['deviation']:.2f}"
            value = cell(row["value"], ",.0f" if row["value"] >= 10 else ".2f") + deviation
            rows.setdefault(tuple(where.values()), where)[row["quantity"]] = value
        if rows:
            shown[title] = plain(pd.DataFrame(rows.values()))
    return shown


def table6(evidence: Evidence) -> Table:
    """Table 6, several tasks at once: one adapter for all, by member and on average, beside an adapter for each."""
    methods, command = ("lora", "partial"), "make reproduce-table6"
    pool = at_points(evidence.comparable, methods, POINTS)
    mixed = pool[pool["mixture"] != ""]
    runs = pd.concat([mixed, alone(pool, mixed)], ignore_index=True)
    pairs = [("partial", "lora"), *((method, f"{method}, alone") for method in methods)]
    numbers = pd.concat([scores(runs), differences(runs, pairs)], ignore_index=True)
    lacking = missing(mixed, planned(methods, POINTS), command)
    note = "alone: an adapter for each task by itself, in runs of one task; its parameters are those of one adapter."
    notes = [note] * (len(runs) > len(mixed))
    return _of_methods("table6", evidence, runs, numbers, _as_good(numbers, "partial", "lora"), lacking, notes)


def alone(runs: pd.DataFrame, mixed: pd.DataFrame) -> pd.DataFrame:
    """The runs of one task that is a member of a mixture of the same model, as methods beside that mixture."""
    single = runs[runs["mixture"] == ""]
    parts = [single.head(0)]
    for (model, mixture), part in mixed.groupby(["model", "mixture"], sort=False):
        own = single[(single["model"] == model) & single["task"].isin(part["task"])]
        parts.append(own.assign(mixture=mixture, method=own["method"] + ", alone"))
    return pd.concat(parts)


BENCH, RUNS = "bench", "runs"
_VARIANTS = {
    "rows_columns": "partial",
    "element": "partial (element)",
    "shira": "SHiRA (PEFT)",
    "lora": "dense LoRA (PEFT)",
}


def table7(evidence: Evidence) -> Table:
    """Table 7, why the count matters: time, memory and bytes against dense LoRA and PEFT's other methods."""
    methods = ("lora", "partial", "dora", "vera", "adalora", "lorafa_projected", "random_weights", "low_rank", "full")
    files = evidence.files("bench/adapter.json")
    bench = of_bench(read_json(files[0])["cells"] if files else [])
    runs = most_methods(at_points(evidence.comparable, methods, POINTS))
    numbers = pd.concat([bench, of_costs(runs)], ignore_index=True)
    lacking = [] if files else ["the benchmark of the adapter; make bench"]
    lacking += [f"runs of {method}; make reproduce-table7" for method in methods if method not in set(runs["method"])]
    notes = [
        "Benchmark (`make bench`), on a CPU: at sparsity 0.87, processor time of a whole training step against dense "
        "LoRA's, 95 % intervals of a bootstrap over repetitions; saved: what a forward pass keeps for its backward "
        "pass, above the frozen model, against dense LoRA's; state: gradients and Adam.",
        "Runs: as result.json has it (`cost`), means over seeds, of the task that most methods were trained on; times "
        "have in them whatever else the machine did.",
    ]
    return Table(
        "table7",
        *ABOUT["table7"],
        _less_than_dense(_rows(numbers, BENCH)),
        numbers,
        _readable_costs(numbers),
        notes + left_out(runs, evidence),
        lacking,
        origin_of(runs),
    )


def of_bench(cells: Sequence[Mapping]) -> pd.DataFrame:
    """A row for each model, rank and variant of the benchmark."""
    rows = []
    for at in cells:
        dense = at["variants"]["lora"]
        for variant, method in _VARIANTS.items():
            if variant not in at["variants"]:
                continue
            own, ratios = at["variants"][variant], at["ratios"][variant]
            state, of_dense = (each["gradient_bytes"] + each["optimizer_bytes"] for each in (own, dense))
            rows.append(
                {
                    "part": BENCH,
                    "model": at["model"],
                    "rank": at["rank"],
                    "method": method,
                    "parameters": own["trainable_parameters"],
                    "share": own["trainable_parameters"] / dense["trainable_parameters"],
                    "step_seconds": median(map(sum, zip(*own["seconds"].values(), strict=True))),
                    "step": ratios["step"]["ratio"],
                    "low": ratios["step"]["low"],
                    "high": ratios["step"]["high"],
                    "saved": ratios["saved"]["ratio"],
                    "state_bytes": state,
                    "state": state / of_dense,
                    "file_bytes": own["file_bytes"]["compact"] or own["file_bytes"]["dense"],
                }
            )
    return pd.DataFrame(rows)


def most_methods(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of the task and model that most methods were trained on, the most runs deciding between several."""
    single = runs[runs["mixture"] == ""]
    if single.empty:
        return single
    ranked = single.groupby(["task", "model"], sort=True).agg(n=("method", "nunique"), runs=("seed", "size"))
    task, model = ranked.sort_values(["n", "runs"], ascending=False, kind="stable").index[0]
    return single[(single["task"] == task) & (single["model"] == model)]


def of_costs(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each method and point: what its runs recorded of their cost."""
    columns = {"mean": ("test", "mean"), "std": ("test", "std"), "n": ("seed", "size"), "metric": ("metric", "first")}
    columns |= {"parameters": ("adapter_parameters", "mean"), "share": ("share_of_dense", "mean")}
    columns |= {name: (name, "mean") for name in (*COSTS, "peak_memory_bytes")}
    means = runs.groupby(["task", "model", "operating_point", "method"], sort=False).agg(**columns).reset_index()
    order = means["operating_point"].map(point_order)
    return means.assign(part=RUNS, _order=order).sort_values(["_order", "method"], kind="stable").drop(columns="_order")


def _readable_costs(numbers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    def step(row: Mapping) -> str:
        ends = f" [{row['low']:.3f}, {row['high']:.3f}]" if row["low"] < row["high"] else ""
        return cell(row["step"], ".3f") + ends

    size = {"parameters": ("parameters", ",.0f"), "of dense": ("share", ".1%")}
    bench = {"model": "model", "rank": ("rank", ".0f"), "method": "method", **size}
    bench |= {"step (s)": ("step_seconds", ".3f"), "step / LoRA": step, "saved / LoRA": ("saved", ".3f")}
    bench |= {"state (MiB)": ("state_bytes", ".2f", 2**20), "file (MiB)": ("file_bytes", ".2f", 2**20)}
    runs = {name.replace("_", " "): name for name in ("task", "model", "operating_point", "method")}
    runs |= {"n": ("n", ".0f"), "score": lambda row: measured(row["metric"], row["mean"], row["std"]), **size}
    runs |= {"adapter file (KB)": ("adapter_bytes", ",.0f", 1e3), "optimizer (KB)": ("optimizer_bytes", ",.0f", 1e3)}
    runs |= {"step (ms)": ("step_seconds", ",.0f", 1e-3), "activations (MB)": ("saved_activation_bytes", ",.1f", 1e6)}
    runs |= {"peak memory (MB)": ("peak_memory_bytes", ",.0f", 1e6)}
    shown = readable("Benchmark of a training step", part_of(numbers, BENCH), bench)
    return shown | readable("Runs", part_of(numbers, RUNS), runs)


def _less_than_dense(rows: Sequence[Mapping]) -> list[Verdict]:
    """Judge whether a step of partial takes less time than dense LoRA's, and what it saves of memory and bytes."""
    own = [row for row in rows if row["method"] == "partial"]
    dense = {(row["model"], row["rank"]): row for row in rows if row["method"] == _VARIANTS["lora"]}
    where = f"13 % of the parameters, {len(own)} models and ranks"
    if not own:
        return [Verdict("a training step takes less time than dense LoRA's", "benchmark", OPEN, "no benchmark")]
    faster = all(row["high"] < 1 for row in own)
    slower = any(row["low"] > 1 for row in own)
    ends = f" [{min(row['low'] for row in own):.2f}, {max(row['high'] for row in own):.2f}] of it"
    verdicts = [
        Verdict(
            "a training step takes less time than dense LoRA's",
            where,
            HOLDS if faster else FAILS if slower else OPEN,
            _from_to([row["step"] for row in own]) + ends,
        )
    ]
    shares = {
        "it saves fewer activations, above the frozen model's": [row["saved"] for row in own],
        "gradients and Adam take fewer bytes": [row["state"] for row in own],
        "the compact file is smaller (what plain PEFT loads is not)": [
            row["file_bytes"] / dense[row["model"], row["rank"]]["file_bytes"] for row in own
        ],
    }
    for claim, each in shares.items():
        holds = HOLDS if max(each) < 1 else FAILS
        verdicts.append(Verdict(claim, where, holds, f"{_from_to(each)} of dense LoRA's"))
    return verdicts


def _from_to(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


TABLES: dict[str, Callable[[Evidence], Table]] = {
    make.__name__: make for make in (table1, table2, table3, table4, table5, table6, table7)
}


# The command


@cli.script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="+", choices=[*TABLES, CLAIMS], metavar="NAME", help=", ".join([*TABLES, CLAIMS])
    )
    parser.add_argument("--results", type=Path, default=Path("results/cpu"), metavar="RESULTS")
    options = parser.parse_args(arguments)
    require(options.results.is_dir(), "--results", options.results, "a folder of results")
    evidence, folder = gather(options.results), options.results / "tables"
    wanted = TABLES if CLAIMS in options.names else dict.fromkeys(options.names)
    made = {name: TABLES[name](evidence) for name in wanted}
    for name in dict.fromkeys(options.names):
        line = shlex.join(["python", "scripts/paper_tables.py", name, "--results", str(options.results)])
        tables = list(made.values()) if name == CLAIMS else [made[name]]
        files = [write_claims(tables, folder, line)] if name == CLAIMS else write(made[name], folder, line)
        for file in files:
            print(f"wrote {file}")
        for table in tables:
            for each in table.missing if name != CLAIMS else ():
                print(f"missing: {each}")
            for each in table.verdicts:
                print(f"{table.name}: {each.claim} ({each.where}): {in_words(each)}; {each.found}")


if __name__ == "__main__":
    sys.exit(main())
