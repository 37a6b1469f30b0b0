"""Tables of finished runs: one row a method over its seeds, and the few lines that one run ends with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import pandas as pd
from rich import box
from rich.console import Group
from rich.table import Table
from tabulate import tabulate

from partial_lora.errors import PartialLoraError
from partial_lora.results import write_atomic
from partial_lora.runs import NONE, collect, number, operating_point, row

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
    identity = ["task", "model", "method", "operating_point", "learning_rate"]
    columns = {
        "task": table["task"],
        "model": table["model"],
        "method": table["method"],
        "operating point": table["operating_point"],
        **({"metric": table["metric"]} if several else {}),
        "n": table["n"].astype(str),
        "test (%)" if several else f"test {table['metric'].iloc[0]} (%)": [
            percent(mean, std) for mean, std in zip(table["test_mean"], table["test_std"], strict=True)
        ],
        "adapter parameters": _column(table["adapter_parameters"], ",.0f"),
        "share of dense": _column(table["share_of_dense"], ".1%"),
        "head parameters": _column(table["head_parameters"], ",.0f"),
        "sparsity": _column(table["adapter_sparsity"], ".3f"),
        "calibrate (s)": [
            "reused" if math.isnan(seconds) and reused else _cell(seconds, ",.1f")
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


def percent(mean: float, std: float = math.nan) -> str:
    """A share as a percentage, with its standard deviation over seeds where there is one."""
    return f"{mean:.2%}".rstrip("%") + ("" if math.isnan(std) else f" ± {100 * std:.2f}")


def _column(values: pd.Series, form: str) -> list[str]:
    return [_cell(value, form) for value in values]


def _cell(value: float, form: str) -> str:
    return NONE if math.isnan(value) else format(value, form)


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


def summary(result: Mapping, directory: Path) -> Table:
    """One finished run in a few lines: how good, how small, how long, and where its files are. Fits 100 columns."""
    found = row(result, Path(directory))
    adapter = f"{found['adapter_parameters']:,}"
    if found["adapter_dense"]:
        adapter += f" of {found['adapter_dense']:,} of the dense adapter ({found['share_of_dense']:.1%})"
    return _lines(
        {
            "run": _title(result),
            f"test {found['metric']}": f"{percent(found['test'])} %",
            "adapter, trainable": adapter,
            "head, trainable": f"{found['head_parameters']:,}",
            "sparsity": _cell(found["adapter_sparsity"], ".3f"),
            "seconds": _seconds(result, "calibrate", "train", "evaluate"),
            "files": str(directory),
        }
    )


def calibration_summary(result: Mapping, directory: Path) -> Table:
    """One calibration in a few lines: what it chose, what that does to the score, where its files are."""
    calibration, sparsity = result["calibration"], result["sparsity"]
    chosen = [f"{axis} {fmean(each[axis] for each in sparsity.values()):.3f}" for axis in ("rows", "columns")]
    return _lines(
        {
            "calibration": _title(result),
            "mean sparsity": f"{' · '.join(chosen)} over {len(sparsity)} modules",
            "score": f"{calibration['baseline']:.4f} intact · {calibration['joint']:.4f} with all sparsities at once",
            "evaluations": f"{calibration['evaluations']:,} ({calibration['search']})",
            "seconds": _seconds(result, "calibrate"),
            "files": str(directory),
        }
    )


def _title(result: Mapping) -> str:
    config = result["config"]
    names = [config["method"]["name"], config["model"]["name"], config["task"]["name"]]
    point = operating_point(result)
    return " · ".join(names + ([] if point == NONE else [point]) + [f"seed {result['seed']}"])


def _seconds(result: Mapping, *stages: str) -> str:
    """The stages that took time; a calibration that was found rather than made says so."""
    reused = " (reused)" if (result["calibration"] or {}).get("cached") else ""
    spent = {stage: number(result["seconds"].get(stage)) for stage in stages}
    calibrated = result["calibration"] is not None
    return " · ".join(
        f"{stage} {NONE if stage == 'calibrate' and not calibrated else _cell(seconds, ',.1f')}"
        + (reused if stage == "calibrate" else "")
        for stage, seconds in spent.items()
    )


def _lines(lines: Mapping[str, str]) -> Table:
    drawn = Table(show_header=False)
    drawn.add_column(style="bold", no_wrap=True)
    drawn.add_column(overflow="fold")
    for name, value in lines.items():
        drawn.add_row(name, value)
    return drawn
