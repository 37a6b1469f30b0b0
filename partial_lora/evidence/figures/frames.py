"""Runs as rows that figures are drawn from: what tells them apart, which go together, and their means over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

import pandas as pd

from partial_lora.config import with_defaults
from partial_lora.grouping import half_interval
from partial_lora.runs import NONE, Run

PLACE = ("task", "model", "metric")
SETTINGS = {  # what an experiment may vary beside method and operating point: the usual value, by column
    "rank": ("method.rank", 16),
    "importance": ("importance.name", "svd"),
    "masks": ("mask.granularity", "rows_columns"),
    "count": ("mask.count", "exact"),
    "mask_seed": ("mask.seed", NONE),
    "max_sparsity": ("calibration.max_sparsity", 0.95),
    "axes": ("calibration.axes", "separate"),
    "scope": ("calibration.scope", "independent"),
    "repair": ("calibration.repair", False),
    "chance": ("calibration.chance", "ignore"),
    "label_noise": ("task.label_noise", 0.0),
    "train_samples": ("task.train_samples", math.inf),  # those of most methods and points, whichever these are
}
# Under which all methods of a task and model have to be trained to stand beside each other.
_CONDITIONS = ("model.image_size", "model.target_modules", "model.dtype", "model.quantization", "model.max_length")
_CONDITIONS += ("task.test_samples", "task.validation_share", "task.split_seed")
_CONDITIONS += ("trainer.epochs", "trainer.max_steps", "trainer.batch_size", "trainer.weight_decay", "trainer.warmup")
# In which runs of one cell may differ all the same: their seeds, where files are, what changes no result.
_OF_NO_MATTER = {"seed", "calibration.seed", "calibration.memory", "calibration.reliability", "results_dir"}
_OF_NO_MATTER |= {"overwrite", "keep_records", "preset", "data_dir", "task.classes", "task.cache_bytes"}
_OF_NO_MATTER |= {"trainer.report_to", "trainer.num_workers", "trainer.device", "trainer.num_processes"}
_OF_NO_MATTER |= {"task.data_files", "trainer.tuned", "trainer.tuned_on"}


def frame(found: Sequence[Run]) -> pd.DataFrame:
    """A row for every run of one task: its place, method, point, settings and numbers; `run` is its position.

    Mixtures are table 6's: as one more task they would count their members twice.
    """
    single = [(position, run) for position, run in enumerate(found) if not run.record["config"]["task"].get("members")]
    return pd.DataFrame([_row(position, run) for position, run in single], columns=_COLUMNS)


_COLUMNS = ["run", *PLACE, "method", "point", "seed", *SETTINGS, "test", "parameters", "share", "sparsity"]
_COLUMNS += ["conditions", "tuned", "started", "variant"]


def _row(position: int, run: Run) -> dict:
    config = run.record["config"]
    settings = _whole(config)
    if run.record["calibration"] is None:  # which sparsities it does without makes no other run of it
        settings |= {group: _defaults()[group] for group in ("importance", "calibration", "mask")}
        settings["importance"] = settings["importance"] | {"name": SETTINGS["importance"][1]}
    known = {column: _at(settings, key, value) for column, (key, value) in SETTINGS.items()}
    known["mask_seed"] = NONE if known["mask_seed"] is None else known["mask_seed"]
    known["train_samples"] = math.inf if known["train_samples"] is None else float(known["train_samples"])
    return {
        "run": position,
        **{name: run.row[name] for name in ("task", "model", "metric", "seed", "test")},
        "method": config["method"]["name"],
        "point": run.row["operating_point"],
        **known,
        "parameters": run.row["adapter_parameters"],
        "share": run.row["share_of_dense"],
        "sparsity": run.row["adapter_sparsity"],
        "conditions": json.dumps({key: _at(settings, key, None) for key in _CONDITIONS}, default=str),
        "tuned": 2 if run.row["tuning"] == "tuned" else int(run.row["tuning"] != "untuned"),
        "started": run.record.get("started") or "",
        "variant": _variant(settings),
    }


@cache
def _defaults() -> Mapping:
    return with_defaults({})


def _whole(config: Mapping) -> dict:
    """A record's settings with the defaults of keys that came later, as `with_defaults` has them; of hundreds, fast."""
    merged = {}
    for group, value in _defaults().items():
        known = config.get(group, {} if isinstance(value, dict) else value)
        merged[group] = {**value, **known} if isinstance(value, dict) else known
    return merged


def _at(settings: Mapping, key: str, otherwise: object) -> object:
    group, _, name = key.partition(".")
    return settings[group].get(name, otherwise)


def _variant(settings: Mapping) -> str:
    """All settings that runs of one mean have to share."""
    kept = {}
    for group, value in settings.items():
        flat = {f"{group}.{key}": each for key, each in value.items()} if isinstance(value, Mapping) else {group: value}
        kept |= {key: each for key, each in flat.items() if key not in _OF_NO_MATTER}
    return json.dumps(kept, sort_keys=True, default=str)


def usual(known: pd.DataFrame, varied: Iterable[str] = ()) -> pd.DataFrame:
    """The runs that differ from the usual ones of their task and model in nothing but the columns `varied`.

    Usual is the value in SETTINGS; where no run of the place has it, the one that most have, and of training samples
    the number that most methods and points have, of several the one of most runs, and of these the largest. All are
    trained under the conditions under which most with as many samples are.
    """
    kept = [known.iloc[:0]]
    for _, part in known.groupby(list(PLACE), sort=False):
        part = part[_alike(part)]
        for column, (_, value) in SETTINGS.items():
            if column in varied:
                continue
            if column == "train_samples":
                value = _most_cells(part, column)
            elif value not in set(part[column]):
                value = part[column].mode().iloc[0]
            part = part[part[column] == value]
        kept.append(part)
    return pd.concat(kept)


