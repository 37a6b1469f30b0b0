"""What an analysis can be told beyond the keys of a run: what it compares, over how many seeds, sizes and splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from partial_lora import config
from partial_lora.errors import PartialLoraError
from partial_lora.schema import Config

ANALYSES = ("agreement", "reliability", "stability", "cost")
_MEASURES = ("svd", "snip", "imp", "magnitude", "activation")


def _distinct(key: str, values: list, fewest: int, holds: bool, expected: str) -> None:
    if not (holds and len(values) >= fewest and len(set(values)) == len(values)):
        raise PartialLoraError(f"{key}={values}: expected {fewest} or more distinct {expected}")


@dataclass
class AnalysisConfig:
    """What is compared; each analysis reads its own keys."""

    measures: list[str] = field(default_factory=lambda: list(_MEASURES))  # agreement, cost
    calibrated: bool = True  # agreement: also at the sparsities that importance.name is calibrated to
    sparsities: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])  # agreement: one for all modules
    splits: int = 5  # reliability
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # stability: of the draws, and of the wrong labels
    shots: list[int] = field(default_factory=lambda: [4, 8, 16, 32])  # stability
    noise: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.2])  # stability: share of labels that is wrong

    def __post_init__(self) -> None:
        known = sorted(file.stem for file in (config.conf_dir() / "importance").glob("*.yaml"))
        measures = f"measures out of {', '.join(known)}"
        _distinct("analysis.measures", self.measures, 2, set(self.measures) <= set(known), measures)
        shares = all(0 <= sparsity < 1 for sparsity in self.sparsities)
        _distinct("analysis.sparsities", self.sparsities, 0 if self.calibrated else 1, shares, "shares in [0, 1)")
        if self.splits < 1:
            raise PartialLoraError(f"analysis.splits={self.splits}: expected at least 1")
        _distinct("analysis.seeds", self.seeds, 2, all(s >= 0 for s in self.seeds), "whole numbers, 0 or more")
        _distinct("analysis.shots", self.shots, 1, all(s >= 1 for s in self.shots), "numbers of examples a class")
        _distinct("analysis.noise", self.noise, 1, all(0 <= s <= 1 for s in self.noise), "shares in [0, 1]")


@dataclass
class AnalysedConfig(Config):
    """A run's settings and those of an analysis of its calibration."""

    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)


def resolve(composed: DictConfig) -> dict:
    """The plain, checked settings of an analysis: those of a run, and `analysis`.

    Raises PartialLoraError, in one line that names the key, as `config.resolve` does.
    """
    run = OmegaConf.masked_copy(composed, [key for key in composed if key != "analysis"])
    known = OmegaConf.structured(AnalysisConfig)
    unknown = [key for key in composed.analysis if key not in known]
    if unknown:
        raise PartialLoraError(f"analysis.{unknown[0]}: no such key; expected one of {', '.join(known)}")
    checked = OmegaConf.to_object(OmegaConf.merge(known, composed.analysis))  # runs its __post_init__
    return config.resolve(run) | {"analysis": asdict(checked)}


def directory(settings: Mapping, what: str) -> Path:
    """Where an analysis leaves what it found: results_dir/analyses/what/task/model-id.

    The id is over the run's, and over the keys of the analysis that differ from their defaults.
    """
    run = {key: value for key, value in settings.items() if key != "analysis"}
    defaults = asdict(AnalysisConfig())
    changed = {key: value for key, value in settings["analysis"].items() if value != defaults[key]}
    identity = json.dumps([config.run_id(run), changed], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    names = what, settings["task"]["name"], f"{settings['model']['name']}-{digest}"
    return Path(settings["results_dir"]).joinpath("analyses", *names)
