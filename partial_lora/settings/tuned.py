"""The file of learning rates that searches chose on validation, and the rate that a run takes from it.

It is JSON, {version, entries: [{task, model, method, masks, operating_point, learning_rate, metric, validation, tried:
{rate: validation or null}, losses: {rate: loss or null}, seeds, at_edge, settings}]}: an entry for each thing that was
tuned (scripts/tune.py). `validation` is the mean metric over seeds, and `losses` decided between equal ones; null
stands for a rate at which training failed, and for a loss that an older file did not keep. `settings` are what all its
runs have of the settings that matter to the rate (`settings_of`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from itertools import dropwhile, product
from pathlib import Path
from typing import Any

from partial_lora.credentials import redacted
from partial_lora.errors import PartialLoraError
from partial_lora.files import read_json, write_json
from partial_lora.settings import identity, schema, versions

# --- The operating point, where on the curve of accuracy against size an adapter is: "threshold 0.9", "budget 0.13".

NO_POINT = "–"  # for a method whose size no point decides


def operating_point(calibration: Mapping) -> str:
    """Return the point of {"threshold", "budget", "sparsity"}: the budget, a share or a count of parameters, if any.

    A fixed sparsity goes before a threshold. Sparsities of single modules are named by a digest.
    """
    sparsity, budget = calibration.get("sparsity"), calibration.get("budget")
    if isinstance(sparsity, Mapping):
        digest = hashlib.sha256(json.dumps(sparsity).encode()).hexdigest()[:6]
        return f"sparsity of modules {digest}"
    key = "budget" if budget is not None else "threshold" if sparsity is None else "sparsity"
    value = calibration[key]
    if value is None:  # of a file that does not say it
        return NO_POINT
    return f"{key} {value:g}" if value <= 1 else f"{key} {value:,.0f}"


def nearest(point: str, others: Iterable[str]) -> str | None:
    """Return the nearest of other points of the same kind; of two as near the one that keeps more; None without any.

    Thresholds are apart by their difference; budgets, and what sparsities leave, by their ratio. Points of different
    kinds are not compared, nor are sparsities of single modules.
    """
    kind, value = _parted(point)
    parts = {other: _parted(other) for other in others}
    values = {other: number for other, (its_kind, number) in parts.items() if its_kind == kind}

    def distance(other: str) -> tuple[float, float]:
        number = values[other]
        apart = abs(number - value) if kind == "threshold" else abs(math.log(number / value))
        return round(apart, 9), -number  # 0.7 and 0.9 are as far from 0.8, but not in binary

    return min(values, key=distance, default=None)


def _parted(point: str) -> tuple[str, float]:
    """Return the kind (threshold, sparsity, share, count, or the point itself) and the value of a point.

    The value of a sparsity is what is kept.
    """
    name, _, number = point.partition(" ")
    try:
        value = float(number.replace(",", ""))
    except ValueError:
        return point, math.nan
    if name == "budget":
        return ("count" if value > 1 else "share"), value
    return name, 1 - value if name == "sparsity" else value


# --- The key that has a learning rate of its own, and the settings that a search was made with.

KEY = ("task", "model", "method", "masks", "operating_point")
_LENGTH = ("epochs", "max_steps", "batch_size")  # of the trainer: how long it trains
_CALIBRATED = ("importance.", "calibration.", "mask.")  # keys that only a calibrated method reads
_IN_FILE = ("axes", "scope", "search", "levels", "max_sparsity")  # keys of calibration that a calibration.json has, too

# Settings that a run computes from but that do not decide which rate suits it: what the key has, the rate itself,
# seeds, what is measured and not trained, and how the same numbers are computed.
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
    "calibration.seed",
    "mask.seed",
    "calibration.reliability",
    "task.test_samples",
    "trainer.eval_batch_size",
    "model.attn_implementation",
    "model.gradient_checkpointing",
}


def key_of(settings: Mapping, calibration: Mapping | None) -> tuple[str, ...]:
    """Return the key (`KEY`) of a run's settings.

    calibration: a record's `calibration`, or its `fixed`; read only where calibration.file is set, since that file has
    its own threshold and budget. None for a method that has neither masks nor an operating point.
    """
    names = tuple(settings[group]["name"] for group in ("task", "model", "method"))
    if calibration is None:
        return (*names, NO_POINT, NO_POINT)
    section = settings["calibration"]
    point = operating_point(section if section.get("file") is None else calibration)
    return (*names, settings["mask"]["granularity"], point)


def settings_of(settings: Mapping, calibration: Mapping | None) -> dict[str, Any]:
    """Return the settings that matter to a run's learning rate, by full key: how long it trains, and no defaults.

    calibration: as for `key_of`. A method without an operating point has no settings of calibration and masks; a
    calibration.file has those that it records, which leave out the number of its examples.
    """
    recorded = redacted(settings)  # as a record has them
    if calibration is not None and recorded["calibration"].get("file") is not None:
        recorded = {**recorded, "calibration": {name: calibration[name] for name in _IN_FILE if name in calibration}}
    names = recorded["task"].get("members") or ()
    relevant = {
        key: identity.wherever(identity.task_key(key, names), value)
        for key, value in identity.computed_from(recorded).items()
        if identity.task_key(key, names) not in _APART
        and not key.startswith("calibration.sparsity")  # of each module, perhaps
        and not (calibration is None and key.startswith(_CALIBRATED))
    }
    length = {f"trainer.{name}": recorded["trainer"].get(name) for name in _LENGTH}
    return length | dict(sorted(relevant.items()))


def differing(settings: Mapping, others: Mapping) -> list[tuple[str, Any, Any]]:
    """Return where the `settings_of` two runs differ: key and both values; the length of training comes first."""
    names, differences = [*settings.get("task.members", ()), *others.get("task.members", ())], []
    standard = schema.defaults() if settings != others else {}
    for key in sorted({*settings, *others}, key=lambda key: (not _is_length(key), key)):
        default = standard.get(identity.task_key(key, names))
        values = settings.get(key, default), others.get(key, default)
        if values[0] != values[1]:
            differences.append((key, *values))
    return differences


def unevenness(entries: Iterable[Mapping]) -> str | None:
    """Return, in words, how two entries of one task and model were searched for differently; None if none were.

    Searches are the same if they have the same number of learning rates, seeds, length of training and task.
    """
    first: dict[tuple, Mapping] = {}
    for entry in entries:
        earlier = first.setdefault(key_in(entry)[:2], entry)
        tried = (f"{len(search['tried'])} learning rates" for search in (earlier, entry))
        seeds = (f"seeds {word(search['seeds'])}" for search in (earlier, entry))
        budget = (
            (f"{key}={word(before)}", f"{key}={word(now)}")
            for key, before, now in differing(earlier["settings"], entry["settings"])
            if _is_length(key) or key.startswith("task.")
        )
        for before, now in (tried, seeds, *budget):
            if before != now:
                pair = f"{named(key_in(earlier))} was tuned with {before}, {named(key_in(entry))} with {now}"
                return f"{pair}: a search must be the same for all"
    return None


def _is_length(key: str) -> bool:
    return key.removeprefix("trainer.") in _LENGTH


def key_in(entry: Mapping) -> tuple[str, ...]:
    """Return the key of an entry of a file of learning rates."""
    return tuple(entry[name] for name in KEY)


def named(key: tuple[str, ...]) -> str:
    """Return a key in words, for messages."""
    task, model, method, *where = key
    applies = [part for part in where if part != NO_POINT]
    return f"{task}, {model}, {method}" + (f" ({', '.join(applies)})" if applies else "")


def word(value: object) -> str:
    """Return the value of a setting as it is written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(word, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


# --- The file.

VERSION = 5
_LACKING = {2: "0.3.0", 3: "0.4.0", 4: "0.5.0"}  # of earlier versions: the first of CHANGES that they are without
_NEEDED = (*KEY, "learning_rate", "tried", "seeds", "settings")
_SHOWN = 3  # settings that are named, at most, where a rate was searched for with other settings


def tuned(file: str, settings: Mapping, stand_in: str | None = None) -> tuple[float, str | None]:
    """Return a learning rate out of a file, and for what else it was searched, None where all agrees.

    The rate was searched for at the same task, model, method, masks and operating point, or else at the nearest point
    (`nearest`); a method without an operating point has one rate for all masks and points. stand_in: a task whose rates
    are taken where the file has none for the run's own task. What else says in a table's words at which other point, on
    which other task and with which other settings it was. Raises PartialLoraError, naming the file, where it has no
    such rate.
    """
    entries = {key_in(entry): entry for entry in load(Path(file))}
    for task, has_point in product((settings["task"]["name"], stand_in), (False, True)):
        calibration = _calibration(settings) if has_point else None
        wanted = key_of(settings, calibration)
        prefix = (task, *wanted[1:-1])
        point = nearest(wanted[-1], (key[-1] for key in entries if key[:-1] == prefix))
        if point is not None:
            break
    else:
        missing = ", ".join(f"{name}={value}" for name, value in zip(KEY, wanted, strict=True))
        raise PartialLoraError(
            f"trainer.tuned={file}: no learning rate for {missing}; search for one with experiment=tune and "
            "scripts/tune.py, or take another task's with trainer.tuned_on"
        )
    entry = entries[(*prefix, point)]
    differences = differing(settings_of(settings, calibration), entry["settings"])
    on, at = (None if task == wanted[0] else task), (None if point == wanted[-1] else point)
    others = [
        f"{name}={word(value)}"
        for name, _, value in differences
        if on is None or not name.startswith("task.")  # other rows are what makes it another task
    ]
    return entry["learning_rate"], _words(on, at, others)


def load(file: Path) -> list[dict]:
    """Return the entries of a file; raise PartialLoraError, naming it, where it is none."""
    try:
        content = read_json(file)
        version, entries = content["version"], content["entries"]
        if version not in (*_LACKING, VERSION):
            expected = f"version {version}, expected {VERSION}; remove it, and make it again with scripts/tune.py"
            raise PartialLoraError(f"trainer.tuned={file}: {expected}")
        whole = all(map(_is_whole, entries))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PartialLoraError(f"trainer.tuned={file}: no file of learning rates; scripts/tune.py makes one") from error
    if not whole:
        raise PartialLoraError(f"trainer.tuned={file}: an entry lacks a key or a learning rate above 0; make it again")
    return [_upgraded(entry, _LACKING[version]) for entry in entries] if version in _LACKING else entries


def save(file: Path, entries: Iterable[Mapping]) -> None:
    """Write entries, sorted by key, into a file; its entries under other keys stay.

    Raises PartialLoraError, and leaves the file as it is, where entries of one task and model were not searched for
    alike.
    """
    kept = {key_in(entry): entry for entry in load(file)} if Path(file).is_file() else {}
    kept |= {key_in(entry): dict(entry) for entry in entries}
    uneven = unevenness(kept.values())
    if uneven is not None:
        raise PartialLoraError(
            f"{file}: {uneven}; write to another file (--out), or remove the old entry from this one"
        )
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"version": VERSION, "entries": [kept[key] for key in sorted(kept)]})


