"""Fingerprints tell a base model from its siblings, in any precision, and not from itself after training an adapter."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_models import HEAD, adapt, fill, images, llama, optimizer_of, qwen2, redrawn, step, vit

from partial_lora.adapter.fingerprint import fingerprint


class Params4bit(torch.nn.Parameter):
    """As bitsandbytes'; under bnb_4bit_quant_storage=torch.bfloat16, as FSDP wants it, its codes are numbers."""

    quant_state = None


@pytest.mark.parametrize(
    ("build", "parameter", "dtype"),
    [(vit, torch.nn.Parameter, torch.uint8), (lambda: llama().to(torch.bfloat16), Params4bit, torch.bfloat16)],
)
def test_a_model_with_quantised_linear_layers_is_known_by_the_rest_of_it(build, parameter, dtype):
    own, quantised = build(), build()
    other = redrawn(build).to(next(own.parameters()).dtype)
    for model in (quantised, other):
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                packed = torch.zeros(math.ceil(module.weight.numel() / 2), 1, dtype=dtype)
                module.weight = parameter(packed, requires_grad=False)
    assert fingerprint(quantised).is_quantised
    assert fingerprint(own).agrees(fingerprint(quantised))
    assert not fingerprint(own).agrees(fingerprint(other))
    assert not fingerprint(quantised).agrees(fingerprint(other))
    before = fingerprint(quantised)
    weight = next(module.weight for module in quantised.modules() if isinstance(module, torch.nn.Linear))
    weight.data = torch.ones(weight.shape[::-1], dtype=dtype)  # packed otherwise
    assert fingerprint(quantised) == before


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
