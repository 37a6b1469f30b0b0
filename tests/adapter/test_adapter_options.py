"""Every option of LoraConfig passes through to where PEFT uses it, or is refused by name before anything is built."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields

import pytest
import torch
from adapter_models import HEAD, VIT_TARGETS, adapt, fill, gpt2, images, layers, llama, logits, qwen2, vit
from peft import (
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraRuntimeConfig,
    PeftModel,
    VeloraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora import BdLoraConfig

from partial_lora.adapter import PartialLoraConfig, trainable_parameters
from partial_lora.adapter import config as options
from partial_lora.adapter.factor import MaskedFactor
from partial_lora.errors import PartialLoraError


def test_every_option_of_the_installed_peft_is_allowed_or_refused():
    names = {option.name for option in fields(LoraConfig)}
    assert names == options.PASSED | options.REFUSED.keys()
    assert not options.PASSED & options.REFUSED.keys()


SET = {
    "use_dora": True,
    "rank_pattern": {"qkv": 2},
    "lora_bias": True,
    "target_parameters": ["weight"],
    "layer_replication": [(0, 1)],
    "use_qalora": True,
    "qalora_group_size": 8,
    "use_bdlora": BdLoraConfig(target_modules_bd_a=["qkv"], nblocks=2),
    "velora_config": VeloraConfig(),
    "alora_invocation_tokens": torch.tensor([1, 2]),
    "arrow_config": {},
    "kasa_config": {},
    "monteclora_config": {},
    "megatron_config": {"a": 1},
    "megatron_core": "other.core",
    "loftq_config": LoftQConfig(),
    "eva_config": EvaConfig(),
    "corda_config": {},
    "lora_ga_config": {},
}


@pytest.mark.parametrize("name", options.REFUSED)
def test_an_option_without_a_masked_form_is_refused_by_name(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT does not speak of it first
        with pytest.raises(PartialLoraError) as refusal:
            PartialLoraConfig(target_modules=["qkv"], **{name: SET[name]})
    assert str(refusal.value).startswith(f"{name}=")
    assert "\n" not in str(refusal.value)
    config = PartialLoraConfig(r=2, target_modules=["qkv"])
    setattr(config, name, SET[name])  # later is as bad
    model = vit()
    with pytest.raises(PartialLoraError, match=name):
        get_peft_model(model, config)
    assert not layers(model)


INITIALISATIONS = ["eva", "olora", "pissa", "pissa_niter_4", "corda", "loftq", "orthogonal", "mica", "lora_ga", None, 1]


@pytest.mark.parametrize("init", INITIALISATIONS)
def test_an_initialisation_that_fits_the_factors_to_something_is_refused(init):
    with pytest.raises(PartialLoraError, match=f"^init_lora_weights={init!r}"):
        PartialLoraConfig(target_modules=["qkv"], init_lora_weights=init)


@pytest.mark.parametrize("r", [0, -1, 2.0, True, None])
def test_a_rank_that_is_none_is_refused(r):
    with pytest.raises(PartialLoraError, match=rf"^r is {r}"):
        PartialLoraConfig(target_modules=["qkv"], r=r)


@dataclass
class NewerConfig(LoraConfig):
    """The LoraConfig of a PEFT to come."""

    shiny: bool = True


def test_an_option_of_a_peft_to_come_is_refused_unless_it_has_its_default(monkeypatch):
    monkeypatch.setattr(options, "LoraConfig", NewerConfig)
    options.refuse_options(NewerConfig(target_modules=["qkv"]))
    for value in (False, None):
        with pytest.raises(PartialLoraError, match=f"^shiny={value}"):
            options.refuse_options(NewerConfig(target_modules=["qkv"], shiny=value))


def drawn(base, granularity="rows_columns", seed=5, **settings):
    """The dense LoRA model and the masked one that the same random numbers give."""
    common = {"r": 4, "target_modules": ["qkv", "fc1"], **settings}
    pair = []
    for config in (LoraConfig(**common), PartialLoraConfig(sparsity=0.6, granularity=granularity, **common)):
        model = base()
        torch.manual_seed(seed)
        pair.append(get_peft_model(model, config))
    return pair


@pytest.mark.parametrize("granularity", ["rows_columns", "element"])
@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_the_kept_values_are_those_plain_lora_draws(init, granularity):
    dense, partial = drawn(vit, granularity, init_lora_weights=init)
    assert torch.initial_seed() == 5
    for one, other in zip(layers(dense).values(), layers(partial).values(), strict=True):
        for name in ("lora_A", "lora_B"):
            whole, factor = (getattr(layer, name)["default"] for layer in (one, other))
            assert isinstance(factor, MaskedFactor)
            assert torch.equal(factor.kept, factor.keep(whole.weight))
            assert whole.weight.any() == (name == "lora_A" or init is False)
            assert factor.weight.count_nonzero() == factor.kept.count_nonzero()
    same_start = torch.equal(logits(partial, images()), logits(vit(), images()))
    assert same_start == (init is not False)


def facts(model):
    """All that LoRA's options decide of a model, for the two methods alike."""
    config = model.peft_config["default"]
    return {
        "adapted": list(layers(model)),
        "scaling": [layer.scaling["default"] for layer in layers(model).values()],
        "dropout": [str(layer.lora_dropout["default"]) for layer in layers(model).values()],
        "rank": [layer.r["default"] for layer in layers(model).values()],
        "fan_in_fan_out": [getattr(layer, "fan_in_fan_out", None) for layer in layers(model).values()],
        "trained_beside": {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n},
        "adapter_trains": {p.requires_grad for n, p in model.named_parameters() if "lora_" in n},
        "saved": {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()},
        "class": type(model).__name__,
        "said": [config.task_type, config.base_model_name_or_path, config.revision, config.auto_mapping],
        "runtime": config.runtime_config,
        "tied": getattr(config, "modules_to_tie", None),
    }


