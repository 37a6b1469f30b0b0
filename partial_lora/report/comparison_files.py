"""The table of compared methods as it is read and written: Markdown, CSV, and what has to be said below it."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from partial_lora.report.closing import cell, measured
from partial_lora.report.comparison import MARGIN
from partial_lora.report.comparison_table import Differences
from partial_lora.report.runs import NONE
from partial_lora.sealed import write_atomic
from partial_lora.tasks.metrics import SHARES

_WORDS = ("task", "model", "operating point", "method", "id", "against", "metric", "verdict", "tuning")
_PLACE = ["task", "model", "operating_point"]


def write(compared: Differences, results_dir: Path, *, command: str, reference: str = "partial") -> list[Path]:
    """The table as results_dir/report/comparison.md and .csv; gives the files, none where there is nothing to compare.

    Each begins with the command that made it. Where nothing was compared, comparison.md alone says why.
    """
    folder = Path(results_dir) / "report"
    for stale in folder.glob("comparison.*"):  # of runs that may be others now
        stale.unlink()
    if not compared.known and not compared.uncompared:
        return []
    parts = [f"    {command}"]
    parts += [_tabulated(compared.rows), *notes(compared, reference)] if compared.known else []
    if compared.uncompared:
        parts.append("Not compared:\n\n" + "\n".join(f"- {each}" for each in compared.uncompared))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "comparison.md", "\n\n".join(parts) + "\n")
    if not compared.known:
        return [folder / "comparison.md"]
    write_atomic(folder / "comparison.csv", f"# {command}\n" + compared.rows.to_csv(index=False))
    return [folder / "comparison.md", folder / "comparison.csv"]


def notes(compared: Differences, reference: str = "partial") -> list[str]:
    """What has to be said below a table of differences, a sentence or two each."""
    found = compared.rows
    said = [
        f"Differences are from {reference} at the same operating point and under the same conditions, over the test "
        "examples and seeds of both, with 95 % intervals of a paired bootstrap over examples and seeds (of shares in "
        f"points). better: the interval is above zero; matches: it is above −{100 * MARGIN:g} point; worse: it is "
        "below zero, and not above that; undecided: else. Reliability is of the calibrated sparsities: how far those "
        "of different seeds correlate, or those of two halves of a draw (Spearman–Brown)."
    ]
    pairs = found["pairs"].dropna()
    if (pairs < found.loc[pairs.index, "n"]).any():
        said.append(
            "n counts seeds: 1 of 3 is a difference over the one that both have, beside a score over all three."
        )
    of_reference = found["reference"].map(found.set_index("group")["n"].groupby(level=0).first())
    if (pairs < of_reference[pairs.index]).any():
        said.append("Where the reference has more seeds than a row, its score is over more than the difference is.")
    if (pairs < 2).any():
        said.append("A difference over one seed has an interval over examples alone: how much seeds vary is not in it.")
    if (found.groupby("reference")["tuning"].nunique() > 1).any():
        said.append("Where the tuning differs, part of a difference may be how well the learning rate suits.")
    return [*said, *(f"{remark}." for remark in compared.remarks)]


def readable(found: pd.DataFrame) -> pd.DataFrame:
    """The comparison as it is read: words and rounded numbers."""
    share = found["metric"].isin(SHARES)
    tests = zip(found["metric"], found["test_mean"], found["test_std"], strict=True)
    ends = zip(share, found["difference"], found["low"], found["high"], strict=True)
    several = (found.groupby(_PLACE)["reference"].nunique() > 1).any()
    columns = {
        "task": found["task"],
        "model": found["model"],
        "operating point": found["operating_point"],
        "method": found["method"],
        # Rows that look alike differ in a setting without a column: only the run id tells them apart.
        "id": _ids(found["group"]) if found.duplicated([*_PLACE, "reference", "method"]).any() or several else None,
        "against": _ids(found["reference"]) if several else None,
        "n": [_seeds(*each) for each in zip(found["n"], found["pairs"], strict=True)],
        "test": [measured(*each) for each in tests],
        "difference [95 %]": [_interval(*each) for each in ends],
        "verdict": [_verdict(row) for row in found.itertuples()],
        "adapter parameters": [cell(value, ",.0f") for value in found["adapter_parameters"]],
        "of dense": [cell(value, ".1%") for value in found["share_of_dense"]],
        "adapter file (KB)": [cell(value / 1e3, ",.0f") for value in found["adapter_bytes"]],
        "optimizer (KB)": [cell(value / 1e3, ",.0f") for value in found["optimizer_bytes"]],
        "step (ms)": [cell(value * 1e3, ",.0f") for value in found["step_seconds"]],
        "activations (MB)": [cell(value / 1e6, ",.1f") for value in found["saved_activation_bytes"]],
        "learning rate": [cell(value, "g") for value in found["learning_rate"]],
        "tuning": found["tuning"],
        "reliability": [cell(value, ".2f") for value in found["reliability"]],
    }
    return pd.DataFrame({name: cells for name, cells in columns.items() if cells is not None})


def _tabulated(found: pd.DataFrame) -> str:
    """The table as it is read, in Markdown."""
    shown = readable(found)
    align = ["left" if name in _WORDS else "right" for name in shown.columns]
    return tabulate(shown.values.tolist(), list(shown.columns), tablefmt="pipe", disable_numparse=True, colalign=align)


def _ids(groups: pd.Series) -> pd.Series:
    return groups.str.rpartition("-")[2]


def _seeds(n: int, pairs: float) -> str:
    """How many seeds a row has, and how many of them its difference is over where these are fewer."""
    return str(n) if math.isnan(pairs) or pairs == n else f"{pairs:.0f} of {n}"


def _verdict(row: tuple) -> str:
    if row.group == row.reference:
        return "reference"
    if not isinstance(row.verdict, str):
        return NONE
    return row.verdict + (f" ({row.reason})" if isinstance(row.reason, str) else "")


def _interval(share: bool, difference: float, low: float, high: float) -> str:
    if math.isnan(difference):
        return NONE
    scale, form = (100, "+.2f") if share else (1, "+.4f")
    return f"{scale * difference:{form}} [{scale * low:{form}}, {scale * high:{form}}]"
