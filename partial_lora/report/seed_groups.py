"""Folders of runs that differ in their seed alone: what tells them apart, and the means over their seeds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from pandas.api.types import is_numeric_dtype

from partial_lora.files import grouped
from partial_lora.report import rows
from partial_lora.report.records import Run
from partial_lora.report.statistics import half_interval
from partial_lora.settings.rates import ranked

OF_SEED = ("seed", "results_dir", "overwrite", "keep_records")  # settings in which runs of one folder may differ


@dataclass(frozen=True, eq=False)
class Folder:
    """The runs of a folder, which differ in their seed alone."""

    name: str
    runs: Sequence[Run]

    @property
    def row(self) -> dict:
        return self.runs[0].row

    @property
    def config(self) -> dict:
        return self.runs[0].record["config"]

    @property
    def key(self) -> tuple[str, str]:
        """Its name and precision: of one name there are several where seeds differ in precision."""
        return self.name, self.row["precision"]

    @property
    def seeds(self) -> list[int]:
        return [run.row["seed"] for run in self.runs]

    @property
    def is_variant(self) -> bool:
        """True for a variant of another run: its masks have a seed of their own, or its sparsities were repaired."""
        masks, calibration = (self.config.get(name) or {} for name in ("mask", "calibration"))
        return masks.get("seed") is not None or bool(calibration.get("repair"))


def folders(runs: Iterable[Run]) -> list[Folder]:
    """Return runs by folder, in the order of the first; a folder whose seeds differ in precision is several."""
    by_folder = grouped(runs, lambda run: (run.row["group"], run.row["precision"]))
    return [Folder(name, of_folder) for (name, _), of_folder in by_folder.items()]


def without_searches(every: Iterable[Folder]) -> list[Folder]:
    """Return folders without searches: of those that differ in their learning rate alone, the best on validation."""
    kept = []
    for rivals in grouped(every, _but_for_its_rate).values():
        # A rate that is set as auto may come to another one for each seed; a folder goes by its first.
        rated = ((folder.row["learning_rate"], run.row) for folder in rivals for run in folder.runs)
        validation = rows.validation_by_rate(row | {"learning_rate": rate} for rate, row in rated)
        best = ranked(validation)[:1] or list(validation)
        kept += [folder for folder in rivals if folder.row["learning_rate"] in best]
    return kept


def _but_for_its_rate(folder: Folder) -> tuple:
    of_run = [folder.row[name] for name in (*rows.BLOCK, "method", "precision")]
    return *of_run, repr(sorted(rows.of_method(folder.config).items()))


def usual_conditions(every: Iterable[Folder]) -> dict[tuple[str, str, str], Folder]:
    """Return, by panel, a folder under the conditions that most methods share; of equals, those with the most runs."""
    usual = {}
    for place, of_place in grouped(every, lambda folder: rows.panel_of(folder.row)).items():
        by_conditions = grouped(of_place, lambda folder: folder.row["conditions"]).values()
        usual[place] = max(by_conditions, key=_methods_and_runs)[0]
    return usual


def _methods_and_runs(folders: Iterable[Folder]) -> tuple[int, int]:
    return len({folder.row["method"] for folder in folders}), sum(len(folder.runs) for folder in folders)


def told_apart(every: Sequence[Folder]) -> dict[tuple[str, str], str]:
    """Return by `Folder.key` the settings that tell it from others that would read alike: "rank=64", or "–".

    They are the conditions that are not usual for its task and model, and the settings of its method that vary among
    the folders of one method at one operating point and are no defaults. The learning rate, or the id, is added where
    nothing else tells two folders apart.
    """
    usual, differs = usual_conditions(every), {}
    for place, of_panel in grouped(every, lambda folder: rows.panel_of(folder.row)).items():
        settings = _unusual(of_panel, usual[place])
        methods = grouped(of_panel, lambda folder: (folder.row["method"], folder.row["operating_point"])).values()
        for of_one in methods:
            for folder, varied in _varied(of_one).items():
                settings[folder] |= varied
        short = _short_keys({key for values in settings.values() for key in values})
        words = {
            folder: ", ".join(f"{short[key]}={rows.as_typed(value)}" for key, value in values.items())
            for folder, values in settings.items()
        }
        for of_one in methods:
            differs |= _with_rates(of_one, words)
    return differs


def _unusual(folders: Iterable[Folder], usual: Folder) -> dict[Folder, dict[str, object]]:
    """Return the conditions of folders that are not the usual ones."""
    shared = rows.conditions(usual.runs[0].record)
    return {
        folder: {key: value for key, value, _ in rows.differing(rows.conditions(folder.runs[0].record), shared)}
        for folder in folders
    }


def _varied(folders: Iterable[Folder]) -> dict[Folder, dict[str, object]]:
    """Return the settings of a method that are not the same in all of its folders."""
    settings = {folder: rows.of_method(folder.config) for folder in folders}
    keys = sorted({key for values in settings.values() for key in values})
    varied = [key for key in keys if len({repr(values.get(key)) for values in settings.values()}) > 1]
    return {folder: {key: values[key] for key in varied if key in values} for folder, values in settings.items()}


def _with_rates(folders: Iterable[Folder], words: Mapping[Folder, str]) -> dict[tuple[str, str], str]:
    """Return by key the words of a method's folders, with the learning rate or the id where the words are the same."""
    differs = {}
    for twins in grouped(folders, words.get).values():
        rates = grouped(twins, lambda folder: f"learning_rate={folder.row['learning_rate']:g}")
        for rate, of_rate in rates.items():
            for folder in of_rate:
                id = folder.name.rpartition("-")[2]
                more = [rate] * (len(rates) > 1) + [id] * (len(of_rate) > 1)
                differs[folder.key] = ", ".join(filter(None, [words[folder], *more])) or rows.NONE
    return differs


