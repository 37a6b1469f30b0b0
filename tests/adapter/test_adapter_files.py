"""A saved adapter is an ordinary LoRA adapter, and can be masked again for further training."""

from __future__ import annotations

import dataclasses
import json
import warnings

import peft
import pytest
import torch
from adapter_models import (
    HEAD,
    LLAMA_TARGETS,
    MIXED,
    adapt,
    fill,
    images,
    llama,
    logits,
    optimizer_of,
    step,
    tokens,
    vit,
)
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from partial_lora.adapter import PEFT_TYPE, PartialLoraConfig, PartialLoraModel, module_masks, trainable_parameters
from partial_lora.errors import PartialLoraError

QKV = "timm_model.blocks.0.attn.qkv"


def trained(base=vit, batches=images, **settings):
    model = adapt(base, **{"sparsity": MIXED if base is vit else 0.6, **settings})
    optimizer = optimizer_of(model)
    for seed in range(2):
        step(model, optimizer, batches(seed))
    return model


def masked_again(folder, base=vit, **settings):
    config = PartialLoraConfig.from_pretrained(str(folder))
    return PeftModel.from_pretrained(base(), str(folder), config=config, is_trainable=True, **settings)


def test_the_route_into_peft_is_open():
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] is PartialLoraConfig
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] is PartialLoraModel
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] == "lora_"
    assert isinstance(adapt(sparsity=0.5).base_model, PartialLoraModel)


def test_the_folder_is_an_ordinary_lora_adapter(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    allowed = {option.name for option in dataclasses.fields(LoraConfig)}
    assert config.keys() <= allowed
    assert not config["rank_pattern"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    expected = {f"base_model.model.{HEAD}.weight", f"base_model.model.{HEAD}.bias"}
    for name, masks in module_masks(model).items():
        a, b = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        assert (a.shape, b.shape) == ((4, masks.shape[1]), (masks.shape[0], 4))
        assert a.any(0).tolist() == masks.columns.dense().tolist()
        assert b.any(1).tolist() == masks.rows.dense().tolist()
        expected |= {f"base_model.model.{name}.lora_{factor}.weight" for factor in "AB"}
    assert tensors.keys() == expected


@pytest.mark.parametrize(("base", "batches"), [(vit, images), (llama, tokens)])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_plain_peft_loads_it_without_a_warning(tmp_path, base, batches, low_cpu_mem_usage):
    model = trained(base, batches)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # transformers' own, on every load
        plain = PeftModel.from_pretrained(base(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    assert type(plain.base_model) is peft.LoraModel
    torch.testing.assert_close(logits(plain, batches(5)), logits(model, batches(5)), atol=1e-5, rtol=1e-5)


def test_auto_peft_loads_it(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = llama().from_pretrained(tmp_path / "base")
    config = PartialLoraConfig(r=4, target_modules=LLAMA_TARGETS, sparsity=0.6, task_type="CAUSAL_LM")
    model = fill(get_peft_model(base, config))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, tokens()), logits(model, tokens()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_masked_again_it_trains_on(tmp_path, low_cpu_mem_usage):
    model = trained()
    model.save_pretrained(tmp_path)
    again = masked_again(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert module_masks(again) == module_masks(model)
    assert trainable_parameters(again) == trainable_parameters(model)
    assert {p.device.type for p in again.parameters()} == {"cpu"}
    assert torch.equal(logits(again, images()), logits(model, images()))
    optimizers = optimizer_of(model), optimizer_of(again)
    assert [step(model, optimizers[0], images(s)) for s in range(3)] == [
        step(again, optimizers[1], images(s)) for s in range(3)
    ]


def test_an_adapter_with_a_name_has_its_own_sidecar(tmp_path):
    model = adapt(sparsity=0.9)
    model.add_adapter("other", PartialLoraConfig(r=2, target_modules=["attn.qkv"], sparsity=0.5))
    fill(model).save_pretrained(tmp_path)
    again = masked_again(tmp_path)
    again.add_adapter("other", PartialLoraConfig.from_pretrained(str(tmp_path), subfolder="other"))
    again.load_adapter(str(tmp_path / "other"), "other")
    again.set_adapter("other")
    model.set_adapter("other")
    assert len(module_masks(again, "other")) == 2
    assert torch.equal(logits(again, images()), logits(model, images()))


def test_weights_of_another_mask_are_refused(tmp_path):
    trained(sparsity=0.5, mask_seed=1).save_pretrained(tmp_path)
    model = adapt(sparsity=0.5, mask_seed=0)
    with pytest.raises(PartialLoraError, match=r"lora_A\.default\.weight has values outside this adapter's mask"):
        model.load_adapter(str(tmp_path), "default")


def test_a_checkpoint_of_another_shape_or_with_a_missing_tensor_is_not_swallowed(tmp_path):
    trained(r=2).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lora_A.default.weight: \(2, 32\) is not \(4, 32\)"):
        adapt(sparsity=MIXED).load_adapter(str(tmp_path), "default")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[f"base_model.model.{QKV}.lora_B.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    result = adapt(sparsity=MIXED, r=2).load_adapter(str(tmp_path), "default")
    assert result.missing_keys == [f"base_model.model.{QKV}.lora_B.default.weight"]
    assert result.unexpected_keys == []
