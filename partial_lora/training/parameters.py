"""How many parameters train, and what they cost in memory and on disk.

Predicted for a model that exists in outline only (`describe`, `foretold`, on the meta device) and counted on one that
trains (`measured`). Every count is of what is left after masking; the task head is always counted apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from rich.table import Table
from torch import nn

from partial_lora.calibration.budget import dense_parameters, kept_parameters, masked_units
from partial_lora.errors import PartialLoraError
from partial_lora.models import size_of
from partial_lora.models.targets import target_linears

Shapes = Mapping[str, tuple[int, int]]
Sparsity = float | Mapping[str, Mapping[str, float]]

_FP32 = 4  # bytes of a number in an adapter's file, a gradient or a moment; weights may be narrower, these are not
_MOMENTS = 2  # AdamW keeps a mean and a mean square of every gradient


def adapter_parameters(
    shapes: Shapes, rank: int, sparsity: Sparsity, granularity: str = "rows_columns"
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
    sparsity: Sparsity | None,
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
