"""What PEFT does with its adapters, it does with masked ones."""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_models import (
    KINDS,
    VIT_TARGETS,
    adapt,
    dense_twin,
    fill,
    images,
    layers,
    llama,
    logits,
    loss_of,
    optimizer_of,
    step,
    to,
    tokens,
    trainable_parameters,
    vit,
)
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from peft.tuners.lora import LoraModel
from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification, MambaConfig, MambaForCausalLM

from partial_lora.adapter import PartialLoraConfig, module_masks
from partial_lora.adapter.factor import PARTS, FactorA, FactorB, MaskedFactor
from partial_lora.errors import PartialLoraError
from partial_lora.masks import AS_PEFT

# Some modules keep so little that they gather and scatter, some so much that they do not.
UNEVEN = {"rows": 0.9, "columns": 0.8}
EVEN = {"rows": 0.3, "columns": 0.4}


def uneven(name, **settings):
    """The adapted model of a kind, B filled."""
    kind = KINDS[name]
    settings = {"sparsity": {kind.targets[0]: UNEVEN, ".*": EVEN}, "task_type": kind.task, **AS_PEFT, **settings}
    return fill(adapt(kind.build, **settings))


def gradients(model, batch, seed=3):
    torch.manual_seed(seed)  # of dropout
    model.zero_grad()
    loss_of(model.train(), batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "task", "head"),
    [(BertForTokenClassification, "TOKEN_CLS", "classifier"), (BertForQuestionAnswering, "QUESTION_ANS", "qa_outputs")],
)
def test_the_head_of_a_task_trains_as_in_plain_lora(tmp_path, kind, task, head):
    shape = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    settings = {"r": 4, "target_modules": ["query", "value"], "task_type": task}
    config = PartialLoraConfig(**settings, sparsity=0.6)
    partial = copy.deepcopy(get_peft_model(kind(shape), config))
    dense = get_peft_model(kind(shape), LoraConfig(**settings))

    def whole(model):
        return {name for name, each in model.named_parameters() if each.requires_grad and ".lora_" not in name}

    assert whole(partial) == whole(dense)
    assert head in config.modules_to_save
    partial.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(kind(shape), tmp_path, config=PartialLoraConfig.from_pretrained(tmp_path))
    heads = (each.get_base_model().get_submodule(head).modules_to_save["default"] for each in (partial, again))
    assert torch.equal(*(each.weight for each in heads))


def test_an_adapter_that_is_not_there_is_named():
    base = torch.nn.Sequential(torch.nn.Linear(8, 8))
    for model in (base, get_peft_model(base, PartialLoraConfig(r=2, target_modules=["0"], sparsity=0.5), "other")):
        with pytest.raises(PartialLoraError, match="'default'"):
            module_masks(model)


def test_an_adapter_with_a_broken_value_is_not_merged():
    model = fill(adapt(sparsity=0.5))
    next(iter(layers(model).values())).lora_B["default"].kept.data[0, 0] = torch.nan
    before = {name: layer.base_layer.weight.clone() for name, layer in layers(model).items()}
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(next(iter(layers(model).values())).base_layer.weight, next(iter(before.values())))


# Precision


def distance(one, other):
    """How far two lists of tensors are apart, all entries taken together."""
    return sum((a.double() - b.double()).square().sum() for a, b in zip(one, other, strict=True)).sqrt().item()


def kept_only(model, gradient):
    """Of the dense twin's gradients, in order of their names, the part that ``model``'s masks keep."""
    factors = {
        f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, (FactorA, FactorB))
    }
    return [factors[name].keep(value) if name in factors else value for name, value in sorted(gradient.items())]


def assert_no_further_off_than_dense_lora(model, twin, batch, exact):
    """Compare logits and gradients of both with what they are ``exact`` to the last digits of float32."""
    outputs = [[logits(each, batch)] for each in (model, twin)]
    both = [gradients(each, batch) for each in (model, twin)]
    assert outputs[0][0].dtype == outputs[1][0].dtype
    assert {value.dtype for value in both[0].values()} == {value.dtype for value in both[1].values()}
    own, dense = [value for _, value in sorted(both[0].items())], kept_only(model, both[1])
    for one, other, of in ((*outputs, exact[0]), (own, dense, exact[1])):
        assert 0 < distance(other, of) < 0.1 * distance(of, [0 * tensor for tensor in of])
        # With other seeds 0.3 to 3 times, on average once. Another processor adds up in another order: one more draw.
        assert distance(one, of) < 10 * distance(other, of)


