"""Which rows of a table are the best, where that is more than chance."""

from __future__ import annotations

import pandas as pd

from partial_lora.errors import PartialLoraError
from partial_lora.report.comparison import compared
from partial_lora.report.predicted import Predictions
from partial_lora.tasks.metrics import LOWER_IS_BETTER

BLOCK = ["task", "model", "operating_point", "metric", "conditions"]  # within which one row may be the best
_DRAWS = 2_000


def best(table: pd.DataFrame, predictions: Predictions) -> set[int]:
    """The indices of rows that are better than every other of the same task, model, operating point and conditions.

    table: of `grouping.group`, one row a folder of runs. Better is what the paired bootstrap over examples and seeds
    says of the predictions (`comparison.compared`). A row whose predictions are not there, or that has nothing beside
    it, is not marked.
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
        if all(_beats(first, other, metric, predictions) for _, other in others.iterrows()):
            found.add(first.name)
    return found


def _beats(first: pd.Series, second: pd.Series, metric: str, predictions: Predictions) -> bool:
    both = set(map(int, first["seeds"].split())) & set(map(int, second["seeds"].split()))
    try:
        pair = (predictions.of(each["group"], sorted(both), metric) for each in (first, second))
        return compared(*pair, metric, margin=None, draws=_DRAWS).verdict == "better"
    except (PartialLoraError, ValueError, KeyError):
        return False
