"""What a method is given, what it is, and what it may add to training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from partial_lora.calibration.budget import Shapes, kept_parameters, masked_units, parameter_count, uniform_sparsity
from partial_lora.calibration.result import Calibration
from partial_lora.masks import AXES, Mask, Sparsity

Scores = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Setting:
    """What a method may use.

    `sparsity` is what calibration chose, {module: {"rows": s, "columns": s}}, and `scores` the importance it chose by,
    {module: (rows, columns)}; both are None for a method that is not calibrated. `shapes` are those of W (out, in) of
    every module to adapt, as it is before it is quantised. `new_modules` have no pre-trained weights and train whole,
    as the head does.
    """

    target_modules: Sequence[str]
    head: str | None
    rank: int
    alpha: float
    dropout: float
    mask_seed: int
    granularity: str = "rows_columns"
    count: str = "exact"
    sparsity: Sparsity | None = None
    scores: Scores | None = None
    new_modules: Sequence[str] = ()
    shapes: Shapes = field(default_factory=dict)
    projections: int = 256

    def whole(self) -> list[str]:
        """The names of what trains whole beside the adapter."""
        return [*([] if self.head is None else [self.head]), *self.new_modules]

    def lora(self) -> dict:
        """The arguments that every low-rank adapter here shares."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.target_modules),
            "modules_to_save": self.whole() or None,
        }

    def masked(self) -> dict:
        """The arguments that every adapter with random masks shares."""
        return self.lora() | {"granularity": self.granularity, "count": self.count, "mask_seed": self.mask_seed}

    def units(self) -> tuple[Shapes, int]:
        """What masks count: {module: (units of B, units of A)}, and the parameters of a unit."""
        return masked_units(self.shapes, self.rank, self.granularity)

    def masks(self) -> dict[str, dict[str, Mask]]:
        """The random masks of `partial`, by module and axis: of rows and columns, or of the entries of B and of A."""
        sizes, _ = self.units()
        draw = Mask.bernoulli if self.count == "bernoulli" else Mask.random
        return {
            module: {
                axis: draw(size, shares[axis], mask_seed=self.mask_seed, module=module, axis=axis)
                for axis, size in zip(AXES, sizes[module], strict=True)
            }
            for module, shares in self.sparsity.items()
        }

    def counts(self) -> dict[str, int]:
        """The trainable parameters of `partial` in every module; how many entries Bernoulli keeps, its draw decides."""
        sizes, parameters = self.units()
        if self.count == "bernoulli":
            kept = {module: sum(len(mask.kept) for mask in axes.values()) for module, axes in self.masks().items()}
            return {module: parameters * count for module, count in kept.items()}
        return {
            module: kept_parameters({module: sizes[module]}, parameters, {module: shares})
            for module, shares in self.sparsity.items()
        }

    def budget(self) -> int:
        """The trainable parameters of `partial`, which its controls are to have, too; the head is not counted.

        A control that draws Bernoulli masks of its own has them in expectation.
        """
        return sum(self.counts().values())


Method = Callable[[nn.Module, Setting], PeftModel]


def calibrated(method: Method) -> Method:
    """Marks a method whose sparsities, or whose number of parameters, come from calibration."""
    method.calibrated = True
    return method


def is_calibrated(method: Method) -> bool:
    """True where the method uses what calibration finds."""
    return getattr(method, "calibrated", False)


@dataclass(frozen=True)
class Training:
    """What a method adds to training.

    callbacks: of Trainer. penalty: what is added to the loss of every optimizer step. final_after: how many steps, of a
    training of so many, it takes until the adapter has the size it ends with; no earlier checkpoint may be chosen as
    the best. said: what the method has to say once it has trained, for result.json.
    """

    callbacks: Sequence[TrainerCallback] = ()
    penalty: Callable[[], Tensor] | None = None
    final_after: Callable[[int], int] = lambda steps: 0
    said: Callable[[], dict] = dict

    def loss(self, loss: Callable[..., Tensor], parts: int = 1) -> Callable[..., Tensor]:
        """A loss with the penalty in it, while gradients are wanted; `parts` share an optimizer step, and it."""
        penalty = self.penalty
        if penalty is None:
            return loss

        def penalised(*given, **more) -> Tensor:
            found = loss(*given, **more)
            return found + penalty() / parts if found.requires_grad else found

        return penalised


# --- How sparse an adapter will be, as far as that is known before it is made.

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
