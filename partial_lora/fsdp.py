"""A run whose parameters, gradients and optimizer state are shared out over its processes (FSDP2, by accelerate).

accelerate takes what it is asked for from the environment, where `accelerate launch` puts what a file of `accelerate
config` says; what the run itself asks for (trainer.strategy=fsdp) goes the same way.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn, optim
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer

from partial_lora.adapter.sharding import is_sharded, sharded_like, whole

logger = logging.getLogger(__name__)

_TRAINED = "trained.safetensors"
_ASKED = "ACCELERATE_USE_FSDP"
_DEFAULTS = {
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def ask(strategy: str) -> bool:
    """Ask accelerate for FSDP2 if the strategy is "fsdp" or a file of `accelerate config` says so; gives whether it is.

    Call it before the process joins its world and before a model is loaded: calibration needs whole weights everywhere.
    """
    if strategy != "fsdp" and os.environ.get(_ASKED, "false").lower() != "true":
        return False
    os.environ[_ASKED] = "true"
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # it would load weights in the first process alone
    return True


def name_blocks(model: nn.Module, blocks: str | None) -> None:
    """Tell accelerate what is gathered and let go as one: the classes in the sequence `blocks` of the model.

    Without one, those that transformers says are never split, or else the whole model. A file's own choice stands.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if blocks:
        names = sorted({type(block).__name__ for block in base.get_submodule(blocks).children()})
    else:
        here = {type(module).__name__ for module in base.modules()}
        names = sorted(here & set(getattr(base, "_no_split_modules", None) or ()))
    logger.info("parameters are shared out over the processes, %s", " and ".join(names) or "the whole model as one")
    if names:
        os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(names))
    elif "FSDP_TRANSFORMER_CLS_TO_WRAP" not in os.environ:
        os.environ["FSDP_AUTO_WRAP_POLICY"] = "NO_WRAP"


def allow_on_cpu() -> None:
    """Let accelerate share out a model on CPUs, for which it otherwise takes DistributedDataParallel and says nothing.

    It looks at the kind of world that this process is in. The device stays what it is.
    """
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def reduce_in_float32(trainer: Trainer) -> None:
    """Let gradients be summed over processes in float32, as without FSDP, whatever is computed in."""
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)


class CheckpointsOfParts(Trainer):
    """Trainer that keeps in a checkpoint, and takes from it, what trains, whole, where the model is shared out.

    Its own way there gathers the frozen weights, too, or else misses the checkpoint that is being saved when it looks
    for the best one; and it does not know masked factors, whose state dict has other names than their parameters.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        values = trained_values(self.model)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(values, folder / _TRAINED)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        set_trained_values(self.model, load_file(Path(resume_from_checkpoint) / _TRAINED))

    def _load_best_model(self) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_best_model()
        set_trained_values(self.model, load_file(Path(self.state.best_model_checkpoint) / _TRAINED))


def is_shared_out(model: nn.Module) -> bool:
    """Whether this process holds parts of the model's parameters alone, and so cannot compute without its peers."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def adapter_state(model: nn.Module) -> dict[str, Tensor] | None:
    """A state dict of what trains and of buffers, whole, for `save_pretrained`; None where the model itself has it.

    All processes have to ask for it together, and all get it.
    """
    if not is_shared_out(model) or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return None  # ZeRO's stage 3 gathers what is asked of it
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True))


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, whole and on the CPU, by the names that the model gives them.

    All processes have to ask for it together, and all get it.
    """
    return {
        name: whole(parameter).detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def set_trained_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put `trained_values` back, into a model that may be shared out or not. Raises KeyError for one that lacks."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(sharded_like(parameter, values[name].to(parameter.device, parameter.dtype)))


def optimizer_values(optimizer: optim.Optimizer) -> dict:
    """An optimizer's state dict, whole and on the CPU. All processes have to ask for it together, and all get it."""
    state = optimizer.state_dict()
    return state | {
        "state": {
            place: {name: _whole_on_cpu(value) for name, value in entry.items()}
            for place, entry in state["state"].items()
        }
    }


def set_optimizer_values(optimizer: optim.Optimizer, values: Mapping) -> None:
    """Put `optimizer_values` back, into an optimizer of parameters that may be shared out or not."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = [place for group in values["param_groups"] for place in group["params"]]
    of_place = dict(zip(places, parameters, strict=True))
    state = {
        place: {name: _as_of(of_place[place], value) for name, value in entry.items()}
        for place, entry in values["state"].items()
    }
    optimizer.load_state_dict({**values, "state": state})


def _whole_on_cpu(value: object) -> object:
    return whole(value).detach().cpu().clone() if isinstance(value, Tensor) else value


def _as_of(parameter: Tensor, value: object) -> object:
    """A whole value of one entry of a parameter's state, spread as the parameter is if it has its shape."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return sharded_like(parameter, value.to(parameter.device))
