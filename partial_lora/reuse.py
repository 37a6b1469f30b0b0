"""Passes over the same batches, again and again, that compute only what one altered module can have changed.

What enters the block of that module is kept for every batch, and inside the block what does not depend on the module is
replayed (replay.py). Both within a number of bytes; past it, a pass starts at an earlier block or at the inputs. The
outputs are those of a full pass, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from partial_lora.errors import PartialLoraError
from partial_lora.replay import Record, Recorder, Snapshot, replayed, storages, wrapped


@dataclass
class _Plan:
    """What a pass with one module altered may leave out: the blocks before `block`, and calls of `followed` modules."""

    model: nn.Module
    module: str
    block: int
    altered: list[str]
    followed: dict[str, nn.Module]


class Reuse:
    """Runs a model on numbered batches; says in `ran` how many of its blocks the latest pass has run.

    blocks: the name of the model's sequence of blocks, or None to compute everything, which counts as one. memory:
    bytes that may be kept between passes, each piece of memory counted once and whole.

    Raises PartialLoraError where `blocks` names no sequence, or one that does not run as a plain sequence.
    """

    def __init__(self, model: nn.Module, blocks: str | None, memory: int) -> None:
        if memory < 0:
            raise PartialLoraError(f"calibration.memory={memory}: expected a number of bytes, 0 to keep nothing")
        self.ran = 0
        self._blocks, self._memory = blocks, memory
        self._names = [] if blocks is None else block_names(model, blocks)
        self._entering: dict[tuple[int, int], Snapshot] = {}  # (batch, block) -> what enters it in the intact model
        self._records: dict[int, Record] = {}  # batch -> calls inside the block of the latest module
        self._plan: _Plan | None = None
        self._block_of: dict[str, int] = {}
        self._written: set[int] = set()  # blocks that write into what enters them
        self._checked: set[int] = set()  # blocks whose output was seen to depend on nothing but what enters them
        self._called: set[str] | None = None  # modules that the model's forward calls

    @property
    def bytes(self) -> int:
        """The memory that is kept between passes."""
        kept = [*self._entering.values()]
        for record in self._records.values():
            kept += record.snapshots()
        return sum(storages(kept).values())

    def full(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
        """The model's output by a pass in which everything is computed."""
        return self._forward(model, inputs, 0, None)

    def altered(self, model: nn.Module, inputs: Mapping[str, Tensor], batch: int, module: str) -> Any:
        """The model's output where only `module` differs from the intact model; `inputs` are those of `batch`."""
        plan = self._planned(model, module)
        self._forget_changed(batch)
        start = max((block for of, block in self._entering if of == batch and block <= plan.block), default=0)
        record = self._records.get(batch)
        if start == plan.block and record is not None and record.module == module:
            with replayed(plan.followed, record):
                return self._forward(model, inputs, start, batch)
        return self._recorded(plan, inputs, batch, start)

    def settled(self, module: str) -> None:
        """From now on the intact model is the one with this module as it is: what depends on it is forgotten."""
        block = self._block_of.get(module, 0)
        self._records.clear()
        self._entering = {place: state for place, state in self._entering.items() if place[1] <= block}

    def _recorded(self, plan: _Plan, inputs: Mapping[str, Tensor], batch: int, start: int) -> Any:
        """A pass from block `start` on that keeps what the next one with the same batch and module can leave out."""
        entering = [self._entering[batch, start]] if start else []
        recorder = Recorder(plan.followed, plan.module, plan.altered, self._records.pop(batch, None), entering)
        leaving: dict[int, list[Snapshot]] = {block: [] for block in range(start + 1, plan.block + 1)}

        def caught(name: str, own: Callable) -> Callable:
            block = self._names.index(name) + 1  # what leaves a block enters the next

            def forward(*args: Any, **kwargs: Any) -> Any:
                output = own(*args, **kwargs)
                snapshot = Snapshot(output)
                leaving[block].append(Snapshot(snapshot.clone()) if block in self._written else snapshot)
                recorder.hold(snapshot)
                return output

            return forward

        between = {name: plan.model.get_submodule(name) for name in self._names[start : plan.block]}
        with wrapped(between, caught), recorder.recording():
            output = self._forward(plan.model, inputs, start, batch)
        ran = self.ran
        for block, snapshots in reversed(leaving.items()):
            if len(snapshots) != 1:
                raise self._not_a_sequence(f"block {block - 1} ran {len(snapshots)} times in one pass")
        for block in sorted(leaving, reverse=True):
            self._keep(batch, block, leaving[block][0], plan)
        # What is written into is given as a copy, which no record of it knows.
        self._records[batch] = Record(plan.module) if plan.block in self._written else recorder.record
        if self.bytes > self._memory:
            self._records[batch] = Record(plan.module)
        if plan.block and plan.block not in self._checked and (batch, plan.block) in self._entering:
            self._check(plan, inputs, batch, output)
            self.ran = ran + len(self._names) - plan.block
        return output

    def _forward(self, model: nn.Module, inputs: Mapping[str, Tensor], start: int, batch: int | None) -> Any:
        """The model's own forward, in which the blocks before `start` do nothing but give what enters it."""
        self.ran = max(1, len(self._names)) - start  # a model that is no sequence is one block
        with ExitStack() as stack:
            if self._called is None:
                stack.enter_context(self._noted(model))
            if start:
                state = self._entering[batch, start]
                given = state.clone() if start in self._written else state.value()
                skipped = {name: model.get_submodule(name) for name in self._names[:start]}
                stack.enter_context(wrapped(skipped, lambda name, own: lambda *args, **kwargs: given))
            return model(**inputs)

    def _noted(self, model: nn.Module) -> Any:
        """Note which modules are called: others lend their weights to a module around them."""
        self._called = called = set()

        def wrapper(name: str, own: Callable) -> Callable:
            return lambda *args, **kwargs: (called.add(name), own(*args, **kwargs))[1]

        return wrapped({name: module for name, module in model.named_modules() if name}, wrapper)

    def _keep(self, batch: int, block: int, state: Snapshot, plan: _Plan) -> None:
        """Keep what enters a block: the altered module's in place of what is needed less, others where room is."""
        if not state.unchanged():
            self._written.add(block)
            return
        self._entering[batch, block] = state
        if block < plan.block:
            if self.bytes > self._memory:
                del self._entering[batch, block]
            return
        while self.bytes > self._memory:
            victim = min(self._entering, key=lambda place: self._need(place, batch, block))
            stale = next(iter(self._records), None)
            if stale is not None:
                del self._records[stale]
            else:
                del self._entering[victim if victim[1] != block else (batch, block)]
            if (batch, block) not in self._entering:
                return

    @staticmethod
    def _need(place: tuple[int, int], batch: int, block: int) -> tuple:
        """Least needed first: later blocks, earlier ones of this batch, then of others, this block's last."""
        of, at = place
        return at == block, at <= block, of != batch, at

    def _forget_changed(self, batch: int) -> None:
        """What somebody has written into is of no use any more."""
        changed = [place for place, state in self._entering.items() if place[0] == batch and not state.unchanged()]
        for place in changed:
            self._written.add(place[1])
            del self._entering[place]
        if changed:
            self._records.pop(batch, None)

    def _check(self, plan: _Plan, inputs: Mapping[str, Tensor], batch: int, output: Any) -> None:
        logits = logits_of(output)
        if not torch.isfinite(logits).all():
            return
        again = logits_of(self._forward(plan.model, inputs, plan.block, batch))
        if not torch.allclose(logits, again, rtol=1e-4, atol=1e-4 * float(logits.abs().max())):
            raise self._not_a_sequence(f"the output depends on more than what leaves block {plan.block - 1}")
        self._checked.add(plan.block)

    def _planned(self, model: nn.Module, module: str) -> _Plan:
        if self._plan is None or self._plan.model is not model or self._plan.module != module:
            self._plan = self._made_plan(model, module)
            self._block_of[module] = self._plan.block
        return self._plan

    def _made_plan(self, model: nn.Module, module: str) -> _Plan:
        modules = dict(model.named_modules())
        weights = {id(parameter) for parameter in model.get_submodule(module).parameters()}
        altered = [  # more than one where weights are tied
            name
            for name, other in modules.items()
            if any(id(parameter) in weights for parameter in other.parameters(recurse=False))
        ]
        blocks = {self._position(name) for name in altered}
        if None in blocks or not blocks:  # it is in no block: nothing is known to be unchanged
            return _Plan(model, module, 0, altered, {})
        block = min(blocks)
        followed = {}
        if len(blocks) == 1 and (self._called is None or self._called.issuperset(altered)):
            followed = {
                name: other
                for name, other in modules.items()
                if name and self._position(name) in (None, block) and not isinstance(other, nn.ModuleList)
            }
        return _Plan(model, module, block, altered, followed)

    def _position(self, module: str) -> int | None:
        """The position of the block that holds a module; None if none does."""
        for position, block in enumerate(self._names):
            if module == block or module.startswith(f"{block}."):
                return position
        return None

    def _not_a_sequence(self, reason: str) -> PartialLoraError:
        return PartialLoraError(
            f"model.blocks={self._blocks}: expected blocks that run one after the other; {reason}; set it to null"
        )


def logits_of(output: Any) -> Tensor:
    """The logits in whatever a model returns."""
    return getattr(output, "logits", output)


def block_names(model: nn.Module, blocks: str) -> list[str]:
    """The full names of a sequence's blocks; raises PartialLoraError, naming model.blocks, where it is none."""
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
