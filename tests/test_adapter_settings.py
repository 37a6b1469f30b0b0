"""What a PartialLoraConfig accepts, and what it refuses in one line before anything is built."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from adapter_models import VIT_TARGETS, vit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from partial_lora.adapter import PartialLoraConfig, module_sparsity
from partial_lora.errors import PartialLoraError


def sparsity_of(sparsity, targets=("attn.qkv", "mlp.fc1")):
    model = get_peft_model(vit(), PartialLoraConfig(r=2, target_modules=list(targets), sparsity=sparsity))
    return {name.removeprefix("timm_model.blocks."): value for name, value in module_sparsity(model).items()}


def both(rows, columns=None):
    return {"rows": rows, "columns": rows if columns is None else columns}


def test_one_number_goes_everywhere():
    assert set(map(str, sparsity_of(0.5).values())) == {str(both(0.5))}


def test_a_full_name_comes_before_a_pattern_and_the_first_pattern_before_the_next():
    found = sparsity_of({r"0\..*": 0.5, "timm_model.blocks.0.attn.qkv": both(0.25, 0.75), "qkv": 0.75, r".*fc\d": 0.25})
    assert found == {
        "0.attn.qkv": both(0.25, 0.75),
        "0.mlp.fc1": both(0.5),
        "1.attn.qkv": both(0.75),
        "1.mlp.fc1": both(0.25),
    }


@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_a_calibration_file(tmp_path, as_path):
    path = tmp_path / "calibration.json"
    axes = {"rows": {"sparsity": 0.25, "curve": [[0.05, 1.0]]}, "columns": {"sparsity": 0.75, "curve": []}}
    path.write_text(json.dumps({"version": 1, "modules": {"timm_model.blocks.0.attn.qkv": axes}}))
    assert sparsity_of(as_path(path), ["blocks.0.attn.qkv"]) == {"0.attn.qkv": both(0.25, 0.75)}


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"modules": {"a": {"rows": {"sparsity": 0.1}}}}', '{"modules": []}']
)
def test_a_broken_calibration_file_is_named(tmp_path, content):
    path = tmp_path / "calibration.json"
    path.write_text(content)
    with pytest.raises(PartialLoraError, match=r"calibration\.json, which is no calibration\.json"):
        PartialLoraConfig(target_modules=["qkv"], sparsity=path)


def test_a_missing_calibration_file_is_named(tmp_path):
    with pytest.raises(PartialLoraError, match=r"none\.json, which cannot be read \(No such file"):
        PartialLoraConfig(target_modules=["qkv"], sparsity=str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True does not go with Partial-LoRA"),
        ({"rank_pattern": {"qkv": 2}}, "rank_pattern="),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"target_parameters": ["weight"]}, "target_parameters="),
        ({"layer_replication": [(0, 1)]}, "layer_replication="),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens="),
        ({"megatron_config": {"a": 1}}, "megatron_config="),
        *(
            ({"init_lora_weights": init}, f"init_lora_weights='{init}'")
            for init in ("gaussian", "pissa", "eva", "olora")
        ),
        ({"granularity": "element"}, "granularity is 'element': only 'rows_columns' is implemented"),
        ({"selection": "best"}, "selection is 'best': expected 'random' or 'top'"),
        ({"selection": "top"}, "selection is 'top': indices go with 'top'"),
        ({"indices": {"qkv": both([0])}}, "selection is 'random': indices go with 'top'"),
        ({"mask_seed": 0.5}, "mask_seed is 0.5: expected a whole number"),
        ({"sparsity": 1}, r"sparsity is 1: it is the share removed, a number in \[0, 1\)"),
        ({"sparsity": True}, "sparsity is True"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"sparsity": None}, "sparsity is None"),
        ({"sparsity": {}}, "sparsity is empty"),
        ({"sparsity": {"qkv": -0.1}}, r"sparsity\['qkv'\] is -0.1"),
        ({"sparsity": {"qkv": {"rows": 0.5}}}, r"sparsity\['qkv'\] has \['rows'\]: expected rows and columns"),
        ({"sparsity": {"qkv": both(0.5, "x")}}, r"sparsity\['qkv'\]\['columns'\] is 'x'"),
    ],
)
def test_settings_are_refused_by_name(settings, message):
    with pytest.raises(PartialLoraError, match=message) as refusal:
        PartialLoraConfig(target_modules=["qkv"], **settings)
    assert "\n" not in str(refusal.value)


def test_settings_changed_later_are_refused_too():
    config = PartialLoraConfig(r=2, target_modules=["qkv"])
    config.use_dora = True
    with pytest.raises(PartialLoraError, match="use_dora=True"):
        get_peft_model(vit(), config)


FC1 = "timm_model.blocks.0.mlp.fc1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["attn.proj", "qvk"]}, "target_modules names 'qvk', which matches no module"),
        ({"modules_to_save": ["qkv", "fc1"]}, "matches no module that is left to adapt"),
        ({"target_modules": ".*qvk"}, r"target_modules='\.\*qvk' matches no module that is left"),
        ({"target_modules": ["qkv", "proj"]}, "target module timm_model.patch_embed.proj is a Conv2d: only nn.Linear"),
        ({"sparsity": {"qkv": 0.5, ".*": 0.1, "qvk": 0.2}}, "sparsity names 'qvk', which matches no target module"),
        ({"sparsity": {"qkv": 0.5}}, f"sparsity has no entry for the target module .*{FC1}"),
        ({"sparsity": {"(": 0.5}}, r"sparsity names '\(', which is neither a module nor a regular expression"),
        ({"selection": "top", "indices": {}}, "indices has no entry for the target module"),
        ({"selection": "top", "indices": {"fc1": both([0])}}, "indices names 'fc1', which is no target module"),
    ],
)
def test_targets_and_sparsities_that_do_not_fit_are_refused_before_anything_is_built(settings, message):
    model = vit()
    with pytest.raises(PartialLoraError, match=message):
        get_peft_model(model, PartialLoraConfig(**{"r": 2, "target_modules": ["qkv", "fc1"], **settings}))
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


@pytest.mark.parametrize(
    ("indices", "sparsity", "message"),
    [
        ({"rows": [0]}, 0.0, "has no 'columns': expected rows and columns"),
        (both([1, 0]), 0.0, "ascending, distinct indices"),
        (both([0, 40]), 0.0, "a mask over 32 entries needs"),
        (both([0, 1]), 0.5, r"\['rows'\] keeps 2 of 128, but its sparsity 0.5 keeps 64"),
    ],
)
def test_indices_that_do_not_fit_are_refused(indices, sparsity, message):
    config = PartialLoraConfig(
        r=2, target_modules=["blocks.0.mlp.fc1"], selection="top", indices={FC1: indices}, sparsity=sparsity
    )
    with pytest.raises(PartialLoraError, match=message):
        get_peft_model(vit(), config)


class Odd(nn.Module):
    """One module of each kind that cannot be masked."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.gpt = Conv1D(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("embed", "target module embed is a Embedding"),
        ("gpt", "target module gpt is a Conv1D"),
        ("attention", "target module attention is a MultiheadAttention"),
        ("out_proj", "target module attention.out_proj is inside nn.MultiheadAttention, which never calls it"),
    ],
)
def test_modules_that_cannot_be_masked_are_refused_by_name(target, message):
    with pytest.raises(PartialLoraError, match=message):
        get_peft_model(Odd(), PartialLoraConfig(r=2, target_modules=[target]))


