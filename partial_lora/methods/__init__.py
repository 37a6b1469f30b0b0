"""The methods that are compared: each takes the frozen model and returns it with what it trains.

Every method trains the task's head; they differ in what else they train. A new one is a function in `METHODS` and a
file in conf/method; docs/developing/extend.md says where else its name goes. A method that trains in a way of its own
has a second function, in `_TRAININGS`.
"""

from __future__ import annotations

from peft import PeftModel

from partial_lora.errors import PartialLoraError
from partial_lora.methods import controls, flow, full, partial, peft, tuners
from partial_lora.methods.setting import Method, ModuleScores, Setting, Sparsity, Training
from partial_lora.methods.tuners import configuration, put_back, taken_out

__all__ = [
    "METHODS",
    "Method",
    "ModuleScores",
    "Setting",
    "Sparsity",
    "Training",
    "configuration",
    "put_back",
    "taken_out",
    "training",
]

METHODS: dict[str, Method] = {
    "partial": partial.partial,
    "targeted": partial.targeted,
    "entries": partial.entries,
    "ticket": partial.ticket,
    "flow": flow.flow,
    "uniform": controls.uniform,
    "shuffled": controls.shuffled,
    "inverted": controls.inverted,
    "low_rank": controls.low_rank,
    "random_weights": controls.random_weights,
    "lora": peft.lora,
    "dora": peft.dora,
    "vera": peft.vera,
    "adalora": peft.adalora,
    "lorafa": peft.lorafa,
    "full": full.full,
    "probe": full.probe,
    "peft": tuners.peft,
}
_TRAININGS = {"adalora": peft.train_adalora, "lorafa": peft.train_lorafa, "peft": tuners.train_tuner}


def training(name: str, adapted: PeftModel, *, sharded: bool = False) -> Training:
    """Return what the method adds to AdamW on the task's loss, for the model that it has adapted.

    Raises PartialLoraError where that needs whole parameters and they are sharded.
    """
    if name not in _TRAININGS:
        return Training()
    if sharded:
        raise PartialLoraError(f"trainer.strategy=fsdp: method={name} needs whole parameters in training; use ddp")
    return _TRAININGS[name](adapted)
