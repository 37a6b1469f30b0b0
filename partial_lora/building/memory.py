"""Bytes that a training step keeps for its backward pass, counted on models without memory, and the size they allow.

A forward pass over fake tensors, which have shapes and no values, saves what a real one saves. So every model and
method is counted by the code that trains it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from partial_lora import models
from partial_lora.adapter.model import base_name
from partial_lora.budget import Shapes, dense_parameters, largest, masked_units
from partial_lora.building.build import method_of, setting_of
from partial_lora.errors import PartialLoraError, one_line, require
from partial_lora.masks import PAPER_BUDGET, Sparsity
from partial_lora.methods import METHODS
from partial_lora.models.skeleton import Skeleton, skeleton
from partial_lora.models.weights import quiet
from partial_lora.settings.schema import Config
from partial_lora.training.cost import kept_by_forward
from partial_lora.training.trainer import mixed_precision

logger = logging.getLogger(__name__)

_OUTPUTS = 2  # of the head, which keeps next to nothing
_NEAR = 0.004  # of the largest share of dense LoRA's parameters: to within this much of it


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one process keeps for the backward pass of a step, of images or texts as large as settings allow.

    Attributes:
        floor: of the frozen model alone, through which gradients pass.
        adapter: what the adapter adds.
        checkpointed: floor and adapter with gradient checkpoints; None for a model that has none.
    """

    floor: int
    adapter: int
    checkpointed: int | None


def step_memory(config: Config) -> StepMemory:
    """Return what a step of these settings keeps, with one share everywhere.

    Raises PartialLoraError for a quantised model, whose layers cannot be counted.
    """
    model = adapted(config)
    layers = [base_name(name) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
    floor, whole = _kept(config, _frozen(config, layers)), _kept(config, model)
    try:
        checkpointed = _kept(config, adapted(config), checkpointed=True)
    except PartialLoraError:
        checkpointed = None
    return StepMemory(floor, whole - floor, checkpointed)


def kept_by_step(config: Config) -> int:
    """Return the bytes that a step of these settings keeps, with one share everywhere; raises as `step_memory` does."""
    return _kept(config, adapted(config))


def within(config: Config) -> Config:
    """Return settings whose calibration.budget is the largest at which a step keeps at most `calibration.kept` bytes.

    The size is found on one share everywhere, and holds for calibrated shares, too, about: their columns differ. Raises
    PartialLoraError where no size keeps as little, and for a quantised model, whose layers cannot be counted.
    """
    most = config.calibration.kept
    if most is None:
        return config
    sizes: dict[float, int] = {}
    refused: list[PartialLoraError] = []

    def fits(share: float) -> bool:
        try:
            sizes[share] = kept_by_step(_at(config, share))
        except PartialLoraError as error:  # more or fewer parameters than the method can have
            refused.append(error)
        return sizes.get(share, most + 1) <= most

    highest = _largest(config)
    share = largest(fits, 0.0, highest, within=_NEAR * highest)
    if not sizes:
        raise refused[0]
    if share == 0:
        least = min(sizes.values())
        raise PartialLoraError(
            f"calibration.kept={most:.0f}: expected at least about {least} for method={config.method.name}; "
            "model.gradient_checkpointing=true keeps less, a smaller batch, image or text, or another method"
        )
    logger.info("calibration.kept=%.0f allows calibration.budget=%.4g", most, share)
    return _at(config, share)


def adapted(config: Config, sparsity: float | Sparsity | None = None, outputs: int = _OUTPUTS) -> PeftModel:
    """Return the model with its adapter on the meta device, where neither has values. outputs: of the head."""
    whole, bare = _skeleton(config), _empty(config, outputs)
    shapes, method = whole.targets(**config.model.trained_modules), config.method
    if sparsity is None and method.traits.is_sparse:
        sizing = config.sizing
        sparsity = sizing.sparsity(shapes) or sizing.evenly(shapes, sizing.calibration.budget or PAPER_BUDGET)
    # Which rows are kept, by importance or at random, changes no size.
    build = METHODS["partial"] if method.traits.ranked else method_of(method)
    with quiet():
        return build(bare, setting_of(config, shapes, sparsity, experts=whole.expert_parameters(shapes)))


def _at(config: Config, share: float) -> Config:
    return replace(config, calibration=replace(config.calibration, budget=share, kept=None))


def _largest(config: Config) -> float:
    """Return the share of dense LoRA's parameters that the masks can keep at most."""
    shapes, rank = _shapes(config), config.method.nominal_rank
    units, unit = masked_units(shapes, rank, config.mask.counted)
    return min(1.0, dense_parameters(units, unit) / dense_parameters(shapes, rank))


def _shapes(config: Config) -> Shapes:
    return _skeleton(config).targets(**config.model.trained_modules)


def _skeleton(config: Config) -> Skeleton:
    return skeleton(**config.model.geometry, outputs=_OUTPUTS)


def _empty(config: Config, outputs: int = _OUTPUTS) -> nn.Module:
    model = models.empty(**config.model.geometry, num_labels=outputs)
    return model.to(getattr(torch, config.model.dtype))


def _frozen(config: Config, adapted: Iterable[str]) -> nn.Module:
    """Return the model without an adapter; gradients pass from the first of the adapted modules on."""

    def needing_gradients(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return output if output.requires_grad else output + torch.zeros((), requires_grad=True)  # which keeps nothing

    model = _empty(config).requires_grad_(False)
    for name in adapted:
        model.get_submodule(name).register_forward_hook(needing_gradients)
    return model


def _kept(config: Config, model: nn.Module, *, checkpointed: bool = False) -> int:
    """Return the bytes that a forward pass of a model on the meta device keeps."""
    size, rows = config.model, config.trainer.local_batch_size
    quantization = size.quantization
    require(quantization is None, "model.quantization", quantization, "null: what its layers keep cannot be counted")
    if checkpointed or size.gradient_checkpointing:
        with quiet():
            models.enable_gradient_checkpointing(model)
    precision = mixed_precision(config.trainer.mixed_precision, "cuda" if torch.cuda.is_available() else "cpu")
    number = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", number) if number else nullcontext():
        model = model.to_empty(device="cpu").train()
        if size.modality == "image":
            batch = {"pixel_values": torch.empty(rows, 3, size.image_size, size.image_size)}
        else:
            batch = {
                name: torch.ones(rows, size.max_length, dtype=torch.long) for name in ("input_ids", "attention_mask")
            }
        try:
            with kept_by_forward() as counted:
                output = model(**batch)  # noqa: F841 (it holds what it needs)
        except RuntimeError as error:
            reason = f"model.name={size.name}: what a step of it keeps cannot be counted ({one_line(error)})"
            raise PartialLoraError(reason) from error
    return counted.bytes
