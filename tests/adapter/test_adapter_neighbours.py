"""What other code does around an adapted layer works as it does around plain LoRA's."""

from __future__ import annotations

import pytest
import torch
from adapter_models import dense_twin, fill, layers
from peft import PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.autograd import forward_ad

from partial_lora import PartialLoraConfig
from partial_lora.adapter import module_masks
from partial_lora.adapter.factor import MaskedFactor
from partial_lora.adapter.layer import PartialLinear
from partial_lora.errors import PartialLoraError
from partial_lora.masks import AS_PEFT

GRANULARITIES = ["rows_columns", "element"]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # processors add up in orders of their own


class Perceptron(nn.Module):
    """Two linear layers; what happens between them is given."""

    def __init__(self, between=nn.ReLU, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.between, self.fc2 = nn.Linear(12, width), between(), nn.Linear(width, 3)

    def forward(self, x):
        return self.fc2(self.between(self.fc1(x)))


def adapted(base, granularity="rows_columns", targets=("fc1", "fc2"), **settings):
    config = {"r": 4, "target_modules": list(targets), "sparsity": 0.6, "granularity": granularity, **AS_PEFT}
    torch.manual_seed(1)
    return fill(get_peft_model(base(), PartialLoraConfig(**config | settings)))


def assert_same_gradients(model, twin, *inputs):
    outputs = []
    for each in (model, twin):
        each.zero_grad()
        output = each(*inputs)
        output.square().sum().backward()
        outputs.append(output.detach())
    torch.testing.assert_close(*outputs, **TOLERANCE)
    have_same_gradients(model, twin)


def have_same_gradients(model, twin, tolerance=TOLERANCE):
    for name, layer in layers(model).items():
        for factors in ("lora_A", "lora_B"):
            own = getattr(layer, factors)["default"]
            dense = getattr(layers(twin)[name], factors)["default"].weight
            torch.testing.assert_close(own.kept.grad, own.keep(dense.grad), **tolerance)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(5, 12), (2, 5, 12)])
def test_an_output_may_be_written_into(granularity, shape):
    def base():
        return Perceptron(lambda: nn.ReLU(inplace=True))

    model = adapted(base, granularity)
    assert_same_gradients(model, dense_twin(model, base), torch.randn(shape))


def test_configs_are_the_callers_to_use_again(tmp_path):
    config = PartialLoraConfig(r=4, target_modules=["fc1"], sparsity=0.6, mask_seed=0)
    first, second = (fill(get_peft_model(base, config)) for base in (Perceptron(), Perceptron(width=20)))
    assert all(model.peft_config["default"] is config for model in (first, second))
    assert module_masks(first) != module_masks(second)
    config.mask_seed = 1
    with pytest.raises(PartialLoraError, match="PartialLoraConfig"):
        first.save_pretrained(tmp_path)
    config.mask_seed = 0
    first.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Perceptron(), tmp_path, config=PartialLoraConfig.from_pretrained(tmp_path))
    assert module_masks(again) == module_masks(first)
    x = torch.randn(3, 12)
    assert torch.equal(again(x), first(x))


def test_dropout_follows_its_own_module():
    # Monte Carlo dropout: the model evaluates, its dropouts go on.
    model = adapted(Perceptron, lora_dropout=0.5).eval()
    x = torch.randn(4, 12)
    assert torch.equal(model(x), model(x))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_dropout"])
def test_hooks_on_the_parts_of_an_adapter_are_called(part):
    model = adapted(Perceptron, lora_dropout=0.2)
    x, seen = torch.randn(4, 12), []
    model.eval()
    expected = model(x)
    hook = getattr(layers(model)["fc1"], part)["default"].register_forward_hook(lambda *given: seen.append(given[2]))
    torch.testing.assert_close(model(x), expected, **TOLERANCE)
    assert len(seen) == 1
    hook.remove()
    assert torch.equal(model(x), expected)


def test_hooks_on_all_modules_see_the_base_layers():
    model, x = adapted(Perceptron, lora_dropout=0.2).eval(), torch.randn(4, 12)
    expected, seen = model(x), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        torch.testing.assert_close(model(x), expected, **TOLERANCE)
    finally:
        hook.remove()
    assert {layer.get_base_layer() for layer in layers(model).values()} <= set(seen)


def test_a_model_that_was_evaluated_in_inference_mode_on_a_new_device_trains(monkeypatch):
    monkeypatch.setattr(PartialLinear, "fuses", False)  # convolutions and quantised layers run this way
    model, x = adapted(Perceptron), torch.randn(4, 12)
    for module in model.modules():
        if isinstance(module, MaskedFactor):
            module._move_indices(torch.device("meta"))  # as where the factor was made, before the model was moved
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_backward_under_autocast_of_a_forward_outside_it():
    model = adapted(Perceptron)
    twin = dense_twin(model, Perceptron)
    x = torch.randn(6, 12)
    for each in (model, twin):
        loss = each(x).sum()
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
    have_same_gradients(model, twin, {"rtol": 0.05, "atol": 0.05})


def test_nested_tensors_of_jagged_rows():
    model = adapted(Perceptron)
    twin = dense_twin(model, Perceptron)
    x = torch.nested.nested_tensor([torch.randn(2, 12), torch.randn(5, 12)], layout=torch.jagged)
    torch.testing.assert_close(model(x).values(), twin(x).values(), **TOLERANCE)


def test_second_derivatives_by_pefts_own_way(monkeypatch):
    def penalty(model, x):
        model.zero_grad()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()

    def of_a_sum(model, x):  # from which autograd.grad could leave a layer out
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        torch.autograd.grad(gradient.square().sum() + x.sum(), x)

    model = adapted(lambda: Perceptron(nn.Tanh))
    twin = dense_twin(model, lambda: Perceptron(nn.Tanh))
    x = torch.randn(4, 12, requires_grad=True)
    for derive in (penalty, of_a_sum):
        with pytest.raises(RuntimeError, match="fuses"):
            derive(model, x)
    monkeypatch.setattr(PartialLinear, "fuses", False)
    for each in (model, twin):
        penalty(each, x)
    have_same_gradients(model, twin, {"rtol": 1e-4, "atol": 1e-4})


def test_forward_mode_derivatives():
    model = adapted(Perceptron)
    twin = dense_twin(model, Perceptron)
    x, tangent = torch.randn(4, 12), torch.randn(4, 12)
    found = []
    for each in (model, twin):
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(each(forward_ad.make_dual(x, tangent))).tangent)
    torch.testing.assert_close(*found, **TOLERANCE)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_optimizers_take_kept_entries_for_weights(granularity):
    model = adapted(Perceptron, granularity)
    groups = param_groups_weight_decay(model, weight_decay=0.1)
    assert not any(group["params"] for group in groups if group["weight_decay"] == 0)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for layer in layers(model).values():
        assert rates[id(layer.lora_A["default"].kept)] == pytest.approx(1e-4)
        assert rates[id(layer.lora_B["default"].kept)] == pytest.approx(16e-4)
