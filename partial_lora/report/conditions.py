"""The conditions of a run: the settings in which two methods have to agree before one is said to be the better."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache

from partial_lora.runs import identity

_OF_METHODS = ("method.", "calibration.", "mask.", "importance.")  # what makes a method that method
_SAID = {"method.name", "calibration.threshold", "calibration.budget"}
_PER_METHOD = {"trainer.learning_rate", "trainer.tuned", "trainer.tuned_elsewhere"}  # what each may have its own of
_PRECISION = "trainer.mixed_precision"
_MOST_NAMED = 4


def conditions(record: Mapping) -> dict[str, object]:
    """All that may not differ between runs that are compared, by full key, where it is not the schema's default.

    Left out are what defines a method (its own group, importance, calibration and mask), its learning rate, the seed,
    and what changes no result. Keys that are newer than a record are what the schema has. The precision is the one that
    was computed in: `trainer.mixed_precision=auto` depends on the device.
    """
    found = {
        key: value
        for key, plain, value in _changed(record["config"])
        if plain not in (*_PER_METHOD, _PRECISION) and not plain.startswith(_OF_METHODS)
    }
    computed_in = precision(record)
    return found if computed_in == "fp32" else found | {_PRECISION: computed_in}


def precision(record: Mapping) -> str:
    """Return the number format that a run was computed in: "fp32", "bf16" or "fp16"."""
    computed_in = record.get("mixed_precision") or "no"  # records that are older than the field are of fp32
    return "fp32" if computed_in == "no" else computed_in


def of_method(settings: Mapping) -> dict[str, object]:
    """What makes a method that method, beside its name and operating point, where it is not the schema's default."""
    return {
        key: value for key, plain, value in _changed(settings) if plain.startswith(_OF_METHODS) and plain not in _SAID
    }


def _changed(settings: Mapping) -> Iterator[tuple[str, str, object]]:
    """(key, the schema's key, value) of every setting that computes something and is not the schema's default."""
    standard, names = _defaults(), list(settings["task"].get("members") or ())
    if names:
        yield "task.members", "task.members", names
    for key, value in identity.flatten(settings).items():
        plain = identity.plain(key, names)
        if plain not in identity.NOT_SETTINGS and value != standard.get(plain):
            yield key, plain, identity.wherever(plain, value)


def digest(found: Mapping[str, object]) -> str:
    """Eight hex digits that runs under the same conditions share."""
    return hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()[:8]


def differences(one: Mapping[str, object], other: Mapping[str, object]) -> str:
    """In what two conditions differ, in words: "trainer.epochs 50 against 2"; the first few of many."""
    defaults = _defaults()
    values = {key: tuple(each.get(key, defaults.get(key)) for each in (one, other)) for key in sorted({*one, *other})}
    said = [f"{key} {_word(ours)} against {_word(theirs)}" for key, (ours, theirs) in values.items() if ours != theirs]
    more = [f"{len(said) - _MOST_NAMED} more"] if len(said) > _MOST_NAMED else []
    return ", ".join(said[:_MOST_NAMED] + more)


@cache
def _defaults() -> Mapping[str, object]:
    return identity.defaults()


def _word(value: object) -> str:
    return "null" if value is None else format(value, "g") if isinstance(value, float) else str(value)
