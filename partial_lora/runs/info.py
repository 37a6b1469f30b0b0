"""Size of a run, counted on a model that has shapes and no weights: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from partial_lora import methods, models
from partial_lora.adapter.selection import assign_sparsity
from partial_lora.calibration.budget import Shapes, dense_parameters, saturated
from partial_lora.calibration.search import passes_at_most, sparsity_levels
from partial_lora.methods.setting import widest
from partial_lora.runs.build import check_modality, fixed_point, fixed_sparsity, setting_of
from partial_lora.runs.schema import Config
from partial_lora.training import cost
from partial_lora.training.cost import peak_memory


@dataclass(frozen=True)
class Outline:
    """Size of a run that has not begun.

    counts: counts and bytes as `training.cost` gives them. sparsity_is: where their sparsity is from. outputs: of
    the head; 0 for a model without a new one. passes: of its calibration, at most; 0 without one. memory: of causal
    models, bytes at the peak of a training step (`cost.peak_memory`) by what the frozen weights are kept in.
    """

    counts: dict[str, int | float | None]
    sparsity_is: str
    outputs: int
    passes: int
    memory: dict[str, dict[str, int]]


def outline(config: Config) -> Outline:
    """Return the outline of a run; the head is for two classes where the task does not say how many it has."""
    model, method, calibration = config.model, config.method, config.calibration
    check_modality(model, config.task)
    outputs = 0 if model.head is None else 1 if config.task.regression else config.task.classes or 2
    empty = models.empty(
        family=model.family, architecture=model.architecture, model_args=model.model_args, num_labels=outputs or 2
    )
    shapes = cost.target_shapes(empty, **model.trained_modules)
    granularity, passes = config.mask.counted, 0
    sparsity = fixed_sparsity(config, shapes)
    if sparsity is not None:
        source = ", ".join(f"calibration.{key}={value}" for key, value in fixed_point(calibration).items())
    elif methods.is_calibrated(methods.get(method.name)):
        sparsity, source = methods.expected_sparsity(shapes, method.rank, granularity, calibration)
        levels = len(sparsity_levels(calibration.levels, calibration.max_sparsity))
        axes = 1 if calibration.axes == "joint" else 2
        passes = passes_at_most(len(shapes), axes, levels, search=calibration.search, repair=calibration.repair)
    if sparsity is not None:
        modules = model.trained_modules
        counts = cost.describe(empty, **modules, rank=method.rank, sparsity=sparsity, granularity=granularity)
        if method.ranks == "auto":  # lower, so that fewer are saturated
            counts["saturated_modules"] = _saturated(shapes, method.rank, sparsity)
    else:
        adapted = methods.get(method.name)(empty, setting_of(config, shapes))
        dense = dense_parameters(shapes, method.rank)
        counts = cost.describe_adapted(adapted, model.head, new_modules=model.new_modules, dense=dense)
        source = "counted on the adapter itself"
    return Outline(counts, source, outputs, passes, _memory(config, empty, shapes, counts))


def _saturated(shapes: Shapes, rank: int, sparsity: float | methods.Sparsity) -> int:
    """Count the saturated modules where each has the rank that reaches most of W at its size."""
    shares = assign_sparsity(sparsity, list(shapes))
    wide = {name: (shape, *widest(shape, rank, shares[name])) for name, shape in shapes.items()}
    return sum(bool(saturated({name: shape}, own, {name: axes})) for name, (shape, own, axes) in wide.items())


def _memory(config: Config, empty: PreTrainedModel, shapes: Mapping, counts: Mapping) -> dict[str, dict[str, int]]:
    """Return the memory of a causal model in bf16 and in 4 bits, for a batch of the longest sequences that may be."""
    if config.model.family != "causal":
        return {}
    batch = {"batch_size": config.trainer.local_batch_size, "length": config.model.max_length}
    return {
        name: peak_memory(
            empty, shapes=shapes, counts=counts, rank=config.method.rank, quantization=quantization, **batch
        )
        for name, quantization in (("bf16", None), ("nf4", "nf4"))
    }
