"""Learning rates that a search on validation has found, and the file in which later runs find them.

The file is JSON, {version, entries: [{task, model, method, masks, operating_point, learning_rate, metric, validation,
tried: {rate: validation or null}, seeds, epochs, max_steps, batch_size, at_edge}]}: an entry for each thing that was
tuned. `validation` is the metric there, the mean over seeds; null stands for a rate at which training failed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean

from partial_lora.errors import PartialLoraError
from partial_lora.results import write_json

VERSION = 1
NO_POINT = "–"
_KEY = ("task", "model", "method", "masks", "operating_point")
_BUDGET = ("epochs", "max_steps", "batch_size")
_FEWEST = 4  # learning rates of a search
_LOWER_IS_BETTER = ("mse", "perplexity")


def tuned_rate(file: str, settings: Mapping) -> float:
    """The learning rate that was found for what the settings train.

    A method that is not calibrated has one rate for all operating points. Raises PartialLoraError, naming the file,
    where it has none.
    """
    wanted = _key(settings)
    found = {tuple(entry[name] for name in _KEY): entry["learning_rate"] for entry in load(Path(file))}
    for key in (wanted, (*wanted[:-1], NO_POINT)):
        if key in found:
            return found[key]
    said = ", ".join(f"{name}={value}" for name, value in zip(_KEY, wanted, strict=True))
    raise PartialLoraError(
        f"trainer.tuned={file}: no learning rate for {said}; search for one with experiment=tune and scripts/tune.py"
    )


def load(file: Path) -> list[dict]:
    """The entries of a file; raises PartialLoraError, naming it, where it is none."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        entries = content["entries"] if content["version"] == VERSION else None
        rates = [float(entry["learning_rate"]) for entry in entries if all(name in entry for name in _KEY)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PartialLoraError(f"trainer.tuned={file}: no file of learning rates; scripts/tune.py makes one") from error
    if len(rates) < len(entries) or not all(rate > 0 for rate in rates):
        raise PartialLoraError(f"trainer.tuned={file}: an entry lacks a key or a learning rate above 0; make it again")
    return entries


def save(file: Path, entries: Iterable[Mapping]) -> None:
    """Write entries, in an order of their own; those of a file that is there stay where they are of something else."""
    kept = {_of(entry): entry for entry in load(file)} if Path(file).is_file() else {}
    kept |= {_of(entry): dict(entry) for entry in entries}
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"version": VERSION, "entries": [kept[key] for key in sorted(kept)]})


def best_rates(records: Iterable[Mapping]) -> tuple[list[dict], list[str]]:
    """An entry for everything that the records of a search's runs tuned, and what was left out, a line each.

    The rate is the one that did best on validation; of those that did equally well the one with the least loss, then
    the lowest. One at which the loss was not finite counts as tried; a run that has ended badly in another way is left
    out. Raises PartialLoraError where not all of a task and model were tried as often and as long, or fewer than four
    rates.
    """
    searched: dict[tuple, list[Mapping]] = {}
    left_out = []
    for record in records:
        key = _key(record["config"], calibrated=record["calibration"] is not None)
        if (record["status"] == "finished" and record["metrics"]) or _diverged(record):
            searched.setdefault(key, []).append(record)
        else:
            rate = record["config"]["trainer"]["learning_rate"]
            left_out.append(f"{_said(key)}, learning rate {rate:g}: {record.get('error') or record['status']}")
    entries = [_best(key, found) for key, found in sorted(searched.items())]
    for entry in entries:
        _check_as_long(entry, next(each for each in entries if _of(each)[:2] == _of(entry)[:2]))
    return entries, left_out


def _diverged(record: Mapping) -> bool:
    return record["status"] == "failed" and "loss is not finite" in (record.get("error") or "")


def _check_as_long(entry: Mapping, other: Mapping) -> None:
    """Refuse entries that were searched for with different budgets."""
    names = ("seeds", *_BUDGET)
    compared = [("learning rates", len(entry["tried"]), len(other["tried"]))]
    for name, own, others in [*compared, *((name, entry[name], other[name]) for name in names)]:
        if own != others:
            raise PartialLoraError(
                f"{_said(_of(entry))} was tuned with {own} {name}, {_said(_of(other))} with {others}: a search must be "
                "the same for all"
            )


def _best(key: tuple, records: list[Mapping]) -> dict:
    by_rate: dict[float, list[Mapping]] = {}
    for record in sorted(records, key=lambda each: each["seed"]):
        by_rate.setdefault(float(record["config"]["trainer"]["learning_rate"]), []).append(record)
    named = dict(zip(_KEY, key, strict=True))
    if len(by_rate) < _FEWEST:
        raise PartialLoraError(f"{_said(key)}: {len(by_rate)} learning rates, expected at least {_FEWEST}")
    worth = {rate: _worth(by_rate[rate]) for rate in sorted(by_rate)}
    usable = {rate: each for rate, each in worth.items() if each is not None}
    if not usable:
        raise PartialLoraError(f"{_said(key)}: no learning rate had a finite loss; search lower")
    metric = next(record["metrics"]["validation"]["primary"] for record in records if record["metrics"])
    sign = -1 if metric in _LOWER_IS_BETTER else 1
    chosen = max(usable, key=lambda rate: (sign * usable[rate][0], -usable[rate][1], -rate))
    return named | {
        "learning_rate": chosen,
        "metric": metric,
        "validation": usable[chosen][0],
        "tried": {f"{rate:g}": each and each[0] for rate, each in worth.items()},
        "seeds": sorted({record["seed"] for record in records}),
        **{name: records[0]["config"]["trainer"].get(name) for name in _BUDGET},
        "at_edge": chosen in (min(worth), max(worth)),
    }


def _worth(records: list[Mapping]) -> tuple[float, float] | None:
    """Validation's metric and loss, means over seeds; None where a seed failed."""
    if any(record["status"] == "failed" for record in records):
        return None
    found = [record["metrics"]["validation"] for record in records]
    return fmean(each[each["primary"]] for each in found), fmean(each["loss"] for each in found)


def _said(key: tuple[str, ...]) -> str:
    task, model, method, masks, point = key
    return f"{task}, {model}, {method} ({masks}{'' if point == NO_POINT else f', {point}'})"


def _key(settings: Mapping, calibrated: bool = True) -> tuple[str, ...]:
    """What has a learning rate of its own, by the settings of a run."""
    chosen, point = settings["calibration"], NO_POINT
    if calibrated:
        name = "threshold" if chosen.get("budget") is None else "budget"
        point = f"{name} {chosen[name]:g}"
    names = (settings[group]["name"] for group in ("task", "model", "method"))
    return (*names, settings["mask"]["granularity"], point)


def _of(entry: Mapping) -> tuple[str, ...]:
    return tuple(entry[name] for name in _KEY)
