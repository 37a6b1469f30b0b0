"""What is kept: masks of single entries, those of the highest scores, and those that are given."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from adapter_models import layers, trainable_parameters
from peft import LoraConfig, get_peft_model
from refusals import refusal
from torch import nn

from partial_lora.adapter import PartialLoraConfig, module_masks, module_sparsity
from partial_lora.adapter.selection import Geometry, geometry
from partial_lora.errors import PartialLoraError
from partial_lora.masks import AXES, Mask, kept_count

GRANULARITIES = ("rows_columns", "element")


class Mixed(nn.Module):
    """One layer of each geometry: linear, a convolution, one in groups, one of a kernel that is not square."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 10)
        self.conv = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.long = nn.Conv1d(4, 6, 5)


GEOMETRIES = {
    "linear": Geometry((10, 6), a=(4, 6), b=(10, 4)),
    "conv": Geometry((6, 4), a=(4, 4, 3, 3), b=(6, 4, 1, 1)),
    "grouped": Geometry((12, 8), a=(4, 8, 3, 3), b=(12, 2, 1, 1)),
    "long": Geometry((6, 4), a=(4, 4, 5), b=(6, 4, 1)),
}


def config(**settings):
    return PartialLoraConfig(**{"r": 4, "target_modules": list(GEOMETRIES), **settings})


def sizes(granularity):
    return {module: GEOMETRIES[module].sizes(granularity) for module in GEOMETRIES}


def test_geometries_are_those_of_the_factors_peft_builds():
    dense = get_peft_model(Mixed(), LoraConfig(r=4, target_modules=list(GEOMETRIES)))
    for name, layer in layers(dense).items():
        shapes = tuple(layer.lora_A["default"].weight.shape), tuple(layer.lora_B["default"].weight.shape)
        assert (GEOMETRIES[name].a, GEOMETRIES[name].b) == shapes
        assert geometry(name, layer, 4) == GEOMETRIES[name]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_random_masks_are_those_of_the_formula_over_what_is_masked(granularity):
    sparsity = {"linear": {"rows": 0.5, "columns": 0.25}, ".*": {"rows": 0.8, "columns": 0.9}}
    model = get_peft_model(Mixed(), config(sparsity=sparsity, granularity=granularity, mask_seed=3))
    found = module_masks(model)
    assert found.keys() == GEOMETRIES.keys()
    for module, axes in sizes(granularity).items():
        shares = sparsity.get(module, sparsity[".*"])
        for axis, size in axes.items():
            expected = Mask.random(size, shares[axis], mask_seed=3, module=module, axis=axis)
            assert getattr(found[module], axis) == expected
        assert found[module].shape == GEOMETRIES[module].shape
        assert found[module].element == (granularity == "element")


def test_element_masks_are_over_the_entries_of_b_and_a_in_row_major_order():
    model = get_peft_model(Mixed(), config(sparsity=0.7, granularity="element", init_lora_weights=False))
    kept = 0
    for module, masks in module_masks(model).items():
        layer = layers(model)[module]
        for factor, mask in ((layer.lora_B, masks.rows), (layer.lora_A, masks.columns)):
            weight = factor["default"].weight
            assert (weight.flatten() != 0).tolist() == mask.dense().tolist()
            assert len(mask.kept) == kept_count(weight.numel(), 0.7)
            kept += len(mask.kept)
    assert trainable_parameters(model) == kept


def test_bernoulli_masks_are_those_of_the_formula_and_keep_another_number():
    models = {
        count: get_peft_model(Mixed(), config(sparsity=0.7, granularity="element", count=count))
        for count in ("exact", "bernoulli")
    }
    exact, drawn = (module_masks(model) for model in models.values())
    for module, axes in sizes("element").items():
        for axis, size in axes.items():
            expected = Mask.bernoulli(size, 0.7, mask_seed=0, module=module, axis=axis)
            assert getattr(drawn[module], axis) == expected
            # Both take the lowest of the same keys.
            one, other = (set(getattr(masks[module], axis).kept.tolist()) for masks in (exact, drawn))
            assert one <= other or other <= one
    assert module_sparsity(models["bernoulli"]) != module_sparsity(models["exact"])


def test_at_rank_one_both_granularities_are_one():
    targets = {"target_modules": ["linear"], "r": 1, "sparsity": 0.6}
    one, other = (module_masks(get_peft_model(Mixed(), config(granularity=g, **targets))) for g in GRANULARITIES)
    assert one == other


FORMS = {
    "list": list,
    "array": np.array,
    "float32": lambda scores: torch.tensor(scores, dtype=torch.float32),
    "bfloat16": lambda scores: torch.tensor(scores, dtype=torch.bfloat16),
    "trained": lambda scores: torch.tensor(scores, dtype=torch.float32, requires_grad=True),
    "scalars": lambda scores: list(torch.tensor(scores)),
}


def importance(granularity, seed=0):
    """Whole scores with many ties, which every form can hold."""
    draw = np.random.default_rng(seed)
    return {
        module: {axis: draw.integers(-9, 9, size).tolist() for axis, size in axes.items()}
        for module, axes in sizes(granularity).items()
    }


