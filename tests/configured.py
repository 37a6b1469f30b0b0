"""The models of conf/model, as settings and loaded, and inputs that fit them."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import torch
import yaml
from refusals import refusal
from torch import Tensor, nn

from partial_lora import models
from partial_lora.models.config import ModelConfig
from partial_lora.models.skeleton import stored_settings

FOLDER = Path(__file__).parents[1] / "conf" / "model"
ALL = sorted(file.stem for file in FOLDER.glob("*.yaml"))
TINY = [name for name in ALL if name.startswith("tiny_")]
OTHERS = [name for name in ALL if name not in TINY]
# The tiny one of each model's class, by whose code path it is tested.
TINY_OF = {
    "vit_b16": "tiny_vit",
    "vit_s14": "tiny_vit",
    "clip_vit_b16": "tiny_clip",
    "convnext_tiny": "tiny_convnext",
    "deberta_v3_base": "tiny_deberta",
    "bert_base": "tiny_bert",
    "minilm_l6": "tiny_bert",
    "llama2_7b": "tiny_llama",
    "llama3_1_8b": "tiny_llama",
    "smollm2_135m": "tiny_llama",
    "qwen2_5_14b": "tiny_qwen",
    "qwen2_5_0_5b": "tiny_qwen",
}
LABELS = ["cat", "dog", "barn_owl"]


@functools.cache
def _settings(name: str) -> dict:
    written = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    found = stored_settings(written["weights"]) or {}
    args = {**found.get("model_args", {}), **written.get("model_args", {})}
    usual = {"family": "timm", "new_modules": []}
    return {**usual, **found, **written, "model_args": args}


def settings(name: str, **changes: object) -> dict:
    """A group file, with what the model's own files say, and with some of its keys changed."""
    return copy.deepcopy(_settings(name)) | changes


@functools.cache
def _usual(name: str) -> tuple[nn.Module, Tensor]:
    """The model of a group file as it is, and the state of the random numbers after it."""
    torch.manual_seed(0)
    return models.load(ModelConfig(**settings(name)), LABELS), torch.get_rng_state()


def load(name: str, labels=LABELS, seed: int = 0, **changes: object) -> nn.Module:
    """The model of a group file, its head drawn from a seed."""
    if (labels, seed, changes) == (LABELS, 0, {}):
        model, after = _usual(name)
        torch.set_rng_state(after)
        return copy.deepcopy(model)
    torch.manual_seed(seed)
    return models.load(ModelConfig(**settings(name, **changes)), labels)


def refused(key: str, name: str, **changes: object) -> None:
    """Assert that loading fails in one line that begins with a key."""
    with refusal(key):
        load(name, **changes)


def digest(model: nn.Module, name: str) -> str:
    return models.weights_digest(model, settings(name)["head"] or "")


def logits(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return model(**inputs(name)).logits


def loud(model: nn.Module, gain: float = 8.0) -> nn.Module:
    """The same with matrices so large that what a single module does is seen in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(gain)
    return model


def inputs(name: str, rows: int = 4, length: int = 9, seed: int = 1) -> dict[str, Tensor]:
    """Random images, or random words of which the first row's end early."""
    generator = torch.Generator().manual_seed(seed)
    chosen = settings(name)
    if chosen.get("family") not in ("encoder", "causal"):
        size = chosen["image_size"]
        return {"pixel_values": torch.randn(rows, 3, size, size, generator=generator)}
    words = torch.randint(1, chosen["model_args"]["vocab_size"], (rows, length), generator=generator)
    mask = torch.ones_like(words)
    mask[0, 3:] = 0
    return {"input_ids": words, "attention_mask": mask}


def labels(name: str, batch: dict[str, Tensor]) -> Tensor:
    """What a model is to say of a batch of `inputs`: its own words, or one of three classes for each of four rows."""
    if settings(name).get("family") != "causal":
        return torch.tensor([0, 1, 2, 0])
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