@pytest.mark.parametrize(
    ("name", "dtype", "granularity"),
    [
        ("wrapped_vit", torch.bfloat16, "rows_columns"),
        ("deberta", torch.float16, "rows_columns"),
        ("gpt2", torch.float16, "element"),
        ("timm_convnext", torch.bfloat16, "rows_columns"),
        ("timm_convnext", torch.float16, "element"),
    ],
)
def test_under_autocast_it_is_as_exact_as_dense_lora(name, dtype, granularity):
    model, batch = uneven(name, granularity=granularity), KINDS[name].batch(0)
    twin = dense_twin(model, KINDS[name].build)
    exact = [logits(twin, batch)], kept_only(model, gradients(twin, batch))
    with torch.autocast("cpu", dtype):
        assert_no_further_off_than_dense_lora(model, twin, batch, exact)
        assert {value.dtype for value in gradients(model, batch).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "autocast_adapter_dtype", "granularity"),
    [
        ("wrapped_vit", True, "rows_columns"),
        ("llama", False, "rows_columns"),
        ("gpt2", True, "element"),
        ("convnext", True, "rows_columns"),
        ("convnext", False, "element"),
    ],
)
def test_a_base_in_low_precision_trains(name, autocast_adapter_dtype, granularity):
    kind = KINDS[name]
    settings = {"r": 4, "lora_alpha": 6, "target_modules": kind.targets, "sparsity": 0.6, "granularity": granularity}
    config = PartialLoraConfig(**settings, **AS_PEFT)
    model, twin, exact = (
        get_peft_model(kind.build().bfloat16(), each, autocast_adapter_dtype=autocast_adapter_dtype)
        for each in (config, config.as_lora(), config.as_lora())
    )
    assert {p.dtype for p in fill(model).parameters() if p.requires_grad} == {
        torch.float32 if autocast_adapter_dtype else torch.bfloat16
    }
    for each in (twin, exact):
        assert not each.load_state_dict(model.state_dict(), strict=True).missing_keys
    exact.float()
    batch = to(kind.batch(0), torch.bfloat16)
    wide = to(batch, torch.float32)
    found = [logits(exact, wide)], kept_only(model, gradients(exact, wide))
    assert_no_further_off_than_dense_lora(model, twin, batch, found)


# Gradient checkpointing


@pytest.mark.parametrize(
    ("name", "use_reentrant", "granularity"),
    [
        ("llama", True, "rows_columns"),
        ("gpt2", False, "element"),
        ("deberta", False, "rows_columns"),
        ("timm_vit", None, "rows_columns"),
    ],
)
def test_gradient_checkpointing_gives_the_same_gradients(name, use_reentrant, granularity):
    model, batch = uneven(name, granularity=granularity, lora_dropout=0.3), KINDS[name].batch(0)
    calls = []
    next(iter(layers(model).values())).register_forward_pre_hook(lambda *_: calls.append(1))
    expected = gradients(model, batch)
    once = len(calls)
    if use_reentrant is None:  # timm's own
        model.get_base_model().set_grad_checkpointing(True)
    else:
        model.enable_input_require_grads()  # or nothing before the first block would have a gradient to ask for
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    gradient = gradients(model, batch)
    assert len(calls) == 3 * once  # and once more in the backward pass
    assert gradient.keys() == expected.keys()
    for parameter, value in gradient.items():
        torch.testing.assert_close(value, expected[parameter], msg=parameter)


# Several adapters


def test_only_the_active_adapter_trains():
    model = adapt(sparsity=0.9)
    model.add_adapter("other", PartialLoraConfig(r=2, target_modules=VIT_TARGETS, sparsity=0.5))
    expected = sum(
        2 * (len(masks.rows.kept) + len(masks.columns.kept)) for masks in module_masks(model, "other").values()
    )
    assert trainable_parameters(model) > 0
    assert trainable_parameters(model, "other") == 0
    model.set_adapter("other")
    assert trainable_parameters(model) == 0
    assert trainable_parameters(model, "other") == expected


