"""Settings of a PartialLoraConfig: those accepted, LoRA's own among them, and those refused before any building."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import pickle
import warnings
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from adapter_models import (
    HEAD,
    deberta,
    fill,
    gpt2,
    images,
    layers,
    llama,
    logits,
    qwen2,
    sentences,
    tokens,
    trainable_parameters,
    vit,
)
from peft import LoraConfig, LoraRuntimeConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from refusals import refusal
from torch import nn
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, PretrainedConfig

from partial_lora import Calibration
from partial_lora.adapter import PEFT_TYPE, PartialLoraConfig, module_masks, module_sparsity
from partial_lora.adapter import config as options
from partial_lora.adapter.factor import MaskedFactor
from partial_lora.adapter.selection import Geometry
from partial_lora.errors import PartialLoraError
from partial_lora.masks import AS_PEFT


def two_blocks():
    return vit(blocks=2)


def sparsity_of(sparsity, targets=("attn.qkv", "mlp.fc1")):
    model = get_peft_model(two_blocks(), PartialLoraConfig(r=2, target_modules=list(targets), sparsity=sparsity))
    return {name.removeprefix("timm_model.blocks."): value for name, value in module_sparsity(model).items()}


def both(rows, columns=None):
    return {"rows": rows, "columns": rows if columns is None else columns}


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
    path.write_text(json.dumps({"format": 1, "modules": {"timm_model.blocks.0.attn.qkv": axes}}))
    assert sparsity_of(as_path(path), ["blocks.0.attn.qkv"]) == {"0.attn.qkv": both(0.25, 0.75)}


@pytest.mark.parametrize(
    "content",
    [None, "{", "[]", "{}", '{"format": 1, "modules": {"a": {"rows": {"sparsity": 0.1}}}}', '{"modules": []}'],
)
def test_a_missing_or_broken_calibration_file_is_named(tmp_path, content):
    path = tmp_path / "calibration.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PartialLoraError, match=rf"sparsity names {path}"):
        PartialLoraConfig(target_modules=["qkv"], sparsity=path)


TOP = {"selection": "top", "scores": {"qkv": both([0])}}


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("granularity", {"granularity": "columns"}),
        ("selection", {"selection": "best"}),
        ("selection .*neither", {"selection": "top"}),
        ("selection .*indices", {"indices": {"qkv": both([0])}}),
        ("selection .*scores", {"scores": {"qkv": both([0])}}),
        ("selection .*scores and indices", {**TOP, "indices": {"qkv": both([0])}}),
        ("count", {"count": "about"}),
        ("count", {"count": "bernoulli"}),
        ("count", {"count": "bernoulli", "granularity": "element", **TOP}),
        ("target_modules", {"target_modules": ["q_proj", 3]}),
        *(("lora_alpha", {"lora_alpha": value}) for value in ("16", float("nan"), 0)),
        *(("lora_dropout", {"lora_dropout": value}) for value in (-0.1, 1.0)),
        (r"alpha_pattern\['a'\]", {"alpha_pattern": {"a": 0}}),
        *(("modules_to_save", {"modules_to_save": value}) for value in ("head", ["head", 3], 3)),
        (r"rank_pattern\['qkv'\]", {"rank_pattern": {"qkv": 0}}),
        *(("r", {"r": value}) for value in (0, 2.0, True, None)),
        *(("init_lora_weights", {"init_lora_weights": value}) for value in ("eva", "olora", "pissa_niter_4", None, 1)),
        *((f"{axis}_exponent", {f"{axis}_exponent": value}) for axis in ("row", "column") for value in (1.5, -1, "1")),
        ("fan_in", {"fan_in": "some"}),
        ("fan_in", {"fan_in": "kept", "init_lora_weights": "gaussian"}),
        ("columns", {"columns": "none"}),
        ("rows", {"rows": "frozen"}),
        ("rows", {"rows": "one_hot", "columns": "frozen"}),
        *(("granularity", {"granularity": "groups", axis: "one_hot"}) for axis in ("rows", "columns")),
        *(("lora_bias", {"lora_bias": True, **form}) for form in ({"granularity": "element"}, {"rows": "one_hot"})),
        ("count", {"granularity": "units", "count": "bernoulli"}),
        *(("granularity", {"granularity": each, **TOP}) for each in ("groups", "units")),
        *(("mask_seed", {"mask_seed": value}) for value in (True, 0.5, -1)),
        *(("sparsity", {"sparsity": value}) for value in (1, True, float("nan"), {}, "0.5")),
        (r"sparsity\['qkv'\]", {"sparsity": {"qkv": -0.1}}),
        (r"sparsity\['qkv'\]", {"sparsity": {"qkv": {"rows": 0.5}}}),
        (r"sparsity\['qkv'\]\['columns'\]", {"sparsity": {"qkv": both(0.5, "x")}}),
    ],
)
def test_settings_are_refused_by_name(key, settings):
    with refusal(key):
        PartialLoraConfig(**{"target_modules": ["qkv"], **settings})


def test_what_is_left_out_suits_the_form_and_what_is_set_stays():
    form = functools.partial(PartialLoraConfig, target_modules=["qkv"])
    chosen = form(selection="top", indices={"qkv": {"rows": [0], "columns": [1]}})
    assert (form().sparsity, chosen.sparsity, form(sparsity=0).sparsity) == (0.87, 0, 0)
    for settings, fan_in, row_exponent in (
        *(({"granularity": each}, "kept", 1) for each in ("rows_columns", "units", "groups")),
        ({"granularity": "element"}, "dense", 0),
        ({"granularity": "element", "fan_in": "kept"}, "kept", 0),
        ({"row_exponent": 0}, "kept", 0),
        ({"init_lora_weights": "gaussian"}, "dense", 1),
    ):
        config = form(**settings)
        assert (config.fan_in, config.row_exponent, config.column_exponent) == (fan_in, row_exponent, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_dora", True), ("granularity", "rows"), ("mask_seed", "0"), ("sparsity", 2), ("scores", {})],
)
def test_settings_changed_later_are_refused_too(name, value):
    config = PartialLoraConfig(r=2, target_modules=["qkv"])
    setattr(config, name, value)
    for build in (lambda: get_peft_model(vit(), config), lambda: config.choose_masks({"qkv": QKV})):
        with pytest.raises(PartialLoraError, match=f"^{name}|with scores"):
            build()


def test_an_adapter_of_more_modules_names_the_one_that_is_not_there(tmp_path):
    get_peft_model(vit(), PartialLoraConfig(r=2, target_modules=["qkv"], sparsity=0.5)).save_pretrained(tmp_path)
    config = PartialLoraConfig.from_pretrained(tmp_path)
    first = min(config.expected)
    with pytest.raises(PartialLoraError, match=first):
        config.choose_masks({"another": QKV})


def test_settings_changed_later_are_used_in_any_form():
    config = PartialLoraConfig(r=2, target_modules=["qkv"])
    config.sparsity = {"qkv": 0.5}
    assert len(config.choose_masks({"qkv": QKV})["qkv"].rows.kept) == 6
    assert set(map(str, module_sparsity(get_peft_model(vit(), config)).values())) == {str(both(0.5))}


FC1 = "timm_model.blocks.0.mlp.fc1"
QKV = Geometry((12, 4), a=(2, 4), b=(12, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["attn.proj", "qvk"]}, "^target_modules .*'qvk'"),
        ({"modules_to_save": ["qkv", "fc1"]}, "^target_modules="),
        ({"modules_to_save": ["nope"]}, "^modules_to_save .*'nope'"),
        ({"target_modules": ".*qvk"}, r"^target_modules='\.\*qvk'"),
        ({"target_modules": ["qkv", "norm1"]}, r"timm_model\.blocks\.0\.norm1 .*LayerNorm"),
        ({"sparsity": {"qkv": 0.5, ".*": 0.1, "qvk": 0.2}}, "^sparsity .*'qvk'"),
        ({"sparsity": {"qkv": 0.5}}, f"^sparsity .*{FC1}"),
        ({"sparsity": {"(": 0.5}}, r"^sparsity .*'\('"),
        ({"selection": "top", "indices": {}}, "^indices .*qkv"),
        ({"selection": "top", "indices": {"fc1": both([0])}}, "^indices .*'fc1'"),
    ],
)
def test_targets_and_sparsities_that_do_not_fit_are_refused_before_anything_is_built(settings, message):
    model = vit()
    with pytest.raises(PartialLoraError, match=message):
        get_peft_model(model, PartialLoraConfig(**{"r": 2, "target_modules": ["qkv", "fc1"], **settings}))
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


class Odd(nn.Module):
    """One module of each kind that cannot be masked."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(4, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.dilated = nn.Conv2d(8, 8, 3, dilation=2)
        self.grouped = nn.Conv2d(9, 9, 3, groups=3)
        self.transposed = nn.ConvTranspose2d(8, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16)


