"""Which runs a table would also show, and does not have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from partial_lora.runs import NONE

UNCALIBRATED = ("lora", "dora", "vera", "adalora", "lorafa", "full", "probe")
_MOST_SAID = 12


def rows(methods: Iterable[str], points: Sequence[str], importance: Sequence[str] = ("svd",)) -> list[tuple[str, ...]]:
    """(method, importance, operating point) of all runs of methods; one that is not calibrated has no such."""
    found = []
    for method in methods:
        if method in UNCALIBRATED:
            found.append((method, NONE, NONE))
        else:
            found += [(method, measure, point) for measure in importance for point in points]
    return found


def missing(runs: pd.DataFrame, wanted: Sequence[tuple[str, ...]], tasks: Sequence[str], how: str) -> list[str]:
    """A line for every task without a run, and for every row and seed that a task lacks of what its others have.

    tasks: those that are planned, beside those of the runs. how: the command that makes the runs.
    """
    lines = [f"{task}: no runs; {how}" for task in tasks if task not in set(runs["task"])]
    if runs.empty and not tasks:
        return [f"no runs; {how}"]
    for (model, mixture, task), part in runs.groupby(["model", "mixture", "task"], sort=False):
        seeds = set(part["seed"])
        have = {key: set(own["seed"]) for key, own in part.groupby(["method", "importance", "operating_point"])}
        where = f"{model}, {f'{mixture}: ' if mixture else ''}{task}"
        for row in wanted:
            named = " ".join(word for word in (row[0], *(each for each in row[1:] if each != NONE)))
            lacking = sorted(seeds - have.get(row, set()))
            if row not in have:
                lines.append(f"{where}: {named}")
            elif lacking:
                lines.append(f"{where}: {named}, seed {', '.join(map(str, lacking))}")
    more = [f"and {len(lines) - _MOST_SAID} more; {how}"] if len(lines) > _MOST_SAID else []
    return lines[:_MOST_SAID] + more
