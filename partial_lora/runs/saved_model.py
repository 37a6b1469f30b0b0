"""A whole model in the format of the library it comes from: config.json and model.safetensors.

A timm model is written as timm does, so that both `timm.create_model("local-dir:FOLDER", pretrained=True)` and
transformers' AutoModelForImageClassification load it; any other transformers model by its own save_pretrained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel, TimmWrapperForImageClassification

from partial_lora.sealed import write_json

# What a timm configuration says of where its weights came from, and of another head or input than the model's.
_ORIGIN = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "license", "origin_url", "paper_ids"}
_REPLACED = {"architecture", "tag", "test_input_size", "test_crop_pct", "label_names", "label_descriptions"}
_LEFT_OUT = _ORIGIN | _REPLACED | {"label_offset", "custom_load", "notes", "paper_name"}


def save_model(model: PreTrainedModel, folder: Path, preprocessing: Mapping | None = None) -> None:
    """Write a model, without adapters, into an existing folder.

    `preprocessing` says what a timm image model expects of its input: image_size, mean, std, interpolation.
    """
    if isinstance(model, TimmWrapperForImageClassification):
        _save_timm(model, folder, preprocessing or {})
    else:
        model.save_pretrained(folder)


def _save_timm(model: TimmWrapperForImageClassification, folder: Path, preprocessing: Mapping) -> None:
    config, timm_model = model.config, model.timm_model
    known = {
        key: value for key, value in timm_model.pretrained_cfg.items() if key not in _LEFT_OUT and value is not None
    }
    if preprocessing:
        size = preprocessing["image_size"]
        known |= {
            "input_size": [3, size, size],
            "mean": list(preprocessing["mean"]),
            "std": list(preprocessing["std"]),
            "interpolation": preprocessing["interpolation"],
            "crop_pct": 1.0,  # the shorter side is resized to the image's size and the middle square kept
            "crop_mode": "center",
        }
        known.pop("pool_size", None)
    content = {
        "architecture": config.architecture,
        "num_classes": config.num_labels,
        "num_features": timm_model.num_features,
        "label_names": [config.id2label[index] for index in range(config.num_labels)],
        "model_args": dict(config.model_args or {}),
        "pretrained_cfg": known | {"num_classes": config.num_labels, "custom_load": False},
    }
    write_json(folder / "config.json", content)
    tensors = {name: tensor.detach().contiguous() for name, tensor in timm_model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
