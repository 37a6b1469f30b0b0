"""Tables of finished runs: one row a method over its seeds. What one run ends with on a terminal: closing.py."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import stdev
from typing import TypeVar

import numpy as np
import pandas as pd
from rich import box
from rich.console import Group
from rich.table import Table
from tabulate import tabulate

from partial_lora.errors import PartialLoraError
from partial_lora.files import flatten, write_atomic
from partial_lora.report.records import (
    NONE,
    Predictions,
    Run,
    collect,
    conditions,
    differences,
    distinct,
    group,
    number,
    of_method,
    point_order,
)
from partial_lora.report.statistics import MARGIN, compared, reliability
from partial_lora.report.summary import calibration_summary, cell, measured, percent, summary
from partial_lora.runs.directory import ADAPTER
from partial_lora.runs.identity import defaults
from partial_lora.tasks.metrics import SHARES

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


# --- Which runs are compared with which: those of one place, under the same conditions, with the plainest of a meth

_MOST_REFERENCES = 3  # of one place, each of which every other method is compared with
_COMPARED_BY = {"accuracy", "accuracy_norm", "mse", "exact_match", "rouge_l", "f1", "matthews", "pearson", "spearman"}
_MOST_NAMED = 5

Key = TypeVar("Key")


@dataclass(frozen=True, eq=False)
class Folder:
    """The runs of a folder, which differ in their seed alone."""

    name: str
    runs: Sequence[Run]

    @property
    def row(self) -> dict:
        return self.runs[0].row

    @property
    def settings(self) -> dict:
        return self.runs[0].record["config"]

    @property
    def seeds(self) -> list[int]:
        return [run.row["seed"] for run in self.runs]

    @cached_property
    def conditions(self) -> dict[str, object]:
        return conditions(self.runs[0].record)


@dataclass
class Pairing:
    """Each folder with the reference that it is compared with, references with themselves first.

    apart: why no pair was made, and the folders that this concerns. remarks: what a reader should know of how the pairs
    were chosen, a line each.
    """

    pairs: list[tuple[Folder, Folder]] = field(default_factory=list)
    apart: dict[str, list[str]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def folders(found: Sequence[Run]) -> list[Folder]:
    """Runs by folder, in the order in which these are met; a folder whose seeds differ in precision is several."""
    alike = _gathered(found, lambda run: (run.row["group"], run.row["precision"]))
    return [Folder(name, runs) for (name, _), runs in alike.items()]


def paired(known: Sequence[Folder], reference: str) -> Pairing:
    """Who is compared with whom: `reference` with all others of its task, model, operating point and conditions.

    Methods that are not calibrated are compared at all points, those that are with references of the same measure of
    importance, the plainest measure first. A run that was repaired or whose masks have a seed of their own is no
    reference beside others. Of up to three references of a measure each is taken, of more the one whose own settings
    are nearest to the schema's.
    """
    made = Pairing()
    for place in _gathered(known, lambda each: (each.row["task"], each.row["model"])).values():
        references = [each for each in place if each.row["method"] == reference]
        if references and (why := _not_by_examples(references[0])):
            made.remarks.append(why)
            continue
        apart: dict[tuple[str, str], list[str]] = {}
        by_point = _gathered(references, lambda each: each.row["operating_point"])
        for point, of_point in sorted(by_point.items(), key=lambda item: point_order(item[0])):
            at_point = [each for each in place if each.row["operating_point"] in (point, NONE)]
            alike = _gathered(of_point, lambda each: each.row["conditions"])
            of_measure = _gathered(of_point, lambda each: (each.row["conditions"], _measure(each)))
            for (shared, measure), several in sorted(of_measure.items(), key=_plainness):
                own = [each for each in at_point if each.row["conditions"] == shared]
                own = [each for each in own if each.row["operating_point"] == NONE or _measure(each) == measure]
                several = [each for each in several if not _is_variant(each)] or several
                for base in _chosen(several, made):
                    made.pairs += [(each, base) for each in (base, *(each for each in own if each is not base))]
            for each in at_point:
                if each.row["conditions"] not in alike:
                    apart.setdefault((each.name, _apart(each, of_point)), []).append(point)
        for (name, said), points in apart.items():
            what = f"trained under other conditions than {reference} at {' and '.join(points)}: {said}"
            made.apart.setdefault(what, []).append(name)
    return made


def _measure(folder: Folder) -> str | None:
    return (folder.settings.get("importance") or {}).get("name")


def _is_variant(folder: Folder) -> bool:
    """Whether a run is there to be set beside its like: other masks of one seed, repaired sparsities."""
    settings = folder.settings
    moved = (settings.get("mask") or {}).get("seed") is not None
    return moved or bool((settings.get("calibration") or {}).get("repair"))


def _plainness(item: tuple[tuple[str, str | None], Sequence[Folder]]) -> tuple[bool, int]:
    """What folders of a measure are ordered by: the schema's own measure first, and then the plainest."""
    (_, measure), several = item
    return measure != defaults()["importance.name"], _changes(several)


