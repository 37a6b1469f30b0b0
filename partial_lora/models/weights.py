"""Weights out of a folder into a model, every one of them accounted for."""

from __future__ import annotations

import inspect
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from partial_lora.errors import PartialLoraError

_SAFETENSORS = "*.safetensors"


def pretrained(
    build: Callable[..., PreTrainedModel],
    folder: Path,
    config: PretrainedConfig,
    *,
    name: str,
    weights: str,
    dtype: torch.dtype,
    may_be_new: Callable[[PreTrainedModel, str], bool],
    pickled: bool = False,
    **options: object,
) -> PreTrainedModel:
    """The model with the folder's weights.

    build: a from_pretrained of transformers. may_be_new: whether the model may have that parameter without any weights,
    or with other ones than the folder's; all others must be there, in their shape. pickled: take a pickle, read without
    running any of its code, where there is nothing better. Raises PartialLoraError that names the first problem.
    """
    try:
        with quiet():
            model, report = build(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=not pickled or any(folder.glob(_SAFETENSORS)),
                weights_only=True,
                ignore_mismatched_sizes=True,  # the head was made for other classes; the rest is checked below
                output_loading_info=True,
                **options,
            )
    except (OSError, SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise PartialLoraError(f"model={name}: cannot read the weights in {folder} ({reason[:160]})") from error
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    for problem, keys in (("missing", report["missing_keys"]), ("of another shape", mismatched)):
        unfilled = sorted(key for key in keys if not may_be_new(model, key))
        if unfilled:
            raise PartialLoraError(
                f"model={name}: {unfilled[0]} is {problem} in {weights} ({len(unfilled)} such weights); "
                "model.architecture and model.model_args must be those of the weights"
            )
    return model


def check_architecture(wanted: str, found: str, weights: str) -> None:
    """Raise PartialLoraError where the weights are of another architecture than the one that is counted."""
    if found != wanted:
        raise PartialLoraError(
            f"model.architecture={wanted}: {weights} is a {found}; set that, so that "
            "parameters are counted for the model that trains"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from warning of the new head, and of other classes, which are meant to be new."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


# --- The geometry of one of transformers' own models: built without weights, and compared with what a folder holds.


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


# --- The one part of a model that is new for a task: what it tells apart, and the numbers it starts from.


def outputs(labels: Sequence[str], name: str) -> dict[str, object]:
    """What a config says of a model's outputs: one for each label, or a single real number where there are none."""
    if not labels:
        return {"num_labels": 1, "problem_type": "regression"}
    if len(labels) < 2:
        raise PartialLoraError(f"model={name}: expected at least two labels to tell apart, got {list(labels)}")
    return {
        "num_labels": len(labels),
        "problem_type": None,  # which transformers then sees by the labels; the weights may have been for another
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def draw(head: nn.Linear, std: float) -> None:
    """New numbers from torch's global generator, as transformers draws a new classifier; the same in every dtype."""
    with torch.no_grad():
        head.weight.copy_(nn.init.normal_(torch.empty(head.weight.shape, dtype=torch.float32), std=std))
        if head.bias is not None:
            head.bias.zero_()


def in_full_precision(module: nn.Module) -> None:
    """Weights of a module that trains whole in float32, whatever it is given: steps are too small for 16 bits."""
    if all(parameter.dtype == torch.float32 for parameter in module.parameters()):
        return
    module.float().register_forward_pre_hook(_as_float)


def _as_float(module: nn.Module, inputs: tuple) -> tuple:
    return tuple(value.float() if isinstance(value, Tensor) else value for value in inputs)


@contextmanager
def own_generator() -> Iterator[None]:
    """Draw from a fixed seed for a while, and leave torch's global CPU generator as it was."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed the accelerators too
    try:
        yield
    finally:
        torch.set_rng_state(state)
