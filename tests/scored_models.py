"""A tiny vision transformer that is right about most of a few random images, and its score the slow way."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

TARGETS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
BLOCKS = "blocks"


def tiny_vit(seed: int = 0) -> nn.Module:
    """Weights large enough that zeroing some of them changes what it says."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=4
    )
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.25)
    return model.eval()


class Named(nn.Module):
    """Takes its inputs by name, as the models of transformers do."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.vit(pixel_values)


def scored_draw(model: nn.Module, sizes: tuple[int, ...] = (10, 10, 10, 7), seed: int = 0) -> list[dict[str, Tensor]]:
    """Random images, labelled as the model would label them, but for every eighth."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(sum(sizes), 3, 32, 32, generator=generator)
    with torch.no_grad():
        labels = model(pixel_values=images).argmax(-1)
    labels[::8] = (labels[::8] + 1) % 4
    return [
        {"pixel_values": part, "labels": label}
        for part, label in zip(images.split(sizes), labels.split(sizes), strict=True)
    ]


def full_accuracy(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """The literal twin: every example through the whole model."""
    right = total = 0
    with torch.no_grad():
        for batch in batches:
            right += int((model(pixel_values=batch["pixel_values"]).argmax(-1) == batch["labels"]).sum())
            total += len(batch["labels"])
    return right / total
