"""Masked adapters on quantised base models compute what PEFT's dense LoRA with the same values does there."""

from __future__ import annotations

import importlib.util
import itertools
from functools import partial

import pytest
import torch
from adapter_models import LLAMA_TARGETS, dense_twin, fill, layers, logits, loss_of, optimizer_of, step, tokens
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners import lora
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.te import TeLinear
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from partial_lora.adapter import PartialLoraConfig, module_masks
from partial_lora.adapter.layer import PartialLoraVariant, mask_layer
from partial_lora.adapter.selection import Geometry, random_masks
from partial_lora.masks import AS_PEFT

granularities = pytest.mark.parametrize("granularity", ["rows_columns", "element"])
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
# Activations are rounded to eight bits too: two sums in another order may fall on either side of a step. Steps of AdamW
# make as much of the order, in which processors differ.
ROUNDED = {"rtol": 0, "atol": 1e-3}
OF_BITS = {4: TOLERANCE, 8: ROUNDED}
SPARSITY = {"q_proj": {"rows": 0.9, "columns": 0.5}, "v_proj": 0.8, "down_proj": {"rows": 0.3, "columns": 0.8}}


def llama():
    """A Llama of two blocks whose layers divide into the blocks of every quantiser here."""
    torch.manual_seed(0)
    size = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(path)
    return path


def bitsandbytes(bits, folder, dtype=torch.float32):
    """The saved model, loaded by transformers with 4 (NF4) or 8 bits."""
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    config = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def masked(base, granularity, seed=1, **settings):
    config = {"r": 4, "lora_alpha": 6, "target_modules": LLAMA_TARGETS, "sparsity": SPARSITY, **settings}
    torch.manual_seed(seed)
    return fill(get_peft_model(base, PartialLoraConfig(granularity=granularity, **config)))


def factors(model):
    return [factor for layer in layers(model).values() for factor in (layer.lora_A["default"], layer.lora_B["default"])]


def assert_same_as_dense(model, twin):
    """The same gradients where the mask keeps, and the same logits.

    In this order: on some CPUs bitsandbytes repacks 4-bit weights at the first inference, and then has no gradients.
    """
    for adapted in (model, twin):
        adapted.train()
        loss_of(adapted, tokens(1)).backward()
    for kept, dense in zip(factors(model), factors(twin), strict=True):
        assert kept.kept.grad.abs().max() > 0
        torch.testing.assert_close(kept.kept.grad, kept.keep(dense.weight.grad), **TOLERANCE)
    torch.testing.assert_close(logits(model, tokens()), logits(twin, tokens()), **TOLERANCE)


@granularities
@pytest.mark.parametrize(("bits", "kind"), [(4, lora.Linear4bit), (8, lora.Linear8bitLt)])
def test_bitsandbytes_trains_as_dense_lora_with_masked_gradients(folder, bits, kind, granularity):
    def base():
        return prepare_model_for_kbit_training(
            bitsandbytes(bits, folder), gradient_checkpointing_kwargs={"use_reentrant": False}
        )

    model = masked(base(), granularity)
    twin = dense_twin(model, base)
    assert {type(layer) for layer in layers(model).values()} == {kind}
    assert all(type(layer.lora_variant["default"]) is PartialLoraVariant for layer in layers(model).values())

    def mask_gradients():
        for kept, dense in zip(factors(model), factors(twin), strict=True):
            dense.weight.grad = kept.fill(kept.keep(dense.weight.grad))

    optimizers = optimizer_of(model), optimizer_of(twin)
    for seed in range(4):
        step(model, optimizers[0], tokens(seed))
        step(twin, optimizers[1], tokens(seed), prepare=mask_gradients)
    # Where gradients are not masked, by 0.3 at least.
    torch.testing.assert_close(logits(model, tokens(9)), logits(twin, tokens(9)), **ROUNDED)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(f.kept.numel() for f in factors(model))


def dequantised(model):
    bases = {name: layer.get_base_layer() for name, layer in layers(model).items()}
    return {
        name: dequantize_bnb_weight(base.weight, state=getattr(base.weight, "quant_state", None) or base.state).clone()
        for name, base in bases.items()
    }


@pytest.mark.parametrize(
    ("bits", "dtype", "granularity"),
    [(4, torch.float32, "rows_columns"), (4, torch.bfloat16, "element"), (8, torch.float32, "rows_columns")],
)
def test_bitsandbytes_merges_as_dense_lora(folder, bits, dtype, granularity):
    # Before any inference: on some CPUs bitsandbytes then repacks a weight, which PEFT's merge does not know of.
    base = partial(bitsandbytes, bits, folder, dtype)
    model = masked(base(), granularity, **AS_PEFT)  # B of any other is rounded on its way to the twin
    twin = dense_twin(model, base)
    before = dequantised(model)
    for adapted in (model, twin):
        adapted.merge_adapter()
    merged = dequantised(model)
    assert all(torch.equal(weight, merged[name]) for name, weight in dequantised(twin).items())
    assert not any(torch.equal(weight, merged[name]) for name, weight in before.items())
    for adapted in (model, twin):
        adapted.unmerge_adapter()
    unmerged = dequantised(model)
    assert all(torch.equal(weight, unmerged[name]) for name, weight in dequantised(twin).items())


