"""Target modules, matched as PEFT matches them."""

from __future__ import annotations

from configured import load
from refusals import refusal
from scored_models import Named, tiny_vit
from torch import nn

from partial_lora.models.targets import target_linears


def test_targets_are_matched_as_peft_matches_them():
    model = Named(tiny_vit())
    assert list(target_linears(model, ["attn.proj"])) == [f"vit.blocks.{block}.attn.proj" for block in range(2)]
    assert list(target_linears(model, r".*\.1\.mlp\.fc[12]")) == ["vit.blocks.1.mlp.fc1", "vit.blocks.1.mlp.fc2"]
    for targets, key in (
        (["attn.proj", "q_proj"], r"target_modules: .*'q_proj'"),
        ("q_proj", "target_modules=q_proj: "),
        (["proj"], r"target_modules=.*vit\.patch_embed\.proj is a Conv2d"),
    ):
        with refusal(key):
            target_linears(model, targets)


def test_what_trains_whole_is_passed_over():
    model = load("tiny_deberta")
    names = list(target_linears(model, r".*dense", head="classifier", new_modules=["pooler"]))
    layers = [f"deberta.encoder.layer.{layer}" for layer in range(3)]
    kinds = ("attention.output", "intermediate", "output")
    assert names == [f"{layer}.{kind}.dense" for layer in layers for kind in kinds]
    assert "pooler.dense" in target_linears(model, r".*dense", head="classifier")
    both = target_linears(model, r".*(dense|classifier)", head="classifier", new_modules=["pooler"])
    assert list(both) == names


def test_all_linear_layers_are_targets_by_peft_s_word_for_them() -> None:
    for name, whole in (("tiny_llama", {}), ("tiny_bert", {"head": "classifier", "new_modules": ["bert.pooler"]})):
        model = load(name)
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert set(target_linears(model, ["all-linear"], **whole)) == linear - {
            "lm_head",
            "classifier",
            "bert.pooler.dense",
        }