@pytest.mark.parametrize("settings", [{"r": 8}, {"r": 1}, {"r": 8, "granularity": "element"}])
def test_modules_that_train_no_fewer_numbers_than_they_can_change_are_counted_in_a_warning(settings):
    config = PartialLoraConfig(target_modules=["q_proj", "v_proj"], sparsity=0.8, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(llama(), config)
    masks = {name: (len(each.rows.kept), len(each.columns.kept)) for name, each in module_masks(model).items()}
    saturated = [name for name, (rows, columns) in masks.items() if config.r * (rows + columns) >= rows * columns]
    lines = [str(line.message) for line in caught if "entries of W" in str(line.message)]
    if settings != {"r": 8}:
        assert not lines
    else:
        assert saturated
        assert [line.split(" train")[0] for line in lines] == [f"{len(saturated)} of {len(masks)} modules"]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("bag", "EmbeddingBag"),
        ("dilated", r"dilation=\(2, 2\)"),
        ("grouped", "3 groups"),
        ("transposed", "ConvTranspose2d"),
        ("norm", "LayerNorm"),
        ("attention", "MultiheadAttention"),
        ("out_proj", "MultiheadAttention"),
        ("linear1", "TransformerEncoderLayer"),
    ],
)
def test_modules_that_cannot_be_masked_are_refused_by_name(target, reason):
    model = Odd()
    with pytest.raises(PartialLoraError, match=f"target module .*{target} .*{reason}"):
        get_peft_model(model, PartialLoraConfig(r=2, target_modules=[target]))
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


