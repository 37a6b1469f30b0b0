"""PEFT's LoRA, at a rank or a budget, and AdaLoRA with what it adds to training."""

from __future__ import annotations

import warnings
from itertools import product

import numpy as np
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from partial_lora.budget import FARTHEST, TOLERANCE, Shapes
from partial_lora.errors import PartialLoraError
from partial_lora.masks import random_keys
from partial_lora.methods.setting import Setting, Training


def lora(model: nn.Module, setting: Setting) -> PeftModel:
    """LoRA (Hu et al. 2021, arXiv 2106.09685) of `method.rank`, or of the ranks that come nearest to a budget.

    At a budget ranks of two modules differ by at most a few, and alpha / rank is that of the settings. Where rank 1 on
    every module would be too much, `mask_seed` draws the modules that have it.
    """
    ranks = {}
    if setting.size is not None:
        ranks = setting.at_ranks(ranks_within(setting.size, setting.shapes, setting.mask_seed))
    return get_peft_model(model, LoraConfig(**setting.lora() | ranks))


def dense(model: nn.Module, setting: Setting) -> PeftModel:
    """Dense LoRA of `method.rank`, the reference: budgets are shares of its parameters."""
    return get_peft_model(model, LoraConfig(**setting.lora()))


_MOVES = (0, 1, -1, 2, -2)  # how far the rank units of a size may be from their proportional share


