"""Adapters come, go and are combined: several in one model, switched, swapped, converted, and never half-masked."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from adapter_models import (
    KIND_OF,
    VIT_TARGETS,
    adapt,
    convnext,
    dense_twin,
    fill,
    gpt2,
    images,
    layers,
    llama,
    logits,
    optimizer_of,
    step,
    tokens,
    trainable_parameters,
    vit,
)
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
from refusals import refusal

from partial_lora.adapter import PartialLoraConfig, module_masks
from partial_lora.errors import PartialLoraError
from partial_lora.masks import AS_PEFT

granularities = pytest.mark.parametrize("granularity", ["rows_columns", "element"])


def config_of(base, **settings):
    """Scaled as plain LoRA, so that code of PEFT that passes over alphas gives the same."""
    usual = {"r": 4, "lora_alpha": 6, "target_modules": KIND_OF[base].targets, "sparsity": 0.5}
    return PartialLoraConfig(**usual | AS_PEFT | settings)


def pair(base=vit, granularity="rows_columns", **settings):
    """A model with two masked adapters of unlike masks, "default" and "other", both with values in B."""
    model = adapt(base, sparsity=0.8, granularity=granularity, modules_to_save=None, **AS_PEFT)
    model.add_adapter("other", config_of(base, granularity=granularity, mask_seed=7, **settings))
    return fill(model)


def single(base, name, **settings):
    """What `pair` has under one of its names, alone in a model."""
    model = pair(base, **settings)
    model.set_adapter(name)
    model.delete_adapter({"default": "other", "other": "default"}[name])
    return model


# Several adapters


@granularities
def test_adapters_are_switched_and_added(granularity):
    model = pair(granularity=granularity)
    assert module_masks(model, "other").keys() == module_masks(model).keys()
    assert module_masks(model, "other") != module_masks(model)
    twin = dense_twin(model, vit)
    results = {}
    for active in ("other", "default", ["default", "other"]):
        for each in (model, twin):
            each.base_model.set_adapter(active)
        results[str(active)] = logits(model, images())
        torch.testing.assert_close(results[str(active)], logits(twin, images()), atol=1e-5, rtol=1e-5)
    assert len({result.sum().item() for result in results.values()}) == 3


@granularities
def test_a_second_adapter_is_loaded_with_its_masks(tmp_path, granularity):
    pair(granularity=granularity).save_pretrained(tmp_path)
    expected = logits(single(vit, "other", granularity=granularity), images())
    model = adapt(sparsity=0.8, granularity=granularity, modules_to_save=None)
    result = model.load_adapter(str(tmp_path / "other"), "masked", is_trainable=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    model.add_adapter("dense", PartialLoraConfig.from_pretrained(str(tmp_path), subfolder="other").as_lora())
    model.load_adapter(str(tmp_path / "other"), "dense")
    assert type(model.peft_config["dense"]) is LoraConfig
    for name in ("dense", "masked"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model, images()), expected, atol=1e-5, rtol=1e-5)
    model.set_adapter("dense")
    dense = trainable_parameters(model, "dense")
    model.set_adapter("masked")
    assert trainable_parameters(model, "masked") < dense
    assert module_masks(model, "masked") == module_masks(pair(granularity=granularity), "other")
    step(model, optimizer_of(model), images())
    assert not torch.allclose(logits(model, images()), expected)


@pytest.mark.parametrize(
    ("base", "targets", "batch"),
    [(vit, VIT_TARGETS, images), (llama, ["q_proj", "embed_tokens"], tokens)],
    ids=["linears", "an embedding"],
)
@pytest.mark.parametrize("first", ["plain", "masked"])
def test_plain_lora_and_masked_adapters_share_a_model(tmp_path, base, targets, batch, first):
    configs = {
        "masked": config_of(base, target_modules=targets, sparsity=0.8),
        "plain": LoraConfig(r=3, target_modules=targets, use_dora=base is vit),
    }
    results = {}
    for name, config in configs.items():
        alone = fill(get_peft_model(base(), copy.copy(config), name))
        alone.save_pretrained(tmp_path)  # in a folder of its name
        results[name] = logits(alone, batch())
    second = {"plain": "masked", "masked": "plain"}[first]
    model = get_peft_model(base(), configs[first], first)
    model.add_adapter("untrained", copy.copy(configs[second]))
    model.load_adapter(tmp_path / first, first)
    model.load_adapter(tmp_path / second, second, is_trainable=True)
    assert [type(model.peft_config[name]) for name in ("plain", "masked")] == [LoraConfig, PartialLoraConfig]
    for name in (first, second, first):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model, batch()), results[name], atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "masked" / "partial_lora.json").is_file()
    assert not (tmp_path / "again" / "plain" / "partial_lora.json").exists()


def test_a_deleted_adapter_leaves_nothing_behind():
    model = pair()
    expected = logits(model, images())
    model.delete_adapter("other")
    assert not [name for name, _ in model.named_modules() if "other" in name]
    assert not [key for key in model.state_dict() if "other" in key]
    for layer in layers(model).values():
        assert list(layer.lora_variant) == list(layer.lora_A) == list(layer.scaling) == ["default"]
    assert torch.equal(logits(model, images()), expected)
    model.add_adapter("other", config_of(vit, r=2, sparsity=0.25))  # the name is free again, for any other settings
    assert trainable_parameters(model) > 0
    assert {masks.rows.sparsity for masks in module_masks(model, "other").values()} == {0.25}


@pytest.mark.parametrize(
    ("base", "granularity"),
    [(vit, "rows_columns"), (gpt2, "element"), (convnext, "rows_columns"), (convnext, "element")],
)
def test_several_adapters_are_merged_and_taken_out_again(base, granularity):
    model, batch = pair(base, granularity), KIND_OF[base].batch(0)
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers(model).items()}
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model, batch)
    model.merge_adapter(["default", "other"], safe_merge=True)
    assert all(layer.merged_adapters == ["default", "other"] for layer in layers(model).values())
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-4, rtol=1e-4)
    for name, layer in layers(model).items():
        torch.testing.assert_close(layer.get_base_layer().weight, before[name], atol=1e-5, rtol=0)
    merged = model.merge_and_unload(adapter_names=["other"])
    alone = single(base, "other", granularity=granularity)
    torch.testing.assert_close(logits(merged, batch), logits(alone, batch), atol=1e-4, rtol=1e-4)
    assert type(merged) is type(base())
    assert merged.state_dict().keys() == base().state_dict().keys()


# Combinations


@pytest.mark.parametrize(
    ("base", "combination", "granularity"),
    [
        *((vit, combination, "rows_columns") for combination in ("linear", "svd", "ties", "dare_linear_svd")),
        *((base, combination, "element") for base in (gpt2, convnext) for combination in ("linear", "ties_svd")),
        (convnext, "cat", "rows_columns"),
    ],
)
def test_a_weighted_combination_is_that_of_dense_lora(base, combination, granularity):
    model = pair(base, granularity)
    twin = dense_twin(model, base)
    settings = {} if combination in ("linear", "cat", "svd") else {"density": 0.4}
    for each in (model, twin):
        torch.manual_seed(5)  # of dare
        each.add_weighted_adapter(["default", "other"], [0.5, -2.0], "both", combination_type=combination, **settings)
        each.set_adapter("both")
    for one, other in zip(layers(model).values(), layers(twin).values(), strict=True):
        assert one.get_delta_weight("both").any()
        torch.testing.assert_close(one.get_delta_weight("both"), other.get_delta_weight("both"), atol=1e-4, rtol=1e-4)
        assert "both" not in one.lora_variant
    batch = KIND_OF[base].batch(0)
    torch.testing.assert_close(logits(model, batch), logits(twin, batch), atol=1e-4, rtol=1e-4)
    assert type(model.peft_config["both"]) is LoraConfig
    assert [type(model.peft_config[name]) for name in ("default", "other")] == [PartialLoraConfig] * 2
    model.set_adapter("default")
    assert module_masks(model) == module_masks(pair(base, granularity))


def test_a_combination_of_rank_stabilised_adapters_has_their_scales():
    model = pair(use_rslora=True)
    model.add_weighted_adapter(["other", "default"], [0.5, 2.0], "both", combination_type="cat")
    for layer in layers(model).values():
        expected = 0.5 * layer.get_delta_weight("other") + 2.0 * layer.get_delta_weight("default")
        torch.testing.assert_close(layer.get_delta_weight("both"), expected, atol=1e-4, rtol=1e-4)


def test_a_combination_that_cannot_be_leaves_the_masked_configs_alone():
    model = pair(r=2)
    with pytest.raises(ValueError, match="All adapters must have the same r"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type="linear")
    assert {type(config) for config in model.peft_config.values()} == {PartialLoraConfig}
    assert "both" not in model.peft_config


def test_adapters_of_several_ranks_are_combined_where_that_is_defined():
    model = pair(rank_pattern={"fc1": 7, "attn.proj": 2})
    with pytest.raises(PartialLoraError, match="rank_pattern"):
        model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both", combination_type="linear")
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both", combination_type="cat")
    for layer in layers(model).values():
        expected = 0.5 * layer.get_delta_weight("default") + 2.0 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("both"), expected, atol=1e-4, rtol=1e-4)
    assert [type(model.peft_config[name]) for name in ("default", "other")] == [PartialLoraConfig] * 2


# Without a PeftModel


@pytest.mark.parametrize(("granularity", "low_cpu_mem_usage"), [("rows_columns", False), ("element", True)])
def test_adapters_are_injected_without_a_peft_model(granularity, low_cpu_mem_usage):
    base = vit()
    torch.manual_seed(1)
    bare = inject_adapter_in_model(config_of(vit, granularity=granularity), base)
    wrapped = adapt(sparsity=0.5, granularity=granularity, modules_to_save=None, **AS_PEFT)
    fill(bare), fill(wrapped)
    assert torch.equal(logits(bare, images()), logits(wrapped, images()))
    assert module_masks(bare) == module_masks(wrapped)
    saved = get_peft_model_state_dict(bare)
    again = inject_adapter_in_model(config_of(vit, granularity=granularity), vit(), low_cpu_mem_usage=low_cpu_mem_usage)
    result = set_peft_model_state_dict(again, saved, low_cpu_mem_usage=low_cpu_mem_usage)
    assert result.unexpected_keys == []
    assert not [key for key in result.missing_keys if "lora_" in key]
    assert torch.equal(logits(again, images()), logits(bare, images()))
    plain = inject_adapter_in_model(config_of(vit).as_lora(), vit())
    set_peft_model_state_dict(plain, saved)
    torch.testing.assert_close(logits(plain, images()), logits(bare, images()), atol=1e-5, rtol=1e-5)


def test_targets_read_off_a_state_dict_are_refused():
    saved = get_peft_model_state_dict(adapt(sparsity=0.5))
    with pytest.raises(PartialLoraError, match="target_modules"):
        inject_adapter_in_model(config_of(vit), vit(), state_dict=saved)


# Swapping


def saved(folder, base, **settings):
    model = fill(adapt(base, modules_to_save=None, **AS_PEFT, **settings), seed=settings["mask_seed"])
    model.save_pretrained(folder)
    return str(folder), logits(model, KIND_OF[base].batch(0))


@pytest.mark.parametrize(("base", "granularity"), [(llama, "rows_columns"), (convnext, "element")])
def test_saved_adapters_are_swapped_into_each_other_as_plain_lora(tmp_path, base, granularity):
    one = saved(tmp_path / "one", base, sparsity=0.8, mask_seed=1, granularity=granularity)
    two = saved(tmp_path / "two", base, sparsity=0.5, mask_seed=2, granularity=granularity)
    wide = saved(tmp_path / "wide", base, sparsity=0.9, mask_seed=3, granularity=granularity, r=8)
    model = PeftModel.from_pretrained(base(), one[0])
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    for folder, expected in (one, two, wide, one):
        hotswap_adapter(model, folder, adapter_name="default")
        torch.testing.assert_close(logits(model, KIND_OF[base].batch(0)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("base", "form"),
    [
        (llama, {}),
        (llama, {"granularity": "element"}),
        (llama, {"granularity": "groups"}),
        (llama, {"columns": "frozen"}),
        (llama, {"columns": "one_hot"}),
        (convnext, {"rank_pattern": {"pwconv1": 3}, "lora_bias": True}),
    ],
)
def test_a_masked_adapter_is_swapped_for_one_that_keeps_as_many(tmp_path, base, form):
    def masked(seed, **settings):
        settings = {"sparsity": {".*": {"rows": 0.7, "columns": 0.5}}, "mask_seed": seed, **form, **settings}
        return fill(adapt(base, modules_to_save=None, **settings), seed=seed)

    model, other, batch = masked(1), masked(2), KIND_OF[base].batch(0)
    other.save_pretrained(tmp_path / "two")
    places = [id(value) for value in model.parameters()]
    hotswap_adapter(model, str(tmp_path / "two"), adapter_name="default")
    close = {"atol": 1e-5, "rtol": 1e-5}
    swapped = logits(model, batch)
    torch.testing.assert_close(swapped, logits(other, batch), **close)
    assert [id(value) for value in model.parameters()] == places
    assert module_masks(model) == module_masks(other)
    model.save_pretrained(tmp_path / "again")  # with the masks that came with it
    again = PeftModel.from_pretrained(base(), tmp_path / "again", is_trainable=True)
    torch.testing.assert_close(logits(again, batch), logits(other, batch), **close)

    if "granularity" not in form and base is llama:  # another number of rows, or no masks at all
        masked(3, sparsity=0.4).save_pretrained(tmp_path / "more")
        for folder, key in (("more", "rows"), ("plain", "partial_lora.json")):
            if folder == "plain":
                fill(adapt(base, modules_to_save=None)).save_pretrained(tmp_path / folder)
            with refusal(f".*{key}"):
                hotswap_adapter(model, str(tmp_path / folder), adapter_name="default")
        with refusal("'default'.*hotswap_adapter"):
            tensors = get_peft_model_state_dict(other)
            hotswap_adapter_from_state_dict(model, tensors, "default", LoraConfig.from_pretrained(tmp_path / "two"))
        assert torch.equal(logits(model, batch), swapped)


def test_a_compiled_masked_model_takes_adapters_of_lower_ranks_without_compiling_again(tmp_path):
    def masked(seed, **settings):
        return fill(adapt(llama, sparsity=0.7, mask_seed=seed, **{"r": 4} | settings), seed=seed)

    model, batch = masked(1), KIND_OF[llama].batch(0)
    expected = logits(model, batch)
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    torch.testing.assert_close(logits(model, batch), expected)
    torch._dynamo.reset()
    compiled, counts = torch.compile(model, backend="eager"), []
    for seed, settings in ((2, {"r": 8}), (3, {"lora_alpha": 11}), (4, {"r": 2})):
        other = masked(seed, **settings)
        other.save_pretrained(tmp_path / str(seed))
        hotswap_adapter(compiled, str(tmp_path / str(seed)), adapter_name="default")
        with torch.no_grad():
            torch.testing.assert_close(compiled.eval()(**batch).logits, logits(other, batch))
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(counts)) == 1
    with refusal("target_rank"):
        prepare_model_for_compiled_hotswap(masked(1, granularity="element"), target_rank=8)


# Code that writes into `weight` of a factor would change nothing: each such path of PEFT is refused.


@pytest.fixture
def masked():
    model = fill(adapt(sparsity=0.8, modules_to_save=None, **AS_PEFT))
    yield model
    intact = fill(adapt(sparsity=0.8, modules_to_save=None, **AS_PEFT))
    assert module_masks(model) == module_masks(intact)
    assert torch.equal(logits(model, images()), logits(intact, images()))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda model, folder: hotswap_adapter(model, folder, adapter_name="default"), PartialLoraError),
        (lambda model, _: hotswap_adapter_from_state_dict(model, other_tensors(), "default", PLAIN), PartialLoraError),
        (lambda model, _: prepare_model_for_compiled_hotswap(model, target_rank=2), PartialLoraError),
        (lambda model, _: reduce_intruder_dimension(model), ValueError),
        (lambda model, _: initialize_lora_eva_weights(model, [images()]), ValueError),
    ],
)
def test_a_change_that_peft_makes_in_the_weights_is_refused(masked, tmp_path, change, error):
    folder, _ = saved(tmp_path, vit, sparsity=0.5, mask_seed=2)
    with pytest.raises(error):
        change(masked, folder)


PLAIN = LoraConfig(r=4, lora_alpha=6)


def other_tensors():
    other = fill(adapt(sparsity=0.8, modules_to_save=None), seed=9)
    return {key: value for key, value in other.state_dict().items() if "lora_" in key}


WRITES = [
    lambda factor, value: setattr(factor.weight, "data", value),
    lambda factor, value: factor.weight.data.copy_(value),
    lambda factor, value: factor.weight.copy_(value),
    lambda factor, value: factor.weight.data.sub_(value),
    lambda factor, value: factor.weight.data.fill_(0),
    lambda factor, value: factor.weight[0].fill_(0),
    lambda factor, value: torch.nn.init.zeros_(factor.weight),
    lambda factor, value: torch.nn.init.normal_(factor.weight),
    lambda factor, value: torch.nn.init.uniform_(tensor=factor.weight),
    lambda factor, value: torch.nn.init.kaiming_uniform_(factor.weight),
    lambda factor, value: torch.nn.init.constant_(factor.weight, 1),
    lambda factor, value: factor.weight.chunk(2)[0].mul_(2),
    lambda factor, value: torch.split(factor.weight, 1)[0].mul_(2),
    lambda factor, value: [row.mul_(2) for row in factor.weight.data],
    lambda factor, value: torch._foreach_add_([factor.weight], [value]),
    lambda factor, value: operator.iadd(factor.weight, value),
    lambda factor, value: operator.ifloordiv(factor.weight, value),
    lambda factor, value: operator.ilshift(factor.weight, value),
    lambda factor, value: factor.weight.requires_grad_(False),
    lambda factor, value: setattr(factor.weight, "requires_grad", False),
]


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_writing_into_the_dense_view_is_refused(masked, factor):
    factor = getattr(next(iter(layers(masked).values())), factor)["default"]
    for write in WRITES:
        with pytest.raises((PartialLoraError, AttributeError), match="masked"), torch.no_grad():
            write(factor, torch.ones(factor.weight.shape))


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_the_dense_view_is_saved_as_an_ordinary_tensor(masked, factor, tmp_path):
    factor = getattr(next(iter(layers(masked).values())), factor)["default"]
    assert type(factor.weight) is not torch.Tensor
    torch.save({"weight": factor.weight.detach()}, tmp_path / "weight.pt")
    found = torch.load(tmp_path / "weight.pt", weights_only=True)["weight"]
    assert type(found) is torch.Tensor
    assert torch.equal(found, factor.weight.clone())
    copied = copy.deepcopy({"weight": factor.weight.detach()})["weight"]
    assert type(copied) is torch.Tensor
    assert torch.equal(copied, found)
    assert (factor.out_features, factor.in_features) == found.shape


@pytest.mark.parametrize(("granularity", "strict"), [("rows_columns", True), ("element", False)])
def test_parameters_kept_by_name_load_again(granularity, strict):
    model = fill(adapt(llama, sparsity=0.8, granularity=granularity))
    expected, kept = logits(model, tokens()), {name: each.clone() for name, each in model.named_parameters()}
    fill(model, seed=9)
    assert not torch.equal(logits(model, tokens()), expected)
    assert model.load_state_dict(kept, strict=strict) == ([], [])
    assert torch.equal(logits(model, tokens()), expected)
    name = next(name for name in kept if name.endswith("kept"))
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        model.load_state_dict({name: torch.ones(3, 2)}, strict=False)


@pytest.mark.parametrize(
    ("factor", "wrap", "granularity"),
    [
        ("lora_A", torch.nn.Parameter, "rows_columns"),
        ("lora_B", torch.nn.Parameter, "element"),
        ("lora_B", torch.clone, "rows_columns"),
    ],
)
def test_a_dense_weight_that_is_assigned_is_kept_where_the_mask_keeps(factor, wrap, granularity):
    model = adapt(sparsity=0.8, granularity=granularity)
    donor = fill(adapt(sparsity=0.8, granularity=granularity), seed=9)
    for module, layer in layers(model).items():
        ours, theirs = (getattr(each, factor)["default"] for each in (layer, layers(donor)[module]))
        before = ours.kept.clone()
        with pytest.raises(PartialLoraError, match=r"^weight .*from_pretrained"):
            ours.weight = wrap(torch.ones(ours.shape))
        with pytest.raises(PartialLoraError, match=r"^weight .*\(2, 3\)"):
            ours.weight = wrap(torch.zeros(2, 3))
        assert torch.equal(ours.kept, before)
        ours.weight = wrap(theirs.weight.detach().clone())
        torch.testing.assert_close(ours.kept, theirs.kept)
        held = ours.kept
        ours.weight = wrap(ours.weight.detach().clone())  # the same values: an optimizer goes on with the parameter
        assert ours.kept is held
        assert ours.kept.requires_grad
        assert [name for name, _ in ours.named_parameters()] == ["kept"]
    assert module_masks(model) == module_masks(donor)


def test_values_of_a_smaller_mask_are_refused_for_use_too(tmp_path):
    adapt(llama, sparsity=0.8).save_pretrained(tmp_path)
    with pytest.raises(PartialLoraError, match="does not match the digest"):
        PeftModel.from_pretrained(llama(), tmp_path, config=config_of(llama, sparsity=0.5))
