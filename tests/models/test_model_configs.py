"""What conf/model says of each model: its size, what is adapted in it, and that it loads by its tiny one's path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from configured import ALL, LABELS, OTHERS, TINY, TINY_OF, inputs, labels, load, loud, settings
from peft import get_peft_model
from scored_models import Altered
from torch import nn

from partial_lora import models
from partial_lora.adapter import PartialLoraConfig
from partial_lora.calibration.reuse import Reuse
from partial_lora.errors import PartialLoraError
from partial_lora.models.targets import target_linears, target_names

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
ENCODER_LAYER = ["intermediate.dense", "output.dense", "attention.output.dense"]
BERT = ["attention.self.query", "attention.self.key", "attention.self.value"]
DEBERTA = ["attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"]
VIT = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
CAUSAL = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def expected_targets(name: str) -> set[str]:
    """Every linear layer of every block, by the names that timm and transformers give them."""
    chosen = settings(name)
    args, family, blocks = chosen.get("model_args", {}), chosen.get("family"), chosen["blocks"]
    if chosen["architecture"] == "convnext_tiny":
        depths = args.get("depths", [3, 3, 9, 3])
        places = [f"{stage}.blocks.{block}" for stage, depth in enumerate(depths) for block in range(depth)]
        layers = ["mlp.fc1", "mlp.fc2"]
    elif family == "encoder":
        places = range(args["num_hidden_layers"])
        layers = ENCODER_LAYER + (BERT if chosen["architecture"] == "bert" else DEBERTA)
    elif family == "causal":
        places, layers = range(args["num_hidden_layers"]), CAUSAL
    else:
        places, layers = range(args.get("depth", 12)), VIT
    return {f"{blocks}.{place}.{layer}" for place in places for layer in layers}


def trained_whole(name: str) -> list[str]:
    """The modules that are new for a task: a causal model has none."""
    chosen = settings(name)
    return [module for module in (chosen["head"], *chosen.get("new_modules", [])) if module is not None]


def empty(name: str) -> nn.Module:
    chosen = settings(name)
    names = {key: chosen[key] for key in ("family", "architecture", "model_args") if key in chosen}
    return models.empty(**names, num_labels=2)


def test_every_config_is_tested_through_the_tiny_one_of_its_class():
    assert sorted(TINY_OF) == OTHERS
    assert sorted(set(TINY_OF.values())) == TINY
    for name, tiny in TINY_OF.items():
        mine, small = settings(name), settings(tiny)
        for key in ("family", "target_modules", "head", "new_modules", "blocks"):
            assert mine.get(key) == small.get(key), (name, key)


@pytest.mark.parametrize("name", OTHERS)
def test_parameters_are_those_of_the_published_weights(name):
    model, head = empty(name), settings(name)["head"]
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    new = 0 if head is None else sum(p.numel() for p in model.get_submodule(head).parameters())
    assert sum(p.numel() for p in model.parameters()) - new == PARAMETERS[name]


@pytest.mark.parametrize("name", ALL)
def test_targets_are_the_linear_layers_of_the_blocks_and_no_others(name):
    model, chosen = empty(name), settings(name)
    whole = {"head": chosen["head"], "new_modules": chosen.get("new_modules", [])}
    assert set(target_names(model, chosen["target_modules"], **whole)) == expected_targets(name)
    assert isinstance(model.get_submodule(chosen["blocks"]), (nn.ModuleList, nn.Sequential))
    for module in trained_whole(name):
        model.get_submodule(module)
    with pytest.raises(PartialLoraError, match=r"no module of .* matches 'z_proj'"):
        target_linears(model, [*chosen["target_modules"], "z_proj"], **whole)


def test_clip_has_the_activation_it_was_trained_with():
    """Not what timm gives that architecture by itself: the weights of others than OpenAI have another."""
    for name in ("clip_vit_b16", "tiny_clip"):
        kinds = {type(block.mlp.act).__name__ for block in empty(name).timm_model.blocks}
        assert kinds == {"QuickGELU"}


@pytest.fixture
def saved(tmp_path):
    """A function: the tiny model of a config as a folder of pre-trained weights for other classes."""

    def save(name: str) -> Path:
        tiny = load(TINY_OF[name], labels=["old", "older", "oldest"], seed=3)
        loud(tiny).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("name", OTHERS)
def test_config_loads_a_folder_of_the_hubs_format(name, saved):
    tiny, folder = settings(TINY_OF[name]), saved(name)
    geometry = ("architecture", "model_args", "image_size", "text_weights", "text_args")
    of_tiny = {key: tiny[key] for key in geometry if key in tiny} | {"dtype": "float32"}
    model = load(name, weights=str(folder), **of_tiny)
    expected = loud(load(TINY_OF[name]))
    head = settings(name)["head"]
    assert models.weights_digest(model, head or "") == models.weights_digest(expected, head or "")
    assert model.name_or_path == str(folder)
    assert not model.training
    if head is None:
        return
    assert models.head_name(model, settings(name).get("family", "timm")) == head
    assert model.config.id2label == dict(enumerate(LABELS))
    for key, value in model.get_submodule(head).state_dict().items():
        fresh = load(TINY_OF[name]).get_submodule(head).state_dict()[key]
        assert torch.equal(value, fresh), key  # the head comes of the seed, or of the classes, and not of the folder


@pytest.mark.parametrize("name", TINY)
def test_every_target_and_what_trains_whole_receives_a_gradient(name):
    chosen, model, whole, batch = settings(name), load(name), trained_whole(name), inputs(name)
    config = PartialLoraConfig(
        r=4, target_modules=chosen["target_modules"], modules_to_save=whole, sparsity=0.5, init_lora_weights=False
    )
    adapted = get_peft_model(model, config).train()
    adapted(**batch, labels=labels(name, batch)).loss.backward()
    trained = {key: parameter for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    for target in expected_targets(name):
        for part in ("lora_A", "lora_B"):
            grads = [p.grad for key, p in trained.items() if f".{target}.{part}." in key]
            assert grads, target
            assert all(grad is not None and grad.abs().max() > 0 for grad in grads), (target, part)
    for module in whole:
        grads = [p.grad for key, p in trained.items() if f".{module}.modules_to_save." in key]
        assert grads, module
        assert all(grad.abs().max() > 0 for grad in grads), module


@pytest.mark.parametrize("name", TINY)
def test_gradients_are_the_same_with_checkpoints_and_less_is_kept(name):
    chosen = settings(name)

    def gradients(checkpointed: bool) -> tuple[dict, int]:
        torch.manual_seed(0)
        config = PartialLoraConfig(
            r=4, target_modules=chosen["target_modules"], sparsity=0.5, init_lora_weights=False, mask_seed=0
        )
        adapted = get_peft_model(load(name), config).train()
        if checkpointed:
            models.enable_gradient_checkpointing(adapted)
        kept = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        torch.manual_seed(5)  # of dropout, which has to fall out the same when a block is computed again
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = adapted(**inputs(name), labels=labels(name, inputs(name))).loss
        loss.backward()
        return {key: p.grad for key, p in adapted.named_parameters() if p.grad is not None}, kept

    (plain, much), (again, little) = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    assert len(plain) == 2 * len(expected_targets(name))
    for key, grad in plain.items():
        assert torch.equal(grad, again[key]), key
    assert little < much / 2


def test_model_that_cannot_keep_less_is_refused():
    model = load("tiny_vit")
    model.supports_gradient_checkpointing = False
    with pytest.raises(PartialLoraError, match=r"model\.gradient_checkpointing=true: vit_tiny_patch16_224 cannot"):
        models.enable_gradient_checkpointing(model)


@pytest.mark.parametrize("name", TINY)
def test_what_blocks_leave_out_changes_no_output(name):
    chosen, model = settings(name), loud(load(name))
    batches = [inputs(name, rows=5, seed=1), inputs(name, rows=3, length=6, seed=2)]
    if chosen.get("family") == "causal":
        batches = [batch | {"use_cache": False} for batch in batches]  # as scoring does
    reuse = Reuse(model, chosen["blocks"], 2**28)

    def full(batch: dict) -> torch.Tensor:
        return model(**batch).logits

    with torch.no_grad():
        intact, least = [full(batch) for batch in batches], []
        for module in sorted(expected_targets(name)):
            for rows in (3, 7):
                with Altered(model, module, rows):
                    for number, batch in enumerate(batches):
                        expected = full(batch)
                        found = reuse.altered(model, batch, number, module).logits
                        assert torch.equal(found, expected), (module, rows)
                        heard = (expected - intact[number]).abs().max() / intact[number].abs().max()
                        assert heard > 1e-3, (module, rows)
                        least.append(reuse.ran)
    assert min(least) == 1  # of the last block's modules, nothing but that block


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", TINY)
def test_weights_are_of_the_dtype_and_else_the_same(name, dtype):
    plain, model = load(name), load(name, dtype=dtype)
    wanted = getattr(torch, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    for (key, expected), found in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        expected = expected.to(wanted) if expected.is_floating_point() else expected
        assert torch.allclose(found.float(), expected.float(), atol=0, rtol=1e-2), key
    with torch.no_grad():
        logits = model(**inputs(name)).logits
        assert logits.dtype == wanted
        torch.testing.assert_close(logits.float(), plain(**inputs(name)).logits, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_clip", "tiny_bert", "tiny_llama", "tiny_qwen"])
def test_attention_is_computed_as_asked_and_the_same(name, monkeypatch):
    calls, fused = [], nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    logits = {}
    for implementation in ("eager", "sdpa"):
        model = loud(load(name, attn_implementation=implementation))
        calls.clear()
        with torch.no_grad():
            logits[implementation] = model(**inputs(name)).logits
        assert len(calls) == (3 if implementation == "sdpa" else 0)
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-4, rtol=1e-4)


def test_clip_and_causal_models_have_a_head_of_their_own():
    owners = [name for name in ALL if models.has_own_head(settings(name))]
    assert owners == [name for name in ALL if settings(name).get("family") in ("clip", "causal")]
