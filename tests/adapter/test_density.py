"""Draws and scales that know the density of a module, rows and columns of each unit, and an A that no file holds."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from adapter_models import (
    KINDS,
    MIXED,
    adapt,
    dense_twin,
    fill,
    images,
    layers,
    logits,
    optimizer_of,
    step,
    timm_convnext,
    trainable_parameters,
    vit,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from partial_lora.adapter import PartialLoraConfig, load_compact, module_masks, write_compact
from partial_lora.adapter.layer import PartialLinear
from partial_lora.errors import PartialLoraError
from partial_lora.masks import AS_PEFT, random_keys

FORMS = {
    "scaled": {"row_exponent": 0.5, "column_exponent": 1.0},
    "kept entries, scaled": {"granularity": "element", "fan_in": "kept", "column_exponent": 0.5},
    "units": {"granularity": "units"},
    "groups": {"granularity": "groups"},
    "frozen": {"columns": "frozen", "row_exponent": 0.5},
    "frozen, entries": {"columns": "frozen", "granularity": "element"},
    "one-hot": {"columns": "one_hot"},
    "one-hot rows": {"rows": "one_hot"},
    "one-hot, ranks": {"columns": "one_hot", "rank_pattern": {"fc1": 1, "attn.proj": 3}},
    "ranks": {"rank_pattern": {"fc1": 7, "attn.proj": 3}, "alpha_pattern": {"fc1": 5}, "row_exponent": 0.5},
    "ranks of entries": {"rank_pattern": {"fc1": 1, "blocks.0.mlp.fc2": 3}, "granularity": "units", "use_rslora": True},
}
OF_CONVOLUTIONS = ("kept entries, scaled", "units", "frozen")  # gather otherwise
CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # of logits up to 10, computed in another order
BATCH = {vit: KINDS["wrapped_vit"].batch, timm_convnext: KINDS["timm_convnext"].batch}


def factors(model, which):
    return {name: getattr(layer, f"lora_{which}")["default"] for name, layer in layers(model).items()}


@pytest.mark.parametrize("granularity", ["rows_columns", "element", "units"])
def test_a_drawn_for_the_kept_inputs_has_features_of_the_size_of_plain_lora_s(granularity):
    dense, kept = (adapt(sparsity=0.75, granularity=granularity, fan_in=fan_in) for fan_in in ("dense", "kept"))
    for name, factor in factors(kept, "A").items():
        torch.testing.assert_close(factor.kept, factors(dense, "A")[name].kept * factor.mask.density**-0.5)
    torch.manual_seed(0)
    x = torch.randn(4000, 1024)

    def size_of_features(**settings):
        model = nn.Sequential(nn.Linear(1024, 8, bias=False))
        config = PartialLoraConfig(r=8, target_modules=["0"], granularity=granularity, **settings)
        factor = PeftModel(model, config).base_model.model[0].lora_A["default"]
        return (x @ factor.weight.detach().T).std().item()

    plain = size_of_features(sparsity=0.0)
    assert size_of_features(sparsity=0.9, fan_in="dense") == pytest.approx(plain * math.sqrt(0.1), rel=0.15)
    assert size_of_features(sparsity=0.9, fan_in="kept") == pytest.approx(plain, rel=0.15)


@pytest.mark.parametrize("trained", [{}, {"columns": "frozen"}, {"columns": "one_hot"}])
def test_b_is_multiplied_by_what_the_densities_that_are_there_ask_for(trained):
    exponents = {"row_exponent": 0.5, "column_exponent": 0.25}
    scaled, plain = (
        adapt(sparsity=MIXED, alpha_pattern={"fc1": 3}, **trained, **each) for each in (exponents, AS_PEFT)
    )
    for name, masks in module_masks(scaled).items():
        expected = masks.rows.density**-0.5 * (1 if trained else masks.columns.density**-0.25)
        draw = 1 if trained else masks.columns.density**-0.5  # fan_in, which AS_PEFT leaves alone
        torch.testing.assert_close(factors(scaled, "A")[name].kept, factors(plain, "A")[name].kept * draw)
        assert factors(scaled, "B")[name].multiple == pytest.approx(expected)
        assert layers(scaled)[name].scaling["default"] == (3 if name.endswith("fc1") else 6) / 4


@pytest.mark.parametrize("fused", [True, False])
def test_it_trains_as_lora_of_that_scaling_with_masked_gradients(fused, monkeypatch):
    """Literally: PEFT's own layers, A times the square root of its kept columns' share, alpha over the rows' share."""
    monkeypatch.setattr(PartialLinear, "fuses", fused)
    model, twin = adapt(sparsity=MIXED), adapt()
    for name, masks in module_masks(model).items():
        layer = layers(twin)[name]
        layer.scaling["default"] = 6 / 4 / masks.rows.density
        for factor, mask in ((layer.lora_A, masks.columns), (layer.lora_B, masks.rows)):
            weight = factor["default"].weight
            exists = torch.from_numpy(mask.dense()).view([-1, 1] if weight.shape[0] == mask.size else [1, -1])
            weight.data *= exists * (masks.columns.density**-0.5 if factor is layer.lora_A else 1)
            weight.register_hook(lambda gradient, exists=exists: gradient * exists)
    losses = []
    for each in (model, twin):
        optimizer = optimizer_of(each, lr=0.003)
        losses.append([step(each, optimizer, images(seed)) for seed in range(10)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for which in "AB":
        for name, factor in factors(model, which).items():
            torch.testing.assert_close(factor.fill(factor.kept), factors(twin, which)[name].weight, **CLOSE)


@pytest.mark.parametrize("sparsity", [0.75, {"qkv": 0.75, "fc1": 0.5}])
def test_every_adapter_is_saved_with_one_alpha(sparsity, tmp_path):
    """Servers read lora_alpha and pass over alpha_pattern, which hot swaps take for another module's."""
    model = fill(
        adapt(target_modules=["qkv", "fc1"], sparsity=sparsity, alpha_pattern={"fc1": 5}, rank_pattern={"qkv": 2})
    )
    model.save_pretrained(tmp_path)
    saved = LoraConfig.from_pretrained(tmp_path)
    assert (saved.r, saved.lora_alpha, saved.alpha_pattern, saved.rank_pattern) == (4, 6, {}, {})
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(vit(), tmp_path), BATCH[vit](3)), logits(model, BATCH[vit](3)), **CLOSE
    )
    again = PartialLoraConfig.from_pretrained(tmp_path)
    assert (again.alpha_pattern, again.rank_pattern) == ({"fc1": 5}, {"qkv": 2})


