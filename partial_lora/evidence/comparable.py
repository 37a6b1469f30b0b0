"""Which of the recorded runs a table may set beside each other: as the schema has them, and trained alike."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

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
    return all(
        (config.get(group) or {}).get(name, value) == value
        for group, settings in _AS_EVER.items()
        for name, value in settings.items()
    )


def comparable(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The runs that tables set beside each other, one for each task, model, method, point and seed; and notes.

    Of the conditions under which a task and model was trained those count that have the most training rows, and of
    these the most runs. Of a method's own settings (learning rate, few-shot data) the tuned ones, and of these those of
    the most runs.
    """
    found = runs[runs["config"].map(as_ever).astype(bool)]
    found = found.assign(
        conditions=[_words(config, _CONDITIONS) for config in found["config"]],
        rows=[_training_rows(config) for config in found["config"]],
        own=[_words(config, _OWN) for config in found["config"]],
        tuned=[2 if word == "tuned" else int(word != "untuned") for word in found["tuning"]],
    )
    kept, notes = [], []
    for place, part in found.groupby(_PLACE, sort=False):
        chosen = _most(part, "conditions", "rows")
        if len(other := part[(part["conditions"] != chosen) & (part["rows"] == part["rows"].max())]):
            notes.append(f"{_said(place)}: {len(other)} runs under other conditions than those shown are left out")
        for row, alike in part[part["conditions"] == chosen].groupby(_ROW, sort=False):
            own = _most(alike, "own", "tuned")
            if len(other := alike[alike["own"] != own]):
                notes.append(f"{_said((*place, *row))}: {len(other)} runs with other settings of its own are left out")
            kept.append(alike[alike["own"] == own].drop_duplicates("seed"))
    whole = pd.concat(kept) if kept else found
    return whole[list(runs.columns)].reset_index(drop=True), notes


def _most(part: pd.DataFrame, column: str, first: str) -> str:
    """The value of a column whose rows have the largest `first`, and of these the one that most rows have."""
    ranked = part.groupby(column, sort=True).agg(first=(first, "max"), n=("seed", "size"))
    return ranked.sort_values(["first", "n"], ascending=False, kind="stable").index[0]


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
