"""Checkpoints: all that a training needs to go on as if nothing had ended it, and nothing of what is frozen.

A checkpoint is a sealed folder `checkpoint-STEP` (sealed.py): Trainer's state of optimizer, schedule, random numbers
and history, the trainable parameters by name, and what this run adds to them (`Progress`). One that is not whole is
never used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from partial_lora.adapter.factor import sharded_like, whole
from partial_lora.files import fault

TRAINABLE = "trainable.safetensors"
_PROGRESS = "progress.json"
STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """What a checkpoint adds to Trainer's own state.

    losses: the sum of every process's losses so far, one number for each step. seconds: of training so far, in all
    attempts. versions: of the libraries that computed it; other ones may compute something else. shape: what trains and
    under which masks (`shape_of`).
    """

    losses: list[float]
    seconds: float
    versions: dict[str, str]
    shape: str

    def save(self, checkpoint: Path) -> None:
        (checkpoint / _PROGRESS).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, checkpoint: Path) -> Progress:
        return cls(**json.loads((checkpoint / _PROGRESS).read_text(encoding="utf-8")))


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that trains, by name, whole and on the CPU.

    Where parameters are shared out over processes (FSDP), all of these have to call it.
    """
    return {name: whole(value).detach().cpu() for name, value in model.named_parameters() if value.requires_grad}


def shape_of(model: nn.Module) -> str:
    """A digest of what trains: the names and shapes of the parameters, and the indices that masks keep."""
    trains = [(name, list(value.shape)) for name, value in model.named_parameters() if value.requires_grad]
    masks = [(name, module.mask.digest) for name, module in model.named_modules() if hasattr(module, "mask")]
    return hashlib.sha256(json.dumps([trains, masks]).encode()).hexdigest()


def save_trainable(model: nn.Module, checkpoint: Path, *, writes: bool) -> None:
    """Write what trains into a folder; `writes` in one process alone."""
    values = trainable(model)
    if writes:
        checkpoint.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in values.items()}, checkpoint / TRAINABLE)


def load_trainable(model: nn.Module, checkpoint: Path) -> None:
    """Put what a checkpoint holds into the model; raises ValueError where it holds other parameters than train."""
    own = {name: value for name, value in model.named_parameters() if value.requires_grad}
    saved = load_file(checkpoint / TRAINABLE)
    if saved.keys() != own.keys():
        raise ValueError(f"{checkpoint}: holds other parameters than train, such as {min(saved.keys() ^ own.keys())}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(sharded_like(value, saved[name].to(value.device, value.dtype)))


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was made."""
    return int(_NAME.fullmatch(checkpoint.name)[1])


def resumable(folder: Path, versions: dict[str, str], shape: str) -> Path | None:
    """The newest checkpoint from which a training can go on; None where there is none.

    It is whole, was computed by these versions of the libraries, and holds what trains here (`shape_of`); and so is and
    does the one that has done best so far, which the training may end with. Any other is named in the log and set aside
    as `NAME.broken`, and what is half-written goes.
    """
    usable = {step_of(path): path for path in _found(folder) if _stands(path, versions, shape)}
    for path in folder.glob(".*"):
        shutil.rmtree(path, ignore_errors=True)
    for step in sorted(usable, reverse=True):
        best = _best_step(usable[step])
        if best is None or best in usable:
            return usable[step]
        logger.warning("%s: step %d, which had done best, is gone; going back further", usable[step], best)
        _set_aside(usable[step])
    return None


def rotate(folder: Path, *, best: int | None, limit: int) -> None:
    """Keep the newest `limit` checkpoints and the one that has done best."""
    found = sorted(_found(folder), key=step_of)
    for path in found[: max(0, len(found) - limit)]:
        if step_of(path) != best:
            shutil.rmtree(path)


def _found(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []


def _stands(checkpoint: Path, versions: dict[str, str], shape: str) -> bool:
    reason = fault(checkpoint) or _otherwise(Progress.load(checkpoint), versions, shape)
    if reason:
        logger.warning("%s cannot be gone on from (%s): set aside", checkpoint, reason)
        _set_aside(checkpoint)
    return not reason


def _otherwise(progress: Progress, now: dict[str, str], shape: str) -> str | None:
    before = progress.versions
    if progress.shape != shape:
        return "other parameters train, or under other masks"
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            return f"computed by {name} {before.get(name)}, this is {now.get(name)}"
    return None


def _best_step(checkpoint: Path) -> int | None:
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["best_global_step"]


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"{path.name}.broken")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
