"""The compact form holds kept values alone, gives them back bit for bit, and is refused where it does not belong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from adapter_models import (
    HEAD,
    KIND_OF,
    MIXED,
    adapt,
    convnext,
    fill,
    gpt2,
    images,
    layers,
    llama,
    logits,
    optimizer_of,
    qwen2,
    redrawn,
    step,
    timm_convnext,
    tokens,
    vit,
)
from huggingface_hub.errors import EntryNotFoundError
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from refusals import refusal
from safetensors.torch import load, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from partial_lora.adapter import PartialLoraConfig, load_compact, module_masks, write_compact
from partial_lora.adapter.compact import FILE_NAME, decode
from partial_lora.adapter.fingerprint import fingerprint
from partial_lora.errors import PartialLoraError

FC1 = "timm_model.blocks.0.mlp.fc1"


def deep_llama() -> LlamaForCausalLM:
    """A narrow Llama of 32 blocks, whose module names are as long as those of a real one."""
    torch.manual_seed(0)
    size = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 32}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2, num_key_value_heads=2))


def top(base=vit, granularity="rows_columns", **settings) -> dict:
    """Settings that keep what has the highest of arbitrary scores."""
    random = adapt(base, sparsity=0.5, granularity=granularity, **settings)
    generator = np.random.default_rng(0)
    scores = {
        name: {axis: generator.random(getattr(masks, axis).size) for axis in ("rows", "columns")}
        for name, masks in module_masks(random).items()
    }
    return {"selection": "top", "scores": scores, "granularity": granularity, **settings}


def state(model, adapter_name="default"):
    return get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)


def trained(model):
    return {name: value.detach() for name, value in model.named_parameters() if ".lora_" in name}


def assert_same(own, other, dtype=None):
    """Equal names, types and bits; of values rounded to ``dtype`` where one is given."""
    assert own.keys() == other.keys()
    for name, value in own.items():
        rounded = value if dtype is None else value.to(dtype).to(value.dtype)
        assert torch.equal(rounded, other[name]), name
        assert value.dtype == other[name].dtype


def snapshot(model):
    """What loading must leave alone when it fails."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        sorted(vars(model)),
    )


def assert_unchanged(model, before):
    after = snapshot(model)
    assert_same(before[0], after[0])
    assert before[1:] == after[1:]


def refuses(model, folder, message, **arguments):
    before = snapshot(model)
    with refusal(f".*({message})"):
        load_compact(model, folder, **arguments)
    assert_unchanged(model, before)


# Size


def promised_size(model, dtype: torch.dtype | None) -> int:
    kept = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    masks = module_masks(model).values()
    indices = sum(len(mask.rows.kept) + len(mask.columns.kept) for mask in masks)
    is_random = model.peft_config["default"].selection == "random"
    return kept * (2 if dtype == torch.bfloat16 else 4) + 410 * len(masks) + (0 if is_random else 4 * indices)


def written_size(model, folder, dtype: torch.dtype | None) -> int:
    write_compact(model, folder, dtype=dtype)
    (file,) = folder.iterdir()
    assert file.suffix == ".safetensors"
    return file.stat().st_size


@pytest.mark.parametrize(
    ("base", "selection", "granularity", "dtype"),
    [
        (vit, "random", "rows_columns", None),
        (vit, "top", "rows_columns", torch.bfloat16),
        (timm_convnext, "random", "element", None),
        (convnext, "top", "element", None),
        (llama, "random", "element", torch.bfloat16),
        (llama, "top", "rows_columns", None),
    ],
)
def test_the_folder_is_as_small_as_promised(tmp_path, base, selection, granularity, dtype):
    chosen = top(base, granularity) if selection == "top" else {"granularity": granularity}
    model = fill(adapt(base, sparsity=0.87, **chosen))
    assert written_size(model, tmp_path, dtype) <= promised_size(model, dtype)
    loaded = load_compact(base(), tmp_path)
    assert_same(trained(model), trained(loaded), dtype)
    assert module_masks(loaded) == module_masks(model)


