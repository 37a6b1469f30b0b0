"""The learning rate that did best in a search on validation, for everything that was tuned there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean

from partial_lora.errors import PartialLoraError
from partial_lora.rate_settings import KEY, differing, key_in, key_of, named, settings_of, unevenness, word

_FEWEST = 4  # learning rates of a search
_LOWER_IS_BETTER = ("mse", "perplexity")


def best_rates(records: Iterable[Mapping], known: Iterable[Mapping] = ()) -> tuple[list[dict], list[str]]:
    """An entry (tuning.py) for all that the records of a search's runs tuned, and what was left out, a line each.

    The rate is the one that did best on validation; of those that did equally well the one with the least loss, then
    the lowest. One at which the loss was not finite counts as tried; a run that has ended badly in another way is left
    out. known: entries of an earlier search that this one goes on with; the rates that only they have tried count for
    the same key, and where they do not say losses, their choice among equals stands. Raises PartialLoraError where the
    runs of one entry differ in a setting that matters or its rates in their seeds, where not all of a task and model
    were tried as often and as long, and for fewer than four rates.
    """
    earlier = {key_in(entry): entry for entry in known}
    searched: dict[tuple, list[Mapping]] = {}
    left_out = []
    for record in records:
        key = key_of(record["config"], record["calibration"])
        if (record["status"] == "finished" and record["metrics"]) or _diverged(record):
            searched.setdefault(key, []).append(record)
        else:
            left_out.append(f"{named(key)}, learning rate {_rate(record):g}: {record.get('error') or record['status']}")
    entries = [_best(key, found, earlier.get(key)) for key, found in sorted(searched.items())]
    uneven = unevenness(entries)
    if uneven is not None:
        raise PartialLoraError(uneven)
    return entries, left_out


def _diverged(record: Mapping) -> bool:
    return record["status"] == "failed" and "loss is not finite" in (record.get("error") or "")


def _best(key: tuple[str, ...], records: list[Mapping], earlier: Mapping | None) -> dict:
    by_rate: dict[float, list[Mapping]] = {}
    for record in sorted(records, key=lambda each: (_rate(each), each["seed"])):
        by_rate.setdefault(_rate(record), []).append(record)
    settings, seeds = _shared(key, by_rate)
    worth = {rate: _worth(found) for rate, found in by_rate.items()}
    if earlier is not None:
        _refuse_another(key, earlier, settings, seeds)
        worth = dict(sorted((_tried(earlier) | worth).items()))
    if len(worth) < _FEWEST:
        raise PartialLoraError(f"{named(key)}: {len(worth)} learning rates, expected at least {_FEWEST}")
    usable = {rate: each for rate, each in worth.items() if each is not None}
    if not usable:
        raise PartialLoraError(f"{named(key)}: no learning rate had a finite loss; search lower")
    metrics = [record["metrics"]["validation"]["primary"] for record in records if record["metrics"]]
    metric = metrics[0] if metrics else earlier["metric"]
    chosen = _chosen(usable, -1 if metric in _LOWER_IS_BETTER else 1, earlier and earlier["learning_rate"])
    return dict(zip(KEY, key, strict=True)) | {
        "learning_rate": chosen,
        "metric": metric,
        "validation": usable[chosen][0],
        "tried": {f"{rate:g}": each and each[0] for rate, each in worth.items()},
        "losses": {f"{rate:g}": each and each[1] for rate, each in worth.items()},
        "seeds": seeds,
        "at_edge": chosen in (min(worth), max(worth)),
        "settings": settings,
    }


def _chosen(usable: Mapping[float, tuple[float, float | None]], sign: int, before: float | None) -> float:
    """The best rate by metric (times sign) and loss.

    before: what an earlier search chose, by losses that may not be on record; it stays among equals where they are not.
    """
    best = max(sign * value for value, _ in usable.values())
    tied = {rate: loss for rate, (value, loss) in usable.items() if sign * value == best}
    if None in tied.values():
        return before if before in tied else min(tied)
    return min(tied, key=lambda rate: (tied[rate], rate))


def _tried(entry: Mapping) -> dict[float, tuple[float, float | None] | None]:
    """What each rate of an entry came to on validation; entries of old files do not say the losses."""
    losses = entry.get("losses", {})
    return {float(rate): None if value is None else (value, losses.get(rate)) for rate, value in entry["tried"].items()}


def _refuse_another(key: tuple[str, ...], earlier: Mapping, settings: Mapping, seeds: list[int]) -> None:
    """Raise PartialLoraError where an entry to go on with is of other settings or seeds than the runs."""
    pairs = [("seeds", earlier["seeds"], seeds), *differing(earlier["settings"], settings)]
    for name, before, now in pairs:
        if before != now:
            values = f"{name}={word(before)} in the file, {word(now)} in the runs"
            raise PartialLoraError(f"{named(key)}: {values}: a search goes on with what it began with")


def _shared(key: tuple[str, ...], by_rate: Mapping[float, list[Mapping]]) -> tuple[dict, list[int]]:
    """The settings and seeds that the runs of all rates have; refuses those that differ."""
    runs = [(rate, settings_of(each["config"], each["calibration"])) for rate in by_rate for each in by_rate[rate]]
    first, settings = runs[0]
    for rate, others in runs:
        differences = differing(settings, others)
        if differences:
            name, own, other = differences[0]
            values = f"{name}={word(own)} at learning rate {first:g}, {word(other)} at {rate:g}"
            to_do = "a search must be the same for all; keep runs of other settings in another results_dir"
            raise PartialLoraError(f"{named(key)}: {values}: {to_do}")
    seeds = {rate: [record["seed"] for record in records] for rate, records in by_rate.items()}
    for rate, own in seeds.items():
        if own != seeds[first]:
            values = f"seeds {word(seeds[first])} at learning rate {first:g}, {word(own)} at {rate:g}"
            raise PartialLoraError(f"{named(key)}: {values}: a search must be the same for all; run what is missing")
    return settings, seeds[first]


def _worth(records: list[Mapping]) -> tuple[float, float] | None:
    """Validation's metric and loss, means over seeds; None where a seed failed."""
    if any(record["status"] == "failed" for record in records):
        return None
    found = [record["metrics"]["validation"] for record in records]
    return fmean(each[each["primary"]] for each in found), fmean(each["loss"] for each in found)


def _rate(record: Mapping) -> float:
    return float(record["config"]["trainer"]["learning_rate"])
