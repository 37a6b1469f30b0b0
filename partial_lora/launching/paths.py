"""The paths of runs. A recorded run is found by what it was set to, whatever its id was then."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import yaml

from partial_lora.errors import PartialLoraError
from partial_lora.files import grouped
from partial_lora.launching import packs
from partial_lora.launching.directory import CONFIG, RESULT, stored_settings
from partial_lora.settings.identity import computed, digests, short_digest
from partial_lora.settings.schema import Config
from partial_lora.settings.versions import load, plain


def run_directory(config: Config) -> Path:
    """Return a run's directory, results_dir/runs/task/model/method-id/seed.

    Where runs with these settings are recorded, in folders or in a pack, it is among them, whatever id they have: first
    where this seed is, else beside other seeds.
    """
    results_dir, settings = Path(config.results_dir), plain(config)
    contents = digests(settings)
    identifier, seed = short_digest(computed(settings, contents)), f"seed{config.seed}"
    parent = results_dir.joinpath("runs", config.task.name, config.model.name)
    place = parent / f"{config.method.name}-{identifier}" / seed
    if place.is_dir():
        return place
    recorded = list(_alike(config, contents))
    there = [run for runs in recorded for run in runs if run.name == seed]
    there += [runs[0].with_name(seed) for runs in recorded]
    return there[0] if there else place


_RATE = "trainer.learning_rate"


def at_other_rates(config: Config) -> list[Path]:
    """Return the directories of recorded runs that differ from a config in nothing but their learning rate."""
    recorded = _alike(config, digests(plain(config)), apart=(_RATE, "method.rate_factor", "method.rate_power"))
    return [run for runs in recorded for run in runs if run.name == f"seed{config.seed}"]


def _alike(config: Config, contents: Mapping[str, str], apart: Collection[str] = ()) -> Iterator[list[Path]]:
    """Yield the directories of recorded runs, a list a folder, that were set to what a config says, seeds apart.

    contents: the digests of its files. apart: further keys in which they may differ.
    """
    results_dir, settings = Path(config.results_dir), plain(config)
    parent = results_dir.joinpath("runs", config.task.name, config.model.name)
    chosen = {False: computed(settings, {}), True: computed(settings, contents)}  # by names, and by content
    for runs in _folders(results_dir, parent, config.method.name):
        stored, has_digests = _computed_from(runs[0], _stamp(runs[0], results_dir)) or ({}, False)
        differing = {
            key for key in stored.keys() | chosen[has_digests].keys() if stored.get(key) != chosen[has_digests].get(key)
        }
        if stored and differing <= {*apart}:
            yield runs


def _folders(results_dir: Path, parent: Path, method: str) -> list[list[Path]]:
    """Return the directories of a method's recorded runs by folder; those of packed runs come last."""
    pack, start = packs.pack_of(results_dir), f"{(parent / method).relative_to(results_dir).as_posix()}-"
    loose = (place for place in sorted(parent.glob(f"{method}-*/seed*")) if place.is_dir())
    packed = (results_dir / path for path in (pack.paths if pack else ()) if path.startswith(start))
    places = (place for place in [*loose, *packed] if place.parent.name.rpartition("-")[0] == method)
    return list(grouped(places, lambda place: place.parent).values())


def _stamp(place: Path, results_dir: Path) -> int:
    """Return when what is recorded of a run was written."""
    for file in (place / RESULT, place / CONFIG, results_dir / packs.RUNS_TABLE):
        with suppress(OSError):
            return file.stat().st_mtime_ns
    return 0


@functools.lru_cache(maxsize=4096)
def _computed_from(place: Path, stamp: int) -> tuple[dict, bool] | None:
    """Return what a recorded run has computed from, and whether its files are in that by content; None for no settings.

    A run that has not ended may have a config.yaml alone, which has no digests of files.
    """
    try:
        record = packs.recorded(place)
        if record is None:
            record = {"config": stored_settings(place)}
        contents = record.get("digests")
        return computed(plain(load(record["config"])), contents or {}), contents is not None
    except (OSError, yaml.YAMLError, PartialLoraError, KeyError, TypeError, AttributeError):
        return None  # or with settings that no run can have any more


def calibration_directory(config: Config) -> Path:
    """Return where `partial-lora calibrate` puts the sparsities of a model and task; each seed of the draws has one."""
    config = replace(config, calibration=replace(config.calibration, seed=config.calibration_seed))
    settings = plain(config)
    identifier = short_digest(computed(settings, digests(settings), unused=True))
    names = config.task.name, config.model.name, f"{config.importance.name}-{identifier}"
    return Path(config.results_dir).joinpath("calibrations", *names)
