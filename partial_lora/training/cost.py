"""How many parameters train, and what they cost in memory and on disk.

Predicted for a model that exists in outline only (`describe`, `foretold`, on the meta device) and counted on one that
trains (`measured`). Every count is of what is left after masking; the task head is always counted apart.
"""

from __future__ import annotations

import gc
import math
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
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback

from partial_lora.adapter.factor import GATHER_DENSITY
from partial_lora.calibration.budget import dense_parameters, kept_parameters, masked_units
from partial_lora.errors import PartialLoraError
from partial_lora.masks import Sparsity
from partial_lora.models import size_of
from partial_lora.models.targets import target_linears

Shapes = Mapping[str, tuple[int, int]]

_FP32 = 4  # bytes of a number in an adapter's file, a gradient or a moment; weights may be narrower, these are not
_MOMENTS = 2  # AdamW keeps a mean and a mean square of every gradient


def adapter_parameters(
    shapes: Shapes, rank: int, sparsity: float | Sparsity, granularity: str = "rows_columns"
) -> dict[str, int]:
    """What an adapter of this rank holds before masking (`dense`) and after it (`trainable`).

    `shapes` gives (out, in) of W for every adapted module; `sparsity` is one share for all rows and columns, or
    {module: {rows, columns}}. A module has rank * (out + in) parameters when dense, and rank * (|I| + |J|) when the
    rows I of B and the columns J of A are kept; masks of single entries ("element") keep the same shares. Raises
    PartialLoraError, naming it, for a module that only one of the two has.
    """
    if isinstance(sparsity, Mapping):
        for module in sorted(shapes.keys() ^ sparsity.keys()):
            reason = "is adapted but has no sparsity" if module in shapes else "has a sparsity but is not adapted"
            raise PartialLoraError(f"{module} {reason}: expected one {{rows, columns}} for every adapted module")
    kept = kept_parameters(*masked_units(shapes, rank, granularity), sparsity)
    return {"dense": dense_parameters(shapes, rank), "trainable": kept}


def target_shapes(
    model: nn.Module, target_modules: Sequence[str] | str, head: str | None, new_modules: Sequence[str] = ()
) -> dict[str, tuple[int, int]]:
    """The modules PEFT would adapt, in the model's order, each with the shape (out, in) of its weight.

    What trains whole, the head and `new_modules`, is never one of them. Raises as `target_linears` does.
    """
    linears = target_linears(model, target_modules, head, new_modules)
    return {name: tuple(linear.weight.shape) for name, linear in linears.items()}


def describe(
    model: nn.Module,
    *,
    target_modules: Sequence[str] | str,
    head: str | None,
    rank: int,
    sparsity: float | Sparsity | None,
    granularity: str = "rows_columns",
    new_modules: Sequence[str] = (),
) -> dict[str, int | float | None]:
    """What training this model would hold and write, read off its shapes alone (the meta device is enough).

    `sparsity` is one share, {module: {rows, columns}}, or None for a method without an adapter. Gives the counts of
    result.json's `parameters`; `targets`, the number of adapted modules; and bytes: `adapter_bytes` of the tensors in a
    saved adapter (PEFT's format, zeros where masked, the head and `new_modules` included), `compact_bytes` with the
    kept entries alone, `gradient_bytes` and `optimizer_bytes` (AdamW), all in fp32.
    """
    whole = _trained_whole(model, head, new_modules)
    head_count = sum(size_of(parameter) for module in whole for parameter in module.parameters())
    shapes = {} if sparsity is None else target_shapes(model, target_modules, head, new_modules)
    adapter = adapter_parameters(shapes, rank, sparsity, granularity) if shapes else {"dense": 0, "trainable": 0}
    trainable = adapter["trainable"] + head_count
    return {
        **_counts(
            base=sum(size_of(parameter) for parameter in model.parameters()) - head_count, head=head_count, **adapter
        ),
        "targets": len(shapes),
        "adapter_bytes": _FP32 * (adapter["dense"] + head_count),
        "compact_bytes": _FP32 * trainable,
        "gradient_bytes": _FP32 * trainable,
        "optimizer_bytes": _FP32 * _MOMENTS * trainable,
    }


