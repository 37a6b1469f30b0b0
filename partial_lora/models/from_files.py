"""Settings of a model out of its own files: architecture, geometry, precision, inputs, head and targets."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from omegaconf import OmegaConf
from peft.utils import constants
from transformers import PretrainedConfig, PreTrainedModel

from partial_lora.errors import PartialLoraError, one_line
from partial_lora.files import read_json
from partial_lora.models.config import CHANNELS, FROM_FILES, ModelConfig
from partial_lora.models.family import empty, head_name
from partial_lora.models.fetch import config_folder_of
from partial_lora.models.language import longest_text
from partial_lora.models.skeleton import ALL_LINEAR, Skeleton, skeleton_of
from partial_lora.models.weights import AUTO, classes_of, quiet, takes
from partial_lora.tasks.kinds import KINDS

RESAMPLING = {"nearest": 0, "bilinear": 2, "bicubic": 3}  # Pillow's numbers
_TIMM = "timm_wrapper"
_DTYPES = ("float32", "bfloat16", "float16")
_LENGTH = {"encoder": 128, "causal": 512}  # tokens, where the model has as many positions
# Keys of a config that are about files, heads or how a call answers, and none of the model's geometry.
_NO_GEOMETRY = {"_name_or_path", "attn_implementation", "auto_map", "model_type", "num_labels", "quantization_config"}
_NO_GEOMETRY |= {"torch_dtype", "transformers_version"}
_SIDES = {"img_size", "patch_size"}  # of timm's models: one number, or two equal ones
_MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2"}  # types in which PEFT refuses out_proj, and knows no targets
_BLOCKS = ("timm_model.blocks", "timm_model.stages", "encoder.layer", "model.layers")

logger = logging.getLogger(__name__)


@cache
def settings_of(name: str, weights: str, kind: str | None = None) -> Mapping[str, object]:
    """Return the settings of a model that its files decide, by key; nothing but a config is downloaded.

    kind: the task's kind, where it has texts: a language model becomes a classifier for labels. Target modules are
    those that PEFT adapts by default in models of the type, or else "all-linear". Raises PartialLoraError that names
    the model and what does not fit.
    """
    folder = config_folder_of(weights, name, KINDS["text" if kind else "image", kind or "label"].model)
    try:
        content = read_json(folder / "config.json")
        is_timm = content.get("model_type", _TIMM) == _TIMM and "architecture" in content
        settings = _of_timm(content) if is_timm else _of_transformers(content, folder, weights, kind)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, StrictDataclassError) as error:
        raise PartialLoraError(f"model={weights}: cannot read its config.json ({one_line(error)})") from error
    family = settings["family"]
    geometry = {key: settings[key] for key in ("family", "architecture", "model_args")}
    model = empty(**geometry, num_labels=2)
    bare, head = skeleton_of(model), None if family == "causal" else head_name(model, family)
    if family in _LENGTH:
        positions = getattr(model.config, "max_position_embeddings", None)
        room = [length for length in (longest_text(model), positions) if isinstance(length, int) and length > 0]
        settings["max_length"] = min([_LENGTH[family], *room])
    new = _new_modules(model, bare, head, content) if family in ("image", "encoder") else []
    if folder.parent.name == "snapshots":  # of the hub's cache, where a folder is named by its commit
        settings["weights"] = f"{weights.partition('@')[0]}@{folder.name}"
    usual = OmegaConf.to_container(OmegaConf.structured(ModelConfig))
    return (
        {key: usual[key] for key in FROM_FILES}
        | settings
        | {
            "target_modules": _targets(weights, settings["architecture"], bare, head, new),
            "head": head,
            "new_modules": new,
            "blocks": next((module for module in bare.modules if module.endswith(_BLOCKS)), None),
        }
    )


def _of_timm(content: Mapping) -> dict[str, object]:
    """Return the settings of a config.json in timm's format."""
    inputs = content.get("pretrained_cfg") or {}
    settings = {
        "family": "timm",
        "architecture": content["architecture"],
        "model_args": {
            key: value[0] if isinstance(value, list) and len({*value}) == 1 and key in _SIDES else value
            for key, value in (content.get("model_args") or {}).items()
            if key != "num_classes"
        },
        "dtype": "float32",
        "image_size": (inputs.get("input_size") or [3, 224])[-1],
        "mean": inputs.get("mean"),
        "std": inputs.get("std"),
        "interpolation": inputs.get("interpolation"),
    }
    return {key: value for key, value in settings.items() if value is not None}


