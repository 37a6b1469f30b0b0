"""How sparse an adapter will be, as far as that is known before it is made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from partial_lora.calibration.budget import parameter_count, uniform_sparsity
from partial_lora.calibration.calibration import Calibration
from partial_lora.methods.setting import Sparsity

_PAPER_DENSITY = 0.13  # of the trainable parameters, in the paper's abstract


def foreseen_sparsity(
    shapes: Mapping[str, tuple[int, int]], rank: int, calibration: Mapping
) -> tuple[float | Sparsity, str]:
    """The sparsity of a calibrated method, as far as it is known before any calibration, and how it is known.

    Its controls have as many parameters, whatever they do with them.
    """
    if calibration["file"]:
        return Calibration.load(Path(calibration["file"])).sparsity, f"sparsities of {calibration['file']}"
    budget, source = calibration["budget"], f"calibration.budget={calibration['budget']}"
    if budget is None:
        budget = _PAPER_DENSITY
        source = "the sparsity of a threshold is known once it is calibrated; here the paper's 87 % (or set a budget)"
    return uniform_sparsity(shapes, rank, parameter_count(budget, shapes, rank)), source
