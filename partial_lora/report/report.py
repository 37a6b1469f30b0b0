"""Tables of finished runs: one row a method over its seeds. What one run ends with on a terminal: closing.py."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Group
from rich.table import Table
from tabulate import tabulate

from partial_lora.errors import PartialLoraError
from partial_lora.report.closing import calibration_summary, cell, measured, percent, summary
from partial_lora.report.grouping import distinct, group
from partial_lora.report.runs import NONE, collect
from partial_lora.sealed import write_atomic
from partial_lora.tasks.metrics import SHARES

__all__ = ["calibration_summary", "collect", "group", "on_screen", "readable", "summary", "write"]

_UNTUNED = (
    "Untuned: one learning rate for every method and no search over it, so a difference between two methods may be "
    "one of how well the rate suits them."
)
_BEST = (
    "Bold: better than every other of its task, model, operating point and conditions, by the 95 % interval of a "
    "paired bootstrap over test examples and seeds; without predictions nothing is marked."
)
_CONDITIONS = (
    "Conditions stand for all settings outside method, importance, calibration, mask, learning rate and seed: rows of "
    "other conditions were trained otherwise, and are not compared."
)
_SPREAD = {
    "std": "± is one standard deviation over the n runs of a row.",
    "interval": "± is half the 95 % interval of the mean over the n runs of a row (Student's t).",
}
SPREADS = tuple(_SPREAD)
_WORDS = ("task", "model", "method", "operating point", "metric", "tuning", "precision", "conditions", "id")


def write(
    frame: pd.DataFrame,
    results_dir: Path,
    *,
    command: str,
    problems: Sequence[str] = (),
    by: Sequence[str] = (),
    spread: str = "std",
    marked: Collection[int] = (),
) -> list[Path]:
    """The table of collected runs, as Markdown, CSV and LaTeX; gives the files written.

    They are results_dir/report/table.md, .csv and .tex; each begins with the command that made it. `problems`, what was
    left out, ends the Markdown. The CSV holds numbers as they were measured, the others what is read. by: as in
    `grouping.group`. spread: what follows ±, "std" or "interval". marked: the best rows, of `marking.best`. Raises
    PartialLoraError where no run has finished.
    """
    results_dir = Path(results_dir)
    if frame.empty:
        raise PartialLoraError(f"{results_dir}: expected at least one finished run; make one with `partial-lora train`")
    table = group(frame, by)
    command, above = " ".join(command.split()), origin(frame)
    how = {"by": by, "spread": spread, "marked": marked}
    latex = _latex(_tabulated(readable(table, **how), by, "latex_booktabs"))
    best = table.assign(best=table.index.isin(list(marked)))
    files = {
        "table.md": _markdown(table, command, above, problems, **how),
        "table.csv": f"# {command}\n# {above}\n" + best.to_csv(index=False),
        "table.tex": f"% {command}\n% {above}\n{latex}\n",
    }
    folder = results_dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomic(folder / name, content)
    return [folder / name for name in files]


def _markdown(table: pd.DataFrame, command: str, above: str, problems: Sequence[str], **how) -> str:
    shown = _tabulated(readable(table, **how), how["by"], "pipe")
    parts = [f"    {command}", above, shown, *notes(table, **how)]
    if problems:
        parts.append("Left out:\n\n" + "\n".join(f"- {problem}" for problem in problems))
    return "\n\n".join(parts) + "\n"


def notes(
    table: pd.DataFrame, *, by: Sequence[str] = (), spread: str = "std", marked: Collection[int] = ()
) -> list[str]:
    """What has to be said below a grouped table, a sentence or two each."""
    said = []
    if (table["n"] > 1).any():
        said.append(_SPREAD[spread])
    if marked:
        said.append(_BEST)
    if not by and _conditions_differ(table):
        said.append(_CONDITIONS)
    if (table["tuning"] == "untuned").any():
        said.append(_UNTUNED)
    if (table["calibrations_reused"] > 0).any():
        said.append("Calibrations that an earlier run had already paid for do not enter the seconds of calibrating.")
    return said


def _latex(tabulated: str) -> str:
    bold = re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", tabulated)
    return bold.replace("±", r"$\pm$").replace(NONE, "--")


def _tabulated(shown: pd.DataFrame, by: Sequence[str], form: str) -> str:
    align = ["left" if name in (*_WORDS, *by) else "right" for name in shown.columns]
    cells = shown.values.tolist()
    return tabulate(cells, headers=list(shown.columns), tablefmt=form, disable_numparse=True, colalign=align)


def origin(frame: pd.DataFrame) -> str:
    """What made the runs of a table: preset where there is one, tuned or not, commit, device, precision."""
    named = {"Preset": "preset", "Tuning": "tuning", "Commit": "commit", "Device": "device", "Precision": "precision"}
    return " ".join(
        f"{title}: {distinct(frame[column])}." for title, column in named.items() if (frame[column] != NONE).any()
    )


def readable(
    table: pd.DataFrame, *, by: Sequence[str] = (), spread: str = "std", marked: Collection[int] = ()
) -> pd.DataFrame:
    """A grouped table as it is printed: words and rounded numbers, "–" where a quantity does not apply.

    by, spread: as in `write`. marked: the rows whose test score stands between two pairs of asterisks.
    """
    several = table["metric"].nunique() > 1 or "metric" in by
    in_percent = set(table["metric"]) <= SHARES
    of_test = "test" if several else f"test {table['metric'].iloc[0]}"
    tested = zip(
        table["metric"], table["test_mean"], table["test_" + {"interval": "half"}.get(spread, spread)], strict=True
    )
    scores = [percent(mean, half) if in_percent else measured(metric, mean, half) for metric, mean, half in tested]
    identity = ["task", "model", "method", "operating_point", "learning_rate"]
    first = by or ("task", "model", "method", "operating_point")
    columns = {
        **{name.replace("_", " ") if not by else name: table[name].astype(str) for name in first},
        **({"metric": table["metric"]} if several else {}),
        "n": table["n"].astype(str),
        f"{of_test} (%)" if in_percent else of_test: [
            f"**{score}**" if index in marked else score for index, score in zip(table.index, scores, strict=True)
        ],
        "adapter parameters": _column(table["adapter_parameters"], ",.0f"),
        "share of dense": _column(table["share_of_dense"], ".1%"),
        "adapter (KB)": _column(table["adapter_bytes"] / 1e3, ",.0f"),
        "head parameters": _column(table["head_parameters"], ",.0f"),
        "sparsity": _column(table["adapter_sparsity"], ".3f"),
        "calibrate (s)": [
            "reused" if math.isnan(seconds) and reused else cell(seconds, ",.1f")
            for seconds, reused in zip(table["calibrate_seconds"], table["calibrations_reused"], strict=True)
        ],
        "train (s)": _column(table["train_seconds"], ",.1f"),
        "evaluate (s)": _column(table["evaluate_seconds"], ",.1f"),
        "learning rate": _column(table["learning_rate"], "g") if "learning_rate" not in by else None,
        **({"tuning": table["tuning"]} if "tuning" not in by else {}),
        "precision": table["precision"] if "precision" not in by and table["precision"].nunique() > 1 else None,
        "conditions": table["conditions"] if not by and _conditions_differ(table) else None,
        # Rows that look alike differ in a setting without a column: only the run id tells them apart.
        "id": table["id"] if not by and table.duplicated(identity).any() else None,
    }
    return pd.DataFrame({name: cells for name, cells in columns.items() if cells is not None})


def _conditions_differ(table: pd.DataFrame) -> bool:
    """Whether runs of one task and model were trained under several conditions."""
    return bool((table.groupby(["task", "model"])["conditions"].nunique() > 1).any())


def _column(values: pd.Series, form: str) -> list[str]:
    return [cell(value, form) for value in values]


def on_screen(frame: pd.DataFrame, *, by: Sequence[str] = (), spread: str = "std") -> Group:
    """The tables of collected runs for a terminal of 100 columns: one for each task and model, the main columns."""
    grouped = group(frame, by)
    shown = readable(grouped, by=by, spread=spread)
    left_out = (
        "head parameters",
        "sparsity",
        "learning rate",
        "tuning",
        "conditions",
        *(() if by else ("task", "model")),
    )
    names = [name for name in shown.columns if name in by or not (name in left_out or name.endswith("(s)"))]
    names = [name for name in names if name in by or not (shown[name] == NONE).all()]
    tables = []
    parts = (
        [("all runs", shown)]
        if by
        else [(", ".join(key), part) for key, part in shown.groupby(["task", "model"], sort=False)]
    )
    for title, part in parts:
        drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in names:
            # Without a break, its heading apart: rich would cut the last column off a terminal that is too narrow.
            whole = name.startswith("test") or name in ("operating point", "id")
            heading = name.replace(" ", "\n") if whole else name
            justify = "left" if name in (*_WORDS, *by) else "right"
            drawn.add_column(heading, justify=justify, overflow="fold", no_wrap=whole)
        for cells in part[names].itertuples(index=False, name=None):
            drawn.add_row(*cells)
        tables.append(drawn)
    return Group(*tables)
