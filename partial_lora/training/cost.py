"""The cost of a method: parameters, bytes on disk and in memory, and the time of a step.

Parameters are predicted for a model that exists in outline only (`describe`, on the meta device) and counted on one
that trains (`measured`), always after masking, with the task head apart. Bytes and time are measured while it trains
(`Cost`), and the peak of memory is estimated from shapes alone (`peak_memory`).
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
from partial_lora.calibration.budget import dense_parameters, kept_parameters, masked_units, saturated
from partial_lora.errors import PartialLoraError
from partial_lora.masks import Sparsity
from partial_lora.models import size_of
from partial_lora.models.targets import target_linears

Shapes = Mapping[str, tuple[int, int]]

_FP32 = 4  # bytes of a number in an adapter's file, a gradient or a moment; weights may be narrower, these are not
_MOMENTS = 2  # AdamW keeps a mean and a mean square of every gradient
_TIMED = 1000  # steps, the last ones, that the median is of
_WARM = 2  # the step by which everything exists that lasts
_NF4_BLOCK = 64  # weights that share a scale (bitsandbytes, functional.quantize_4bit)
_NF4_CODES = 16  # numbers that 4 bits stand for, in fp32 beside every weight

# Parameters


def adapter_parameters(
    shapes: Shapes, rank: int, sparsity: float | Sparsity, granularity: str = "rows_columns"
) -> dict[str, int]:
    """Return the parameters of an adapter of this rank before masking (`dense`) and after it (`trainable`).

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
    """Return the modules PEFT would adapt, in the model's order, each with the shape (out, in) of its weight.

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
    """Return what training this model would hold and write, read off its shapes alone (the meta device is enough).

    `sparsity` is one share, {module: {rows, columns}}, or None for a method without an adapter. The result has the
    counts of result.json's `parameters` and bytes: `adapter_bytes` of the tensors in a saved adapter (PEFT's format,
    zeros where masked, the head and `new_modules` included), `compact_bytes` with the kept entries alone,
    `gradient_bytes` and `optimizer_bytes` (AdamW), all in fp32.
    """
    whole = _trained_whole(model, head, new_modules)
    head_count = sum(size_of(parameter) for module in whole for parameter in module.parameters())
    base = sum(size_of(parameter) for parameter in model.parameters()) - head_count
    shapes = {} if sparsity is None else target_shapes(model, target_modules, head, new_modules)
    adapter = adapter_parameters(shapes, rank, sparsity, granularity) if shapes else {"dense": 0, "trainable": 0}
    full = len(saturated(shapes, rank, sparsity, granularity)) if shapes else 0
    counts = _counts(base=base, head=head_count, **adapter, modules=len(shapes), saturated=full)
    return _with_bytes(counts, adapter_bytes=_FP32 * (adapter["dense"] + head_count))


def describe_adapted(
    adapted: PeftModel, head: str | None, *, new_modules: Sequence[str] = (), dense: int
) -> dict[str, int | float | None]:
    """Return what `describe` does, counted on an adapter that exists (on the meta device, too) and masks nothing."""
    saved = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return _with_bytes(
        measured(adapted, head, new_modules=new_modules, dense=dense),
        adapter_bytes=sum(tensor.numel() * tensor.itemsize for tensor in saved.values()),
    )


def _with_bytes(counts: dict, *, adapter_bytes: int) -> dict[str, int | float | None]:
    trainable = counts["adapter_trainable"] + counts["head"]
    return counts | {
        "adapter_bytes": adapter_bytes,
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
    """Return the parameters of a model that is set up to train, counted on its tensors, never on its settings.

    `model` is a PeftModel, or a plain model whose head alone trains. Trainable means `requires_grad`; `new_modules`,
    which train whole, too, are counted with the head. `dense`, what a method of another kind is compared with, is by
    default the size of the `.weight` of every lora_A and lora_B. Where every weight trains, all but the head are the
    adapter's. `saturated_modules` counts the modules that train as many numbers as the block of W has that these can
    change (`budget.saturated`). Raises PartialLoraError, naming it, where a parameter outside of these trains: no
    column of a table would count it.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    # Under PEFT, each with the frozen module it was copied from.
    heads = _trained_whole(model, head, new_modules)
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
    lora = [layer for layer in layers if isinstance(layer, LoraLayer)]
    if dense is None:
        factors = [part[adapter] for layer in lora for part in (layer.lora_A, layer.lora_B) if adapter in part]
        dense = sum((part.weight if isinstance(part, nn.Module) else part).numel() for part in factors)
    in_head = [parameter for module in heads for parameter in module.parameters()]
    return _counts(
        base=base,
        dense=dense if trained else 0,
        trainable=sum(parameter.numel() for parameter in trained if parameter.requires_grad),
        head=sum(parameter.numel() for parameter in in_head if parameter.requires_grad),
        modules=sum(any(adapter in getattr(layer, name) for name in layer.adapter_layer_names) for layer in layers),
        saturated=sum(_is_saturated(layer, adapter) for layer in lora),
    )


