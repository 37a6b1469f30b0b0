"""The cost of a training: parameters, counted on the model that trains, bytes on disk and in memory, time of a step.

Parameters are counted after masking, with the task head apart (`measured`); bytes and time are measured while the model
trains (`Cost`). `building.size` says beforehand what these come to.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import TrainerCallback

from partial_lora.adapter.model import base_name
from partial_lora.budget import counts_of, with_bytes
from partial_lora.errors import PartialLoraError
from partial_lora.models import size_of

_TIMED = 1000  # last steps whose times the median is of
_WARM = 2  # by this step everything exists that lasts

# Parameters

_ADAPTER = "default"  # PEFT's name of a run's adapter


def describe_adapted(
    adapted: PeftModel, head: str | None, *, new_modules: Sequence[str] = (), dense: int
) -> dict[str, int | float | None]:
    """Return what `size.describe` returns, counted on an adapter that masks nothing and may be on the meta device."""
    saved = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return with_bytes(
        measured(adapted, head, new_modules=new_modules, dense=dense),
        adapter_bytes=sum(tensor.numel() * tensor.itemsize for tensor in saved.values()),
    )


def measured(
    model: nn.Module, head: str | None, new_modules: Sequence[str] = (), *, dense: int
) -> dict[str, int | float | None]:
    """Return the parameters of a model that is set up to train, counted on its tensors, never on its settings.

    `model` is a PeftModel, or a plain model whose head alone trains. Trainable means `requires_grad`; `new_modules`,
    which train whole, too, are counted with the head. `dense` is the size of dense LoRA, with which a method is
    compared. Where every weight trains, all but the head are the adapter's. `saturated_modules` counts the modules that
    train at least as many numbers as they can change entries of W (`budget.saturated`). Raises PartialLoraError, naming
    the parameter, where one outside of these trains: no column of a table would count it.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    # Under PEFT, each with the frozen module it was copied from.
    heads = [model.get_submodule(name) for name in (*filter(None, [head]), *new_modules)]
    in_heads = {id(parameter) for module in heads for parameter in module.parameters()}
    adapter_parts = _adapter_parts(layers) if layers else _copies(model)
    base = 0
    for name, parameter in model.named_parameters():
        if id(parameter) in in_heads or id(parameter) in adapter_parts:
            continue
        if parameter.requires_grad:
            raise PartialLoraError(
                f"{name} trains but is neither in the adapter nor in {head or 'a head'}: expected it frozen"
            )
        base += size_of(parameter)
    trained = [parameter for key, parameter in adapter_parts.items() if key not in in_heads]
    in_head = [parameter for module in heads for parameter in module.parameters()]
    return counts_of(
        base=base,
        dense=dense if trained else 0,
        trainable=sum(parameter.numel() for parameter in trained if parameter.requires_grad),
        head=sum(parameter.numel() for parameter in in_head if parameter.requires_grad),
        modules=sum(any(_ADAPTER in getattr(layer, name) for name in layer.adapter_layer_names) for layer in layers),
        saturated=sum(_is_saturated(layer) for layer in layers if isinstance(layer, LoraLayer)),
    )


def _is_saturated(layer: LoraLayer) -> bool:
    """Return True where A and B train at least as many numbers as W has entries in the rows and columns they touch."""
    factors = [part[_ADAPTER] for part in (layer.lora_B, layer.lora_A) if _ADAPTER in part]
    if len(factors) < 2 or not all(isinstance(factor, nn.Module) for factor in factors):  # AdaLoRA's are parameters
        return False
    sizes = zip(factors, (layer.out_features, layer.in_features), strict=True)
    rows, columns = (getattr(factor, "touched", size) for factor, size in sizes)
    trained = [sum(part.numel() for part in factor.parameters() if part.requires_grad) for factor in factors]
    return all(trained) and sum(trained) >= rows * columns


def _adapter_parts(layers: Sequence[BaseTunerLayer]) -> dict[int, nn.Parameter]:
    """Return the parameters, by id, that PEFT's layers have beside the modules they adapt."""
    adapted = {id(parameter) for layer in layers for parameter in layer.get_base_layer().parameters()}
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    return {id(parameter): parameter for parameter in parameters if id(parameter) not in adapted}


