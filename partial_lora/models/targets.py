"""Which modules of a model are adapted: matched as PEFT matches them, and linear."""

from __future__ import annotations

from collections.abc import Sequence

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from partial_lora.errors import PartialLoraError


def target_linears(
    model: nn.Module,
    target_modules: str | Sequence[str],
    head: str | None = None,
    new_modules: Sequence[str] = (),
) -> dict[str, nn.Linear]:
    """The modules to adapt, by full name in the model's order.

    target_modules: a list of names or suffixes, or one regular expression, as PEFT's LoraConfig takes them. Raises
    PartialLoraError where nothing matches, or something that is no linear layer with a plain weight. `head` and
    `new_modules` train whole and are no targets: a pattern passes over them, as PEFT does with modules_to_save.
    """
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(target_modules=targets)
    found = {name: module for name, module in model.named_modules() if check_target_module_exists(config, name)}
    for target in [] if isinstance(targets, str) else targets:
        if not any(name == target or name.endswith(f".{target}") for name in found):
            raise PartialLoraError(f"target_modules: no module of {type(model).__name__} matches {target!r}")
    for whole in [*new_modules, *([] if head is None else [head])]:
        found = {name: module for name, module in found.items() if name != whole and not name.startswith(f"{whole}.")}
    if not found:
        raise PartialLoraError(f"target_modules={targets}: no module of {type(model).__name__} matches")
    for name, module in found.items():
        if not (isinstance(module, nn.Linear) and module.weight.is_floating_point() and module.weight.ndim == 2):
            raise PartialLoraError(
                f"target_modules={targets}: {name} is a {type(module).__name__}, expected nn.Linear of plain "
                "weights; longer names leave it out"
            )
    return found


def target_names(
    model: nn.Module,
    target_modules: str | Sequence[str],
    head: str | None = None,
    new_modules: Sequence[str] = (),
) -> list[str]:
    """Full names of the modules to adapt, in the model's order; raises as `target_linears` does."""
    return list(target_linears(model, target_modules, head, new_modules))
