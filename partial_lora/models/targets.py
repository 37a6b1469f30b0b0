"""Target modules: the linear ones that are adapted, matched as PEFT matches them; and the chains between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
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
    """Return the modules to adapt, by full name in the model's order.

    target_modules: a list of names or suffixes, or one regular expression, as PEFT's LoraConfig takes them. Raises
    PartialLoraError where nothing matches, or something that is no linear layer with a plain weight. `head` and
    `new_modules` train whole and are no targets: a pattern passes over them, as PEFT does with modules_to_save.
    """
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(target_modules=targets)
    matched = {name: module for name, module in model.named_modules() if check_target_module_exists(config, name)}
    for target in [] if isinstance(targets, str) else targets:
        if not any(name == target or name.endswith(f".{target}") for name in matched):
            raise PartialLoraError(f"target_modules: no module of {type(model).__name__} matches {target!r}")
    for whole in [*new_modules, *([] if head is None else [head])]:
        matched = {
            name: module for name, module in matched.items() if name != whole and not name.startswith(f"{whole}.")
        }
    if not matched:
        raise PartialLoraError(f"target_modules={targets}: no module of {type(model).__name__} matches")
    for name, module in matched.items():
        if not (isinstance(module, nn.Linear) and module.weight.is_floating_point() and module.weight.ndim == 2):
            raise PartialLoraError(
                f"target_modules={targets}: {name} is a {type(module).__name__}, expected nn.Linear of plain "
                "weights; longer names leave it out"
            )
    return matched


def target_names(
    model: nn.Module,
    target_modules: str | Sequence[str],
    head: str | None = None,
    new_modules: Sequence[str] = (),
) -> list[str]:
    """Return the full names of the modules to adapt, in the model's order; raises as `target_linears` does."""
    return list(target_linears(model, target_modules, head, new_modules))


# --- Chains: linear modules of which one's outputs are the next one's inputs, unit by unit.

# (those that feed, what they feed), by the ends of their names inside one block. Between the two is at most a product
# or a function of each unit alone, or attention, which mixes positions and leaves the units of the values apart.
_CHAINS = (
    (("mlp.fc1",), "mlp.fc2"),  # timm
    (("attn.qkv",), "attn.proj"),
    (("intermediate.dense",), "output.dense"),  # BERT, DeBERTa
    (("attention.self.value",), "attention.output.dense"),
    (("attention.self.value_proj",), "attention.output.dense"),
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Qwen
    (("v_proj",), "o_proj"),
)


@dataclass(frozen=True)
class Chain:
    """Module `first` feeds module `second`: column j of the second reads row rows[j] of the first."""

    first: str
    second: str
    rows: np.ndarray


def chains(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> list[Chain]:
    """Return the chains among the modules of the given shapes of W (out, in), in the model's order.

    Of queries, keys and values in one module, the values are the last third of its rows; where several query heads
    share a key and value head, each of its rows feeds as many columns.
    """
    head_width, pairs = _head_width(model), []
    for second, (_, inputs) in shapes.items():
        for feeding, end in _CHAINS:
            if second == end or second.endswith(f".{end}"):
                for first in (second.removesuffix(end) + name for name in feeding):
                    rows = _rows(shapes[first][0], inputs, head_width) if first in shapes else None
                    if rows is not None:
                        pairs.append(Chain(first, second, rows))
    return pairs


def _rows(outputs: int, inputs: int, head: int | None) -> np.ndarray | None:
    """Return the row (of `outputs`) that feeds each column; None for sizes that are of another kind of block."""
    columns = np.arange(inputs)
    if outputs == inputs:
        return columns
    if outputs == 3 * inputs:
        return 2 * inputs + columns
    if head and inputs % outputs == 0 and outputs % head == 0:
        return columns // head // (inputs // outputs) * head + columns % head
    return None


def _head_width(model: nn.Module) -> int | None:
    """Return the width of an attention head; None where the config has none."""
    config = getattr(model, "config", None)
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return getattr(config, "head_dim", None) or (width // heads if width and heads else None)
