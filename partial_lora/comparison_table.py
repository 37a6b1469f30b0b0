"""The table of methods compared with one of them: differences with intervals, and what each costs."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from partial_lora.closing import cell, measured
from partial_lora.comparison import MARGIN, compared
from partial_lora.errors import PartialLoraError
from partial_lora.results import PREDICTIONS, read_result, write_atomic
from partial_lora.runs import NONE, SHARES

_SAME = ["task", "model", "method", "masks", "operating_point", "metric", "learning_rate", "tuning", "group"]
_COSTS = ("adapter_bytes", "optimizer_bytes", "step_seconds", "saved_activation_bytes")
_WORDS = ("task", "model", "operating point", "method", "metric", "verdict", "tuning")


def table(frame: pd.DataFrame, results_dir: Path, reference: str = "partial") -> tuple[pd.DataFrame, list[str]]:
    """Every other method beside `reference`, and what could not be compared, a line each.

    frame: collected runs (`runs.collect`). A method is compared with the reference of the same task, model and
    operating point, and one that is not calibrated with those of all points. Numbers are as measured: difference and
    interval of the metric itself, seconds, bytes (means over seeds), and how reliable the sparsities are.
    """
    known = _with_records(frame, Path(results_dir))
    groups = dict(iter(known.groupby(_SAME, sort=False, dropna=False)))
    named = {key: dict(zip(_SAME, key, strict=True)) for key in groups}
    against = [key for key, each in named.items() if each["method"] == reference and each["masks"] == "rows_columns"]
    rows, problems = [], []
    for base in against:
        alike = [key for key in against if _place(named[key]) == _place(named[base])]
        if len(alike) > 1:
            problems.append(f"{named[base]['group']}: one of {len(alike)} of {reference} at its point; compare one")
            continue
        rows.append(_row(named[base], groups[base]))
        for key, each in named.items():
            if key == base or _place(each)[:2] != _place(named[base])[:2]:
                continue
            if each["operating_point"] not in (named[base]["operating_point"], NONE):
                continue
            row = _row(each, groups[key]) | {"operating_point": named[base]["operating_point"]}
            try:
                found = compared(*(_predictions(groups[one], Path(results_dir)) for one in (key, base)), each["metric"])
                row |= {"difference": found.difference, "low": found.low, "high": found.high}
                row |= {"verdict": found.verdict, "pairs": found.seeds, "examples": found.examples}
            except (PartialLoraError, ValueError, KeyError) as error:
                problems.append(f"{each['group']}: {' '.join(str(error).split())}")
            rows.append(row)
    return pd.DataFrame(rows), list(dict.fromkeys(problems))


def write(
    frame: pd.DataFrame,
    results_dir: Path,
    *,
    command: str,
    reference: str = "partial",
    compared: tuple[pd.DataFrame, list[str]] | None = None,
) -> list[Path]:
    """The table as results_dir/report/comparison.md and .csv; gives the files, none where there is nothing to compare.

    Each begins with the command that made it. compared: what `table` has given, where that is at hand.
    """
    found, problems = compared or table(frame, results_dir, reference)
    for stale in (Path(results_dir) / "report").glob("comparison.*"):  # of runs that may be others now
        stale.unlink()
    if len(found) < 2 or "difference" not in found:
        return []
    parts = [f"    {command}", _said(reference), _tabulated(found)]
    if problems:
        parts.append("Not compared:\n\n" + "\n".join(f"- {problem}" for problem in problems))
    folder = Path(results_dir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "comparison.md", "\n\n".join(parts) + "\n")
    write_atomic(folder / "comparison.csv", f"# {command}\n" + found.to_csv(index=False))
    return [folder / "comparison.md", folder / "comparison.csv"]


def _tabulated(found: pd.DataFrame) -> str:
    """The table as it is read, in Markdown."""
    shown = readable(found)
    align = ["left" if name in _WORDS else "right" for name in shown.columns]
    return tabulate(shown.values.tolist(), list(shown.columns), tablefmt="pipe", disable_numparse=True, colalign=align)


def _said(reference: str) -> str:
    return (
        f"Differences are from {reference} at the same operating point, over the test examples and seeds of both, with "
        "95 % intervals of a paired bootstrap over examples and seeds (of shares in points). better: the interval is "
        "above zero; "
        f"matches: it is above −{100 * MARGIN:g} point; worse: it is below zero, and not above that; undecided: else. "
        "Reliability is of the sparsities: split halves of the scored draw, Spearman–Brown."
    )


def _with_records(frame: pd.DataFrame, results_dir: Path) -> pd.DataFrame:
    """The same runs, with what the comparison also needs of their records."""
    more = []
    for group, seed in zip(frame["group"], frame["seed"], strict=True):
        record = read_result(results_dir / group / f"seed{seed}") or {}
        cost = record.get("cost") or {}
        agreement = (record.get("calibration") or {}).get("reliability") or {}
        more.append(
            {"masks": record.get("config", {}).get("mask", {}).get("granularity", "rows_columns")}
            | {name: cost.get(name) for name in _COSTS if name not in frame}
            | {"reliability": agreement.get("spearman_brown")}
        )
    more = pd.DataFrame(more)
    numbers = {name: float for name in (*_COSTS, "reliability") if name in more}
    return pd.concat([frame.reset_index(drop=True), more.astype(numbers)], axis=1)


def _place(named: dict) -> tuple:
    return named["task"], named["model"], named["operating_point"]


def _row(named: dict, part: pd.DataFrame) -> dict:
    means = ("adapter_parameters", "share_of_dense", *_COSTS, "reliability")
    return {
        **{name: named[name] for name in ("task", "model", "operating_point", "method", "masks", "metric")},
        "n": len(part),
        "test_mean": part["test"].mean(),
        "test_std": part["test"].std(),
        **{name: part[name].mean() for name in means},
        **{name: named[name] for name in ("learning_rate", "tuning", "group")},
    }


def _predictions(part: pd.DataFrame, results_dir: Path) -> dict[int, pd.DataFrame]:
    found = {}
    for seed, group in zip(part["seed"], part["group"], strict=True):
        file = results_dir / group / f"seed{seed}" / PREDICTIONS
        if not file.is_file():
            raise PartialLoraError(f"seed{seed} has no {PREDICTIONS}; train it again with overwrite=true")
        found[seed] = pd.read_parquet(file)
    return found


def readable(found: pd.DataFrame) -> pd.DataFrame:
    """The comparison as it is read: words and rounded numbers."""
    share = found["metric"].isin(SHARES)
    tests = zip(found["metric"], found["test_mean"], found["test_std"], strict=True)
    ends = zip(share, found["difference"], found["low"], found["high"], strict=True)
    names = found["method"].where(found["masks"] == "rows_columns", found["method"] + " (" + found["masks"] + ")")
    columns = {
        "task": found["task"],
        "model": found["model"],
        "operating point": found["operating_point"],
        "method": names,
        "n": found["n"].astype(str),
        "test": [measured(*each) for each in tests],
        "difference [95 %]": [_interval(*each) for each in ends],
        "verdict": found["verdict"].fillna("reference") if "verdict" in found else "reference",
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
    return pd.DataFrame(columns)


def _interval(share: bool, difference: float, low: float, high: float) -> str:
    if math.isnan(difference):
        return NONE
    scale, form = (100, "+.2f") if share else (1, "+.4f")
    return f"{scale * difference:{form}} [{scale * low:{form}}, {scale * high:{form}}]"
