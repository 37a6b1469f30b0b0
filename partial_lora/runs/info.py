"""What a run would train and write, counted on a model that has shapes and no weights: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from partial_lora import methods, models
from partial_lora.calibration.budget import dense_parameters, masked_units
from partial_lora.calibration.search import passes_at_most, sparsity_levels
from partial_lora.runs.build import check_modality, named
from partial_lora.training import cost
from partial_lora.training.config import TrainerConfig
from partial_lora.training.cost import peak_memory


@dataclass(frozen=True)
class Outline:
    """What a run would hold.

    counts: counts and bytes as `parameters.describe` gives them. sparsity_is: where their sparsity is from. outputs: of
    the head; 0 for a model without a new one. passes: of a calibration, at most. memory: of causal models, bytes at the
    peak of a training step (`memory.peak_memory`) by what the frozen weights are kept in.
    """

    counts: dict[str, int | float | None]
    sparsity_is: str
    outputs: int
    passes: int
    memory: dict[str, dict[str, int]]


def outline(settings: Mapping) -> Outline:
    """The outline of a run's settings; the head is for two classes where the task does not say how many it has."""
    check_modality(settings)
    model, method, granularity = settings["model"], settings["method"], settings["mask"]["granularity"]
    outputs = 0 if model["head"] is None else 1 if settings["task"]["regression"] else settings["task"]["classes"] or 2
    empty = models.empty(**named(model, "family", "architecture", "model_args"), num_labels=outputs or 2)
    shapes = cost.target_shapes(empty, **named(model, "target_modules", "head", "new_modules"))
    known = named(model, "target_modules", "head", "new_modules")
    if methods.is_calibrated(methods.get(method["name"])):
        units = masked_units(shapes, method["rank"], granularity)
        sparsity, said = methods.expected_sparsity(*units, settings["calibration"])
        counts = cost.describe(empty, **known, rank=method["rank"], sparsity=sparsity, granularity=granularity)
    else:
        setting = methods.Setting(
            **known, **named(method, "rank", "alpha", "dropout", "projections"), shapes=shapes, mask_seed=0
        )
        counts, said = _made(empty, method["name"], setting), "counted on the adapter itself"
    chosen = settings["calibration"]
    levels = len(sparsity_levels(chosen["levels"], chosen["max_sparsity"]))
    axes = 1 if chosen["axes"] == "joint" else 2
    passes = passes_at_most(len(shapes), axes, levels, search=chosen["search"], repair=chosen["repair"])
    return Outline(counts, said, outputs, passes, _memory(settings, empty, shapes, counts))


def _made(empty: PreTrainedModel, method: str, setting: methods.Setting) -> dict[str, int | float | None]:
    """The counts of a method that depends on no calibration: of the adapter that it makes of the empty model."""
    adapted = methods.get(method)(empty, setting)
    dense = dense_parameters(setting.shapes, setting.rank)
    return cost.foretold(adapted, setting.head, new_modules=setting.new_modules, dense=dense)


def _memory(settings: Mapping, empty: PreTrainedModel, shapes: Mapping, counts: Mapping) -> dict[str, dict[str, int]]:
    """Of a causal model in bf16 and in 4 bits: a batch as the trainer takes it, of sequences as long as may be."""
    if settings["model"]["family"] != "causal":
        return {}
    asked = {
        "shapes": shapes,
        "counts": counts,
        "rank": settings["method"]["rank"],
        "batch_size": TrainerConfig(**settings["trainer"]).local_batch_size,
        "length": settings["model"]["max_length"],
    }
    return {
        "bf16": peak_memory(empty, **asked),
        "nf4": peak_memory(empty, quantization="nf4", **asked),
    }