def _is_saturated(layer: LoraLayer, adapter: str) -> bool:
    """Return True where A and B train as many numbers as there are in the rows and columns of W that they touch."""
    factors = [part[adapter] for part in (layer.lora_B, layer.lora_A) if adapter in part]
    if len(factors) < 2 or not all(isinstance(factor, nn.Module) for factor in factors):  # AdaLoRA's are parameters
        return False
    sizes = zip(factors, (layer.out_features, layer.in_features), strict=True)
    rows, columns = (getattr(factor, "touched", size) for factor, size in sizes)
    trained = [each for factor in factors for each in factor.parameters() if each.requires_grad]
    return sum(each.numel() for each in trained) >= rows * columns


def table(info: Mapping[str, int | float | None], memory: Mapping[str, Mapping[str, int]] | None = None) -> Table:
    """Return what `describe` does, and the peak of memory by the format of the weights, as a table for a terminal."""
    share = info["adapter_trainable"] / info["adapter_dense"] if info["adapter_dense"] else None
    sparsity, full = info["adapter_sparsity"], ""
    if info["saturated_modules"]:
        full = f"{info['saturated_modules']:,} saturated: a lower rank reaches more of W"
    rows = [
        ("base model, frozen", f"{info['base']:,}", ""),
        ("adapted modules", f"{info['adapted_modules']:,}", full),
        ("adapter, dense", f"{info['adapter_dense']:,}", ""),
        ("adapter, trainable", f"{info['adapter_trainable']:,}", "" if share is None else f"{share:.1%} of dense"),
        ("adapter sparsity", "–" if sparsity is None else f"{sparsity:.3f}", "measured in entries"),
        ("head, trainable", f"{info['head']:,}", ""),
        ("adapter file, PEFT's", _size(info["adapter_bytes"]), "fp32, head and masked zeros included"),
        ("adapter file, compact", _size(info["compact_bytes"]), "fp32, kept entries and head"),
        ("gradients", _size(info["gradient_bytes"]), "fp32"),
        ("optimizer state", _size(info["optimizer_bytes"]), "AdamW, two fp32 moments"),
    ]
    for kind, peak in (memory or {}).items():
        checkpointed = f"{_size(peak['peak_checkpointed'])} with gradient checkpoints"
        rows.append((f"memory at the peak, {kind}", _size(peak["peak"]), checkpointed))
    columns = Table(show_header=False, box=None, pad_edge=False)
    columns.add_column(style="bold")
    columns.add_column(justify="right")
    columns.add_column(style="dim")
    for row in rows:
        columns.add_row(*row)
    return columns


def _counts(
    *, base: int, dense: int, trainable: int, head: int, modules: int, saturated: int
) -> dict[str, int | float | None]:
    """Return `parameters` of result.json; without an adapter, or with one larger than the dense, sparsity is None."""
    return {
        "base": base,
        "adapter_dense": dense,
        "adapter_trainable": trainable,
        "head": head,
        "adapter_sparsity": 1 - trainable / dense if 0 < trainable <= dense else None,
        "adapted_modules": modules,
        "saturated_modules": saturated,
    }


def _trained_whole(model: nn.Module, head: str | None, new_modules: Sequence[str]) -> list[nn.Module]:
    """Return the head and `new_modules`, which train without an adapter."""
    modules = []
    heads = [] if head is None else [("head", head)]
    for key, name in [*heads, *(("new_modules", name) for name in new_modules)]:
        try:
            modules.append(model.get_submodule(name))
        except AttributeError as error:
            kind = type(model).__name__
            raise PartialLoraError(f"model.{key}={name}: {kind} has no module of that name") from error
    return modules


def _adapter_parts(layers: Sequence[BaseTunerLayer]) -> dict[int, nn.Parameter]:
    """Return the parameters, by id, that PEFT's layers have beside the modules they adapt."""
    adapted = {id(parameter) for layer in layers for parameter in layer.get_base_layer().parameters()}
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    return {id(parameter): parameter for parameter in parameters if id(parameter) not in adapted}


