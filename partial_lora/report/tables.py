"""Tables of finished runs, a row a method over its seeds: as files, on a terminal, and beside a reference.

What a run ends with on a terminal is in summary.py.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import stdev

import numpy as np
import pandas as pd
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from tabulate import tabulate

from partial_lora.errors import PartialLoraError, one_line
from partial_lora.files import write_atomic
from partial_lora.report import SPREADS
from partial_lora.report.pairs import Outcome, Pair, between
from partial_lora.report.records import (
    COSTS,
    NONE,
    PLACE,
    Folder,
    LeftOut,
    Predictions,
    Run,
    distinct,
    folders,
    group,
    paired,
    told_apart,
)
from partial_lora.report.statistics import MARGIN, over_examples, reliability, together
from partial_lora.report.summary import cell, measured, percent, size_text
from partial_lora.tasks.metrics import LOWER_IS_BETTER, SHARES, within

_UNTUNED = (
    "Untuned: one learning rate for every method and no search over it, so a difference between two methods may be "
    "one of how well the rate suits them."
)
_BEST = (
    "Bold: better than every other of its task, model, operating point and conditions, by a paired 95 % interval over "
    "test examples and seeds; without predictions nothing is marked."
)
_DIFFERS = (
    "Differs in: the settings of rows that would read alike otherwise, and those that are not as for most rows of the "
    "task and model. Rows that differ in more than method, importance, calibration, mask, learning rate and seed were "
    "trained under other conditions, and are not compared."
)
WORDS = {"task", "model", "method", "operating point", "differs in", "metric", "tuning", "precision", "id"}
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
    spread: str = "std",
    marked: Collection[int] = (),
) -> list[Path]:
    """Write the table of runs as results_dir/report/table.md, .csv and .tex; gives the files.

    Each begins with the command that made it. What was left out ends the Markdown. The CSV holds numbers as they were
    measured, the other files rounded ones. by: as in `records.group`. spread: what follows ±, "std" or "interval".
    marked: the best rows, of `pairs.best`. Raises PartialLoraError where no run has finished.
    """
    results_dir = Path(results_dir)
    if frame.empty:
        raise PartialLoraError(f"{results_dir}: expected at least one finished run; make one with `partial-lora train`")
    table = group(frame, by)
    command, above = " ".join(command.split()), origin(frame)
    shown = readable(table, by=by, spread=spread, marked=marked)
    parts = [f"    {command}", above, tabulated(shown, "pipe", by), *notes(table, by=by, spread=spread, marked=marked)]
    if lines := said_of(left_out):
        parts.append("Left out:\n\n" + "\n".join(f"- {line}" for line in lines))
    latex = as_latex(tabulated(shown, "latex_booktabs", by))
    best = table.assign(best=table.index.isin(list(marked)))
    return _written(
        results_dir,
        {
            "table.md": "\n\n".join(parts) + "\n",
            "table.csv": f"# {command}\n# {above}\n" + best.to_csv(index=False),
            "table.tex": f"% {command}\n% {above}\n{latex}\n",
        },
    )


def said_of(left_out: Sequence[LeftOut]) -> list[str]:
    """Return what was left out in lines: each broken record, and in one line the runs that have not finished."""
    unfinished = [each for each in left_out if not each.is_broken]
    lines = [str(each) for each in left_out if each.is_broken]
    if unfinished:
        counts = Counter(each.why.partition(":")[0].partition(",")[0] for each in unfinished)
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        one = len(unfinished) == 1
        lines.append(
            f"{len(unfinished)} {'run has' if one else 'runs have'} not finished ({kinds}), such as {unfinished[0]}"
        )
    return lines


def _written(results_dir: Path, files: Mapping[str, str]) -> list[Path]:
    folder = Path(results_dir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomic(folder / name, content)
    return [folder / name for name in files]


def notes(
    table: pd.DataFrame, *, by: Sequence[str] = (), spread: str = "std", marked: Collection[int] = ()
) -> list[str]:
    """Return what a reader of a grouped table has to know, a sentence or two each."""
    below = {
        SPREADS[spread]: (table["n"] > 1).any(),
        _BEST: marked,
        _DIFFERS: not by and _is_told(table),
        _UNTUNED: (table["tuning"] == "untuned").any(),
        "Calibrations that an earlier run had already paid for do not enter the seconds of calibrating.": (
            table["calibrations_reused"] > 0
        ).any(),
    }
    return [note for note, applies in below.items() if applies]


def tabulated(shown: pd.DataFrame, form: str, by: Sequence[str] = ()) -> str:
    """Return a table as it is read in one of tabulate's formats, words to the left and numbers to the right."""
    align = ["left" if name in WORDS or name in by else "right" for name in shown.columns]
    return tabulate(shown.values.tolist(), list(shown.columns), tablefmt=form, disable_numparse=True, colalign=align)


