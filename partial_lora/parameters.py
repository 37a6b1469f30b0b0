"""How many parameters train, and what they cost in memory and on disk.

Predicted for a model that exists in outline only (`describe`, on the meta device) and counted on one that trains
(`measured`). Every count is of what is left after masking; the task head is always counted apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from peft.tuners.lora import LoraLayer
from rich.table import Table
from torch import nn

from partial_lora.budget import dense_parameters, kept_parameters, masked_units
from partial_lora.errors import PartialLoraError
from partial_lora.models import size_of
from partial_lora.targets import target_linears

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
    model: nn.Module, head: str | None, adapter: str = "default", new_modules: Sequence[str] = ()
) -> dict[str, int | float | None]:
    """The parameters of a model that is set up to train, counted on its tensors, never on what was asked.

    `model` is a PeftModel, or a plain model whose head alone trains. Trainable means `requires_grad`; dense is the size
    of the `.weight` of every lora_A and lora_B; `new_modules`, which train whole, too, are counted with the head.
    Raises PartialLoraError, naming it, where a parameter outside of these trains: no column of a table would count it.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    parts = [part for layer in layers for part in _tensors(layer, adapter)]
    # Under PEFT, each with the frozen module it was copied from.
    heads = _trained_whole(model, head, new_modules)
    adapters = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names]
    counted_apart = {id(parameter) for holder in (*heads, *adapters) for parameter in holder.parameters()}
    base = 0
    for name, parameter in model.named_parameters():
        if id(parameter) in counted_apart:
            continue
        if parameter.requires_grad:
            raise PartialLoraError(
                f"{name} trains but is neither in the adapter nor in {head or 'a head'}: expected it frozen"
            )
        base += size_of(parameter)
    return _counts(
        base=base,
        dense=sum(weight.numel() for weight, _ in parts),
        trainable=sum(_trainable(held) for _, held in parts),
        head=sum(_trainable(module.parameters()) for module in heads),
    )


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
    """The `parameters` of result.json; the sparsity of an adapter that is not there is None."""
    return {
        "base": base,
        "adapter_dense": dense,
        "adapter_trainable": trainable,
        "head": head,
        "adapter_sparsity": 1 - trainable / dense if dense else None,
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


def _tensors(layer: LoraLayer, adapter: str) -> Iterator[tuple[torch.Tensor, list[nn.Parameter]]]:
    """Each part of one adapter in a layer: its dense weight and the parameters that hold what is left of it."""
    for name in layer.adapter_layer_names:
        held = getattr(layer, name)
        if adapter in held:
            part = held[adapter]
            yield (part.weight, list(part.parameters())) if isinstance(part, nn.Module) else (part, [part])


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