def test_a_module_that_accelerate_offloads_is_refused_by_name():
    for places, is_refused in (((0, "cpu"), True), ((0, 1), False), (("cpu", "disk"), True), (("cpu", "cpu"), False)):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model.hf_device_map = dict(zip("01", places, strict=True))
        with pytest.raises(PartialLoraError, match="target module 1 ") if is_refused else contextlib.nullcontext():
            get_peft_model(model, PartialLoraConfig(r=2, target_modules=["0", "1"]))


def test_a_convolution_in_groups_has_the_highest_rank():
    """The units of its B lie group by group, so that none can be added at the end."""
    settings = {"r": 6, "target_modules": ["grouped", "plain"], "sparsity": 0.5}

    def adapted(**ranks):
        model = nn.Sequential()
        model.grouped, model.plain = nn.Conv2d(9, 9, 3, groups=3), nn.Linear(8, 8)
        return get_peft_model(model, PartialLoraConfig(**settings, rank_pattern=ranks))

    with pytest.raises(PartialLoraError, match=r"^rank_pattern.*grouped"):
        adapted(grouped=3)
    for ranks in ({"grouped": 9}, {"grouped": 3, "plain": 2}):
        assert adapted(**ranks)


def test_factors_that_do_not_fit_a_convolution_are_refused_for_a_second_adapter_too():
    plain = {"r": 2, "target_modules": ["conv"], "sparsity": 0.5}
    model = nn.Sequential()
    model.conv = nn.Conv2d(4, 4, 3)
    adapted = get_peft_model(model, PartialLoraConfig(**plain))
    with pytest.raises(PartialLoraError, match=r"target module conv is a Conv2d: columns='one_hot'"):
        adapted.add_adapter("second", PartialLoraConfig(**plain, columns="one_hot"))


