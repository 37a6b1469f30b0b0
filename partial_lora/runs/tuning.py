"""The file of learning rates that searches have found on validation, and what a run takes from it.

It is JSON, {version, entries: [{task, model, method, masks, operating_point, learning_rate, metric, validation, tried:
{rate: validation or null}, losses: {rate: loss or null}, seeds, at_edge, settings}]}: an entry for each thing that was
tuned (scripts/tune.py). `validation` is the metric there, the mean over seeds, and `losses` say what decided between
equals; null stands for a rate at which training failed, and for a loss that an older file did not keep. `settings`
are those that matter to the rate (rate_settings.py), of all its runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from partial_lora.errors import PartialLoraError
from partial_lora.runs.operating_point import nearest, said
from partial_lora.runs.rate_settings import KEY, differing, key_in, key_of, settings_of, unevenness, word
from partial_lora.sealed import write_json

VERSION = 2
_NEEDED = (*KEY, "learning_rate", "tried", "seeds", "settings")
_SHOWN = 3  # settings that are named where a rate was found with others


def tuned(file: str, settings: Mapping, stand_in: str | None = None) -> dict[str, Any]:
    """What the trainer of a run takes from a file: `learning_rate`, and `tuned_elsewhere`, None where all agrees.

    The rate is that of the same task, model, method, masks and operating point, or of the nearest point that was
    searched (`operating_point.nearest`); a method that is not calibrated has one for all masks and points. stand_in: a
    task whose rates are taken where the file has none of the run's own. `tuned_elsewhere` says in a table's words at
    which other point, on which other task and with which other settings it was found. Raises PartialLoraError, naming
    the file, where it has none.
    """
    entries = {key_in(entry): entry for entry in load(Path(file))}
    calibration, wanted = None, key_of(settings, None)  # of a method that is not calibrated
    key = _nearest(wanted, entries, stand_in)
    if key is None or key[0] != wanted[0]:
        of_file = _calibration(settings)
        as_calibrated = key_of(settings, of_file)
        found = _nearest(as_calibrated, entries, stand_in)
        if key is None or (found is not None and found[0] == wanted[0]):
            calibration, wanted, key = of_file, as_calibrated, found
    if key is None:
        missing = ", ".join(f"{name}={value}" for name, value in zip(KEY, wanted, strict=True))
        raise PartialLoraError(
            f"trainer.tuned={file}: no learning rate for {missing}; search for one with experiment=tune and "
            "scripts/tune.py, or take another task's with trainer.tuned_on"
        )
    found = entries[key]
    differences = differing(settings_of(settings, calibration), found["settings"])
    on, at = (None if key[part] == wanted[part] else key[part] for part in (0, -1))
    others = [
        f"{name}={word(value)}"
        for name, _, value in differences
        if on is None or not name.startswith("task.")  # other rows are what makes it another task
    ]
    return {"learning_rate": found["learning_rate"], "tuned_elsewhere": _words(on, at, others)}


def _nearest(wanted: tuple[str, ...], entries: Mapping[tuple, Mapping], stand_in: str | None) -> tuple | None:
    """The key of the entry of that task, or else of the one that stands in, at the operating point that is nearest."""
    for task in (wanted[0], stand_in):
        key = (task, *wanted[1:])
        if key in entries:
            return key
        point = nearest(key[-1], (other[-1] for other in entries if other[:-1] == key[:-1]))
        if point is not None:
            return (*key[:-1], point)
    return None


def load(file: Path) -> list[dict]:
    """The entries of a file; raises PartialLoraError, naming it, where it is none."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        version, entries = content["version"], content["entries"]
        whole = version != VERSION or all(_is_whole(entry) for entry in entries)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PartialLoraError(f"trainer.tuned={file}: no file of learning rates; scripts/tune.py makes one") from error
    if version != VERSION:
        expected = f"version {version}, expected {VERSION}; remove it, and make it again with scripts/tune.py"
        raise PartialLoraError(f"trainer.tuned={file}: {expected}")
    if not whole:
        raise PartialLoraError(f"trainer.tuned={file}: an entry lacks a key or a learning rate above 0; make it again")
    return entries


def save(file: Path, entries: Iterable[Mapping]) -> None:
    """Write entries, in an order of their own; those of a file that is there stay where they are of something else.

    Raises PartialLoraError, and leaves the file as it is, where one that stays was not searched for as the others of
    its task and model.
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


def _is_whole(entry: Mapping) -> bool:
    named = all(name in entry for name in _NEEDED)
    return named and isinstance(entry["settings"], dict) and float(entry["learning_rate"]) > 0


def _words(on: str | None, at: str | None, others: list[str]) -> str | None:
    """On which task and where a rate was found, if elsewhere than where it is used; of many settings the first.

    A part of what tells a run from others (identity.py): in other words it would be another run.
    """
    if others:
        more = [f"{len(others) - _SHOWN} more"] if len(others) > _SHOWN else []
        place = [*([f"task={on}"] if on else []), *([at] if at else [])]
        return f"tuned elsewhere ({', '.join([*place, *others[:_SHOWN], *more])})"
    place = [*([f"on {on}"] if on else []), *([f"at {at}"] if at else [])]
    return " ".join(["tuned", *place]) if place else None


def _calibration(settings: Mapping) -> dict:
    """What the calibration.file of the settings says; nothing where they name none, and all is still to be found."""
    file = settings["calibration"].get("file")
    if file is None:
        return {}
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        said(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PartialLoraError(f"calibration.file={file}: no calibration.json that says its threshold") from error
    return content
