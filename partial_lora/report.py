"""Tables of finished runs: one row a method over its seeds. What one run ends with on a terminal: closing.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Group
from rich.table import Table
from tabulate import tabulate

from partial_lora.closing import calibration_summary, cell, measured, percent, summary
from partial_lora.errors import PartialLoraError
from partial_lora.results import write_atomic
from partial_lora.runs import NONE, SHARES, collect

__all__ = ["calibration_summary", "collect", "group", "on_screen", "readable", "summary", "write"]

_UNTUNED = (
    "Untuned: one learning rate for every method and no search over it, so a difference between two methods may be "
    "one of how well the rate suits them."
)
_WORDS = ("task", "model", "method", "operating point", "metric", "tuning", "id")


def group(frame: pd.DataFrame) -> pd.DataFrame:
    """Runs that differ in nothing but their seed (one folder method-id), as one row: mean, standard deviation, n.

    The deviation is the sample's (n - 1), NaN for a single run. Rows are in the order of task, model, operating point,
    method.
    """
    same = ["task", "model", "method", "operating_point", "metric", "learning_rate", "tuning", "group"]
    averaged = [
        "adapter_parameters",
        "adapter_dense",
        "share_of_dense",
        "head_parameters",
        "adapter_sparsity",
        "calibrate_seconds",
        "train_seconds",
        "evaluate_seconds",
    ]
    grouped = frame.groupby(same, sort=False, dropna=False)
    table = grouped.agg(
        n=("seed", "size"),
        seeds=("seed", lambda seeds: " ".join(str(seed) for seed in sorted(seeds))),
        test_mean=("test", "mean"),
        test_std=("test", "std"),
        **{name: (name, "mean") for name in averaged},
        calibrations_reused=("calibration_reused", "sum"),
        commit=("commit", _distinct),
    ).reset_index()
    for name in ("adapter_parameters", "adapter_dense", "head_parameters"):
        table[name] = table[name].round().astype(int)  # the same for every seed, so the mean is whole
    table["id"] = table["group"].str.rpartition("-")[2]
    order = table.assign(_point=table["operating_point"].map(_point_order))
    order = order.sort_values(["task", "model", "_point", "method", "learning_rate", "id"], kind="stable")
    return table.loc[order.index].reset_index(drop=True)


def _point_order(point: str) -> tuple[int, float]:
    """Methods without a calibration first, then thresholds from high to low, then budgets from large to small."""
    kind, _, value = point.partition(" ")
    return ((NONE, "threshold", "budget").index(kind), -float(value.replace(",", "") or 0))


def _distinct(values: pd.Series) -> str:
    return ", ".join(sorted(set(values)))


def write(frame: pd.DataFrame, results_dir: Path, *, command: str, problems: Sequence[str] = ()) -> list[Path]:
    """The table of collected runs, as Markdown, CSV and LaTeX; gives the files written.

    They are results_dir/report/table.md, .csv and .tex; each begins with the command that made it. `problems`, what was
    left out, ends the Markdown. The CSV holds numbers as they were measured, the others what is read. Raises
    PartialLoraError where no run has finished.
    """
    results_dir = Path(results_dir)
    if frame.empty:
        raise PartialLoraError(f"{results_dir}: expected at least one finished run; make one with `partial-lora train`")
    table = group(frame)
    command, origin = " ".join(command.split()), _origin(frame)
    files = {
        "table.md": _markdown(table, command, origin, problems),
        "table.csv": f"# {command}\n# {origin}\n" + table.to_csv(index=False),
        "table.tex": f"% {command}\n% {origin}\n{_latex(table)}\n",
    }
    folder = results_dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomic(folder / name, content)
    return [folder / name for name in files]


def _markdown(table: pd.DataFrame, command: str, origin: str, problems: Sequence[str]) -> str:
    parts = [f"    {command}", origin, _tabulated(table, "pipe")]
    if (table["tuning"] == "untuned").any():
        parts.append(_UNTUNED)
    if (table["calibrations_reused"] > 0).any():
        parts.append("Calibrations that an earlier run had already paid for do not enter the seconds of calibrating.")
    if problems:
        parts.append("Left out:\n\n" + "\n".join(f"- {problem}" for problem in problems))
    return "\n\n".join(parts) + "\n"


def _latex(table: pd.DataFrame) -> str:
    return _tabulated(table, "latex_booktabs").replace("±", r"$\pm$").replace(NONE, "--")


def _tabulated(table: pd.DataFrame, form: str) -> str:
    shown = readable(table)
    align = ["left" if name in _WORDS else "right" for name in shown.columns]
    cells = shown.values.tolist()
    return tabulate(cells, headers=list(shown.columns), tablefmt=form, disable_numparse=True, colalign=align)


def _origin(frame: pd.DataFrame) -> str:
    """What made the runs of a table: preset where there is one, commit, device."""
    named = {"Preset": "preset", "Commit": "commit", "Device": "device"}
    return " ".join(
        f"{title}: {_distinct(frame[column])}." for title, column in named.items() if (frame[column] != NONE).any()
    )


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A grouped table as it is printed: words and rounded numbers, "–" where a quantity does not apply."""
    several = table["metric"].nunique() > 1
    in_percent = set(table["metric"]) <= SHARES
    of_test = "test" if several else f"test {table['metric'].iloc[0]}"
    tested = zip(table["metric"], table["test_mean"], table["test_std"], strict=True)
    identity = ["task", "model", "method", "operating_point", "learning_rate"]
    columns = {
        "task": table["task"],
        "model": table["model"],
        "method": table["method"],
        "operating point": table["operating_point"],
        **({"metric": table["metric"]} if several else {}),
        "n": table["n"].astype(str),
        f"{of_test} (%)" if in_percent else of_test: [
            percent(mean, std) if in_percent else measured(metric, mean, std) for metric, mean, std in tested
        ],
        "adapter parameters": _column(table["adapter_parameters"], ",.0f"),
        "share of dense": _column(table["share_of_dense"], ".1%"),
        "head parameters": _column(table["head_parameters"], ",.0f"),
        "sparsity": _column(table["adapter_sparsity"], ".3f"),
        "calibrate (s)": [
            "reused" if math.isnan(seconds) and reused else cell(seconds, ",.1f")
            for seconds, reused in zip(table["calibrate_seconds"], table["calibrations_reused"], strict=True)
        ],
        "train (s)": _column(table["train_seconds"], ",.1f"),
        "evaluate (s)": _column(table["evaluate_seconds"], ",.1f"),
        "learning rate": _column(table["learning_rate"], "g"),
        "tuning": table["tuning"],
        # Rows that look alike differ in a setting without a column: only the run id tells them apart.
        **({"id": table["id"]} if table.duplicated(identity).any() else {}),
    }
    return pd.DataFrame(columns)


def _column(values: pd.Series, form: str) -> list[str]:
    return [cell(value, form) for value in values]


def on_screen(frame: pd.DataFrame) -> Group:
    """The tables of collected runs for a terminal of 100 columns: one for each task and model, the main columns."""
    shown = readable(group(frame))
    left_out = ("task", "model", "head parameters", "sparsity", "learning rate", "tuning")
    names = [name for name in shown.columns if name not in left_out and not name.endswith("(s)")]
    tables = []
    for (task, model), part in shown.groupby(["task", "model"], sort=False):
        drawn = Table(title=f"{task}, {model}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in names:
            drawn.add_column(name, justify="left" if name in _WORDS else "right")
        for cells in part[names].itertuples(index=False, name=None):
            drawn.add_row(*cells)
        tables.append(drawn)
    return Group(*tables)