def ranks_within(budget: int, shapes: Shapes, seed: int) -> dict[str, int]:
    """Return a rank for every module of W (out, in), 0 for none, so that rank * (out + in) sums to the budget.

    The modules of one size out + in together have close to their proportional share of rank units. Their ranks differ
    by at most one, and the seed draws which have one more. Where no ranks come within 1 % of the budget, the nearest
    do, with a warning.
    """
    sizes = {module: m + n for module, (m, n) in shapes.items()}
    even = budget / sum(sizes.values())
    groups = {size: [module for module in sizes if sizes[module] == size] for size in sorted(set(sizes.values()))}
    # By the parameters that the groups so far spend: the units nearest to their shares, and how far they are from them.
    # So as many sums are kept as differ, and not all combinations of units.
    nearest: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for size, group in groups.items():
        share = even * len(group)
        counts = sorted({max(0, round(share) + move) for move in _MOVES})
        before, nearest = nearest, {}
        for (spent, (distance, units)), count in product(before.items(), counts):
            candidate = round(distance + abs(count - share), 6), (*units, count)
            nearest[spent + size * count] = min(candidate, nearest.get(spent + size * count, candidate))

    def missed(spent: int) -> int:
        return abs(budget - spent)

    within = [spent for spent in nearest if missed(spent) <= TOLERANCE * budget]
    if within:
        chosen = min(within, key=lambda spent: (nearest[spent][0], missed(spent), nearest[spent][1]))
    else:
        chosen = min(nearest, key=lambda spent: (missed(spent), nearest[spent][1]))
        if missed(chosen) > FARTHEST * budget:
            raise PartialLoraError(
                f"calibration.budget: not applicable: no ranks give about {budget:,} trainable parameters; rank 1 on "
                f"one module takes at least {min(groups):,}"
            )
        off = 100 * missed(chosen) / budget
        warnings.warn(f"calibration.budget: ranks come no nearer to it than {off:.1f} %", stacklevel=2)
    ranks = {}
    for group, count in zip(groups.values(), nearest[chosen][1], strict=True):
        keys = random_keys(len(group), mask_seed=seed, module=f"{len(group)}/{sizes[group[0]]}", axis="ranks")
        extra = set(np.argsort(keys)[: count % len(group)].tolist())
        ranks |= {module: count // len(group) + (place in extra) for place, module in enumerate(group)}
    return {module: ranks[module] for module in shapes}


# --- AdaLoRA (Zhang et al. 2023, arXiv 2303.10512).

# Shares of the steps: all ranks train for the first tenth, and only the final ones for the last three tenths.
_WARMUP_SHARE, _FINAL_SHARE = 0.1, 0.3
_LEAST_STEPS = 4  # so that each of the three phases has one
_INITIAL_RANK = 1.5  # times the final one, as in the paper (12 for 8)
_STATE = ("exp_avg_ipt", "exp_avg_unc")  # of the allocator, for every weight
_PENALTY_WEIGHT = 0.5  # PEFT's weight of the penalty that keeps A and B orthogonal


def adalora(model: nn.Module, setting: Setting) -> PeftModel:
    """AdaLoRA: starts at 1.5 times the rank, and prunes the ranks that matter least until the mean is `rank`.

    A rank that is left has the scaling alpha / rank of LoRA.
    """
    initial = max(setting.rank + 1, round(_INITIAL_RANK * setting.rank))
    with warnings.catch_warnings():  # PEFT warns that r is not used
        warnings.simplefilter("ignore")
        config = AdaLoraConfig(
            **setting.lora() | {"lora_alpha": setting.method.alpha * initial / setting.rank},
            target_r=setting.rank,
            init_r=initial,
            total_step=_LEAST_STEPS,  # until training knows how many there are
            tinit=1,
            tfinal=1,
            orth_reg_weight=_PENALTY_WEIGHT,
        )
    adapted = get_peft_model(model, config)
    for layer in _layers(adapted):
        layer.ranknum["default"].requires_grad_(False)  # on any device but the CPU, PEFT lets it train
    return adapted


def train_adalora(adapted: PeftModel) -> Training:
    """Call the allocator until ranks are final, and add the method's penalty to the loss."""
    return Training(
        callbacks=[Allocate(adapted)],
        penalty=lambda: orthogonality_penalty(adapted),
        final_after=lambda steps: steps - _final_steps(steps) + 1,
        summary=lambda: rank_counts(adapted),
    )


class Allocate(TrainerCallback):
    """Let PEFT's allocator choose which ranks each module keeps, at every optimizer step until the final ones.

    It chooses by the smoothed importance of every weight, which is kept in the optimizer's state and so in every
    checkpoint. PEFT's own list of kept ranks is cleared, since PEFT would save smaller tensors by it; pruned ranks are
    zeros here. The allocator does not see a step that fp16's gradient scaler skipped for gradients that are not finite,
    but makes the final choice at its step all the same.
    """

    def __init__(self, adapted: PeftModel) -> None:
        self._tuner: AdaLoraModel = adapted.base_model
        self._ranks = [layer.lora_E["default"] for layer in _layers(adapted)]
        self._pruned: list[Tensor] = []

    @property
    def _config(self) -> AdaLoraConfig:
        return self._tuner.peft_config["default"]

    @property
    def _final(self) -> int:
        """The step, counted from 0, at which the ranks that stay are chosen."""
        return self._config.total_step - self._config.tfinal

    def on_train_begin(self, args, state, control, **kwargs):
        steps, config = state.max_steps, self._config
        if steps < _LEAST_STEPS:
            raise PartialLoraError(f"method=adalora: expected at least {_LEAST_STEPS} optimizer steps, got {steps}")
        config.total_step = steps
        config.tinit, config.tfinal = max(1, int(_WARMUP_SHARE * steps)), _final_steps(steps)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step > self._final and not self._pruned:  # once per attempt
            self._pruned = [rank == 0 for rank in self._ranks]

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step > self._final:  # Adam would move the pruned ones, too
            with torch.no_grad():
                for rank, pruned in zip(self._ranks, self._pruned, strict=True):
                    rank.masked_fill_(pruned, 0.0)
        elif state.global_step == self._final or not getattr(optimizer, "step_was_skipped", False):
            self._allocate(state.global_step, optimizer)

    def _allocate(self, step: int, optimizer: Optimizer) -> None:
        allocator = self._tuner.rankallocator
        weights = {name: weight for name, weight in self._tuner.model.named_parameters() if weight.requires_grad}
        self._restore(allocator, weights, optimizer)
        if step == self._final and not allocator.exp_avg_ipt:
            raise PartialLoraError(
                f"method=adalora: none of the first {step + 1} steps had finite gradients to choose ranks by: set "
                "trainer.mixed_precision=no"
            )
        self._tuner.update_and_allocate(step)
        for name, weight in weights.items():
            if name in allocator.exp_avg_ipt:
                optimizer.state[weight] |= {key: getattr(allocator, key)[name] for key in _STATE}
        self._config.rank_pattern = None

    def _restore(self, allocator: RankAllocator, weights: dict[str, nn.Parameter], optimizer: Optimizer) -> None:
        """Restore the state of a new allocator, after an interruption, from the optimizer's state."""
        for name, weight in weights.items():
            if name not in allocator.ipt and _STATE[0] in optimizer.state.get(weight, ()):
                allocator.ipt[name] = torch.zeros_like(weight)
                for key in _STATE:
                    getattr(allocator, key)[name] = optimizer.state[weight][key]


def _final_steps(steps: int) -> int:
    """Return how many of the `steps`, at their end, train with the final ranks."""
    return max(1, int(_FINAL_SHARE * steps))


def orthogonality_penalty(adapted: PeftModel) -> Tensor:
    """Return the mean of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ over all modules, weighted as PEFT does."""
    norms = []
    for layer in _layers(adapted):
        for factor in (layer.lora_A["default"], layer.lora_B["default"].T):
            norms.append(torch.linalg.norm(factor @ factor.T - torch.eye(len(factor), device=factor.device)))
    return _PENALTY_WEIGHT * torch.stack(norms).mean()


def rank_counts(adapted: PeftModel) -> dict[str, int]:
    """Count the ranks that the allocator should have kept, those it has kept, and the parameters of the latter."""
    ranks = [(layer, int((layer.lora_E["default"] != 0).sum())) for layer in _layers(adapted)]
    return {
        "target_ranks": adapted.base_model.rankallocator.target_bgt,
        "ranks": sum(rank for _, rank in ranks),
        "adapter_final": sum(rank * (layer.in_features + layer.out_features + 1) for layer, rank in ranks),
    }


def _layers(adapted: PeftModel) -> list[AdaLoraLayer]:
    return [layer for layer in adapted.modules() if isinstance(layer, AdaLoraLayer)]
