"""Causal language models: what is loaded, quantised and refused."""

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
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

from partial_lora import models
from partial_lora.errors import PartialLoraError
from partial_lora.models import quantization
from partial_lora.models.targets import target_linears

LLAMA = settings("tiny_llama")["model_args"]
QUANTIZATIONS = ["nf4", "int8"]


@pytest.fixture
def llama(tmp_path) -> Path:
    """A Llama as it is pre-trained; its embeddings are its output layer."""
    loud(load("tiny_llama")).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def qwen(tmp_path) -> Path:
    """A Qwen2 whose output layer is its own, in several files."""
    model = loud(load("tiny_qwen"))
    nn.init.normal_(model.lm_head.weight)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.q_proj.bias)
    model.save_pretrained(tmp_path / "qwen", max_shard_size="200KB")
    return tmp_path / "qwen"


def logits(model: nn.Module, name: str = "tiny_llama") -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(name)).logits


def test_folder_is_loaded_whole_and_nothing_is_drawn(llama, qwen):
    for name, folder, kind in (("tiny_llama", llama, LlamaForCausalLM), ("tiny_qwen", qwen, Qwen2ForCausalLM)):
        model = load(name, weights=str(folder), labels=[])
        number = torch.rand(1)
        assert type(model) is kind
        assert torch.equal(logits(model, name), logits(kind.from_pretrained(folder).eval(), name))
        load(name, weights=str(folder), labels=["a", "b"])
        torch.manual_seed(0)
        assert torch.equal(torch.rand(1), number)
    assert len(list(qwen.glob("*.safetensors"))) > 1
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    tied = load("tiny_llama", weights=str(llama))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_random_weights_are_the_same_in_every_run():
    for changes in ({}, {"quantization": "nf4"}):
        one, other = (load("tiny_llama", seed=seed, **changes) for seed in (1, 2))
        assert models.weights_digest(one, "") == models.weights_digest(other, "")
        number = torch.rand(1)
        torch.manual_seed(2)
        assert torch.equal(torch.rand(1), number)


def test_empty_has_the_shapes_of_the_loaded_model(llama):
    shapes = models.empty(family="causal", architecture="llama", model_args=LLAMA).state_dict()
    loaded = load("tiny_llama", weights=str(llama)).state_dict()
    assert {name: value.shape for name, value in shapes.items()} == {name: v.shape for name, v in loaded.items()}


def test_what_is_saved_again_is_what_was_loaded(llama, tmp_path):
    """Nothing of how a model is trained here, such as without a cache, ends up in the configs of others."""
    load("tiny_llama", weights=str(llama)).save_pretrained(tmp_path / "again")
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "again" / file).read_text() == (llama / file).read_text()
    assert '"use_cache": true' in (llama / "config.json").read_text()


