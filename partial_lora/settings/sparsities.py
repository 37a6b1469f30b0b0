"""Sparsities that settings fix, and what decides the size of a run before it begins."""

from __future__ import annotations

from partial_lora.budget import Shapes, even_sparsity, masked_units, parameter_count
from partial_lora.calibration.config import UNIFORM
from partial_lora.errors import PartialLoraError
from partial_lora.masks import Sparsity, assign_sparsity, read_sparsity
from partial_lora.settings.schema import Config


def is_calibrated(config: Config) -> bool:
    """Return whether a calibration finds a run's sparsities, or its size.

    A method of one share everywhere meets a budget without one, unless calibration.file or calibration.reliability is
    set.
    """
    calibration, method = config.calibration, config.method.traits
    met = method.even and calibration.budget is not None and not (calibration.file or calibration.reliability)
    return method.size == "calibrated" and calibration.sparsity is None and not met


def fixed_sparsity(config: Config, shapes: Shapes) -> Sparsity | None:
    """Return the sparsities that are known without a calibration; None where one finds them, or there are none.

    A method that spends a budget by a rule of its own gets one share everywhere that costs as much, 0 where it has no
    budget. Raises PartialLoraError for `calibration.sparsity` of other modules than are adapted.
    """
    calibration = config.calibration
    if is_calibrated(config) or not config.method.traits.is_sparse:
        return None
    if calibration.sparsity in (None, UNIFORM) and calibration.budget is not None:
        return spent_evenly(config, shapes, calibration.budget)
    try:
        return assign_sparsity(read_sparsity(calibration.sparsity or 0.0), list(shapes))
    except PartialLoraError as error:
        raise PartialLoraError(f"calibration.{error}") from error


def spent_evenly(config: Config, shapes: Shapes, budget: float) -> Sparsity:
    """Return one share everywhere that spends a budget, a share of dense LoRA's parameters or a number of them."""
    masks = shapes, config.method.nominal_rank, config.mask.counted
    return even_sparsity(*masked_units(*masks), parameter_count(budget, *masks))


def size_of(config: Config, shapes: Shapes) -> int | None:
    """Return the parameters that LoRA or a tuner of PEFT is to train; None where its rank or options decide that."""
    budget = config.calibration.budget
    if config.method.traits.size != "rank" or budget is None:
        return None
    return parameter_count(budget, shapes, config.method.nominal_rank, "element")


def fixed_point(config: Config) -> dict[str, object]:
    """Return what decides the size of a run that is not calibrated; nothing where that is its rank or options."""
    calibration, traits = config.calibration, config.method.traits
    key = "sparsity" if calibration.budget is None else "budget"
    known = traits.is_sparse or (traits.size == "rank" and key == "budget")
    return {key: getattr(calibration, key)} if known and getattr(calibration, key) is not None else {}