@pytest.mark.parametrize(
    ("name", "granularity"),
    [("wrapped_vit", "rows_columns"), ("gpt2", "element"), ("convnext", "rows_columns"), ("convnext", "element")],
)
def test_each_example_of_a_batch_has_its_own_adapter(name, granularity):
    kind = KINDS[name]
    model = uneven(name, granularity=granularity, modules_to_save=None)
    model.add_adapter("other", PartialLoraConfig(r=2, target_modules=kind.targets, sparsity=0.5, mask_seed=3))
    fill(model, seed=4, adapter_name="other")
    rows = ["other", "default", "__base__", "default"]
    batch = {
        key: torch.cat([value, value.flip(1)])[: len(rows)] for key, value in kind.batch(0).items() if key != "labels"
    }
    expected = []
    for row, adapter in enumerate(rows):
        if adapter == "__base__":
            with model.disable_adapter():
                expected.append(logits(model, batch)[row])
        else:
            model.set_adapter(adapter)
            expected.append(logits(model, batch)[row])
    mixed = logits(model, {**batch, "adapter_names": rows})
    torch.testing.assert_close(mixed, torch.stack(expected), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="adapter_names"):
        model.train()(**batch, adapter_names=rows)


# LoRA's other settings


@pytest.mark.parametrize(
    ("name", "bias", "granularity"),
    [("wrapped_vit", "all", "rows_columns"), ("wrapped_vit", "lora_only", "element"), ("convnext", "all", "element")],
)
def test_biases_train_as_in_plain_lora(tmp_path, name, bias, granularity):
    kind = KINDS[name]
    model = uneven(name, granularity=granularity, bias=bias, modules_to_save=None)
    twin = dense_twin(model, kind.build)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert {key.replace(".kept", ".weight") for key in trained} == {
        key for key, p in twin.named_parameters() if p.requires_grad
    }
    assert any(key.endswith("base_layer.bias") for key in trained)
    assert any(key.endswith(("norm1.bias", "layernorm.bias")) for key in trained) == (bias == "all")
    gradient = [value for _, value in sorted(gradients(model, kind.batch(0)).items())]
    expected = kept_only(model, gradients(twin, kind.batch(0)))
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
    for key, parameter in model.named_parameters():
        if key in trained and key.endswith("bias"):
            parameter.data += 0.5
    model.save_pretrained(tmp_path)
    again = get_peft_model(kind.build(), PartialLoraConfig.from_pretrained(tmp_path))
    again.load_adapter(str(tmp_path), "default")
    torch.testing.assert_close(logits(again, kind.batch(0)), logits(model, kind.batch(0)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("wrapped_vit", {**AS_PEFT, "alpha_pattern": {"fc1": 3}}),
        ("gpt2", AS_PEFT),
        ("timm_convnext", AS_PEFT),
        ("timm_convnext", {}),
        ("wrapped_vit", {"granularity": "groups"}),
        ("wrapped_vit", {"columns": "one_hot", "row_exponent": 0}),
    ],
)
def test_the_bias_of_b_trains_where_its_row_is_kept(tmp_path, name, settings):
    kind = KINDS[name]
    settings = {
        "sparsity": {kind.targets[0]: UNEVEN, ".*": EVEN},
        "lora_bias": True,
        "modules_to_save": None,
    } | settings
    model = fill(adapt(kind.build, task_type=kind.task, **settings))
    batch, masks = kind.batch(0), module_masks(model)
    if settings.get("granularity") != "groups":
        for module, layer in layers(model).items():
            assert layer.lora_B["default"].bias.bool().tolist() == masks[module].rows.dense().tolist()
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    twin = PeftModel.from_pretrained(
        kind.build(), tmp_path, is_trainable=True, config=LoraConfig.from_pretrained(tmp_path)
    )
    again = PeftModel.from_pretrained(kind.build(), tmp_path, is_trainable=True)
    for each in (twin, again):
        torch.testing.assert_close(logits(each, batch), expected, atol=1e-5, rtol=1e-5)
    assert trainable_parameters(again) == trainable_parameters(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload(), batch), expected, atol=1e-5, rtol=1e-5)

    if settings.get("row_exponent") != 0 or "alpha_pattern" in settings:  # whose B has another multiple
        return
    factors = {key: each for key, each in model.named_modules() if isinstance(each, MaskedFactor)}
    for key, module in twin.named_modules():
        for part, kept in PARTS.items() if key in factors else ():
            if not [*factors[key].parameters()]:
                module.requires_grad_(False)
            elif (whole := getattr(module, part)) is not None:
                exists = factors[key].fill(torch.ones_like(getattr(factors[key], kept))).detach()
                whole.register_hook(lambda gradient, exists=exists: gradient * exists)
    for each in (model, twin):
        optimizer = optimizer_of(each)
        for seed in range(4):
            step(each, optimizer, kind.batch(seed))
    torch.testing.assert_close(logits(model, batch), logits(twin, batch), atol=1e-4, rtol=1e-4)
    assert (logits(model, batch) - expected).abs().max() > 0.01


