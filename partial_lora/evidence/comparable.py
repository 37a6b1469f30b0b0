"""Which of the recorded runs a table may set beside each other: as the schema has them, and trained alike."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping

import pandas as pd

from partial_lora.schema import MethodConfig
from partial_lora.sparsity_schema import CalibrationConfig, MaskConfig

# What only figures and single tables vary: elsewhere it is as the schema has it.
_AS_EVER = {
    "method": {"rank": MethodConfig.rank},
    "task": {"label_noise": 0.0},
    "mask": {"seed": MaskConfig.seed, "count": MaskConfig.count},
    "calibration": {
        name: getattr(CalibrationConfig, name) for name in ("repair", "scope", "axes", "chance", "max_sparsity", "file")
    },
}
# What all methods of a task and model have to share, and what each has of its own.
_CONDITIONS = {
    "model": ("image_size", "target_modules", "dtype", "quantization", "max_length"),
    "task": ("train_samples", "test_samples", "validation_share", "split_seed", "mixing"),
    "trainer": ("epochs", "max_steps", "batch_size", "weight_decay", "warmup"),
}
_OWN = {
    "method": ("alpha", "dropout", "projections"),
    "importance": ("k", "energy", "rounds", "fraction", "steps"),
    "calibration": ("shots", "share", "max_samples", "search", "levels", "score"),
    "trainer": ("learning_rate", "tuned_elsewhere"),
}
_PLACE = ["task", "model", "mixture"]
_ROW = ["method", "importance", "operating_point"]


def as_ever(config: Mapping) -> bool:
    """True where no setting that a table of its own varies is changed: rank, label noise, mask's seed, repair, …"""
    return not _varied(config)


def _varied(config: Mapping) -> list[str]:
    return [
        f"{group}.{name}"
        for group, settings in _AS_EVER.items()
        for name, value in settings.items()
        if (config.get(group) or {}).get(name, value) != value
    ]


def comparable(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The runs that tables set beside each other, one for each task, model, method, point and seed; and notes.

    Of the conditions under which a task and model was trained those count that have the most methods and points, of
    these the most runs, and of these the most training rows: a table is for setting methods beside each other. Of a
    method's own settings (learning rate, few-shot data) the tuned ones, and of these those that were run last: a search
    that was made again has outdated the others. Whatever else there is has a note.
    """
    ordinary = runs["config"].map(as_ever).astype(bool)
    found = runs[ordinary]
    found = found.assign(
        conditions=[_words(config, _CONDITIONS) for config in found["config"]],
        own=[_words(config, _OWN) for config in found["config"]],
        tuned=[2 if word == "tuned" else int(word != "untuned") for word in found["tuning"]],
        started=[record.get("started") or "" for record in found["record"]],
    )
    kept, notes = [], []
    for place, part in runs[~ordinary].groupby(_PLACE, sort=False):
        named = ", ".join(sorted({name for config in part["config"] for name in _varied(config)}))
        notes.append(f"{_said(place)}: {_counted(part)} left out, of other settings than a table's ({named})")
    for place, part in found.groupby(_PLACE, sort=False):
        chosen = _conditions(part)
        if len(other := part[part["conditions"] != chosen]):
            named = _differ([chosen, *other["conditions"]])
            notes.append(
                f"{_said(place)}: {_counted(other)} left out, under other conditions than those shown ({named})"
            )
        for row, alike in part[part["conditions"] == chosen].groupby(_ROW, sort=False):
            own = _own(alike)
            if len(other := alike[alike["own"] != own]):
                named = _differ([own, *other["own"]])
                notes.append(
                    f"{_said((*place, *row))}: {_counted(other)} left out, with other settings of its own ({named})"
                )
            same = alike[alike["own"] == own]
            one = same.drop_duplicates("seed")
            if len(one) < len(same):
                again = f"{_counted(same.loc[same.index.difference(one.index)])} of seeds that are there twice left out"
                notes.append(f"{_said((*place, *row))}: {again}")
            kept.append(one)
    whole = pd.concat(kept) if kept else found
    return whole[list(runs.columns)].reset_index(drop=True), notes


def _conditions(part: pd.DataFrame) -> str:
    """The conditions with most methods and points, then most runs, then most training rows."""
    cells = part[_ROW].agg("/".join, axis=1)
    rows = [_training_rows(config) for config in part["config"]]
    ranked = part.assign(cell=cells, rows=rows).groupby("conditions", sort=True)
    ranked = ranked.agg(cells=("cell", "nunique"), n=("seed", "size"), rows=("rows", "max"))
    return ranked.sort_values(["cells", "n", "rows"], ascending=False, kind="stable").index[0]


def _own(alike: pd.DataFrame) -> str:
    """A method's own settings: the tuned ones, of these those that were run last, of these those of the most runs."""
    ranked = alike.groupby("own", sort=True).agg(tuned=("tuned", "max"), last=("started", "max"), n=("seed", "size"))
    return ranked.sort_values(["tuned", "last", "n"], ascending=False, kind="stable").index[0]


def _training_rows(config: Mapping) -> float:
    asked = config["task"].get("train_samples")
    return math.inf if asked is None else float(asked)


def _words(config: Mapping, chosen: Mapping[str, tuple[str, ...]]) -> str:
    """The chosen settings as one comparable text."""
    settings = {
        f"{group}.{name}": (config.get(group) or {}).get(name) for group, names in chosen.items() for name in names
    }
    return json.dumps({key: value for key, value in settings.items() if value is not None}, default=str)


def _said(names: tuple[str, ...]) -> str:
    return ", ".join(name for name in names if name)


def _counted(runs: pd.DataFrame) -> str:
    return "1 run" if len(runs) == 1 else f"{len(runs)} runs"


def _differ(words: Iterable[str]) -> str:
    """The names of the settings that are not alike in all of these texts of `_words`."""
    every = [json.loads(each) for each in dict.fromkeys(words)]
    names = sorted({name for each in every for name in each})
    return ", ".join(name for name in names if any(each.get(name) != every[0].get(name) for each in every))
