"""Checkpoints: all that a training needs to resume as if nothing had ended it, and nothing of what is frozen.

A checkpoint is a sealed folder `checkpoint-STEP` (`files.seal`): Trainer's state of optimizer, schedule, random numbers
and history, the trainable parameters by name, and what this run adds to them (`CheckpointState`). A checkpoint that is
not whole is never used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from partial_lora.adapter.sharding import sharded_like, whole
from partial_lora.files import fault, read_json, written

STATE = "trainer_state.json"
_LARGE = 2**30  # bytes of one: it logs all steps
TRAINABLE = "trainable.safetensors"
_PROGRESS = "progress.json"
_NAME = re.compile(r"checkpoint-(\d+)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointState:
    """Part of a checkpoint beside Trainer's own state.

    losses: the sum of each process's losses over all steps. seconds: of training so far, in all attempts. versions: of
    the libraries that computed it; other versions may compute something else. shape: what trains and under which masks
    (`shape_of`).
    """

    losses: list[float]
    seconds: float
    versions: dict[str, str]
    shape: str

    def save(self, checkpoint: Path) -> None:
        (checkpoint / _PROGRESS).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, checkpoint: Path) -> CheckpointState:
        return cls(**read_json(checkpoint / _PROGRESS))


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter that trains, by name, whole and on the CPU.

    Where parameters are sharded over processes (FSDP), all processes have to call it.
    """
    return {name: whole(value).detach().cpu() for name, value in model.named_parameters() if value.requires_grad}


def shape_of(model: nn.Module) -> str:
    """Return a digest of what trains: the names and shapes of the parameters, and the indices that masks keep."""
    trains = [(name, list(value.shape)) for name, value in model.named_parameters() if value.requires_grad]
    masks = [(name, module.mask.digest) for name, module in model.named_modules() if hasattr(module, "mask")]
    return hashlib.sha256(json.dumps([trains, masks]).encode()).hexdigest()


def save_trainable(model: nn.Module, checkpoint: Path, *, writes: bool) -> None:
    """Write what trains into a folder. All processes call it, and the one with `writes` writes."""
    values = trainable(model)
    if writes:
        checkpoint.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in values.items()}, checkpoint / TRAINABLE)


def load_trainable(model: nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint's parameters into the model; raises ValueError where the model trains others."""
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    saved = load_file(checkpoint / TRAINABLE)
    if saved.keys() != parameters.keys():
        differing = min(saved.keys() ^ parameters.keys())
        raise ValueError(f"{checkpoint}: holds other parameters than those that train here, such as {differing}")
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(sharded_like(value, saved[name].to(value.device, value.dtype)))


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step after which a checkpoint was made."""
    return int(_NAME.fullmatch(checkpoint.name)[1])


def resumable(folder: Path, versions: dict[str, str], shape: str) -> Path | None:
    """Return the newest checkpoint that a training can resume from, or None.

    It is whole, was computed by these versions of the libraries and holds what trains here (`shape_of`). The same is
    true of the best checkpoint so far, with which the training may end. Any other is named in the log and set aside as
    `NAME.broken`, and what is half-written is removed.
    """
    usable = {}
    for path in _checkpoints(folder):
        reason = fault(path) or _difference(path, versions, shape)
        if reason:
            logger.warning("%s: cannot resume from it (%s): set aside", path, reason)
            _set_aside(path)
        else:
            usable[step_of(path)] = path
    for path in folder.glob(".*"):
        shutil.rmtree(path, ignore_errors=True)
    for step in sorted(usable, reverse=True):
        best = read_json(usable[step] / STATE, _LARGE)["best_global_step"]
        if best is None or best in usable:
            return usable[step]
        logger.warning("%s: step %d, the best so far, is gone: set aside", usable[step], best)
        _set_aside(usable[step])
    return None


def rotate(folder: Path, *, best: int | None, limit: int) -> None:
    """Remove all checkpoints but the newest `limit` and the best one."""
    for path in sorted(_checkpoints(folder), key=step_of)[:-limit]:
        if step_of(path) != best:
            shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]


def _difference(checkpoint: Path, versions: dict[str, str], shape: str) -> str | None:
    """Return the reason why a whole checkpoint would not continue this training, or None."""
    try:
        progress = CheckpointState.load(checkpoint)
    except TypeError as error:
        return f"{_PROGRESS} is that of another version: {error}"
    if progress.shape != shape:
        return "other parameters train, or under other masks"
    for name in sorted(progress.versions.keys() | versions.keys()):
        before, now = progress.versions.get(name), versions.get(name)
        if before != now:
            return f"computed by {name} {before}, this is {now}"
    return None


def _set_aside(checkpoint: Path) -> None:
    aside = checkpoint.with_name(f"{checkpoint.name}.broken")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def named_on_error(path: Path) -> AbstractContextManager[None]:
    """End the run in one line that names a checkpoint or an adapter which cannot be written."""
    return written(path, "make room there and run the command again; it goes on from the last checkpoint")
