"""The settings of calibration and importance: every key, its default and its range."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from partial_lora.errors import one_of, positive, require, typed
from partial_lora.files import at_home, flatten
from partial_lora.tasks.metrics import OF_ALL_TOGETHER

UNIFORM = "uniform"  # in place of a sparsity: one for all modules and axes, such that calibration.budget is spent


_SCORES = ("auto", "accuracy", *sorted(OF_ALL_TOGETHER), "loss", "options", "options_per_token")


@dataclass
class ImportanceConfig:
    """Measure of importance, and its keys: each names the measures that read it."""

    name: str = "svd"  # a file of conf/importance
    k: Optional[int] = None  # svd: number of leading singular vectors; null: as many as hold importance.energy
    energy: float = 0.9  # svd: share of the squared spectrum that these vectors hold
    rounds: int = 3  # imp: number of prunings
    fraction: float = 0.2  # imp: share of the rows and columns left that each round prunes
    steps: int = 10  # imp: optimizer steps before each pruning; adapter: optimizer steps in all
    learning_rate: float = 1e-5  # imp, adapter: learning rate of these steps

    def __post_init__(self) -> None:
        typed(self, "importance")
        require(self.k is None or self.k >= 1, "importance.k", self.k, "at least 1, or null")
        require(0 < self.energy <= 1, "importance.energy", self.energy, "a share in (0, 1]")
        require(self.rounds >= 1, "importance.rounds", self.rounds, "at least 1")
        require(0 < self.fraction < 1, "importance.fraction", self.fraction, "a share between 0 and 1")
        require(self.steps >= 0, "importance.steps", self.steps, "0 or more")
        moves = self.name != "adapter" or self.steps > 1  # B is zero at first, and with it the gradient of A
        require(moves, "importance.steps", self.steps, "at least 2, for importance=adapter: A moves from the second on")
        positive("importance.learning_rate", self.learning_rate)


def _as_floats(sparsity: Any) -> Any:
    """Return checked shares as floats: a run's id would tell 0 from 0.0."""
    if isinstance(sparsity, Mapping):
        return {str(name): _as_floats(share) for name, share in sparsity.items()}
    return sparsity if sparsity == UNIFORM else float(sparsity)


@dataclass
class CalibrationConfig:
    """Choice of the sparsity of each module and axis on a handful of examples.

    These defaults are the paper's, as `calibrate` in Python has them. What a command takes where it names none is the
    file of conf/calibration that conf/config.yaml chooses: a search by gradients, on fewer examples.
    """

    threshold: float = 0.9  # share of the frozen model's score that must be left
    # trainable parameters, in place of the threshold: a share of dense LoRA's (at most 1) or a number
    budget: Optional[float] = None
    # in place of both: the bytes that a training step may keep for its backward pass, from which the budget follows
    kept: Optional[float] = None
    shots: int = 16  # scored examples of each class
    share: float = 0.03  # texts: share of the training rows to score, in place of shots; 0: take shots
    # most examples of each of the two draws, for the head and for the score, but one a class at least; null: no limit
    max_samples: Optional[int] = None
    seed: Optional[int] = 0  # draws these examples and the random numbers of importance; null: the run's seed
    # a calibration.json whose sparsities are used in place of a calibration
    file: Optional[str] = None
    levels: float = 0.05  # step between two sparsities to try
    max_sparsity: float = 0.95  # largest sparsity to try
    axes: str = "separate"  # separate: rows and columns have a sparsity each; joint: one sparsity for both
    # independent: other modules stay intact; cumulative: what was chosen before stays zeroed, from the first module
    # on; cumulative_backward: from the last
    scope: str = "independent"
    # scan: level by level to the first failure; bisect: fewer passes, an approximation; gradient: curves predicted
    # by backward passes, a rougher approximation
    search: str = "scan"
    repair: bool = False  # true: relax sparsities until the score with all of them at once is high enough, too
    # ignore: the threshold is a share of the score; majority: a share of the score's part above always guessing the
    # largest class
    chance: str = "ignore"
    # moves all densities towards a common one, with as many parameters: 0, not at all; 0.5, half-way (in logarithms);
    # 1, all the way; 2, as far beyond it
    shrink: float = 0.0
    # the score: auto, the task's first metric (generation and mse: the loss; choices: options; a mixture: accuracy), or
    # another by name
    score: str = "auto"
    reliability: bool = False  # true: also calibrate on two halves of the scored examples, and say how far they agree
    # in place of a calibration: the share to remove, {module or pattern: share or {rows: share, columns: share}},
    # or uniform, one share that spends the budget
    sparsity: Any = None
    memory: int = 2**31  # bytes to keep between passes, which saves time; changes no result

    def __post_init__(self) -> None:
        typed(self, "calibration")
        self.file = at_home(self.file)
        require(0 < self.threshold <= 1, "calibration.threshold", self.threshold, "a share in (0, 1]")
        budget = self.budget
        whole = budget is None or (0 < budget < math.inf and (budget <= 1 or float(budget).is_integer()))
        require(whole, "calibration.budget", budget, "a share in (0, 1] or a whole count of trainable parameters")
        require(self.kept is None or self.kept >= 1, "calibration.kept", self.kept, "at least 1 byte, or null")
        require(self.shots >= 1, "calibration.shots", self.shots, "at least 1 example a class")
        require(0 <= self.share <= 0.5, "calibration.share", self.share, "a share in [0, 0.5]")
        seeded = self.seed is None or self.seed >= 0
        require(seeded, "calibration.seed", self.seed, "0 or more, or null for the run's seed")
        most = self.max_samples
        require(most is None or most >= 1, "calibration.max_samples", most, "at least 1")
        step = "the step between two levels, at least 0.0001 and below 1"
        require(1e-4 <= self.levels < 1, "calibration.levels", self.levels, step)
        require(0 <= self.max_sparsity < 1, "calibration.max_sparsity", self.max_sparsity, "a share in [0, 1)")
        one_of("calibration.search", self.search, "scan", "bisect", "gradient")
        one_of("calibration.axes", self.axes, "separate", "joint")
        one_of("calibration.scope", self.scope, "independent", "cumulative", "cumulative_backward")
        around = "independent, or calibration.search=scan or bisect: gradient predicts from the intact model"
        require(self.search != "gradient" or self.scope == "independent", "calibration.scope", self.scope, around)
        one_of("calibration.chance", self.chance, "ignore", "majority")
        require(0 <= self.shrink <= 2, "calibration.shrink", self.shrink, "a number in [0, 2]")
        one_of("calibration.score", self.score, *_SCORES)
        require(self.memory >= 0, "calibration.memory", self.memory, "0 bytes or more")
        fixed = f"false: calibration.budget={budget} fixes the parameters, and a repair would change their number"
        require(not (self.repair and budget is not None), "calibration.repair", self.repair, fixed)
        used = "false: calibration.file is used as it is, and nothing is drawn"
        require(not (self.reliability and self.file), "calibration.reliability", self.reliability, used)
        if self.sparsity is not None:
            self._check_sparsity()

    def _check_sparsity(self) -> None:
        """Refuse a sparsity out of range, and keys that have no effect beside one."""
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
        for key in ("threshold", "budget", "kept", "file", "repair", "reliability", "shrink"):
            value, usual = getattr(self, key), getattr(type(self), key)
            spent = key in ("budget", "kept") and sparsity == UNIFORM
            expected = f"{json.dumps(usual)}: calibration.sparsity={sparsity} takes its place"
            require(value == usual or spent, f"calibration.{key}", value, expected)