@pytest.mark.parametrize("quantized", QUANTIZATIONS)
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen"])
def test_linear_layers_but_the_last_are_quantised_and_all_else_is_as_it_was(name, quantized, llama, qwen):
    folder = {"tiny_llama": llama, "tiny_qwen": qwen}[name]
    plain = load(name, weights=str(folder), dtype="bfloat16")
    model = load(name, weights=str(folder), quantization=quantized, dtype="bfloat16")
    kind = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantized]
    linears = {key: type(module).__name__ for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears.pop("lm_head") == "Linear"
    assert set(linears.values()) == {kind}
    assert len(linears) == 7 * 3
    parameters, own = dict(model.named_parameters()), dict(plain.named_parameters())
    for key, parameter in own.items():
        if not key.endswith("proj.weight"):
            assert torch.equal(parameters[key], parameter), key
            continue
        module = model.get_submodule(key.removesuffix(".weight"))
        state = module.weight.quant_state if quantized == "nf4" else module.state
        meant = dequantize_bnb_weight(module.weight, state=state).to(torch.bfloat16)
        lost = ((meant - parameter).norm() / parameter.norm()).item()
        assert 0 < lost < {"nf4": 0.12, "int8": 0.02}[quantized], key
        parameter.data = meant
    likeness = nn.functional.cosine_similarity(*(logits(each, name).float().flatten() for each in (plain, model)), 0)
    assert likeness > {"nf4": 1 - 1e-4, "int8": 0.99}[quantized]  # LLM.int8() rounds what enters a layer, too
    if quantized == "nf4":
        assert {each.compute_dtype for each in model.modules() if hasattr(each, "compute_dtype")} == {torch.bfloat16}


@pytest.mark.parametrize("quantized", QUANTIZATIONS)
def test_digest_of_quantised_weights_knows_their_scales(quantized, llama):
    same = [load("tiny_llama", weights=str(llama), quantization=quantized) for _ in range(2)]
    logits(same[1])  # which changes nothing
    digest = models.weights_digest(same[0], "")
    assert models.weights_digest(same[1], "") == digest
    state = load_file(llama / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] *= 2  # the same codes, of twice the size
    save_file(state, llama / "model.safetensors", metadata={"format": "pt"})
    other = load("tiny_llama", weights=str(llama), quantization=quantized)
    codes = [dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"] for model in (same[0], other)]
    assert torch.equal(*codes)
    assert models.weights_digest(other, "") != digest


@pytest.mark.parametrize("quantized", QUANTIZATIONS)
def test_gradients_through_quantised_weights_are_the_same_once_they_were_scored(quantized):
    def gradients(scored: bool) -> list[torch.Tensor]:
        model = load("tiny_llama", quantization=quantized)
        if scored:
            logits(model)
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=settings("tiny_llama")["target_modules"], init_lora_weights=False)
        adapted, batch = get_peft_model(model, config).train(), inputs("tiny_llama")
        adapted(**batch, labels=labels("tiny_llama", batch)).loss.backward()
        return [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]

    fresh, again = gradients(scored=False), gradients(scored=True)
    assert len(fresh) == 2 * 7 * 3
    for expected, found in zip(fresh, again, strict=True):
        assert expected.abs().max() > 0
        assert torch.equal(found, expected)


@pytest.mark.parametrize("quantized", QUANTIZATIONS)
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen"])
def test_quantised_model_is_scored_by_what_its_codes_mean(name, quantized, llama, qwen):
    """As plain layers of these values, whose rows can be zeroed; then the codes come back."""
    model = load(name, weights=str({"tiny_llama": llama, "tiny_qwen": qwen}[name]), quantization=quantized)
    before, digest = logits(model, name), models.weights_digest(model, "")
    layers = {key: module for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = settings(name)["target_modules"]
    with pytest.raises(PartialLoraError, match=r"is a Linear(4|8)bit"):
        target_linears(model, targets)
    with models.dequantised(model):
        linears = target_linears(model, targets)
        assert {type(module) for module in linears.values()} == {nn.Linear}
        for key, linear in linears.items():
            shape = (layers[key].out_features, layers[key].in_features)
            assert (tuple(linear.weight.shape), linear.weight.dtype) == (shape, torch.float32)
            assert not linear.training
        plain = logits(model, name)
        likeness = nn.functional.cosine_similarity(before.flatten(), plain.flatten(), 0)
        assert likeness > {"nf4": 1 - 1e-6, "int8": 0.99}[quantized]
        with torch.no_grad():
            linears["model.layers.0.mlp.up_proj"].weight[:20] = 0
        assert not torch.equal(logits(model, name), plain)
    assert {key: module for key, module in model.named_modules() if isinstance(module, nn.Linear)} == layers
    assert torch.equal(logits(model, name), before)
    assert models.weights_digest(model, "") == digest


@pytest.mark.parametrize("quantized", QUANTIZATIONS)
def test_layers_without_values_have_names_and_shapes_and_take_no_memory(quantized):
    model, plain = load("tiny_qwen", quantization=quantized), load("tiny_qwen")
    targets, before = settings("tiny_qwen")["target_modules"], logits(model, "tiny_qwen")
    shapes = {name: linear.weight.shape for name, linear in target_linears(plain, targets).items()}
    with models.dequantised(model, values=False):
        found = target_linears(model, targets)
        assert {name: linear.weight.shape for name, linear in found.items()} == shapes
        assert all(linear.weight.is_meta for linear in found.values())
    assert torch.equal(logits(model, "tiny_qwen"), before)


def test_codes_come_back_after_an_error():
    model = load("tiny_llama", quantization="nf4")
    layers = list(model.modules())
    with pytest.raises(PartialLoraError), models.dequantised(model):
        target_linears(model, ["z_proj"])
    assert list(model.modules()) == layers


def test_plain_model_stays_as_it_is_where_quantised_ones_are_not():
    model = load("tiny_llama")
    layers = list(model.modules())
    with models.dequantised(model):
        assert list(model.modules()) == layers


@pytest.mark.parametrize("quantized", [None, *QUANTIZATIONS])
def test_weights_are_counted_whole_however_many_share_a_byte(quantized):
    counted = sum(models.size_of(parameter) for parameter in load("tiny_qwen", quantization=quantized).parameters())
    assert counted == sum(parameter.numel() for parameter in load("tiny_qwen").parameters())


def test_bitsandbytes_does_not_repeat_itself(caplog):
    model = load("tiny_llama", quantization="int8")
    with caplog.at_level(logging.WARNING):
        logits(model)
        logging.getLogger("bitsandbytes.autograd._functions").warning("something new: %s", 1)
    assert [record.getMessage() for record in caplog.records] == ["something new: 1"]


def test_quantisation_that_cannot_be_had_is_said_in_one_line(monkeypatch):
    with pytest.raises(PartialLoraError, match=r"model\.quantization=fp4: expected one of nf4, int8 or null"):
        load("tiny_llama", quantization="fp4")
    with pytest.raises(PartialLoraError, match=r"model\.quantization=nf4: model\.family=timm is not quantised"):
        load("tiny_vit", quantization="nf4")
    with monkeypatch.context() as patched:
        patched.setattr("transformers.integrations.bitsandbytes.get_available_devices", lambda: {"abacus"})
        with pytest.raises(PartialLoraError, match=r"model\.quantization=int8: .* no device .*abacus") as caught:
            load("tiny_llama", quantization="int8")
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(PartialLoraError, match=r"model\.quantization=nf4: bitsandbytes is missing .*pip install"):
        load("tiny_llama", quantization="nf4")


def without(folder: Path, key: str) -> None:
    (file,) = [file for file in folder.glob("*.safetensors") if key in load_file(file)]
    state = {name: value for name, value in load_file(file).items() if name != key}
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize("quantized", [None, "nf4"])
@pytest.mark.parametrize("key", ["model.layers.2.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_missing_weight_is_named(qwen, key, quantized):
    without(qwen, key)
    with pytest.raises(PartialLoraError, match=rf"model=tiny_qwen: {key} is missing in .*qwen") as caught:
        load("tiny_qwen", weights=str(qwen), quantization=quantized)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_read(llama):
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    with pytest.raises(PartialLoraError, match="model=tiny_llama: cannot read the weights in") as caught:
        load("tiny_llama", weights=str(llama))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, r"model\.architecture=qwen2: .* is a llama; set that"),
        ({"model_args": LLAMA | {"num_hidden_layers": 2}}, r"model\.model_args\.num_hidden_layers=2: .* has 3; set"),
        ({"model_args": LLAMA | {"tie_word_embeddings": False}}, r"tie_word_embeddings=False: .* has True; set that"),
        ({"model_args": LLAMA | {"num_key_value_heads": 4}}, r"num_key_value_heads=4: .* has 2; set that"),
        ({"architecture": "lama"}, r"model\.architecture=lama: transformers has no such model_type"),
        ({"architecture": "vit"}, r"model\.architecture=vit: transformers has no causal language model of that type"),
        ({"model_args": LLAMA | {"hiden_size": 3}}, r"model\.model_args\.hiden_size: llama takes none of that name"),
        ({"model_args": LLAMA | {"num_attention_heads": 5}}, r"model\.model_args=.*: no geometry of llama \(.*mult"),
        ({"weights": "random", "model_args": LLAMA | {"vocab_size": 99}}, r"vocab_size=99: expected at least 260"),
    ],
)
def test_settings_that_fit_no_model_are_named_in_one_line(llama, changes, message):
    with pytest.raises(PartialLoraError, match=message) as caught:
        load("tiny_llama", **{"weights": str(llama), **changes})
    assert "\n" not in str(caught.value)
