"""Masks that let the signal through: what feeds what in each family, and that what is read has been written."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from configured import load
from method_settings import adapted, setting_of
from torch import nn

from partial_lora.adapter import module_masks
from partial_lora.errors import PartialLoraError
from partial_lora.masks import random_keys
from partial_lora.methods.flow import spread
from partial_lora.models.targets import chains

BLOCKS = {  # chains of one block, first to second
    "tiny_vit": {("mlp.fc1", "mlp.fc2"), ("attn.qkv", "attn.proj")},
    "tiny_convnext": {("mlp.fc1", "mlp.fc2")},
    "tiny_bert": {("intermediate.dense", "output.dense"), ("attention.self.value", "attention.output.dense")},
    "tiny_deberta": {("intermediate.dense", "output.dense"), ("attention.self.value_proj", "attention.output.dense")},
    "tiny_llama": {
        ("mlp.gate_proj", "mlp.down_proj"),
        ("mlp.up_proj", "mlp.down_proj"),
        ("self_attn.v_proj", "self_attn.o_proj"),
    },
}


def found_in(name: str) -> tuple[nn.Module, list]:
    model = load(name)
    return model, chains(model, setting_of(name, model).shapes)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_of_a_family_has_its_chains(name: str) -> None:
    model, found = found_in(name)
    blocks = 5 if name == "tiny_convnext" else 3
    assert len(found) == blocks * len(BLOCKS[name])
    for chain in found:
        first, second = (
            next(end for end in ends if each.endswith(f".{end}"))
            for each, ends in (
                (chain.first, [pair[0] for pair in BLOCKS[name]]),
                (chain.second, sorted({pair[1] for pair in BLOCKS[name]}, key=len, reverse=True)),
            )
        )
        assert (first, second) in BLOCKS[name]
        assert chain.first.removesuffix(first) == chain.second.removesuffix(second)
        assert len(chain.rows) == model.get_submodule(chain.second).in_features
        assert chain.rows.max() < model.get_submodule(chain.first).out_features


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_llama"])
def test_a_row_of_the_values_reaches_the_columns_of_its_chain_and_no_others(name: str) -> None:
    model, found = found_in(name)
    chain = next(each for each in found if each.second.endswith(("attn.proj", "o_proj")))
    first, second = model.get_submodule(chain.first), model.get_submodule(chain.second)
    read = []
    second.register_forward_pre_hook(lambda module, given: read.append(given[0].detach()))
    batch = {"pixel_values": torch.randn(1, 3, 32, 32)} if name == "tiny_vit" else {"input_ids": torch.tensor([[5, 6]])}
    values = range(first.out_features)[2 * first.in_features :] if name == "tiny_vit" else range(first.out_features)
    for row in (values[0], values[7], values[-1]):
        read.clear()
        with torch.no_grad():
            model(**batch)
            first.weight[row] += 1.0
            model(**batch)
            first.weight[row] -= 1.0
        moved = (read[0] != read[1]).flatten(0, -2).any(0)
        assert torch.equal(torch.from_numpy(chain.rows == row), moved)


@pytest.mark.parametrize("name", BLOCKS)
def test_kept_columns_meet_kept_rows_at_the_counts_of_partial(name: str) -> None:
    _, found = found_in(name)
    for seed in range(2):
        reference, _ = adapted("partial", name, seed=seed)
        model, _ = adapted("flow", name, seed=seed)
        before, after = module_masks(reference), module_masks(model)
        fed = set()
        for module, masks in after.items():
            assert masks.columns == before[module].columns
            assert len(masks.rows.kept) == len(before[module].rows.kept)
        for chain in found:
            read, written = chain.rows[after[chain.second].columns.kept], after[chain.first].rows
            fed.add(chain.first)
            if len(set(read)) <= len(written.kept):
                assert set(read) <= set(written.kept)
            else:
                inside = set(written.kept) & set(chain.rows)
                assert inside <= set(read)
                assert len(inside) == len(set(before[chain.first].rows.kept) & set(chain.rows))
        assert all(after[module].rows == before[module].rows for module in after.keys() - fed)
        random = sum(
            len(set(chain.rows[before[chain.second].columns.kept]) - set(before[chain.first].rows.kept))
            for chain in found
        )
        assert random > 0  # partial's own masks do not meet


def test_masks_follow_the_seed_alone() -> None:
    one, again, other = (module_masks(adapted("flow", "tiny_llama", mask_seed=seed)[0]) for seed in (0, 0, 1))
    assert one == again
    assert one != other


def literal_spread(count: int, groups: list[int], keys: list[int], order: list[int]) -> list[int]:
    kept = []
    for group in order:
        if len(kept) < count:
            kept.append(min((place for place in range(len(keys)) if groups[place] == group), key=keys.__getitem__))
    for place in sorted(range(len(keys)), key=keys.__getitem__):
        if len(kept) < count and place not in kept:
            kept.append(place)
    return sorted(kept)


def test_entries_are_spread_as_a_literal_twin_spreads_them() -> None:
    for seed in range(20):
        drawn = np.random.default_rng(seed)
        groups = drawn.permutation(np.arange(24) % 4)
        keys = random_keys(24, mask_seed=seed, module="m", axis="rows")
        order = drawn.permutation(4)
        for count in (1, 3, 4, 5, 24):
            expected = literal_spread(count, groups.tolist(), keys.tolist(), order.tolist())
            assert spread(count, groups, keys, order).kept.tolist() == expected


@pytest.mark.parametrize("high", [0.95, 0.99])
def test_no_unit_of_the_rank_is_empty_where_enough_entries_are_kept(high: float) -> None:
    given = {"granularity": "element", "rank": 8}
    model = load("tiny_vit")
    shapes = setting_of("tiny_vit", model).shapes
    sparsity = {module: {"rows": high, "columns": high} for module in shapes}
    gaps = {}
    for method in ("partial", "flow"):
        adapter, _ = adapted(method, "tiny_vit", sparsity=sparsity, **given)
        gaps[method] = 0
        for module, masks in module_masks(adapter).items():
            m, n = shapes[module]
            units = {"rows": set(masks.rows.kept % 8), "columns": set(masks.columns.kept // n)}
            assert (masks.rows.size, masks.columns.size) == (8 * m, 8 * n)
            for axis, mask in (("rows", masks.rows), ("columns", masks.columns)):
                gaps[method] += min(8, len(mask.kept)) - len(units[axis])
                assert len(mask.kept) == max(1, math.floor((1 - high) * mask.size + 0.5))
            if method == "flow":  # those of the side that has fewer are among the other's
                assert units["rows"] <= units["columns"] or units["columns"] <= units["rows"]
    assert gaps["flow"] == 0 < gaps["partial"]


def test_modules_that_do_not_feed_each_other_are_refused() -> None:
    model = load("tiny_vit")
    setting = setting_of("tiny_vit", model)
    alone = {module: shape for module, shape in setting.shapes.items() if module.endswith("fc1")}
    with pytest.raises(PartialLoraError, match=r"^method=flow: .*model\.target_modules"):
        adapted("flow", "tiny_vit", shapes=alone, sparsity={module: setting.sparsity[module] for module in alone})
