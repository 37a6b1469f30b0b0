"""Tables of finished runs, a row a method over its seeds: as files and on a terminal.

What a run ends with on a terminal is in summary.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from textwrap import TextWrapper

import pandas as pd
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from tabulate import tabulate

from partial_lora.errors import PartialLoraError
from partial_lora.files import write_atomic
from partial_lora.report.predictions import Predictions
from partial_lora.report.records import LeftOut
from partial_lora.report.rows import BLOCK, NONE, PLACE
from partial_lora.report.seed_groups import distinct, group
from partial_lora.report.statistics import MARGIN, over_examples
from partial_lora.report.summary import cell, measured, percent, size_text
from partial_lora.tasks.metrics import LOWER_IS_BETTER, SHARES, within

_UNTUNED = (
    "Untuned: one learning rate for every method and no search over it, so a difference between two methods may be "
    "one of how well the rate suits them."
)
_SPREAD = "± is one standard deviation over the n runs of a row. `partial-lora compare FOLDER` says what differs."
_DIFFERS = (
    "Differs in: the settings of rows that would read alike otherwise, and those that are not as for most rows of the "
    "task and model. Rows that differ in more than method, importance, calibration, mask, learning rate and seed were "
    "trained under other conditions, and are not compared."
)
WORDS = {"task", "model", "method", "operating point", "differs in", "metric", "precision", "id"}
WORDS |= {"against", "verdict", "form", "best rate", "class"}
_ON_SCREEN = ("method", "operating point", "n", "trainable", "of dense")  # beside the score


# The table of all runs


def write(
    frame: pd.DataFrame,
    results_dir: Path,
    *,
    command: str,
    left_out: Sequence[LeftOut] = (),
    by: Sequence[str] = (),
) -> list[Path]:
    """Write the table of runs as results_dir/report/table.md, .csv and .tex; gives the files.

    Each begins with the command that made it. What was left out ends the Markdown. The CSV holds numbers as they were
    measured, the other files rounded ones. by: as in `folders.group`. Raises PartialLoraError where no run has
    finished.
    """
    if frame.empty:
        raise PartialLoraError(f"{results_dir}: expected at least one finished run; make one with `partial-lora train`")
    table = group(frame, by)
    command, above = " ".join(command.split()), origin(frame)
    view = readable(table, by=by)
    parts = [f"    {command}", above, tabulated(view, "pipe", by), *notes(table, by=by)]
    if lines := said_of(left_out):
        parts.append("Left out:\n\n" + "\n".join(f"- {line}" for line in lines))
    latex = as_latex(tabulated(view, "latex_booktabs", by))
    files = {
        "table.md": "\n\n".join(parts) + "\n",
        "table.csv": f"# {command}\n# {above}\n" + table.to_csv(index=False),
        "table.tex": f"% {command}\n% {above}\n{latex}\n",
    }
    folder = Path(results_dir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomic(folder / name, content)
    return [folder / name for name in files]


def said_of(left_out: Sequence[LeftOut]) -> list[str]:
    """Return what was left out in lines: each broken record, and in one line the runs that have not finished."""
    unfinished = [run for run in left_out if not run.is_broken]
    lines = [str(run) for run in left_out if run.is_broken]
    if unfinished:
        counts = Counter(run.why.partition(":")[0].partition(",")[0] for run in unfinished)
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        one = len(unfinished) == 1
        lines.append(
            f"{len(unfinished)} {'run has' if one else 'runs have'} not finished ({kinds}), such as {unfinished[0]}"
        )
    return lines


def notes(table: pd.DataFrame, *, by: Sequence[str] = ()) -> list[str]:
    """Return what a reader of a grouped table has to know, a sentence or two each."""
    below = {
        _SPREAD: (table["n"] > 1).any(),
        _DIFFERS: not by and _is_told(table),
        _UNTUNED: _is_untuned(table),
        "Calibrations that an earlier run had already paid for do not enter the seconds of calibrating.": (
            table["calibrations_reused"] > 0
        ).any(),
    }
    return [note for note, applies in below.items() if applies]


def _is_untuned(table: pd.DataFrame) -> bool:
    """Return True where some method is there at one learning rate alone; a search, as of `compare`, leaves several."""
    return bool((table.groupby([*BLOCK, "method"])["learning_rate"].nunique() == 1).any())


def tabulated(table: pd.DataFrame, form: str, by: Sequence[str] = ()) -> str:
    """Return a table as it is read in one of tabulate's formats, words to the left and numbers to the right."""
    align = ["left" if name in WORDS or name in by else "right" for name in table.columns]
    return tabulate(table.values.tolist(), list(table.columns), tablefmt=form, disable_numparse=True, colalign=align)


