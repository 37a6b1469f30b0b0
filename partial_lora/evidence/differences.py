"""Methods beside each other as rows of numbers: the paired difference on every task, and on average over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

import pandas as pd

from partial_lora.closing import cell
from partial_lora.errors import PartialLoraError
from partial_lora.evidence.across import Difference, Pair, average, between
from partial_lora.runs import NONE, SHARES

AVERAGE = "average"
PART = "difference"  # what these rows are called among a table's numbers
COLUMNS = (
    *("part", "model", "mixture", "importance", "operating_point", "first", "second", "task", "metric", "tasks"),
    *("difference", "low", "high", "seeds", "examples", "over", "verdict"),
)
_PLACE = ["model", "mixture", "importance", "operating_point"]


def differences(runs: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """For each pair of methods, its first less its second, wherever both have runs (COLUMNS).

    They are paired at one model, importance measure and operating point; a method that is not calibrated stands at all
    of them.
    """
    rows = []
    for first, second in pairs:
        for place, own in runs[runs["method"] == first].groupby(_PLACE, sort=False):
            named = dict(zip(_PLACE, place, strict=True))
            here = (runs["model"] == named["model"]) & (runs["mixture"] == named["mixture"])
            at = runs["importance"].isin([named["importance"], NONE])
            at &= runs["operating_point"].isin([named["operating_point"], NONE])
            other = runs[here & at & (runs["method"] == second)]
            rows += paired([(own, other)], **named, first=first, second=second)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def paired(sides: Sequence[tuple[pd.DataFrame, pd.DataFrame]], **named: str) -> list[dict]:
    """A row for each task on which all sides share a seed, and one for the average over these if they are several.

    sides: runs of a method and of another; of several the difference is the mean over them, on every task.
    """
    ordered = list(dict.fromkeys(sides[0][0]["task"])) if sides else []
    tasks: dict[str, list[Pair]] = {}
    for task in ordered:
        parts = [tuple(side[side["task"] == task] for side in both) for both in sides]
        if all(len(side) for both in parts for side in both):
            pairs = [Pair(_by_seed(own), _by_seed(other), own["metric"].iloc[0]) for own, other in parts]
            if set.intersection(*(pair.seeds for pair in pairs)):
                tasks[task] = pairs
    rows = [_row(named, task, pairs[0].metric, 1, lambda pairs=pairs: between(pairs)) for task, pairs in tasks.items()]
    if len(tasks) > 1:
        rows.append(_row(named, AVERAGE, AVERAGE, len(tasks), lambda: average(tasks)))
    return [row for row in rows if row is not None]


def _row(named: dict, task: str, metric: str, tasks: int, found) -> dict | None:
    try:
        difference: Difference = found()
    except PartialLoraError:  # an average that means nothing
        return None
    return {"part": PART, **named, "task": task, "metric": metric, "tasks": tasks, **asdict(difference)}


def _by_seed(runs: pd.DataFrame) -> dict:
    return dict(zip(runs["seed"], runs["outcome"], strict=True))


def readable(numbers: pd.DataFrame) -> pd.DataFrame:
    """Rows of differences as they are read: points with their interval, seeds, what was drawn again, verdict."""
    numbers = of_differences(numbers)
    columns = {
        "model": numbers["model"],
        "mixture": numbers["mixture"],
        "importance": numbers["importance"],
        "operating point": numbers["operating_point"],
        "difference": numbers["first"] + " − " + numbers["second"],
        "task": [_tasks(row) for row in numbers.to_dict("records")],
        "points [95 %]": [said(row) for row in numbers.to_dict("records")],
        "seeds": [cell(value, ".0f") for value in numbers["seeds"]],
        "over": numbers["over"],
        "verdict": numbers["verdict"],
    }
    return plain(pd.DataFrame(columns))


def _tasks(row: Mapping) -> str:
    """The task, or over how many the average is: a pair may have fewer of them than another."""
    return f"{AVERAGE} of {row['tasks']:.0f}" if row["task"] == AVERAGE else row["task"]


def of_differences(numbers: pd.DataFrame) -> pd.DataFrame:
    """The rows of differences among a table's numbers; none where it has none."""
    if "part" not in numbers or "difference" not in numbers:
        return pd.DataFrame(columns=list(COLUMNS))
    return numbers[numbers["part"] == PART]


def plain(shown: pd.DataFrame) -> pd.DataFrame:
    """Without the columns of where runs are from that say the same in all rows that say something."""
    where = [name for name in ("model", "mixture", "importance") if name in shown]
    same = [name for name in where if shown.loc[~shown[name].isin(["", NONE]), name].nunique() < 2]
    return shown.drop(columns=same)


def in_points(row: Mapping) -> bool:
    """Whether a difference is one of shares, or of averages, which is read in points."""
    return row["metric"] in SHARES or row["metric"] == AVERAGE


def said(row: Mapping) -> str:
    """A difference with its interval: of shares in points, of other metrics as it is."""
    scale, form = (100, "+.2f") if in_points(row) else (1, "+.4f")
    difference = f"{scale * row['difference']:{form}}"
    if row["low"] != row["low"]:
        return difference
    return f"{difference} [{scale * row['low']:{form}}, {scale * row['high']:{form}}]"
