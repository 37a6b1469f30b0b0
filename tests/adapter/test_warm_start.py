"""A masked adapter takes the kept part of a trained LoRA, strictly, or stays as it was."""

from __future__ import annotations

import json

import pytest
import torch
from adapter_models import (
    KINDS,
    VIT_TARGETS,
    adapt,
    fill,
    images,
    layers,
    llama,
    logits,
    optimizer_of,
    qwen2,
    step,
    tokens,
    vit,
)
from peft import AdaLoraConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from refusals import refusal
from safetensors.torch import load_file, save_file

from partial_lora.adapter import PartialLoraConfig, module_masks, warm_start
from partial_lora.errors import PartialLoraError
from partial_lora.files import entry

QKV = "timm_model.blocks.0.attn.qkv"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def trained(base=vit, batch=images, **settings):
    """A plain LoRA after some steps: A, B and the head have moved."""
    model = adapt(base, seed=5, **settings)
    optimizer = optimizer_of(model)
    for seed in range(2):
        step(model, optimizer, batch(seed))
    return fill(model, seed=6)


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture
def lora(tmp_path):
    """The folder of a trained LoRA."""
    trained().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        ("wrapped_vit", "rows_columns"),
        ("gpt2", "element"),
        ("timm_convnext", "rows_columns"),
        ("timm_convnext", "element"),
        ("deberta", "rows_columns"),
    ],
)
def test_kept_entries_are_those_of_the_lora_and_the_others_zero(name, granularity):
    kind = KINDS[name]
    dense = trained(kind.build, kind.batch, task_type=kind.task)
    sparsity = {kind.targets[0]: {"rows": 0.9, "columns": 0.7}, ".*": 0.4}
    settings = {"granularity": granularity, "task_type": kind.task, "row_exponent": 0}
    model = adapt(kind.build, sparsity=sparsity, **settings)
    before = [p.data_ptr() for p in model.parameters()]  # by which optimizers know them
    warm_start(model, dense)
    assert [p.data_ptr() for p in model.parameters()] == before

    for module, masks in module_masks(model).items():
        for factor, mask, axis in (("lora_A", masks.columns, 1), ("lora_B", masks.rows, 0)):
            ours = getattr(layers(model)[module], factor)["default"].weight.detach()
            theirs = getattr(layers(dense)[module], factor)["default"].weight.detach()
            kept = torch.from_numpy(mask.dense())
            kept = kept.view(theirs.shape) if granularity == "element" else kept
            if granularity == "rows_columns":
                ours, theirs = ours.movedim(axis, 0), theirs.movedim(axis, 0)
            assert torch.equal(ours[kept], theirs[kept])
            assert ours[kept].any()
            assert not ours[~kept].any()
    heads = [key for key in state(model) if ".modules_to_save." in key]
    assert bool(heads) == (kind.head is not None or kind.task == "SEQ_CLS")
    for key in heads:
        assert torch.equal(state(model)[key], state(dense)[key])
        assert not torch.equal(state(model)[key], state(adapt(kind.build, task_type=kind.task))[key])


@pytest.mark.parametrize(
    "settings", [{}, {"column_exponent": 0.5}, {"lora_alpha": 3}, {"use_rslora": True}, {"alpha_pattern": {"fc1": 2}}]
)
@pytest.mark.parametrize("lora_bias", [False, True])
def test_under_another_scaling_the_kept_part_of_the_lora_says_the_same(tmp_path, settings, lora_bias):
    lora = trained(lora_bias=lora_bias)
    settings = {"sparsity": 0.7, "lora_bias": lora_bias, **settings}
    model, expected = adapt(**settings), adapt(sparsity=0.7, row_exponent=0, lora_bias=lora_bias)
    warm_start(expected, lora)
    warm_start(model, lora)
    said = logits(expected, images())
    torch.testing.assert_close(logits(model, images()), said, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "masked")
    for source in (model, tmp_path / "masked"):
        again = adapt(sparsity=0.7, row_exponent=0, lora_bias=lora_bias)
        warm_start(again, source)
        torch.testing.assert_close(logits(again, images()), said, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["str", "path", "model", "masked folder", "masked model", "subfolder"])