def as_latex(table: str) -> str:
    """Return tabulate's LaTeX with its signs."""
    for sign, latex in {"±": r"$\pm$", "−": "$-$", "×": r"$\times$", NONE: "--"}.items():
        table = table.replace(sign, latex)
    return table


def origin(frame: pd.DataFrame) -> str:
    """Return what made the runs of a table: preset where there is one, commit, device, precision."""
    return " ".join(
        f"{column.capitalize()}: {distinct(frame[column])}."
        for column in ("preset", "commit", "device", "precision")
        if (frame[column] != NONE).any()
    )


def readable(table: pd.DataFrame, *, by: Sequence[str] = ()) -> pd.DataFrame:
    """Return a grouped table as it is printed: words and rounded numbers, "–" where a quantity does not apply."""
    several = table["metric"].nunique() > 1 or "metric" in by
    in_percent = set(table["metric"]) <= SHARES
    of_test = "test" if several else f"test {table['metric'].iloc[0]}"
    scores = [
        percent(mean, std) if in_percent else measured(metric, mean, std)
        for metric, mean, std in zip(table["metric"], table["test_mean"], table["test_std"], strict=True)
    ]
    identity = ["task", "model", "method", "operating_point"]
    columns = {
        **{name if by else name.replace("_", " "): table[name].astype(str) for name in by or identity},
        "differs in": table["differs"] if not by and _is_told(table) else None,
        "metric": table["metric"] if several else None,
        "n": table["n"].astype(str),
        f"{of_test} (%)" if in_percent else of_test: scores,
        "adapter parameters": cells_of(table["adapter_parameters"], ",.0f"),
        "share of dense": cells_of(table["share_of_dense"], ".1%"),
        "adapter (KB)": cells_of(table["adapter_bytes"] / 1e3, ",.0f"),
        "head parameters": cells_of(table["head_parameters"], ",.0f"),
        "sparsity": cells_of(table["adapter_sparsity"], ".3f"),
        "calibrate (s)": [
            "reused" if math.isnan(seconds) and reused else cell(seconds, ",.1f")
            for seconds, reused in zip(table["calibrate_seconds"], table["calibrations_reused"], strict=True)
        ],
        "train (s)": cells_of(table["train_seconds"], ",.1f"),
        "evaluate (s)": cells_of(table["evaluate_seconds"], ",.1f"),
        "learning rate": None if "learning_rate" in by else cells_of(table["learning_rate"], "g"),
        "precision": table["precision"] if table["precision"].nunique() > 1 else None,
        "id": table["id"] if not by and _is_told(table) else None,
    }
    return pd.DataFrame({name: cells for name, cells in columns.items() if cells is not None})


def _is_told(table: pd.DataFrame) -> bool:
    """Return True where rows are told apart by more than method and operating point."""
    return bool((table["differs"] != NONE).any())


def cells_of(values: pd.Series, form: str) -> list[str]:
    return [cell(value, form) for value in values]