def as_latex(table: str) -> str:
    """Return tabulate's LaTeX with what is marked in bold type, and with its signs."""
    text = re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", table)
    for sign, written in {"±": r"$\pm$", "−": "$-$", "×": r"$\times$", NONE: "--"}.items():
        text = text.replace(sign, written)
    return text


def origin(frame: pd.DataFrame) -> str:
    """Return what made the runs of a table: preset where there is one, tuned or not, commit, device, precision."""
    return " ".join(
        f"{column.capitalize()}: {distinct(frame[column])}."
        for column in ("preset", "tuning", "commit", "device", "precision")
        if (frame[column] != NONE).any()
    )


def readable(
    table: pd.DataFrame, *, by: Sequence[str] = (), spread: str = "std", marked: Collection[int] = ()
) -> pd.DataFrame:
    """Return a grouped table as it is printed: words and rounded numbers, "–" where a quantity does not apply.

    by, spread: as in `write`. marked: the rows whose test score stands between two pairs of asterisks.
    """
    several = table["metric"].nunique() > 1 or "metric" in by
    in_percent = set(table["metric"]) <= SHARES
    of_test = "test" if several else f"test {table['metric'].iloc[0]}"
    spreads = table["test_half" if spread == "interval" else "test_std"]
    scores = [
        percent(mean, half) if in_percent else measured(metric, mean, half)
        for metric, mean, half in zip(table["metric"], table["test_mean"], spreads, strict=True)
    ]
    identity = ["task", "model", "method", "operating_point"]
    columns = {
        **{name if by else name.replace("_", " "): table[name].astype(str) for name in by or identity},
        "differs in": table["differs"] if not by and _is_told(table) else None,
        "metric": table["metric"] if several else None,
        "n": table["n"].astype(str),
        f"{of_test} (%)" if in_percent else of_test: [
            f"**{score}**" if index in marked else score for index, score in zip(table.index, scores, strict=True)
        ],
        "adapter parameters": _cells(table["adapter_parameters"], ",.0f"),
        "share of dense": _cells(table["share_of_dense"], ".1%"),
        "adapter (KB)": _cells(table["adapter_bytes"] / 1e3, ",.0f"),
        "head parameters": _cells(table["head_parameters"], ",.0f"),
        "sparsity": _cells(table["adapter_sparsity"], ".3f"),
        "calibrate (s)": [
            "reused" if math.isnan(seconds) and reused else cell(seconds, ",.1f")
            for seconds, reused in zip(table["calibrate_seconds"], table["calibrations_reused"], strict=True)
        ],
        "train (s)": _cells(table["train_seconds"], ",.1f"),
        "evaluate (s)": _cells(table["evaluate_seconds"], ",.1f"),
        "learning rate": None if "learning_rate" in by else _cells(table["learning_rate"], "g"),
        "tuning": table["tuning"],
        "precision": table["precision"] if table["precision"].nunique() > 1 else None,
        "id": table["id"] if not by and _is_told(table) else None,
    }
    return pd.DataFrame({name: cells for name, cells in columns.items() if cells is not None})


def _is_told(table: pd.DataFrame) -> bool:
    """Return True where rows are told apart by more than method and operating point."""
    return bool((table["differs"] != NONE).any())


def _cells(values: pd.Series, form: str) -> list[str]:
    return [cell(value, form) for value in values]


