"""Tiny models of the classes users adapt, adapters on them, and one training step."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM, TimmWrapperConfig, TimmWrapperForImageClassification

from partial_lora.adapter import PartialLoraConfig

VIT_TARGETS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
LLAMA_TARGETS = ["q_proj", "v_proj", "down_proj"]
HEAD = "timm_model.head"

# Below and above the density at which the forward pass changes its way, and different for rows and columns.
MIXED = {
    "qkv": {"rows": 0.9, "columns": 0.5},
    "attn.proj": {"rows": 0.3, "columns": 0.8},
    "fc1": 0.87,
    "fc2": {"rows": 0.0, "columns": 0.6},
}


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


def adapt(base=vit, seed=1, **settings):
    """``base`` with a Partial-LoRA adapter, or with plain LoRA where no sparsity is set."""
    is_vit = base is vit
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": VIT_TARGETS if is_vit else LLAMA_TARGETS,
        "modules_to_save": [HEAD] if is_vit else None,
        **settings,
    }
    config = (
        PartialLoraConfig(**settings) if "sparsity" in settings or "indices" in settings else LoraConfig(**settings)
    )
    model = base()
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def layers(model):
    return {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}


def fill(model, seed=2):
    """Give B values, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in layers(model).values():
            for parameter in layer.lora_B.parameters():
                parameter.normal_()
    return model


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)


def step(model, optimizer, batch, mask_gradients=lambda: None):
    model.train()
    loss = model(**batch).loss
    loss.backward()
    mask_gradients()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**batch).logits