def test_all_linear_leaves_the_head_of_the_task_alone():
    config = PartialLoraConfig(r=2, target_modules="all-linear", sparsity=0.5, modules_to_save=["timm_model.head"])
    assert module_sparsity(get_peft_model(vit(), config)).keys() == {
        f"timm_model.blocks.{block}.{target}" for block in range(2) for target in VIT_TARGETS
    }


def test_module_names_are_those_of_the_model_before_torch_compile():
    model = get_peft_model(torch.compile(vit()), PartialLoraConfig(r=2, target_modules=["qkv"], sparsity=0.5))
    assert list(module_sparsity(model)) == [f"timm_model.blocks.{block}.attn.qkv" for block in range(2)]


def test_a_config_can_be_copied_and_seen_as_plain_lora():
    config = PartialLoraConfig(r=2, lora_alpha=3, target_modules=["qkv"], sparsity=0.5, use_rslora=True)
    assert copy.deepcopy(config) == config
    lora = config.as_lora()
    assert type(lora) is LoraConfig
    assert (lora.peft_type, lora.r, lora.lora_alpha, lora.use_rslora) == ("LORA", 2, 3, True)


def test_a_config_without_masks_is_not_saved(tmp_path):
    with pytest.raises(PartialLoraError, match="once get_peft_model has made its masks"):
        PartialLoraConfig(target_modules=["qkv"]).save_pretrained(str(tmp_path))
