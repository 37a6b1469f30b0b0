"""Adapters of several runs over one base model as a single adapter, by PEFT's own ways of combining them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import set_seed

from partial_lora.errors import PartialLoraError, one_line
from partial_lora.files import building, written
from partial_lora.finished import export
from partial_lora.finished.run import FinishedRun
from partial_lora.models.weights import quiet


@dataclass(frozen=True)
class Overlap:
    """The overlap of two adapters: what both change, as a share of what the smaller of them changes.

    first, second: the places of their runs. rows, columns: of B and A. entries: of the weights that the adapters are
    added to.
    """

    first: int
    second: int
    rows: float
    columns: float
    entries: float


def merge(
    runs: Sequence[FinishedRun], weights: Sequence[float], folder: Path, *, way: str = "cat", density: float = 0.5
) -> list[Overlap]:
    """Write one adapter that combines those of several runs by weights, and return the overlap of every two of them.

    way: PEFT's `combination_type`. density: the share of each factor's entries that ties, dare and
    magnitude_prune keep, zeros of masks among them; dare draws the same ones each time.

    Raises PartialLoraError, in one line and before it writes, where there is not one weight for each run, for runs over
    different base models, or one that has changed, a folder that is not empty, and what PEFT does not combine (heads,
    other kinds of adapters).
    """
    if len(runs) < 2 or len(weights) != len(runs):
        raise PartialLoraError(
            f"--weights: {len(weights)} for {len(runs)} runs, expected two runs or more, a weight each"
        )
    first, *others = runs
    for run in others:
        export.refuse_another_model(run)
        for key in ("weights", "architecture", "model_args"):
            expected, value = getattr(first.config.model, key), getattr(run.config.model, key)
            if expected != value:
                raise PartialLoraError(
                    f"{run.directory}: model.{key}={value}, that of {first.directory} is {expected}; expected one "
                    "base model"
                )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PartialLoraError(f"--out {folder}: there is something already, expected a new folder")
    names = [f"run{place}" for place in range(len(runs))]  # PEFT would take a bare number for a layer's
    with export.loading(first.adapter):
        adapted = PeftModel.from_pretrained(export.base_model(first), str(first.adapter), adapter_name=names[0])
    for name, run in zip(names[1:], others, strict=True):
        with export.loading(run.adapter):
            adapted.load_adapter(str(run.adapter), name)
    for name, run in zip(names, runs, strict=True):
        config = adapted.peft_config[name]
        if getattr(config, "use_dora", False):
            raise PartialLoraError(f"{run.directory}: method={run.method} has magnitudes, which PEFT does not combine")
        config.use_rslora = False  # scales go into the factors, and PEFT copies the first of these options
    kept = {name: _kept(adapted, name) for name in names}
    set_seed(0)
    try:
        with quiet():
            adapted.add_weighted_adapter(names, list(weights), "default", combination_type=way, density=density)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise PartialLoraError(f"--how {way}: PEFT does not combine these ({one_line(error)})") from error
    with written(folder, "make room there, or choose another --out"), building(folder.resolve()) as built:
        adapted.save_pretrained(built, selected_adapters=["default"], save_embedding_layers=False)
        export.describe(adapted.get_base_model(), first, built)
    pairs = combinations(range(len(runs)), 2)
    return [_overlap(left, right, kept[names[left]], kept[names[right]]) for left, right in pairs]


Kept = Mapping[str, tuple[Tensor, Tensor]]  # {module: (rows, columns)}, True where the adapter has an entry


def _kept(adapted: PeftModel, name: str) -> Kept:
    layers = {place: layer for place, layer in adapted.named_modules() if isinstance(layer, LoraLayer)}
    return {
        place: (layer.lora_B[name].weight.any(dim=1), layer.lora_A[name].weight.any(dim=0))
        for place, layer in layers.items()
        if name in layer.lora_A
    }


def _overlap(first: int, second: int, left: Kept, right: Kept) -> Overlap:
    both = {module: tuple(map(torch.logical_and, left[module], right[module])) for module in left.keys() & right.keys()}
    sizes = [_sizes(kept) for kept in (left, right, both)]
    return Overlap(
        first, second, *(common / max(1, min(ours, theirs)) for ours, theirs, common in zip(*sizes, strict=True))
    )


def _sizes(kept: Kept) -> tuple[int, int, int]:
    """Return how many rows, columns and entries of weights there are."""
    counts = [(int(rows.sum()), int(columns.sum())) for rows, columns in kept.values()]
    rows, columns = (sum(numbers) for numbers in zip(*counts, strict=True)) if counts else (0, 0)
    return rows, columns, sum(high * wide for high, wide in counts)
