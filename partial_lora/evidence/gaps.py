"""Which runs a table would also show, and does not have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from partial_lora.runs import NONE

UNCALIBRATED = ("lora", "dora", "vera", "adalora", "lorafa", "full", "probe")


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
    """A line for every task without a run, and for every one that lacks rows, or seeds that others of `wanted` have.

    wanted: rows that are planned with the same seeds. tasks: those that are planned, beside those of the runs. how: the
    command that makes the runs.
    """
    lines = [f"{task}: no runs; {how}" for task in tasks if task not in set(runs["task"])]
    if runs.empty and not tasks:
        return [f"no runs; {how}"]
    for (model, mixture, task), part in runs.groupby(["model", "mixture", "task"], sort=False):
        have = {key: set(own["seed"]) for key, own in part.groupby(["method", "importance", "operating_point"])}
        seeds = set().union(*(have[row] for row in wanted if row in have))
        lacking = []
        for row in wanted:
            named = " ".join(word for word in row if word != NONE)
            if row not in have:
                lacking.append(named)
            elif fewer := sorted(seeds - have[row]):
                lacking.append(f"{named} seed {' '.join(map(str, fewer))}")
        if lacking:
            lines.append(f"{model}, {f'{mixture}, ' if mixture else ''}{task}: {', '.join(lacking)}")
    return lines
