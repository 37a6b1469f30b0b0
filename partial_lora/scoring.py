"""What a frozen model is worth on a handful of examples, evaluated again and again with one module altered.

A score is anything that can be called as `score(model) -> float`, larger = better. A score that also has `bounds` says
only as much as is needed to decide a question about it, and does not compute again what the altered module cannot have
changed. Both give the numbers of a full pass: they save time and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from partial_lora.errors import PartialLoraError

Bounds = tuple[float, float]
ANYTHING: Bounds = (0.0, 1.0)


class Score(Protocol):
    """What a model is worth; larger = better."""

    def __call__(self, model: nn.Module) -> float: ...


@runtime_checkable
class BoundedScore(Protocol):
    """A score that can stop as soon as a question about it is decided."""

    def __call__(self, model: nn.Module) -> float: ...

    def bounds(
        self,
        model: nn.Module,
        module: str,
        undecided: Callable[[float, float], bool],
        known: Bounds | None = None,
    ) -> Bounds: ...


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients, for as long as the block lasts; every module's training flag is put back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


@dataclass
class Evaluations:
    """How much work a score has done: passes begun, examples classified, blocks run (one block on one batch)."""

    passes: int = 0
    examples: int = 0
    blocks: int = 0


class FewShotAccuracy:
    """The share of the scored draw that a classifier gets right.

    batches: the scored draw; each holds the model's inputs by name and "labels" (batch,).
    blocks: the name of the model's sequence of blocks, or None for no reuse. Before the block that holds the altered
    module nothing changes, so what enters it is computed once and kept (one copy for each batch, of the latest block
    asked for: going through modules in the model's order costs no pass of its own).

    The first full pass, which must be of the intact model, puts the examples in the order that decides soonest.

    Raises PartialLoraError where `blocks` names no sequence, or one that does not run as a plain sequence.
    """

    def __init__(self, model: nn.Module, batches: Sequence[dict[str, Tensor]], blocks: str | None = None) -> None:
        self.evaluations = Evaluations()
        self.size = sum(len(batch["labels"]) for batch in batches)
        if self.size == 0:
            raise PartialLoraError("batches: the scored draw is empty, expected at least 1 example")
        self._batches = list(batches)
        self._arranged = False
        self._blocks_name = blocks
        self._block_names = [] if blocks is None else _block_names(model, blocks)
        self._entering: dict[int, tuple[int, Any]] = {}  # batch -> (block, output of the block before it)

    def __call__(self, model: nn.Module) -> float:
        """The accuracy by a full pass from the inputs on, whatever was altered."""
        with frozen(model):
            if not self._arranged:
                self._batches, self._arranged = self._arrange(model), True
            return self._count(model, 0, lambda low, high: True, ANYTHING)[0]

    def bounds(
        self, model: nn.Module, module: str, undecided: Callable[[float, float], bool], known: Bounds | None = None
    ) -> Bounds:
        """What is known of the accuracy once `undecided(low, high)` turns False: equal bounds are the accuracy itself.

        model: as it was at the first pass but for the weights of `module`.
        known: bounds that an earlier, cut-short call gave for these very weights; it goes on where that one stopped.
        """
        with frozen(model):
            return self._count(model, self._block_of(module), undecided, known or ANYTHING)

    def _count(self, model: nn.Module, first: int, undecided: Callable[[float, float], bool], known: Bounds) -> Bounds:
        """Go through the batches, only from block `first` on, until the question is decided."""
        self.evaluations.passes += 1
        right, wrong = round(known[0] * self.size), self.size - round(known[1] * self.size)
        unseen = list(enumerate(self._batches))
        seen = 0
        while seen < right + wrong:
            seen += len(unseen.pop(0)[1]["labels"])
        for index, batch in unseen:
            if not undecided(right / self.size, (self.size - wrong) / self.size):
                break
            logits = self._logits(model, index, first)
            if not torch.isfinite(logits).all():
                return float("nan"), float("nan")
            correct = int((logits.argmax(-1) == batch["labels"].to(logits.device)).sum())
            right, wrong = right + correct, wrong + len(batch["labels"]) - correct
        return right / self.size, (self.size - wrong) / self.size

    def _logits(self, model: nn.Module, index: int, first: int) -> Tensor:
        """The logits of batch `index`, where nothing before block `first` differs from the intact model."""
        start, entering = self._entering.get(index, (0, None))
        if start == first or first == 0:
            return self._forward(model, index, first, entering)
        if start > first:
            start, entering = 0, None
        block = model.get_submodule(self._block_names[first - 1])
        kept: list[Any] = []
        hook = block.register_forward_hook(lambda _block, _inputs, output: kept.append(_copy(output)))
        try:
            logits = self._forward(model, index, start, entering)
        finally:
            hook.remove()
        if len(kept) != 1:
            raise self._not_a_sequence(f"block {first - 1} ran {len(kept)} times in one pass")
        self._entering[index] = first, kept[0]
        if index == 0 and torch.isfinite(logits).all():
            again = self._forward(model, index, first, kept[0])
            if not torch.allclose(logits, again, rtol=1e-4, atol=1e-4 * float(logits.abs().max())):
                raise self._not_a_sequence(f"the output depends on more than what leaves block {first - 1}")
        return logits

    def _forward(self, model: nn.Module, index: int, start: int, entering: Any) -> Tensor:
        """A pass of the model's own forward in which the blocks before `start` do nothing but give `entering`."""
        batch = self._batches[index]
        device = next(model.parameters()).device
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        skipped = [model.get_submodule(name) for name in self._block_names[:start]]
        with _replaced_by(skipped, _copy(entering)):
            output = model(**inputs)
        self.evaluations.examples += len(batch["labels"])
        self.evaluations.blocks += len(self._block_names) - start
        return getattr(output, "logits", output)

    def _block_of(self, module: str) -> int:
        """The position of the block that holds a module; 0, where nothing can be skipped, if none does."""
        for position, block in enumerate(self._block_names):
            if module == block or module.startswith(f"{block}."):
                return position
        return 0

    def _arrange(self, model: nn.Module) -> list[dict[str, Tensor]]:
        """The same examples in batches of the same size, in the order that decides soonest."""
        logits = torch.cat([self._logits(model, index, 0).float().cpu() for index in range(len(self._batches))])
        parts = {name: [batch[name] for batch in self._batches] for name in self._batches[0]}
        if any(len({part.shape[1:] for part in of_name}) > 1 for of_name in parts.values()):
            return self._batches  # inputs of several lengths: padded together as the caller put them
        whole = {name: torch.cat(of_name) for name, of_name in parts.items()}
        order = _soonest_first(logits, whole["labels"].cpu())
        sizes = [len(batch["labels"]) for batch in self._batches]
        return [{name: value[chosen] for name, value in whole.items()} for chosen in order.split(sizes)]

    def _not_a_sequence(self, reason: str) -> PartialLoraError:
        return PartialLoraError(
            f"model.blocks={self._blocks_name}: expected blocks that run one after the other; {reason}; set it to null"
        )


def _block_names(model: nn.Module, blocks: str) -> list[str]:
    try:
        container = model.get_submodule(blocks)
    except AttributeError as error:
        raise PartialLoraError(f"model.blocks={blocks}: no such module; set it to null for no reuse") from error
    if not isinstance(container, (nn.ModuleList, nn.Sequential)):
        raise PartialLoraError(
            f"model.blocks={blocks}: expected a ModuleList or Sequential, found {type(container).__name__}; "
            "set it to null for no reuse"
        )
    return [f"{blocks}.{name}" for name, _ in container.named_children()]


def _soonest_first(logits: Tensor, labels: Tensor) -> Tensor:
    """The examples that the intact model gets right, largest margin first, then those that it gets wrong.

    Most levels that are tried pass, and to pass a level needs so many examples right: those that stay right longest
    come first, those that are wrong anyway last. (On digits this order saved as much as the opposite one at threshold
    0.9, and a tenth more at 0.5.)
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    best_other = logits.scatter(1, labels[:, None], float("-inf")).max(1).values
    return (own - best_other).argsort(descending=True, stable=True)


def _copy(output: Any) -> Any:
    """Tensors of their own, in whatever tuple or dict a block gives: a later block may write into its input."""
    return pytree.tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, output)


@contextmanager
def _replaced_by(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Let every block give `output` without running; what a block had as its forward comes back afterwards."""
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
