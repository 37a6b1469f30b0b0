"""The reader's choice of runs: --where and --by name columns of the table and settings of a run."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from partial_lora.errors import PartialLoraError
from partial_lora.files import flatten
from partial_lora.report.records import Run
from partial_lora.report.rows import NONE, as_typed

_COLUMNS = (
    *("task", "model", "method", "operating_point", "metric", "seed", "learning_rate"),
    *("preset", "commit", "device"),
)


def where(runs: Sequence[Run], conditions: Sequence[str]) -> list[Run]:
    """Return the runs that meet all conditions KEY=VALUE; KEY=A,B is met by either.

    A key is a column of the table (task, method, operating_point, seed …) or one of a run's settings, as on the command
    line of a run (method.rank, calibration.threshold, …). Raises PartialLoraError for a condition of another form and a
    key that no run has.
    """
    chosen = list(runs)
    for condition in conditions:
        key, _, values = condition.partition("=")
        if not key or not values:
            raise PartialLoraError(f"--where {condition}: expected KEY=VALUE, such as --where task=digits")
        _check_key(runs, key, "--where")
        whole = [run for run in chosen if _plain(values) in _words(run, key)]  # "budget 120,000" is one value
        either = {_plain(value) for value in values.split(",")}
        chosen = whole or [run for run in chosen if either & _words(run, key)]
    if conditions and not chosen:
        raise PartialLoraError(f"--where {' '.join(conditions)}: no finished run is like that")
    return chosen


def keys(runs: Sequence[Run], names: str) -> list[str]:
    """Return the keys of --by KEY,KEY; raises PartialLoraError for one that no run has."""
    chosen = list(dict.fromkeys(key.strip() for key in names.split(",") if key.strip()))
    for key in chosen:
        _check_key(runs, key, "--by")
    return chosen


def value_of(run: Run, key: str) -> object:
    """Return what a run has for a key; "–" where its record has no such setting."""
    if key in _COLUMNS:
        return run.row[key]
    value: object = run.record["config"]
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):  # a group of settings is called by its name
        value = value.get("name")
    if isinstance(value, list):  # of which a table could make no rows
        value = as_typed(value)
    return NONE if value is None else value


def _words(run: Run, key: str) -> set[str]:
    """Return what a run may be called by a key: a task of a user's own files with or without their name."""
    return {_plain(value_of(run, name)) for name in ([key, "task.name"] if key == "task" else [key])}


def _plain(value: object) -> str:
    """Return a value as it is compared: numbers by what they are, so that 1e-3 is 0.001; all else as it is written."""
    try:
        return repr(float(str(value)))
    except ValueError:
        word = str(value).lower() if isinstance(value, bool) else str(value).strip()
        return NONE if word == "null" else word


def _check_key(runs: Sequence[Run], key: str, option: str) -> None:
    keys = {*_COLUMNS, *(name for run in runs for name in flatten(run.record["config"]))}
    if key in keys or any(value_of(run, key) != NONE for run in runs):
        return
    near = difflib.get_close_matches(key, sorted(keys), n=3, cutoff=0.5) or list(_COLUMNS[:4])
    raise PartialLoraError(f"{option} {key}: no run has such a key; perhaps {', '.join(near)}")
