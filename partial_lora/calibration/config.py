"""The settings of calibration and importance: every key, its default and its range."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Optional

from partial_lora.errors import require, typed
from partial_lora.files import at_home, flatten
from partial_lora.ranges import check
from partial_lora.tasks.metrics import OF_ALL_TOGETHER

UNIFORM = "uniform"  # in place of a sparsity: one for all modules and axes, such that calibration.budget is spent


_SCORES = ("auto", "accuracy", *sorted(OF_ALL_TOGETHER), "loss", "options", "options_per_token")


@dataclass
class ImportanceConfig:
    """Measure of importance, and its keys: each names the measures that read it."""

    name: str = "svd"  # a file of conf/importance
    # svd: number of leading singular vectors; null: as many as hold importance.energy
    k: Annotated[Optional[int], "[1, inf)"] = None
    energy: Annotated[float, "(0, 1]"] = 0.9  # svd: share of the squared spectrum that these vectors hold
    rounds: Annotated[int, "[1, inf)"] = 3  # imp: number of prunings
    fraction: Annotated[float, "(0, 1)"] = 0.2  # imp: share of the rows and columns left that each round prunes
    # imp: optimizer steps before each pruning; adapter: optimizer steps in all
    steps: Annotated[int, "[0, inf)"] = 10
    learning_rate: Annotated[float, "(0, inf)"] = 1e-5  # imp, adapter: learning rate of these steps

    def __post_init__(self) -> None:
        typed(self, "importance")
        check(self, "importance")
        moves = self.name != "adapter" or self.steps > 1  # B is zero at first, and with it the gradient of A
        require(moves, "importance.steps", self.steps, "at least 2, for importance=adapter: A moves from the second on")


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

    threshold: Annotated[float, "(0, 1]"] = 0.9  # share of the frozen model's score that must be left
    # trainable parameters, in place of the threshold: a share of dense LoRA's (at most 1) or a number
    budget: Annotated[Optional[float], "(0, inf)"] = None
    # in place of both: the bytes that a training step may keep for its backward pass, from which the budget follows
    kept: Annotated[Optional[float], "[1, inf)"] = None
    shots: Annotated[int, "[1, inf)"] = 16  # scored examples of each class
    # texts: share of the training rows to score, in place of shots; 0: take shots
    share: Annotated[float, "[0, 0.5]"] = 0.03
    # most examples of each of the two draws, for the head and for the score, but one a class at least; null: no limit
    max_samples: Annotated[Optional[int], "[1, inf)"] = None
    # draws these examples and the random numbers of importance; null: the run's seed
    seed: Annotated[Optional[int], "[0, inf)"] = 0
    # a calibration.json whose sparsities are used in place of a calibration
    file: Optional[str] = None
    levels: Annotated[float, "[0.0001, 1)"] = 0.05  # step between two sparsities to try
    max_sparsity: Annotated[float, "[0, 1)"] = 0.95  # largest sparsity to try
    # separate: rows and columns have a sparsity each; joint: one sparsity for both
    axes: Annotated[str, ("separate", "joint")] = "separate"
    # independent: other modules stay intact; cumulative: what was chosen before stays zeroed, from the first module
    # on; cumulative_backward: from the last
    scope: Annotated[str, ("independent", "cumulative", "cumulative_backward")] = "independent"
    # scan: level by level to the first failure; bisect: fewer passes, an approximation; gradient: curves predicted
    # by backward passes, a rougher approximation
    search: Annotated[str, ("scan", "bisect", "gradient")] = "scan"
    repair: bool = False  # true: relax sparsities until the score with all of them at once is high enough, too
    # ignore: the threshold is a share of the score; majority: a share of the score's part above always guessing the
    # largest class
    chance: Annotated[str, ("ignore", "majority")] = "ignore"
    # moves all densities towards a common one, with as many parameters: 0, not at all; 0.5, half-way (in logarithms);
    # 1, all the way; 2, as far beyond it
    shrink: Annotated[float, "[0, 2]"] = 0.0
    # the score: auto, the task's first metric (generation and mse: the loss; choices: options; a mixture: accuracy), or
    # another by name
    score: Annotated[str, _SCORES] = "auto"
    reliability: bool = False  # true: also calibrate on two halves of the scored examples, and say how far they agree
    # in place of a calibration: the share to remove, {module or pattern: share or {rows: share, columns: share}},
    # or uniform, one share that spends the budget
    sparsity: Annotated[Any, float | dict | None, "[0, 1)", (UNIFORM,)] = None
    memory: Annotated[int, "[0, inf)"] = 2**31  # bytes to keep between passes, which saves time; changes no result

    def __post_init__(self) -> None:
        typed(self, "calibration")
        self.file = at_home(self.file)
        check(self, "calibration")
        budget = self.budget
        whole = budget is None or budget <= 1 or float(budget).is_integer()
        require(whole, "calibration.budget", budget, "a share in (0, 1] or a whole count of trainable parameters")
        around = "independent, or calibration.search=scan or bisect: gradient predicts from the intact model"
        require(self.search != "gradient" or self.scope == "independent", "calibration.scope", self.scope, around)
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
