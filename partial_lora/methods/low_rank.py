"""A control: a smaller dense adapter in place of a sparse one."""

from __future__ import annotations

import re
from collections import Counter
from itertools import product

import numpy as np
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from partial_lora.calibration.budget import TOLERANCE, Shapes
from partial_lora.errors import PartialLoraError
from partial_lora.masks import random_keys
from partial_lora.methods.setting import Setting, calibrated

_MOVES = (0, 1, -1, 2, -2)  # how far the rank units of a size may be from their proportional share


@calibrated
def low_rank(model: nn.Module, setting: Setting) -> PeftModel:
    """Control: dense LoRA of as low a rank as gives it the trainable parameters of `partial`, to within 1 %.

    Ranks of two modules differ by at most a few, and alpha / rank is everywhere what it is for the others. Where rank 1
    on every module would be too much, fewer modules have it, drawn by `mask_seed`. Raises PartialLoraError, "not
    applicable", where no ranks meet the budget.
    """
    ranks = ranks_within(setting.budget(), setting.shapes, setting.mask_seed)
    adapted = {module: rank for module, rank in ranks.items() if rank}
    scaling, usual = setting.alpha / setting.rank, Counter(adapted.values()).most_common(1)[0][0]
    exact = {module: f"^{re.escape(module)}" for module in adapted}  # as PEFT matches patterns: the end of a name
    unusual = {exact[module]: rank for module, rank in adapted.items() if rank != usual}
    config = LoraConfig(
        **setting.lora()
        | {
            "r": usual,
            "lora_alpha": scaling * usual,
            "target_modules": list(adapted),
            "rank_pattern": unusual,
            "alpha_pattern": {pattern: scaling * rank for pattern, rank in unusual.items()},
        }
    )
    return get_peft_model(model, config)


def ranks_within(budget: int, shapes: Shapes, seed: int) -> dict[str, int]:
    """A rank for every module of W (out, in), 0 for none, so that rank * (out + in) sums to the budget within 1 %.

    Every size out + in has close to its proportional share of rank units, and modules of one size differ by at most
    one; which have the one more is drawn by the seed.
    """
    sizes = {module: m + n for module, (m, n) in shapes.items()}
    even = budget / sum(sizes.values())
    groups = {size: [module for module in sizes if sizes[module] == size] for size in sorted(set(sizes.values()))}
    shares = [even * len(group) for group in groups.values()]

    def missed(units: tuple[int, ...]) -> int:
        return abs(budget - sum(size * count for size, count in zip(groups, units, strict=True)))

    choices = [sorted({max(0, round(share) + move) for move in _MOVES}) for share in shares]
    within = [units for units in product(*choices) if missed(units) <= TOLERANCE * budget and any(units)]
    if not within:
        raise PartialLoraError(
            f"method=low_rank: not applicable: no ranks give a dense adapter within 1 % of {budget:,} trainable "
            f"parameters; one rank of a module has at least {min(groups):,}"
        )
    apart = {units: sum(abs(count - share) for count, share in zip(units, shares, strict=True)) for units in within}
    chosen = min(within, key=lambda units: (round(apart[units], 6), missed(units)))
    ranks = {}
    for group, count in zip(groups.values(), chosen, strict=True):
        keys = random_keys(len(group), mask_seed=seed, module=f"{len(group)}/{sizes[group[0]]}", axis="ranks")
        extra = set(np.argsort(keys)[: count % len(group)].tolist())
        ranks |= {module: count // len(group) + (place in extra) for place, module in enumerate(group)}
    return {module: ranks[module] for module in shapes}