def _copies(model: nn.Module) -> dict[int, nn.Parameter]:
    """Return the parameters, by id, of PEFT's copies of whole modules."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return {id(weight): weight for wrapper in wrappers for weight in wrapper.modules_to_save.parameters()}


# Memory that a forward pass keeps for its backward pass: every storage once and whole.

# Distinct storages by identity: while they are held here, no other storage can get the same one.
Storages = dict[int, torch.UntypedStorage]


@dataclass
class Kept:
    """Bytes that a forward pass keeps; None until it is over."""

    bytes: int | None = None


@contextmanager
def kept_by_forward(kind: str = "cpu") -> Iterator[Kept]:
    """Count what the forward passes inside the block keep, on devices of the kind.

    This is what autograd saves, and tensors that exist at the end in any other way (an attribute of an autograd
    function, say), without what existed before: parameters, buffers, indices, optimizer state, the batch. So it is best
    used after a first step, when everything that lasts exists. Draws no random number.
    """
    before, saved, kept = alive(kind), {}, Kept()

    def save(tensor: Tensor) -> Tensor:
        saved.update(storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        yield kept
    kept.bytes = total({**saved, **alive(kind)}, without=before)


def storages(tensors: Iterable[Tensor]) -> Storages:
    """Return the storages of tensors: one each, or two for a sparse one."""
    pieces = {}
    for tensor in tensors:
        for part in (tensor._indices(), tensor._values()) if tensor.layout is torch.sparse_coo else (tensor,):
            with suppress(RuntimeError):  # FSDP frees memory while its tensor lives
                if part.untyped_storage().nbytes():
                    pieces[part.untyped_storage()._cdata] = part.untyped_storage()
    return pieces


def alive(kind: str = "cpu") -> Storages:
    """Return the storages of all tensors that Python can see on devices of the kind."""
    gc.collect()
    tensors = (value for value in gc.get_objects() if issubclass(type(value), Tensor))  # isinstance wakes lazy objects
    return storages(tensor for tensor in tensors if tensor.device.type == kind)


def total(pieces: Storages, *, without: Storages) -> int:
    """Return the bytes of the storages that are not among `without`."""
    return sum(piece.nbytes() for key, piece in pieces.items() if key not in without)


def tensors_in(state: Iterable[Mapping]) -> Iterator[Tensor]:
    """Return the tensors of an optimizer's state."""
    return (value for entry in state for value in entry.values() if isinstance(value, Tensor))


# Measurements of a training

Moment = float | torch.cuda.Event  # seconds, or a place in the queue of a GPU


class Cost(TrainerCallback):
    """Measure the time of training's steps, the bytes of its optimizer and of what a forward pass keeps.

    The pass is the first of the second step, or of the only one, in this process: no pass is added and no random number
    drawn. That step's time is left out, unless it is the only one. A GPU times a step by two events in its queue:
    nothing waits for it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._times: deque[tuple[Moment, Moment]] = deque(maxlen=_TIMED)
        self._began, self._steps = None, 0
        self._saved = self._optimizer = None
        self._watching = ExitStack()

    def on_step_begin(self, args, state, control, **kwargs):
        if self._steps == 0:
            self._watched = min(_WARM, state.max_steps - state.global_step)
        self._steps += 1
        if self._steps == self._watched:
            self._watch(args.device.type)
        self._began = _now(args.device)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        ended = _now(args.device)
        self._watching.close()
        if self._optimizer is None:
            self._optimizer = total(storages(tensors_in(optimizer.state.values())), without={})  # each storage once
        if self._steps != self._watched or not self._times:
            self._times.append((self._began, ended))

    def _watch(self, kind: str) -> None:
        """Count what the next forward pass keeps."""

        def begins(*_) -> None:
            before.remove()
            self._saved = self._watching.enter_context(kept_by_forward(kind))

        def ends(*_) -> None:
            after.remove()
            self._watching.close()

        before = self._model.register_forward_pre_hook(begins)
        after = self._model.register_forward_hook(ends, always_call=True)

    def measured(self) -> dict[str, float | int | None]:
        """Return, for result.json, bytes and the median seconds of a step; None for what no step has shown."""
        return {
            "optimizer_bytes": self._optimizer,
            "step_seconds": median(_seconds(*step) for step in self._times) if self._times else None,
            "saved_activation_bytes": self._saved and self._saved.bytes,
        }


class Unreached(TrainerCallback):
    """Find the adapted modules that no gradient reaches in any step: the model reads their weight without a call."""

    def __init__(self, model: nn.Module) -> None:
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
        trained = {
            name: [weight for weight in layer.parameters() if weight.requires_grad] for name, layer in layers.items()
        }
        self._waiting = {base_name(name): weights for name, weights in trained.items() if weights}
        self._trained, self._sees = [weight for weight in model.parameters() if weight.requires_grad], False

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._waiting:
            self._sees |= any(value.grad is not None for value in self._trained)  # DeepSpeed keeps gradients elsewhere
            waiting = self._waiting.items()
            self._waiting = {name: weights for name, weights in waiting if all(value.grad is None for value in weights)}

    @property
    def names(self) -> list[str]:
        """The names of the modules, in the base model."""
        return list(self._waiting) if self._sees else []


def file_bytes(folder: Path) -> int:
    """Return the bytes of the safetensors files in a saved adapter's folder."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _now(device: torch.device) -> Moment:
    """Return the moment at which the device will have done all work that it has been given so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(began: Moment, ended: Moment) -> float:
    if isinstance(ended, float):
        return ended - began
    ended.synchronize()
    return began.elapsed_time(ended) / 1000