def test_an_adapter_that_cannot_be_added_leaves_plain_lora_plain():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(PartialLoraError, match="embed_tokens"):
        model.add_adapter("masked", PartialLoraConfig(r=2, target_modules=["embed_tokens"], columns="one_hot"))
    assert (type(model.base_model), model.peft_type) == (LoraModel, "LORA")


def test_the_rank_on_disk_is_the_highest_that_a_module_has(tmp_path):
    ranks = {"q_proj": 2, "v_proj": 3, "up_proj": 64}
    model = get_peft_model(
        llama(), PartialLoraConfig(r=16, target_modules=["q_proj", "v_proj"], sparsity=0.5, rank_pattern=ranks)
    )
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3
    fill(model).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(logits(again, tokens()), logits(model, tokens()), atol=1e-5)


def test_numbers_of_numpy_are_saved(tmp_path):
    given = {"r": np.int64(4), "lora_alpha": np.float32(8), "rank_pattern": {"q_proj": np.int64(2)}}
    given["mask_seed"] = np.int64(3)
    targets = np.array(["q_proj", "v_proj"])
    model = get_peft_model(llama(), PartialLoraConfig(target_modules=targets, sparsity=0.5, **given))
    model.save_pretrained(tmp_path)
    again = PartialLoraConfig.from_pretrained(tmp_path)
    assert (again.r, again.target_modules, again.mask_seed) == (4, {"q_proj", "v_proj"}, 3)


