"""Methods compared with one of them, under the same conditions: differences with intervals, and what each costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import stdev
from typing import TypeVar

import numpy as np
import pandas as pd

from partial_lora.comparison import compared
from partial_lora.conditions import conditions, differences
from partial_lora.errors import PartialLoraError
from partial_lora.grouping import point_order
from partial_lora.identity import flatten
from partial_lora.predicted import Predictions
from partial_lora.runs import NONE, Run, number

COSTS = ("adapter_bytes", "optimizer_bytes", "step_seconds", "saved_activation_bytes")
_MOST_REFERENCES = 3  # of one place, each of which every other method is compared with

Key = TypeVar("Key")


@dataclass(frozen=True, eq=False)
class _Folder:
    """The runs of a folder, which differ in their seed alone."""

    name: str
    runs: Sequence[Run]

    @property
    def row(self) -> dict:
        return self.runs[0].row

    @property
    def settings(self) -> dict:
        return self.runs[0].record["config"]

    @cached_property
    def conditions(self) -> dict[str, object]:
        return conditions(self.settings)


def table(found: Sequence[Run], predictions: Predictions, reference: str = "partial") -> tuple[pd.DataFrame, list[str]]:
    """Every other method beside `reference`, and what could not be compared, a line each.

    A method is compared with the reference of the same task, model and operating point that was trained under the same
    conditions (`conditions`), and one that is not calibrated with those of all points; where there are several
    references, with each of them. Numbers are as measured: difference and interval of the metric itself, seconds, bytes
    (means over seeds), and how reliable the sparsities are.
    """
    folders = _folders(found)
    pairs, problems = _pairs(folders, reference)
    rows = [_row(*pair) for pair in pairs]
    # Of records alone no row has a difference, which is no problem of any of them.
    if any(predictions.kept(each.name, _seeds(each)) for each in folders):
        with ThreadPoolExecutor() as pool:  # most of it is drawing random numbers, which numpy does side by side
            for pair, row, said in zip(pairs, rows, pool.map(partial(_difference, predictions), pairs), strict=True):
                if isinstance(said, str):
                    problems.setdefault(said, []).append(pair[0].name)
                else:
                    row |= said
    return pd.DataFrame(rows), [f"{', '.join(dict.fromkeys(names))}: {what}" for what, names in problems.items()]


def uncompared(found: Sequence[Run], predictions: Predictions, reference: str = "partial") -> str | None:
    """Why nothing can be compared at all, in words; None where something can, and where there is but one method."""
    folders = _folders(found)
    if len(folders) < 2:
        return None
    if not any(each.row["method"] == reference for each in folders):
        return f"not compared: none of these runs is of {reference}"
    if not any(predictions.kept(each.name, _seeds(each)) for each in folders):
        return "not compared: none of these runs has kept its predictions"
    return None


def _folders(found: Sequence[Run]) -> list[_Folder]:
    return [_Folder(name, runs) for name, runs in _gathered(found, lambda run: run.row["group"]).items()]


def _gathered(each: Iterable, key: Callable[[object], Key]) -> dict[Key, list]:
    """Things by what they share, in the order in which that is met."""
    gathered: dict[Key, list] = {}
    for one in each:
        gathered.setdefault(key(one), []).append(one)
    return gathered


def _pairs(folders: Sequence[_Folder], reference: str) -> tuple[list[tuple[_Folder, _Folder]], dict[str, list[str]]]:
    """Each folder with the reference that it is compared with, references with themselves first; and problems.

    problems: what stands in the way, and the folders that it concerns.
    """
    pairs: list[tuple[_Folder, _Folder]] = []
    problems: dict[str, list[str]] = {}
    for place in _gathered(folders, lambda each: (each.row["task"], each.row["model"])).values():
        references = [each for each in place if each.row["method"] == reference]
        apart: dict[tuple[str, str], list[str]] = {}
        by_point = _gathered(references, lambda each: each.row["operating_point"])
        for point, of_point in sorted(by_point.items(), key=lambda item: point_order(item[0])):
            alike = _gathered(of_point, lambda each: each.row["conditions"])
            for each in place:
                if each.row["operating_point"] in (point, NONE) and each.row["conditions"] not in alike:
                    apart.setdefault((each.name, _apart(each, of_point)), []).append(point)
            for bases in alike.values():
                if len(bases) > _MOST_REFERENCES:
                    first = f"{bases[0].name} and {len(bases) - 1} more"
                    problems.setdefault(_too_many(bases), []).append(first)
                    continue
                shared = bases[0].row["conditions"]
                own = [each for each in place if each.row["conditions"] == shared]
                own = [each for each in own if each.row["operating_point"] in (point, NONE)]
                pairs += [(each, base) for base in bases for each in (base, *(each for each in own if each != base))]
        for (name, said), points in apart.items():
            what = f"trained under other conditions than {reference} at {' and '.join(points)}: {said}"
            problems.setdefault(what, []).append(name)
    return pairs, problems


def _difference(predictions: Predictions, pair: tuple[_Folder, _Folder]) -> dict | str:
    """How much better the first of a pair is than the second; in words why that cannot be said."""
    if pair[0] is pair[1]:
        return {}
    metric = pair[1].row["metric"]
    try:
        found = compared(*(predictions.of(each.name, _seeds(each), metric) for each in pair), metric)
    except (PartialLoraError, ValueError, KeyError) as error:
        return " ".join(str(error).split())
    return {
        **{name: getattr(found, name) for name in ("difference", "low", "high", "verdict", "reason")},
        "pairs": found.seeds,
        "examples": found.examples,
    }


def _row(folder: _Folder, base: _Folder) -> dict:
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
        "reliability": _mean(_reliability(run.record) for run in folder.runs),
        **{name: named[name] for name in ("learning_rate", "tuning")},
        "group": folder.name,
        "reference": base.name,
    }


def _cost(run: Run, name: str) -> float:
    return run.row[name] if name in run.row else number((run.record.get("cost") or {}).get(name))


def _reliability(record: Mapping) -> float:
    return number(((record.get("calibration") or {}).get("reliability") or {}).get("spearman_brown"))


def _mean(values: Iterable[float]) -> float:
    """The mean of the numbers there are; NaN of none."""
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else np.nan


def _seeds(folder: _Folder) -> list[int]:
    return [run.row["seed"] for run in folder.runs]


def _apart(folder: _Folder, references: Sequence[_Folder]) -> str:
    """In what a folder's conditions differ from those of the reference that is nearest to them."""
    said = [differences(folder.conditions, each.conditions) for each in references]
    return min(said, key=lambda each: each.count(" against "))


def _too_many(references: Sequence[_Folder]) -> str:
    settings = [{key: str(value) for key, value in flatten(each.settings).items()} for each in references]
    keys = sorted({key for each in settings for key in each} - {"seed", "results_dir", "overwrite"})
    varied = [key for key in keys if len({each.get(key) for each in settings}) > 1]
    choose = f"choose with --where {varied[0]}=…" if varied else "they have the same settings"
    return f"{len(references)} to compare with, expected at most {_MOST_REFERENCES}; {choose}"
