"""The methods that are compared: each takes the frozen model and gives it back with what it trains.

Every method trains the task's head; they differ in what else they train. A new one is one function, its name in
`_MODULES`, and one file in conf/method. A method that trains in a way of its own has a second function beside it,
`train_NAME`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from peft import PeftModel

from partial_lora.errors import PartialLoraError
from partial_lora.methods.setting import Method, Scores, Setting, Sparsity, Training, foreseen_sparsity, is_calibrated

__all__ = [
    "Method",
    "Scores",
    "Setting",
    "Sparsity",
    "Training",
    "foreseen_sparsity",
    "is_calibrated",
    "named",
    "names",
    "training",
]


# Each method is a function of this name in this module; a module is loaded when one of its methods is asked for.
_MODULES = {
    "partial": ("partial", "targeted"),
    "controls": ("uniform", "shuffled", "inverted", "low_rank", "random_weights"),
    "flow": ("flow",),
    "peft": ("lora", "dora", "vera", "adalora", "lorafa"),
    "full": ("full", "probe"),
}
_MODULE_OF = {method: module for module, methods in _MODULES.items() for method in methods}


def named(name: str) -> Method:
    """Return the method that conf/method/NAME.yaml names; raises PartialLoraError for a name that there is none of."""
    if name not in _MODULE_OF:
        raise PartialLoraError(f"method.name={name}: expected one of {', '.join(names())}")
    return getattr(_module(name), name)


def names() -> list[str]:
    """Every method there is, in the order of the alphabet."""
    return sorted(_MODULE_OF)


def training(name: str, adapted: PeftModel, *, sharded: bool = False) -> Training:
    """How what the method has made of a model is trained, where that takes more than AdamW on a loss.

    Such a method has a function train_NAME beside its own. Raises PartialLoraError where that needs whole parameters
    and they are shared out over the processes.
    """
    of_its_own = getattr(_module(name), f"train_{name}", None)
    if of_its_own is None:
        return Training()
    if sharded:
        raise PartialLoraError(f"trainer.strategy=fsdp: method={name} needs whole parameters in training; use ddp")
    return of_its_own(adapted)


def _module(name: str) -> ModuleType:
    return import_module(f"{__name__}.{_MODULE_OF[name]}")
