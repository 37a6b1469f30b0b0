"""The setting of a method, and what a method may add to training."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pkgutil import resolve_name

from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from partial_lora.adapter.config import only
from partial_lora.budget import Shapes, kept_parameters, masked_units
from partial_lora.calibration.importance import ModuleScores
from partial_lora.errors import PartialLoraError, one_line
from partial_lora.masks import AXES, GRANULARITIES, MASKED, Mask, Sparsity, kept_count
from partial_lora.methods import called
from partial_lora.methods.config import AUTO, MaskConfig, MethodConfig


@contextmanager
def heard() -> Iterator[list[str]]:
    """Give a list that gets what an adapter that is made in the block warns of, a line each."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield said
    lines = [one_line(warning.message) for warning in caught if warning.category is UserWarning]
    said.extend(dict.fromkeys(lines))


@dataclass(frozen=True)
class Setting:
    """Everything that a method may use.

    `sparsity` is calibration's choice, or a fixed one in its place, {module: {"rows": s, "columns": s}}. `scores` is
    the importance by which it was chosen, {module: (rows, columns)}. Both are None for a method that does not use them.
    `shapes` are those of W (out, in) of every module to adapt, before quantisation, of fused experts one by one;
    `experts` are the parameters that hold them. `new_modules` have no pre-trained weights and train whole, as the head
    does. `size` is the number of parameters that LoRA or a tuner of PEFT should train, None where its rank or options
    decide.
    """

    method: MethodConfig
    mask: MaskConfig
    mask_seed: int
    target_modules: Sequence[str]
    head: str | None
    new_modules: Sequence[str] = ()
    shapes: Shapes = field(default_factory=dict)
    sparsity: Sparsity | None = None
    scores: ModuleScores | None = None
    size: int | None = None
    experts: Sequence[str] = ()

    @property
    def rank(self) -> int:
        """The rank that sizes are counted by."""
        return self.method.nominal_rank

    @property
    def kind(self) -> str | None:
        """The type of PEFT's tuner."""
        return self.method.peft_type

    @property
    def options(self) -> Mapping:
        """The options of that tuner's configuration."""
        return self.method.peft or {}

    def whole(self) -> list[str]:
        """Return the names of the modules that train whole beside the adapter."""
        return [*([] if self.head is None else [self.head]), *self.new_modules]

    def lora(self) -> dict:
        """Return the arguments that every low-rank adapter here shares."""

        def of_experts(target: str) -> bool:
            return any(name == target or name.endswith(f".{target}") for name in self.experts)

        return {
            "r": self.rank,
            "lora_alpha": self.method.alpha,
            "lora_dropout": self.method.dropout,
            "target_modules": [target for target in self.target_modules if not of_experts(target)],
            "target_parameters": list(self.experts) or None,
            "modules_to_save": self.whole() or None,
        }

    def masked(self) -> dict:
        """Return the arguments that every masked adapter shares."""
        names = ("granularity", "count", "rows", "columns", "fan_in", "row_exponent", "column_exponent")
        return self.lora() | {"mask_seed": self.mask_seed} | {name: getattr(self.mask, name) for name in names}

    def chosen(self, masks: Mapping[str, Mapping[str, Mask]]) -> dict:
        """Return the arguments of an adapter with these masks, by module and axis, where their factor trains."""
        frozen = [axis for axis in AXES if getattr(self.mask, axis) != MASKED]
        masks = {
            name: {**axes, **{axis: Mask.full(axes[axis].size) for axis in frozen}} for name, axes in masks.items()
        }
        indices = {module: {axis: mask.kept for axis, mask in axes.items()} for module, axes in masks.items()}
        return self.masked() | {"count": "exact", "selection": "top", "indices": indices}

    def randomly_masked(self, sparsity: Sparsity) -> dict:
        """Return the arguments of an adapter with random masks of these sparsities.

        Where modules have ranks of their own (method.rank=auto), each has the scaling alpha / rank of its own, as in
        LoRA: a step then moves the outputs as far as at any other rank.
        """
        if self.method.rank != AUTO:
            return self.masked() | {"sparsity": dict(sparsity)}
        wide = {name: widest(self.shapes[name], self.rank, axes) for name, axes in sparsity.items()}
        ranks = {only(name): rank for name, (rank, _) in wide.items() if rank != self.rank}
        return self.masked() | {"sparsity": {name: axes for name, (_, axes) in wide.items()}, "rank_pattern": ranks}

    def at_ranks(self, ranks: Mapping[str, int]) -> dict:
        """Return the arguments by which modules have these ranks, 0 for no adapter; alpha / rank stays the same."""
        if self.experts:
            raise PartialLoraError(
                f"model.target_modules: {self.experts[0]} has fused experts, all of one rank: expected other modules"
                f" for method={self.method.name}"
            )
        adapted = {module: rank for module, rank in ranks.items() if rank}
        scaling, usual = self.method.alpha / self.rank, Counter(adapted.values()).most_common(1)[0][0]
        unusual = {only(module): rank for module, rank in adapted.items() if rank != usual}
        return {
            "r": usual,
            "lora_alpha": scaling * usual,
            "target_modules": list(adapted),
            "rank_pattern": unusual,
            "alpha_pattern": {pattern: scaling * rank for pattern, rank in unusual.items()},
        }

    def units(self) -> tuple[Shapes, int]:
        """Return what masks count, {module: (units of B, units of A)}, and the parameters of a unit."""
        return masked_units(self.shapes, self.rank, self.mask.counted)

    def masks(self) -> dict[str, dict[str, Mask]]:
        """Draw the masks of `partial`, by module and axis: of rows and columns, or of the entries of B and of A."""
        sizes, _ = self.units()
        draw = GRANULARITIES[self.mask.granularity].drawn(self.mask.count)
        return {
            module: {
                axis: draw(size, shares[axis], mask_seed=self.mask_seed, module=module, axis=axis)
                for axis, size in zip(AXES, sizes[module], strict=True)
                if size  # a factor that does not train has no mask
            }
            for module, shares in self.sparsity.items()
        }

    def counts(self) -> dict[str, int]:
        """Count the trainable parameters of `partial` in every module; Bernoulli masks are drawn to be counted."""
        sizes, parameters = self.units()
        if self.mask.count == "bernoulli":  # of single entries
            return {module: sum(len(mask.kept) for mask in axes.values()) for module, axes in self.masks().items()}
        return {
            module: kept_parameters({module: sizes[module]}, parameters, {module: shares})
            for module, shares in self.sparsity.items()
        }

    def budget(self) -> int:
        """Count the trainable parameters of `partial`, without the head: its controls have as many.

        A control that draws Bernoulli masks of its own has as many in expectation.
        """
        return sum(self.counts().values())


