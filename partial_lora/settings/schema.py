"""The settings of a run: every key, its type, its default and its range.

The dataclasses are the schema that Hydra composes into: a key that is not here, a value of another type and a value out
of range are refused by name before anything expensive starts. A default may change, since stored settings are whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Optional

from omegaconf import OmegaConf

from partial_lora.calibration.config import UNIFORM, CalibrationConfig, ImportanceConfig
from partial_lora.errors import one_of, require
from partial_lora.files import at_home, flatten
from partial_lora.masks import AS_PEFT, AXES, GRANULARITIES, MASKED
from partial_lora.methods.config import MaskConfig, MethodConfig
from partial_lora.models.config import ModelConfig
from partial_lora.ranges import check, values_of
from partial_lora.settings.sizing import Sizing
from partial_lora.tasks.config import TaskConfig
from partial_lora.training.config import TrainerConfig


@dataclass
class Config:
    """A run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: Annotated[int, "[0, 2^32)"] = 0  # draws the head, the order of the rows and the masks
    results_dir: str = "results"  # folder of runs, sweeps and reports
    overwrite: bool = False  # true: run a finished run again
    keep_records: bool = False  # true: do not run a finished run again if only its weights are gone
    # folder with NAME/{train,validation,test}.parquet, for tasks without files of their own
    data_dir: Optional[str] = None
    preset: Optional[str] = None  # the file of conf/preset that the settings came from; a label only

    @property
    def calibration_seed(self) -> int:
        """The seed of everything that calibration draws: its own, so that runs share one calibration, or the run's."""
        return self.seed if self.calibration.seed is None else self.calibration.seed

    @property
    def sizing(self) -> Sizing:
        """What decides the size of the adapter."""
        return Sizing(self.method, self.calibration, self.mask.counted)

    @property
    def warnings(self) -> list[str]:
        """Warnings about the settings, a sentence each."""
        method, calibration, budget = self.method, self.calibration, self.calibration.budget
        sentences = self.trainer.warnings
        unused, beside = (), ""
        if not method.traits.is_sparse:
            unused, beside = ("sparsity", "file"), f"on method={method.name}"
        elif calibration.file:
            unused, beside = ("threshold", "budget", "kept", "repair"), "beside calibration.file"
        elif budget is not None:
            unused, beside = ("threshold",), f"beside calibration.budget={budget:g}, which chooses it"
        for key in unused:
            if (value := getattr(calibration, key)) not in (getattr(CalibrationConfig, key), UNIFORM):
                sentences.append(f"calibration.{key}={value} has no effect {beside}")
        if method.traits.size == "rank" and budget is None and calibration.sparsity == UNIFORM:
            sentences.append(f"calibration.sparsity=uniform has no effect on method={method.name}, a budget has")
        if budget is not None and method.traits.size == "own":
            advice = "; method=lora has that size" * method.traits.dense
            sentences.append(f"calibration.budget={budget:g} has no effect on method={method.name}{advice}")
        return sentences

    @property
    def mask_seed(self) -> int:
        """The seed of random masks: their own, or the run's."""
        return self.seed if self.mask.seed is None else self.mask.seed

    def __post_init__(self) -> None:
        self.results_dir, self.data_dir = at_home(self.results_dir), at_home(self.data_dir)
        check(self)
        if self.method.rank == "auto":
            one_of("mask.granularity", self.mask.granularity, "rows_columns")
            for axis in AXES:
                one_of(f"mask.{axis}", getattr(self.mask, axis), MASKED)
        traits = self.method.traits
        draw = GRANULARITIES[self.mask.granularity].draw if traits.masked else AS_PEFT
        left = {key: value for key, value in draw.items() if getattr(self.mask, key) is None}
        self.mask = replace(self.mask, **left)
        for key in ("granularity", *AXES):
            if allowed := getattr(traits, key):
                one_of(f"mask.{key}", getattr(self.mask, key), *allowed)
        if traits.importance:
            one_of("importance.name", self.importance.name, traits.importance)
        if traits.size == "budget":
            self._check_budgeted()
        packs = self.trainer.packing and self.model.family != "causal"
        require(not packs, "trainer.packing", True, "false unless model.family=causal")
        noise = (self.trainer.args or {}).get("neftune_noise_alpha")
        expected = "null for a model of images: the noise is added to the embeddings of tokens"
        fits = noise is None or self.model.modality == "text"
        require(fits, "trainer.args.neftune_noise_alpha", noise, expected)
        self._check_rates()

    def _check_budgeted(self) -> None:
        """Refuse what a method that only spends a budget would ignore."""
        calibration, standard = self.calibration, CalibrationConfig()
        for key in ("threshold", "file", "sparsity", "repair", "reliability"):
            value, usual = getattr(calibration, key), getattr(standard, key)
            expected = f"{json.dumps(usual)}: method={self.method.name} spends calibration.budget and is not calibrated"
            require(value in (usual, UNIFORM), f"calibration.{key}", value, expected)

    def _check_rates(self) -> None:
        """Refuse learning rates of parts that the model or its adapter does not have."""
        name, ratio, head_rate = self.method.name, self.trainer.loraplus_ratio, self.trainer.head_learning_rate
        fits = ratio == 1 or (self.method.traits.product and self.method.peft_type in (None, "LORA"))
        require(fits, "trainer.loraplus_ratio", ratio, f"1 for method={name}, which trains no product B A")
        for axis in AXES:
            fits = ratio == 1 or not self.method.traits.masked or getattr(self.mask, axis) == MASKED
            expected = f"1 for mask.{axis}={getattr(self.mask, axis)}, where one factor trains alone"
            require(fits, "trainer.loraplus_ratio", ratio, expected)
        fits = head_rate is None or self.model.trains_whole
        expected = f"null for model={self.model.name}, which has no head"
        require(fits, "trainer.head_learning_rate", head_rate, expected)


@cache
def defaults() -> Mapping[str, Any]:
    """Return the schema's defaults, each by its full key."""
    return flatten(OmegaConf.to_container(OmegaConf.structured(Config)))


# The groups of a run's settings, and the dataclass of each.
SECTIONS = {
    section.name: section.default_factory for section in fields(Config) if is_dataclass(section.default_factory)
}


@cache
def list_keys() -> frozenset[str]:
    """Return the keys whose values are lists, each by its full key."""
    typed = {
        f"{group}.{name}" for group, kind in SECTIONS.items() for name, key in values_of(kind).items() if key.is_list
    }
    return frozenset(typed | {"task.members"})


GROUPS = ("model", "task", "method", "importance", "calibration", "mask", "trainer", "preset", "experiment")


def conf_dir() -> Path:
    """Return the folder of group files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"
