"""The learning rates that a search found best on validation, as a file for `trainer.tuned`.

    partial-lora train -m experiment=tune method=… results_dir=results/tune
    python scripts/tune.py results/tune        # writes results/tuning.json, beside the folder

All runs of one search agree in every setting that matters; those of all methods in how long and on what they trained,
in the number of rates and in the seeds. An entry of what was not searched for stays in the file, and has to agree with
the new ones, too. With --extend a search goes on: the rates that the file says were tried, with the same settings and
seeds, count beside those of the runs, so that a wider range costs only what is new of it. Exit code 1 where the best
of some search is its lowest or highest rate: there may be a better one beyond; 2 where nothing was written.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean

from partial_lora import cli
from partial_lora.errors import PartialLoraError
from partial_lora.launching import packs
from partial_lora.settings.rates import ranked
from partial_lora.settings.tuned import KEY, differing, key_in, key_of, load, named, save, settings_of, unevenness, word
from partial_lora.tasks.metrics import LOWER_IS_BETTER

FEWEST = 4  # learning rates of a search


def best_rates(records: Iterable[Mapping], known: Iterable[Mapping] = ()) -> tuple[list[dict], list[str]]:
    """Return an entry (settings/tuned.py) for each thing that runs of a search tuned, and a line for each run left out.

    A run at whose rate the loss was not finite counts as tried; one that ended badly in another way is left out. known:
    entries of an earlier search that this one goes on with, for the same key. Raises PartialLoraError where the runs
    of one entry differ in a setting that matters or its rates in their seeds, where not all of a task and model were
    tried as often and as long, and for fewer than four rates.
    """
    earlier = {key_in(entry): entry for entry in known}
    searched: dict[tuple, list[Mapping]] = {}
    left_out = []
    for record in records:
        key, why = key_of(record["config"], _point(record)), record.get("error") or record["status"]
        diverged = record["status"] == "failed" and "loss is not finite" in why
        if diverged or (record["status"] == "finished" and record["metrics"]):
            searched.setdefault(key, []).append(record)
        else:
            left_out.append(f"{named(key)}, learning rate {rate_of(record):g}: {why}")
    entries = [entry_of(key, runs, earlier.get(key)) for key, runs in sorted(searched.items())]
    uneven = unevenness(entries)
    if uneven is not None:
        raise PartialLoraError(uneven)
    return entries, left_out


def _point(record: Mapping) -> Mapping | None:
    """Return what has decided the size of a run: its calibration, or what was fixed in its place."""
    return record["calibration"] or record.get("fixed")


def entry_of(key: tuple[str, ...], records: Iterable[Mapping], earlier: Mapping | None) -> dict:
    """Return the entry of one search: its best rate, and all that it and an earlier one have tried."""
    by_rate: dict[float, list[Mapping]] = {}
    for record in sorted(records, key=lambda each: (rate_of(each), each["seed"])):
        by_rate.setdefault(rate_of(record), []).append(record)
    settings, seeds = shared(key, by_rate, earlier)
    tried = {rate: worth_of(runs) for rate, runs in by_rate.items()}
    if earlier is not None:
        losses = earlier.get("losses", {})  # an older file does not have them
        before = {
            float(rate): None if value is None else (value, losses.get(rate))
            for rate, value in earlier["tried"].items()
        }
        tried = dict(sorted((before | tried).items()))
    if len(tried) < FEWEST:
        raise PartialLoraError(f"{named(key)}: {len(tried)} learning rates, expected at least {FEWEST}")
    finite = {rate: worth for rate, worth in tried.items() if worth is not None}
    if not finite:
        raise PartialLoraError(f"{named(key)}: no learning rate had a finite loss; search lower")
    metrics = [
        each["metrics"]["validation"]["primary"] for runs in by_rate.values() for each in runs if each["metrics"]
    ]
    metric = metrics[0] if metrics else earlier["metric"]
    best = best_of(finite, metric, earlier and earlier["learning_rate"])
    return dict(zip(KEY, key, strict=True)) | {
        "learning_rate": best,
        "metric": metric,
        "validation": finite[best][0],
        "tried": {f"{rate:g}": worth and worth[0] for rate, worth in tried.items()},
        "losses": {f"{rate:g}": worth and worth[1] for rate, worth in tried.items()},
        "seeds": seeds,
        "at_edge": best in (min(tried), max(tried)),
        "settings": settings,
    }


def shared(key: tuple, by_rate: Mapping[float, list[Mapping]], earlier: Mapping | None) -> tuple[dict, list[int]]:
    """Return the settings and seeds that the runs of all rates have; raises PartialLoraError where they differ."""
    first, *_ = by_rate
    settings = settings_of(by_rate[first][0]["config"], _point(by_rate[first][0]))
    for rate, runs in by_rate.items():
        for each in runs:
            for name, own, other in differing(settings, settings_of(each["config"], _point(each))):
                raise PartialLoraError(
                    f"{named(key)}: {name}={word(own)} at learning rate {first:g}, {word(other)} at {rate:g}: a search "
                    "must be the same for all; keep runs of other settings in another results_dir"
                )
    seeds = {rate: [each["seed"] for each in runs] for rate, runs in by_rate.items()}
    for rate, own in seeds.items():
        if own != seeds[first]:
            raise PartialLoraError(
                f"{named(key)}: seeds {word(seeds[first])} at learning rate {first:g}, {word(own)} at {rate:g}: "
                "a search must be the same for all; run what is missing"
            )
    if earlier is not None:
        for name, before, now in (("seeds", earlier["seeds"], seeds[first]), *differing(earlier["settings"], settings)):
            if before != now:
                raise PartialLoraError(
                    f"{named(key)}: {name}={word(before)} in the file, {word(now)} in the runs: a search goes on with "
                    "what it began with"
                )
    return settings, seeds[first]


def worth_of(records: list[Mapping]) -> tuple[float, float] | None:
    """Return validation's metric and loss, means over seeds; None where a seed failed."""
    if any(record["status"] == "failed" for record in records):
        return None
    validations = [record["metrics"]["validation"] for record in records]
    return fmean(each[each["primary"]] for each in validations), fmean(each["loss"] for each in validations)


