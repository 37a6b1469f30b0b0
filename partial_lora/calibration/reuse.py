"""Passes over the same batches, again and again, that compute only what one altered module can have changed.

Of every batch what entered the latest altered block is kept, up to a number of bytes. A pass starts there, or at the
inputs where the altered module is in an earlier block. The outputs equal those of a full pass, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from partial_lora.errors import PartialLoraError


class Reuse:
    """A model's passes over numbered batches; `ran` is the number of blocks that the latest pass has run.

    blocks: the name of the model's sequence of blocks, or None to compute everything, which counts as one block.
    memory: bytes that may be kept between passes.

    Raises PartialLoraError where `blocks` names no sequence, or one that does not run as a plain sequence.
    """

    def __init__(self, model: nn.Module, blocks: str | None, memory: int) -> None:
        self.ran = 0
        self._blocks, self._memory = blocks, memory
        self._names = [] if blocks is None else block_names(model, blocks)
        self._entering: dict[int, tuple[int, Any]] = {}  # batch -> (block, what enters it in the intact model)
        self._block_of: dict[str, int] = {}
        self._checked: set[int] = set()  # blocks whose output was seen to depend on nothing but what enters them

    @property
    def depth(self) -> int:
        """Blocks of a full pass."""
        return len(self._names) or 1

    @property
    def bytes(self) -> int:
        """Bytes that are kept between passes."""
        leaves = pytree.tree_leaves(list(self._entering.values()))
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))

    def full(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
        """Return the model's output by a pass in which everything is computed."""
        return self._forward(model, inputs, 0)

    def altered(self, model: nn.Module, inputs: Mapping[str, Tensor], batch: int, module: str) -> Any:
        """Return the model's output for the `inputs` of `batch`, where only `module` differs from the intact model."""
        if module not in self._block_of:
            self._block_of[module] = self._first_block(model, module)
        target = self._block_of[module]
        start, entering = self._entering.get(batch, (0, None))
        if start == target:
            return self._forward(model, inputs, start, entering)
        if start > target:
            start = 0
        left: list[Any] = []  # what leaves the block before the target enters the target

        def recorded(name: str, own: Callable) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                output = own(*args, **kwargs)
                left.append(_copy(output))
                return output

            return forward

        before = self._names[max(target - 1, 0) : target]
        with wrapped({name: model.get_submodule(name) for name in before}, recorded):
            output = self._forward(model, inputs, start, entering)
        if len(left) != len(before):
            raise self._not_a_sequence(f"block {target - 1} ran {len(left)} times in one pass")
        if left:
            self._entering[batch] = target, left[0]
            if self.bytes > self._memory:
                del self._entering[batch]
            elif target not in self._checked:
                self._check(model, inputs, target, left[0], output)
        return output

    def settled(self, module: str) -> None:
        """Treat this module, as it is now, as intact from here on: what depends on it is forgotten."""
        settled = self._block_of.get(module, 0)
        self._entering = {batch: kept for batch, kept in self._entering.items() if kept[0] <= settled}

    def _first_block(self, model: nn.Module, module: str) -> int:
        """Return the first block that uses a weight of this module; 0 where a module outside of all blocks uses one."""
        weights = {id(parameter) for parameter in model.get_submodule(module).parameters()}
        blocks = {
            next((block for block, own in enumerate(self._names) if f"{name}.".startswith(f"{own}.")), 0)
            for name, other in model.named_modules()
            if any(id(parameter) in weights for parameter in other.parameters(recurse=False))  # tied weights, too
        }
        return min(blocks, default=0)

    def _forward(self, model: nn.Module, inputs: Mapping[str, Tensor], start: int, entering: Any = None) -> Any:
        """Run the model's own forward, in which the blocks before `start` only return what enters block `start`."""
        self.ran = self.depth - start
        skipping = nullcontext()
        if start:
            skipped, own = {name: model.get_submodule(name) for name in self._names[:start]}, _copy(entering)
            skipping = wrapped(skipped, lambda name, forward: lambda *args, **kwargs: own)
        with skipping:
            return model(**inputs)

    def _check(self, model: nn.Module, inputs: Mapping[str, Tensor], block: int, entering: Any, output: Any) -> None:
        """Raise PartialLoraError where the model's output depends on more than what enters a block."""
        logits = logits_of(output)
        if not torch.isfinite(logits).all():
            return
        ran = self.ran
        again = logits_of(self._forward(model, inputs, block, entering))
        self.ran += ran
        if not torch.allclose(logits, again, rtol=1e-4, atol=1e-4 * float(logits.abs().max())):
            raise self._not_a_sequence(f"the output depends on more than what leaves block {block - 1}")
        self._checked.add(block)

    def _not_a_sequence(self, reason: str) -> PartialLoraError:
        return PartialLoraError(
            f"model.blocks={self._blocks}: expected blocks that run one after the other; {reason}; set it to null"
        )


@contextmanager
def wrapped(modules: Mapping[str, nn.Module], wrapper: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """Put `wrapper(name, forward)` in the place of every module's forward, and put the forward back afterwards."""
    own = {name: vars(module).get("forward") for name, module in modules.items()}
    for name, module in modules.items():
        module.forward = wrapper(name, module.forward)
    try:
        yield
    finally:
        for name, module in modules.items():
            if own[name] is None:
                del module.forward
            else:
                module.forward = own[name]


def _copy(value: Any) -> Any:
    """Return tensors in whatever tuple, list or dict a module returns, in memory that no block writes into."""
    return pytree.tree_map_only(Tensor, torch.clone, value)


def logits_of(output: Any) -> Tensor:
    """Return the logits in whatever a model returns."""
    return getattr(output, "logits", output)


def block_names(model: nn.Module, blocks: str) -> list[str]:
    """Return the full names of a sequence's blocks. Raises PartialLoraError, naming model.blocks, where it is none."""
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
