"""The masked adapter computes and trains as the paper's formula says."""

from __future__ import annotations

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
    step,
    to,
    tokens,
    trainable_parameters,
    vit,
)
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from partial_lora.adapter import PartialLoraConfig, module_masks, module_sparsity
from partial_lora.adapter.factor import MaskedFactor
from partial_lora.errors import PartialLoraError
from partial_lora.masks import AS_PEFT, Mask


@pytest.mark.parametrize(("base", "batches"), [(vit, images), (llama, tokens)])
def test_sparsity_zero_is_plain_lora_to_the_last_bit(base, batches):
    partial, plain = adapt(base, sparsity=0.0, lora_dropout=0.2), adapt(base, lora_dropout=0.2)
    losses = []
    for model in (partial, plain):
        torch.manual_seed(3)  # of dropout
        optimizer = optimizer_of(model)
        losses.append([step(model, optimizer, batches(seed)) for seed in range(5)])
    assert losses[0] == losses[1]
    assert torch.equal(logits(partial, batches(9)), logits(plain, batches(9)))
    assert trainable_parameters(partial) == trainable_parameters(plain)


class Twin:
    """The method, literally: dense A and B, zero where masked, whose masked gradients are set to zero before each step.

    Weight decay needs no masking, since it shrinks zeros to zeros.
    """

    def __init__(self, partial, base, granularity):
        self.model = adapt(base)
        self.masked = []
        for name, masks in module_masks(partial).items():
            a, b = (getattr(layers(self.model)[name], factor)["default"].weight for factor in ("lora_A", "lora_B"))
            rows, columns = torch.from_numpy(masks.rows.dense()), torch.from_numpy(masks.columns.dense())
            if granularity != "rows_columns":
                self.masked += [(a, columns.view(a.shape)), (b, rows.view(b.shape))]
            else:
                self.masked += [
                    (a, columns.view(1, -1, *[1] * (a.dim() - 2))),
                    (b, rows.view(-1, *[1] * (b.dim() - 1))),
                ]
        for weight, mask in self.masked:
            weight.data *= mask

    def mask_gradients(self):
        for weight, mask in self.masked:
            weight.grad *= mask

    def masked_entries(self):
        return [weight.detach() * ~mask for weight, mask in self.masked]


# In double precision rounding cannot hide a wrong formula; in single precision the two must still agree to 1e-5.
# Linear layers, Conv1D, convolutions, and linear layers that run twice in a pass: the other models have no other kind.
@pytest.mark.parametrize("granularity", ["rows_columns", "element", "units"])
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("wrapped_vit", torch.float32, 1e-5),
        *((name, torch.float64, 1e-10) for name in ("wrapped_vit", "gpt2", "timm_convnext", "deberta")),
    ],
)
def test_training_equals_dense_lora_with_masked_values_and_gradients(name, granularity, dtype, tolerance):
    kind = KINDS[name]
    few, many, *_ = kind.targets
    sparsity = {
        few: {"rows": 0.9, "columns": 0.8},
        many: {"rows": 0.1, "columns": 0.3},
        ".*": {"rows": 0.3, "columns": 0.7},
    }
    partial = adapt(kind.build, sparsity=sparsity, granularity=granularity, **AS_PEFT)
    twin = Twin(partial, kind.build, granularity)
    twin.model.to(dtype), partial.to(dtype)
    optimizers = optimizer_of(partial, lr=0.005), optimizer_of(twin.model, lr=0.005)
    losses = []
    for seed in range(4):
        batches = [to(kind.batch(2 * seed + micro), dtype) for micro in range(2)]
        losses.append(step(partial, optimizers[0], *batches))
        assert losses[-1] == pytest.approx(
            step(twin.model, optimizers[1], *batches, prepare=twin.mask_gradients), abs=tolerance
        )
    assert losses[-1] != losses[0]
    batch = to(kind.batch(30), dtype)
    torch.testing.assert_close(logits(partial, batch), logits(twin.model, batch), atol=tolerance, rtol=tolerance)
    assert (logits(partial, batch) - logits(kind.build().to(dtype), batch)).abs().max() > 1000 * tolerance
    assert not any(entries.any() for entries in twin.masked_entries())
    for module, layer in layers(partial).items():
        delta = layers(twin.model)[module].get_delta_weight("default")
        torch.testing.assert_close(layer.get_delta_weight("default"), delta, atol=tolerance, rtol=tolerance)


def test_masks_do_not_depend_on_rank_global_seed_or_order_of_targets():
    masks = module_masks(adapt(sparsity=0.7))
    for other in (
        adapt(sparsity=0.7, r=2),
        adapt(sparsity=0.7, seed=5),
        adapt(sparsity=0.7, target_modules=VIT_TARGETS[::-1]),
    ):
        assert module_masks(other) == masks
    assert module_masks(adapt(sparsity=0.7, mask_seed=1)) != masks
    name = "timm_model.blocks.0.mlp.fc1"
    assert masks[name].rows == Mask.random(128, 0.7, mask_seed=0, module=name, axis="rows")
    assert masks[name].columns == Mask.random(32, 0.7, mask_seed=0, module=name, axis="columns")
    assert module_sparsity(adapt(sparsity=0.7))[name] == {"rows": 1 - 38 / 128, "columns": 1 - 10 / 32}


def test_the_dense_view_passes_gradients_to_the_kept_entries():
    layer = layers(adapt(sparsity=0.5))["timm_model.blocks.0.mlp.fc1"]
    layer.lora_A["default"].weight.sum().backward()
    assert torch.equal(layer.lora_A["default"].kept.grad, torch.ones(4, 16))


