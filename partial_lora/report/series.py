"""The numbers behind a report's figures: fronts, bands over seeds, how far sparsities and predictions agree."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd

from partial_lora.calibration.points import curve_of
from partial_lora.report.places import AXES, place, without_common_start
from partial_lora.report.predicted import Predictions
from partial_lora.report.runs import NONE, Run
from partial_lora.runs.results import CALIBRATION
from partial_lora.tasks.metrics import LOWER_IS_BETTER

History = Sequence[Mapping]
Band = list[tuple[int, float, float, float]]  # step, mean, lowest, highest


def front(points: Iterable[tuple[float, float]], metric: str) -> list[tuple[float, float]]:
    """The points (size, score) that no other is both as small as and better than, by size."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    kept: list[tuple[float, float]] = []
    for size, score in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not kept or sign * score > sign * kept[-1][1]:
            kept.append((size, score))
    return kept


def band(histories: Sequence[History], key: str) -> Band:
    """What a key of Trainer's log was at the steps that all of the histories have: mean, lowest, highest over them."""
    logged = [values for history in histories if (values := dict(points(history, key)))]
    if not logged:
        return []
    steps = sorted(set.intersection(*(set(values) for values in logged)))
    found = []
    for step in steps:
        values = [each[step] for each in logged]
        found.append((step, float(np.mean(values)), min(values), max(values)))
    return found


def points(history: History, key: str) -> list[tuple[int, float]]:
    """(step, value) of every entry of Trainer's log that has a key, but for values that were no finite number."""
    logged = ((entry["step"], entry[key]) for entry in history if entry.get(key) is not None)
    return [(step, value) for step, value in logged if isfinite(value)]


def selected(record: Mapping) -> str:
    """What validation logged beside its loss that is the metric of the test, or else its loss."""
    metric = record["metrics"]["test"]["primary"]
    return metric if any(f"eval_{metric}" in entry for entry in record["history"]) else "loss"


def importance(run: Run) -> str:
    """The measure by which a run's modules were calibrated."""
    return (run.record["config"].get("importance") or {}).get("name", NONE)


def maps(found: Sequence[Run]) -> dict[tuple[str, str, str, str], dict[str, dict[str, float]]]:
    """The sparsities of every calibration, by (task, model, importance, operating point): a mean over its runs.

    Of the methods that share a calibration those of `partial` count, if there are any: another may move them.
    """
    grouped: dict[tuple[str, str, str, str], list[Run]] = {}
    for run in found:
        if run.record["calibration"] is not None and run.record.get("sparsity"):
            key = (run.row["task"], run.row["model"], importance(run), run.row["operating_point"])
            grouped.setdefault(key, []).append(run)
    averaged = {}
    for key, runs in grouped.items():
        usual = [run for run in runs if run.row["method"] == "partial"] or runs
        modules = usual[0].record["sparsity"]
        alike = [run.record["sparsity"] for run in usual if run.record["sparsity"].keys() == modules.keys()]
        averaged[key] = {
            module: {axis: float(np.mean([each[module][axis] for each in alike])) for axis in AXES}
            for module in modules
        }
    return averaged


def sparsity_agreement(found: Sequence[Run]) -> dict[str, tuple[list[str], np.ndarray]]:
    """By model, names of its calibrations and the correlation of their sparsities (Pearson, all modules and axes).

    Models with a single calibration are left out; sparsities that are all the same correlate with nothing (NaN).
    """
    vectors: dict[tuple, list[tuple[str, np.ndarray]]] = {}
    for (task, model, measure, point), sparsity in maps(found).items():
        values = np.array([sparsity[module][axis] for module in sorted(sparsity) for axis in AXES])
        vectors.setdefault((model, tuple(sorted(sparsity))), []).append((f"{task}, {measure}, {point}", values))
    matrices = {}
    for (model, _), each in vectors.items():
        if len(each) > 1:
            with np.errstate(invalid="ignore", divide="ignore"):
                matrices[model] = ([name for name, _ in each], np.corrcoef([values for _, values in each]))
    return matrices


def prediction_agreement(part: pd.DataFrame, predictions: Predictions) -> np.ndarray | None:
    """How often every two rows of a grouped table say the same of a test example, over the seeds that both have.

    NaN where two have no seed in common; None where fewer than two have predictions of classes.
    """
    said = []
    for group, seeds in zip(part["group"], part["seeds"], strict=True):
        of_group = {seed: predictions.said(group, seed) for seed in map(int, seeds.split())}
        said.append({seed: each for seed, each in of_group.items() if each is not None})
    if sum(bool(each) for each in said) < 2:
        return None
    matrix = np.full((len(said), len(said)), np.nan)
    for row, one in enumerate(said):
        for column, other in enumerate(said):
            shares = [
                float(np.mean(one[seed] == other[seed]))
                for seed in one.keys() & other.keys()
                if len(one[seed]) == len(other[seed])
            ]
            if shares:
                matrix[row, column] = np.mean(shares)
    return matrix


def calibrations(found: Sequence[Run], results_dir: Path) -> dict[str, dict]:
    """{baseline, curves} of calibration.json files by "task, model, importance": those of runs, then those alone.

    curves: `kind_curves`. One of each is read, whatever the operating point: they share their curves. A file that
    cannot be read is none.
    """
    contents: dict[str, dict] = {}
    places = [
        (f"{run.row['task']}, {run.row['model']}, {importance(run)}", run.directory)
        for run in found
        if run.record["calibration"] is not None
    ]
    for file in sorted(results_dir.glob(f"calibrations/*/*/*/{CALIBRATION}")):
        task, model, measure = file.parts[-4:-1]
        places.append((f"{task}, {model}, {measure.rpartition('-')[0]}", file.parent))
    for title, directory in places:
        if title in contents:
            continue
        try:
            content = json.loads((directory / CALIBRATION).read_text(encoding="utf-8"))
            contents[title] = {"baseline": float(content["baseline"]), "curves": kind_curves(content["modules"])}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return contents


def kind_curves(modules: Mapping[str, Mapping]) -> dict[tuple[str, str], list[tuple[float, float, float]]]:
    """The curves of a calibration by (kind of module, axis): (level, lowest, highest), medians over depth.

    lowest and highest are the bounds within which scores are known; a level of which no score is bounded on both sides
    is left out.
    """
    places = {name: place(name)[0] for name in modules}
    kinds = list(dict.fromkeys(places.values()))
    names = dict(zip(kinds, without_common_start(kinds), strict=True))
    bounds: dict[tuple[str, str], dict[float, list[tuple[float, float]]]] = {}
    for name, axes in modules.items():
        for axis in AXES:
            for level, (low, high) in curve_of(axes.get(axis, {}).get("curve", [])).items():
                if np.isfinite(low) and np.isfinite(high):
                    bounds.setdefault((names[places[name]], axis), {}).setdefault(level, []).append((low, high))
    return {
        key: [
            (level, median(low for low, _ in each), median(high for _, high in each))
            for level, each in sorted(found.items())
        ]
        for key, found in bounds.items()
    }
