"""The masked adapter computes and trains as the paper's formula says."""

from __future__ import annotations

import pytest
import torch
from adapter_models import (
    HEAD,
    MIXED,
    VIT_TARGETS,
    adapt,
    fill,
    images,
    layers,
    llama,
    logits,
    optimizer_of,
    step,
    tokens,
    vit,
)

from partial_lora.adapter import module_masks, module_sparsity, trainable_parameters
from partial_lora.errors import PartialLoraError
from partial_lora.masks import Mask


@pytest.mark.parametrize(("base", "batches"), [(vit, images), (llama, tokens)])
def test_sparsity_zero_is_plain_lora_to_the_last_bit(base, batches):
    partial, plain = adapt(base, sparsity=0.0, lora_dropout=0.2), adapt(base, lora_dropout=0.2)
    losses = []
    for model in (partial, plain):
        torch.manual_seed(3)  # of dropout
        optimizer = optimizer_of(model)
        losses.append([step(model, optimizer, batches(seed)) for seed in range(5)])
    assert losses[0] == losses[1]
    assert torch.equal(logits(partial, batches(9)), logits(plain, batches(9)))
    assert trainable_parameters(partial) == trainable_parameters(plain)


@pytest.mark.parametrize(
    ("base", "batches", "sparsity"), [(vit, images, MIXED), (vit, images, 0.9), (llama, tokens, 0.4)]
)
def test_training_equals_dense_lora_with_masked_values_and_gradients(base, batches, sparsity):
    partial, twin = adapt(base, sparsity=sparsity), adapt(base)
    masked = []
    for name, masks in module_masks(partial).items():
        layer = layers(twin)[name]
        rows = torch.from_numpy(masks.rows.dense()).float()[:, None]
        columns = torch.from_numpy(masks.columns.dense()).float()[None, :]
        masked += [(layer.lora_A["default"].weight, columns), (layer.lora_B["default"].weight, rows)]
    for weight, mask in masked:
        weight.data *= mask

    def mask_gradients():
        for weight, mask in masked:
            weight.grad *= mask

    optimizers = optimizer_of(partial), optimizer_of(twin)
    for seed in range(12):
        batch = batches(seed)
        loss = step(partial, optimizers[0], batch)
        assert loss == pytest.approx(step(twin, optimizers[1], batch, mask_gradients), abs=1e-5)
    torch.testing.assert_close(logits(partial, batches(20)), logits(twin, batches(20)), atol=2e-5, rtol=1e-5)
    for name, layer in layers(partial).items():
        torch.testing.assert_close(
            layer.get_delta_weight("default"), layers(twin)[name].get_delta_weight("default"), atol=2e-5, rtol=1e-5
        )


def test_a_is_drawn_as_peft_draws_it_and_b_is_zero():
    partial, plain = adapt(sparsity=MIXED), adapt()
    for name, masks in module_masks(partial).items():
        drawn = layers(plain)[name].lora_A["default"].weight
        assert torch.equal(layers(partial)[name].lora_A["default"].kept, drawn[:, masks.columns.kept.copy()])
        assert not layers(partial)[name].lora_B["default"].kept.any()
    assert torch.equal(logits(partial, images()), logits(vit(), images()))


def test_kept_entries_are_all_that_trains_and_every_target_gets_a_gradient():
    model = fill(adapt(sparsity=MIXED))
    model(**images()).loss.backward()
    expected = sum(4 * (len(masks.rows.kept) + len(masks.columns.kept)) for masks in module_masks(model).values())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapter = {name: p for name, p in trained.items() if "lora_" in name}
    assert trainable_parameters(model) == sum(p.numel() for p in adapter.values()) == expected
    assert {name.rpartition(".")[0] for name in trained.keys() - adapter.keys()} == {
        f"base_model.model.{HEAD}.modules_to_save.default"
    }
    assert len(adapter) == 16
    assert all(p.grad.abs().sum() > 0 for p in adapter.values())
    assert {p.numel() for p in adapter.values()} != {0}