def _short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return keys without their groups, except where two would be the same or the meaning would be lost."""
    short = {key: key.removesuffix(".name").rpartition(".")[2] for key in keys}
    several = Counter(short.values())
    return {key: key if several[word] > 1 or word == "seed" else word for key, word in short.items()}


def table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return the rows of runs; `differs` is what tells them apart, `usual` whether they are under usual conditions."""
    every = folders(runs)
    usual, differs = usual_conditions(every), told_apart(every)
    return pd.DataFrame(
        [
            run.row
            | {
                "differs": differs[run.row["group"], run.row["precision"]],
                "usual": run.row["conditions"] == usual[rows.panel_of(run.row)].row["conditions"],
            }
            for run in runs
        ]
    )


# Runs averaged: over their seeds, or over all that share what the reader names.

_SAME = (
    *("task", "model", "method", "operating_point", "metric"),
    *("conditions", "differs", "usual", "precision", "group"),
)
_WHOLE = ("adapter_dense", "head_parameters")
_AVERAGED = (
    *("adapter_parameters", *_WHOLE, "share_of_dense", "adapter_sparsity", "adapter_bytes"),
    *("calibrate_seconds", "train_seconds", "evaluate_seconds"),
)


def group(frame: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Return runs that differ in nothing but their seed (one folder method-id) as one row: mean, deviation, n.

    by: columns of the frame instead; runs of one metric and precision that agree in these are a row. The deviation is
    the sample's (n - 1), NaN for a single run; test_half is half the 95 % interval of the mean by Student's t. Rows are
    in the order of task, model, operating point, method, or of the keys.
    """
    if frame.empty:
        return frame
    columns = list(dict.fromkeys([*by, "metric", "precision"])) if by else list(_SAME)
    rest = [name for name in _SAME if name not in columns and name != "group"]
    table = (
        frame.groupby(columns, sort=False, dropna=False)
        .agg(
            n=("seed", "size"),
            seeds=("seed", lambda seeds: " ".join(str(seed) for seed in sorted(set(seeds)))),
            test_mean=("test", "mean"),
            test_std=("test", "std"),
            validation_mean=("validation", "mean"),
            **({} if "learning_rate" in columns else {"learning_rate": ("learning_rate", _shared if by else "median")}),
            **{name: (name, "mean") for name in _AVERAGED},
            **{name: (name, _shared) for name in rest},
            calibrations_reused=("calibration_reused", "sum"),
            **({} if "commit" in columns else {"commit": ("commit", distinct)}),
        )
        .reset_index()
    )
    halves = [half_interval(std, n) for std, n in zip(table["test_std"], table["n"], strict=True)]
    table.insert(table.columns.get_loc("test_std") + 1, "test_half", halves)
    if by:
        return table.sort_values(list(by), kind="stable", key=_sortable).reset_index(drop=True)
    for name in _WHOLE:
        table[name] = table[name].round().astype(int)  # the same for every seed, so the mean is whole
    table["id"] = table["group"].str.rpartition("-")[2]
    order = table.assign(_point=table["operating_point"].map(rows.point_order))
    order = order.sort_values(["task", "model", "_point", "method", "learning_rate", "id"], kind="stable")
    return table.loc[order.index].reset_index(drop=True)


def distinct(values: pd.Series) -> str:
    """Return all different values, in order, as words."""
    return ", ".join(sorted({str(value) for value in values}))


def _shared(values: pd.Series) -> object:
    """Return the value that all share; "–" (of numbers NaN) where they differ."""
    if values.nunique(dropna=False) == 1:
        return values.iloc[0]
    return math.nan if is_numeric_dtype(values) else rows.NONE


def _sortable(values: pd.Series) -> pd.Series:
    """Return numbers by size where all are numbers, words otherwise."""
    numbers = pd.to_numeric(values, errors="coerce")
    return values.astype(str) if numbers.isna().any() else numbers
