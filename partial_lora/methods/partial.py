"""The paper's two methods, Partial-LoRA and Targeted-LoRA, and forms of the adapter that need no calibration."""

from __future__ import annotations

import numpy as np
from peft import PeftModel, get_peft_model
from torch import nn

from partial_lora.adapter import PartialLoraConfig
from partial_lora.masks import AXES, Mask
from partial_lora.methods.lora import ranks_within
from partial_lora.methods.setting import ModuleScores, Setting


def partial(model: nn.Module, setting: Setting) -> PeftModel:
    """Partial-LoRA: the calibrated number of rows and columns of each module, drawn at random."""
    return get_peft_model(model, PartialLoraConfig(**setting.randomly_masked(setting.sparsity)))


def targeted(model: nn.Module, setting: Setting) -> PeftModel:
    """Targeted-LoRA: the calibrated number of rows and columns of each module, the most important ones."""
    masks = {
        module: {
            axis: Mask.top(scores.cpu().numpy(), sparsity[axis])
            for axis, scores in zip(AXES, setting.scores[module], strict=True)
        }
        for module, sparsity in setting.sparsity.items()
    }
    return get_peft_model(model, PartialLoraConfig(**setting.chosen(masks), sparsity=dict(setting.sparsity)))


def whole(model: nn.Module, setting: Setting) -> PeftModel:
    """Train one factor whole, at method.rank or the ranks that spend a budget; the other stays as it is drawn.

    `lorafa` freezes a random A: LoRA-FA (Zhang et al. 2023, arXiv 2308.03303). `paca` freezes an A of unit vectors, so
    that columns of W train: PaCA (Woo et al. 2025, arXiv 2503.01905). `rows` freezes a B of unit vectors, so that rows
    of W train: RoCoFT (Kowsher et al. 2024, arXiv 2410.10075).
    """
    sizes, _ = setting.units()
    ranks = setting.at_ranks(ranks_within(setting.budget(), sizes, setting.mask_seed))
    return get_peft_model(model, PartialLoraConfig(**setting.masked() | {"sparsity": 0.0} | ranks))


def ticket(model: nn.Module, setting: Setting) -> PeftModel:
    """Train winning tickets of the adapter: the rows of B and columns of A that a short dense training moves farthest.

    One ranking holds all modules' rows and columns (`importance.adapter`), as in global magnitude pruning, so that it
    also decides how much each module keeps; nothing is calibrated. The budget is spent to the last row or column.
    Source: Frankle and Carbin 2019 (arXiv 1803.03635): train, prune the smallest, rewind the rest and train it; their
    section 4 ranks all layers together.
    """
    masks = largest(setting.scores, setting.budget() // setting.rank)
    return get_peft_model(model, PartialLoraConfig(**setting.chosen(masks)))


def largest(scores: ModuleScores, count: int) -> dict[str, dict[str, Mask]]:
    """Return masks of the `count` rows and columns of all modules that score highest; the first among equals.

    Every module keeps at least its highest row and its highest column: without either it has no adapter, and a network
    that loses a whole layer collapses.
    """
    parts = {(module, axis): part for module, axes in scores.items() for axis, part in zip(AXES, axes, strict=True)}
    values = [part.cpu().double().numpy() for part in parts.values()]
    order = np.argsort(-np.concatenate(values), kind="stable")
    kept = np.zeros(len(order), dtype=bool)
    kept_parts = np.split(kept, np.cumsum([len(part) for part in values])[:-1])  # views
    for kept_part, part in zip(kept_parts, values, strict=True):
        kept_part[part.argmax()] = True
    kept[order[~kept[order]][: count - kept.sum()]] = True
    masks: dict[str, dict[str, Mask]] = {module: {} for module in scores}
    for (module, axis), kept_part in zip(parts, kept_parts, strict=True):
        masks[module][axis] = Mask(len(kept_part), np.flatnonzero(kept_part))
    return masks
