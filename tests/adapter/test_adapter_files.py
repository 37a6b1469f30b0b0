"""A saved adapter is an ordinary LoRA adapter, and can be masked again for further training."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from adapter_models import (
    HEAD,
    MIXED,
    adapt,
    fill,
    images,
    logits,
    optimizer_of,
    step,
    vit,
)
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

import partial_lora
from partial_lora.adapter import PartialLoraConfig, module_masks
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


def test_the_adapter_loads_nothing_of_the_runner_and_needs_no_fcntl(tmp_path):
    code = """
        import sys

        sys.modules["fcntl"] = None  # as on Windows
        from peft import PeftModel, get_peft_model
        from torch import nn

        from partial_lora.adapter import PartialLoraConfig, load_compact, module_masks, write_compact

        base = nn.Sequential(nn.Linear(8, 8))
        model = get_peft_model(base, PartialLoraConfig(r=2, target_modules=["0"], sparsity=0.5))
        model.save_pretrained("saved")
        write_compact(model, "compact")
        base = model.unload()
        again = PeftModel.from_pretrained(base, "saved", config=PartialLoraConfig.from_pretrained("saved"))
        assert module_masks(again) == module_masks(load_compact(again.unload(), "compact"))
        loaded = {name.split(".")[1] for name in sys.modules if name.startswith("partial_lora.")}
        assert loaded == {"adapter", "errors", "files", "masks"}, loaded
        """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = os.environ | {"PYTHONPATH": str(Path(partial_lora.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