def _of_transformers(content: Mapping, folder: Path, weights: str, kind: str | None) -> dict[str, object]:
    """Return the settings of a config.json of a type that transformers knows."""
    architecture = content.get("model_type")
    if architecture not in transformers.CONFIG_MAPPING:
        why = "its config.json names none" if architecture is None else f"not {architecture}"
        raise PartialLoraError(
            f"model={weights}: expected a model_type that transformers {transformers.__version__} knows, {why}"
            f"{'; its code (auto_map) is never run' if 'auto_map' in content else ''}"
        )
    with quiet():
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if "auto_map" in content:
        logger.warning(
            "model=%s: its own code (auto_map) is not run; it is a %s of transformers", weights, config.model_type
        )
    if "quantization_config" in content:
        raise PartialLoraError(
            f"model={weights}: its weights are quantised (quantization_config), expected whole ones; "
            "model.quantization=nf4 quantises those"
        )
    family = _family(config, weights, kind)
    args = _geometry(config, content, classes_of(family, config)[0])
    dtype = str(config.dtype).removeprefix("torch.")
    settings = {
        "family": family,
        "architecture": config.model_type,
        "model_args": args,
        "dtype": dtype if dtype in _DTYPES else _DTYPES[0],
    }
    return settings | (_images(config, folder, weights) if family == "image" else {})


def _family(config: PretrainedConfig, weights: str, kind: str | None) -> str:
    """Return the family of a model: by the task's kind, else by the head that it was saved with."""
    of_family = {family: classes_of(family, config) for family in AUTO}
    classes = {family: [cls.__name__ for cls in types] for family, types in of_family.items() if types}
    saved = {*(config.architectures or ())}
    saved_as = [family for family in classes if saved & {*classes[family]}]
    has_head = kind is None or KINDS["text", kind].has_head
    if kind and has_head and "encoder" in classes:
        return "encoder"
    if saved_as and (has_head or saved_as != ["encoder"]):
        return saved_as[0]
    usable = [family for family in ("image", "encoder") if family in classes]  # saved as a bare or a masked model
    if usable and has_head:
        return usable[0]
    instead = "take task=text_generation" if has_head and "causal" in classes else "take another model"
    raise PartialLoraError(
        f"model={weights}: {config.model_type}, saved as {', '.join(saved) or 'no class'}, has no head for "
        f"task.kind={kind or 'label'}; {instead}"
    )


def _geometry(config: PretrainedConfig, content: Mapping, model_class: type) -> dict[str, object]:
    """Return the keys of a config that say what is built: those of its file, and those that differ from the default."""
    every, usual = config.to_dict(), PretrainedConfig().to_dict()
    default, differs = type(config)(), config.to_diff_dict()
    keys = [key for key in every if key in content or key in differs]
    args = {
        key: every[key] for key in keys if key not in _NO_GEOMETRY | usual.keys() and takes(default, model_class, key)
    }
    endless = [key for key, value in args.items() if "Infinity" in json.dumps(value)]  # which no record can hold
    for key in endless:
        if args.pop(key) != default.to_dict()[key]:
            raise ValueError(f"{key} is {every[key]}, expected numbers with an end")
    return args


