"""Each class of models users adapt, with masks of rows and columns and with masks of single entries."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import peft
import pytest
import torch
from adapter_models import KINDS, adapt, dense_twin, fill, layers, logits, optimizer_of, step, trainable_parameters
from peft import PeftModel

from partial_lora.adapter import PartialLoraConfig, module_masks
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
    assert_trains_on(kind, model, PeftModel.from_pretrained(kind.build(), str(tmp_path), **settings), atol=1e-5)


def assert_trains_on(kind, model, again, atol=0):
    """The same masks and outputs, before and after a step: to the last bit, or as near as given."""
    close = {"atol": atol, "rtol": atol}
    assert module_masks(again) == module_masks(model)
    assert {p.device.type for p in again.parameters()} == {"cpu"}
    torch.testing.assert_close(logits(again, kind.batch(0)), logits(model, kind.batch(0)), **close)
    losses = [step(each, optimizer_of(each), kind.batch(1)) for each in (model, again)]
    assert losses[0] == pytest.approx(losses[1], abs=atol, rel=0)
    torch.testing.assert_close(logits(again, kind.batch(0)), logits(model, kind.batch(0)), **close)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize(("name", "granularity"), [("wrapped_vit", "rows_columns"), ("timm_convnext", "element")])
def test_a_copy_is_the_same_and_independent(name, granularity, copied):
    kind, model = KINDS[name], adapted(name, granularity)
    expected, again = logits(model, kind.batch(0)), copied(model)
    fill(again, seed=8)
    assert torch.equal(logits(model, kind.batch(0)), expected)
    assert not torch.equal(logits(again, kind.batch(0)), expected)
    assert_trains_on(kind, model, copied(model))