def best_of(worth: Mapping[float, tuple[float, float | None]], metric: str, before: float | None) -> float:
    """Return the rate of the best metric; among equals that of the least loss, then the lowest.

    before: the choice of an earlier search; among equals of which a loss is not on record it stands.
    """
    sign = -1 if metric in LOWER_IS_BETTER else 1
    unknown = dict.fromkeys(worth, math.inf) | {before: 0.0}  # no loss is lower
    return ranked(
        {rate: {0: (sign * value, -unknown[rate] if loss is None else -loss)} for rate, (value, loss) in worth.items()}
    )[0]


def rate_of(record: Mapping) -> float:
    return float(record["config"]["trainer"]["learning_rate"])


@cli.script
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results_dir", type=Path, metavar="RESULTS_DIR")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: tuning.json beside RESULTS_DIR")
    parser.add_argument("--extend", action="store_true", help="count the rates that FILE says were tried, too")
    given = parser.parse_args(arguments)
    given.out = given.out or given.results_dir.parent / "tuning.json"
    folders = packs.directories(given.results_dir)
    records = [record for folder in folders if (record := packs.recorded(folder)) is not None]
    entries, left_out = best_rates(records, load(given.out) if given.extend else ())
    for line in left_out:
        print(f"tune: left out: {line}", file=sys.stderr)
    if not entries:
        raise PartialLoraError(f"{given.results_dir}: expected runs of experiment=tune")
    save(given.out, entries)
    for entry in entries:
        worth = {rate: "not finite" if value is None else f"{value:.4f}" for rate, value in entry["tried"].items()}
        tried = "  ".join(f"{rate}: {value}" for rate, value in worth.items())
        at_edge = "   at the edge: search further" if entry["at_edge"] else ""
        print(f"{named(key_in(entry))}: {entry['learning_rate']:g}   [{tried}]{at_edge}")
    print(f"wrote {given.out}")
    return 1 if any(entry["at_edge"] for entry in entries) else 0


if __name__ == "__main__":
    sys.exit(main())
