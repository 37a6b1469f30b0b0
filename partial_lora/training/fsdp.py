"""FSDP2 by accelerate: parameters, gradients and optimizer state sharded over the processes of a run.

accelerate reads its settings from the environment, where `accelerate launch` puts those of a file of `accelerate
config`; the run's own (trainer.strategy=fsdp) go the same way.
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

from partial_lora.adapter.sharding import is_sharded, sharded_like, whole

logger = logging.getLogger(__name__)

_ENABLED = "ACCELERATE_USE_FSDP"
_DEFAULTS = {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def ask(strategy: str) -> bool:
    """Ask accelerate for FSDP2 if the strategy or a file of `accelerate config` is FSDP; return True if so.

    Call it before the process joins its world and before a model is loaded: calibration needs whole weights everywhere.
    """
    if strategy != "fsdp" and os.environ.get(_ENABLED, "false").lower() != "true":
        return False
    os.environ[_ENABLED] = "true"
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # it would load weights in the first process alone
    return True


def name_blocks(model: nn.Module, blocks: str | None) -> None:
    """Name to accelerate the classes whose modules are gathered as one: those in the model's sequence `blocks`.

    Without `blocks`, the classes that transformers never splits, or else the whole model. A file's own choice stands.
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
    """Let accelerate shard a model on CPUs, where it would otherwise fall back to DistributedDataParallel silently.

    accelerate decides by the type of the process's world alone; the device stays what it is.
    """
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def reduce_in_float32(trainer: Trainer) -> None:
    """Sum gradients over processes in float32, as without FSDP, whatever the precision of the computation."""
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)


class ShardedTrainer(Trainer):
    """Trainer whose checkpoints of a sharded model are those of a whole one, and can be exchanged with them.

    Trainer's own way gathers the frozen weights, too, or else misses the checkpoint that is being saved when it looks
    for the best one. Nor does it know masked factors, whose state dict has other names than their parameters.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir)
        self.accelerator.wait_for_everyone()  # the other processes then look for the checkpoint

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        values = optimizer_state(self.optimizer)
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
        load_optimizer_state(self.optimizer, values)
        self.lr_scheduler.load_state_dict(schedule)


def is_sharded_model(model: nn.Module) -> bool:
    """Return True where this process holds shards of the parameters, and so cannot compute without its peers."""
    return isinstance(model, FSDPModule) or any(is_sharded(parameter) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that a forward pass has left: copies, so that what is written into them is lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def adapter_state(model: nn.Module) -> dict[str, Tensor] | None:
    """Return a state dict of what trains and of buffers, whole, for `save_pretrained`; None where PEFT makes its own.

    All processes have to call it together, and all get it.
    """
    if not is_sharded_model(model) or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return None  # ZeRO's stage 3 gathers the parameters by itself
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True))


def optimizer_state(optimizer: optim.Optimizer) -> dict:
    """Return an optimizer's state dict, whole and on the CPU. All processes have to call it, and all get it."""
    state = optimizer.state_dict()
    return state | {
        "state": {
            place: {name: _whole_on_cpu(value) for name, value in entry.items()}
            for place, entry in state["state"].items()
        }
    }


def load_optimizer_state(optimizer: optim.Optimizer, values: Mapping) -> None:
    """Load an `optimizer_state` into an optimizer of parameters that may be sharded or not."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = [place for group in values["param_groups"] for place in group["params"]]
    of_place = dict(zip(places, parameters, strict=True))
    state = {
        place: {name: _sharded_as(of_place[place], value) for name, value in entry.items()}
        for place, entry in values["state"].items()
    }
    optimizer.load_state_dict({**values, "state": state})


def _sharded_as(parameter: Tensor, value: object) -> object:
    """Shard a whole value of a parameter's state as the parameter is sharded, if the two have one shape."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return sharded_like(parameter, value.to(parameter.device))


def _whole_on_cpu(value: object) -> object:
    return whole(value).detach().cpu().clone() if isinstance(value, Tensor) else value
