"""Methods by tasks: the mean over seeds with its deviation, averages over tasks, and how many parameters that takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import pandas as pd

from partial_lora.closing import cell, percent
from partial_lora.comparison import verdict
from partial_lora.errors import PartialLoraError
from partial_lora.evidence.across import BOTH, Pair, between
from partial_lora.evidence.differences import AVERAGE, plain
from partial_lora.grouping import point_order
from partial_lora.runs import LOWER_IS_BETTER, NONE, SHARES

PART = "score"
ROW = ["model", "mixture", "importance", "operating_point", "method"]
_PLACE = ["model", "mixture"]
_TESTED, _TRAINED = "Test score (of shares in %), mean ± deviation", "Trainable adapter parameters (share of dense)"
_DRAWS = 2_000
_SATURATED = 0.98


def scores(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each method and task: metric, n, mean and standard deviation over seeds, parameters; and averages.

    A method's average is over all tasks of its model (and mixture) that any method there has, NaN where it lacks one:
    averages over different tasks cannot be set beside each other. Its deviation is over seeds, of the mean over tasks
    of one seed (NaN where tasks have fewer than two in common), its n the fewest. best: better than every other of its
    point (`best`).
    """
    columns = {"mean": ("test", "mean"), "std": ("test", "std"), "n": ("seed", "size"), "metric": ("metric", "first")}
    sizes = {"parameters": ("adapter_parameters", "mean"), "share": ("share_of_dense", "mean")}
    found = runs.groupby([*ROW, "task"], sort=False).agg(**columns, **sizes).reset_index()
    found = ordered(found).assign(part=PART)
    marked = best(runs)
    found["best"] = [key in marked for key in zip(*(found[name] for name in (*ROW, "task")), strict=True)]
    averages = [
        _average(row, of_row, wanted, runs)
        for _, place in found.groupby(_PLACE, sort=False)
        if len(wanted := list(dict.fromkeys(place["task"]))) > 1 and not set(place["metric"]) & LOWER_IS_BETTER
        for row, of_row in place.groupby(ROW, sort=False)
    ]
    return pd.concat([found, pd.DataFrame(averages, columns=found.columns)], ignore_index=True)


def _average(row: tuple[str, ...], found: pd.DataFrame, wanted: list[str], runs: pd.DataFrame) -> dict:
    named = dict(zip(ROW, row, strict=True)) | {"task": AVERAGE, "metric": AVERAGE, "part": PART, "best": False}
    whole = set(found["task"]) == set(wanted)
    means = {name: found[name].mean() if whole else np.nan for name in ("mean", "parameters", "share")}
    own = runs[(runs[ROW] == list(row)).all(axis=1)]
    of_seeds = own.pivot(index="seed", columns="task", values="test").dropna().mean(axis=1)
    return named | means | {"std": of_seeds.std() if whole else np.nan, "n": found["n"].min()}


def best(runs: pd.DataFrame) -> set[tuple[str, ...]]:
    """(*ROW, task) of those that are better than every other of the same model, task and point.

    Better is a 95 % interval, over test examples and seeds, that is above zero. Beside every point stand those that are
    not calibrated, and these are set beside all. What has kept no predictions, or nothing beside it, is not marked.
    """
    found = set()
    for place, part in runs.groupby([*_PLACE, "task"], sort=False):
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
    """Two tables for each model (and mixture), of what was scored and of what was trained, methods by tasks."""
    numbers = ordered(numbers[numbers["part"] == PART]) if len(numbers) else numbers
    shown = {}
    places = list(numbers.groupby(_PLACE, sort=False)) if len(numbers) else []
    for place, of_place in places:
        where = "" if len(places) == 1 else f", {', '.join(name for name in place if name)}"
        for title, cells in {_TESTED: _score, _TRAINED: _size}.items():
            shown[title + where] = _methods_by_tasks(of_place, cells)
    return shown


def _methods_by_tasks(numbers: pd.DataFrame, cells: Callable[[Mapping | None], str]) -> pd.DataFrame:
    tasks = [*dict.fromkeys(numbers.loc[numbers["task"] != AVERAGE, "task"])]
    tasks += [AVERAGE] if AVERAGE in set(numbers["task"]) else []
    rows = []
    for row, part in numbers.groupby(ROW, sort=False):
        by_task = {each["task"]: each for each in part.to_dict("records")}
        named = dict(zip(("model", "mixture", "importance", "operating point", "method"), row, strict=True))
        rows.append(named | {"n": _counted(part)} | {task: cells(by_task.get(task)) for task in tasks})
    return plain(pd.DataFrame(rows))


def _counted(part: pd.DataFrame) -> str:
    """How many runs a task has: the fewest and the most; none of a score that no run has."""
    counts = part.loc[(part["task"] != AVERAGE) & (part["n"] > 0), "n"]
    ends = dict.fromkeys([f"{counts.min():.0f}", f"{counts.max():.0f}"]) if len(counts) else [NONE]
    return "–".join(ends)


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


def ordered(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows by model, mixture and operating point, and then by method."""
    points = rows["operating_point"].map(point_order)
    return (
        rows.assign(_point=points)
        .sort_values([*_PLACE, "_point", "importance", "method"], kind="stable")
        .drop(columns="_point")
    )
