"""Rows and columns tied in random groups: granularity "groups"."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapter_models import KINDS, adapt, dense_twin, fill, layers, loss_of, to, trainable_parameters, vit
from peft import PeftModel

from partial_lora.adapter import PartialLoraConfig, module_masks, warm_start
from partial_lora.errors import PartialLoraError
from partial_lora.masks import Mask, TiedMask, random_keys

SPARSITY = {"rows": 0.7, "columns": 0.85}
OF_FACTORS = {"A": ("columns", 1), "B": ("rows", 0)}


def tied(size: int, sparsity: float, seed: int = 0) -> TiedMask:
    return TiedMask.tied(size, sparsity, mask_seed=seed, module="block.fc", axis="rows")


def test_groups_are_equal_where_members_and_signs_are() -> None:
    mask = tied(12, 0.5)
    assert mask == tied(12, 0.5)
    for places, signs in ((mask.places, -mask.signs), (mask.places[::-1], mask.signs)):
        assert mask != TiedMask(12, mask.kept, places, signs)


def test_groups_are_dealt_in_the_order_of_the_random_keys() -> None:
    for size, sparsity in ((40, 0.7), (41, 0.87), (7, 0.3), (5, 0.9)):
        mask, keys = tied(size, sparsity), random_keys(size, mask_seed=0, module="block.fc", axis="rows")
        plain = Mask.random(size, sparsity, mask_seed=0, module="block.fc", axis="rows")
        assert np.array_equal(mask.kept, plain.kept)
        order = sorted(range(size), key=lambda each: keys[each])
        for place, each in enumerate(order):  # literally: dealt out one after the other
            first = order[place % len(plain.kept)]
            assert mask.kept[mask.places[each]] == first
            assert mask.signs[each] == (1 if each == first or keys[each] % 2 == 0 else -1)
    assert np.array_equal(tied(40, 0.0).places, np.arange(40))
    assert tied(400, 0.9) != tied(400, 0.9, seed=1)
    assert 0.4 < (tied(4000, 0.9).signs > 0).mean() < 0.65


@pytest.mark.parametrize("name", ["wrapped_vit", "gpt2", "timm_convnext"])
def test_a_group_has_the_gradient_of_all_its_features_by_their_signs(name) -> None:
    kind = KINDS[name]
    # The first target's rows are dense, the others' of both axes are in groups.
    sparsity = {kind.targets[0]: {"rows": 0.0, "columns": 0.85}, ".*": SPARSITY}
    model = fill(adapt(kind.build, sparsity=sparsity, granularity="groups")).double()
    twin = dense_twin(model, kind.build).double()
    batch = to(kind.batch(0), torch.float64)
    model.eval(), twin.eval()
    losses = [loss_of(each, batch) for each in (model, twin)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-10)
    for loss in losses:
        loss.backward()
    for module, masks in module_masks(model).items():
        for which, (axis, dim) in OF_FACTORS.items():
            mask = getattr(masks, axis)
            dense, own = (getattr(layers(each)[module], f"lora_{which}")["default"] for each in (twin, model))
            expected = torch.zeros_like(own.kept)
            for feature in range(mask.size):
                one = dense.weight.grad.select(dim, feature) * mask.signs[feature]
                expected.select(dim, mask.places[feature]).add_(one)
            torch.testing.assert_close(own.kept.grad, expected, atol=1e-10, rtol=1e-8)
            assert expected.any()


def test_nothing_is_zero_and_as_many_numbers_train_as_of_rows_and_columns() -> None:
    both = [fill(adapt(sparsity=0.8, granularity=each)) for each in ("groups", "rows_columns")]
    assert trainable_parameters(both[0]) == trainable_parameters(both[1])
    for layer in layers(both[0]).values():
        assert layer.lora_A["default"].weight.all()
        assert layer.lora_B["default"].weight.all()


def test_the_draw_and_the_scaling_are_those_of_plain_lora() -> None:
    settings = {"fan_in": "kept", "row_exponent": 1.0, "column_exponent": 1.0}
    plain, aware = (adapt(sparsity=0.8, granularity="groups", **each) for each in ({}, settings))
    for name, layer in layers(aware).items():
        assert layer.scaling == layers(plain)[name].scaling
        assert torch.equal(layer.lora_A["default"].kept, layers(plain)[name].lora_A["default"].kept)


def test_an_adapter_without_groups_is_refused(tmp_path) -> None:
    masked = fill(adapt(sparsity=0.8))
    masked.save_pretrained(tmp_path)
    config = PartialLoraConfig.from_pretrained(tmp_path)
    config.granularity = "groups"
    with pytest.raises(PartialLoraError, match="lora_A"):
        PeftModel.from_pretrained(vit(), tmp_path, config=config)


def test_a_warm_start_takes_the_nearest_factor_in_groups() -> None:
    lora, model = fill(adapt()), adapt(sparsity=0.8, granularity="groups")
    warm_start(model, lora)
    for module, masks in module_masks(model).items():
        for which, (axis, dim) in OF_FACTORS.items():
            given, own = (getattr(layers(each)[module], f"lora_{which}")["default"] for each in (lora, model))
            mask = getattr(masks, axis)
            for group in range(len(mask.kept)):
                members = np.flatnonzero(mask.places == group)
                signed = [given.weight.select(dim, int(each)) * int(mask.signs[each]) for each in members]
                torch.testing.assert_close(own.kept.select(dim, group), torch.stack(signed).mean(0))