def test_names_as_long_as_those_of_a_real_llama_fit_too(tmp_path):
    settings = {"r": 4, "target_modules": ["q_proj", "o_proj", "gate_proj"], "modules_to_save": ["lm_head"]}
    model = get_peft_model(deep_llama(), PartialLoraConfig(**settings, sparsity=0.87))
    assert "model.layers.31.self_attn.q_proj" in module_masks(model)
    assert written_size(fill(model), tmp_path, None) <= promised_size(model, None)
    assert_same(state(model), state(load_compact(deep_llama(), tmp_path)))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_header_fits_where_few_modules_share_it(tmp_path, count):
    targets = ["blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"][:count]
    for head in ([HEAD], None):
        kind = {"target_modules": targets, "modules_to_save": head}
        for selection in ({}, top(**kind)):
            model = fill(adapt(sparsity=0.87, **kind | selection))
            # What is there once a file does not fit into one module's share if there is a head, or indices, as well.
            allowance = 400 if bool(head) + bool(selection) >= count else 0
            assert written_size(model, tmp_path, None) <= promised_size(model, None) + allowance


# Values


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        *((base, {}) for base in KIND_OF),
        (vit, {"granularity": "element"}),
        (timm_convnext, {"granularity": "element", "count": "bernoulli"}),
    ],
)
def test_loading_gives_every_value_back_bit_for_bit(tmp_path, base, settings):
    model = fill(adapt(base, sparsity=MIXED if base is vit else 0.6, mask_seed=3, **settings))
    write_compact(model, tmp_path)
    loaded = load_compact(base(), tmp_path, is_trainable=True)
    assert_same(state(model), state(loaded))
    assert module_masks(loaded) == module_masks(model)
    batch = KIND_OF[base].batch(0)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    losses = [step(each, optimizer_of(each), batch) for each in (model, loaded)]
    assert losses[0] == losses[1]
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        (vit, {"bias": "all"}),
        (vit, {"bias": "lora_only", "use_rslora": True, "alpha_pattern": {"fc1": 3}}),
        (vit, {"target_modules": "all-linear", "exclude_modules": ["fc2"], "lora_dropout": 0.1, "lora_bias": True}),
        (vit, {"target_modules": r".*\.blocks\.0\.(attn\.qkv|mlp\.fc1)", "modules_to_save": None}),
        (llama, {"trainable_token_indices": [1, 3]}),
        (llama, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (qwen2, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    ],
)
def test_what_trains_beside_the_adapter_and_every_option_come_back(tmp_path, base, settings):
    model = adapt(base, sparsity=0.6, **settings)
    optimizer = optimizer_of(model)
    for seed in range(2):
        step(model, optimizer, KIND_OF[base].batch(seed))
    write_compact(model, tmp_path)
    loaded = load_compact(base(), tmp_path)
    assert_same(state(model), state(loaded))
    assert torch.equal(logits(loaded, KIND_OF[base].batch(5)), logits(model, KIND_OF[base].batch(5)))
    own, other = (each.peft_config["default"].as_lora().to_dict() for each in (model, loaded))
    assert {key: own[key] for key in own if own[key] != other[key]} == {"inference_mode": False}


@pytest.mark.parametrize("autocast", [True, False])
def test_an_adapter_on_a_base_in_half_precision_keeps_its_types(tmp_path, autocast):
    def base():
        return vit().to(torch.bfloat16)

    config = PartialLoraConfig(r=4, target_modules=["qkv", "fc1"], sparsity=0.5, modules_to_save=[HEAD])
    model = fill(get_peft_model(base(), config, autocast_adapter_dtype=autocast))
    model.get_base_model().timm_model.head.modules_to_save["default"].float()  # trained in more precision than loaded
    write_compact(model, tmp_path)
    assert_same(state(model), state(load_compact(base(), tmp_path)))


