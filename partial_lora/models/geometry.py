"""The geometry of one of transformers' own models: built without weights, and compared with what a folder holds."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from partial_lora.errors import PartialLoraError
from partial_lora.models.checkpoint import check_architecture, quiet


@dataclass(frozen=True)
class Geometry:
    """What `info` counts by without any download, and what weights must then be of.

    Args:
        auto: the class that knows the model's class, such as AutoModelForCausalLM.
        noun: what such a model is, for messages.
        architecture: transformers' model_type.
        model_args: keys of that type's config.
        outputs: further keys, those of a new head; {} where there is none.
    """

    auto: type
    noun: str
    architecture: str
    model_args: Mapping[str, object]
    outputs: Mapping[str, object]

    def config(self) -> PretrainedConfig:
        """A config of its own for every call. Raises PartialLoraError for what transformers does not know."""
        try:
            known = AutoConfig.for_model(self.architecture)
        except ValueError as error:
            raise PartialLoraError(
                f"model.architecture={self.architecture}: transformers has no such model_type (bert, llama, …)"
            ) from error
        if type(known) not in self.auto._model_mapping:
            raise PartialLoraError(
                f"model.architecture={self.architecture}: transformers has no {self.noun} of that type"
            )
        for key in self.model_args:
            if not hasattr(known, key) and not self._is_read(key, known):
                raise PartialLoraError(f"model.model_args.{key}: {self.architecture} takes none of that name")
        try:
            return AutoConfig.for_model(self.architecture, **self.model_args, **self.outputs)
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise self._impossible(error) from error

    def empty(self) -> PreTrainedModel:
        """The model on the meta device: shapes without weights or memory. Raises as `config`, or where none can be."""
        config = self.config()
        try:
            with torch.device("meta"):
                return self.auto.from_config(config)
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            raise self._impossible(error) from error

    def check_attention(self, implementation: str) -> None:
        """Raise PartialLoraError where the class, or this machine, cannot compute attention so."""
        config = self.config()
        try:
            with torch.device("meta"):
                self.auto.from_config(config, attn_implementation=implementation)
        except (ValueError, ImportError) as error:
            raise PartialLoraError(
                f"model.attn_implementation={implementation}: {config.model_type} cannot be computed so "
                f"({_one_line(error)}); null leaves it to transformers"
            ) from error

    def config_in(self, folder: Path, weights: str) -> PretrainedConfig:
        """The config beside the weights in a folder; raises PartialLoraError where it is of another geometry."""
        try:
            with quiet():
                found = AutoConfig.from_pretrained(folder, trust_remote_code=False, **self.outputs)
        except (OSError, ValueError, StrictDataclassError) as error:
            raise PartialLoraError(
                f"model.weights={weights}: expected a config.json that transformers knows ({_one_line(error)})"
            ) from error
        check_architecture(self.architecture, found.model_type, weights)
        counted = self.empty().config
        for key in self.model_args:
            expected, value = getattr(counted, key, None), getattr(found, key, None)
            if value != expected:
                raise PartialLoraError(
                    f"model.model_args.{key}={expected}: {weights} has {value}; set that, so that parameters are "
                    "counted for the model that trains"
                )
        return found

    def _is_read(self, key: str, config: PretrainedConfig) -> bool:
        """Whether the model asks its config for a key that the config class does not list, as DeBERTa does for some."""
        model_class = self.auto._model_mapping[type(config)]
        return f'"{key}"' in inspect.getsource(sys.modules[model_class.__module__])

    def _impossible(self, error: Exception) -> PartialLoraError:
        return PartialLoraError(
            f"model.model_args={dict(self.model_args)}: no geometry of {self.architecture} ({_one_line(error)})"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