def test_a_second_adapter_of_the_same_name_is_refused_and_the_first_still_runs():
    """As where a notebook's cell is run twice."""
    base = vit()
    model = fill(get_peft_model(base, PartialLoraConfig(r=4, target_modules=["qkv"], sparsity=0.5))).eval()
    expected = logits(model, images(2))
    for again in (PartialLoraConfig(r=4, target_modules=["qkv", "fc1"], sparsity=0.5), model.peft_config["default"]):
        with pytest.raises(PartialLoraError, match="adapter 'default'"):
            get_peft_model(base, again)
    assert torch.equal(logits(model, images(2)), expected)
    assert module_sparsity(model)["timm_model.blocks.0.attn.qkv"]["rows"] == pytest.approx(0.5)


def test_indices_move_with_the_module():
    """Followed later, they would be a change to a compiled model."""
    model = adapt(sparsity=0.5).to("meta")
    factors = [module for module in model.modules() if isinstance(module, MaskedFactor)]
    assert factors
    assert {index.device.type for factor in factors for index in factor._indices.values()} == {"meta"}


def test_shapes_are_known_on_the_meta_device():
    model = adapt(llama, sparsity=0.5).to("meta")
    logits = model(torch.zeros(2, 6, dtype=torch.long, device="meta")).logits
    assert logits.shape == (2, 6, 50)
    logits.sum().backward()  # as whoever plans a step without its memory does
    assert all(each.grad.device.type == "meta" for each in model.parameters() if each.requires_grad)


def test_lost_masks_are_noticed():
    model = adapt(sparsity=0.5)
    name, layer = next(iter(layers(model).items()))
    with pytest.raises(PartialLoraError, match="'default' of Linear"):
        layer.update_layer("default", r=4, lora_alpha=4, config=model.peft_config["default"])
    with pytest.raises(PartialLoraError, match=f"^{name} "):
        module_masks(model)


# Dropout, on one layer of zeros: what comes out is the adapter alone.

TOKENS, WIDTH = 4000, 32


def layer_with_dropout(probability, sparsity, granularity, kind="linear"):
    """A layer whose output is 2 times the sum of what dropout leaves of the kept inputs, in every kept output."""
    base = {
        "linear": nn.Linear(WIDTH, 16),
        "conv1d": Conv1D(16, WIDTH),
        "convolution": nn.Conv2d(WIDTH, 16, 1),
        "hooked": nn.Linear(WIDTH, 16),
    }[kind]
    nn.init.zeros_(base.weight), nn.init.zeros_(base.bias)
    if kind == "hooked":
        base.register_forward_hook(lambda *_: None)  # somebody who looks on keeps base and adapter apart
    settings = {"r": 1, "lora_alpha": 2, "target_modules": ["0"], "granularity": granularity, **AS_PEFT}
    config = PartialLoraConfig(sparsity=sparsity, lora_dropout=probability, **settings)
    model = get_peft_model(nn.Sequential(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.ones_(parameter)
    return model


@pytest.mark.parametrize(
    ("kind", "granularity", "probability", "sparsity"),
    [
        ("linear", "rows_columns", 0.5, 0.75),  # gathers
        ("linear", "rows_columns", 0.1, 0.25),
        ("linear", "element", 0.5, 0.75),
        ("conv1d", "rows_columns", 0.1, 0.75),
        ("convolution", "rows_columns", 0.5, 0.25),
        ("convolution", "element", 0.5, 0.75),
        ("hooked", "rows_columns", 0.5, 0.75),
        ("hooked", "element", 0.1, 0.25),
    ],
)
def test_dropout_has_the_mean_and_the_spread_it_should(kind, granularity, probability, sparsity):
    model = layer_with_dropout(probability, sparsity, granularity, kind)
    shape = (TOKENS, WIDTH, 1, 1) if kind == "convolution" else (TOKENS, WIDTH)
    x = torch.ones(shape, requires_grad=True)
    kept = round(WIDTH * (1 - sparsity))
    rows = torch.from_numpy(module_masks(model)["0"].rows.dense())

    torch.manual_seed(0)
    result = model.train()(x)
    flat = result.detach().reshape(TOKENS, -1).double()
    assert not flat[:, ~rows].any()
    assert (flat[:, rows] == flat[:, rows][:, :1]).all()  # one draw for all outputs of a token
    survivors = flat[:, rows][:, 0] * (1 - probability) / 2
    torch.testing.assert_close(survivors, survivors.round(), atol=1e-4, rtol=0)
    spread = (kept * probability * (1 - probability)) ** 0.5
    assert abs(survivors.mean() - kept * (1 - probability)) < 4 * spread / TOKENS**0.5
    assert abs(survivors.std() / spread - 1) < 0.1
    assert abs(torch.corrcoef(torch.stack([survivors[:-1], survivors[1:]]))[0, 1]) < 4 / TOKENS**0.5

    # The backward pass drops the same inputs: the output is linear in x and in each factor, so that Euler's rule holds.
    result.sum().backward()
    total = pytest.approx(result.sum().item(), rel=1e-4)
    assert (x.grad * x).sum().item() == total
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert (parameter.grad * parameter).sum().item() == total

    again = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        again.append(model(x))
    assert torch.equal(again[0], result)
    assert not torch.equal(again[1], result)
    evaluated = model.eval()(x).reshape(TOKENS, -1)
    assert torch.equal(evaluated, (2 * kept * rows).float().expand(TOKENS, -1))