def test_masked_entries_stay_zero_in_the_dense_view():
    model = adapt(sparsity=MIXED)
    optimizer = optimizer_of(model)
    for seed in range(3):
        step(model, optimizer, images(seed))
    for name, masks in module_masks(model).items():
        a, b = layers(model)[name].lora_A["default"].weight, layers(model)[name].lora_B["default"].weight
        assert (a.shape, b.shape) == ((4, masks.shape[1]), (masks.shape[0], 4))
        assert not a[:, ~torch.from_numpy(masks.columns.dense())].any()
        assert not b[~torch.from_numpy(masks.rows.dense())].any()
        assert b.any()


def test_masks_do_not_depend_on_rank_global_seed_or_order_of_targets():
    masks = module_masks(adapt(sparsity=0.7))
    for other in (
        adapt(sparsity=0.7, r=2),
        adapt(sparsity=0.7, seed=5),
        adapt(sparsity=0.7, target_modules=VIT_TARGETS[::-1]),
    ):
        assert module_masks(other) == masks
    assert module_masks(adapt(sparsity=0.7, mask_seed=1)) != masks
    name = "timm_model.blocks.1.mlp.fc1"
    assert masks[name].rows == Mask.random(128, 0.7, mask_seed=0, module=name, axis="rows")
    assert masks[name].columns == Mask.random(32, 0.7, mask_seed=0, module=name, axis="columns")
    assert module_sparsity(adapt(sparsity=0.7))[name] == {"rows": 1 - 38 / 128, "columns": 1 - 10 / 32}


def test_delta_weight_can_be_checked_by_eye():
    model = adapt(sparsity={"fc1": 0.96}, r=1, lora_alpha=2, target_modules=["blocks.0.mlp.fc1"])
    name, layer = next(iter(layers(model).items()))
    masks = module_masks(model)[name]
    layer.lora_A["default"].kept.data.fill_(3.0)
    layer.lora_B["default"].kept.data.fill_(5.0)
    delta = torch.zeros(128, 32)
    for row in masks.rows.kept:
        for column in masks.columns.kept:
            delta[row, column] = 2 * 3 * 5
    assert len(masks.rows.kept) == 5
    assert len(masks.columns.kept) == 1
    assert torch.equal(layer.get_delta_weight("default"), delta)


def test_the_dense_view_passes_gradients_to_the_kept_entries():
    layer = layers(adapt(sparsity=0.5))["timm_model.blocks.0.mlp.fc1"]
    layer.lora_A["default"].weight.sum().backward()
    assert torch.equal(layer.lora_A["default"].kept.grad, torch.ones(4, 16))


def test_top_keeps_the_given_indices():
    indices = {"timm_model.blocks.0.mlp.fc1": {"rows": [0, 7, 127], "columns": [3]}}
    model = adapt(selection="top", indices=indices, target_modules=["blocks.0.mlp.fc1"])
    masks = module_masks(model)["timm_model.blocks.0.mlp.fc1"]
    assert (masks.rows.kept.tolist(), masks.columns.kept.tolist()) == ([0, 7, 127], [3])


def test_plain_lora_has_full_masks():
    model = adapt()
    assert set(map(str, module_sparsity(model).values())) == {"{'rows': 0.0, 'columns': 0.0}"}
    assert trainable_parameters(model) == 2 * 4 * (96 + 32 + 32 + 32 + 128 + 32 + 32 + 128)


def test_lost_masks_are_noticed():
    model = adapt(sparsity=0.5)
    name, layer = next(iter(layers(model).items()))
    with pytest.raises(PartialLoraError, match=r"'default' of Linear.* was built again"):
        layer.update_layer("default", r=4, lora_alpha=4, config=model.peft_config["default"])
    with pytest.raises(PartialLoraError, match=f"{name} has lost its masks"):
        module_masks(model)