def _changes(several: Sequence[Folder]) -> int:
    """How many settings of its own the plainest of some folders has that the schema has not."""
    return min(len(of_method(each.settings)) for each in several)


def _gathered(each: Iterable, key: Callable[[object], Key]) -> dict[Key, list]:
    """Things by what they share, in the order in which that is met."""
    gathered: dict[Key, list] = {}
    for one in each:
        gathered.setdefault(key(one), []).append(one)
    return gathered


def _not_by_examples(folder: Folder) -> str | None:
    """Why nothing of a task can be compared example by example; None where it can."""
    task, metric = folder.row["task"], folder.row["metric"]
    if folder.settings["task"].get("members"):
        return f"{task}: a mixture; `partial-lora evaluate RUN --member NAME` says how each of its members is done"
    if metric not in _COMPARED_BY:
        return f"{task}: measured by {metric}, which predictions do not say"
    return None


def _chosen(several: Sequence[Folder], made: Pairing) -> list[Folder]:
    """The references that others are compared with; that they are some of many is remarked."""
    if len(several) <= _MOST_REFERENCES:
        return list(several)
    plainest = [each for each in several if _changes([each]) == _changes(several)]
    names = ", ".join(each.name for each in plainest[:_MOST_NAMED])
    if len(plainest) > _MOST_REFERENCES:
        more = len(plainest) - _MOST_NAMED
        names += f" and {more} more" if more > 0 else ""
        made.apart.setdefault(_too_many(plainest), []).append(names)
        return []
    made.remarks.append(f"{names}: compared with, of {len(several)} whose own settings are further from the defaults")
    return plainest


def _apart(folder: Folder, references: Sequence[Folder]) -> str:
    """In what a folder's conditions differ from those of the reference that is nearest to them."""
    said = [differences(folder.conditions, each.conditions) for each in references]
    return min(said, key=lambda each: each.count(" against "))


def _too_many(references: Sequence[Folder]) -> str:
    settings = [{key: str(value) for key, value in flatten(each.settings).items()} for each in references]
    keys = sorted({key for each in settings for key in each} - {"seed", "results_dir", "overwrite", "keep_records"})
    varied = [key for key in keys if len({each.get(key) for each in settings}) > 1]
    choose = f"choose with --where {varied[0]}=…" if varied else "they have the same settings"
    return f"{len(references)} to compare with, expected at most {_MOST_REFERENCES}; {choose}"


# --- Methods compared with one of them, under the same conditions: differences with intervals, and what each costs.

COSTS = ("adapter_bytes", "optimizer_bytes", "step_seconds", "saved_activation_bytes")


