"""Weights in 4 and 8 bits: which layers, their digest and gradients, and plain layers in their place."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from configured import inputs, labels, load, loud, settings
from peft import LoraConfig, get_peft_model
from peft.utils.integrations import dequantize_bnb_weight
from safetensors.torch import load_file, save_file
from torch import nn

from partial_lora import models
from partial_lora.errors import PartialLoraError
from partial_lora.models import quantization
from partial_lora.models.targets import target_linears

QUANTIZATIONS = ["nf4", "int8"]


@pytest.fixture(params=["tiny_llama", "tiny_qwen"])
def trained(request, tmp_path) -> tuple[str, Path]:
    """The name of a tiny model, and a folder of pre-trained weights for it."""
    loud(load(request.param)).save_pretrained(tmp_path / "trained")
    return request.param, tmp_path / "trained"


def logits(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(name)).logits


def similarity(one: torch.Tensor, other: torch.Tensor) -> float:
    return nn.functional.cosine_similarity(one.float().flatten(), other.float().flatten(), 0).item()


@pytest.mark.parametrize("quantized", QUANTIZATIONS)
def test_linear_layers_but_the_last_are_quantised_and_all_else_is_as_it_was(trained, quantized):
    name, folder = trained
    plain = load(name, weights=str(folder), dtype="bfloat16")
    model = load(name, weights=str(folder), quantization=quantized, dtype="bfloat16")
    linears = {key: type(module).__name__ for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears.pop("lm_head") == "Linear"
    assert list(linears.values()) == [{"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantized]] * 7 * 3
    parameters = dict(model.named_parameters())
    for key, parameter in plain.named_parameters():
        if not key.endswith("proj.weight"):
            assert torch.equal(parameters[key], parameter), key
            continue
        module = model.get_submodule(key.removesuffix(".weight"))
        state = module.weight.quant_state if quantized == "nf4" else module.state
        values = dequantize_bnb_weight(module.weight, state=state).to(torch.bfloat16)
        assert 0 < ((values - parameter).norm() / parameter.norm()).item() < {"nf4": 0.12, "int8": 0.02}[quantized], key
        parameter.data = values
    least = {"nf4": 1 - 1e-4, "int8": 0.99}[quantized]  # LLM.int8() rounds what enters a layer, too
    assert similarity(logits(plain, name), logits(model, name)) > least
    if quantized == "nf4":
        assert {each.compute_dtype for each in model.modules() if hasattr(each, "compute_dtype")} == {torch.bfloat16}
    assert sum(map(models.size_of, model.parameters())) == sum(each.numel() for each in load(name).parameters())


@pytest.mark.parametrize("quantized", QUANTIZATIONS)
def test_digest_of_quantised_weights_knows_their_scales(quantized, tmp_path):
    loud(load("tiny_llama")).save_pretrained(tmp_path)
    one, same = (load("tiny_llama", weights=str(tmp_path), quantization=quantized) for _ in range(2))
    logits(same, "tiny_llama")  # which changes nothing
    assert models.weights_digest(same, "") == models.weights_digest(one, "")
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] *= 2  # the same codes, of twice the size
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    other = load("tiny_llama", weights=str(tmp_path), quantization=quantized)
    assert torch.equal(*(dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"] for model in (one, other)))
    assert models.weights_digest(other, "") != models.weights_digest(one, "")


@pytest.mark.parametrize("quantized", QUANTIZATIONS)
def test_gradients_through_quantised_weights_are_the_same_after_inference(quantized):
    def gradients(inference: bool) -> list[torch.Tensor]:
        model = load("tiny_llama", quantization=quantized)
        if inference:
            logits(model, "tiny_llama")
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=settings("tiny_llama")["target_modules"], init_lora_weights=False)
        adapted, batch = get_peft_model(model, config).train(), inputs("tiny_llama")
        adapted(**batch, labels=labels("tiny_llama", batch)).loss.backward()
        return [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]

    fresh, again = gradients(inference=False), gradients(inference=True)
    assert len(fresh) == 2 * 7 * 3
    for expected, gradient in zip(fresh, again, strict=True):
        assert expected.abs().max() > 0
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("quantized", QUANTIZATIONS)
def test_a_quantised_model_has_plain_layers_of_its_values_for_a_while(trained, quantized):
    """Rows of theirs can be zeroed; then the codes come back."""
    name, folder = trained
    model, targets = load(name, weights=str(folder), quantization=quantized), settings(name)["target_modules"]
    before, digest = logits(model, name), models.weights_digest(model, "")
    layers = {key: module for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    with pytest.raises(PartialLoraError, match=r"is a Linear(4|8)bit"):
        target_linears(model, targets)
    with models.dequantised(model):
        linears = target_linears(model, targets)
        for key, linear in linears.items():
            assert (type(linear), linear.weight.dtype, linear.training) == (nn.Linear, torch.float32, False)
            assert tuple(linear.weight.shape) == (layers[key].out_features, layers[key].in_features)
        plain = logits(model, name)
        assert similarity(before, plain) > {"nf4": 1 - 1e-6, "int8": 0.99}[quantized]
        with torch.no_grad():
            linears["model.layers.0.mlp.up_proj"].weight[:20] = 0
        assert not torch.equal(logits(model, name), plain)
    with models.dequantised(model, values=False):
        assert all(linear.weight.is_meta for linear in target_linears(model, targets).values())
    with pytest.raises(PartialLoraError), models.dequantised(model):
        target_linears(model, ["z_proj"])
    assert {key: module for key, module in model.named_modules() if isinstance(module, nn.Linear)} == layers
    assert torch.equal(logits(model, name), before)
    assert models.weights_digest(model, "") == digest


def test_a_plain_model_stays_as_it_is():
    model = load("tiny_llama")
    layers = list(model.modules())
    with models.dequantised(model):
        assert list(model.modules()) == layers


def test_bitsandbytes_does_not_repeat_itself(caplog):
    model = load("tiny_llama", quantization="int8")
    with caplog.at_level(logging.WARNING):
        logits(model, "tiny_llama")
        logging.getLogger("bitsandbytes.autograd._functions").warning("something new: %s", 1)
    assert [record.getMessage() for record in caplog.records] == ["something new: 1"]


def test_quantisation_that_is_not_available_is_named(monkeypatch):
    def refused(quantized: str) -> None:
        with pytest.raises(PartialLoraError, match=rf"^model\.quantization={quantized}: ") as caught:
            load("tiny_llama", quantization=quantized)
        assert "\n" not in str(caught.value)

    refused("fp4")
    with monkeypatch.context() as patched:
        patched.setattr("transformers.integrations.bitsandbytes.get_available_devices", lambda: {"abacus"})
        refused("int8")
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    refused("nf4")
