"""The modules of a model by their kind and their depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from partial_lora.masks import AXES, Sparsity
from partial_lora.report.rows import NONE


def depth_of(module: str) -> tuple[str, tuple[int, ...]]:
    """Return a module's kind and depth, by its name: "m.blocks.3.attn.qkv" is ("m.blocks.attn.qkv", (3,))."""
    parts = module.split(".")
    return ".".join(part for part in parts if not part.isdigit()), tuple(int(part) for part in parts if part.isdigit())


def depth_name(depth: Iterable[int]) -> str:
    return ".".join(map(str, depth)) or NONE


def grid(sparsity: Sparsity) -> tuple[list[str], list[tuple[int, ...]], dict[str, np.ndarray]]:
    """Return kinds of modules in the model's order, depths, and sparsities by axis, NaN where there is no module."""
    places = {module: depth_of(module) for module in sparsity}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    depths = sorted({depth for _, depth in places.values()})
    grids = {axis: np.full((len(kinds), len(depths)), np.nan) for axis in AXES}
    for module, (kind, depth) in places.items():
        for axis, cells in grids.items():
            cells[kinds.index(kind), depths.index(depth)] = sparsity[module][axis]
    return without_common_start(kinds), depths, grids


def without_common_start(kinds: Sequence[str]) -> list[str]:
    """Return names without the leading parts that all of them share; every name keeps at least its last part."""
    split = [kind.split(".") for kind in kinds]
    shared = 0
    while all(len(parts) > shared + 1 for parts in split) and len({parts[shared] for parts in split}) == 1:
        shared += 1
    return [".".join(parts[shared:]) for parts in split]
