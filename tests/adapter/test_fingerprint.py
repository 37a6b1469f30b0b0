"""Fingerprints tell a base model from its siblings, in any precision, and not from itself after training an adapter."""

from __future__ import annotations

import math

import torch
from adapter_models import HEAD, adapt, fill, images, llama, optimizer_of, qwen2, redrawn, step, vit

from partial_lora.adapter.fingerprint import fingerprint


def test_a_model_with_quantised_linear_layers_is_known_by_the_rest_of_it():
    own, quantised, other = vit(), vit(), redrawn()
    for model in (quantised, other):
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                packed = torch.zeros(math.ceil(module.weight.numel() / 2), 1, dtype=torch.uint8)
                module.weight = torch.nn.Parameter(packed, requires_grad=False)
    assert fingerprint(own).agrees(fingerprint(quantised))
    assert not fingerprint(own).agrees(fingerprint(other))
    assert not fingerprint(quantised).agrees(fingerprint(other))
    before = fingerprint(quantised)
    weight = quantised.timm_model.blocks[0].mlp.fc1.weight
    weight.data = torch.ones(weight.shape[::-1], dtype=torch.uint8)  # packed otherwise
    assert fingerprint(quantised) == before


def test_codes_that_are_stored_as_numbers_are_not_compared():
    """bitsandbytes' codes under bnb_4bit_quant_storage=torch.bfloat16, as FSDP wants them."""

    class Params4bit(torch.nn.Parameter):
        quant_state = None

    own, stored, other = llama().to(torch.bfloat16), llama().to(torch.bfloat16), redrawn(llama).to(torch.bfloat16)
    for model in (stored, other):
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = Params4bit(torch.zeros(7, 1, dtype=torch.bfloat16), requires_grad=False)
    assert fingerprint(own).agrees(fingerprint(stored))
    assert fingerprint(stored).is_quantised
    assert not fingerprint(own).agrees(fingerprint(other))


def test_a_base_with_a_masked_adapter_merged_into_it_is_another():
    own = fingerprint(qwen2())
    for seed in range(20):
        merged = fill(adapt(qwen2, sparsity=0.87, mask_seed=seed)).merge_and_unload()
        assert not own.agrees(fingerprint(merged))


def test_other_linear_weights_are_told_apart_in_another_precision():
    own, other = fingerprint(llama()), llama()
    assert own.agrees(fingerprint(llama().to(torch.bfloat16)))
    for name, parameter in other.named_parameters():
        if "proj" in name:
            torch.nn.init.normal_(parameter)
    assert not own.agrees(fingerprint(other.to(torch.bfloat16)))
    assert type(own).parse(str(own)) == type(own).parse(str(type(own).parse(str(own))))


def test_adapters_and_their_training_do_not_move_the_fingerprint():
    model = adapt(sparsity=0.5)
    head = {f"{HEAD}.weight", f"{HEAD}.bias"}
    step(model, optimizer_of(model), images())
    assert fingerprint(model.get_base_model(), head) == fingerprint(vit(), head)
    assert fingerprint(torch.compile(vit())) == fingerprint(vit())
    assert fingerprint(vit().to("meta")).agrees(fingerprint(redrawn()))  # nothing to compare
