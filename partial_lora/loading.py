"""What groups of settings stand for: a task, the way its rows enter the model, and the frozen model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from partial_lora import models, tasks
from partial_lora.errors import PartialLoraError
from partial_lora.tasks import Draws, Task

_MODALITY = {"timm": "image", "clip": "image", "encoder": "text"}


class Transform(Protocol):
    """How rows of a task become what a model reads (`tasks.ImageTransform`, `tasks.TextTransform`)."""

    lengths: bool

    def prepare(self, rows: Dataset, *, cache_bytes: int) -> Dataset: ...

    def collate(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]: ...

    def batches(self, rows: Dataset, size: int) -> list[dict[str, torch.Tensor]]: ...


def named(settings: Mapping, *names: str) -> dict:
    """The named arguments that a group of settings gives a function."""
    return {name: settings[name] for name in names}


def modality(model: Mapping) -> str:
    """What a model of these settings reads: "image" or "text"."""
    return _MODALITY[model["family"]]


def check_modality(settings: Mapping) -> None:
    """Raises PartialLoraError where the task's inputs are not what the model reads."""
    model, task = settings["model"], settings["task"]
    if modality(model) != task["modality"]:
        raise PartialLoraError(
            f"model={model['name']} reads {modality(model)}s, and task={task['name']} has {task['modality']}s: choose "
            f"another model or task, such as model={'vit_s14' if task['modality'] == 'image' else 'minilm_l6'}"
        )


def task_of(settings: Mapping) -> Task:
    """The task of a run's settings."""
    check_modality(settings)
    return tasks.load(**named(settings["task"], *tasks.SETTINGS))


def transform_of(model: Mapping) -> Transform:
    """How rows enter the model of the settings' group `model`."""
    if modality(model) == "image":
        return tasks.ImageTransform(**named(model, "image_size", "mean", "std", "interpolation"))
    return tasks.TextTransform(models.tokenizer(**named(model, "name", "weights")), model["max_length"])


def model_of(model: Mapping, labels: Sequence[str]) -> PreTrainedModel:
    """The frozen model of the settings' group `model` with a head for `labels`, or for one number where none is given.

    A head that is new is drawn from torch's global generator as it is. It and the other modules that train whole are in
    float32 whatever `model.dtype` says of the frozen rest. Raises PartialLoraError where texts of the settings' length
    do not fit, and for a `head` that does not give the logits.
    """
    loaded = models.load(labels=list(labels), **named(model, *models.SETTINGS))
    head = models.head_name(loaded, model["family"])
    if model["head"] != head:
        raise PartialLoraError(
            f"model.head={model['head']}: expected {head}, which gives the logits of {model['name']}"
        )
    for name in (head, *model["new_modules"]):
        models.in_full_precision(_module(loaded, name))
    if modality(model) == "text":
        _check_length(loaded, model)
    return loaded


def _module(loaded: PreTrainedModel, name: str) -> torch.nn.Module:
    try:
        return loaded.get_submodule(name)
    except AttributeError as error:
        kind = type(loaded).__name__
        raise PartialLoraError(f"model.new_modules: {kind} has no module of the name {name}") from error


def _check_length(loaded: PreTrainedModel, model: Mapping) -> None:
    """Positions that are embedded one by one come to an end; some models start to count after the padding's."""
    for name, module in loaded.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            longest = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
            if model["max_length"] > longest:
                raise PartialLoraError(
                    f"model.max_length={model['max_length']}: expected at most {longest}, the positions that "
                    f"model={model['name']} has"
                )


def has_new_head(model: Mapping) -> bool:
    """Whether the model comes without a head for the task; CLIP makes one of the names of the classes."""
    return model["text_weights"] is None


def drawn_by(settings: Mapping) -> dict:
    """The keys of `calibration` that decide the few-shot draws: texts are drawn by `share`, unless that is 0."""
    chosen = settings["calibration"]
    by_share = settings["task"]["modality"] == "text" and chosen["share"] > 0
    return named(chosen, "share" if by_share else "shots", "max_samples")


def draws_of(settings: Mapping, rows: Dataset, **changes: int) -> Draws:
    """The few-shot draws of training rows; `changes` are of `shots`, which then count, and of `seed`."""
    drawn = drawn_by(settings)
    if "shots" in changes:
        drawn.pop("share", None)
    return tasks.few_shot_draws(rows["label"], **{"seed": settings["calibration"]["seed"]} | drawn | changes)


def calibration_score(settings: Mapping, task: Task) -> str:
    """What calibration counts: what was asked for or, on "auto", the task's primary metric."""
    asked = settings["calibration"]["score"]
    if asked != "auto":
        return asked
    primary = task.metrics[0]
    return {"mse": "loss"}.get(primary, primary)
