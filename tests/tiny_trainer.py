"""A tiny ViT with an adapter and a Trainer of it, and trainings that end before they are done."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback, default_data_collator

from partial_lora import models
from partial_lora.adapter import PartialLoraConfig
from partial_lora.launching import directory as results
from partial_lora.models.config import ModelConfig
from partial_lora.training import checkpoints, objectives, offline_metrics
from partial_lora.training.config import TrainerConfig
from partial_lora.training.distributed import World
from partial_lora.training.trainer import Computation, ResumableTrainer, build_trainer

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2}
BATCH = 8
VERSIONS = {"torch": torch.__version__}
RESUMED = {"epochs": 4.0, "save_steps": 2, "max_steps": 8, "learning_rate": 0.05, "count": 41}  # 5 steps an epoch


def rows(count: int, real: bool = False, size: int = 16) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 3
    pixels = torch.randn(count, 3, size, size, generator=generator) + labels[:, None, None, None]
    features = {  # as lists of lists every row of pixels would be made a tensor of its own
        "pixel_values": datasets.Array3D((3, size, size), "float32"),
        "labels": datasets.Value("float32" if real else "int64"),
    }
    columns = {"pixel_values": pixels.numpy(), "labels": (labels / 2 if real else labels).tolist()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features)).with_format("torch")


def adapted(
    labels: tuple[str, ...] = ("a", "b", "c"),
    method: type = LoraConfig,
    seed: int = 0,
    depth: int = 1,
    **changes: object,
) -> PeftModel:
    torch.manual_seed(seed)
    settings = {"name": "tiny", "weights": "random", "architecture": "vit_tiny_patch16_224", "image_size": 16}
    model = models.load(ModelConfig(model_args=TINY | {"depth": depth}, **settings), list(labels))
    own = {"r": 2, "target_modules": ["attn.qkv"], "modules_to_save": ["timm_model.head"]}
    return get_peft_model(model, method(**own | changes))


def masked(method: type = PartialLoraConfig, **changes: object) -> PeftModel:
    """Return the model with dropout, so that resuming needs the random state, too."""
    own = {"sparsity": 0.5, "mask_seed": 0} if method is PartialLoraConfig else {}
    return adapted(method=method, lora_dropout=0.3, **own | changes)


def trainer(
    model: PeftModel, directory: Path, count: int = 20, real: bool = False, size: int = 16, **changes: object
) -> ResumableTrainer:
    """Return a Trainer; changes are of TrainerConfig, Computation or the arguments of `build_trainer`."""
    config = {"epochs": 3.0, "batch_size": BATCH, "eval_batch_size": 5, "learning_rate": 1e-2, "weight_decay": 0.0}
    names = {field.name for field in dataclasses.fields(TrainerConfig)} & changes.keys()
    config |= {name: changes.pop(name) for name in names}
    chosen = changes.pop("metrics", ("accuracy",))
    transform = SimpleNamespace(
        collate=lambda some: default_data_collator(
            [{key: row[key] for key in ("pixel_values", "labels")} for row in some]
        ),
        lengths=changes.pop("length_grouped", False),
    )
    judge = SimpleNamespace(
        loss=objectives.loss_of_batch,
        reduce=None,
        measure=lambda outputs: offline_metrics.metrics_of(chosen, outputs.predictions, np.asarray(outputs.label_ids)),
        selects=chosen[0],
    )
    world = World("cpu", changes.pop("world_size", 1))
    computation = Computation(world, directory / results.CHECKPOINTS, "no", 0, VERSIONS)
    known = {field.name for field in dataclasses.fields(Computation)}
    return build_trainer(
        model,
        TrainerConfig(**config),
        dataclasses.replace(computation, **{name: changes.pop(name) for name in known & changes.keys()}),
        rows={"train": rows(count, real, size), "validation": rows(12, real, size)},
        transform=transform,
        judge=judge,
        **changes,
    )


def trained_state(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def resumable(directory: Path) -> Path | None:
    return checkpoints.resumable(directory / results.CHECKPOINTS, VERSIONS, SHAPE)


SHAPE = checkpoints.shape_of(masked())  # once: a model draws from the random state of what is to be resumed


class EndedError(Exception):
    """Whatever ends a process."""


class EndAfter(TrainerCallback):
    """End training after a step, or (saved) after its checkpoint."""

    def __init__(self, step: int, saved: bool = False) -> None:
        self._step, self._saved = step, saved

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._step and not self._saved:
            raise EndedError

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            raise EndedError