def _images(config: PretrainedConfig, folder: Path, weights: str) -> dict[str, object]:
    """Return how images enter a model: as its image processor makes them, or at its config's size as ImageNet's do.

    The processor is given images of one colour, since much of what it does is a default of its class.
    """
    size = getattr(config, "image_size", None) or 224
    side = size[0] if isinstance(size, (list, tuple)) else size
    if not (folder / "preprocessor_config.json").is_file():
        logger.warning("model=%s: no preprocessor_config.json, so that colours are normalised as ImageNet's", weights)
        return {"image_size": side}
    try:
        with quiet():
            processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise PartialLoraError(
            f"model={weights}: its preprocessor_config.json is of no image processor that transformers has "
            f"({one_line(error, 100)}); without that file model.{{image_size,mean,std}} say how images enter"
        ) from error
    colours = np.concatenate([np.zeros((1, 3)), 255 * np.eye(3)]).astype(np.uint8)  # black, red, green and blue
    images = [PIL.Image.new("RGB", (side, side), tuple(colour)) for colour in colours.tolist()]
    inputs = torch.as_tensor(np.asarray(processor(images)["pixel_values"])).double()
    if inputs.ndim != 4 or inputs.shape[1] != 3 or inputs.shape[2] != inputs.shape[3]:
        raise PartialLoraError(
            f"model={weights}: {type(processor).__name__} gives inputs of shape {[*inputs.shape[1:]]}, expected "
            "squares of 3 channels; take another model"
        )
    black, *lit = inputs[:, :, inputs.shape[2] // 2, inputs.shape[3] // 2]
    gain = torch.stack(lit, 1) - black[:, None]  # (channel, colour)
    order = gain.abs().argmax(1).tolist()
    channels, gain = "".join("RGB"[colour] for colour in order), gain[range(3), order]
    if channels not in CHANNELS or (torch.stack(lit, 1) != black[:, None]).sum() > 3:
        expected = f"expected {' or '.join(CHANNELS)}; take another model"
        raise PartialLoraError(f"model={weights}: {type(processor).__name__} mixes the colours, {expected}")
    found = {"mean": (-black / gain).tolist(), "std": (1 / gain).tolist()}
    return {
        "image_size": inputs.shape[2],
        "channels": channels,
        "interpolation": {number: name for name, number in RESAMPLING.items()}.get(processor.resample, "bicubic"),
    } | {key: _as_stated(getattr(processor, f"image_{key}"), values) for key, values in found.items()}


def _as_stated(stated: object, found: list[float]) -> list[float]:
    """Return the numbers of the channels as they are stated, where these are what was found; else what was found."""
    numbers = stated if isinstance(stated, (list, tuple)) else [stated or 0.0] * 3
    same = len(numbers) == 3 and np.allclose(numbers, found, rtol=0, atol=1e-5)
    return [float(number) for number in numbers] if same else [float(f"{value:.6g}") + 0.0 for value in found]


def _targets(weights: str, architecture: str, bare: Skeleton, head: str | None, new: list[str]) -> list[str]:
    if bare.experts:
        attention = {name.rpartition(".")[2] for name in bare.linears if "attn" in name or "attention" in name}
        experts = {".".join(name.split(".")[-2:]) for name in bare.experts}
        return sorted(attention) + sorted(experts)
    usual = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(architecture)
    linears = {name.rpartition(".")[2] for name in bare.linears if name != bare.output}
    every = sorted(linears - {"out_proj"}) if architecture in _MAMBA else [ALL_LINEAR]
    for targets in ([usual] if isinstance(usual, list) else []) + [every]:
        with suppress(PartialLoraError):
            bare.targets(targets, head, new)
            return targets
    raise PartialLoraError(
        f"model={weights}: expected a model with nn.Linear to adapt, {bare.kind} has none but its head or output; take "
        "another, or adapt its layers in Python (PartialLoraConfig)"
    )


def _new_modules(model: PreTrainedModel, bare: Skeleton, head: str, content: Mapping) -> list[str]:
    """Return the modules that have weights and no trained ones, but the head.

    They are beside the pre-trained base, or the class that was saved has no such module: a masked BERT has no pooler.
    """
    base, new = f"{model.base_model_prefix}.", []
    for name, _ in model.named_children():
        if f"{name}." == base or name == head or not bare.size(name):
            continue
        if head.startswith(f"{name}."):
            new += [part for part in _owners(bare, f"{name}.") if part != head]
        else:
            new.append(name)
    saved = getattr(transformers, (content.get("architectures") or [""])[0], None)
    if saved is not None:
        with torch.device("meta"):
            trained = saved(model.config).state_dict().keys()
        whole = {key if key.startswith(base) else f"{base}{key}" for key in trained}
        new += _owners(bare, base, besides=whole)
    return new


def _owners(bare: Skeleton, start: str, besides: Collection[str] = ()) -> list[str]:
    """Return the modules of the parameters whose names begin so, but for some."""
    keys = (key for key in bare.parameters if key.startswith(start) and key not in besides)
    return list(dict.fromkeys(key.rpartition(".")[0] for key in keys))
