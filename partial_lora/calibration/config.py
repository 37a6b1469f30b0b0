"""The settings of calibration and importance: every key, its default and its range."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from partial_lora.errors import one_of, positive, require
from partial_lora.files import at_home, flatten

PAPER_BUDGET = 0.13  # of dense LoRA's trainable parameters, in the paper's abstract
# Methods that spend calibration.budget (null: PAPER_BUDGET) by a rule of their own and are never calibrated.
BUDGETED = ("entries", "ticket")
# Those whose sparsities, or whose number of parameters, come from calibration.
CALIBRATED = ("partial", "targeted", "flow", "uniform", "shuffled", "inverted", "low_rank", "random_weights")
RANKED = ("targeted", "ticket")  # by the importance of rows and columns, whether or not they are calibrated
UNIFORM = "uniform"  # in place of a sparsity: the same for every module and axis, so that calibration.budget is spent

_SCORES = ("auto", "accuracy", "f1", "matthews", "pearson", "spearman", "loss", "options", "options_per_token")


@dataclass
class ImportanceConfig:
    """Measure of importance, and its keys: each measure takes those that are its own (importance.OPTIONS)."""

    name: str = "svd"  # a file of conf/importance
    k: Optional[int] = None  # svd: number of leading singular vectors; null: as many as hold `energy`
    energy: float = 0.9  # svd: share of the squared spectrum that these hold
    rounds: int = 3  # imp: how often it prunes
    fraction: float = 0.2  # imp: share of the remaining rows and columns that a round prunes
    steps: int = 10  # imp: optimizer steps before each pruning; adapter: steps of its training
    learning_rate: float = 1e-5  # imp, adapter: learning rate of those steps

    def __post_init__(self) -> None:
        require(self.k is None or self.k >= 1, "importance.k", self.k, "at least 1, or null")
        require(0 < self.energy <= 1, "importance.energy", self.energy, "a share in (0, 1]")
        require(self.rounds >= 1, "importance.rounds", self.rounds, "at least 1")
        require(0 < self.fraction < 1, "importance.fraction", self.fraction, "a share between 0 and 1")
        require(self.steps >= 0, "importance.steps", self.steps, "0 or more")
        moves = self.name != "adapter" or self.steps > 1  # B is zero at first, and with it the gradient of A
        require(moves, "importance.steps", self.steps, "at least 2, for importance=adapter: A moves from the second on")
        positive("importance.learning_rate", self.learning_rate)


def _as_floats(sparsity: Any) -> Any:
    """Return checked shares as they are, but 0.0 for 0: an id is of how a value is written."""
    if isinstance(sparsity, Mapping):
        return {str(name): _as_floats(share) for name, share in sparsity.items()}
    return sparsity if sparsity == UNIFORM else float(sparsity)


@dataclass
class CalibrationConfig:
    """Choice of the sparsity of each module and axis on a handful of examples."""

    threshold: float = 0.9  # share of the frozen model's score that has to be left
    budget: Optional[float] = None  # a share (at most 1) or a count of trainable parameters, in place of the threshold
    shots: int = 16  # scored examples of each class
    share: float = 0.03  # share of the training rows to score where these are texts, in place of shots; 0: shots, too
    max_samples: Optional[int] = None  # the most examples of either draw; null: no limit
    seed: Optional[int] = 0  # seeds the few-shot draws and measures that draw; null: the run's seed
    file: Optional[str] = None  # a calibration.json to use as it is, whatever the keys beside it say
    levels: float = 0.05  # step between two levels of sparsity
    max_sparsity: float = 0.95  # the last level
    axes: str = "separate"  # separate: rows and columns have their own sparsity; joint: one level zeroes both
    scope: str = "independent"  # independent: other modules intact; cumulative(_backward): earlier choices stay zeroed
    # scan: upward to the first failure; bisect: fewer passes, an approximation; gradient: predicted by backward passes
    search: str = "scan"
    repair: bool = False  # true: relax sparsities until the score with all of them at once is enough, too
    chance: str = "ignore"  # ignore: the paper's rule; majority: the threshold is of what the score is above guessing
    score: str = "auto"  # what is measured; auto: the task's first metric
    reliability: bool = False  # true: also calibrate on two halves of the scored draw, and say how far they agree
    # in place of a calibration: a share, {module or pattern: a share or {rows: a share, columns: a share}}, or uniform
    sparsity: Any = None
    memory: int = 2**31  # bytes of activations that may be kept for reuse; changes no result

    def __post_init__(self) -> None:
        self.file = at_home(self.file)
        require(0 < self.threshold <= 1, "calibration.threshold", self.threshold, "a share in (0, 1]")
        budget = self.budget
        whole = budget is None or (0 < budget < math.inf and (budget <= 1 or float(budget).is_integer()))
        require(whole, "calibration.budget", budget, "a share in (0, 1] or a whole count of trainable parameters")
        require(self.shots >= 1, "calibration.shots", self.shots, "at least 1 example a class")
        require(0 <= self.share <= 0.5, "calibration.share", self.share, "a share in [0, 0.5]")
        seeded = self.seed is None or self.seed >= 0
        require(seeded, "calibration.seed", self.seed, "0 or more, or null for the run's seed")
        most = self.max_samples
        require(most is None or most >= 1, "calibration.max_samples", most, "at least 1")
        require(0 < self.levels < 1, "calibration.levels", self.levels, "the step between two levels, in (0, 1)")
        require(0 <= self.max_sparsity < 1, "calibration.max_sparsity", self.max_sparsity, "a share in [0, 1)")
        one_of("calibration.search", self.search, "scan", "bisect", "gradient")
        one_of("calibration.axes", self.axes, "separate", "joint")
        one_of("calibration.scope", self.scope, "independent", "cumulative", "cumulative_backward")
        around = "independent: calibration.search=gradient predicts around the intact model"
        require(self.search != "gradient" or self.scope == "independent", "calibration.scope", self.scope, around)
        one_of("calibration.chance", self.chance, "ignore", "majority")
        one_of("calibration.score", self.score, *_SCORES)
        require(self.memory >= 0, "calibration.memory", self.memory, "0 bytes or more")
        fixed = f"false: calibration.budget={budget} has fixed the parameters that a repair would give back"
        require(not (self.repair and budget is not None), "calibration.repair", self.repair, fixed)
        used = "false: a calibration.file is used as it is, and its draws are not at hand"
        require(not (self.reliability and self.file), "calibration.reliability", self.reliability, used)
        if self.sparsity is not None:
            self._check_sparsity()

    def _check_sparsity(self) -> None:
        """Refuse a sparsity that is none, and keys that would decide nothing beside it."""
        sparsity, name = self.sparsity, "calibration.sparsity"
        if isinstance(sparsity, Mapping):
            require(len(sparsity) > 0, name, dict(sparsity), "a share, {module or pattern: share}, or uniform")
            for module, axes in sparsity.items():
                whole = not isinstance(axes, Mapping) or axes.keys() == {"rows", "columns"}
                require(whole, f"{name}.{module}", axes, "a share, or {rows: share, columns: share}")
        for key, share in flatten({name: sparsity}).items() if sparsity != UNIFORM else ():
            number = isinstance(share, (int, float)) and not isinstance(share, bool)
            expected = "the share removed, in [0, 1)" + (", or uniform" if key == name else "")
            require(number and 0 <= share < 1, key, share, expected)
        self.sparsity = _as_floats(sparsity)
        for key in ("threshold", "budget", "file", "repair", "reliability"):
            value, usual = getattr(self, key), getattr(type(self), key)
            spent = key == "budget" and sparsity == UNIFORM
            expected = f"{json.dumps(usual)}: calibration.sparsity={sparsity} is in its place"
            require(value == usual or spent, f"calibration.{key}", value, expected)
