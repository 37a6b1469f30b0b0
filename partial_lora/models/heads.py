"""The one part of a model that is new for a task: what it tells apart, and the numbers it starts from.

Every method has to start from the same head, so it depends on the caller's seed and on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from partial_lora.errors import PartialLoraError


def outputs(labels: Sequence[str], name: str) -> dict[str, object]:
    """What a config says of a model's outputs: one for each label, or a single real number where there are none."""
    if not labels:
        return {"num_labels": 1, "problem_type": "regression"}
    if len(labels) < 2:
        raise PartialLoraError(f"model={name}: expected at least two labels to tell apart, got {list(labels)}")
    return {
        "num_labels": len(labels),
        "problem_type": None,  # which transformers then sees by the labels; the weights may have been for another
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def draw(head: nn.Linear, std: float) -> None:
    """New numbers from torch's global generator, as transformers draws a new classifier; the same in every dtype."""
    with torch.no_grad():
        head.weight.copy_(nn.init.normal_(torch.empty(head.weight.shape, dtype=torch.float32), std=std))
        if head.bias is not None:
            head.bias.zero_()


def in_full_precision(module: nn.Module) -> None:
    """Weights of a module that trains whole in float32, whatever it is given: steps are too small for 16 bits."""
    if all(parameter.dtype == torch.float32 for parameter in module.parameters()):
        return
    module.float().register_forward_pre_hook(_as_float)


def _as_float(module: nn.Module, inputs: tuple) -> tuple:
    return tuple(value.float() if isinstance(value, Tensor) else value for value in inputs)


@contextmanager
def own_generator() -> Iterator[None]:
    """Draw from a fixed seed for a while, and leave torch's global CPU generator as it was."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed the accelerators too
    try:
        yield
    finally:
        torch.set_rng_state(state)