def _copies(model: nn.Module) -> dict[int, nn.Parameter]:
    """Return the parameters, by id, of PEFT's copies of whole modules."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return {id(weight): weight for each in wrappers for weight in each.modules_to_save.parameters()}


def _size(count: int) -> str:
    """Return bytes in the largest binary unit that leaves a number of at least 1."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


# Memory that a forward pass keeps for its backward pass: every storage once and whole.

# Distinct storages by address: as long as they are held here no other can get the same one.
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
                    pieces[part.untyped_storage().data_ptr()] = part.untyped_storage()
    return pieces


def alive(kind: str = "cpu") -> Storages:
    """Return the storages of all tensors that Python can see on devices of the kind."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))  # asking it would wake lazy ones
    return storages(tensor for tensor in tensors if tensor.device.type == kind)


def total(pieces: Storages, *, without: Storages) -> int:
    """Return the bytes of the storages that are not among `without`."""
    return sum(piece.nbytes() for address, piece in pieces.items() if address not in without)


def tensors_in(state: Iterable[Mapping]) -> Iterator[Tensor]:
    """Return the tensors of an optimizer's state."""
    return (value for entry in state for value in entry.values() if isinstance(value, Tensor))


# Measurements of a training

Moment = float | torch.cuda.Event  # seconds, or a place in the queue of a GPU


class Cost(TrainerCallback):
    """Measure the time of training's steps, the bytes of its optimizer and of what a forward pass keeps.

    The pass is the first of the second step, or of the only one, in this process: no pass is added and no random number
    drawn. That step's time is left out, unless it is the only one. On a GPU times are its own, between two events in
    its queue: nothing waits for it.
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
        """Return, for result.json, bytes and the median seconds of a step; None where no step has shown them."""
        return {
            "optimizer_bytes": self._optimizer,
            "step_seconds": median(_seconds(*step) for step in self._times) if self._times else None,
            "saved_activation_bytes": self._saved and self._saved.bytes,
        }


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of all tensors in an optimizer's state, each storage once."""
    return total(storages(tensors_in(optimizer.state.values())), without={})


def file_bytes(folder: Path) -> int:
    """Return the bytes of the safetensors files in a saved adapter's folder."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _now(device: torch.device) -> Moment:
    """Return the moment at which the device will have done what it has been given so far."""
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


# Memory of a training step of a causal model at its peak, estimated from shapes

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
    """Bytes that autograd keeps of one step, by where they arise."""

    blocks: int
    block: int
    entering: int  # what a checkpoint keeps of one block: its input
    after: int  # the last norm and the log-probabilities
    logits: int
    gradient: int  # of the log-probabilities, when the backward pass begins

    @property
    def peak(self) -> int:
        """Bytes when the backward pass begins."""
        return self.blocks * self.block + self.after + self.logits + self.gradient

    @property
    def peak_checkpointed(self) -> int:
        """Bytes when the backward pass begins, or when the last block has been recomputed."""
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
    """Return the bytes that training takes on one device, by what they are for.

    Args:
        model: a causal model, on the meta device or any other.
        shapes: (out, in) of each adapted module, from `target_shapes`.
        counts: from `describe`.
        dtype: of frozen weights and activations; adapter, gradients and AdamW's two moments are fp32.
        quantization: nf4 (without double quantisation) or int8, of all linear layers but the output layer.
        batch_size: sequences in one step on this device; length: tokens in each, padding included.

    The keys are `weights`, `adapter`, `gradients`, `optimizer`, `activations` and their sum, `peak`; and, with gradient
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
    persistent = {
        "weights": weight_bytes(model, dtype, quantization),
        "adapter": _FP32 * trainable,
        "gradients": int(counts["gradient_bytes"]),
        "optimizer": int(counts["optimizer_bytes"]),
    }
    always = sum(persistent.values())
    if quantization is not None:  # the largest matrix is dequantised whole for a product
        always += size * max((linear.weight.numel() for linear in _quantised(model)), default=0)
    return {
        **persistent,
        "activations": kept.peak,
        "activations_checkpointed": kept.peak_checkpointed,
        "peak": always + kept.peak,
        "peak_checkpointed": always + kept.peak_checkpointed,
    }


def weight_bytes(model: PreTrainedModel, dtype: str, quantization: str | None = None) -> int:
    """Return the bytes of the frozen weights; a matrix that is both embeddings and output layer counts once.

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
    """Return what autograd keeps of a step.

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
    """Return the bytes that the adapters of all blocks keep for one token."""
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
