"""Which runs a report is about, and what it groups them by: keys of the command line, values of the records."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from partial_lora.errors import PartialLoraError
from partial_lora.report.runs import NONE, Run

_WORDS = ("task", "model", "method", "operating_point", "metric", "seed", "learning_rate", "tuning", "preset", "commit")
_WORDS += ("device",)


def where(found: Sequence[Run], conditions: Sequence[str]) -> list[Run]:
    """The runs that meet all conditions KEY=VALUE; KEY=A,B is met by either.

    A key is a column of the table (task, method, operating_point, seed …) or one of a run's settings, as on the command
    line of a run (method.rank, calibration.threshold, …). Raises PartialLoraError for a condition of another form and a
    key that no run has.
    """
    kept = list(found)
    for condition in conditions:
        key, equals, values = condition.partition("=")
        if not equals or not key or not values:
            raise PartialLoraError(f"--where {condition}: expected KEY=VALUE, such as --where task=digits")
        _check(found, key, "--where")
        whole = [run for run in kept if _plain(value_of(run, key)) == _plain(values)]  # "budget 120,000" is one value
        wanted = [_plain(value) for value in values.split(",")]
        kept = whole or [run for run in kept if _plain(value_of(run, key)) in wanted]
    if conditions and not kept:
        raise PartialLoraError(f"--where {' '.join(conditions)}: no finished run is like that")
    return kept


def keys(found: Sequence[Run], said: str) -> list[str]:
    """The keys of --by KEY,KEY; raises PartialLoraError for one that no run has."""
    named = [key.strip() for key in said.split(",") if key.strip()]
    if not named:
        raise PartialLoraError(f"--by {said}: expected KEY,KEY, such as --by task,method")
    for key in named:
        _check(found, key, "--by")
    return list(dict.fromkeys(named))


def value_of(run: Run, key: str) -> object:
    """What a run has for a key; "–" where its record has no such setting."""
    if key in _WORDS:
        return run.row[key]
    here: object = run.record["config"]
    for part in key.split("."):
        here = here.get(part, NONE) if isinstance(here, Mapping) else NONE
    if isinstance(here, Mapping):  # a group of settings is called by its name
        here = here.get("name", NONE)
    return NONE if here is None else here


def _plain(value: object) -> str:
    """A value as it is compared: numbers by what they are, so that 1e-3 is 0.001; all else as it is written."""
    try:
        return repr(float(str(value).replace("–", "")))
    except ValueError:
        return str(value).lower() if isinstance(value, bool) else str(value)


def _check(found: Sequence[Run], key: str, option: str) -> None:
    if key in _WORDS or any(value_of(run, key) != NONE for run in found) or any(_has(run, key) for run in found):
        return
    known = sorted({*_WORDS, *(name for run in found for name in _settings(run.record["config"]))})
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or list(_WORDS[:4])
    raise PartialLoraError(f"{option} {key}: no run has such a key; perhaps {', '.join(near)}")


def _has(run: Run, key: str) -> bool:
    return key in set(_settings(run.record["config"]))


def _settings(config: Mapping, before: str = "") -> list[str]:
    """The dotted names of all settings."""
    names = []
    for key, value in config.items():
        names += _settings(value, f"{before}{key}.") if isinstance(value, Mapping) else [f"{before}{key}"]
    return names