def test_reading_needs_no_model(tmp_path):
    model = fill(adapt(sparsity=0.6, r=3, mask_seed=5))
    write_compact(model, tmp_path)
    compact = decode((tmp_path / FILE_NAME).read_bytes(), tmp_path)
    config = compact.config
    assert (config.r, config.mask_seed, compact.masks) == (3, 5, module_masks(model))
    factor = layers(model)[FC1].lora_A["default"]
    assert torch.equal(compact.kept[FC1]["A"], factor.kept)
    assert compact.kept[FC1]["A"].shape == (3, len(factor.mask.kept))
    values = [*compact.whole.values(), *(value for both in compact.kept.values() for value in both.values())]
    assert sum(value.numel() for value in values) == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    for name in "ab":
        write_compact(fill(adapt(sparsity=0.6, target_modules=["fc2", "qkv", "fc1"])), tmp_path / name)
    assert (tmp_path / "a" / FILE_NAME).read_bytes() == (tmp_path / "b" / FILE_NAME).read_bytes()


# Use


@pytest.mark.parametrize("is_trainable", [True, False])
def test_what_trains_and_what_is_active_are_as_by_peft(tmp_path, is_trainable):
    model = fill(adapt(sparsity=0.6))
    write_compact(model, tmp_path / "compact")
    model.save_pretrained(tmp_path / "peft")
    own = load_compact(vit(), tmp_path / "compact", is_trainable=is_trainable)
    config = PartialLoraConfig.from_pretrained(str(tmp_path / "peft"))
    peft = PeftModel.from_pretrained(vit(), str(tmp_path / "peft"), config=config, is_trainable=is_trainable)
    assert snapshot(own)[1:] == snapshot(peft)[1:]


def test_several_adapters_load_beside_each_other(tmp_path):
    model = adapt(sparsity=0.6)
    config = PartialLoraConfig(r=2, target_modules=["fc1"], granularity="element", sparsity=0.9, mask_seed=7)
    model.add_adapter("other", config)
    fill(model)
    for name in ("default", "other"):
        write_compact(model, tmp_path / name, adapter_name=name)
    loaded = load_compact(vit(), tmp_path / "default", adapter_name="first")
    assert load_compact(loaded, tmp_path / "other", adapter_name="second") is loaded
    assert loaded.active_adapter == "first"
    for own, other in (("default", "first"), ("other", "second")):
        assert_same(state(model, own), state(loaded, other))
        model.set_adapter(own)
        loaded.set_adapter(other)
        assert torch.equal(logits(model, images()), logits(loaded, images()))
    refuses(loaded, tmp_path / "other", "^adapter_name .*'first'", adapter_name="first")


# What does not fit


def replaced(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    return model


def fine_tuned(model):
    """One parameter trained a little."""
    with torch.no_grad():
        model.timm_model.blocks[0].mlp.fc2.weight.mul_(1.0001)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: replaced(m, FC1, torch.nn.Identity()), FC1),
        (lambda m: replaced(m, FC1, torch.nn.Linear(32, 64)), f"{FC1} .*64 x 32 .*128 x 32"),
        (lambda m: replaced(m, HEAD, torch.nn.Linear(32, 5)), rf"{HEAD}\.bias .*\[5\] .*\[4\]"),
        (lambda m: replaced(m, HEAD, torch.nn.Linear(32, 4, bias=False)), rf"{HEAD}\.bias"),
        (lambda m: redrawn(), "check_base"),
        (fine_tuned, "check_base"),
        (lambda m: redrawn().to(torch.bfloat16), "check_base"),
        (lambda m: llama(), r"timm_model\.blocks"),
        (lambda m: get_peft_model(m, LoHaConfig(target_modules=["qkv"])), "model has adapters"),
        (lambda m: get_peft_model(m, LoraConfig(target_modules=["qkv"])).get_base_model(), "PeftModel"),
    ],
)
def test_a_model_it_does_not_belong_to_is_refused_and_left_alone(tmp_path, change, message):
    write_compact(fill(adapt(sparsity=0.6)), tmp_path)
    refuses(change(vit()), tmp_path, message)


