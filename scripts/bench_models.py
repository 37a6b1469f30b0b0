"""Two frozen models that the benchmark compares on, and the ways to put an adapter on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from peft.tuners.shira.layer import ShiraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TimmWrapperConfig, TimmWrapperForImageClassification

from partial_lora import PartialLoraConfig
from partial_lora.masks import kept_count

SEED = 0


@dataclass(frozen=True)
class Model:
    """A model class at one size: how it is built and fed, and where in it adapters go.

    Attributes:
        title: what it is and what a step works on, for the page.
        build: gives the model, with random weights drawn from torch's generator.
        batch: gives the keyword arguments of one forward pass, labels included.
        unit: what a user counts, and ``units`` how many of them a step works on.
        targets: the modules that get an adapter.
        first_block: the module whose input the frozen floor's backward pass reaches.
        first_targets: the first modules with an adapter; an adapter's own backward pass goes no further than they.
    """

    title: str
    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, torch.Tensor]]
    unit: str
    units: int
    targets: tuple[str, ...]
    first_block: str
    first_targets: tuple[str, ...]


def _vit(title: str, *, labels: int, images: int, **size) -> Model:
    pixels = size.get("img_size", 224)

    def build() -> nn.Module:
        config = TimmWrapperConfig(architecture="vit_base_patch16_224", num_labels=labels, model_args=size)
        return TimmWrapperForImageClassification(config)

    def batch() -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(SEED)
        return {
            "pixel_values": torch.randn(images, 3, pixels, pixels, generator=generator),
            "labels": torch.randint(0, labels, (images,), generator=generator),
        }

    return Model(
        f"{title}, {images} images of {pixels} px a step",
        build,
        batch,
        unit="images",
        units=images,
        targets=("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),  # "proj" alone would also be the patch embedding's
        first_block="timm_model.blocks.0",
        first_targets=("timm_model.blocks.0.attn.qkv",),
    )


def _llama(title: str, *, tokens: int, **size) -> Model:
    # Without a cache of keys and values: training has no use for one.
    config = LlamaConfig(use_cache=False, max_position_embeddings=tokens, **size)

    def batch() -> dict[str, torch.Tensor]:
        ids = torch.randint(0, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(SEED))
        return {"input_ids": ids, "labels": ids}

    return Model(
        f"{title}, one text of {tokens} tokens a step",
        lambda: LlamaForCausalLM(copy.deepcopy(config)),
        batch,
        unit="tokens",
        units=tokens,
        targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        first_block="model.layers.0",
        first_targets=tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv"),
    )


_llama_8l = partial(
    _llama,
    "Llama, 8 layers, d = 1024",
    vocab_size=4096,
    hidden_size=1024,
    intermediate_size=3584,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=8,
)
_tiny_llama = partial(
    _llama,
    "A tiny Llama",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
MODELS = {"vit_b16": _vit("ViT-B/16", labels=10, images=4), "llama_8l": _llama_8l(tokens=512)}
LONG = _llama_8l(tokens=2048)

# The same classes at a size for tests; their times mean nothing.
QUICK_MODELS = {
    "vit_b16": _vit("A tiny ViT", labels=4, images=2, img_size=32, embed_dim=64, depth=2, num_heads=2),
    "llama_8l": _tiny_llama(tokens=16),
}
QUICK_LONG = _tiny_llama(tokens=64)


def share_frozen(base: nn.Module) -> nn.Module:
    """A copy of ``base`` that has modules of its own and the same frozen tensors, in memory once."""
    base.requires_grad_(False)
    tensors = chain(base.parameters(), base.buffers())
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})


def floor(base: nn.Module, model: Model, rank: int, sparsity: float) -> nn.Module:
    """(a) No adapter; the backward pass goes down to the input of the first block."""

    def from_here(module: nn.Module, args: tuple) -> None:
        args[0].requires_grad_(True)  # what comes before is frozen, so this is a leaf

    base.get_submodule(model.first_block).register_forward_pre_hook(from_here)
    return base


def short_floor(base: nn.Module, model: Model, rank: int, sparsity: float) -> nn.Module:
    """No adapter; the backward pass stops where that of an adapter does, at the output of the first adapted modules.

    An adapter in the first block needs no gradient of that block's input, so (a) does a little more than the frozen
    part of an adapted model; this does exactly that part.
    """

    def from_here(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        output.requires_grad_(True)

    for name in model.first_targets:
        base.get_submodule(name).register_forward_hook(from_here)
    return base


def _lora_settings(model: Model, rank: int) -> dict:
    return {"r": rank, "lora_alpha": 2 * rank, "target_modules": list(model.targets)}


def lora(base: nn.Module, model: Model, rank: int, sparsity: float) -> nn.Module:
    """(b) PEFT's dense LoRA."""
    return get_peft_model(base, LoraConfig(**_lora_settings(model, rank)))


def rows_columns(base: nn.Module, model: Model, rank: int, sparsity: float) -> nn.Module:
    """(c) Partial-LoRA that keeps rows of B and columns of A."""
    return get_peft_model(base, PartialLoraConfig(sparsity=sparsity, **_lora_settings(model, rank)))


def element(base: nn.Module, model: Model, rank: int, sparsity: float) -> nn.Module:
    """(d) Partial-LoRA that keeps single entries of B and A."""
    settings = _lora_settings(model, rank)
    return get_peft_model(base, PartialLoraConfig(sparsity=sparsity, granularity="element", **settings))


def shira(base: nn.Module, model: Model, rank: int, sparsity: float) -> nn.Module:
    """(e) PEFT's SHiRA (random single entries of W) with as many entries in every module as (c) keeps there.

    SHiRA's own number is r (in + out) with a whole r, which misses that of (c) by several per cent; so it is built with
    r = 1, and its vector of values and their positions are then replaced by ones of the right length.
    """
    wrapped = get_peft_model(base, ShiraConfig(r=1, random_seed=SEED, target_modules=list(model.targets)))
    generator = torch.Generator().manual_seed(SEED)
    for layer in wrapped.modules():
        if isinstance(layer, ShiraLayer):
            kept = rank * sum(kept_count(size, sparsity) for size in (layer.in_features, layer.out_features))
            entries = layer.in_features * layer.out_features
            chosen = torch.randperm(entries, generator=generator)[:kept].sort().values
            positions = torch.stack([chosen // layer.in_features, chosen % layer.in_features])
            layer.shira_weight["default"] = nn.Parameter(torch.zeros(kept))
            layer.shira_indices["default"] = positions.int()  # as SHiRA holds them
    return wrapped


VARIANTS = {build.__name__: build for build in (floor, short_floor, lora, rows_columns, element, shira)}
REFERENCES = ("lora", "floor", "short_floor")  # what ratios are taken against
PARTIAL = ("rows_columns", "element")
SELDOM = ("element", "shira")  # compared with LoRA's whole step, which fewer repetitions tell precisely enough


def build_variant(name: str, base: nn.Module, model: Model, rank: int, sparsity: float) -> nn.Module:
    """The variant over the frozen tensors of ``base``, ready to train; every variant draws from the same seed."""
    torch.manual_seed(SEED)
    return VARIANTS[name](share_frozen(base), model, rank, sparsity).train()