@dataclass(frozen=True)
class Differences:
    """Every other method beside the reference, a row each (`table`).

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
        """Whether anything was compared at all."""
        return "difference" in self.rows and bool(self.rows["difference"].notna().any())


def table(found: Sequence[Run], predictions: Predictions, reference: str = "partial") -> Differences:
    """Compare the methods of runs with `reference`, each with its like (`pairing.paired`).

    Numbers are as measured: difference and interval of the metric itself, seconds, bytes (means over seeds), and how
    reliable the sparsities are. Of records alone, without predictions, there are no differences.
    """
    known = folders(found)
    made = paired(known, reference)
    problems: dict[str, list[str]] = {}
    rows = [_row(*pair) for pair in made.pairs]
    kept = any(predictions.kept(each.name, each.seeds) for each in known)
    if kept:
        with ThreadPoolExecutor() as pool:  # most of it is drawing random numbers, which numpy does side by side
            said = pool.map(partial(_difference, predictions), made.pairs)
            for (folder, base), row, difference in zip(made.pairs, rows, said, strict=True):
                if isinstance(difference, str):
                    # Runs of other seeds are not broken: there are no such runs yet, perhaps.
                    kind = problems if set(folder.seeds) & set(base.seeds) else made.apart
                    kind.setdefault(difference, []).append(folder.name)
                else:
                    row |= difference
    if not any(each.row["method"] == reference for each in known):
        made.remarks.append(f"none of these runs is of {reference}")
    elif not kept:
        made.remarks.append("none of these runs has kept its predictions")
    remarks = tuple(made.remarks) if len(known) > 1 else ()
    return Differences(pd.DataFrame(rows), _lines(problems), _lines(made.apart), remarks)


def _lines(named: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """What there is to say, of whom: a line each."""
    return tuple(f"{', '.join(dict.fromkeys(names))}: {what}" for what, names in named.items())


def _difference(predictions: Predictions, pair: tuple[Folder, Folder]) -> dict | str:
    """How much better the first of a pair is than the second; in words why that cannot be said."""
    if pair[0] is pair[1]:
        return {}
    metric = pair[1].row["metric"]
    both = set(pair[0].seeds) & set(pair[1].seeds)  # no matter whether the others' predictions are there
    try:
        found = compared(*(predictions.of(each.name, sorted(both) or each.seeds, metric) for each in pair), metric)
    except (PartialLoraError, ValueError, KeyError) as error:
        return " ".join(str(error).split())
    return {
        **{name: getattr(found, name) for name in ("difference", "low", "high", "verdict", "reason")},
        "pairs": found.seeds,
        "examples": found.examples,
    }


def _row(folder: Folder, base: Folder) -> dict:
    named = folder.row
    tests = [run.row["test"] for run in folder.runs]
    return {
        **{name: named[name] for name in ("task", "model")},
        "operating_point": base.row["operating_point"],
        **{name: named[name] for name in ("method", "metric")},
        "n": len(tests),
        "test_mean": _mean(tests),
        "test_std": stdev(tests) if len(tests) > 1 else np.nan,
        **{name: _mean(run.row[name] for run in folder.runs) for name in ("adapter_parameters", "share_of_dense")},
        **{name: _mean(_cost(run, name) for run in folder.runs) for name in COSTS},
        "reliability": reliability(run.record for run in folder.runs),
        **{name: named[name] for name in ("learning_rate", "tuning")},
        "group": folder.name,
        "reference": base.name,
    }


def _cost(run: Run, name: str) -> float:
    return run.row[name] if name in run.row else number((run.record.get("cost") or {}).get(name))


def _mean(values: Iterable[float]) -> float:
    """The mean of the numbers there are; NaN of none."""
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else np.nan


# --- The table of compared methods as it is read and written: Markdown, CSV, and what has to be said below it.

_COMPARED_WORDS = ("task", "model", "operating point", "method", "id", "against", "metric", "verdict", "tuning")
_PLACE = ["task", "model", "operating_point"]


def write_comparison(
    compared: Differences, results_dir: Path, *, command: str, reference: str = "partial"
) -> list[Path]:
    """The table as results_dir/report/comparison.md and .csv; gives the files, none where there is nothing to compare.

    Each begins with the command that made it. Where nothing was compared, comparison.md alone says why.
    """
    folder = Path(results_dir) / "report"
    for stale in folder.glob("comparison.*"):  # of runs that may be others now
        stale.unlink()
    if not compared.known and not compared.uncompared:
        return []
    parts = [f"    {command}"]
    parts += [_comparison_tabulated(compared.rows), *comparison_notes(compared, reference)] if compared.known else []
    if compared.uncompared:
        parts.append("Not compared:\n\n" + "\n".join(f"- {each}" for each in compared.uncompared))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "comparison.md", "\n\n".join(parts) + "\n")
    if not compared.known:
        return [folder / "comparison.md"]
    write_atomic(folder / "comparison.csv", f"# {command}\n" + compared.rows.to_csv(index=False))
    return [folder / "comparison.md", folder / "comparison.csv"]


def comparison_notes(compared: Differences, reference: str = "partial") -> list[str]:
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


def readable_comparison(found: pd.DataFrame) -> pd.DataFrame:
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


def _comparison_tabulated(found: pd.DataFrame) -> str:
    """The table as it is read, in Markdown."""
    shown = readable_comparison(found)
    align = ["left" if name in _COMPARED_WORDS else "right" for name in shown.columns]
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


# --- Records of runs in the shape of PEFT's method_comparison, whose tables and pages then show them beside PEFT's

FOLDER = "peft_method_comparison"
_ACCURACY = ("accuracy", "exact_match")  # what may stand as "test accuracy" there
_OPTIMIZERS = {"lorafa": "lora-fa"}  # in the words of that reader's TrainConfig
_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def write_method_comparison(found: Sequence[Run], results_dir: Path) -> list[Path]:
    """Write results_dir/report/peft_method_comparison/TASK/EXPERIMENT.json for every run; gives the folders.

    Left out are runs without an adapter, and those that are measured by something else than accuracy or exact match.
    """
    place = Path(results_dir) / "report" / FOLDER
    shutil.rmtree(place, ignore_errors=True)  # what an earlier report wrote of runs that are no longer there
    folders = {}
    for run in found:
        if run.row["metric"] not in _ACCURACY or not run.row["adapter_parameters"]:
            continue
        folder = folders.setdefault(run.row["task"], place / run.row["task"])
        folder.mkdir(parents=True, exist_ok=True)
        content = shaped(run)
        name = content["run_info"]["experiment_name"].replace("/", "--")
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return list(folders.values())


def shaped(run: Run) -> dict:
    """One record in that shape."""
    record, config = run.record, run.record["config"]
    parameters, seconds = record["parameters"], record["seconds"]
    metrics = _metrics(run)
    size = run.row["adapter_bytes"]
    if size != size:  # of an earlier record: its file has the dense adapter, zeros where masked, in float32
        size = 4 * (parameters["adapter_dense"] + parameters["head"])
    return {
        "run_info": {
            "created_at": record.get("started"),
            "total_time": sum(value for value in seconds.values() if value),
            "experiment_name": _name(run),
            "peft_branch": "main",
            "train_config": _train_config(record, metrics[-1]["step"]),
            "peft_config": _peft_config(run),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": 0,
            "accelerator_memory_max": record.get("peak_memory_bytes") or 0,
            "accelerator_memory_reserved_99th": 0,
            "train_time": seconds["train"],
            "file_size": int(size),
            "num_trainable_params": parameters["adapter_trainable"] + parameters["head"],
            "num_total_params": parameters["base"] + parameters["adapter_trainable"] + parameters["head"],
            "status": "success",
            "metrics": metrics,
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {run.row["task"]: {"sha": config["task"].get("revision"), "created_at": None}},
            "package_info": {
                **{f"{name}-version": record["versions"].get(name) for name in _PACKAGES},
                **{f"{name}-commit-hash": None for name in _PACKAGES},
                "partial-lora-version": record["versions"].get("partial-lora"),
                "partial-lora-commit-hash": record.get("git_commit"),
            },
            "system_info": {"accelerator": record.get("device")},
            "pytorch_info": "",
        },
    }


def _name(run: Run) -> str:
    """METHOD/MODEL-ID-seedK: PEFT names an experiment by its method and what it is of that method."""
    named = re.sub(r"\W+", "-", run.row["method"]).strip("-")  # a method's masks stand in brackets
    method = "lora" if named == "lora" else f"partial-lora-{named}"
    identifier = run.row["group"].rpartition("-")[2]
    return f"{method}/{run.row['model']}-{identifier}-seed{run.row['seed']}"


def _metrics(run: Run) -> list[dict]:
    """What validation said, with the training loss last logged before; and, as the last, the test."""
    history, metric = run.record["history"], run.row["metric"]
    size, loss, step, said = run.record["config"]["trainer"].get("batch_size") or 0, None, 0, []
    for entry in history:
        step, loss = entry.get("step", step), entry.get("loss", loss)
        if f"eval_{metric}" in entry:
            said.append(
                {
                    "step": step,
                    "valid accuracy": entry[f"eval_{metric}"],
                    "train loss": loss,
                    "train samples": step * size,
                    "eval time": entry.get("eval_runtime"),
                }
            )
    tokens = max((entry.get("num_input_tokens_seen") or 0 for entry in history), default=0)
    last = {"step": step, "test accuracy": run.row["test"], "train loss": loss, "train samples": step * size}
    return [*said, last | {"train total tokens": int(tokens)}]


def _train_config(record: Mapping, steps: int) -> dict:
    config = record["config"]
    model, trainer = config["model"], config["trainer"]
    return {
        "model_id": model.get("weights") or model["name"],
        "dtype": model.get("dtype"),
        "max_seq_length": model.get("max_length"),
        "batch_size": trainer.get("batch_size"),
        "batch_size_eval": trainer.get("eval_batch_size"),
        "max_steps": steps,
        "eval_steps": trainer.get("save_steps"),
        "compile": False,
        "use_gc": bool(model.get("gradient_checkpointing")),
        "query_template": None,
        "seed": config.get("seed"),
        "grad_norm_clip": trainer.get("max_grad_norm"),
        "optimizer_type": _OPTIMIZERS.get(config["method"]["name"], "AdamW"),
        "optimizer_kwargs": {"lr": trainer["learning_rate"], "weight_decay": trainer.get("weight_decay")},
        "lr_scheduler": "cosine",  # after a warm-up, as theirs
        "use_amp": record.get("mixed_precision") not in (None, "no"),  # what "auto" came to
        "autocast_adapter_dtype": True,
        "generation_kwargs": {"max_new_tokens": config["task"].get("max_new_tokens")},
        "attn_implementation": model.get("attn_implementation"),
    }


def _peft_config(run: Run) -> dict | None:
    """The adapter's own file; of a record alone what it says. None stands for training everything."""
    if run.row["method"] == "full":
        return None
    try:
        return json.loads((run.directory / ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        method = run.record["config"]["method"]
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": run.record["config"]["model"].get("weights"),
            "r": method.get("rank"),
            "lora_alpha": method.get("alpha"),
            "lora_dropout": method.get("dropout"),
            "target_modules": run.record["config"]["model"].get("target_modules"),
        }


__all__ = ["calibration_summary", "collect", "group", "on_screen", "readable", "summary", "write"]
