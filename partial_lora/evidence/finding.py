"""What a difference and its interval say of a claim: it holds, it does not, or it cannot be decided here."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from partial_lora.comparison import MARGIN
from partial_lora.evidence.differences import AVERAGE, in_points, of_differences, said
from partial_lora.runs import LOWER_IS_BETTER

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be decided here"
WORSE = f"{OPEN} (worse, but perhaps by less than a point)"


def as_good(row: Mapping | None) -> str:
    """The claim that the first of a pair is as good as the second, to within a point; refuted where it is worse by one.

    Of a metric of which less is better a point says nothing: refuted where it is worse.
    """
    if row is None or row["verdict"] not in ("better", "matches", "worse"):
        return OPEN
    if row["verdict"] != "worse":
        return HOLDS
    return FAILS if row["metric"] in LOWER_IS_BETTER or row["high"] < -MARGIN else WORSE


def better(row: Mapping | None) -> str:
    """The claim that the first is better; refuted where it is not so by as much as a point.

    Of a metric of which less is better, better is below zero, and a point says nothing: refuted where it is worse.
    """
    if row is None or row["seeds"] < 2 or row["low"] != row["low"]:
        return OPEN
    falls = row["metric"] in LOWER_IS_BETTER
    low, high = (-row["high"], -row["low"]) if falls else (row["low"], row["high"])
    if low > 0:
        return HOLDS
    return FAILS if high < (0 if falls else MARGIN) else OPEN


def find(numbers: pd.DataFrame, first: str, second: str, point: str, **where: str) -> dict | None:
    """The difference of two methods at a point, on average over tasks or on the only one; None where there is neither.

    One of several tasks never stands for the others. where: further columns and the value that is asked for; of several
    models the first.
    """
    rows = of_differences(numbers)
    for name, value in {"first": first, "second": second, "operating_point": point, **where}.items():
        rows = rows[rows[name] == value]
    rows = rows[rows["model"].isin(rows["model"].head(1))]
    means = rows[rows["task"] == AVERAGE]
    if means.empty and rows["task"].nunique() > 1:
        return None
    rows = means if len(means) else rows
    return rows.iloc[0].to_dict() if len(rows) else None


def clauses(
    numbers: pd.DataFrame,
    first: str,
    second: str,
    points: Mapping[str, str],
    *,
    told: str | None = None,
    **where: str,
) -> list[str]:
    """What is found of "the first is as good as the second", for every model at every point.

    points: the operating points, each with what is said of it. told: a column that is told of each difference.
    """
    rows = of_differences(numbers)
    models = list(dict.fromkeys(rows.loc[(rows["first"] == first) & (rows["second"] == second), "model"])) or [None]
    said_of = []
    for model in models:
        for point, words in points.items():
            row = find(numbers, first, second, point, **where, **({} if model is None else {"model": model}))
            of = f"of {model} " if len(models) > 1 else ""
            more = f" ({row[told]})" if told and row else ""
            said_of.append(f"{of}{words}{more} it {as_good(row)}, {measured(row)}")
    return said_of


def measured(row: Mapping | None) -> str:
    """A difference in words: which, by how much, over what."""
    if row is None:
        return "no runs of both, or no average of them"
    tasks = f"on {row['task']}" if row["tasks"] == 1 else f"on average over {row['tasks']:.0f} tasks"
    drawn = "1 seed" if row["seeds"] == 1 else f"{row['seeds']:.0f} seeds"
    drawn = f"at least {drawn} each" if row["tasks"] > 1 else drawn
    return f"{row['first']} − {row['second']} {said(row)}{' points' if in_points(row) else ''} {tasks}, {drawn}"


def sentence(claim: str, *clauses: str, table: str) -> str:
    """A claim with what was found of it, as one sentence that ends with its table."""
    return f"{claim}: {'; '.join(clauses)} ({table})."