@pytest.mark.parametrize(
    ("form", "base"), [(form, vit) for form in FORMS] + [(form, timm_convnext) for form in OF_CONVOLUTIONS]
)
def test_every_form_is_saved_loaded_merged_and_resumed(form, base, tmp_path):
    sparsity = {KINDS["wrapped_vit" if base is vit else "timm_convnext"].targets[0]: 0.95, ".*": 0.6}
    model, batch = fill(adapt(base, sparsity=sparsity, **FORMS[form])), BATCH[base](3)
    expected = logits(model, batch)
    assert (expected - logits(base(), batch)).abs().max() > 1e-3
    if "rank_pattern" not in FORMS[form]:
        torch.testing.assert_close(logits(dense_twin(model, base), batch), expected, **CLOSE)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), tmp_path), batch), expected, **CLOSE)
    again = PeftModel.from_pretrained(
        base(), tmp_path, config=PartialLoraConfig.from_pretrained(tmp_path), is_trainable=True
    )
    torch.testing.assert_close(logits(again, batch), expected, **CLOSE)
    assert trainable_parameters(again) == trainable_parameters(model)
    write_compact(model, tmp_path)
    again = load_compact(base(), tmp_path, is_trainable=True)
    assert torch.equal(logits(again, batch), expected)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), expected, **CLOSE)
    losses = []
    for each in (model, again):
        optimizer = optimizer_of(each)
        losses.append([step(each, optimizer, BATCH[base](seed)) for seed in range(3)])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][-1]


def test_units_have_rows_and_columns_of_their_own_that_are_disjoint_while_they_last():
    for sparsity, count in ((0.8, 6), (0.6, 13)):
        masks = module_masks(adapt(sparsity=sparsity, granularity="units"))["timm_model.blocks.0.attn.proj"]
        a = masks.columns.dense().reshape(4, 32)
        b = masks.rows.dense().reshape(32, 4)
        name = "timm_model.blocks.0.attn.proj"
        for axis, units in (("rows", b.T), ("columns", a)):
            order = np.argsort(random_keys(32, mask_seed=0, module=name, axis=axis), kind="stable")
            endless = [*order, *order]  # literally: dealt out one after the other
            dealt = [endless[unit * count : (unit + 1) * count] for unit in range(4)]
            assert [set(np.flatnonzero(unit)) for unit in units] == [set(hand) for hand in dealt]
            assert units.any(axis=0).sum() == min(32, 4 * count)