def on_screen(frame: pd.DataFrame, *, by: Sequence[str] = (), spread: str = "std") -> Group:
    """Return the tables of runs for a terminal of 80 columns: one for each task, model and metric, the main columns."""
    table = group(frame, by)
    parts = [("all runs", table)] if by else [(", ".join(key[:2]), part) for key, part in places(table)]
    tables = []
    for title, part in parts:
        shown = readable(part, by=by, spread=spread)
        shown = shown.rename(columns={"share of dense": "of dense"})
        shown["trainable"] = [NONE if math.isnan(size) else size_text(size) for size in part["adapter_parameters"]]
        if "differs in" in shown:  # below the method, for there is no room beside it
            told = shown["differs in"].map(lambda each: "" if each == NONE else f"\n{_indented(each)}")
            shown["method"] = shown["method"] + told
        names = [name for name in dict.fromkeys((*by, *_ON_SCREEN)) if name in shown and (shown[name] != NONE).any()]
        names.insert(names.index("n") + 1, next(name for name in shown if name.startswith("test")))
        tables.append(drawn(title, shown[names]))
    return Group(*tables)


def _indented(words: str) -> str:
    return textwrap.fill(words, 24, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def places(table: pd.DataFrame) -> list[tuple[tuple[str, str, str], pd.DataFrame]]:
    """Return the rows of a grouped table by task, model and metric, in their order."""
    return list(table.groupby([*PLACE, "metric"], sort=False))


def drawn(title: str, shown: pd.DataFrame) -> Table:
    """Return a table of words as a terminal shows it: words are folded where there is no room, numbers are not."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in shown.columns:
        # Without a break, its heading apart: rich would cut the last column off a terminal that is too narrow.
        folds = name in ("method", "form")
        heading = name if folds else name.replace(" ", "\n")
        table.add_column(heading, justify="left" if name in WORDS else "right", overflow="fold", no_wrap=not folds)
    for cells in shown.itertuples(index=False, name=None):
        table.add_row(*(Text(str(cell)) for cell in cells))  # as it is written: to rich [qkv] would be markup
    return table


# The answer: the best of every method


def best_of_each(table: pd.DataFrame) -> pd.DataFrame:
    """Return the row of every method at its best, by task, model and metric, the highest test score first.

    table: of `records.group`. Rows under other conditions than most are left out. Of a method's rows the best on
    validation is taken (on test where nothing was validated), of equals the one with more seeds: the best on test may
    be so by chance.
    """
    chosen = []
    for (_, _, metric), part in places(table[table["usual"]]):
        sign = -1 if metric in LOWER_IS_BETTER else 1
        best = []
        for _, own in part.groupby("method", sort=False):
            own = own.sort_values("n", ascending=False, kind="stable")
            best.append((sign * own["validation_mean"].fillna(own["test_mean"])).idxmax())
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
        (frame,) = predictions.of(row["group"], map(int, row["seeds"].split()), metric).values()
    except (PartialLoraError, ValueError, KeyError):
        return None
    ends = over_examples(frame, metric)
    return None if ends is None else (*ends, "examples")


# Methods beside a reference: differences with intervals, and what each costs

REFERENCE = "partial"


@dataclass(frozen=True)
class Differences:
    """Every other method beside the reference, a row each (`differences`).

    problems: what should have been compared and could not be, a line each. apart: what is not to be compared, such as
    methods trained under other conditions or with other seeds. remarks: what else there is to say.
    """

    rows: pd.DataFrame
    problems: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def uncompared(self) -> tuple[str, ...]:
        """All that was not compared, a line each."""
        return self.problems + self.apart

    @property
    def known(self) -> bool:
        """True where anything was compared at all."""
        return "difference" in self.rows and bool(self.rows["difference"].notna().any())


def differences(runs: Sequence[Run], predictions: Predictions) -> Differences:
    """Compare the methods of runs with REFERENCE, in the pairs of `records.paired`.

    Numbers are as measured: difference and interval of the metric itself, seconds, bytes (means over seeds), and how
    reliable the sparsities are. Without predictions there are no differences.
    """
    every = folders(runs)
    pairing = paired(every, REFERENCE)
    problems: dict[str, list[str]] = {}
    told = told_apart(every)
    rows = [_row(*pair, told) for pair in pairing.pairs]
    predicted = any(predictions.exist(each.name, each.seeds) for each in every)
    if predicted:
        with ThreadPoolExecutor() as pool:  # most of the time goes to random numbers, which numpy draws side by side
            each = pool.map(partial(_difference, predictions), pairing.pairs)
            for (folder, base), row, difference in zip(pairing.pairs, rows, each, strict=True):
                if isinstance(difference, str):
                    # Runs without a common seed are no problem: perhaps they are still to be made.
                    kind = problems if set(folder.seeds) & set(base.seeds) else pairing.apart
                    kind.setdefault(difference, []).append(folder.name)
                else:
                    row |= difference
    if not any(each.row["method"] == REFERENCE for each in every):
        pairing.remarks.append(f"none of these runs is of {REFERENCE}")
    elif not predicted:
        pairing.remarks.append("none of these runs has kept its predictions")
    remarks = tuple(pairing.remarks) if len(every) > 1 else ()
    compared = pd.DataFrame(rows)
    if "difference" in compared:
        compared = together(compared, seeds="pairs")
    return Differences(compared, _lines(problems), _lines(pairing.apart), remarks)


def _lines(reasons: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return lines: the names that a reason concerns, then the reason."""
    return tuple(f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items())


def _difference(predictions: Predictions, pair: tuple[Folder, Folder]) -> dict | str:
    """Return how much better the first of a pair is than the second, or why their examples cannot be compared."""
    if pair[0] is pair[1]:
        return {}
    sides = ({run.row["seed"]: Outcome.of(run.row, predictions) for run in each.runs} for each in pair)
    both = Pair(*sides, pair[1].row["metric"])
    try:
        found = asdict(between([both]))
        if not found["examples"]:
            both.by_example(sorted(both.seeds))  # raises what says why
    except (PartialLoraError, ValueError, KeyError) as error:
        return one_line(error)
    return {"pairs" if name == "seeds" else name: found[name] for name in found if name not in ("over", "up", "down")}


def _row(folder: Folder, base: Folder, told: Mapping[tuple[str, str], str]) -> dict:
    tests = [run.row["test"] for run in folder.runs]
    averaged = ("adapter_parameters", "share_of_dense", *COSTS)
    return {
        **{name: folder.row[name] for name in ("task", "model")},
        "operating_point": base.row["operating_point"],
        **{name: folder.row[name] for name in ("method", "metric")},
        "differs": told[folder.key],
        "n": len(tests),
        "test_mean": _mean(tests),
        "test_std": stdev(tests) if len(tests) > 1 else np.nan,
        **{name: _mean(run.row[name] for run in folder.runs) for name in averaged},
        "reliability": reliability(run.record for run in folder.runs),
        **{name: folder.row[name] for name in ("learning_rate", "tuning")},
        "group": folder.name,
        "reference": base.name,
        "reference_differs": told[base.key],
    }


def _mean(values: Iterable[float]) -> float:
    """Return the mean of the numbers there are; NaN of none."""
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else np.nan


def write_differences(compared: Differences, results_dir: Path, *, command: str) -> list[Path]:
    """Write results_dir/report/comparison.md and .csv; gives the files, none where there is nothing to compare.

    Each begins with the command that made it. Where nothing was compared, comparison.md alone says why.
    """
    for stale in (Path(results_dir) / "report").glob("comparison.*"):  # from an earlier report, perhaps of other runs
        stale.unlink()
    if not compared.known and not compared.uncompared:
        return []
    parts, files = [f"    {command}"], {}
    if compared.known:
        parts += [tabulated(readable_differences(compared.rows), "pipe"), *notes_of_differences(compared)]
        files = {"comparison.csv": f"# {command}\n" + compared.rows.to_csv(index=False)}
    if compared.uncompared:
        parts.append("Not compared:\n\n" + "\n".join(f"- {each}" for each in compared.uncompared))
    return _written(results_dir, {"comparison.md": "\n\n".join(parts) + "\n"} | files)


def notes_of_differences(compared: Differences) -> list[str]:
    """Return what a reader of a table of differences has to know, a sentence or two each."""
    rows = compared.rows
    pairs = rows["pairs"].dropna()
    of_reference = rows["reference"].map(rows.set_index("group")["n"].groupby(level=0).first())
    below = {
        f"Differences are from {REFERENCE} at the same operating point and under the same conditions, over the test "
        "examples and seeds of both, with 95 % intervals over both from variance components (of shares in points; "
        f"Student's t). better: the interval is above zero; matches: it is above −{100 * MARGIN:g} point; worse: it is "
        "below zero, and not above that; undecided: else. After correction: what is left of a verdict, corrected for "
        "all of the report (Holm). bootstrap: the interval of examples and seeds that are drawn again. Reliability is "
        "of the calibrated sparsities: how far those of different seeds correlate, or those of two halves of a draw "
        "(Spearman–Brown).": True,
        "n counts seeds: 1 of 3 is a difference over the one that both have, beside a score over all three.": (
            pairs < rows.loc[pairs.index, "n"]
        ).any(),
        "Where the reference has more seeds than a row, its score is over more than the difference is.": (
            pairs < of_reference[pairs.index]
        ).any(),
        "A difference over one seed has an interval over examples alone: how much seeds vary is not in it.": (
            pairs < 2
        ).any(),
        "Against: what the reference differs in, of which there are several at that operating point; – is the one with "
        "the usual settings.": (rows.groupby([*PLACE, "operating_point"])["reference"].nunique() > 1).any(),
        "Where the tuning differs, part of a difference may be how well the learning rate suits.": (
            rows.groupby("reference")["tuning"].nunique() > 1
        ).any(),
    }
    return [*(note for note, applies in below.items() if applies), *(f"{remark}." for remark in compared.remarks)]


def readable_differences(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a comparison as it is read: words and rounded numbers."""
    at_point = ["task", "model", "operating_point"]
    several = (rows.groupby(at_point)["reference"].nunique() > 1).any()
    told = (rows["differs"] != NONE).any()
    columns = {
        **{name.replace("_", " "): rows[name] for name in (*at_point, "method")},
        "differs in": rows["differs"] if told else None,
        "against": rows["reference_differs"] if several else None,
        "n": [
            str(n) if math.isnan(pairs) or pairs == n else f"{pairs:.0f} of {n}"
            for n, pairs in zip(rows["n"], rows["pairs"], strict=True)
        ],
        "test": [measured(*each) for each in zip(rows["metric"], rows["test_mean"], rows["test_std"], strict=True)],
        "difference [95 %]": [_difference_of(row) for row in rows.itertuples()],
        "bootstrap": [ends(row.metric, row.bootstrap_low, row.bootstrap_high) or NONE for row in rows.itertuples()],
        "verdict": [_verdict(row) for row in rows.itertuples()],
        f"after correction for {rows['among'].iloc[0]}": rows["together"].fillna(NONE),
        "adapter parameters": _cells(rows["adapter_parameters"], ",.0f"),
        "of dense": _cells(rows["share_of_dense"], ".1%"),
        "adapter file (KB)": _cells(rows["adapter_bytes"] / 1e3, ",.0f"),
        "optimizer (KB)": _cells(rows["optimizer_bytes"] / 1e3, ",.0f"),
        "step (ms)": _cells(rows["step_seconds"] * 1e3, ",.0f"),
        "activations (MB)": _cells(rows["saved_activation_bytes"] / 1e6, ",.1f"),
        "learning rate": _cells(rows["learning_rate"], "g"),
        "tuning": rows["tuning"],
        "reliability": _cells(rows["reliability"], ".2f"),
        "id": rows["group"].str.rpartition("-")[2] if told else None,
    }
    return pd.DataFrame({name: cells for name, cells in columns.items() if cells is not None})


def difference_in_words(row: tuple) -> str:
    """Return the difference of a row of `differences` with its verdict, in the metric's own unit or in points."""
    difference = _difference_of(row).partition(" ")[0]
    return difference if difference == NONE else f"{difference}, {_verdict(row)}"


def _difference_of(row: tuple) -> str:
    return NONE if math.isnan(row.difference) else signed(row.metric, row.difference, row.low, row.high)


def signed(metric: str, difference: float, low: float, high: float) -> str:
    """Return a difference with its interval, if it has one: of shares in points, of other metrics as it is."""
    scale, form = _in_units(metric)
    return f"{scale * difference:{form}} {ends(metric, low, high)}".rstrip()


def ends(metric: str, low: float, high: float) -> str:
    """Return an interval in the units of `signed`; nothing where there is none."""
    scale, form = _in_units(metric)
    return "" if math.isnan(low) else f"[{scale * low:{form}}, {scale * high:{form}}]"


def _in_units(metric: str) -> tuple[float, str]:
    return (100, "+.2f") if metric in SHARES else (1, "+.4f")


def _verdict(row: tuple) -> str:
    if row.group == row.reference:
        return "reference"
    if not isinstance(row.verdict, str):
        return NONE
    return row.verdict + (f" ({row.reason})" if isinstance(row.reason, str) else "")
