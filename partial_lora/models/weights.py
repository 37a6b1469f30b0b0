"""Loading of weights from a folder into a model, every one of them accounted for; and the new head."""

from __future__ import annotations

import inspect
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from partial_lora.errors import PartialLoraError, one_line
from partial_lora.models.config import ModelConfig, value_in


def load_weights(
    model_class: type,
    folder: Path,
    config: PretrainedConfig,
    model: ModelConfig,
    *,
    may_be_new: Callable[[PreTrainedModel, str], bool],
    pickles: bool = False,
    **options: object,
) -> PreTrainedModel:
    """Load a folder's weights into a model of a class that has from_pretrained.

    may_be_new: True for a parameter that may be missing in the folder, or of another shape there; all others must be
    there, in their shape. pickles: read a pickle, without running any of its code, where there is no safetensors.
    Raises PartialLoraError that names the first problem.
    """
    try:
        with quiet():
            loaded, report = model_class.from_pretrained(
                folder,
                config=config,
                dtype=getattr(torch, model.dtype),
                use_safetensors=not pickles or any(folder.glob("*.safetensors")),
                weights_only=True,
                ignore_mismatched_sizes=True,  # the head was made for other classes; the rest is checked below
                output_loading_info=True,
                **options,
            )
    except (OSError, SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        is_pickle = isinstance(error, pickle.UnpicklingError)  # torch's own words advise to run what is in it
        reason = "a pickle with more in it than weights, or a broken one" if is_pickle else one_line(error)
        raise PartialLoraError(f"model={model.name}: cannot read the weights in {folder} ({reason})") from error
    mismatched = [key for key, *_ in report["mismatched_keys"]]
    for problem, keys in (("missing", report["missing_keys"]), ("of another shape", mismatched)):
        unfilled = sorted(key for key in keys if not may_be_new(loaded, key))
        if unfilled:
            raise PartialLoraError(
                f"model={model.name}: {unfilled[0]} is {problem} in {model.weights} ({len(unfilled)} such weights); "
                "model.architecture and model.model_args must be those of the weights"
            )
    return loaded


def check_architecture(expected: str, actual: str, weights: str) -> None:
    """Raise PartialLoraError where the weights do not have the architecture for which parameters are counted."""
    if actual != expected:
        raise PartialLoraError(
            f"model.architecture={expected}: {weights} is a {actual}; set that, so that "
            "parameters are counted for the model that trains"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep bars off the screen, and warnings: of a head that is meant to be new, and of names that others deprecate."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Draw from a fixed seed inside the block, and leave torch's global CPU generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed the accelerators too
        yield


AUTO = {  # by family of transformers' own models: the class that knows a model's class, and its models in words
    "image": ("AutoModelForImageClassification", "classifier of images"),
    "encoder": ("AutoModelForSequenceClassification", "classifier of sequences"),
    "causal": ("AutoModelForCausalLM", "causal language model"),
}


def auto_of(family: str) -> type:
    """Return the class of transformers that knows the class of a model of a family."""
    return getattr(transformers, AUTO[family][0])


def classes_of(family: str, config: PretrainedConfig) -> tuple[type, ...]:
    """Return the classes of transformers for models of a family with a config; none where it does not know any."""
    classes = auto_of(family)._model_mapping.get(type(config), ())
    return classes if isinstance(classes, tuple) else (classes,)


@dataclass(frozen=True)
class Geometry:
    """Shape of one of transformers' own models: `info` counts by it without a download, and weights must fit it.

    Args:
        family: a key of AUTO.
        architecture: transformers' model_type.
        model_args: keys of that type's config.
        head: further keys, those of a new head; {} where there is none.
    """

    family: str
    architecture: str
    model_args: Mapping[str, object]
    head: Mapping[str, object]

    @property
    def auto(self) -> type:
        return auto_of(self.family)

    def config(self) -> PretrainedConfig:
        """Return a new config. Raises PartialLoraError for a type or a key that transformers does not know."""
        try:
            default = AutoConfig.for_model(self.architecture)
        except ValueError as error:
            raise PartialLoraError(
                f"model.architecture={self.architecture}: transformers has no such model_type (bert, llama, …)"
            ) from error
        if not classes_of(self.family, default):
            raise PartialLoraError(
                f"model.architecture={self.architecture}: transformers has no {AUTO[self.family][1]} of that type"
            )
        for key in self.model_args:
            if not takes(default, self.built(default), key):
                raise PartialLoraError(f"model.model_args.{key}: {self.architecture} takes none of that name")
        try:
            return self._named(AutoConfig.for_model(self.architecture, **self.model_args, **self.head))
        except (ValueError, TypeError, LookupError, AssertionError, AttributeError, StrictDataclassError) as error:
            raise self._impossible(error) from error

    def built(self, config: PretrainedConfig) -> type:
        """Return the class of the models of a config; the first where transformers has several."""
        return classes_of(self.family, config)[0]

    def _named(self, config: PretrainedConfig) -> PretrainedConfig:
        """Return a config that names its model's class, by which transformers chooses among several."""
        config.architectures = [self.built(config).__name__]
        return config

    def empty(self) -> PreTrainedModel:
        """Return the model on the meta device: shapes without weights or memory. Raises as `config`."""
        config = self.config()
        try:
            with torch.device("meta"):
                return self.auto.from_config(config)
        except (ValueError, TypeError, RuntimeError, LookupError, AssertionError, ArithmeticError) as error:
            raise self._impossible(error) from error

    def check_attention(self, implementation: str) -> None:
        """Raise PartialLoraError where the class, or this machine, cannot compute attention that way."""
        config = self.config()
        try:
            with torch.device("meta"):
                self.auto.from_config(config, attn_implementation=implementation)
        except (ValueError, ImportError) as error:
            raise PartialLoraError(
                f"model.attn_implementation={implementation}: {config.model_type} cannot be computed that way "
                f"({one_line(error)}); null leaves it to transformers"
            ) from error

    def config_in(self, folder: Path, weights: str) -> PretrainedConfig:
        """Read the config beside the weights in a folder; raises PartialLoraError where it is of another geometry."""
        try:
            with quiet():
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **self.head)
        except (OSError, ValueError, StrictDataclassError) as error:
            raise PartialLoraError(
                f"model.weights={weights}: expected a config.json that transformers knows ({one_line(error)})"
            ) from error
        check_architecture(self.architecture, config.model_type, weights)
        config = self._named(config)
        counted = self.empty().config
        for key in self.model_args:
            expected, value = value_in(counted, key), value_in(config, key)
            if value != expected:
                raise PartialLoraError(
                    f"model.model_args.{key}={expected}: {weights} has {value}; set that, so that parameters are "
                    "counted for the model that trains"
                )
        return config

    def _impossible(self, error: Exception) -> PartialLoraError:
        return PartialLoraError(
            f"model.model_args={dict(self.model_args)}: no geometry of {self.architecture} ({one_line(error)})"
        )


def takes(default: PretrainedConfig, model_class: type, key: str) -> bool:
    """Return whether a key is one of a config's class, whose `default` is given, or is asked for by the model's class.

    DeBERTa, for one, asks its config for keys that the config's class does not list.
    """
    return (
        key in default.to_dict()
        or hasattr(default, key)
        or f'"{key}"' in inspect.getsource(sys.modules[model_class.__module__])
    )


def head_config(labels: Sequence[str], name: str) -> dict[str, object]:
    """Return the keys of a config for a head: one output for each label, or one real number where there are none."""
    if not labels:
        return {"num_labels": 1, "problem_type": "regression"}
    if len(labels) < 2:
        raise PartialLoraError(f"model={name}: expected at least two labels to tell apart, got {list(labels)}")
    return {
        "num_labels": len(labels),
        "problem_type": None,  # transformers then infers it from the labels; the weights may have had another
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def draw_head(head: nn.Linear, std: float) -> None:
    """Draw new weights from torch's global generator, as transformers does; the same ones in every dtype."""
    with torch.no_grad():
        head.weight.copy_(nn.init.normal_(torch.empty(head.weight.shape, dtype=torch.float32), std=std))
        if head.bias is not None:
            head.bias.zero_()


def in_full_precision(module: nn.Module) -> None:
    """Convert a module that trains whole, and its inputs, to float32: steps are too small for 16 bits."""
    if any(parameter.dtype != torch.float32 for parameter in module.parameters()):
        module.float().register_forward_pre_hook(_float_inputs)


def _float_inputs(module: nn.Module, inputs: tuple) -> tuple:
    return tuple(value.float() if isinstance(value, Tensor) else value for value in inputs)