def on_screen(frame: pd.DataFrame, *, by: Sequence[str] = ()) -> Group:
    """Return the tables of runs for a terminal of 80 columns: one for each task, model and metric, the main columns."""
    table = group(frame, by)
    parts = [("all runs", table)] if by else [(", ".join(key[:2]), part) for key, part in places(table)]
    indented = TextWrapper(24, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    tables = []
    for title, part in parts:
        view = readable(part, by=by)
        view = view.rename(columns={"share of dense": "of dense"})
        view["trainable"] = [NONE if math.isnan(size) else size_text(size) for size in part["adapter_parameters"]]
        if "differs in" in view:  # below the method, for there is no room beside it
            differs = view["differs in"].map(lambda words: "" if words == NONE else f"\n{indented.fill(words)}")
            view["method"] = view["method"] + differs
        names = [name for name in dict.fromkeys((*by, *_ON_SCREEN)) if name in view and (view[name] != NONE).any()]
        names.insert(names.index("n") + 1, next(name for name in view if name.startswith("test")))
        tables.append(drawn(title, view[names]))
    return Group(*tables)


def places(table: pd.DataFrame) -> list[tuple[tuple[str, str, str], pd.DataFrame]]:
    """Return the rows of a grouped table by task, model and metric, in their order."""
    return list(table.groupby([*PLACE, "metric"], sort=False))


def drawn(title: str, frame: pd.DataFrame) -> Table:
    """Return a table of words as a terminal shows it: words are folded where there is no room, numbers are not."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in frame.columns:
        # Without a break, its heading apart: rich would cut the last column off a terminal that is too narrow.
        folds = name in ("method", "form")
        heading = name if folds else name.replace(" ", "\n")
        table.add_column(heading, justify="left" if name in WORDS else "right", overflow="fold", no_wrap=not folds)
    for cells in frame.itertuples(index=False, name=None):
        table.add_row(*(Text(str(cell)) for cell in cells))  # as it is written: to rich [qkv] would be markup
    return table


# The answer: the best of every method


def best_of_each(table: pd.DataFrame) -> pd.DataFrame:
    """Return the row of every method at its best, by task, model and metric, the highest test score first.

    table: of `folders.group`. Rows under other conditions than most are left out. Of a method's rows the best on
    validation is taken (on test where nothing was validated), of equals the one with more seeds: the best on test may
    be so by chance.
    """
    chosen = []
    for (_, _, metric), part in places(table[table["usual"]]):
        sign = -1 if metric in LOWER_IS_BETTER else 1
        best = []
        for _, rows in part.groupby("method", sort=False):
            rows = rows.sort_values("n", ascending=False, kind="stable")
            best.append((sign * rows["validation_mean"].fillna(rows["test_mean"])).idxmax())
        chosen += (sign * part.loc[best, "test_mean"]).sort_values(ascending=False, kind="stable").index.to_list()
    return table.loc[chosen]


def smallest_within(part: pd.DataFrame, best: pd.Series) -> pd.Series | None:
    """Return the smallest row of a task that is less than a point below the best one, over as many seeds or more.

    None where no such row is smaller, and for a metric without points.
    """
    if best["metric"] not in SHARES:
        return None
    near = part[part["usual"] & (part["test_mean"] > best["test_mean"] - MARGIN) & (part["n"] >= best["n"])]
    smallest = near.loc[near["adapter_parameters"].idxmin()]
    return smallest if smallest["adapter_parameters"] < best["adapter_parameters"] else None


def interval(row: pd.Series, predictions: Predictions) -> tuple[float, float, str] | None:
    """Return the ends of the 95 % interval of a row's test score, and what it is over; None where none is known.

    With several seeds it is over these, by Student's t, and no wider than the metric can be; with a single seed it is
    over the test examples.
    """
    mean, half, metric = row["test_mean"], row["test_half"], row["metric"]
    if not math.isnan(half):
        return *within((mean - half, mean + half), metric), "seeds"
    try:
        ends = over_examples(predictions.of(row["group"], int(row["seeds"]), metric), metric)
    except (PartialLoraError, ValueError):
        return None
    return None if ends is None else (*ends, "examples")
