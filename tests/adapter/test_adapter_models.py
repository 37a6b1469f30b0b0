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

granularities = pytest.mark.parametrize("granularity", ["rows_columns", "element"])


def adapted(name, granularity):
    """The adapted model, B filled: some modules keep so little that they gather, others much."""
    kind = KINDS[name]
    sparsity = {kind.targets[0]: {"rows": 0.9, "columns": 0.8}, ".*": {"rows": 0.4, "columns": 0.6}}
    return fill(adapt(kind.build, sparsity=sparsity, granularity=granularity, task_type=kind.task))


def assert_close(one, other, atol=1e-5):
    torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


@granularities
@pytest.mark.parametrize("name", KINDS)
def test_outputs_and_gradients_are_those_of_dense_lora_of_the_same_values(name, granularity):
    kind, model = KINDS[name], adapted(name, granularity)
    twin = dense_twin(model, kind.build)
    result, base = logits(model, kind.batch(0)), logits(kind.build(), kind.batch(0))
    assert (result - base).abs().max() > 0.05
    assert_close(result, logits(twin, kind.batch(0)))
    with model.disable_adapter():
        assert torch.equal(logits(model, kind.batch(0)), base)
    for each in (model, twin):
        loss_of(each.train(), kind.batch(0)).backward()
    for one, other in zip(layers(model).values(), layers(twin).values(), strict=True):
        assert torch.equal(one.get_delta_weight("default"), other.get_delta_weight("default"))
        for factor in ("lora_A", "lora_B"):
            own, dense = getattr(one, factor)["default"], getattr(other, factor)["default"]
            assert own.kept.grad.any()
            assert_close(own.kept.grad, own.keep(dense.weight.grad))


@granularities
@pytest.mark.parametrize("name", KINDS)
def test_trainable_parameters_are_reported_as_counted_by_hand(name, granularity, capsys):
    kind, model = KINDS[name], adapted(name, granularity)
    dense = layers(dense_twin(model, kind.build))
    kept = 0
    for module, masks in module_masks(model).items():
        a, b = dense[module].lora_A["default"].weight, dense[module].lora_B["default"].weight
        rows, columns = len(masks.rows.kept), len(masks.columns.kept)
        kept += rows + columns if granularity == "element" else rows * b[0].numel() + columns * a[:, 0].numel()
    base = kind.build()
    head = sum(count(base.get_submodule(name)) for name in kind.head or {"SEQ_CLS": ["classifier"]}.get(kind.task, []))
    assert (
        trainable_parameters(model) == kept < sum(count(layer.lora_A) + count(layer.lora_B) for layer in dense.values())
    )
    assert model.get_nb_trainable_parameters() == (kept + head, count(base) + kept + head)
    model.print_trainable_parameters()
    assert re.match(rf"trainable params: {kept + head:,} \|\| all params: ", capsys.readouterr().out)
    assert set(model.get_model_status().peft_types.values()) == {"PARTIAL_LORA"}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("granularity", "low_cpu_mem_usage"), [("rows_columns", False), ("element", True)])
@pytest.mark.parametrize("name", KINDS)
def test_saved_it_is_plain_lora_without_a_warning_and_masked_again_it_trains_on(
    tmp_path, name, granularity, low_cpu_mem_usage
):
    kind, model = KINDS[name], adapted(name, granularity)
    model.save_pretrained(tmp_path)
    base = kind.build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # transformers' own, on every load
        plain = PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    assert type(plain.base_model) is peft.LoraModel
    assert not any(isinstance(module, MaskedFactor) for module in plain.modules())
    assert_close(logits(plain, kind.batch(0)), logits(model, kind.batch(0)))

    config = PartialLoraConfig.from_pretrained(str(tmp_path))
    settings = {"config": config, "is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
    assert_trains_on(kind, model, PeftModel.from_pretrained(kind.build(), str(tmp_path), **settings))


def assert_trains_on(kind, model, again):
    """The same masks and outputs, to the last bit, before and after a step."""
    assert module_masks(again) == module_masks(model)
    assert {p.device.type for p in again.parameters()} == {"cpu"}
    assert torch.equal(logits(again, kind.batch(0)), logits(model, kind.batch(0)))
    losses = [step(each, optimizer_of(each), kind.batch(1)) for each in (model, again)]
    assert losses[0] == losses[1]
    assert torch.equal(logits(again, kind.batch(0)), logits(model, kind.batch(0)))


@pytest.mark.parametrize(
    ("name", "granularity", "safe"),
    [
        ("wrapped_vit", "rows_columns", True),
        ("wrapped_vit", "element", False),
        ("gpt2", "rows_columns", False),
        ("timm_convnext", "element", True),
        ("convnext", "rows_columns", False),
    ],
)
def test_merged_it_is_the_plain_model_again(name, granularity, safe):
    kind, model = KINDS[name], adapted(name, granularity)
    before = {module: layer.get_base_layer().weight.clone() for module, layer in layers(model).items()}
    expected = logits(model, kind.batch(0))
    model.merge_adapter(safe_merge=safe)
    for module, layer in layers(model).items():
        changed = layer.get_base_layer().weight != before[module]
        if name == "wrapped_vit" and granularity == "rows_columns":
            assert changed.any(1).equal(torch.from_numpy(module_masks(model)[module].rows.dense()))
        assert changed.any()
    assert_close(logits(model, kind.batch(0)), expected, atol=1e-4)
    model.unmerge_adapter()
    for module, layer in layers(model).items():
        assert_close(layer.get_base_layer().weight, before[module])
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged) is type(kind.build())
    assert merged.state_dict().keys() == kind.build().state_dict().keys()
    assert not any(isinstance(module, (LoraLayer, MaskedFactor)) for module in merged.modules())
    assert_close(logits(merged, kind.batch(0)), expected, atol=1e-4)


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_file])
@pytest.mark.parametrize(("name", "granularity"), [("wrapped_vit", "rows_columns"), ("timm_convnext", "element")])
def test_a_copy_is_the_same_and_independent(name, granularity, copied):
    kind, model = KINDS[name], adapted(name, granularity)
    expected, again = logits(model, kind.batch(0)), copied(model)
    fill(again, seed=8)
    assert torch.equal(logits(model, kind.batch(0)), expected)
    assert not torch.equal(logits(again, kind.batch(0)), expected)
    assert_trains_on(kind, model, copied(model))