def test_every_form_of_a_lora_gives_the_same(tmp_path, way):
    dense = trained()
    model, expected = adapt(sparsity=0.7), adapt(sparsity=0.7)
    warm_start(expected, dense)
    if way.startswith("masked"):  # an adapter of ours under the same masks is a LoRA with zeros
        dense = expected
    dense.save_pretrained(tmp_path / "here" if way == "subfolder" else tmp_path)
    settings = {"subfolder": "here"} if way == "subfolder" else {}
    warm_start(model, dense if way.endswith("model") else str(tmp_path) if way == "str" else tmp_path, **settings)
    for key, value in state(model).items():  # B of a masked one is rounded in its file
        torch.testing.assert_close(value, state(expected)[key])


def test_it_is_the_adapter_named_that_starts_warm(lora):
    model = adapt(sparsity=0.7)
    model.add_adapter("other", PartialLoraConfig(r=4, lora_alpha=6, target_modules=VIT_TARGETS, sparsity=0.5))
    before = state(model)
    with pytest.raises(PartialLoraError, match=r"head\.\w+"):
        warm_start(model, lora, "other")
    warm_start(model, trained(modules_to_save=None), "other")
    changed = {key for key, value in state(model).items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if ".other." in key}


def test_a_model_without_peft_model_around_it_starts_warm():
    base = vit()
    settings = {"r": 4, "lora_alpha": 6, "target_modules": VIT_TARGETS, "sparsity": 0.7}
    bare = inject_adapter_in_model(PartialLoraConfig(**settings), base)
    wrapped = adapt(sparsity=0.7, modules_to_save=None)
    for model in (bare, wrapped):
        warm_start(model, trained(modules_to_save=None))
    assert torch.equal(logits(bare, images()), logits(wrapped, images()))


def test_a_lora_in_half_precision_starts_an_adapter_in_single(tmp_path, lora):
    tensors = {key: value.bfloat16() for key, value in load_file(lora / WEIGHTS).items()}
    save_file(tensors, lora / WEIGHTS, metadata={"format": "pt"})
    model = adapt(sparsity=0.7, row_exponent=0)
    warm_start(model, lora)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    kept = layers(model)[QKV].lora_B["default"].kept
    whole = tensors[f"base_model.model.{QKV}.lora_B.weight"].float()
    assert torch.equal(kept, whole[module_masks(model)[QKV].rows.kept.copy()])


def test_biases_and_a_head_are_taken_where_both_have_them():
    dense = trained(bias="lora_only")
    model = adapt(sparsity=0.7, bias="lora_only")
    warm_start(model, dense)
    biases = [key for key in state(model) if key.endswith("base_layer.bias")]
    assert biases
    assert all(torch.equal(state(model)[key], state(dense)[key]) for key in biases)
    model = adapt(sparsity=0.7)
    head = {key: value for key, value in state(model).items() if ".modules_to_save." in key}
    warm_start(model, trained(modules_to_save=None))  # has no head: ours stays
    assert all(torch.equal(state(model)[key], value) for key, value in head.items())


def test_a_lora_drawn_in_another_way_that_leaves_the_base_alone_is_taken(lora):
    usual, other = adapt(sparsity=0.7), adapt(sparsity=0.7)
    warm_start(usual, lora)
    rewrite(lora, init_lora_weights="eva", eva_config={"rho": 2.0})
    warm_start(other, lora)
    assert all(torch.equal(value, state(usual)[key]) for key, value in state(other).items())
    assert any(value.any() for key, value in state(other).items() if "lora_B" in key)


def rewrite(folder, **settings):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))


def without(folder, part):
    tensors = {key: value for key, value in load_file(folder / WEIGHTS).items() if part not in key}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def cut(folder, name=WEIGHTS):
    (folder / name).write_bytes((folder / name).read_bytes()[:-50])


