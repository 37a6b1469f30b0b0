"""The methods that are compared: each takes the frozen model and gives it back with what it trains.

Every method trains the task's head; they differ in what else they train. A new one is one function here, NAME in a file
NAME.py, and one file in conf/method. A method that trains in a way of its own has a second function beside it,
`training`.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from peft import PeftModel

from partial_lora.errors import PartialLoraError
from partial_lora.methods.foreseen import foreseen_sparsity
from partial_lora.methods.setting import Method, Scores, Setting, Sparsity, Training, is_calibrated

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


def named(name: str) -> Method:
    """The method that conf/method/NAME.yaml names: the function NAME of the file NAME.py beside this one."""
    known = {file.name for file in iter_modules(__path__)}
    method = getattr(import_module(f"{__name__}.{name}"), name, None) if name in known else None
    if not callable(method):
        raise PartialLoraError(f"method.name={name}: expected one of {', '.join(names())}")
    return method


def names() -> list[str]:
    """Every method there is, in the order of the alphabet."""
    files = sorted(file.name for file in iter_modules(__path__))
    return [name for name in files if callable(getattr(import_module(f"{__name__}.{name}"), name, None))]


def training(name: str, adapted: PeftModel, *, sharded: bool = False) -> Training:
    """How what the method has made of a model is trained, where that takes more than AdamW on a loss.

    Raises PartialLoraError where that needs whole parameters and they are shared out over the processes.
    """
    of_its_own = getattr(import_module(named(name).__module__), "training", None)
    if of_its_own is None:
        return Training()
    if sharded:
        raise PartialLoraError(f"trainer.strategy=fsdp: method={name} needs whole parameters in training; use ddp")
    return of_its_own(adapted)