DECODER = {"target_modules": ["q_proj", "v_proj"]}

PASSED = [
    (vit, {"r": 3}),
    (vit, {"target_modules": "all-linear"}),
    (vit, {"target_modules": r".*\.blocks\.1\.(attn\.proj|mlp\.fc2)"}),
    (vit, {"target_modules": ["patch_embed.proj", "attn.proj"]}),
    (vit, {"exclude_modules": ["blocks.0.attn.qkv"]}),
    (vit, {"exclude_modules": r".*\.1\.mlp.*"}),
    (vit, {"layers_to_transform": 1}),
    (vit, {"layers_to_transform": [0], "layers_pattern": "blocks"}),
    (vit, {"lora_alpha": 12}),
    (vit, {"alpha_pattern": {"blocks.0.attn.qkv": 2, "fc1": 32}}),
    (vit, {"use_rslora": True}),
    (vit, {"lora_dropout": 0.25}),
    (vit, {"bias": "all"}),
    (vit, {"bias": "lora_only"}),
    (vit, {"modules_to_save": [HEAD]}),
    (vit, {"inference_mode": True}),
    (vit, {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)}),
    (vit, {"revision": "abc", "base_model_name_or_path": "some/model"}),
    (vit, {"auto_mapping": {"base_model_class": "A", "parent_library": "b"}}),
    (vit, {"task_type": "FEATURE_EXTRACTION"}),
    (llama, {**DECODER, "task_type": "CAUSAL_LM"}),
    (llama, {**DECODER, "trainable_token_indices": [1, 3]}),
    (qwen2, {**DECODER, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("base", "settings"), PASSED)
def test_an_option_does_what_it_does_in_plain_lora(tmp_path, base, settings):
    dense, partial = drawn(base, **settings)
    expected = facts(dense)
    assert facts(partial) == expected
    usual = {"target_modules": settings["target_modules"]} if base is not vit else {}
    # It has done something; only fan_in_fan_out is what PEFT finds out by itself.
    assert expected != facts(drawn(base, **usual)[0]) or base is gpt2

    fill(partial).save_pretrained(tmp_path)
    config = PartialLoraConfig.from_pretrained(str(tmp_path))
    for name in settings.keys() - {"runtime_config", "base_model_name_or_path", "inference_mode", "auto_mapping"}:
        assert getattr(config, name) == getattr(partial.peft_config["default"], name)
    trainable = not settings.get("inference_mode", False)
    again = PeftModel.from_pretrained(base(), str(tmp_path), config=config, is_trainable=trainable)
    assert facts(again)["trained_beside"] == facts(partial)["trained_beside"]
    assert trainable_parameters(again) == trainable_parameters(partial)
    batch = images() if base is vit else {"input_ids": torch.arange(14).view(2, 7)}
    said = logits_of(partial, batch)
    assert torch.equal(logits_of(again, batch), said)
    plain = PeftModel.from_pretrained(base(), str(tmp_path))
    torch.testing.assert_close(logits_of(plain, batch), said, atol=1e-5, rtol=1e-5)


def logits_of(model, batch):
    return logits(model.get_base_model() if type(model).__name__ == "PeftModelForFeatureExtraction" else model, batch)


def test_all_linear_leaves_the_head_of_the_task_alone():
    model = adapt(target_modules="all-linear", sparsity=0.5)
    assert layers(model).keys() == {
        f"timm_model.blocks.{block}.{target}" for block in range(2) for target in VIT_TARGETS
    }
