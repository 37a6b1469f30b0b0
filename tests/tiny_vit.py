"""A ViT of three blocks, as random weights and as a folder of pre-trained ones."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from partial_lora.models import images

TINY = {
    "name": "tiny_vit",
    "weights": "random",
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2},
    "labels": ["cat", "dog", "owl"],
    "image_size": 32,
}
HEAD = "timm_model.head"


def load(**changes: object) -> TimmWrapperForImageClassification:
    return images.load_timm(**{**TINY, **changes})


def pretrained(folder: Path) -> Path:
    """A pre-trained model for seven other classes, as save_pretrained leaves it."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        config = TimmWrapperConfig(
            architecture=TINY["architecture"], model_args=TINY["model_args"], id2label={i: f"old {i}" for i in range(7)}
        )
        model = TimmWrapperForImageClassification(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(folder)
    return folder
