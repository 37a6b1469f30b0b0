"""The paper's flow ablation: Partial-LoRA whose masks let the signal of one module's adapter reach the next one's."""

from __future__ import annotations

import numpy as np
from peft import PeftModel, get_peft_model
from torch import nn

from partial_lora.adapter import PartialLoraConfig
from partial_lora.errors import PartialLoraError
from partial_lora.masks import Mask, random_keys
from partial_lora.methods.setting import Setting
from partial_lora.models.targets import chains


def flow(model: nn.Module, setting: Setting) -> PeftModel:
    """Partial-LoRA of the same size, with random masks by which a module reads what the one before it writes.

    Rows and columns: a module keeps the same columns as in `partial`, and each of them meets a kept row of the module
    that feeds it; the feeding module's other kept rows are drawn as in `partial`. Where it keeps fewer rows than there
    are columns to meet, each of its rows meets one. Single entries: no unit of the rank is empty, in A or in B, where
    enough are kept. Raises PartialLoraError, "not applicable", where no adapted module feeds another.
    """
    masks = setting.masks()
    if setting.mask.granularity == "rows_columns":
        pairs = chains(model, setting.shapes)
        if not pairs:
            raise PartialLoraError("method=flow: not applicable: no module of model.target_modules feeds another")
        for chain in pairs:
            read = chain.rows[masks[chain.second]["columns"].kept]
            rows = masks[chain.first]["rows"]
            keys = random_keys(rows.size, mask_seed=setting.mask_seed, module=chain.first, axis="rows")
            masks[chain.first]["rows"] = meeting(rows, read, feeding=chain.rows, keys=keys)
    else:
        masks = {module: _without_gaps(axes, setting.rank, setting.mask_seed, module) for module, axes in masks.items()}
    return get_peft_model(model, PartialLoraConfig(**setting.chosen(masks)))


def meeting(rows: Mask, read: np.ndarray, *, feeding: np.ndarray, keys: np.ndarray) -> Mask:
    """Return a mask of as many rows as `rows` keeps: all that are `read`, then those with the lowest keys.

    `feeding` are the rows that the next module can read. Where `rows` keeps too few for all that are read, its other
    rows (queries and keys beside the values) stay as they are.
    """
    count = len(rows.kept)
    wanted = np.zeros(rows.size, dtype=bool)
    wanted[read] = True
    if wanted.sum() <= count:
        order = np.lexsort((keys, ~wanted))
        return Mask(rows.size, np.sort(order[:count]))
    fed = np.isin(rows.kept, feeding)
    those = np.flatnonzero(wanted)
    those = those[np.argsort(keys[those])][: fed.sum()]
    return Mask(rows.size, np.sort(np.concatenate([rows.kept[~fed], those])))


def spread(count: int, groups: np.ndarray, keys: np.ndarray, order: np.ndarray) -> Mask:
    """Return a mask of `count` entries: first the lowest key (size,) of each group (size,), then the lowest keys.

    Where there are fewer entries than groups, the groups that come first in `order` have one.
    """
    by_group = np.lexsort((keys, groups))
    lowest = by_group[np.unique(groups[by_group], return_index=True)[1]]  # of group 0, 1, …
    turn = np.full(len(keys), len(order))
    turn[lowest[order]] = np.arange(len(order))
    return Mask(len(keys), np.sort(np.lexsort((keys, turn))[:count]))


def _without_gaps(axes: dict[str, Mask], rank: int, seed: int, module: str) -> dict[str, Mask]:
    """Return masks of B (out × rank) and A (rank × in), flat, with an entry for every unit of the rank."""
    rows, columns = axes["rows"].size, axes["columns"].size
    units = {"rows": np.arange(rows) % rank, "columns": np.arange(columns) // (columns // rank)}
    order = np.argsort(random_keys(rank, mask_seed=seed, module=module, axis="units"))
    return {
        axis: spread(
            len(mask.kept), units[axis], random_keys(mask.size, mask_seed=seed, module=module, axis=axis), order
        )
        for axis, mask in axes.items()
    }