def test_a_frozen_a_is_the_seed_s_as_peft_would_draw_it_and_never_trains():
    model = adapt(sparsity=0.5, columns="frozen", seed=1)
    drawn = {name: factor.weight.clone() for name, factor in factors(model, "A").items()}
    again = factors(adapt(columns="frozen", sparsity=0.5, seed=7), "A")
    assert all(torch.equal(drawn[name], a.weight) for name, a in again.items())
    other = factors(adapt(sparsity=0.5, columns="frozen", mask_seed=1), "A")
    plain = factors(adapt(), "A")
    for name, a in drawn.items():
        assert not torch.equal(a, other[name].weight)
        assert a.abs().max() <= 1 / math.sqrt(a.shape[1])
        assert a.std() == pytest.approx(plain[name].weight.std().item(), rel=0.3)
    assert not any("lora_A" in name for name, _ in model.named_parameters())
    model.set_adapter("default")
    optimizer = optimizer_of(model)
    step(model, optimizer, images())
    moved = model.to(torch.bfloat16).to(torch.float32).to("meta").to_empty(device="cpu")
    for name, factor in factors(moved, "A").items():
        assert torch.equal(factor.weight, drawn[name])
    assert trainable_parameters(model) == sum(b.kept.numel() for b in factors(model, "B").values())


FAMILY = {  # each published method, and the literal factors that its adapter has to have
    "LoRA-FA": {"columns": "frozen", "sparsity": 0.0},
    "PaCA": {"columns": "one_hot", "sparsity": 0.0},
    "RoCoFT's rows": {"rows": "one_hot", "sparsity": 0.0},
    "LoRI": {"columns": "frozen", "granularity": "element", "sparsity": 0.7},
    "rows of PaCA": {"columns": "one_hot", "sparsity": 0.5},
    "columns of RoCoFT": {"rows": "one_hot", "sparsity": 0.5},
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("method", FAMILY)
def test_a_factor_trains_as_in_lora_whose_other_factor_is_frozen(method, fused, monkeypatch):
    monkeypatch.setattr(PartialLinear, "fuses", fused)
    settings = FAMILY[method]
    model = adapt(target_modules=["qkv", "fc1", "fc2"], **settings)
    of_frozen, of_trained = ("B", "A") if "rows" in settings else ("A", "B")
    for factor in factors(model, of_trained).values():
        factor.full = False  # the fused operation, which leaves what is dense to PEFT
        assert not factor.weight.any()
    for factor in factors(model, of_frozen).values():
        dense = factor.weight if of_frozen == "A" else factor.weight.T
        if "one_hot" in settings.values():  # literally: one number in each row, and no two in one column
            assert sorted(dense.sum(1).tolist()) == sorted(dense.amax(1).tolist()) == [1] * len(dense)
            assert dense.sum(0).max() == 1
        else:
            assert dense.all()
    twin = dense_twin(model, vit)
    for factor in factors(twin, of_frozen).values():
        factor.weight.requires_grad_(False)
    for name, factor in factors(twin, of_trained).items():
        mine = factors(model, of_trained)[name]
        exists = mine.fill(torch.ones_like(mine.kept)).detach()
        factor.weight.register_hook(lambda gradient, exists=exists: gradient * exists)
    losses = []
    for each in (model, twin):
        optimizer = optimizer_of(each)
        losses.append([step(each, optimizer, images(seed)) for seed in range(4)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] != losses[0][0]
    for which in "AB":
        for name, factor in factors(model, which).items():
            torch.testing.assert_close(factor.fill(factor.kept), factors(twin, which)[name].weight, **CLOSE)


def test_unit_vectors_are_of_rows_and_columns_that_there_are_and_their_order_is_the_seed_s():
    drawn = [module_masks(adapt(columns="one_hot", sparsity=0.0, mask_seed=seed)) for seed in (0, 0, 1)]
    name = next(iter(drawn[0]))
    assert drawn[0] == drawn[1]
    assert drawn[0][name].columns != drawn[2][name].columns
    assert len(drawn[0][name].columns.kept) == 4
    with pytest.raises(PartialLoraError, match=r"^columns.*qkv"):
        adapt(columns="one_hot", sparsity=0.0, r=33, target_modules=["qkv"])
    for settings in ({"columns": "one_hot"}, {"rows": "one_hot"}):
        with pytest.raises(PartialLoraError, match=f"{next(iter(settings))}='one_hot'"):
            adapt(timm_convnext, sparsity=0.0, **settings)


@pytest.mark.parametrize(
    ("settings", "width"),
    [({}, None), ({"columns": "frozen"}, 4), ({"columns": "one_hot"}, 4), ({"granularity": "groups"}, 16)],
)
def test_of_a_frozen_a_and_of_groups_the_backward_pass_keeps_the_narrow_features_alone(settings, width):
    layer, shapes = nn.Sequential(nn.Linear(64, 64)), []
    sparsity = 0.75 if width == 16 else 0.25
    model = PeftModel(layer, PartialLoraConfig(r=4, target_modules=["0"], sparsity=sparsity, **settings))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        model(torch.randn(10, 64)).sum().backward()
    assert width is None or (10, width) in shapes
    assert ((10, 64) in shapes) == (width is None)


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, False), (torch.float16, True)])
def test_a_frozen_a_has_the_dtype_of_its_b_and_loads_over_a_base_of_any_other(tmp_path, dtype, wide):
    def base(dtype):
        return lambda: vit().to(dtype)

    frozen = PartialLoraConfig(r=4, lora_alpha=6, target_modules=["qkv", "fc1"], sparsity=0.5, columns="frozen")
    model = fill(get_peft_model(base(dtype)(), frozen, autocast_adapter_dtype=wide))
    with torch.inference_mode():
        model(images()["pixel_values"].to(dtype))
    model(images()["pixel_values"].to(dtype)).logits.sum().backward()  # training may follow inference
    for name, layer in layers(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.dtype == b.dtype == (torch.float32 if wide else dtype)
        x = torch.randn(3, layer.in_features, dtype=dtype)
        change = (x.to(a.dtype) @ a.T @ b.T * layer.scaling["default"]).float()
        expected = layer.base_layer(x).float() + change
        assert torch.allclose(layer(x).float(), expected, rtol=0.02, atol=0.02), name
    model.save_pretrained(tmp_path)
    other = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}[dtype]
    drawn = factors(adapt(sparsity=0.5, columns="frozen"), "A")
    for again in (dtype, other, torch.float32):
        config = PartialLoraConfig.from_pretrained(tmp_path)
        for low in (False, True):
            loaded = PeftModel.from_pretrained(base(again)(), tmp_path, config=config, low_cpu_mem_usage=low)
            for name, a in factors(loaded, "A").items():
                assert torch.equal(a.weight, drawn[name].weight.to(a.weight.dtype))