def test_what_is_loaded_to_train_is_masked_unless_a_dense_config_is_asked_for(tmp_path):
    model = fill(adapt(sparsity=0.6))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(vit(), tmp_path, is_trainable=True)
    assert module_masks(again) == module_masks(model)
    assert trainable_parameters(again) == trainable_parameters(model)
    for options in ({}, {"is_trainable": True, "config": LoraConfig.from_pretrained(tmp_path)}):
        dense = PeftModel.from_pretrained(vit(), tmp_path, **options)
        assert type(dense.base_model) is LoraModel
        torch.testing.assert_close(logits(dense, images()), logits(model, images()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", [{}, {"granularity": "element"}, {"lora_bias": True}])
def test_an_invoked_adapter_changes_the_tokens_from_its_invocation_on_as_in_plain_lora(tmp_path, form):
    words = {"alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM"}
    model = fill(adapt(llama, sparsity={".*": UNEVEN}, **form, **words))
    batch = tokens()
    batch["input_ids"][0, 3:5] = torch.tensor([7, 8])  # the second text does not invoke it
    model.save_pretrained(tmp_path)
    twin = PeftModel.from_pretrained(llama(), tmp_path)
    with model.disable_adapter():
        base = logits(model, batch)
    changed = logits(model, batch)
    torch.testing.assert_close(changed, logits(twin, batch), atol=1e-5, rtol=1e-4)
    is_changed = (changed != base).any(-1)
    assert is_changed.tolist() == [[False] * 3 + [True] * 4, [False] * 7]
    loss_of(model.train(), batch).backward()
    assert all(p.grad.count_nonzero() for p in model.parameters() if p.requires_grad)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(again, batch), changed, atol=1e-5, rtol=1e-5)
    with pytest.raises(NotImplementedError):
        model.merge_and_unload()


def test_what_peft_refuses_for_lora_is_refused_with_its_words():
    config = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)
    messages = []
    for method in (LoraConfig, PartialLoraConfig):
        with pytest.raises(ValueError, match="Mamba") as refusal:
            get_peft_model(MambaForCausalLM(config), method(r=2, target_modules=["out_proj"]))
        messages.append(str(refusal.value))
    assert messages[0] == messages[1]


def test_state_dicts_and_transformers_read_b_as_the_file_has_it(tmp_path):
    """With the factor of its density, whose alpha a model of plain LoRA has not."""
    model = fill(adapt(llama, sparsity={".*": UNEVEN}, modules_to_save=None))
    batch, expected = tokens(), logits(model, tokens())
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(llama(), tmp_path)
    plain.load_state_dict(fill(plain, seed=5) and model.state_dict())
    masked = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    masked.load_state_dict(fill(masked, seed=5) and plain.state_dict())
    in_transformers = llama()
    in_transformers.load_adapter(str(tmp_path), peft_config=PartialLoraConfig.from_pretrained(tmp_path))
    for each in (plain, masked, in_transformers):
        torch.testing.assert_close(logits(each, batch), expected, atol=1e-5, rtol=1e-5)
    assert any(isinstance(module, MaskedFactor) for module in in_transformers.modules())


# AutoPeft


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("llama", AutoPeftModelForCausalLM),
        ("deberta", AutoPeftModelForSequenceClassification),
        ("wrapped_vit", AutoPeftModel),
    ],
)
def test_auto_peft_finds_the_base_by_itself(tmp_path, name, auto):
    kind = KINDS[name]
    kind.build().save_pretrained(tmp_path / "base")
    base = type(kind.build()).from_pretrained(tmp_path / "base")
    settings = {"target_modules": kind.targets, "task_type": kind.task, "modules_to_save": kind.head}
    model = fill(get_peft_model(base, PartialLoraConfig(r=4, sparsity=0.6, **settings)))
    folder = str(tmp_path / "adapter")
    model.save_pretrained(folder)
    plain = auto.from_pretrained(folder)
    masked = auto.from_pretrained(folder, is_trainable=True)
    assert type(plain.get_base_model()) is type(masked.get_base_model()) is type(base)
    for each in (plain, masked):
        torch.testing.assert_close(logits(each, kind.batch(0)), logits(model, kind.batch(0)), atol=1e-5, rtol=1e-5)
    assert module_masks(masked) == module_masks(model)