def in_form(scores, form):
    return {module: {axis: FORMS[form](values) for axis, values in axes.items()} for module, axes in scores.items()}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("form", FORMS)
def test_top_keeps_what_scores_highest_and_of_equals_the_lower_index(form, granularity):
    scores = importance(granularity)
    sparsity = {"linear": 0.4, ".*": {"rows": 0.8, "columns": 0.6}}
    settings = {"selection": "top", "granularity": granularity}
    model = get_peft_model(Mixed(), config(scores=in_form(scores, form), sparsity=sparsity, **settings))
    found = module_masks(model)
    for module, axes in scores.items():
        for axis, values in axes.items():
            share = 0.4 if module == "linear" else sparsity[".*"][axis]
            order = sorted(range(len(values)), key=lambda index: (-values[index], index))
            assert getattr(found[module], axis).kept.tolist() == sorted(order[: kept_count(len(values), share)])
    # The same by naming what is kept, in any form and whatever the seed.
    kept = {module: {axis: getattr(masks, axis).kept.tolist() for axis in AXES} for module, masks in found.items()}
    whole = form if form in ("list", "array", "scalars") else "list"
    for given in (sparsity, 0.0):
        by_name = config(indices=in_form(kept, whole), sparsity=given, mask_seed=8, **settings)
        assert module_masks(get_peft_model(Mixed(), by_name)) == found


def test_scores_of_every_size_of_number_keep_their_order():
    keys = np.array([2**64 - 1, 5, 2**63, 7, 2**62, 1], dtype=np.uint64)
    scores = {"linear": {"rows": np.arange(10), "columns": keys}}
    model = get_peft_model(Mixed(), config(target_modules=["linear"], selection="top", scores=scores, sparsity=0.5))
    assert module_masks(model)["linear"].columns.kept.tolist() == [0, 2, 4]


def other(scores, change):
    changed = {module: dict(axes) for module, axes in scores.items()}
    change(changed)
    return changed


def replaced(values):
    return lambda scores: scores["conv"].update(rows=values)


@pytest.mark.parametrize("key", ["scores", "indices"])
@pytest.mark.parametrize(
    ("change", "entry"),
    [
        (lambda s: s["conv"].pop("rows"), r"\['conv'\]"),
        (lambda s: s["conv"].update(a=[1]), r"\['conv'\]"),
        (lambda s: s.update(conv=[1, 2]), r"\['conv'\]"),
        *(
            (replaced(values), r"\['conv'\]\['rows'\]")
            for values in (
                [1.0, math.nan],
                torch.tensor([1.0, -math.inf]),
                [[1.0], [2.0]],
                [[1.0], [2.0, 3.0]],
                [True, False],
                3.0,
                torch.ones(2, device="meta"),
                torch.ones(2).to_sparse(),
            )
        ),
    ],
)
def test_what_are_no_numbers_for_each_axis_is_refused(change, entry, key):
    with refusal(f"{key}{entry}"):
        config(selection="top", **{key: other(importance("rows_columns"), change)})


def test_scores_that_are_no_dictionary_are_refused():
    with pytest.raises(PartialLoraError, match=r"^scores is a list"):
        config(selection="top", scores=[1, 2])


@pytest.mark.parametrize("key", ["scores", "indices"])
@pytest.mark.parametrize("module", ["conv", "head"])
def test_values_of_other_modules_are_refused_before_anything_is_built(module, key):
    names = (*GEOMETRIES, "head") if module == "head" else GEOMETRIES.keys() - {"conv"}
    values = {name: {axis: [0] for axis in AXES} for name in names}
    model = Mixed()
    with pytest.raises(PartialLoraError, match=f"^{key} .*{module}"):
        get_peft_model(model, config(selection="top", **{key: values}))
    assert not layers(model)


@pytest.mark.parametrize(("granularity", "size"), [("rows_columns", 6), ("element", 24)])
@pytest.mark.parametrize("length", [0, 7])
def test_scores_of_another_length_are_refused(length, granularity, size):
    scores = importance(granularity)
    scores["conv"]["rows"] = [1.0] * length
    with pytest.raises(PartialLoraError, match=rf"^scores\['conv'\]\['rows'\] .*{length}.*{size}"):
        get_peft_model(Mixed(), config(selection="top", granularity=granularity, scores=scores, sparsity=0.5))


@pytest.mark.parametrize(
    ("granularity", "rows", "sparsity"),
    [
        *(("rows_columns", rows, 0.0) for rows in ([], [0.0, 1.0], [1, 0], [1, 1], [-1], [6])),
        ("element", [24], 0.0),
        ("rows_columns", [0, 1], 0.5),  # another number than that of the sparsity
        ("element", [0, 1], 0.5),
    ],
)
def test_indices_that_do_not_fit_are_refused(granularity, rows, sparsity):
    indices = {"conv": {"rows": rows, "columns": [0, 1] if granularity == "rows_columns" else list(range(72))}}
    settings = {"target_modules": ["conv"], "selection": "top", "granularity": granularity}
    with pytest.raises(PartialLoraError, match=r"^indices\['conv'\]\['rows'\]"):
        get_peft_model(Mixed(), config(indices=indices, sparsity=sparsity, **settings))