@pytest.mark.parametrize("form", ["frozen", "one-hot", "one-hot rows"])
def test_a_frozen_factor_compiles(form):
    layer = layers(fill(adapt(sparsity=0.5, **FORMS[form])))["timm_model.blocks.0.mlp.fc1"]
    x = torch.randn(3, layer.in_features)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_an_a_of_another_seed_is_refused(tmp_path):
    model = fill(adapt(sparsity=0.5, columns="frozen"))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if "lora_A" in key)
    save_file({**tensors, name: tensors[name] + 1}, path)
    config = PartialLoraConfig.from_pretrained(tmp_path)
    with pytest.raises((PartialLoraError, RuntimeError), match="lora_A"):
        PeftModel.from_pretrained(vit(), tmp_path, config=config)


class Wide(nn.Module):
    """A wide layer, linear or a convolution, and a frozen read-out of what it computes."""

    def __init__(self, convolution):
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Conv2d(256, 256, 3, padding=1) if convolution else nn.Linear(256, 256)
        self.out = nn.Linear(256, 4)
        self.shape = (32, 256, 4, 4) if convolution else (32, 256)

    def forward(self, x):
        hidden = torch.tanh(self.wide(x))
        return self.out(hidden.mean((2, 3)) if hidden.dim() == 4 else hidden)


def change_of_outputs(density, *, convolution, steps, **settings):
    """The root mean square change of the outputs after some steps of Adam at one small rate."""
    base = Wide(convolution)
    x, labels = torch.randn(base.shape, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 4
    config = PartialLoraConfig(r=8, lora_alpha=8, target_modules=["wide"], sparsity=1 - density, **settings)
    torch.manual_seed(2)
    model = PeftModel(base, config)
    before = model(x).detach()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(steps):
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (model(x).detach() - before).square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("granularity", "convolution"),
    [("rows_columns", False), ("element", False), ("units", False), ("rows_columns", True)],
)
def test_a_step_moves_the_outputs_as_far_at_every_density(granularity, convolution):
    """The coordinate check of scripts/density.py: one learning rate for every size, but not as PEFT draws A."""
    densities = [1.0, 0.25, 0.0625]

    def slope(steps, **settings):
        changes = [
            change_of_outputs(each, convolution=convolution, steps=steps, granularity=granularity, **settings)
            for each in densities
        ]
        return np.polyfit(np.log(densities), np.log(changes), 1)[0]

    aware = {"fan_in": "kept", "row_exponent": 1.0}
    assert abs(slope(1, **aware)) < 0.2
    assert abs(slope(10, **aware)) < 0.3
    assert slope(1, **AS_PEFT) == pytest.approx(1.5, abs=0.2)