@pytest.mark.parametrize(("bits", "granularity"), [(4, "rows_columns"), (8, "element")])
def test_bitsandbytes_saves_and_loads(folder, bits, granularity, tmp_path):
    model = masked(bitsandbytes(bits, folder), granularity)
    model.save_pretrained(tmp_path)
    expected = logits(model, tokens())
    config = PartialLoraConfig.from_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bitsandbytes(bits, folder), tmp_path, config=config, is_trainable=True)
    assert module_masks(again) == module_masks(model)
    torch.testing.assert_close(logits(again, tokens()), expected, **OF_BITS[bits])
    plain = PeftModel.from_pretrained(bitsandbytes(bits, folder), tmp_path)
    assert type(plain.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(plain, tokens()), expected, **OF_BITS[bits])


def installed(*packages):
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


def with_torchao(linear):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(linear, Int8WeightOnlyConfig())
    return linear


def with_hqq(linear):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=32)
    return HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")


def with_gptq(linear):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    shape = {"in_features": linear.in_features, "out_features": linear.out_features}
    quantised = TorchLinear(bits=4, group_size=32, sym=True, desc_act=False, **shape)
    scales = linear.weight.detach().unflatten(1, (-1, 32)).abs().amax(-1) / 7
    group_of = torch.arange(linear.in_features, dtype=torch.int32) // 32
    quantised.pack(linear, scales, torch.full_like(scales, 8), group_of)
    quantised.post_init()
    return quantised


def with_awq(linear):
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    shape = {"in_features": linear.in_features, "out_features": linear.out_features}
    quantised = AwqTorchLinear(bits=4, group_size=32, sym=True, desc_act=False, register_buffers=True, **shape)
    generator = torch.Generator().manual_seed(0)  # any codes will do: what they stand for is not what is tested
    for codes in (quantised.qweight, quantised.qzeros):
        codes.copy_(torch.randint(-(2**31), 2**31 - 1, codes.shape, dtype=torch.int64, generator=generator))
    quantised.scales.copy_(torch.rand(quantised.scales.shape, generator=generator) * 0.01)
    quantised.post_init()
    return quantised


@granularities
@pytest.mark.parametrize(
    ("quantise", "kind"),
    [
        pytest.param(with_torchao, "TorchaoLoraLinear", marks=installed("torchao")),
        pytest.param(with_hqq, "HqqLoraLinear", marks=installed("hqq")),
        pytest.param(with_gptq, "GPTQLoraLinear", marks=installed("gptqmodel", "optimum")),
        pytest.param(with_awq, "AwqLoraLinear", marks=installed("gptqmodel", "optimum")),
    ],
)
def test_other_quantisers_run_as_dense_lora(quantise, kind, granularity):
    def base():
        model = llama()
        for name, module in list(model.named_modules()):
            if name.endswith(tuple(LLAMA_TARGETS)):
                model.set_submodule(name, quantise(module))
        return model

    model = masked(base(), granularity)
    assert {type(layer).__name__ for layer in layers(model).values()} == {kind}
    assert_same_as_dense(model, dense_twin(model, base))


class StandIn(nn.Module):
    """A stand-in for a quantised linear layer: int8 codes and a scale, no Parameter, forward only.

    It shows that a class of PEFT runs masked factors, whatever its base computes; not that PEFT's dispatcher picks that
    class, nor that a real layer of that quantiser works.
    """

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("qweight", torch.randint(-127, 128, (outputs, inputs), generator=generator).to(torch.int8))

    def forward(self, x):
        return F.linear(x, self.qweight.to(x.dtype) / 500)


@pytest.mark.parametrize("granularity", ["rows_columns", "element"])
@pytest.mark.parametrize(
    ("kind", "dropout"),
    [(GPTQLoraLinear, 0.0), *itertools.product((AwqLoraLinear, AqlmLoraLinear, TeLinear), (0.0, 0.3))],
)
def test_layers_of_peft_over_a_stand_in(kind, granularity, dropout):
    # GPTQ's asks for the variant: where it gathers kept features, dropout is drawn for them alone. The others know
    # nothing of it and call the factors as the modules they replace.
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout)
    geometry = Geometry(shape=(24, 16), a=(4, 16), b=(24, 4))
    (masks,) = random_masks({"m": geometry}, 0.7, granularity=granularity, count="exact", mask_seed=0).values()
    layer, dense = (kind(StandIn(16, 24), "default", config=config, r=4, lora_alpha=6) for _ in range(2))
    mask_layer(layer, "default", masks, fan_in="dense")
    low, high = layer.lora_A["default"], layer.lora_B["default"]
    nn.init.normal_(high.kept)
    dense.lora_A["default"].weight = nn.Parameter(low.fill(low.kept).detach().clone())
    dense.lora_B["default"].weight = nn.Parameter(high.fill(high.kept).detach().clone())
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    for adapted in (layer, dense):
        adapted.eval()
    torch.testing.assert_close(layer(x), dense(x), **TOLERANCE)
    assert not torch.allclose(layer(x), layer.base_layer(x))
    outputs = []
    for adapted in (layer, dense):
        adapted.train()
        torch.manual_seed(2)  # of dropout
        outputs.append(adapted(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs, **TOLERANCE)
    for factor, name in ((low, "lora_A"), (high, "lora_B")):
        gradient = factor.keep(getattr(dense, name)["default"].weight.grad)
        torch.testing.assert_close(factor.kept.grad, gradient, rtol=1e-5, atol=1e-4)
