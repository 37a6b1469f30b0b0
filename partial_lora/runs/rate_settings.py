"""What a learning rate is found for: the key that has one of its own, and the settings that it was found with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from partial_lora.redaction import redacted
from partial_lora.runs import identity
from partial_lora.runs.operating_point import NO_POINT, said

KEY = ("task", "model", "method", "masks", "operating_point")
_LENGTH = ("epochs", "max_steps", "batch_size")  # of the trainer: how long it trains
_CALIBRATED = ("importance.", "calibration.", "mask.")  # keys that only a calibrated method reads
_IN_FILE = ("axes", "scope", "search", "levels", "max_sparsity")  # keys of calibration that a calibration.json has, too

# What a run computes from, too, though it says nothing of whether a rate suits the run: what the key has, the rate
# itself, seeds, what is measured and not trained, and how the same numbers are computed.
_APART = {
    "task.name",
    "model.name",
    "method.name",
    "mask.granularity",
    "calibration.threshold",
    "calibration.budget",
    "calibration.file",
    "trainer.learning_rate",
    "trainer.tuned",
    "trainer.tuned_elsewhere",
    "calibration.seed",
    "mask.seed",
    "calibration.reliability",
    "task.test_samples",
    "trainer.eval_batch_size",
    "model.attn_implementation",
    "model.gradient_checkpointing",
}


def key_of(settings: Mapping, calibration: Mapping | None) -> tuple[str, ...]:
    """What has a learning rate of its own (`KEY`), by the settings of a run.

    calibration: what was found, read only where it is that of a calibration.file, which has its own threshold and
    budget. None for a method that is not calibrated: it has neither masks nor an operating point.
    """
    names = tuple(settings[group]["name"] for group in ("task", "model", "method"))
    if calibration is None:
        return (*names, NO_POINT, NO_POINT)
    asked = settings["calibration"]
    return (*names, settings["mask"]["granularity"], said(asked if asked.get("file") is None else calibration))


def settings_of(settings: Mapping, calibration: Mapping | None) -> dict[str, Any]:
    """The settings of a run that matter to its learning rate, by full key: how long it trains, and what is no default.

    calibration: as for `key_of`. A method that is not calibrated has none of calibration and masks; a calibration.file
    has those that it says of itself, which is not on how many examples it was made.
    """
    shown = redacted(settings)  # as a record has them
    if calibration is not None and shown["calibration"].get("file") is not None:
        shown = {**shown, "calibration": {name: calibration[name] for name in _IN_FILE if name in calibration}}
    names = shown["task"].get("members") or ()
    found = {
        key: identity.wherever(identity.plain(key, names), value)
        for key, value in identity.computed_from(shown).items()
        if identity.plain(key, names) not in _APART and not (calibration is None and key.startswith(_CALIBRATED))
    }
    length = {f"trainer.{name}": shown["trainer"].get(name) for name in _LENGTH}
    return length | dict(sorted(found.items()))


def differing(own: Mapping, other: Mapping) -> list[tuple[str, Any, Any]]:
    """Where `settings_of` two runs differ: key and both values; how long they train comes first."""
    names, found = [*own.get("task.members", ()), *other.get("task.members", ())], []
    standard = identity.defaults() if own != other else {}
    for key in sorted({*own, *other}, key=lambda each: (not _is_length(each), each)):
        default = standard.get(identity.plain(key, names))
        values = own.get(key, default), other.get(key, default)
        if values[0] != values[1]:
            found.append((key, *values))
    return found


def unevenness(entries: Iterable[Mapping]) -> str | None:
    """How the first two entries of a task and model differ that were not searched for alike; None where all were.

    Alike is: as many learning rates, the same seeds, as long, and the same task.
    """
    first: dict[tuple, Mapping] = {}
    for entry in entries:
        other = first.setdefault(key_in(entry)[:2], entry)
        tried = (f"{len(each['tried'])} learning rates" for each in (other, entry))
        seeds = (f"seeds {word(each['seeds'])}" for each in (other, entry))
        budget = (
            (f"{key}={word(own)}", f"{key}={word(others)}")
            for key, own, others in differing(other["settings"], entry["settings"])
            if _is_length(key) or key.startswith("task.")
        )
        for own, others in (tried, seeds, *budget):
            if own != others:
                pair = f"{named(key_in(other))} was tuned with {own}, {named(key_in(entry))} with {others}"
                return f"{pair}: a search must be the same for all"
    return None


def _is_length(key: str) -> bool:
    return key.removeprefix("trainer.") in _LENGTH


def key_in(entry: Mapping) -> tuple[str, ...]:
    """The key of an entry of a file of learning rates."""
    return tuple(entry[name] for name in KEY)


def named(key: tuple[str, ...]) -> str:
    """A key, as messages have it."""
    task, model, method, *where = key
    applies = [each for each in where if each != NO_POINT]
    return f"{task}, {model}, {method}" + (f" ({', '.join(applies)})" if applies else "")


def word(value: object) -> str:
    """The value of a setting, as it is written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(word, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