def test_targets_that_plain_peft_takes_for_fused_experts_are_those_here_too(tmp_path):
    """Else plain PEFT would put the shared expert's values on other modules, or drop them."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8}
    few = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 2}
    more = {"num_experts_per_tok": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}

    def base():
        torch.manual_seed(0)
        return Glm4MoeForCausalLM(Glm4MoeConfig(**sizes, **few, **more, head_dim=8))

    with pytest.raises(PartialLoraError, match=r"^target_modules"):
        get_peft_model(base(), PartialLoraConfig(r=2, target_modules=["o_proj", "up_proj"], sparsity=0.5))
    for targets in (["q_proj", "o_proj"], ["o_proj", "gate_proj", "up_proj"], r".*(o_proj|down_proj)", "all-linear"):
        model = fill(get_peft_model(base(), PartialLoraConfig(r=2, target_modules=targets, sparsity=0.5)))
        dense = get_peft_model(base(), LoraConfig(r=2, target_modules=targets))
        assert list(layers(model)) == list(layers(dense))
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base(), tmp_path)
        assert torch.allclose(logits(again, tokens()), logits(model, tokens()), atol=1e-5)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_embeddings_are_refused_as_targets_that_must_stay_tied(target):
    base, settings = qwen2(), {"target_modules": ["q_proj", target], "sparsity": 0.5}
    with pytest.raises(PartialLoraError, match=r"^ensure_weight_tying"):
        get_peft_model(base, PartialLoraConfig(r=2, ensure_weight_tying=True, **settings))
    assert not layers(base)


def test_all_linear_leaves_out_a_head_that_an_adapter_before_trains_whole(tmp_path):
    settings = {"r": 2, "target_modules": "all-linear", "sparsity": 0.5, "task_type": "SEQ_CLS"}
    model = get_peft_model(deberta(), PartialLoraConfig(**settings))
    model.add_adapter("two", PartialLoraConfig(**settings))
    fill(model).set_adapter("two")
    model.save_pretrained(tmp_path)
    config = PartialLoraConfig.from_pretrained(tmp_path / "two")
    again = PeftModel.from_pretrained(deberta(), tmp_path / "two", config=config)
    assert torch.allclose(logits(again, sentences()), logits(model, sentences()), atol=1e-5)


def test_module_names_are_those_of_the_model_before_torch_compile():
    model = get_peft_model(torch.compile(two_blocks()), PartialLoraConfig(r=2, target_modules=["qkv"], sparsity=0.5))
    assert list(module_sparsity(model)) == [f"timm_model.blocks.{block}.attn.qkv" for block in range(2)]


def config_with(form, key="scores", **settings):
    """A config with scores (indices) for two rows and three columns, as lists, arrays or tensors."""
    values = {"rows": [1, 4], "columns": [0, 3, 5]}
    return PartialLoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["qkv"],
        selection="top",
        use_rslora=True,
        **{key: {"a.qkv": {axis: form(numbers) for axis, numbers in values.items()}}},
        **settings,
    )


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda config: pickle.loads(pickle.dumps(config)),
    "replace": dataclasses.replace,
    "to_dict": lambda config: PartialLoraConfig(**config.to_dict()),
    "from_peft_type": lambda config: PeftConfig.from_peft_type(**config.to_dict()),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copied_config_is_the_same(way):
    config = config_with(torch.tensor, sparsity={"qkv": 0.5})
    again = COPIES[way](config)
    assert type(again) is PartialLoraConfig
    assert again == config
    assert repr(again) == repr(config)
    assert again != config_with(torch.tensor, sparsity={"qkv": 0.6})
    assert {axis: values.tolist() for axis, values in again.scores["a.qkv"].items()} == {
        "rows": [1, 4],
        "columns": [0, 3, 5],
    }


@pytest.mark.parametrize("key", ["scores", "indices"])
def test_a_config_is_plain_types(key):
    config = config_with(torch.tensor, key)
    content = config.to_dict()
    assert content[key] == {"a.qkv": {"rows": [1, 4], "columns": [0, 3, 5]}}
    assert json.loads(json.dumps({**content, "target_modules": list(content["target_modules"])}))[key] == content[key]
    assert content["peft_type"] == "PARTIAL_LORA"
    assert "runtime_config" not in content
    assert config.as_lora().to_dict().keys() == LoraConfig().to_dict().keys()
    assert (config.as_lora().peft_type, config.as_lora().use_rslora) == ("LORA", True)


def test_what_is_given_is_not_shared():
    scores = {"a.qkv": {"rows": np.array([1.0, 2.0]), "columns": torch.tensor([1.0, 2.0])}}
    config = PartialLoraConfig(target_modules=["qkv"], selection="top", scores=scores)
    scores["a.qkv"]["rows"][0], scores["a.qkv"]["columns"][0] = 5, 5
    assert {axis: values.tolist() for axis, values in config.scores["a.qkv"].items()} == both([1.0, 2.0])


def test_the_method_has_a_name_that_peft_can_read_as_one_of_its_own():
    for name in (PEFT_TYPE, pickle.loads(pickle.dumps(PEFT_TYPE)), copy.deepcopy(PEFT_TYPE)):
        assert (name, name.value, f"{name}", json.dumps(name)) == (*["PARTIAL_LORA"] * 3, '"PARTIAL_LORA"')
    assert type(PEFT_TYPE.value) is str
    with pytest.raises(ValueError, match="PARTIAL_LORA"):
        get_peft_model(vit(), PartialLoraConfig(r=2, target_modules=["qkv"]), mixed=True)


def test_a_config_without_masks_is_not_saved(tmp_path):
    with pytest.raises(PartialLoraError, match="PartialLoraConfig"):
        PartialLoraConfig(target_modules=["qkv"]).save_pretrained(str(tmp_path))


def test_every_option_of_the_installed_peft_is_allowed_or_refused():
    names = {option.name for option in fields(LoraConfig)}
    assert names == options.PASSED | options.REFUSED.keys()
    assert not options.PASSED & options.REFUSED.keys()


@pytest.mark.parametrize("name", options.REFUSED)
def test_an_option_without_a_masked_form_is_refused_by_name(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT does not speak of it first
        with pytest.raises(PartialLoraError) as refusal:
            PartialLoraConfig(target_modules=["qkv"], **{name: "set"})
    assert str(refusal.value).startswith(f"{name}=")
    assert "\n" not in str(refusal.value)
    config = PartialLoraConfig(r=2, target_modules=["qkv"])
    setattr(config, name, "set")  # later is as bad
    model = vit()
    with pytest.raises(PartialLoraError, match=name):
        get_peft_model(model, config)
    assert not layers(model)


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
    common = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv", "fc1"], **settings}
    masked = PartialLoraConfig(sparsity=0.6, granularity=granularity, **AS_PEFT, **common)
    pair = []
    for config in (LoraConfig(**common), masked):
        model = base()
        torch.manual_seed(seed)
        pair.append(get_peft_model(model, config))
    return pair


@pytest.mark.parametrize("granularity", ["rows_columns", "element"])
@pytest.mark.parametrize("init", [True, False, "gaussian", "Gaussian"])
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


def test_a_base_that_is_split_over_processes_is_refused_and_left_alone():
    model = llama()
    model._tp_size = 2  # as after from_pretrained(..., tp_plan="auto")
    with pytest.raises(PartialLoraError, match="tp_plan"):
        get_peft_model(model, PartialLoraConfig(target_modules=["q_proj"], sparsity=0.5))
    assert not [name for name, _ in model.named_modules() if "lora" in name]


def test_a_whole_calibration_is_no_sparsity_and_is_not_printed():
    found = Calibration(
        baseline=1.0, joint=1.0, threshold=0.9, modules={f"module.{number}": {} for number in range(99)}
    )
    with pytest.raises(PartialLoraError, match="sparsity") as error:
        PartialLoraConfig(target_modules=["q_proj"], sparsity=found)
    assert len(str(error.value)) < 200


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
        "labels": [config.task_type, config.base_model_name_or_path, config.revision, config.auto_mapping],
        "runtime": config.runtime_config,
        "tied": getattr(config, "modules_to_tie", None),
    }


DECODER = {"target_modules": ["q_proj", "v_proj"]}

PASSED = [
    (vit, {"r": 3, "lora_alpha": 12, "alpha_pattern": {"blocks.0.attn.qkv": 3, "fc1": 24}, "lora_dropout": 0.25}),
    (vit, {"use_rslora": True, "modules_to_save": [HEAD]}),
    (vit, {"target_modules": "all-linear", "exclude_modules": ["blocks.0.attn.qkv"]}),
    (two_blocks, {"target_modules": r".*\.(attn\.proj|mlp\.fc2)", "exclude_modules": r".*\.1\.mlp.*"}),
    (vit, {"target_modules": ["patch_embed.proj", "attn.proj"]}),
    (two_blocks, {"layers_to_transform": 1}),
    (two_blocks, {"layers_to_transform": [0], "layers_pattern": "blocks"}),
    (vit, {"revision": "abc", "inference_mode": True, "base_model_name_or_path": "some/model"}),
    (vit, {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)}),
    (vit, {"auto_mapping": {"base_model_class": "A", "parent_library": "b"}}),
    (vit, {"task_type": "FEATURE_EXTRACTION"}),
    (llama, {**DECODER, "task_type": "CAUSAL_LM"}),
    (llama, {**DECODER, "trainable_token_indices": [1, 3]}),
    (llama, {**DECODER, "layer_replication": [[0, 1], [0, 1]]}),
    (qwen2, {**DECODER, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("base", "settings"), PASSED)
def test_an_option_does_what_it_does_in_plain_lora(tmp_path, base, settings):
    dense, partial = drawn(base, **settings)
    expected = facts(dense)
    assert facts(partial) == expected
    is_vit = base in (vit, two_blocks)
    usual = {} if is_vit else {"target_modules": settings["target_modules"]}
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
    batch = images() if is_vit else {"input_ids": torch.arange(14).view(2, 7)}
    expected = logits_of(partial, batch)
    assert torch.equal(logits_of(again, batch), expected)
    plain = PeftModel.from_pretrained(base(), str(tmp_path))
    torch.testing.assert_close(logits_of(plain, batch), expected, atol=1e-5, rtol=1e-5)


def logits_of(model, batch):
    return logits(model.get_base_model() if type(model).__name__ == "PeftModelForFeatureExtraction" else model, batch)


def test_tying_is_asked_for_where_there_is_nothing_to_tie():
    model = nn.Sequential(nn.Linear(8, 8))
    model.config = PretrainedConfig(tie_word_embeddings=True)
    model.get_input_embeddings = lambda: nn.Embedding(4, 8)
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        get_peft_model(model, PartialLoraConfig(target_modules=["0"], sparsity=0.5, r=2, ensure_weight_tying=True))
