"""Tiny models of the classes users adapt, built the same way every time."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TimmWrapperConfig, TimmWrapperForImageClassification

VIT_TARGETS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
LLAMA_TARGETS = ["q_proj", "v_proj", "down_proj"]
HEAD = "timm_model.head"


def vit() -> TimmWrapperForImageClassification:
    """A ViT of two blocks for 32 px images and 4 classes."""
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=4, model_args=size)
    )


def llama() -> LlamaForCausalLM:
    """A Llama of two blocks over 50 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def images(seed: int = 0, count: int = 8) -> dict[str, torch.Tensor]:
    """A batch for the ViT, labels included."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(count, 3, 32, 32, generator=generator),
        "labels": torch.randint(0, 4, (count,), generator=generator),
    }


def tokens(seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch for the Llama, labels included."""
    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}