def widest(shape: tuple[int, int], rank: int, sparsity: Mapping[str, float]) -> tuple[int, dict[str, float]]:
    """Return the lowest rank at which a module of W (out, in) trains as many parameters, and its sparsities there.

    It then keeps as many rows and columns as it can, so that it reaches most of W at its size. Their ratio stays the
    same as long as neither runs out. Fewer parameters than the rank stay unused.
    """
    m, n = shape
    kept = [kept_count(size, sparsity[axis]) for axis, size in zip(AXES, shape, strict=True)]
    parameters = rank * sum(kept)
    lowest = -(-parameters // (m + n))
    both = parameters // lowest  # rows and columns together
    rows = min(m, both - 1, max(1, both - n, round(both * kept[0] / sum(kept))))
    return lowest, {"rows": 1 - rows / m, "columns": 1 - min(n, both - rows) / n}


@dataclass(frozen=True)
class Training:
    """Additions of a method to training.

    callbacks: of Trainer. penalty: added to the loss of every optimizer step. final_after: from a training's number of
    steps to the step after which the adapter has its final size; no earlier checkpoint may be chosen as the best.
    summary: entries for `parameters` in result.json, once the method has trained.
    """

    callbacks: Sequence[TrainerCallback] = ()
    penalty: Callable[[], Tensor] | None = None
    final_after: Callable[[int], int] = lambda steps: 0
    summary: Callable[[], dict] = dict

    def loss(self, loss: Callable[..., Tensor], parts: int = 1) -> Callable[..., Tensor]:
        """Return the loss with the penalty added while gradients are computed, shared by the `parts` of a step."""
        penalty = self.penalty
        if penalty is None:
            return loss

        def penalised(*args, **kwargs) -> Tensor:
            value = loss(*args, **kwargs)
            return value + penalty() / parts if value.requires_grad else value

        return penalised


def training(name: str, adapted: PeftModel, *, sharded: bool = False) -> Training:
    """Return what the method adds to AdamW on the task's loss, for the model that it has adapted.

    Raises PartialLoraError where that needs whole parameters and they are sharded.
    """
    function = called(name).training
    if function is None:
        return Training()
    if sharded:
        raise PartialLoraError(f"trainer.strategy=fsdp: method={name} needs whole parameters in training; use ddp")
    return resolve_name(f"{__package__}.{function}")(adapted)