def measured(
    model: nn.Module,
    head: str | None,
    adapter: str = "default",
    new_modules: Sequence[str] = (),
    *,
    dense: int | None = None,
) -> dict[str, int | float | None]:
    """The parameters of a model that is set up to train, counted on its tensors, never on what was asked.

    `model` is a PeftModel, or a plain model whose head alone trains. Trainable means `requires_grad`; `new_modules`,
    which train whole, too, are counted with the head. `dense`, what a method of another kind is compared with, is by
    default the size of the `.weight` of every lora_A and lora_B. Where every weight trains, all but the head are the
    adapter's. Raises PartialLoraError, naming it, where a parameter outside of these trains: no column of a table would
    count it.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    # Under PEFT, each with the frozen module it was copied from.
    heads = _trained_whole(model, head, new_modules)
    in_heads = {id(parameter) for holder in heads for parameter in holder.parameters()}
    held = {id(parameter): parameter for layer in layers for parameter in _held(layer)}
    copied = _copied(model) if not layers else {}
    base = 0
    for name, parameter in model.named_parameters():
        if id(parameter) in in_heads or id(parameter) in held or id(parameter) in copied:
            continue
        if parameter.requires_grad:
            raise PartialLoraError(
                f"{name} trains but is neither in the adapter nor in {head or 'a head'}: expected it frozen"
            )
        base += size_of(parameter)
    trained = [parameter for key, parameter in {**held, **copied}.items() if key not in in_heads]
    if dense is None:
        lora = [layer for layer in layers if isinstance(layer, LoraLayer)]
        dense = sum(weight.numel() for layer in lora for weight in _dense_weights(layer, adapter))
    return _counts(
        base=base,
        dense=dense if trained else 0,
        trainable=_trainable(trained),
        head=sum(_trainable(module.parameters()) for module in heads),
    )


def foretold(
    adapted: PeftModel, head: str | None, *, new_modules: Sequence[str] = (), dense: int
) -> dict[str, int | float | None]:
    """What `describe` says, counted on an adapter that has been made (on the meta device, too) and masks nothing."""
    counts = measured(adapted, head, new_modules=new_modules, dense=dense)
    trainable = counts["adapter_trainable"] + counts["head"]
    saved = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {
        **counts,
        "targets": sum(isinstance(module, BaseTunerLayer) for module in adapted.modules()),
        "adapter_bytes": sum(tensor.numel() * tensor.itemsize for tensor in saved.values()),
        "compact_bytes": _FP32 * trainable,
        "gradient_bytes": _FP32 * trainable,
        "optimizer_bytes": _FP32 * _MOMENTS * trainable,
    }


def table(info: Mapping[str, int | float | None], memory: Mapping[str, Mapping[str, int]] | None = None) -> Table:
    """What `describe` found, and the peak of memory by what weights are kept in, for reading."""
    share = info["adapter_trainable"] / info["adapter_dense"] if info["adapter_dense"] else None
    sparsity = info["adapter_sparsity"]
    rows = [
        ("base model, frozen", f"{info['base']:,}", ""),
        ("adapted modules", f"{info['targets']:,}", ""),
        ("adapter, dense", f"{info['adapter_dense']:,}", ""),
        ("adapter, trainable", f"{info['adapter_trainable']:,}", "" if share is None else f"{share:.1%} of dense"),
        ("adapter sparsity", "–" if sparsity is None else f"{sparsity:.3f}", "measured in entries"),
        ("head, trainable", f"{info['head']:,}", ""),
        ("adapter file, PEFT's", _size(info["adapter_bytes"]), "fp32, head and masked zeros included"),
        ("adapter file, compact", _size(info["compact_bytes"]), "fp32, kept entries and head"),
        ("gradients", _size(info["gradient_bytes"]), "fp32"),
        ("optimizer state", _size(info["optimizer_bytes"]), "AdamW, two fp32 moments"),
    ]
    for kind, held in (memory or {}).items():
        checkpointed = f"{_size(held['peak_checkpointed'])} with gradient checkpoints"
        rows.append((f"memory at the peak, {kind}", _size(held["peak"]), checkpointed))
    drawn = Table(show_header=False, box=None, pad_edge=False)
    drawn.add_column(style="bold")
    drawn.add_column(justify="right")
    drawn.add_column(style="dim")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def _counts(*, base: int, dense: int, trainable: int, head: int) -> dict[str, int | float | None]:
    """The `parameters` of result.json; an adapter that is not there, or larger than the dense one, has no sparsity."""
    return {
        "base": base,
        "adapter_dense": dense,
        "adapter_trainable": trainable,
        "head": head,
        "adapter_sparsity": 1 - trainable / dense if 0 < trainable <= dense else None,
    }


def _trained_whole(model: nn.Module, head: str | None, new_modules: Sequence[str]) -> list[nn.Module]:
    """The head, and what else trains without an adapter."""
    found = []
    heads = [] if head is None else [("head", head)]
    for key, name in [*heads, *(("new_modules", name) for name in new_modules)]:
        try:
            found.append(model.get_submodule(name))
        except AttributeError as error:
            kind = type(model).__name__
            raise PartialLoraError(f"model.{key}={name}: {kind} has no module of that name") from error
    return found


def _held(layer: BaseTunerLayer) -> list[nn.Parameter]:
    """What a layer of PEFT's has beside the module it adapts."""
    adapted = {id(parameter) for parameter in layer.get_base_layer().parameters()}
    return [parameter for parameter in layer.parameters() if id(parameter) not in adapted]


