"""Importance that takes examples to see: what the loss, or what enters a module, says about its rows and columns.

Such a measure looks at all modules at once, and gives the model back bit for bit: weights, gradients, and whether a
parameter trains and a module is in training. The examples are the fit draw, never the scored one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from partial_lora.errors import PartialLoraError

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
Scores = tuple[Tensor, Tensor]


def snip(
    model: nn.Module, modules: Mapping[str, nn.Linear], batches: Sequence[Batch], *, loss: Loss, seed: int = 0
) -> dict[str, Scores]:
    """How much the loss hangs on each entry, |W * dL/dW|, summed over the row (column).

    L is the mean loss of all examples and the absolute value is taken of its gradient, so gradients are first summed
    over the batches: one copy of the modules' weights in float32 is held, and the gradients of one batch. Weights are
    as pre-trained, where the source draws them anew.
    Source: SNIP, Lee, Ajanthan and Torr 2019 (arXiv 1810.02340), the connection sensitivity of section 4.1, without its
    division by the sum of all entries.
    Raises PartialLoraError for a module that the loss does not depend on.
    """
    gradients = mean_gradients(model, modules, batches, loss)
    scores = {}
    for name, gradient in gradients.items():
        entries = (modules[name].weight.detach().to(gradient.dtype) * gradient).abs()
        scores[name] = entries.sum(1, dtype=torch.float64), entries.sum(0, dtype=torch.float64)
    return scores


def mean_gradients(
    model: nn.Module, modules: Mapping[str, nn.Linear], batches: Sequence[Batch], loss: Loss
) -> dict[str, Tensor]:
    """The gradient of the mean loss of all examples for the weight of each module, in float32 or better."""
    total = sum(map(examples, batches))
    sums: dict[str, Tensor] = {}
    with lent(model, modules):
        for batch in batches:
            for name, gradient in gradients(model, modules, batch, loss).items():
                share = gradient.to(precise(gradient)) * (examples(batch) / total)
                sums[name] = sums[name].add_(share) if name in sums else share
    return {name: sums[name] for name in modules}


def gradients(model: nn.Module, modules: Mapping[str, nn.Linear], batch: Batch, loss: Loss) -> dict[str, Tensor]:
    """The gradient of the loss of one batch for the weight of each module; for use within `lent`."""
    with torch.enable_grad():
        value = loss(model, on_device_of(model, batch))
        weights = [module.weight for module in modules.values()]
        found = torch.autograd.grad(value, weights, allow_unused=True) if value.requires_grad else [None] * len(weights)
    for name, gradient in zip(modules, found, strict=True):
        if gradient is None:
            raise PartialLoraError(f"importance: the loss does not depend on the weight of {name}; leave it out")
    return dict(zip(modules, found, strict=True))


def activation(
    model: nn.Module, modules: Mapping[str, nn.Linear], batches: Sequence[Batch], *, loss: Loss, seed: int = 0
) -> dict[str, Scores]:
    """How much each entry carries, |W_ij| * |x_j|, summed over the row (column).

    |x_j| is the norm of input feature j over all tokens of all examples. Tokens that the batch's attention_mask (batch,
    tokens) leaves out do not count, wherever a module's input has one row a token; in an encoder-decoder, where the
    mask is of the encoder alone, all tokens count. The source compares entries within a row and needs no sum; here a
    whole row or column goes, and like snip's, the scores of entries that go together add up.
    Source: Wanda, Sun, Liu, Bair and Kolter 2024 (arXiv 2306.11695), equation 1. `loss` decides how the model is run.
    Raises PartialLoraError for a module that no input reaches.
    """
    squares: dict[str, Tensor] = {}
    masks: list[Tensor | None] = [None]

    def see(module: nn.Module, args: tuple, kwargs: dict, name: str) -> None:
        entering = (args or tuple(kwargs.values()))[0]
        tokens = counted(entering, masks[0]).float().square().sum(0, dtype=torch.float64)
        squares[name] = squares.get(name, 0) + tokens

    hooks = [
        module.register_forward_pre_hook(partial(see, name=name), with_kwargs=True) for name, module in modules.items()
    ]
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    try:
        with lent(model), torch.no_grad():
            for batch in batches:
                masks[0] = None if both else batch.get("attention_mask")
                loss(model, on_device_of(model, batch))
    finally:
        for hook in hooks:
            hook.remove()
    scores = {}
    for name, module in modules.items():
        if name not in squares:
            raise PartialLoraError(f"importance: no input of the fit draw reaches {name}; leave it out")
        entries = module.weight.detach().abs().double() * squares[name].sqrt()
        scores[name] = entries.sum(1), entries.sum(0)
    return scores


def counted(entering: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens (tokens, features) of a module's input that no mask leaves out."""
    flat = entering.detach().reshape(-1, entering.shape[-1])
    if mask is None or mask.ndim != 2 or entering.shape[:-1] not in (mask.shape, (mask.numel(),)):
        return flat
    return flat[mask.flatten().to(flat.device) != 0]


def task_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss where it gives one, else the mean cross entropy of its logits (batch, classes)."""
    known = inspect.signature(model.forward).parameters.values()
    takes_labels = any(one.name == "labels" or one.kind is inspect.Parameter.VAR_KEYWORD for one in known)
    output = model(**{name: value for name, value in batch.items() if takes_labels or name != "labels"})
    own = getattr(output, "loss", None)
    if own is not None:
        return own
    logits, labels = getattr(output, "logits", output), batch.get("labels")
    if not isinstance(logits, Tensor) or labels is None or labels.is_floating_point() or logits.ndim != 2:
        raise PartialLoraError(
            f"importance: {type(model).__name__} gives no loss, and none can be made of what it gives; pass `loss`"
        )
    return functional.cross_entropy(logits.float(), labels)


@contextmanager
def lent(model: nn.Module, trained: Mapping[str, nn.Linear] | None = None) -> Iterator[None]:
    """Dropout off, and gradients for the weights of these modules alone, for as long as the block lasts.

    A classifier of transformers that computes a loss writes down of what type; that is put back too.
    """
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    flags = [(module, module.training) for module in model.modules()]
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        for parameter, _ in trains:
            parameter.requires_grad_(False)
        for module in (trained or {}).values():
            module.weight.requires_grad_(True)
        yield
    finally:
        for parameter, required in trains:
            parameter.requires_grad_(required)
        for module, training in flags:
            module.training = training
        if getattr(config, "problem_type", None) != problem:
            config.problem_type = problem


def examples(batch: Batch) -> int:
    """How many examples a batch holds."""
    return len(batch["labels"] if "labels" in batch else next(iter(batch.values())))


def on_device_of(model: nn.Module, batch: Batch) -> Batch:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


def precise(tensor: Tensor) -> torch.dtype:
    """float32, or the tensor's own type where that is better."""
    return torch.promote_types(tensor.dtype, torch.float32)
