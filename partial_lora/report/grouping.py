"""Runs averaged: over their seeds, or over all that share what the reader names."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from scipy.special import stdtrit  # scipy.stats takes half a second to import

from partial_lora.report.runs import NONE

SAME = ("task", "model", "method", "operating_point", "metric", "learning_rate", "tuning")
SAME += ("conditions", "precision", "group")
_WHOLE = ("adapter_dense", "head_parameters")
_AVERAGED = (
    "adapter_parameters",
    *_WHOLE,
    "share_of_dense",
    "adapter_sparsity",
    "adapter_bytes",
    "calibrate_seconds",
    "train_seconds",
    "evaluate_seconds",
)
_LEVEL = 0.95


def group(frame: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Runs that differ in nothing but their seed (one folder method-id), as one row: mean, standard deviation, n.

    by: columns of the frame instead; runs of one metric and precision that agree in these are a row. The deviation is
    the sample's (n - 1), NaN for a single run; test_half is half the 95 % interval of the mean by Student's t. Rows are
    in the order of task, model, operating point, method, or of the keys.
    """
    if frame.empty:
        return frame
    same = [*by, "metric", "precision"] if by else list(SAME)
    same = list(dict.fromkeys(same))
    rest = [name for name in SAME if name not in same and name != "group"]
    table = (
        frame.groupby(same, sort=False, dropna=False)
        .agg(
            n=("seed", "size"),
            seeds=("seed", lambda seeds: " ".join(str(seed) for seed in sorted(set(seeds)))),
            test_mean=("test", "mean"),
            test_std=("test", "std"),
            **{name: (name, "mean") for name in _AVERAGED},
            **{name: (name, _one) for name in rest},
            calibrations_reused=("calibration_reused", "sum"),
            **({} if "commit" in same else {"commit": ("commit", distinct)}),
        )
        .reset_index()
    )
    for name in () if by else _WHOLE:
        table[name] = table[name].round().astype(int)  # the same for every seed, so the mean is whole
    halves = [half_interval(std, n) for std, n in zip(table["test_std"], table["n"], strict=True)]
    table.insert(table.columns.get_loc("test_std") + 1, "test_half", halves)
    if by:
        return table.sort_values(list(by), kind="stable", key=_sortable).reset_index(drop=True)
    table["id"] = table["group"].str.rpartition("-")[2]
    order = table.assign(_point=table["operating_point"].map(point_order))
    order = order.sort_values(["task", "model", "_point", "method", "learning_rate", "id"], kind="stable")
    return table.loc[order.index].reset_index(drop=True)


def half_interval(std: float, n: int) -> float:
    """Half the 95 % interval of a mean of n values, by Student's t; NaN of a single one."""
    if n < 2 or math.isnan(std):
        return math.nan
    return float(stdtrit(n - 1, (1 + _LEVEL) / 2) * std / math.sqrt(n))


def distinct(values: pd.Series) -> str:
    """All different values, in order, as words."""
    return ", ".join(sorted({str(value) for value in values}))


def _one(values: pd.Series) -> object:
    """The value that all share; "–" (of numbers NaN) where they differ."""
    if values.nunique(dropna=False) == 1:
        return values.iloc[0]
    return math.nan if pd.api.types.is_numeric_dtype(values) else NONE


def _sortable(values: pd.Series) -> pd.Series:
    """Numbers by size where all are numbers, words otherwise."""
    numbers = pd.to_numeric(values, errors="coerce")
    return values.astype(str) if numbers.isna().any() else numbers


def point_order(point: str) -> tuple[int, float]:
    """Methods without a calibration first, then thresholds from high to low, then budgets from large to small."""
    kind, _, value = point.partition(" ")
    return ((NONE, "threshold", "budget").index(kind), -float(value.replace(",", "") or 0))