def _copied(model: nn.Module) -> dict[int, nn.Parameter]:
    """The weights of PEFT's copies of whole modules."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return {id(weight): weight for each in wrappers for weight in each.modules_to_save.parameters()}


def _dense_weights(layer: LoraLayer, adapter: str) -> Iterator[torch.Tensor]:
    """Both factors of one adapter in a layer, as dense as they would be without masks."""
    for held in (layer.lora_A, layer.lora_B):
        if adapter in held:
            yield held[adapter].weight if isinstance(held[adapter], nn.Module) else held[adapter]


def _trainable(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def _size(count: int) -> str:
    """Bytes in the largest binary unit that leaves a number of at least 1."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


# --- What a forward pass keeps for its backward pass, counted in memory: every piece once and whole.

Storages = dict[int, torch.UntypedStorage]
"""{address: memory}: distinct pieces of memory; as long as they are held here no other can get their address."""


@dataclass
class Kept:
    """Bytes that a forward pass has kept; None until it is over."""

    bytes: int | None = None


@contextmanager
def kept_by_forward(kind: str = "cpu") -> Iterator[Kept]:
    """Count what the forward passes inside the block keep, on devices of the kind.

    Counted is what autograd is given to save, and tensors that exist at the end in any other way (an attribute of an
    autograd function, say). Not counted is what existed before: parameters, buffers, indices, optimizer state, the
    batch. So it is best used after a first step, when everything that lasts exists. Draws no random number.
    """
    before, saved, found = alive(kind), {}, Kept()

    def save(tensor: Tensor) -> Tensor:
        saved.update(storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        yield found
    found.bytes = total({**saved, **alive(kind)}, without=before)


def storages(tensors: Iterable[Tensor]) -> Storages:
    """The memory that tensors lie in: one piece each, or two for a sparse one."""
    found = {}
    for tensor in tensors:
        for part in (tensor._indices(), tensor._values()) if tensor.layout is torch.sparse_coo else (tensor,):
            with suppress(RuntimeError):  # of memory that is given back while its tensor lives, as FSDP does
                if part.untyped_storage().nbytes():
                    found[part.untyped_storage().data_ptr()] = part.untyped_storage()
    return found


def alive(kind: str = "cpu") -> Storages:
    """The memory of every tensor on devices of the kind that Python can see, whoever holds it."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))  # asking it would wake lazy ones
    return storages(tensor for tensor in tensors if tensor.device.type == kind)


def total(pieces: Storages, *, without: Storages) -> int:
    """The bytes of the pieces that are not among those of `without`."""
    return sum(piece.nbytes() for address, piece in pieces.items() if address not in without)


def tensors_in(state: Iterable[Mapping]) -> Iterator[Tensor]:
    """The tensors of an optimizer's state."""
    return (value for entry in state for value in entry.values() if isinstance(value, Tensor))


# --- What a method costs beside its parameters: bytes on disk and in memory, and the time of a step.

_TIMED = 1000  # steps, the last ones, that the median is of
_WARM = 2  # the step at which what lasts exists, and nothing is any more made for the first time

Moment = float | torch.cuda.Event  # seconds, or a place in the queue of a GPU


class Cost(TrainerCallback):
    """Watches training: how long its steps take, what its optimizer holds, what one forward pass keeps.

    Bytes of the first pass of the second step, or of the first where there is no other, in this process: no pass is
    made and no random number drawn for it. That step's time is left out, if it is not the only one. On a GPU times are
    its own, between two events in its queue: nothing waits for it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._times: deque[tuple[Moment, Moment]] = deque(maxlen=_TIMED)
        self._began, self._steps = None, 0
        self._saved = self._optimizer = None
        self._watching = ExitStack()

    def on_step_begin(self, args, state, control, **kwargs):
        self._steps += 1
        if self._saved is None and self._steps == min(_WARM, state.max_steps - state.global_step + self._steps - 1):
            self._watch(args.device.type)
        self._began = _now(args.device)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        ended = _now(args.device)
        self._watching.close()
        if self._optimizer is None:
            self._optimizer = optimizer_bytes(optimizer)
        if self._steps != _WARM or not self._times:
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
        """For result.json: bytes, and the median of the steps' seconds; None for what no step has shown."""
        return {
            "optimizer_bytes": self._optimizer,
            "step_seconds": median(_between(*step) for step in self._times) if self._times else None,
            "saved_activation_bytes": self._saved and self._saved.bytes,
        }


def optimizer_bytes(optimizer: Optimizer) -> int:
    """The memory of all tensors in an optimizer's state, each piece once."""
    return total(storages(tensors_in(optimizer.state.values())), without={})


def file_bytes(folder: Path) -> int:
    """The bytes of the tensors' file in a saved adapter's folder."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _now(device: torch.device) -> Moment:
    """Where the device is once it has done what it was given."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(began: Moment, ended: Moment) -> float:
    """Seconds."""
    if isinstance(ended, float):
        return ended - began
    ended.synchronize()
    return began.elapsed_time(ended) / 1000


# --- How much memory a training step of a causal language model needs at its peak, estimated from shapes alone.

_NF4_BLOCK = 64  # weights that share a scale (bitsandbytes, functional.quantize_4bit)
_NF4_CODES = 16  # numbers that 4 bits stand for, kept in fp32 beside every weight
# Modules of one name in this table read the same tensor.
_READS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "normed"),
    "o_proj": "attended",
    **dict.fromkeys(("gate_proj", "up_proj"), "normed again"),
    "down_proj": "gated",
}
_KEPT_ANYWAY = {"o_proj"}  # its input, by attention itself


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps of one step: of a block, of what comes after the blocks, and what goes with them."""

    blocks: int
    block: int
    entering: int  # what a checkpoint keeps of one block: its input
    after: int  # the last norm and the log-probabilities
    logits: int
    gradient: int  # of the log-probabilities, when the backward pass begins

    @property
    def peak(self) -> int:
        """When the backward pass begins."""
        return self.blocks * self.block + self.after + self.logits + self.gradient

    @property
    def peak_checkpointed(self) -> int:
        """When the backward pass begins, or when the last block has been computed again."""
        begins, inside = self.after + self.logits + self.gradient, self.block + self.logits
        return self.blocks * self.entering + max(begins, inside)


def peak_memory(
    model: PreTrainedModel,
    *,
    shapes: Mapping[str, tuple[int, int]],
    counts: Mapping[str, int | float | None],
    rank: int,
    dtype: str = "bfloat16",
    quantization: str | None = None,
    batch_size: int,
    length: int,
) -> dict[str, int]:
    """Bytes that training takes on one device, by what they are for.

    Args:
        model: a causal model, on the meta device or any other.
        shapes: (out, in) of each adapted module, as `parameters.target_shapes` gives them.
        counts: of `parameters.describe`.
        dtype: of frozen weights and activations; adapter, gradients and AdamW's two moments are fp32.
        quantization: nf4 (without double quantisation) or int8, of all linear layers but the output layer.
        batch_size: sequences in one step on this device; length: tokens in each, padding included.

    Gives `weights`, `adapter`, `gradients`, `optimizer`, `activations` and their sum, `peak`; and, with gradient
    checkpoints, `activations_checkpointed` and `peak_checkpointed`. Raises PartialLoraError for a model without the
    geometry of a causal one.
    """
    trainable = int(counts["adapter_trainable"]) + int(counts["head"])
    dense = counts["adapter_dense"]
    density = counts["adapter_trainable"] / dense if dense else 1.0
    size = getattr(torch, dtype).itemsize
    kept = activations(
        model.config,
        shapes,
        rank=rank,
        density=density,
        size=size,
        quantization=quantization,
        batch_size=batch_size,
        length=length,
    )
    held = {
        "weights": weight_bytes(model, dtype, quantization),
        "adapter": _FP32 * trainable,
        "gradients": int(counts["gradient_bytes"]),
        "optimizer": int(counts["optimizer_bytes"]),
    }
    always = sum(held.values()) + _workspace(model, size, quantization)
    return {
        **held,
        "activations": kept.peak,
        "activations_checkpointed": kept.peak_checkpointed,
        "peak": always + kept.peak,
        "peak_checkpointed": always + kept.peak_checkpointed,
    }


def weight_bytes(model: PreTrainedModel, dtype: str, quantization: str | None = None) -> int:
    """Bytes of the frozen weights; a matrix that is both embeddings and output layer counts once.

    nf4: half a byte a weight, an fp32 scale for every 64 of them and a table of 16 codes a matrix. int8: a byte a
    weight and an fp32 scale a row. Embeddings, norms, biases and the output layer are of `dtype`.
    """
    quantised = {linear.weight: linear for linear in _quantised(model)} if quantization else {}
    return sum(
        _quantised_bytes(parameter, quantization)
        if parameter in quantised
        else parameter.numel() * getattr(torch, dtype).itemsize
        for parameter in model.parameters()
    )


def activations(
    config: object,
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int,
    density: float,
    size: int,
    quantization: str | None,
    batch_size: int,
    length: int,
) -> Activations:
    """What autograd keeps of a step, by the formulas above.

    config: of the model. shapes: (out, in) of each adapted module. density: share of an adapter's columns that is kept;
    1 is plain LoRA. size: bytes of a number of the activations. quantization: of the linear layers of the blocks.
    """
    try:
        hidden, inner, blocks = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        heads, words = config.num_attention_heads, config.vocab_size
    except AttributeError as error:
        raise PartialLoraError(
            f"model.architecture={config.model_type}: the memory of its activations is not known, only that of causal "
            f"models ({error})"
        ) from error
    width = heads * (getattr(config, "head_dim", None) or hidden // heads)
    tokens = batch_size * length
    block = tokens * (2 * _FP32 * hidden + 4 * size * width + _FP32 * heads + 3 * size * inner)
    entering = size * tokens * hidden
    if quantization == "int8":
        block += tokens * size * (2 * hidden + inner)
        entering += tokens * size * (2 * hidden + width + inner)
    adapters = tokens * _kept_for_adapters(shapes, rank, density, size, quantization)
    return Activations(
        blocks=blocks,
        block=block + math.ceil(adapters / blocks),
        entering=entering,
        after=_FP32 * tokens * (hidden + words),
        logits=size * tokens * words,
        gradient=_FP32 * tokens * words,
    )


def _kept_for_adapters(
    shapes: Mapping[str, tuple[int, int]], rank: int, density: float, size: int, quantization: str | None
) -> int:
    """Bytes that the adapters of all blocks keep for one token."""
    gathers = density <= GATHER_DENSITY
    own = density == 1 or quantization is not None  # PEFT's own layer, on numbers in fp32
    kept = _READS.keys() if quantization == "int8" else _KEPT_ANYWAY
    total, shared = 0, {}
    for name, (_, inputs) in shapes.items():
        block, _, module = name.rpartition(".")
        total += _FP32 * rank if own else 0
        if gathers:
            total += max(1, math.floor(density * inputs + 0.5)) * (_FP32 if own else size)
        elif own and size < _FP32:
            total += inputs * _FP32
        elif module not in kept:
            shared[block, _READS.get(module, module)] = inputs * size
    return total + sum(shared.values())


def _quantised(model: PreTrainedModel) -> list[nn.Linear]:
    output = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module is not output]


def _quantised_bytes(weight: nn.Parameter, quantization: str) -> int:
    if quantization == "int8":
        return weight.numel() + _FP32 * weight.shape[0]
    return math.ceil(weight.numel() / 2) + _FP32 * (math.ceil(weight.numel() / _NF4_BLOCK) + _NF4_CODES)


def _workspace(model: PreTrainedModel, size: int, quantization: str | None) -> int:
    """The largest matrix that is made whole for a product, where they are quantised."""
    if quantization is None:
        return 0
    return size * max((linear.weight.numel() for linear in _quantised(model)), default=0)