def as_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def transpose(folder, part):
    tensors = {
        key: value.T.contiguous() if part in key else value for key, value in load_file(folder / WEIGHTS).items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


REFUSALS = [
    ({"r": 2}, None, "r=4.* r=2"),
    ({"target_modules": ["attn.qkv"]}, None, r"proj\.lora_A\.weight.*target_modules"),
    ({"modules_to_save": None}, None, r"head\.\w+.*modules_to_save"),
    ({}, lambda f: without(f, "blocks.0.mlp.fc1"), r"0\.mlp\.fc1\.lora_A\.weight"),
    ({}, lambda f: transpose(f, "fc1.lora_A"), r"A\.weight .*\[32, 4\].* \[4, 32\]"),
    ({}, lambda f: transpose(f, "head.weight"), r"timm_model\.head\.weight .*\[32, 4\]"),
    ({}, lambda f: rewrite(f, use_dora=True), "use_dora=True"),
    ({}, lambda f: rewrite(f, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    ({}, lambda f: rewrite(f, rank_pattern={"fc1": 2}), "rank_pattern"),
    ({"rank_pattern": {"fc1": 2}}, None, "rank_pattern"),
    ({}, lambda f: rewrite(f, peft_type="LOHA"), "LOHA"),
    ({}, lambda f: (f / CONFIG).unlink(), CONFIG),
    ({}, lambda f: cut(f, CONFIG), CONFIG),
    ({}, lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
    ({}, cut, WEIGHTS),
    ({}, as_pickle, WEIGHTS),
]


@pytest.mark.parametrize(("settings", "damage", "message"), REFUSALS)
def test_a_lora_that_does_not_fit_is_refused_and_the_model_stays(lora, settings, damage, message):
    if damage:
        damage(lora)
    model = adapt(sparsity=0.5, **settings)
    before = state(model)
    with refusal(f".*({message})"):
        warm_start(model, lora)
    assert all(torch.equal(value, before[key]) for key, value in state(model).items())


def test_what_cannot_take_or_give_a_lora_is_refused(lora, monkeypatch):
    merged = fill(adapt(sparsity=0.5))
    merged.merge_adapter()
    config = PartialLoraConfig(r=4, lora_alpha=6, target_modules=["qkv"], sparsity=0.5)
    several = trained()
    several.add_adapter("more", LoraConfig(target_modules=["qkv"]))
    several.base_model.set_adapter(["default", "more"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for model, source, name, message in (
        (vit(), lora, "default", "^adapter_name .*'default'"),
        (adapt(sparsity=0.5), lora, "mine", "^adapter_name .*'mine'"),
        (adapt(), lora, "default", "'default' "),
        (merged, lora, "default", f"{QKV} .*unmerge_adapter"),
        (get_peft_model(vit(), config, low_cpu_mem_usage=True), lora, "default", rf"{QKV}\.lora_A\.weight .*meta"),
        (
            adapt(sparsity=0.5),
            get_peft_model(vit(), AdaLoraConfig(target_modules=["qkv"], total_step=10)),
            "default",
            "ADALORA",
        ),
        (adapt(sparsity=0.5), several, "default", r"2 .*\['default', 'more'\]"),
        (adapt(sparsity=0.5), "me/nothing", "default", "me/nothing"),
        (adapt(sparsity=0.5), "nothing", "default", "^nothing has no adapter_config.json: "),  # without asking the hub
    ):
        with refusal(f".*({message})"):
            warm_start(model, source, name)


@pytest.mark.parametrize("all_layers", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["model.embed_tokens"]},
        {"modules_to_save": ["head"]},
    ],
)
def test_of_what_peft_saves_beside_the_lora_all_that_trained_is_taken(tmp_path, settings, all_layers):
    settings = {"target_modules": ["q_proj"], **settings}
    base = qwen2 if "bias" in settings else llama
    dense = fill(adapt(base, seed=5, **settings), seed=6)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter += 0.1
    dense.save_pretrained(tmp_path, save_embedding_layers=all_layers)
    model = adapt(base, sparsity=0.0, **settings)
    warm_start(model, tmp_path)
    assert torch.allclose(logits(model, tokens()), logits(dense, tokens()), atol=1e-6)


def test_a_lora_that_its_run_recorded_otherwise_is_refused(tmp_path):
    adapt(llama, seed=5, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    model, weights = (
        adapt(llama, target_modules=["q_proj"], sparsity=0.5),
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    files = {"adapter/adapter_model.safetensors": entry(weights), "adapter/adapter_config.json": None}
    (tmp_path / "result.json").write_text(json.dumps({"files": files}))
    warm_start(model, tmp_path / "adapter")
    weights.write_bytes(weights.read_bytes()[:-100] + b"\1" * 100)
    with refusal(str(tmp_path / "adapter"), weights.name):
        warm_start(model, tmp_path / "adapter")


def test_a_lora_that_trains_other_tokens_is_refused():
    dense, model = (
        adapt(llama, target_modules=["q_proj"], trainable_token_indices=indices, **more)
        for indices, more in (([3, 4], {}), ([3, 9], {"sparsity": 0.5}))
    )
    before = state(model)
    with pytest.raises(PartialLoraError, match="trainable_token_indices"):
        warm_start(model, dense)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
