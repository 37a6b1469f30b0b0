"""Which rows of a table are the best, where that is more than chance."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from partial_lora.comparison import compared
from partial_lora.errors import PartialLoraError
from partial_lora.results import PREDICTIONS
from partial_lora.runs import LOWER_IS_BETTER

BLOCK = ["task", "model", "operating_point", "metric"]  # within which one row may be the best
_DRAWS = 2_000


def best(table: pd.DataFrame, results_dir: Path) -> set[int]:
    """The indices of rows that are better than every other of the same task, model, operating point and metric.

    table: of `grouping.group`, one row a folder of runs. Better is what the paired bootstrap over examples and seeds
    says of the predictions (`comparison.compared`): the 95 % interval of the difference is above zero. A row whose
    predictions are not there, or that has nothing beside it, is not marked.
    """
    found = set()
    for _, block in table.groupby(BLOCK, sort=False, dropna=False):
        if len(block) < 2:
            continue
        metric = block["metric"].iloc[0]
        ranked = block.sort_values(
            "test_mean", ascending=metric in LOWER_IS_BETTER
        )  # the likeliest to refute come first
        first, others = ranked.iloc[0], ranked.iloc[1:]
        if all(_beats(first, other, metric, Path(results_dir)) for _, other in others.iterrows()):
            found.add(first.name)
    return found


def _beats(first: pd.Series, second: pd.Series, metric: str, results_dir: Path) -> bool:
    try:
        pair = (_predictions(each, results_dir) for each in (first, second))
        return compared(*pair, metric, margin=None, draws=_DRAWS).verdict == "better"
    except (PartialLoraError, OSError, ValueError, KeyError):
        return False


def _predictions(row: pd.Series, results_dir: Path) -> dict[int, pd.DataFrame]:
    """The predictions of every seed; raises OSError where one has none, ValueError where one is broken."""
    folder = results_dir / row["group"]
    return {int(seed): pd.read_parquet(folder / f"seed{seed}" / PREDICTIONS) for seed in row["seeds"].split()}
