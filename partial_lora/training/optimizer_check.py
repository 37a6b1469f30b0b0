"""Optimizers and schedules of transformers that cannot be made, since they lack a package or an argument."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import SimpleNamespace

from partial_lora.errors import PartialLoraError, one_line
from partial_lora.training.config import TrainerConfig


def check(trainer: TrainerConfig) -> None:
    """Make the optimizer and the schedule of a run for a layer that nobody needs.

    Raises PartialLoraError, naming the key, where that fails, as it otherwise would after the calibration.
    """
    if not trainer.chooses_steps:
        return
    from torch import nn, optim
    from transformers import Trainer, TrainingArguments, get_scheduler

    layer = nn.Sequential(nn.Linear(2, 2))
    given = {field.name: field.default for field in fields(TrainingArguments)} | dict(trainer.args or {})
    given |= {"optim": trainer.optimizer or given["optim"], "parallel_mode": None}
    given["optim_target_modules"] = given["optim_target_modules"] and "all-linear"  # the layer's name is another
    with _made("optimizer", trainer.optimizer, "optim_args: NAME=VALUE"):
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(SimpleNamespace(**given), layer)
        if not settings.keys() & {"model", "params", "optimizer_dict"}:  # of which Trainer makes something else
            kind(layer.parameters(), **settings)
    arguments = given["lr_scheduler_kwargs"]
    with _made("schedule", trainer.schedule, "lr_scheduler_kwargs: {NAME: VALUE}"):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        get_scheduler(trainer.schedule, optim.SGD(layer.parameters(), 1.0), 1, 10, scheduler_specific_kwargs=arguments)


@contextmanager
def _made(key: str, value: str | None, arguments: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of transformers, or of the package that has the optimizer
        raise PartialLoraError(
            f"trainer.{key}={value}: transformers cannot make it ({one_line(error)}); install what it needs, set its "
            f"arguments by trainer.args={{{arguments}}}, or choose another"
        ) from error
