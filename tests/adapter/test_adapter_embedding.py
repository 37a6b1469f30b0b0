"""A masked embedding: rows of B are tokens, columns of A dimensions; its files are those of PEFT's LoRA."""

from __future__ import annotations

import pytest
import torch
from adapter_models import DECODER, llama
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F

from partial_lora.adapter import (
    PartialLoraConfig,
    load_compact,
    module_masks,
    module_sparsity,
    warm_start,
    write_compact,
)
from partial_lora.adapter.factor import MaskedFactor
from partial_lora.errors import PartialLoraError
from partial_lora.masks import TiedMask

EMBED, TARGETS = "model.embed_tokens", ["embed_tokens", "v_proj"]
TOKENS = torch.arange(24).view(2, 12) * 2
SHARES = {"rows": 0.4, "columns": 0.75}


def adapted(**settings: object) -> PeftModel:
    """A Llama with masks on its embedding and values in every factor."""
    torch.manual_seed(1)
    model = get_peft_model(
        llama(), PartialLoraConfig(r=4, target_modules=TARGETS, **{"sparsity": {".*": SHARES}} | settings)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def shares(model: PeftModel) -> dict[str, dict[str, float]]:
    return {name: {axis: round(share, 6) for axis, share in of.items()} for name, of in module_sparsity(model).items()}


def gradient_of_kept(factor: MaskedFactor, dense: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the numbers that a masked factor trains, from a dense factor's."""
    if not isinstance(factor.mask, TiedMask):
        return factor.keep(dense) * factor.multiple
    summed = torch.zeros_like(factor.kept)
    for feature, (place, sign) in enumerate(zip(factor.mask.places, factor.mask.signs, strict=True)):
        summed.select(factor.axis, place).add_(dense.select(factor.axis, feature) * sign)
    return summed


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("granularity", ["rows_columns", "element", "units", "groups"])
def test_an_embedding_trains_what_its_masks_keep_and_nothing_else(granularity):
    model = adapted(granularity=granularity, sparsity={"embed_tokens": SHARES, ".*": 0.5})
    layer, masks = model.get_base_model().model.embed_tokens, module_masks(model)[EMBED]
    assert masks.shape == (DECODER["vocab_size"], DECODER["hidden_size"])
    assert shares(model)[EMBED] == pytest.approx(SHARES, abs=0.05)
    a, b = (getattr(layer, factor)["default"] for factor in ("lora_A", "lora_B"))
    low, high = (factor.weight.detach().clone().as_subclass(torch.Tensor).requires_grad_() for factor in (a, b))
    weight = layer.base_layer.weight
    expected = F.embedding(TOKENS, weight + layer.scaling["default"] * (high @ low))
    assert torch.allclose(layer(TOKENS), expected, atol=1e-6)
    assert not torch.equal(layer(TOKENS), layer.base_layer(TOKENS))
    toward = torch.randn_like(expected)
    for output in (layer(TOKENS), expected):
        (output * toward).sum().backward()
    for factor, dense in ((a, low), (b, high)):
        assert torch.allclose(factor.kept.grad, gradient_of_kept(factor, dense.grad), atol=1e-5)
        assert factor.kept.numel() < dense.numel()
    assert not [name for name, each in model.named_parameters() if "lora_embedding" in name and each.numel()]


@pytest.mark.parametrize(
    "settings",
    [{}, {"granularity": "element"}, {"granularity": "groups"}, {"rank_pattern": {"embed_tokens": 2}}],
)
def test_its_folder_is_a_lora_of_peft_and_gives_the_masks_back(settings, tmp_path):
    model = adapted(**settings)
    expected = logits(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    plain = PeftModel.from_pretrained(llama(), tmp_path)
    assert type(plain.peft_config["default"]) is LoraConfig
    assert torch.allclose(logits(plain), expected, atol=1e-5)
    config = PartialLoraConfig.from_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, config=config)
    assert torch.allclose(logits(again), expected, atol=1e-6)
    assert module_masks(again) == module_masks(model)
    write_compact(model, tmp_path / "compact")
    assert torch.equal(logits(load_compact(llama(), tmp_path / "compact")), expected)
    fresh = adapted(sparsity=0)
    warm_start(fresh, tmp_path)
    assert torch.allclose(logits(fresh), expected, atol=1e-5)


@pytest.mark.parametrize("safe", [False, True])
def test_it_merges_comes_off_again_and_stands_beside_others(safe):
    model = adapted()
    base, expected = logits(llama()), logits(model)
    model.add_adapter("other", PartialLoraConfig(r=2, target_modules=TARGETS, sparsity=0.5))
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    with torch.no_grad():
        mixed = model(TOKENS, adapter_names=["default", "__base__"]).logits
    assert torch.allclose(mixed, torch.stack([expected[0], base[1]]), atol=1e-5)
    model.merge_adapter(safe_merge=safe)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(logits(model), expected, atol=1e-5)
    with pytest.raises(PartialLoraError, match=EMBED):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", "cat")
    model.delete_adapter("other")
    assert torch.allclose(logits(model.merge_and_unload(safe_merge=safe)), expected, atol=1e-5)


def test_what_an_embedding_has_not_is_refused_by_name():
    for key, value in (("columns", "frozen"), ("lora_bias", True)):
        with pytest.raises(PartialLoraError, match=f"{EMBED} .*{key}"):
            adapted(**{key: value})


def test_a_masked_adapter_joins_a_plain_one_that_is_there():
    model = nn.Sequential(nn.Embedding(10, 16))
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"]), model, adapter_name="plain")
    inject_adapter_in_model(PartialLoraConfig(r=4, target_modules=["0"], sparsity=0.5), model, adapter_name="ours")
    layer, ids = model[0], torch.arange(10)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    for name in ("plain", "ours"):
        layer.set_adapter([name])
        expected = layer.base_layer.weight + layer.get_delta_weight(name)
        assert torch.allclose(layer(ids), expected, atol=1e-5)


def test_plain_lora_of_an_embedding_has_full_masks():
    model = get_peft_model(nn.Sequential(nn.Embedding(10, 16)), LoraConfig(r=4, target_modules=["0"]))
    (masks,) = module_masks(model).values()
    ours = get_peft_model(
        nn.Sequential(nn.Embedding(10, 16)), PartialLoraConfig(r=4, target_modules=["0"], sparsity=0.0)
    )
    assert module_masks(ours)["0"].shape == masks.shape == (10, 16)
    assert (masks.rows.sparsity, masks.columns.sparsity) == (0, 0)