def test_a_merged_model_is_refused_both_ways(tmp_path):
    model = fill(adapt(sparsity=0.6))
    write_compact(model, tmp_path)
    model.merge_adapter()
    refuses(model, tmp_path, "unmerge_adapter", adapter_name="other")
    with pytest.raises(PartialLoraError, match="unmerge_adapter"):
        write_compact(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_base_model_in_another_precision_is_the_same_model(tmp_path, dtype):
    model = fill(adapt(sparsity=0.6))
    write_compact(model, tmp_path)
    assert module_masks(load_compact(vit().to(dtype), tmp_path)) == module_masks(model)


def whole(model):
    return [model]


def one_by_one(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize(
    ("dtype", "parts"), [(torch.float32, whole), (torch.bfloat16, whole), (torch.bfloat16, one_by_one)]
)
def test_merging_and_unmerging_leave_a_base_what_it_was(tmp_path, dtype, parts):
    def adapted():
        torch.manual_seed(1)
        # No larger than the weights, as what is learned is.
        config = PartialLoraConfig(r=4, lora_alpha=0.08, target_modules=["q_proj", "down_proj"], sparsity=0.5)
        return fill(get_peft_model(llama().to(dtype), config)).eval()

    own, model = fingerprint(llama().to(dtype)), adapted()
    for _ in range(3):
        for part in parts(model):
            part.merge_adapter() if part is model else part.merge()
        assert not own.agrees(fingerprint(model.get_base_model()))
        for part in parts(model):
            part.unmerge_adapter() if part is model else part.unmerge()
    expected = logits(adapted(), tokens())
    assert not torch.equal(logits(model, tokens()), expected)  # rounding has moved the base
    write_compact(model, tmp_path)
    assert torch.equal(logits(load_compact(llama().to(dtype), tmp_path), tokens()), expected)
    emptied = model.unload()
    load_compact(emptied, tmp_path).unload()
    other = next(parameter for name, parameter in emptied.named_parameters() if name.endswith("q_proj.weight"))
    other.data[:, : other.shape[1] // 2] += 1  # the weights from before do not hide this
    with pytest.raises(PartialLoraError, match="check_base"):
        load_compact(emptied, tmp_path)


def stays_merged(model):
    model.merge_adapter()
    return model.unload()


def merged_after_unmerging(model):
    model.merge_adapter()
    model.unmerge_adapter()
    return model.merge_and_unload()


@pytest.mark.parametrize("merge", [stays_merged, merged_after_unmerging])
def test_a_base_in_which_an_adapter_was_left_is_another(tmp_path, merge):
    """However little it has moved the weights: put on top of them it would count twice."""
    config = PartialLoraConfig(r=4, lora_alpha=0.002, target_modules=["q_proj", "down_proj"], sparsity=0.5)
    model = fill(get_peft_model(llama(), config))
    write_compact(model, tmp_path)
    base = merge(model)
    refuses(base, tmp_path, "check_base")
    write_compact(fill(get_peft_model(base, config)), tmp_path / "second")  # which belongs to what it was trained over
    refuses(llama(), tmp_path / "second", "check_base")


@pytest.mark.parametrize("base", [llama, qwen2])  # the second's head is tied to its embeddings
def test_tokens_that_were_added_and_train_come_with_the_adapter(tmp_path, base):
    def resized(seed):
        torch.manual_seed(seed)
        model = base()
        torch.manual_seed(seed)
        model.resize_token_embeddings(53)
        return model

    config = {"target_modules": ["q_proj"], "sparsity": 0.5, "trainable_token_indices": [50, 51, 52]}
    model = fill(get_peft_model(resized(1), PartialLoraConfig(r=4, **config))).eval()
    write_compact(model, tmp_path)
    if base is qwen2:  # of an untied head the new rows would not train, and differ
        batch = {"input_ids": torch.arange(40, 53).unsqueeze(0)}
        assert torch.equal(logits(load_compact(resized(2), tmp_path), batch), logits(model, batch))
    else:
        refuses(resized(2), tmp_path, "check_base")
    assert_same(state(load_compact(resized(2), tmp_path, check_base=False)), state(model))


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    path = write_compact(fill(adapt(sparsity=0.6)), tmp_path)
    content = path.read_bytes()
    for length in (0, 4, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        refuses(vit(), tmp_path, FILE_NAME)
    path.write_bytes(content + b"x")
    refuses(vit(), tmp_path, FILE_NAME)


def rewritten(path, alter_header=lambda header: None, alter_tensors=lambda tensors: None):
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    ((key, text),) = json.loads(content[8 : 8 + size])["__metadata__"].items()
    header, tensors = json.loads(text), load(content)
    alter_header(header)
    alter_tensors(tensors)
    save_file(tensors, path, metadata={header.pop("KEY", key): json.dumps(header)})


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda h: h.update(KEY="partial_lora/2"), "format 2"),
        (lambda h: h.update(KEY="partial_lora.1"), "version 0.20"),
        (lambda h: h["modules"][FC1].__setitem__(4, "0" * 16), f"{FC1} .*digest"),
        (lambda h: h["config"].update(mask_seed=1), "digest"),
        (lambda h: h["modules"].pop(FC1), FC1),
        (lambda h: h["modules"][FC1].__setitem__(2, 3), FC1),
        (lambda h: h["config"].update(colour="red"), "colour"),
        (lambda h: h.update(modules=[]), FILE_NAME),
        (lambda h: h.pop("base"), FILE_NAME),
        (lambda h: h.update(base="?"), FILE_NAME),
        (lambda h: h["modules"][FC1].__setitem__(2, 0), FC1),
        *((lambda h, size=size: h["modules"][FC1][0].__setitem__(0, size), FILE_NAME) for size in (0, 10**13)),
    ],
)
def test_a_header_that_does_not_hold_is_refused(tmp_path, alter, message):
    rewritten(write_compact(fill(adapt(sparsity=0.6)), tmp_path), alter)
    refuses(vit(), tmp_path, message)


@pytest.mark.parametrize(
    ("selection", "alter", "key"),
    [
        ("random", lambda t: t.pop(FC1), FC1),
        ("random", lambda t: t.update({FC1: t[FC1][1:].clone()}), FC1),
        ("random", lambda t: t.update({FC1: t[FC1].int()}), FC1),
        ("random", lambda t: t.pop(f"{HEAD}.bias"), rf"{HEAD}\.bias"),
        ("random", lambda t: t.update(extra=torch.zeros(1)), "extra "),
        ("random", lambda t: t.update({f"{HEAD}.bias": torch.zeros(3)}), rf"{HEAD}\.bias .*\[4\] .*\[3\]"),
        ("top", lambda t: t.pop("#indices"), "#indices"),
        ("top", lambda t: t.update({"#indices": t["#indices"][1:].clone()}), "#indices"),
        ("top", lambda t: t.update({"#indices": t["#indices"].long()}), "#indices"),
        ("top", lambda t: t["#indices"].add_(1), r"indices\[|digest"),
    ],
)
def test_tensors_that_are_missing_or_do_not_hold_are_refused(tmp_path, selection, alter, key):
    settings = top() if selection == "top" else {}
    rewritten(write_compact(fill(adapt(sparsity=0.6, **settings)), tmp_path), alter_tensors=alter)
    refuses(vit(), tmp_path, key)


def test_a_missing_folder_is_refused(tmp_path):
    refuses(vit(), tmp_path / "none", f"none/{FILE_NAME}")


def test_a_repository_of_the_hub_is_as_good_as_a_folder(tmp_path, monkeypatch):
    model = fill(adapt(sparsity=0.6))
    path = write_compact(model, tmp_path)
    hub = "partial_lora.adapter.config.hf_hub_download"
    monkeypatch.setattr(hub, lambda *names, subfolder: {("me/mine", FILE_NAME): str(path)}[names])
    torch.testing.assert_close(logits(load_compact(vit(), "me/mine"), images()), logits(model, images()))

    def missing(*names, subfolder):
        raise EntryNotFoundError("no such file")

    monkeypatch.setattr(hub, missing)
    refuses(vit(), "me/mine", f"me/mine/{FILE_NAME}")


def test_a_compact_folder_is_not_taken_for_a_config(tmp_path):
    write_compact(fill(adapt(sparsity=0.6)), tmp_path)
    with pytest.raises(PartialLoraError, match="load_compact"):
        PartialLoraConfig.from_pretrained(tmp_path)
    fill(adapt(sparsity=0.6)).save_pretrained(tmp_path)  # beside it
    assert PartialLoraConfig.from_pretrained(tmp_path).sparsity == 0.6


@pytest.mark.parametrize("settings", [{"sparsity": 0.3}, {}])
def test_a_failure_in_the_middle_of_loading_leaves_a_model_with_adapters_as_it_was(tmp_path, monkeypatch, settings):
    written = fill(adapt(sparsity=0.6))
    write_compact(written, tmp_path)
    model = fill(adapt(**settings))
    kind = type(model.base_model)
    monkeypatch.setattr("partial_lora.adapter.compact._fill", lambda *_: [].pop())
    answers = logits(model, images())
    before = snapshot(model), str(model.peft_config)
    with pytest.raises(IndexError):
        load_compact(model, tmp_path, adapter_name="other")
    assert_unchanged(model, before[0])
    assert (str(model.peft_config), type(model.base_model)) == (before[1], kind)
    assert torch.equal(logits(model, images()), answers)
    monkeypatch.undo()
    load_compact(model, tmp_path, adapter_name="other").set_adapter("other")
    torch.testing.assert_close(logits(model, images()), logits(written, images()))


@pytest.mark.parametrize(("base", "target"), [(gpt2, "wte"), (qwen2, "embed_tokens"), (qwen2, "lm_head")])
def test_merging_and_unmerging_leave_a_tied_weight_what_it_was(tmp_path, base, target):
    model = fill(adapt(base, target_modules=[target], sparsity=0.5))
    model.merge_adapter()
    model.unmerge_adapter()
    write_compact(model, tmp_path)
    load_compact(base(), tmp_path)


# What cannot be written


def test_only_a_masked_adapter_is_written(tmp_path):
    model = adapt(sparsity=0.6)
    for arguments, message in (
        ({"model": vit()}, "^adapter_name .*none"),
        ({"adapter_name": "none"}, "^adapter_name .*'none'"),
        ({"model": adapt()}, "'default' .*LoraConfig"),
        ({"dtype": torch.int8}, r"^dtype .*torch\.int8"),
    ):
        with pytest.raises(PartialLoraError, match=message):
            write_compact(**{"model": model, "folder": tmp_path / "out"} | arguments)
    next(model.parameters()).ds_id = 0  # as DeepSpeed marks what its stage 3 spreads
    with pytest.raises(PartialLoraError, match="save_pretrained"):
        write_compact(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "value", "key"),
    [("mask_seed", 4, "masks"), ("lora_alpha", 5, "lora_alpha"), ("row_exponent", 0.5, "exponents"), ("r", 8, "rank")],
)
def test_what_the_config_does_not_make_is_not_written(tmp_path, setting, value, key):
    model = fill(adapt(sparsity=0.6))
    setattr(model.peft_config["default"], setting, value)
    with pytest.raises(PartialLoraError, match=key):
        write_compact(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
