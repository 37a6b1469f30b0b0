"""Target modules: the linear modules to adapt, matched as PEFT matches them; and the chains between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from partial_lora.models.skeleton import skeleton_of


def target_linears(
    model: nn.Module, target_modules: str | Sequence[str], head: str | None = None, new_modules: Sequence[str] = ()
) -> dict[str, nn.Linear]:
    """Return the modules to adapt, by full name in the model's order.

    Takes the arguments of `Skeleton.targets`, and refuses the same.
    """
    shapes = skeleton_of(model).targets(target_modules, head, new_modules)
    return {name: model.get_submodule(name) for name in shapes}


# --- Chains: pairs of linear modules, where the first one's outputs are the second one's inputs, unit by unit.

# (feeding modules, the module they feed), by the ends of their names inside one block. Between the two is at most a
# product, a function of each unit alone, or attention, which mixes positions but not the units of the values.
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
    """Return the chains among the modules with these shapes of W (out, in), in the model's order.

    Where one module holds queries, keys and values, the values are the last third of its rows. Where several query
    heads share a value head, each of its rows feeds one column for each of them.
    """
    head_width, pairs = _head_width(model), []
    for second, (_, inputs) in shapes.items():
        for first in _feeding(second):
            rows = _rows(shapes[first][0], inputs, head_width) if first in shapes else None
            if rows is not None:
                pairs.append(Chain(first, second, rows))
    return pairs


def _feeding(second: str) -> Iterator[str]:
    """Yield the names of the modules that can feed a module, by its own name."""
    for names, end in _CHAINS:
        if second == end or second.endswith(f".{end}"):
            yield from (second.removesuffix(end) + name for name in names)


def _rows(outputs: int, inputs: int, head: int | None) -> np.ndarray | None:
    """Return the row (of `outputs`) that feeds each column; None where the sizes fit no known block."""
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
