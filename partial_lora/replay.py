"""Calls inside a model that an altered module cannot have changed, recorded once and given again.

A model's forward is followed call by call while one module is altered. Whatever is computed before that module is first
called is as in the intact model, and so is a call after it whose inputs are. Of such calls the outermost are recorded
with their outputs; on the next pass over the same batch they return these and compute nothing. What a module returns
must depend on its inputs and weights alone; a call that writes into its inputs, takes anything but tensors and plain
values, or returns what is written into later is never replayed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
Place = tuple[str, int]  # a module's name, and how often it had been called before in this pass


class Snapshot:
    """Tensors in whatever tuple, list or dict a module gives, and whether they are still as they were."""

    def __init__(self, value: Any) -> None:
        self.leaves, self._structure = pytree.tree_flatten(value)
        self._versions = [_version(leaf) for leaf in self.tensors]

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def plain(self) -> bool:
        """Whether all else is values that nobody can write into."""
        return all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in self.leaves)

    def unchanged(self) -> bool:
        """Whether nothing has been written into any tensor since."""
        return all(_version(leaf) == version for leaf, version in zip(self.tensors, self._versions, strict=True))

    def value(self) -> Any:
        """The same tensors in containers of their own."""
        return pytree.tree_unflatten(self.leaves, self._structure)

    def clone(self) -> Any:
        """Tensors of their own, for whoever may write into them."""
        return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.value())

    def identity(self) -> tuple:
        """Equal for the same memory, written into as often: the same content for as long as that memory is held."""
        return self._structure, tuple(map(_identity, self.leaves))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # of inference mode: not to be written into outside it


def _identity(leaf: Any) -> tuple:
    if not isinstance(leaf, Tensor):
        return type(leaf), leaf
    layout = leaf.storage_offset(), leaf.shape, leaf.stride(), leaf.dtype
    return leaf.untyped_storage().data_ptr(), _version(leaf), *layout


def storages(snapshots: Iterable[Snapshot]) -> dict[int, int]:
    """The bytes of every piece of memory that snapshots hold, each once and whole, by its address."""
    return {
        storage.data_ptr(): storage.nbytes()
        for snapshot in snapshots
        for storage in (tensor.untyped_storage() for tensor in snapshot.tensors)
    }


@dataclass
class Call:
    """A recorded call.

    inputs: what they must be for the output to be given; None where the place in the pass is enough, since all that
    comes before the altered module is as it was. inner: the calls that were made inside it.
    """

    output: Snapshot
    inputs: Snapshot | None
    inner: Counter[str]

    @property
    def snapshots(self) -> list[Snapshot]:
        return [self.output] if self.inputs is None else [self.output, self.inputs]

    def holds(self, inputs: Snapshot) -> bool:
        """Whether the output is still what was returned, and the inputs are what they were."""
        return self.output.unchanged() and (self.inputs is None or self.inputs.identity() == inputs.identity())


@dataclass
class Record:
    """What one batch's pass has recorded with `module` altered."""

    module: str
    calls: dict[Place, Call] = field(default_factory=dict)

    def snapshots(self) -> list[Snapshot]:
        return [snapshot for call in self.calls.values() for snapshot in call.snapshots]


@contextmanager
def replayed(modules: Mapping[str, nn.Module], record: Record) -> Iterator[None]:
    """Let recorded calls of `modules` (by name) return what they did, for as long as the block lasts."""
    asked: Counter[str] = Counter()

    def wrapper(name: str, own: Callable) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            place = name, asked[name]
            asked[name] += 1
            call = record.calls.get(place)
            if call is None or not call.holds(Snapshot((args, kwargs))):
                return own(*args, **kwargs)
            asked.update(call.inner)
            return call.output.value()

        return forward

    with wrapped({name: modules[name] for name, _ in record.calls}, wrapper):
        yield


class Recorder:
    """Records a pass with `module` altered, and replays what an `earlier` record of the same batch has for it.

    modules: those whose calls are followed, by name. altered: those of them that use an altered weight. entering: what
    is known to be intact from the start.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        module: str,
        altered: Sequence[str],
        earlier: Record | None,
        entering: Sequence[Snapshot],
    ) -> None:
        self.record = Record(module)
        self._modules, self._altered = modules, altered
        self._earlier = {} if earlier is None else earlier.calls
        self._asked: Counter[str] = Counter()
        self._begun = False  # whether an altered module has been called
        self._intact: dict[int, int] = {}  # memory -> version, of tensors that do not depend on it
        self._held: list[Snapshot] = []  # so that no memory in `_intact` is freed and used for something else
        for snapshot in entering:
            self.hold(snapshot)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Follow a pass; afterwards `record` holds what can be replayed."""
        with wrapped(self._modules, self._wrapper):
            yield
        calls = self.record.calls
        for place in [place for place, call in calls.items() if not call.output.unchanged()]:
            del calls[place]  # something has been written into it since
        if not self._begun:
            calls.clear()  # its weight is read by a module around it: nobody knows what comes before that
        self._held.clear()

    def _wrapper(self, name: str, own: Callable) -> Callable:
        around = any(module == name or module.startswith(f"{name}.") for module in self._altered)

        def forward(*args: Any, **kwargs: Any) -> Any:
            place = name, self._asked[name]
            self._asked[name] += 1
            if around:
                self._begun |= name in self._altered
                return own(*args, **kwargs)
            inputs = Snapshot((args, kwargs))
            call = self._known(place, inputs)
            if call is None:
                begun, before = self._begun, self._asked.copy()
                output = own(*args, **kwargs)
                if begun != self._begun or not self._replayable(name, inputs) or not inputs.unchanged():
                    return output
                call = Call(Snapshot(output), inputs if begun else None, self._asked - before)
                if not (inputs.plain and call.output.plain):
                    return output
            else:
                self._asked.update(call.inner)
            self._keep(place, call)
            return call.output.value()

        return forward

    def _known(self, place: Place, inputs: Snapshot) -> Call | None:
        """What an earlier pass recorded of a call that this one's altered module cannot have changed."""
        call = self._earlier.get(place)
        if call is None or not self._replayable(place[0], inputs) or not call.holds(inputs):
            return None
        return None if self._begun and call.inputs is None else call

    def _replayable(self, name: str, inputs: Snapshot) -> bool:
        """Whether a call computes what it does in the intact model: before the altered module, or beside it."""
        if not self._begun:
            return True
        return next(self._modules[name].children(), None) is None and all(map(self._is_intact, inputs.tensors))

    def _keep(self, place: Place, call: Call) -> None:
        """Record a call in place of those inside it."""
        calls = self.record.calls
        for inner in [inner for inner in calls if inner[0].startswith(f"{place[0]}.")]:
            del calls[inner]
        calls[place] = call
        for snapshot in call.snapshots:
            self.hold(snapshot)

    def hold(self, snapshot: Snapshot) -> None:
        """Take tensors to be as in the intact model, for as long as nothing is written into them."""
        self._held.append(snapshot)
        for tensor in snapshot.tensors:
            self._intact[tensor.untyped_storage().data_ptr()] = _version(tensor)

    def _is_intact(self, tensor: Tensor) -> bool:
        return self._intact.get(tensor.untyped_storage().data_ptr()) == _version(tensor)


@contextmanager
def wrapped(modules: Mapping[str, nn.Module], wrapper: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """Put `wrapper(name, forward)` in the place of every module's forward; what each had comes back afterwards."""
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
