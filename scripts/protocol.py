"""Runs of the one protocol (conf/experiment/decided.yaml), each form at the learning rate that is best on validation.

A form is a method with what is special about its masks, shares and modules. All that compares runs by eight seeds reads
them from here: the claims (decided.py), the paper's tables and figures, the coverage of intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from partial_lora.errors import PartialLoraError
from partial_lora.methods import called
from partial_lora.methods.config import nominal_rank
from partial_lora.report import ranking
from partial_lora.report.pairs import Outcome
from partial_lora.report.predictions import Predictions
from partial_lora.report.records import Run, read
from partial_lora.report.rows import number
from partial_lora.tasks.kinds import kind_in

THRESHOLD, BUDGET = "threshold 0.9", "budget 0.13"
PARTIAL, UNIFORM = "partial", "uniform"
POINTS = (BUDGET, THRESHOLD)  # the paper's claim is of the first
# What 0.9 keeps on average: the budgets of plain LoRA beside it.
AT_THRESHOLD = {"trec": 0.17, "digits": 0.7, "gtsrb": 0.69}
RANK = 16  # of which a budget is a share
USUAL = ""  # the condition of runs with right labels, and the rows and steps of most
CELL = ["task", "mixture", "method", "importance", "operating_point", "condition"]
IMPORTANCE = "svd"  # another measure is named


def forms(results_dir: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return the finished runs of a results directory with their forms, and what was left out, a line each.

    method: the form. condition: wrong labels, and rows and steps where most runs of a task have another number of them.
    importance: a measure other than svd. Adapters on fewer modules, and of another rank and as many parameters, stand
    at the budget. A mixture has a row for each of its members, whose name is the row's task; `mixture` names all of
    them. kind: images, texts (classified), causal (multiple choice) or generation (free text).
    Raises PartialLoraError where there are none.
    """
    runs, problems = read(results_dir)
    stored = Predictions(results_dir)
    rows = pd.DataFrame([row for run in runs for row in _rows(run, stored)])
    if rows.empty:
        raise PartialLoraError(f"{results_dir}: no finished runs there: `make decided` makes them")
    several = rows.groupby("task")["model"].transform("nunique") > 1  # a task of several models is one for each
    rows = rows.assign(task=rows["task"].where(~several, rows["task"] + " (" + rows["model"] + ")"))
    on_modules = ranking.on_modules(rows)
    keys = (("task", "train_samples", "rows", "all rows"), ("trainer", "max_steps", "steps", "by epochs"))
    unlike = [_unlike_most(rows, *key) for key in keys]
    conditions = [", ".join(filter(None, words)) for words in zip(rows["condition"], *unlike, strict=True)]
    rows = rows.assign(
        method=rows["method"] + on_modules,
        operating_point=rows["operating_point"].where(on_modules == "", BUDGET),  # of about that size
        share_of_dense=rows["share_of_dense"].where(on_modules == ""),  # it is of dense LoRA on these modules alone
        condition=conditions,
    )
    return rows, problems


def at_best_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of every form at its best rate.

    Raises PartialLoraError where runs of one form were trained under several conditions, or with several ranks.
    """
    if runs.empty:
        return runs
    for place, cell in runs.groupby(CELL, sort=False):
        for name in ("conditions", "rank"):
            if cell[name].nunique() > 1:
                where = ", ".join(filter(None, place))
                raise PartialLoraError(
                    f"{where}: runs with several {name}: keep them in results directories of their own"
                )
    return ranking.at_best_rates(runs, CELL)


def usual(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of one task each, with right labels, and the rows and steps of most."""
    return runs[(runs["condition"] == USUAL) & (runs["mixture"] == "")]


def _rows(run: Run, stored: Predictions) -> list[dict]:
    config, test = run.record["config"], run.record["metrics"]["test"]
    task, calibration = config["task"], run.record.get("calibration") or {}
    measure = config.get("importance", {}).get("name", IMPORTANCE)
    noise, ranks = task.get("label_noise") or 0, bool(calibration) or called(config["method"]["name"]).ranked
    row = run.row | {
        "mixture": "",
        "kind": kind_in(task).name,
        "method": form_of(run.record),
        "operating_point": _point(run),
        "importance": measure if ranks and measure != IMPORTANCE else "",
        "condition": f"{noise:.0%} wrong labels" if noise else USUAL,
        "rank": config["method"]["rank"],
        **{name: number(calibration.get(name)) for name in ("baseline", "joint", "chance", "threshold")},
        "peak_memory_bytes": number(run.record.get("peak_memory_bytes")),
        "run": run,
    }
    members = task.get("members") or {}
    if not members:
        return [row | {"outcome": Outcome.of(row, stored)}]
    rows = []
    for name, member in members.items():
        scored = [key.partition("/")[2] for key in test if key.startswith(f"{name}/") and key != f"{name}/loss"]
        metric = (member.get("metrics") or scored)[0]
        of_member = {"task": name, "mixture": "+".join(members), "metric": metric, "test": test[f"{name}/{metric}"]}
        rows.append(row | of_member | {"outcome": replace(Outcome.of(row | of_member, stored), member=name)})
    return rows


def _point(run: Run) -> str:
    """Return a run's operating point: a budget as the share of rank 16 that has as many parameters.

    Plain LoRA of the size that the threshold has on average stands at the threshold.
    """
    point, config = run.row["operating_point"], run.record["config"]
    if run.row["method"] == "lora" and config["calibration"]["budget"] == AT_THRESHOLD.get(run.row["task"], math.nan):
        return THRESHOLD
    if not point.startswith("budget"):
        return point
    return f"budget {config['calibration']['budget'] * nominal_rank(config['method']['rank']) / RANK:g}"


def form_of(record: Mapping) -> str:
    """Return the name of a run's form, with what its calibration and its rank have of their own."""
    config, name = record["config"], ranking.form_of(record["config"])
    calibration, method = config["calibration"], called(config["method"]["name"])
    words = ["mean of draws"] if calibration.get("file") else []
    calibrated = method.size == "calibrated" and method.masked
    words += ["equal shares"] if record.get("fixed") and calibrated and not method.even else []
    words += [f"shrink {calibration['shrink']:g}"] if calibration.get("shrink") else []
    words += ["by gradient"] if calibration.get("search") == "gradient" else []
    words += ["repaired"] if calibration.get("repair") else []
    words += [f"caps at {calibration['max_sparsity']:g}"] if calibration.get("max_sparsity", 0.95) != 0.95 else []
    rank = config["method"].get("rank")
    words += [f"rank {rank}"] if calibrated and rank != RANK else []
    return ", ".join([name, *words])


def _unlike_most(runs: pd.DataFrame, section: str, key: str, unit: str, without: str) -> list[str]:
    """Return in words the number that a setting has in runs of which most of their task have another one, or none."""
    numbers = pd.Series([run.record["config"][section].get(key) for run in runs["run"]], runs.index)
    usual = numbers.groupby(runs["task"]).transform(lambda of_task: of_task.mode(dropna=False).get(0))
    others = (numbers != usual) & ~(numbers.isna() & usual.isna())
    words = numbers.map(lambda number: without if pd.isna(number) else f"{number:.0f} {unit}")
    return list(words.where(others, ""))


def draw_of(record: Mapping) -> int:
    """Return the seed that a run's few-shot data are drawn with: runs with the same one share a calibration.

    Where each seed has training rows of its own (task.split_seed=null), it has a draw of its own, too.
    """
    own, rows = record["config"]["calibration"].get("seed"), record["config"]["task"].get("split_seed", 0)
    return record["seed"] if own is None or rows is None else own
