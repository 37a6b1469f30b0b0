"""Passes over the same batches, again and again, that compute only what one altered module can have changed.

What enters the block of that module is kept for every batch, up to a number of bytes; beyond that, a pass starts at an
earlier block or at the inputs. The outputs equal those of a full pass, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from partial_lora.errors import PartialLoraError


class Snapshot:
    """Tensors in whatever tuple, list or dict a module returns, and whether they are still as they were."""

    def __init__(self, value: Any) -> None:
        self._leaves, self._structure = pytree.tree_flatten(value)
        self.tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        self._versions = [_version(tensor) for tensor in self.tensors]

    def unchanged(self) -> bool:
        """Return True where nothing has been written into any tensor since."""
        return [_version(tensor) for tensor in self.tensors] == self._versions

    def value(self, *, copy: bool = False) -> Any:
        """Return the tensors in new containers; copy: copies of them, for code that may write into them."""
        value = pytree.tree_unflatten(self._leaves, self._structure)
        return (
            pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value) if copy else value
        )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors cannot be written into outside that mode


class Reuse:
    """A model's passes over numbered batches; `ran` is the number of blocks that the latest pass has run.

    blocks: the name of the model's sequence of blocks, or None to compute everything, which counts as one block.
    memory: bytes that may be kept between passes, each piece of memory counted once and whole.

    Raises PartialLoraError where `blocks` names no sequence, or one that does not run as a plain sequence.
    """

    def __init__(self, model: nn.Module, blocks: str | None, memory: int) -> None:
        self.ran = 0
        self._blocks, self._memory = blocks, memory
        self._names = [] if blocks is None else block_names(model, blocks)
        self._entering: dict[tuple[int, int], Snapshot] = {}  # (batch, block) -> what enters it in the intact model
        self._block_of: dict[str, int] = {}
        self._written: set[int] = set()  # blocks that write into what enters them
        self._checked: set[int] = set()  # blocks whose output was seen to depend on nothing but what enters them

    @property
    def depth(self) -> int:
        """Blocks of a full pass."""
        return len(self._names) or 1

    @property
    def bytes(self) -> int:
        """Bytes that are kept between passes."""
        storages = (tensor.untyped_storage() for state in self._entering.values() for tensor in state.tensors)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def full(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
        """Return the model's output by a pass in which everything is computed."""
        return self._forward(model, inputs, 0, None)

    def altered(self, model: nn.Module, inputs: Mapping[str, Tensor], batch: int, module: str) -> Any:
        """Return the model's output for the `inputs` of `batch`, where only `module` differs from the intact model."""
        target = self.first_block(model, module)
        for place in [place for place, state in self._entering.items() if place[0] == batch and not state.unchanged()]:
            self._written.add(place[1])
            del self._entering[place]
        start = max((block for number, block in self._entering if number == batch and block <= target), default=0)
        leaving: dict[int, list[Snapshot]] = {block: [] for block in range(start + 1, target + 1)}

        def recorded(name: str, original: Callable) -> Callable:
            block = self._names.index(name) + 1  # what leaves a block enters the next

            def forward(*args: Any, **kwargs: Any) -> Any:
                output = original(*args, **kwargs)
                state = Snapshot(output)
                leaving[block].append(Snapshot(state.value(copy=True)) if block in self._written else state)
                return output

            return forward

        with wrapped({name: model.get_submodule(name) for name in self._names[start:target]}, recorded):
            output = self._forward(model, inputs, start, batch)
        ran = self.ran
        for block, states in reversed(leaving.items()):
            if len(states) != 1:
                raise self._not_a_sequence(f"block {block - 1} ran {len(states)} times in one pass")
            self._keep(batch, block, states[0], target)
        if target and target not in self._checked and (batch, target) in self._entering:
            self._check(model, inputs, batch, target, output)
            self.ran = ran + len(self._names) - target
        return output

    def settled(self, module: str) -> None:
        """Treat this module, as it is now, as intact from here on: what depends on it is forgotten."""
        block = self._block_of.get(module, 0)
        self._entering = {place: state for place, state in self._entering.items() if place[1] <= block}

    def first_block(self, model: nn.Module, module: str) -> int:
        """Return the first block that uses a weight of this module; 0 where a module outside of all blocks uses one."""
        if module in self._block_of:
            return self._block_of[module]
        weights = {id(parameter) for parameter in model.get_submodule(module).parameters()}
        users = [
            name
            for name, user in model.named_modules()
            if any(id(parameter) in weights for parameter in user.parameters(recurse=False))  # tied weights, too
        ]
        self._block_of[module] = min(map(self._block_around, users), default=0)
        return self._block_of[module]

    def _block_around(self, module: str) -> int:
        """Return the block that a module is or is part of; 0 for a module outside of all blocks."""
        return next((block for block, name in enumerate(self._names) if f"{module}.".startswith(f"{name}.")), 0)

    def _forward(self, model: nn.Module, inputs: Mapping[str, Tensor], start: int, batch: int | None) -> Any:
        """Run the model's own forward, in which the blocks before `start` only return what enters block `start`."""
        self.ran = max(1, len(self._names)) - start  # a model that is no sequence is one block
        skipping = nullcontext()
        if start:
            entering = self._entering[batch, start].value(copy=start in self._written)
            skipped = {name: model.get_submodule(name) for name in self._names[:start]}
            skipping = wrapped(skipped, lambda name, original: lambda *args, **kwargs: entering)
        with skipping:
            return model(**inputs)

    def _keep(self, batch: int, block: int, state: Snapshot, target: int) -> None:
        """Keep what enters a block: of the target in place of what is needed less, of others where there is room."""
        if not state.unchanged():
            self._written.add(block)
            return
        self._entering[batch, block] = state
        if block < target:
            if self.bytes > self._memory:
                del self._entering[batch, block]
            return

        def need(place: tuple[int, int]) -> tuple:
            """Order blocks as they are given up: later ones, earlier ones of this batch, of others, this block last."""
            kept_batch, kept_block = place
            return kept_block == block, kept_block <= block, kept_batch != batch, kept_block

        while self.bytes > self._memory and (batch, block) in self._entering:
            victim = min(self._entering, key=need)
            del self._entering[victim if victim[1] != block else (batch, block)]

    def _check(self, model: nn.Module, inputs: Mapping[str, Tensor], batch: int, block: int, output: Any) -> None:
        """Raise PartialLoraError where the model's output depends on more than what enters a block."""
        logits = logits_of(output)
        if not torch.isfinite(logits).all():
            return
        again = logits_of(self._forward(model, inputs, block, batch))
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
    forwards = {name: vars(module).get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.forward = wrapper(name, module.forward)
        yield
    finally:
        for name, module in modules.items():
            if forwards[name] is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forwards[name]


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
