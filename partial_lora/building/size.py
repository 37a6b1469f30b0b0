"""The size of a training that has not begun, from the skeleton of its model: parameters and bytes, without torch.

Parameters are counted after masking, with the task head apart; `training.cost` counts them on a model that trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from partial_lora import budget
from partial_lora.masks import Sparsity
from partial_lora.models.skeleton import Skeleton


def describe(
    model: Skeleton,
    *,
    target_modules: Sequence[str] | str,
    head: str | None,
    rank: int,
    sparsity: float | Sparsity,
    granularity: str = "rows_columns",
    new_modules: Sequence[str] = (),
) -> dict[str, int | float | None]:
    """Return what training this model would hold and write.

    `sparsity` is one share, or {module: {rows, columns}}. The result has the counts of result.json's `parameters` and
    bytes: `adapter_bytes` of the tensors in a saved adapter (PEFT's format, zeros where masked, the head and
    `new_modules` included), `compact_bytes` with the kept entries alone, `gradient_bytes` and `optimizer_bytes`
    (AdamW), all in fp32. Raises PartialLoraError for names that the model does not have.
    """
    shapes = model.targets(target_modules, head, new_modules)
    head_count = sum(model.size(name) for name in (*new_modules, *filter(None, [head])))
    dense = budget.dense_parameters(shapes, rank)
    kept = budget.kept_parameters(*budget.masked_units(shapes, rank, granularity), sparsity)
    full, base = len(budget.saturated(shapes, rank, sparsity, granularity)), model.size() - head_count
    counts = budget.counts_of(
        base=base, head=head_count, dense=dense, trainable=kept, modules=len(shapes), saturated=full
    )
    return budget.with_bytes(counts, adapter_bytes=budget.FP32 * (dense + head_count))


def table(
    info: Mapping[str, int | float | None],
    memory: Mapping[str, Mapping[str, int]] | None = None,
    kept: Mapping[str, int | None] | None = None,
    *,
    masked: bool = True,
) -> Table:
    """Return what `describe` returns, as a table for a terminal.

    memory: peak memory by the format of the weights. kept: for the backward pass of a step (`memory.StepMemory`).
    masked: the method has masks, and so a compact file.
    """
    share = info["adapter_trainable"] / info["adapter_dense"] if info["adapter_dense"] else None
    sparsity, full = info["adapter_sparsity"], ""
    if info["saturated_modules"]:
        full = f"{info['saturated_modules']:,} saturated: method.rank=auto reaches more"
    rows = [
        ("base model, frozen", f"{info['base']:,}", ""),
        ("adapted modules", f"{info['adapted_modules']:,}", full),
        ("adapter, dense", f"{info['adapter_dense']:,}", ""),
        ("adapter, trainable", f"{info['adapter_trainable']:,}", "" if share is None else f"{share:.1%} of dense"),
        ("adapter sparsity", "–" if sparsity is None else f"{sparsity:.3f}", "measured in entries"),
        ("head, trainable", f"{info['head']:,}", ""),
        ("adapter file, PEFT's", _size(info["adapter_bytes"]), f"fp32, head{' and masked zeros' * masked} included"),
        *[("adapter file, compact", _size(info["compact_bytes"]), "fp32, kept entries and head")] * masked,
        ("gradients", _size(info["gradient_bytes"]), "fp32"),
        ("optimizer state", _size(info["optimizer_bytes"]), "AdamW, two fp32 moments"),
    ]
    for kind, peak in (memory or {}).items():
        checkpointed = f"{_size(peak['peak_checkpointed'])} with gradient checkpoints"
        rows.append((f"memory at the peak, {kind}", _size(peak["peak"]), checkpointed))
    if kept:
        above = f"{_size(kept['floor'])} by the frozen model, {_size(kept['adapter'])} by the adapter"
        if kept["checkpointed"] is not None:
            above += f"; {_size(kept['checkpointed'])} with gradient checkpoints"
        rows.append(("kept for a backward pass", _size(kept["floor"] + kept["adapter"]), above))
    columns = Table(show_header=False, box=None, pad_edge=False)
    columns.add_column(style="bold")
    columns.add_column(justify="right")
    columns.add_column(style="dim")
    for row in rows:
        columns.add_row(*row)
    return columns


def _size(count: int) -> str:
    """Return bytes in the largest binary unit that leaves a number of at least 1."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"
