"""A run that ended well: its directory, its settings and its record. It needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from partial_lora.errors import PartialLoraError, one_line
from partial_lora.files import mapped, read_json
from partial_lora.launching import directory as results
from partial_lora.launching import run_record
from partial_lora.settings.compatibility import check_modality
from partial_lora.settings.identity import digests
from partial_lora.settings.schema import Config
from partial_lora.settings.versions import load, plain


@dataclass(frozen=True)
class FinishedRun:
    """A run that ended well: its directory, its settings and its record."""

    directory: Path
    config: Config
    result: run_record.Record

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter."""
        return self.directory / results.ADAPTER

    @property
    def method(self) -> str:
        return self.config.method.name

    @property
    def is_masked(self) -> bool:
        """True where its adapter has masks."""
        return (self.adapter / "partial_lora.json").is_file()

    def check_causal(self, asked: object, instead: str = "") -> None:
        """Raise PartialLoraError, naming what was asked of it, unless the run is of a causal language model."""
        if (model := self.config.model).family != "causal":
            raise PartialLoraError(f"{asked}: model={model.name} is no causal language model, expected one{instead}")

    def changed(self, group: str) -> str | None:
        """Return the first key of a group of settings whose file or folder has changed since the run, or None.

        A folder that is gone has changed. Raises FileNotFoundError for a file that is not there.
        """
        recorded = self.result.get("digests") or {}
        before = {key: digest for key, digest in recorded.items() if key.startswith(f"{group}.")}
        now = digests({group: plain(self.config)[group]}) if before else {}
        return next((key for key in before if now.get(key) != before[key]), None)

    def labels(self) -> list[str]:
        """Return the names of the classes, in the order of the logits; empty for a regression."""
        return list(self.result["labels"])


def finished_run(directory: Path) -> FinishedRun:
    """Return the finished run that its directory, `latest` or the start of its id names (`directory.find`).

    Raises PartialLoraError, in one line, for a directory that holds no run, a run that failed, was interrupted or has
    only calibrated, and one that has lost files.
    """
    directory = results.find(directory)
    if not directory.is_dir():
        raise PartialLoraError(
            f"{directory}: no such directory, expected that of a run (results/runs/…/seed0), latest, or the start of "
            "its id; `partial-lora runs` lists them"
        )
    result = _record_of(directory)
    missing = results.missing(directory, result)
    if missing:
        raise PartialLoraError(
            f"{directory}: {missing}; restore it, or do the run again: the same `partial-lora train`, overwrite=true"
        )
    try:
        config = _with_found_files(load(result["config"]), directory, result)
        check_modality(config.model, config.task)
        _check_labels(directory, result["labels"])
        return FinishedRun(directory, at_commits(config, result.get("commits") or {}), result)
    except (TypeError, ValueError, KeyError, AttributeError, PartialLoraError) as error:
        raise PartialLoraError(f"{directory / results.RESULT}: foreign, {one_line(error)}") from error


def _check_labels(directory: Path, labels: list[str]) -> None:
    """Raise ValueError where a record has other labels than its adapter's config.json, or one of them twice."""
    described = directory / results.ADAPTER / "config.json"
    model = read_json(described) if labels and described.is_file() else {}
    by_place = model.get("id2label") or {}
    named = model.get("label_names") or [by_place[str(place)] for place in range(len(by_place))]  # of timm, or not
    if named and named != labels:
        raise ValueError(f"its labels are {labels!r:.60}, and {described} has others")


def _record_of(directory: Path) -> run_record.Record:
    """Return the record of the finished run in a directory; raises PartialLoraError that says what is there else."""
    record = directory / results.RESULT
    try:
        result = results.finished(read_json(record))
        if found := run_record.fault(result, run_record.RECORD | {"labels": [str]}):
            raise ValueError(f"foreign, {found}")
        return result
    except OSError as error:
        raise PartialLoraError(
            f"{directory}: {results.RESULT}: {error.strerror}; expected the directory of a run, with its record in it"
        ) from error
    except json.JSONDecodeError as error:
        raise PartialLoraError(f"{record}: broken, not JSON; expected the record of a run") from error
    except ValueError as error:
        hint = "; expected a finished run" if isinstance(error, results.UnfinishedError) else ""
        raise PartialLoraError(f"{record}: {error}{hint}") from error


def at_commits(config: Config, commits: Mapping[str, str]) -> Config:
    """Return settings whose models of the hub are those that the run was trained over, whatever came later."""
    places = {key.partition(".")[2]: commit for key, commit in commits.items()}
    model = config.model
    at = {name: f"{getattr(model, name).partition('@')[0]}@{commit}" for name, commit in places.items()}
    return replace(config, model=replace(model, **at))


def _with_found_files(config: Config, run: Path, record: Mapping) -> Config:
    """Return settings whose files and folders are found from any directory: where the record says that they were, else
    from here, else beside the results.
    """
    named, places = record.get("digests") or (), record.get("places") or {}
    depth = len(Path(config.results_dir).parts) + len(Path(results.RUNS).parts)
    parents = run.resolve().parents
    is_movable = not Path(config.results_dir).is_absolute() and len(parents) >= depth
    beside = [parents[depth - 1]] if is_movable else []

    def located(key: str, value: object) -> object:
        if not isinstance(value, str) or key not in named:
            return value
        candidates = [places.get(key, value), value, *(str(folder / value) for folder in beside)]
        return next((place for place in candidates if Path(place).exists()), value)

    return load(mapped(plain(config), located))
