"""Fused experts: one parameter holds the weights of all, and each expert has rows and columns of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_models import scaled_as
from peft import LoraConfig, PeftModel, get_peft_model
from refusals import refusal
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from partial_lora.adapter import PartialLoraConfig, load_compact, module_masks, write_compact
from partial_lora.adapter.factor import MaskedFactor
from partial_lora.masks import AS_PEFT, Mask

SIZE = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
FUSED = {"num_experts_per_tok": 2, "num_key_value_heads": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
CONFIGS = {
    "qwen3": Qwen3MoeConfig(**SIZE, **FUSED, moe_intermediate_size=12, num_experts=4, head_dim=8),
    "mixtral": MixtralConfig(**SIZE, **FUSED, num_local_experts=4),
    "gpt_oss": GptOssConfig(**SIZE, **FUSED, num_local_experts=4, head_dim=8),  # its experts are in × out
    "deepseek": DeepseekV3Config(
        **{**SIZE, **FUSED, "num_key_value_heads": 4, "moe_intermediate_size": 12, "n_routed_experts": 4, **LATENT},
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
    ),
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
FORMS = {"rows": AS_PEFT, "scaled": {}, "element": {"granularity": "element"}, "frozen": {"columns": "frozen"}}
CASES = [("qwen3", form) for form in FORMS] + [(kind, "rows") for kind in CONFIGS if kind != "qwen3"]
SHARES = {".*gate_up_proj": {"rows": 0.7, "columns": 0.4}, ".*": 0.5}


def base(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]))


def adapted(kind: str, **settings: object) -> PeftModel:
    """A model with masks on its attention and experts, and values in what trains."""
    settings = {"sparsity": SHARES, "target_modules": ["o_proj"], "target_parameters": EXPERTS} | settings
    torch.manual_seed(1)
    model = get_peft_model(base(kind), PartialLoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.3)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens(9)).logits


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(seed))


def test_each_expert_has_the_mask_of_its_name():
    masks = module_masks(adapted("qwen3"))["model.layers.0.mlp.experts.gate_up_proj"]
    assert masks.shape == (24, 16)
    rows, columns = masks.rows.dense().reshape(24, 2, 4), masks.columns.dense().reshape(4, 2, 16)
    for expert in range(4):
        name = f"model.layers.0.mlp.experts.gate_up_proj.{expert}"
        for kept, size, share, axis in ((rows[:, :, expert].T, 24, 0.7, "rows"), (columns[expert], 16, 0.4, "columns")):
            drawn = Mask.random(size, share, mask_seed=0, module=name, axis=axis).dense()
            assert all((unit == drawn).all() for unit in kept)


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_experts_are_saved_loaded_merged_and_trained_as_in_lora(tmp_path, kind, form):
    model = adapted(kind, **FORMS[form])
    expected = logits(model)
    assert (expected - logits(base(kind))).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    twin = PeftModel.from_pretrained(
        base(kind), tmp_path, is_trainable=True, config=LoraConfig.from_pretrained(tmp_path)
    )
    torch.testing.assert_close(logits(twin), expected)
    again = PeftModel.from_pretrained(base(kind), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(again), expected)
    assert module_masks(again) == module_masks(model)
    write_compact(model, tmp_path)
    assert torch.equal(logits(load_compact(base(kind), tmp_path)), expected)
    torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload()), expected)

    scaled_as(model, twin)
    factors = {name: each for name, each in model.named_modules() if isinstance(each, MaskedFactor)}
    for name, module in twin.named_modules():
        if name in factors:
            trains = bool([*factors[name].parameters()])
            exists = factors[name].fill(torch.ones_like(factors[name].kept)).detach() * trains
            module.weight.register_hook(lambda gradient, exists=exists: gradient * exists)
    for each in (model.train(), twin.train()):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.01, weight_decay=0)
        for seed in range(10):
            each(input_ids=tokens(seed), labels=tokens(seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(logits(model), logits(twin), atol=1e-5, rtol=1e-5)
    assert (logits(model) - expected).abs().max() > 1e-3


def test_experts_may_have_shares_of_their_own_and_stand_beside_plain_lora(tmp_path):
    name = "model.layers.0.mlp.experts.down_proj"
    shares = {f"{name}.{expert}": expert / 5 for expert in range(4)}
    model = adapted("qwen3", target_parameters=["experts.down_proj"], sparsity=shares | {"o_proj": 0.5})
    expected, kept = logits(model), module_masks(model)[name].columns.dense().reshape(4, 2, 12)[:, 0].sum(1)
    assert kept.tolist() == [12, 10, 7, 5]
    write_compact(model, tmp_path)
    assert torch.equal(logits(load_compact(base("qwen3"), tmp_path)), expected)
    for second, config in (("plain", LoraConfig), ("masked", PartialLoraConfig)):
        model.add_adapter(second, config(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"]))
    assert torch.equal(logits(model), expected)
    assert module_masks(model, "masked")[name] != module_masks(model)[name]


def test_the_names_that_a_class_had_before_stand_for_its_fused_experts():
    names = ["o_proj", "gate_proj", "up_proj", "down_proj"]
    model = adapted("qwen3", target_modules=names, target_parameters=None)
    assert module_masks(model).keys() == module_masks(adapted("qwen3")).keys()
    with pytest.warns(UserWarning, match=r"target_parameters=\['experts.gate_up_proj', 'experts.down_proj'\]"):
        adapted("gpt_oss", target_modules="all-linear", target_parameters=None, sparsity=0.5)
    for settings, key in (
        ({"target_modules": ["o_proj", "gate_proj"], "target_parameters": None}, "target_modules"),
        ({"target_parameters": ["experts.missing"]}, "target_parameters"),
        ({"granularity": "groups"}, "target_parameters"),
        ({"columns": "one_hot"}, "target_parameters"),
        ({"lora_bias": True}, "target_parameters"),
    ):
        with refusal(key):
            adapted("qwen3", **settings)


def test_a_compact_file_of_shares_by_expert_is_written_again_as_it_was(tmp_path):
    """Of entries that stay by chance, whose number does not tell the share that was asked for."""
    name = "model.layers.0.mlp.experts.down_proj"
    shares = {f"{name}.{expert}": 0.4 + expert / 10 for expert in range(4)}
    settings = {"granularity": "element", "count": "bernoulli", "target_parameters": ["experts.down_proj"]}
    model = adapted("qwen3", sparsity=shares | {"o_proj": 0.5}, **settings)
    first = write_compact(model, tmp_path / "first")
    again = write_compact(load_compact(base("qwen3"), tmp_path / "first"), tmp_path / "again")
    assert again.read_bytes() == first.read_bytes()
