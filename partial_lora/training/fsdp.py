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
from torch import Tensor, nn, optim
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from partial_lora.adapter.factor import is_sharded, sharded_like, whole

logger = logging.getLogger(__name__)

_ASKED = "ACCELERATE_USE_FSDP"
_DEFAULTS = {
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
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
    """Trainer whose checkpoints of a model that is shared out are those of a whole one, and take its place.

    Its own way there gathers the frozen weights, too, or else misses the checkpoint that is being saved when it looks
    for the best one; and it does not know masked factors, whose state dict has other names than their parameters.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir)
        self.accelerator.wait_for_everyone()  # the others then look for it

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        let_go(self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        let_go(self.model)
        super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        values = optimizer_values(self.optimizer)
        if self.args.should_save:
            torch.save(values, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        values, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        set_optimizer_values(self.optimizer, values)
        self.lr_scheduler.load_state_dict(schedule)


def is_shared_out(model: nn.Module) -> bool:
    """Whether this process holds parts of the model's parameters alone, and so cannot compute without its peers."""
    return isinstance(model, FSDPModule) or any(is_sharded(parameter) for parameter in model.parameters())


def let_go(model: nn.Module) -> None:
    """Let this process hold its parts alone again: after a forward pass it still has some parameters whole.

    Those are copies. What is written into them is lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def adapter_state(model: nn.Module) -> dict[str, Tensor] | None:
    """A state dict of what trains and of buffers, whole, for `save_pretrained`; None where the model itself has it.

    All processes have to ask for it together, and all get it.
    """
    if not is_shared_out(model) or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return None  # ZeRO's stage 3 gathers what is asked of it
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True))


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
