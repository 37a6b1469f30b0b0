"""Methods by tasks: the mean over seeds with its deviation, averages over tasks, and how many parameters that takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import pandas as pd

from partial_lora.closing import cell, percent
from partial_lora.comparison import verdict
from partial_lora.errors import PartialLoraError
from partial_lora.evidence.across import BOTH, Pair, between
from partial_lora.evidence.differences import AVERAGE, plain
from partial_lora.runs import LOWER_IS_BETTER, NONE, SHARES

PART = "score"
ROW = ["model", "mixture", "importance", "operating_point", "method"]
_DRAWS = 2_000
_SATURATED = 0.98


def scores(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each method and task: metric, n, mean and standard deviation over seeds, parameters; and averages.

    A method's average is over all tasks of its model (and mixture) that any method there has, NaN where it lacks one:
    averages over different tasks cannot be set beside each other. Its deviation is that of one run a task, its n the
    fewest. best: better than every other of its point (`best`).
    """
    columns = {"mean": ("test", "mean"), "std": ("test", "std"), "n": ("seed", "size"), "metric": ("metric", "first")}
    sizes = {"parameters": ("adapter_parameters", "mean"), "share": ("share_of_dense", "mean")}
    found = runs.groupby([*ROW, "task"], sort=False).agg(**columns, **sizes).reset_index()
    found = found.sort_values(ROW, kind="stable", key=_order).assign(part=PART)
    marked = best(runs)
    found["best"] = [key in marked for key in zip(*(found[name] for name in (*ROW, "task")), strict=True)]
    averages = [
        _average(row, of_row, wanted)
        for _, place in found.groupby(["model", "mixture"], sort=False)
        if len(wanted := list(dict.fromkeys(place["task"]))) > 1 and not set(place["metric"]) & LOWER_IS_BETTER
        for row, of_row in place.groupby(ROW, sort=False)
    ]
    return pd.concat([found, pd.DataFrame(averages, columns=found.columns)], ignore_index=True)


def _average(row: tuple[str, ...], found: pd.DataFrame, wanted: list[str]) -> dict:
    named = dict(zip(ROW, row, strict=True)) | {"task": AVERAGE, "metric": AVERAGE, "part": PART, "best": False}
    whole = set(found["task"]) == set(wanted)
    means = {name: found[name].mean() if whole else np.nan for name in ("mean", "parameters", "share")}
    deviation = np.sqrt((found["std"] ** 2).sum(skipna=False)) / len(found) if whole else np.nan
    return named | means | {"std": deviation, "n": found["n"].min()}


def best(runs: pd.DataFrame) -> set[tuple[str, ...]]:
    """(*ROW, task) of those that are better than every other of the same model, task and point.

    Better is a 95 % interval, over test examples and seeds, that is above zero. Beside every point stand those that are
    not calibrated, and these are set beside all. What has kept no predictions, or nothing beside it, is not marked.
    """
    found = set()
    for place, part in runs.groupby(["model", "mixture", "task"], sort=False):
        rows = dict(iter(part.groupby(ROW, sort=False)))
        for row, own in rows.items():
            beside = [key for key in rows if key != row and (NONE in (key[3], row[3]) or key[3] == row[3])]
            others = [rows[key] for key in beside]
            if others and all(_beats(own, other) for other in _nearest_first(others)):
                found.add((*row, place[-1]))
    return found


def _nearest_first(others: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """The likeliest to refute come first."""
    sign = -1 if others[0]["metric"].iloc[0] in LOWER_IS_BETTER else 1
    return sorted(others, key=lambda each: -sign * each["test"].mean())


def _beats(own: pd.DataFrame, other: pd.DataFrame) -> bool:
    metric = own["metric"].iloc[0]
    sign = -1 if metric in LOWER_IS_BETTER else 1
    if sign * own["test"].mean() <= sign * other["test"].mean():
        return False
    sides = (dict(zip(each["seed"], each["outcome"], strict=True)) for each in (own, other))
    try:
        found = between([Pair(*sides, metric)], draws=_DRAWS)
    except PartialLoraError:
        return False
    ends = sorted([sign * found.low, sign * found.high])
    return found.over == BOTH and verdict(*ends, None) == "better"


def readable(numbers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Two tables, of what was scored and of what was trained, methods by tasks."""
    numbers = numbers[numbers["part"] == PART] if len(numbers) else numbers
    if numbers.empty:
        return {}
    tasks = [*dict.fromkeys(numbers.loc[numbers["task"] != AVERAGE, "task"])]
    tasks += [AVERAGE] if AVERAGE in set(numbers["task"]) else []
    tested, sizes = [], []
    for row, part in numbers.groupby(ROW, sort=False):
        named = dict(zip(("model", "mixture", "importance", "operating point", "method"), row, strict=True))
        by_task = {each["task"]: each for each in part.to_dict("records")}
        counted = sorted({int(each["n"]) for each in by_task.values() if each["task"] != AVERAGE and each["n"]})
        named["n"] = "–".join(dict.fromkeys(map(str, (counted or [NONE])[:: max(1, len(counted) - 1)])))
        tested.append(named | {task: _score(by_task.get(task)) for task in tasks})
        sizes.append(named | {task: _size(by_task.get(task)) for task in tasks})
    titles = ("Test score (of shares in %), mean ± standard deviation", "Trainable adapter parameters (share of dense)")
    return {title: plain(pd.DataFrame(rows)) for title, rows in zip(titles, (tested, sizes), strict=True)}


def _score(row: Mapping | None) -> str:
    if row is None or row["mean"] != row["mean"]:
        return NONE
    share = row["metric"] in SHARES or row["metric"] == AVERAGE
    std = "" if row["std"] != row["std"] else f" ± {row['std']:.4f}"
    shown = percent(row["mean"], row["std"]) if share else f"{row['mean']:.4f}{std}"
    return f"**{shown}**" if row["best"] else shown


def _size(row: Mapping | None) -> str:
    if row is None or row["parameters"] != row["parameters"]:
        return NONE
    return f"{cell(row['parameters'], ',.0f')} ({cell(row['share'], '.1%')})"


def saturated(numbers: pd.DataFrame, without: Collection[str] = ("probe",)) -> list[str]:
    """The tasks that tell nothing apart: every method is at 98 % or above (those without an adapter do not count)."""
    of_tasks = numbers[(numbers["part"] == PART) & (numbers["task"] != AVERAGE) & ~numbers["method"].isin(without)]
    of_tasks = of_tasks[of_tasks["metric"].isin(SHARES)]
    lowest = of_tasks.groupby("task", sort=False)["mean"].min()
    return lowest.index[lowest >= _SATURATED].tolist()


def _order(column: pd.Series) -> pd.Series:
    if column.name != "operating_point":
        return column
    return column.map(point_order)


def point_order(point: str) -> tuple[int, float]:
    """What is not calibrated first, then thresholds from high to low, then budgets from large to small."""
    kind, _, value = point.partition(" ")
    return ((NONE, "threshold", "budget").index(kind), -float(value.replace(",", "") or 0))
