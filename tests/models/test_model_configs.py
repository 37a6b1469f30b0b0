"""The models of conf/model: their size, what is adapted in them, and that each loads by its tiny one's path."""

from __future__ import annotations

import functools

import pytest
import torch
from configured import ALL, OTHERS, TINY, TINY_OF, inputs, labels, load, logits, loud, settings
from peft import get_peft_model
from refusals import refusal
from scored_models import Altered
from torch import nn

from partial_lora import models
from partial_lora.adapter import PartialLoraConfig
from partial_lora.calibration.reuse import Reuse
from partial_lora.models.targets import target_linears

# Parameters without the head, counted on the published weights (model cards; transformers' and timm's own tables).
PARAMETERS = {
    "vit_b16": 85_798_656,
    "vit_s14": 22_056_192,  # DINOv2-small with 37 x 37 positions
    "clip_vit_b16": 85_799_424,  # as ViT-B/16, with a layer norm more and a bias less
    "convnext_tiny": 27_820_128,
    "deberta_v3_base": 184_422_144,
    "bert_base": 109_482_240,
    "minilm_l6": 22_713_216,
    "llama2_7b": 6_738_415_616,
    "llama3_1_8b": 8_030_261_248,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_0_5b": 494_032_768,  # the embeddings, which are the output layer as well, once
    "smollm2_135m": 134_515_008,
}


@functools.cache
def empty(name: str) -> nn.Module:
    chosen = settings(name)
    names = {key: chosen[key] for key in ("family", "architecture", "model_args") if key in chosen}
    return models.empty(**names, num_labels=2)


def expected_targets(name: str) -> set[str]:
    """Every linear layer of every block."""
    inside = f"{settings(name)['blocks']}."
    linear = [key for key, module in empty(name).named_modules() if isinstance(module, nn.Linear)]
    return {key for key in linear if key.startswith(inside)}


def adapted(name: str, **changes: object) -> nn.Module:
    """The model with a sparse adapter whose B is not zero, in training."""
    chosen = {"r": 4, "target_modules": settings(name)["target_modules"], "sparsity": 0.5, "init_lora_weights": False}
    return get_peft_model(load(name), PartialLoraConfig(**chosen, mask_seed=0, **changes)).train()


def test_every_config_is_tested_through_the_tiny_one_of_its_class():
    assert sorted(TINY_OF) == OTHERS
    assert sorted(set(TINY_OF.values())) == TINY
    for name, tiny in TINY_OF.items():
        mine, small = settings(name), settings(tiny)
        for key in ("family", "target_modules", "head", "new_modules", "blocks"):
            assert mine.get(key) == small.get(key), (name, key)


@pytest.mark.parametrize("name", ALL)
def test_parameters_are_those_published_and_targets_the_linear_layers_of_the_blocks(name):
    model, chosen = empty(name), settings(name)
    family = chosen.get("family", "timm")
    whole = {"head": chosen["head"], "new_modules": chosen.get("new_modules", [])}
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    if name in PARAMETERS:
        head = [] if whole["head"] is None else model.get_submodule(whole["head"]).parameters()
        assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in head) == PARAMETERS[name]
    assert set(target_linears(model, chosen["target_modules"], **whole)) == expected_targets(name)
    assert isinstance(model.get_submodule(chosen["blocks"]), (nn.ModuleList, nn.Sequential))
    for module in whole["new_modules"]:
        model.get_submodule(module)
    with refusal("target_modules: .*'z_proj'"):
        target_linears(model, [*chosen["target_modules"], "z_proj"], **whole)
    if family == "clip":  # not what timm gives that architecture: others than OpenAI's have another
        assert {type(block.mlp.act).__name__ for block in model.timm_model.blocks} == {"QuickGELU"}
    if family != "causal":
        assert models.head_name(model, family) == chosen["head"]


@pytest.mark.parametrize("name", TINY)
def test_all_that_trains_gets_a_gradient_the_same_with_checkpoints_which_keep_less(name):
    chosen = settings(name)
    whole = [module for module in (chosen["head"], *chosen.get("new_modules", [])) if module is not None]

    def gradients(checkpointed: bool) -> tuple[dict, int]:
        torch.manual_seed(0)
        model, kept = adapted(name, modules_to_save=whole), []
        if checkpointed:
            models.enable_gradient_checkpointing(model)
        torch.manual_seed(5)  # of dropout, which has to fall out the same when a block is computed again
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            loss = model(**inputs(name), labels=labels(name, inputs(name))).loss
        loss.backward()
        return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}, sum(kept)

    (plain, much), (again, little) = gradients(False), gradients(True)
    for key, gradient in plain.items():
        assert gradient.abs().max() > 0, key
        assert torch.equal(gradient, again[key]), key
    parts = [f".{target}.{part}." for target in expected_targets(name) for part in ("lora_A", "lora_B")]
    for part in (*parts, *(f".{module}.modules_to_save." for module in whole)):
        assert any(part in key for key in plain), part
    assert little < much / 2


def test_model_that_cannot_keep_less_is_refused():
    model = load("tiny_vit")
    model.supports_gradient_checkpointing = False
    with refusal("model.gradient_checkpointing=true: vit_tiny_patch16_224 "):
        models.enable_gradient_checkpointing(model)


@pytest.mark.parametrize("name", TINY)
def test_a_pass_from_the_altered_block_on_changes_no_output(name):
    chosen, model = settings(name), loud(load(name))
    batches = [inputs(name, rows=5, seed=1), inputs(name, rows=3, length=6, seed=2)]
    if chosen.get("family") == "causal":
        batches = [batch | {"use_cache": False} for batch in batches]  # as scoring does
    reuse, ran = Reuse(model, chosen["blocks"], 2**28), []
    with torch.no_grad():
        intact = [model(**batch).logits for batch in batches]
        for module in sorted(expected_targets(name)):
            with Altered(model, module, 7):
                for number, batch in enumerate(batches):
                    expected = model(**batch).logits
                    assert torch.equal(reuse.altered(model, batch, number, module).logits, expected), module
                    assert (expected - intact[number]).abs().max() > 1e-3 * intact[number].abs().max(), module
                    ran.append(reuse.ran)
    assert min(ran) == 1  # of the last block's modules, nothing but that block


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_weights_are_of_the_dtype_and_else_the_same(name, dtype):
    plain, model = load(name), load(name, dtype=str(dtype).removeprefix("torch."))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for (key, expected), own in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        rounded = expected.to(dtype) if expected.is_floating_point() else expected
        assert torch.allclose(own.float(), rounded.float(), atol=0, rtol=1e-2), key
    assert logits(model, name).dtype == dtype
    torch.testing.assert_close(logits(model, name).float(), logits(plain, name), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_clip", "tiny_bert", "tiny_llama", "tiny_qwen"])
def test_attention_is_computed_as_configured_and_the_same(name, monkeypatch):
    calls, fused, outputs = [], nn.functional.scaled_dot_product_attention, []
    counted = lambda *args, **kwargs: calls.append(1) or fused(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    for implementation, count in (("eager", 0), ("sdpa", 3)):
        model = loud(load(name, attn_implementation=implementation))
        calls.clear()
        outputs.append(logits(model, name))
        assert len(calls) == count
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)