def _most_cells(part: pd.DataFrame, column: str) -> object:
    """The value of a column that most methods and points have, then most runs, then the largest."""
    cells = part.assign(cell=part["method"] + "/" + part["point"])
    ranked = cells.groupby(column).agg(cells=("cell", "nunique"), n=("run", "size")).reset_index()
    return ranked.sort_values(["cells", "n", column], kind="stable")[column].iloc[-1] if len(ranked) else None


def _alike(part: pd.DataFrame) -> pd.Series:
    """Whether each run was trained as most with as many rows were: fewer may go by more often."""
    usual_ones = part.groupby("train_samples")["conditions"].transform(lambda each: each.mode().iloc[0])
    return part["conditions"] == usual_ones


def elsewhere(known: pd.DataFrame) -> list[str]:
    """The runs that `usual` leaves out because they were trained under other conditions, a line a task and model."""
    notes = []
    for (task, model, _), part in known.groupby(list(PLACE), sort=True):
        others = part[~_alike(part)]
        if len(others):
            near = part[part["train_samples"].isin(others["train_samples"])]
            named = _differ(near["conditions"].unique())
            notes.append(f"{task}, {model}: left out {len(others)} of {len(part)} runs, of other conditions ({named})")
    return notes


def settled(cell: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """One run for every seed of a cell, all of the same settings, and what is to be said of others that were left out.

    Of several settings those with a tuned learning rate stay, and of these those that were run last, as in tables
    (comparable.py): a mean over different ones would be of neither.
    """
    ranked = cell.groupby("variant", sort=True).agg(tuned=("tuned", "max"), last=("started", "max"), n=("run", "size"))
    chosen = ranked.sort_values(["tuned", "last", "n"], ascending=False, kind="stable").index[0]
    one = cell[cell["variant"] == chosen].drop_duplicates("seed").sort_values("seed")
    left = len(cell) - len(one)
    if not left:
        return one, []
    first = cell.iloc[0]
    place = ", ".join(str(first[name]) for name in ("task", "model", "method", "point"))
    return one, [f"{place}: left out {left} of {len(cell)} runs, of other settings ({_differ(ranked.index)})"]


def _differ(variants: Sequence[str], most: int = 3) -> str:
    every = [json.loads(variant) for variant in variants]
    keys = sorted({key for each in every for key in each if len({str(other.get(key)) for other in every}) > 1})
    return ", ".join(keys[:most]) + (" …" if len(keys) > most else "") if keys else "a seed twice"


def means(known: pd.DataFrame, by: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Means over seeds of the runs that agree in the columns `by`, and what was left out, a line each.

    n, seeds; mean, std (the sample's, NaN of one run) and half the 95 % interval (Student's t) of the test score;
    parameters, share of the dense adapter and sparsity as means. Of a task and model all means are over the seeds that
    all of them have, if these are two at least: scores of unlike seeds differ by the seeds, too.
    """
    cells, notes = [], []
    for key, cell in known.groupby(list(by), sort=False, dropna=False):
        one, said = settled(cell)
        cells.append((key, one))
        notes += said
    rows = []
    for key, one in _of_seeds_in_common(cells, [list(by).index(name) for name in PLACE]):
        std = float(one["test"].std())
        rows.append(
            dict(zip(by, key, strict=True))
            | {"n": len(one), "seeds": " ".join(map(str, one["seed"])), "mean": float(one["test"].mean())}
            | {"std": std, "half": half_interval(std, len(one))}
            | {name: float(one[name].mean()) for name in ("parameters", "share", "sparsity")}
        )
    columns = [*by, "n", "seeds", "mean", "std", "half", "parameters", "share", "sparsity"]
    return pd.DataFrame(rows, columns=columns), notes


def _of_seeds_in_common(
    cells: Sequence[tuple[tuple, pd.DataFrame]], place: Sequence[int]
) -> list[tuple[tuple, pd.DataFrame]]:
    """The cells with the runs of the seeds that all cells of their place have; as they are where that is not two."""
    seeds: dict[tuple, set[int]] = {}
    for key, one in cells:
        where = tuple(key[index] for index in place)
        seeds[where] = seeds.get(where, set(one["seed"])) & set(one["seed"])
    kept = []
    for key, one in cells:
        common = seeds[tuple(key[index] for index in place)]
        kept.append((key, one[one["seed"].isin(common)] if len(common) > 1 else one))
    return kept


def noted(table: pd.DataFrame, notes: Iterable[str]) -> pd.DataFrame:
    """The table, with what its reader is to be told."""
    table = table.reset_index(drop=True)
    table.attrs["notes"] = list(dict.fromkeys(notes))
    return table


def value_of(point: str, kind: str) -> float:
    """The number of an operating point of a kind ("threshold", "budget"); NaN of any other."""
    name, _, number = point.partition(" ")
    return float(number.replace(",", "")) if name == kind else math.nan


def places(table: pd.DataFrame) -> list[tuple[tuple[str, str, str], pd.DataFrame]]:
    """The tables of every task, model and metric: digits, which needs no data set, first, then by name."""
    found = table.groupby(list(PLACE), sort=True)
    return sorted(found, key=lambda each: (each[0][0] != "digits", each[0]))
