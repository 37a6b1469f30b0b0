"""The masked adapter computes, trains and merges as the paper's formula says."""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_models import HEAD, LLAMA_TARGETS, VIT_TARGETS, images, llama, tokens, vit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from partial_lora.adapter import (
    PartialLoraConfig,
    module_masks,
    module_sparsity,
    trainable_parameters,
)
from partial_lora.adapter.layer import KeptColumns, KeptRows
from partial_lora.errors import PartialLoraError
from partial_lora.masks import Mask

# Below and above the density at which the forward pass changes its way, and different for rows and columns.
MIXED = {
    "qkv": {"rows": 0.9, "columns": 0.5},
    "attn.proj": {"rows": 0.3, "columns": 0.8},
    "fc1": 0.87,
    "fc2": {"rows": 0.0, "columns": 0.6},
}


def adapt(base=vit, seed=1, **settings):
    """``base`` with a Partial-LoRA adapter, or with plain LoRA where no sparsity is set."""
    is_vit = base is vit
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": VIT_TARGETS if is_vit else LLAMA_TARGETS,
        "modules_to_save": [HEAD] if is_vit else None,
        **settings,
    }
    config = (
        PartialLoraConfig(**settings) if "sparsity" in settings or "indices" in settings else LoraConfig(**settings)
    )
    model = base()
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def layers(model):
    return {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}


def fill(model, seed=2):
    """Give B values, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in layers(model).values():
            for parameter in layer.lora_B.parameters():
                parameter.normal_()
    return model


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)


def step(model, optimizer, batch, mask_gradients=lambda: None):
    model.train()
    loss = model(**batch).loss
    loss.backward()
    mask_gradients()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


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


@pytest.mark.parametrize("safe", [True, False])
def test_merge_and_unmerge(safe):
    model = fill(adapt(sparsity=MIXED))
    before = {name: layer.base_layer.weight.clone() for name, layer in layers(model).items()}
    expected = logits(model, images())
    model.merge_adapter(safe_merge=safe)
    for name, layer in layers(model).items():
        changed = (layer.base_layer.weight != before[name]).any(1)
        assert changed.equal(torch.from_numpy(module_masks(model)[name].rows.dense()))
    torch.testing.assert_close(logits(model, images()), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    for name, layer in layers(model).items():
        torch.testing.assert_close(layer.base_layer.weight, before[name], atol=1e-6, rtol=0)
    merged = model.merge_and_unload(safe_merge=safe)
    assert not layers_left(merged)
    torch.testing.assert_close(logits(merged, images()), expected, atol=1e-5, rtol=1e-5)


def layers_left(model):
    return [module for module in model.modules() if isinstance(module, (LoraLayer, KeptRows, KeptColumns))]


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


def test_disabled_adapter_is_the_base_model():
    model = fill(adapt(sparsity=MIXED))
    assert not torch.allclose(logits(model, images()), logits(vit(), images()))
    with model.disable_adapter():
        assert torch.equal(logits(model, images()), logits(vit(), images()))


def test_a_copy_is_the_same_and_independent():
    model = fill(adapt(sparsity=MIXED))
    expected = logits(model, images())
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, images()), expected)
    fill(twin, seed=8)
    assert torch.equal(logits(model, images()), expected)
    assert module_masks(twin) == module_masks(model)


def test_autocast_and_low_precision_bases_train():
    model = fill(adapt(sparsity=MIXED))
    reference = model(**images()).logits
    with torch.autocast("cpu", torch.bfloat16):
        result = model(**images())
    result.loss.backward()
    torch.testing.assert_close(result.logits.float(), reference, atol=0.3, rtol=0.1)
    base = vit().to(torch.bfloat16)
    torch.manual_seed(1)
    config = PartialLoraConfig(r=4, target_modules=VIT_TARGETS, sparsity=MIXED)
    low = fill(get_peft_model(base, config))
    assert {p.dtype for p in low.parameters() if p.requires_grad} == {torch.float32}  # PEFT upcasts what trains
    result = low(pixel_values=images()["pixel_values"].bfloat16(), labels=images()["labels"])
    assert result.logits.dtype == torch.bfloat16
    result.loss.backward()
    assert all(p.grad.isfinite().all() for p in low.parameters() if p.requires_grad)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = fill(adapt(llama, sparsity=0.6))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**tokens()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


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


def test_a_weighted_combination_is_dense_and_exact():
    model = fill(adapt(sparsity=MIXED))
    model.add_adapter(
        "other", PartialLoraConfig(r=4, lora_alpha=6, target_modules=VIT_TARGETS, sparsity=0.5, mask_seed=3)
    )
    fill(model, seed=4)
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both", combination_type="cat")
    for layer in layers(model).values():
        expected = 0.5 * layer.get_delta_weight("default") + 2.0 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("both"), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(model.peft_config["default"], PartialLoraConfig)
    assert not isinstance(model.peft_config["both"], PartialLoraConfig)


def test_two_adapters_in_one_batch():
    model = fill(adapt(sparsity=0.9, modules_to_save=None))
    model.add_adapter("other", PartialLoraConfig(r=2, target_modules=VIT_TARGETS, sparsity=0.5))
    fill(model, seed=4)
    pixels = images(count=2)["pixel_values"]
    expected = []
    for name in ("default", "other"):
        model.set_adapter(name)
        expected.append(logits(model, {"pixel_values": pixels}))
    mixed = logits(model, {"pixel_values": pixels, "adapter_names": ["default", "other"]})
    torch.testing.assert_close(mixed, torch.stack([expected[0][0], expected[1][1]]), atol=1e-6, rtol=1e-5)


def test_lost_masks_are_noticed():
    model = adapt(sparsity=0.5)
    name, layer = next(iter(layers(model).items()))
    with pytest.raises(PartialLoraError, match=r"'default' of Linear.* was built again"):
        layer.update_layer("default", r=4, lora_alpha=4, config=model.peft_config["default"])
    with pytest.raises(PartialLoraError, match=f"{name} has lost its masks"):
        module_masks(model)
