"""What PEFT does with its adapters, it does with masked ones."""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_models import MIXED, VIT_TARGETS, adapt, fill, images, layers, llama, logits, tokens, vit
from peft import get_peft_model
from peft.tuners.lora import LoraLayer

from partial_lora.adapter import PartialLoraConfig, module_masks, trainable_parameters
from partial_lora.adapter.factor import FactorA, FactorB


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
    return [module for module in model.modules() if isinstance(module, (LoraLayer, FactorB, FactorA))]


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


def test_only_the_active_adapter_trains():
    model = adapt(sparsity=0.9)
    model.add_adapter("other", PartialLoraConfig(r=2, target_modules=VIT_TARGETS, sparsity=0.5))
    assert trainable_parameters(model) > 0
    assert trainable_parameters(model, "other") == 0
    model.set_adapter("other")
    assert trainable_parameters(model) == 0
    assert trainable_parameters(model, "other") == sum(
        2 * (len(masks.rows.kept) + len(masks.columns.kept)) for masks in module_masks(model, "other").values()
    )


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