def _upgraded(entry: Mapping, since: str) -> dict:
    """Return an entry in today's terms; one without an operating point has no settings of masks."""
    settings = dict(entry["settings"])
    for change in dropwhile(lambda change: change.version != since, versions.CHANGES):
        if entry["operating_point"] != NO_POINT or not change.key.startswith(_CALIBRATED):
            settings.setdefault(change.key, settings.pop(change.name, change.before))
    length = {key: value for key, value in settings.items() if _is_length(key)}
    return {**entry, "settings": length | dict(sorted(settings.items()))}


def _is_whole(entry: Mapping) -> bool:
    named = all(name in entry for name in _NEEDED)
    return named and isinstance(entry["settings"], dict) and float(entry["learning_rate"]) > 0


def _words(on: str | None, at: str | None, others: list[str]) -> str | None:
    """Return the task, point and first few settings of a rate's search where they are not the run's own."""
    if others:
        more = f"{len(others) - _SHOWN} more" if len(others) > _SHOWN else None
        differs = [on and f"task={on}", at, *others[:_SHOWN], more]
        return f"tuned elsewhere ({', '.join(filter(None, differs))})"
    place = " ".join(filter(None, [on and f"on {on}", at and f"at {at}"]))
    return f"tuned {place}" if place else None


def _calibration(settings: Mapping) -> dict:
    """Return the content of the calibration.file of the settings; nothing where they name none."""
    file = settings["calibration"].get("file")
    if file is None:
        return {}
    try:
        content = read_json(file)
        if operating_point(content) == NO_POINT:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PartialLoraError(f"calibration.file={file}: no calibration.json that says its threshold") from error
    return content
