"""Which linear modules feed which: the outputs of one are the inputs of the next, unit by unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

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
    """Module `first` feeds module `second`: column j of the second reads what row rows[j] of the first gives."""

    first: str
    second: str
    rows: np.ndarray


def chains(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> list[Chain]:
    """Those among the modules of the given shapes of W (out, in) that feed each other, in the model's order.

    Of queries, keys and values in one module, the values are the last third of its rows; where several query heads
    share a key and value head, each of its rows feeds as many columns.
    """
    return list(_chains(shapes, _head_width(model)))


def _chains(shapes: Mapping[str, tuple[int, int]], head: int | None) -> Iterator[Chain]:
    for second, (_, inputs) in shapes.items():
        for ends, end in _CHAINS:
            if second != end and not second.endswith(f".{end}"):
                continue
            for first in (second.removesuffix(end) + each for each in ends):
                rows = _rows(shapes[first][0], inputs, head) if first in shapes else None
                if rows is not None:
                    yield Chain(first, second, rows)


def _rows(outputs: int, inputs: int, head: int | None) -> np.ndarray | None:
    """The row (of `outputs`) that feeds each column; None for sizes that are of another kind of block."""
    columns = np.arange(inputs)
    if outputs == inputs:
        return columns
    if outputs == 3 * inputs:
        return 2 * inputs + columns
    if head and inputs % outputs == 0 and outputs % head == 0:
        return columns // head // (inputs // outputs) * head + columns % head
    return None


def _head_width(model: nn.Module) -> int | None:
    """The width of an attention head; None where the model does not say."""
    config = getattr(model, "config", None)
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return getattr(config, "head_dim", None) or (width // heads if width and heads else None)
