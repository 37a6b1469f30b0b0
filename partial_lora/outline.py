"""What a run would train and write, counted on a model that has shapes and no weights: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from partial_lora import methods, models, parameters
from partial_lora.budget import masked_units
from partial_lora.loading import check_modality, named


@dataclass(frozen=True)
class Outline:
    """Counts and bytes as `parameters.describe` gives them, where their sparsity is from, and the size of the head."""

    counts: dict[str, int | float | None]
    sparsity_is: str
    outputs: int


def outline(settings: Mapping) -> Outline:
    """The outline of a run's settings; the head is for two classes where the task does not say how many it has."""
    check_modality(settings)
    model, method, granularity = settings["model"], settings["method"], settings["mask"]["granularity"]
    outputs = 1 if settings["task"]["regression"] else settings["task"]["classes"] or 2
    empty = models.empty(**named(model, "family", "architecture", "model_args"), num_labels=outputs)
    shapes = parameters.target_shapes(empty, **named(model, "target_modules", "head", "new_modules"))
    units = masked_units(shapes, method["rank"], granularity)
    sparsity, said = methods.foreseen_sparsity(method["name"], *units, settings["calibration"])
    counts = parameters.describe(
        empty,
        **named(model, "target_modules", "head", "new_modules"),
        rank=method["rank"],
        sparsity=sparsity,
        granularity=granularity,
    )
    return Outline(counts, said, outputs)
