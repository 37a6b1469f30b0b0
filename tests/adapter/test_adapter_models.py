"""Each class of models users adapt, with masks of rows and columns and with masks of single entries."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings

import peft
import pytest
import torch
from adapter_models import KINDS, adapt, dense_twin, fill, layers, logits, loss_of, optimizer_of, step
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from partial_lora.adapter import PartialLoraConfig, module_masks, trainable_parameters
from partial_lora.adapter.factor import MaskedFactor

pytestmark = [
    pytest.mark.parametrize("granularity", ["rows_columns", "element"]),
    pytest.mark.parametrize("name", KINDS),
]


@pytest.fixture
def kind(name):
    return KINDS[name]


@pytest.fixture
def model(kind, granularity):
    """The adapted model, B filled: some modules keep so little that they gather, others much."""
    sparsity = {kind.targets[0]: {"rows": 0.9, "columns": 0.8}, ".*": {"rows": 0.4, "columns": 0.6}}
    settings = {"sparsity": sparsity, "granularity": granularity, "task_type": kind.task}
    return fill(adapt(kind.build, **settings))


def masked_again(kind, folder, **settings):
    config = PartialLoraConfig.from_pretrained(str(folder))
    return PeftModel.from_pretrained(kind.build(), str(folder), config=config, is_trainable=True, **settings)


def assert_same(one, other, atol=1e-5):
    torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


def test_the_adapter_changes_what_the_model_says_and_can_be_disabled(kind, model):
    adapted, base = logits(model, kind.batch(0)), logits(kind.build(), kind.batch(0))
    assert (adapted - base).abs().max() > 0.05
    with model.disable_adapter():
        assert torch.equal(logits(model, kind.batch(0)), base)


def test_it_computes_what_dense_lora_of_the_same_values_computes(kind, model):
    twin = dense_twin(model, kind.build)
    assert_same(logits(model, kind.batch(0)), logits(twin, kind.batch(0)))
    for one, other in zip(layers(model).values(), layers(twin).values(), strict=True):
        assert torch.equal(one.get_delta_weight("default"), other.get_delta_weight("default"))


def test_trainable_parameters_are_reported_as_counted_by_hand(kind, model, granularity, capsys):
    dense = layers(dense_twin(model, kind.build))
    kept = 0
    for module, masks in module_masks(model).items():
        a, b = dense[module].lora_A["default"].weight, dense[module].lora_B["default"].weight
        rows, columns = len(masks.rows.kept), len(masks.columns.kept)
        if granularity == "element":
            kept += rows + columns
            assert (rows < b.numel(), columns < a.numel()) == (True, True)
        else:
            kept += rows * b[0].numel() + columns * a[:, 0].numel()
    base = kind.build()
    head = sum(count(base.get_submodule(name)) for name in kind.head or {"SEQ_CLS": ["classifier"]}.get(kind.task, []))
    assert trainable_parameters(model) == kept
    assert model.get_nb_trainable_parameters() == (kept + head, count(base) + kept + head)
    model.print_trainable_parameters()
    assert re.match(rf"trainable params: {kept + head:,} \|\| all params: ", capsys.readouterr().out)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_target_gets_a_gradient_where_it_is_kept(kind, model):
    model.train()
    loss_of(model, kind.batch(0)).backward()
    twin = dense_twin(model, kind.build).train()
    loss_of(twin, kind.batch(0)).backward()
    for module, layer in layers(model).items():
        for factors, dense in (
            (layer.lora_A, layers(twin)[module].lora_A),
            (layer.lora_B, layers(twin)[module].lora_B),
        ):
            gradient = factors["default"].kept.grad
            assert gradient.any(), module
            assert_same(gradient, factors["default"].keep(dense["default"].weight.grad))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_plain_peft_loads_it_without_a_warning(tmp_path, kind, model, low_cpu_mem_usage):
    model.save_pretrained(tmp_path)
    base = kind.build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # transformers' own, on every load
        plain = PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    assert type(plain.base_model) is peft.LoraModel
    assert not any(isinstance(module, MaskedFactor) for module in plain.modules())
    assert_same(logits(plain, kind.batch(0)), logits(model, kind.batch(0)))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_masked_again_it_trains_on(tmp_path, kind, model, low_cpu_mem_usage):
    model.save_pretrained(tmp_path)
    again = masked_again(kind, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert module_masks(again) == module_masks(model)
    assert torch.equal(logits(again, kind.batch(0)), logits(model, kind.batch(0)))
    losses = [step(each, optimizer_of(each), kind.batch(1)) for each in (model, again)]
    assert losses[0] == losses[1]
    assert torch.equal(logits(again, kind.batch(0)), logits(model, kind.batch(0)))


def test_merged_it_is_the_plain_model_again(kind, model):
    expected = logits(model, kind.batch(0))
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(kind.build())
    assert merged.state_dict().keys() == kind.build().state_dict().keys()
    assert not any(isinstance(module, (LoraLayer, MaskedFactor)) for module in merged.modules())
    assert_same(logits(merged, kind.batch(0)), expected, atol=1e-4)


def test_a_copy_is_the_same_and_independent(kind, model):
    expected = logits(model, kind.batch(0))
    twin = copy.deepcopy(model)
    assert module_masks(twin) == module_masks(model)
    assert torch.equal(logits(twin, kind.batch(0)), expected)
    fill(twin, seed=8)
    assert not torch.equal(logits(twin, kind.batch(0)), expected)
    assert torch.equal(logits(model, kind.batch(0)), expected)


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_the_whole_model_can_be_pickled(kind, model, way):
    if way == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert module_masks(again) == module_masks(model)
    assert torch.equal(logits(again, kind.batch(0)), logits(model, kind.batch(0)))
    losses = [step(each, optimizer_of(each), kind.batch(1)) for each in (model, again)]
    assert losses[0] == losses[1]
