"""Weights in 4 and 8 bits: which layers, their digest and gradients, and plain layers in their place."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from configured import inputs, labels, load, logits, loud, refused, settings
from peft import LoraConfig, get_peft_model
from peft.utils.integrations import dequantize_bnb_weight
from refusals import refusal
from safetensors.torch import load_file, save_file
from torch import nn

from partial_lora import models
from partial_lora.models import quantization
from partial_lora.models.targets import target_linears

QUANTIZATIONS = ["nf4", "int8"]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pre-trained weights for the tiny Llama."""
    loud(load("tiny_llama")).save_pretrained(tmp_path)
    return tmp_path


def quantised(folder: Path, kind: str, **changes: object) -> nn.Module:
    return load("tiny_llama", weights=str(folder), quantization=kind, **changes)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {key: module for key, module in model.named_modules() if isinstance(module, nn.Linear)}


def similarity(one: torch.Tensor, other: torch.Tensor) -> float:
    return nn.functional.cosine_similarity(one.float().flatten(), other.float().flatten(), 0).item()


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_linear_layers_but_the_last_are_quantised_and_all_else_is_as_it_was(folder, kind):
    plain = load("tiny_llama", weights=str(folder), dtype="bfloat16")
    model = quantised(folder, kind, dtype="bfloat16")
    kinds = [type(module).__name__ for module in linears(model).values()]
    assert kinds == [{"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]] * 7 * 3 + ["Linear"]
    if kind == "nf4":
        assert {each.compute_dtype for each in model.modules() if hasattr(each, "compute_dtype")} == {torch.bfloat16}
    parameters = dict(model.named_parameters())
    assert sum(map(models.size_of, parameters.values())) == sum(each.numel() for each in plain.parameters())
    for key, parameter in plain.named_parameters():
        if not key.endswith("proj.weight"):
            assert torch.equal(parameters[key], parameter), key
            continue
        module = model.get_submodule(key.removesuffix(".weight"))
        state = module.weight.quant_state if kind == "nf4" else module.state
        values = dequantize_bnb_weight(module.weight, state=state).to(torch.bfloat16)
        assert 0 < ((values - parameter).norm() / parameter.norm()).item() < {"nf4": 0.12, "int8": 0.02}[kind], key
        parameter.data = values
    least = {"nf4": 1 - 1e-4, "int8": 0.99}[kind]  # LLM.int8() rounds what enters a layer, too
    assert similarity(logits(plain, "tiny_llama"), logits(model, "tiny_llama")) > least


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_digest_of_quantised_weights_knows_their_scales(folder, kind):
    one, same = quantised(folder, kind), quantised(folder, kind)
    logits(same, "tiny_llama")  # which changes nothing
    assert models.weights_digest(same, "") == models.weights_digest(one, "")
    state = load_file(folder / "model.safetensors")
    state[UP] *= 2  # the same codes, of twice the size
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    other = quantised(folder, kind)
    assert torch.equal(*(dict(model.named_parameters())[UP] for model in (one, other)))
    assert models.weights_digest(other, "") != models.weights_digest(one, "")


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_gradients_through_quantised_weights_are_the_same_after_inference(kind):
    gradients = []
    for inference in (False, True):
        model = load("tiny_llama", quantization=kind)
        if inference:
            logits(model, "tiny_llama")
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=settings("tiny_llama")["target_modules"], init_lora_weights=False)
        adapted, batch = get_peft_model(model, config).train(), inputs("tiny_llama")
        adapted(**batch, labels=labels("tiny_llama", batch)).loss.backward()
        gradients.append([parameter.grad for parameter in adapted.parameters() if parameter.requires_grad])
    assert len(gradients[0]) == 2 * 7 * 3
    for fresh, again in zip(*gradients, strict=True):
        assert fresh.abs().max() > 0
        assert torch.equal(again, fresh)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_quantised_model_has_plain_layers_of_its_values_for_a_while(folder, kind):
    """Rows of theirs can be zeroed; then the codes come back."""
    model, targets = quantised(folder, kind), settings("tiny_llama")["target_modules"]
    before, digest, layers = logits(model, "tiny_llama"), models.weights_digest(model, ""), linears(model)
    with refusal("target_modules=.*Linear[48]bit"):
        target_linears(model, targets)
    with models.dequantised(model):
        plain = target_linears(model, targets)
        for key, linear in plain.items():
            assert (type(linear), linear.weight.dtype, linear.training) == (nn.Linear, torch.float32, False)
            assert tuple(linear.weight.shape) == (layers[key].out_features, layers[key].in_features)
        intact = logits(model, "tiny_llama")
        assert similarity(before, intact) > {"nf4": 1 - 1e-6, "int8": 0.99}[kind]
        with torch.no_grad():
            plain[UP.removesuffix(".weight")].weight[:20] = 0
        assert not torch.equal(logits(model, "tiny_llama"), intact)
    with models.dequantised(model, values=False):
        assert all(linear.weight.is_meta for linear in target_linears(model, targets).values())
    with refusal("target_modules: "), models.dequantised(model):
        target_linears(model, ["z_proj"])
    assert linears(model) == layers
    assert torch.equal(logits(model, "tiny_llama"), before)
    assert models.weights_digest(model, "") == digest


def test_bitsandbytes_does_not_repeat_itself(caplog):
    model = load("tiny_llama", quantization="int8")
    with caplog.at_level(logging.WARNING):
        logits(model, "tiny_llama")
        logging.getLogger("bitsandbytes.autograd._functions").warning("something new: %s", 1)
    assert [record.getMessage() for record in caplog.records] == ["something new: 1"]


def test_quantisation_that_is_not_available_is_named(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("transformers.integrations.bitsandbytes.get_available_devices", lambda: {"abacus"})
        refused("model.quantization=int8: ", "tiny_llama", quantization="int8")
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    refused("model.quantization=nf4: ", "tiny_llama", quantization="nf4")
