"""What decides the size of a run before it begins, and the sparsities that settings fix."""

from __future__ import annotations

from dataclasses import dataclass

from partial_lora.budget import Shapes, even_sparsity, masked_units, parameter_count
from partial_lora.calibration.config import UNIFORM, CalibrationConfig
from partial_lora.errors import PartialLoraError
from partial_lora.masks import Sparsity, assign_sparsity, read_sparsity
from partial_lora.methods.config import MethodConfig


@dataclass(frozen=True)
class Sizing:
    """The settings that decide the size of a run's adapter. counted: by its masks (`budget.counted_of`)."""

    method: MethodConfig
    calibration: CalibrationConfig
    counted: str

    @property
    def is_calibrated(self) -> bool:
        """True where a calibration finds the sparsities, or the size.

        A method of one share everywhere meets a budget without one, unless calibration.file or calibration.reliability
        is set.
        """
        calibration, traits = self.calibration, self.method.traits
        met = traits.even and calibration.budget is not None and not (calibration.file or calibration.reliability)
        return traits.size == "calibrated" and calibration.sparsity is None and not met

    @property
    def point(self) -> dict[str, object]:
        """The key that decides the size of a run that is not calibrated; none where that is its rank or options."""
        calibration, traits = self.calibration, self.method.traits
        key = "sparsity" if calibration.budget is None else "budget"
        known = traits.is_sparse or (traits.size == "rank" and key == "budget")
        return {key: getattr(calibration, key)} if known and getattr(calibration, key) is not None else {}

    def sparsity(self, shapes: Shapes) -> Sparsity | None:
        """Return the sparsities that are known without a calibration; None where one finds them, or there are none.

        A method that spends a budget by a rule of its own gets one share everywhere that costs as much, 0 where it has
        no budget. Raises PartialLoraError for `calibration.sparsity` of other modules than are adapted.
        """
        calibration = self.calibration
        if self.is_calibrated or not self.method.traits.is_sparse:
            return None
        if calibration.sparsity in (None, UNIFORM) and calibration.budget is not None:
            return self.evenly(shapes, calibration.budget)
        try:
            return assign_sparsity(read_sparsity(calibration.sparsity or 0.0), list(shapes))
        except PartialLoraError as error:
            raise PartialLoraError(f"calibration.{error}") from error

    def evenly(self, shapes: Shapes, budget: float) -> Sparsity:
        """Return one share everywhere that spends a budget, a share of dense LoRA's parameters or a number of them."""
        masks = shapes, self.method.nominal_rank, self.counted
        return even_sparsity(*masked_units(*masks), parameter_count(budget, *masks))

    def parameters(self, shapes: Shapes) -> int | None:
        """Return how many LoRA or a tuner of PEFT is to train; None where its rank or options decide that."""
        budget = self.calibration.budget
        if self.method.traits.size != "rank" or budget is None:
            return None
        return parameter_count(budget, shapes, self.method.nominal_rank, "element")
