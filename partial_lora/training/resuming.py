"""A Trainer that can be ended at any moment and goes on, in another process, as if it had not been."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import Trainer

from partial_lora.errors import PartialLoraError
from partial_lora.sealed import seal
from partial_lora.training import checkpoints


class ResumingTrainer(Trainer):
    """Trainer with checkpoints that are whole or absent, and hold what trains alone (checkpoints.py).

    versions: of the libraries that compute. keep: how many checkpoints are kept beside the best one.
    """

    def __init__(self, *, versions: Mapping[str, str], keep: int, **settings) -> None:
        super().__init__(**settings)
        self._versions, self._keep = dict(versions), keep
        self._losses = torch.zeros((), dtype=torch.float64, device=self.args.device)
        self._earlier, self._began = 0.0, time.perf_counter()
        self._place = Path(self.args.output_dir)

    @property
    def mean_loss(self) -> float:
        """The loss of this process over all steps, whichever attempt made them."""
        return self._losses.item() / max(self.state.global_step, 1)

    @property
    def seconds(self) -> float:
        """Wall seconds since training was first begun, those between attempts apart."""
        return self._earlier + time.perf_counter() - self._began

    def train(self, resume_from_checkpoint: Path | None = None):
        """Train; from a checkpoint (`checkpoints.resumable`) where there is one."""
        self._began = time.perf_counter()
        return super().train(resume_from_checkpoint and str(resume_from_checkpoint))

    def _run_epoch(self, **settings):
        """An epoch, or what is left of it: nothing after the last step, at which Trainer would make another one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**settings)

    def training_step(self, *arguments, **settings):
        loss = super().training_step(*arguments, **settings)
        self._losses += loss
        return loss

    def _get_output_dir(self, trial):
        return str(self._place)

    def _save_checkpoint(self, model, trial):
        """A checkpoint under another name, sealed, and only then under its own; older ones go after that."""
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._place = final.with_name(".saving")
        try:
            with _told(final):
                super()._save_checkpoint(model, trial)
                self._seal(self._place / final.name, final)
        finally:
            if self.args.should_save:
                shutil.rmtree(self._place, ignore_errors=True)
            self._place = final.parent

    def _seal(self, building: Path, final: Path) -> None:
        self._name_best()
        losses = self.accelerator.gather(self._losses).reshape(-1).tolist()
        self.accelerator.wait_for_everyone()  # every process has written its own random state
        if self.args.should_save:
            self.state.save_to_json(str(building / checkpoints.STATE))
            masks = checkpoints.shape_of(self.model)
            checkpoints.Progress(losses, self.seconds, self._versions, masks).save(building)
            if final.exists():  # of an attempt that went on from an earlier one; it goes once this one is there
                final.rename(self._place / "replaced")
            seal(building, final)
            checkpoints.rotate(final.parent, best=self.state.best_global_step, limit=self._keep)
        self.accelerator.wait_for_everyone()

    def _name_best(self) -> None:
        """Trainer's state names a folder, which is not where it was while it was being written."""
        best = self.state.best_global_step
        self.state.best_model_checkpoint = best and os.path.join(self.args.output_dir, f"checkpoint-{best}")

    def _save(self, output_dir=None, state_dict=None):
        checkpoints.save_trainable(self.model, Path(output_dir), writes=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        checkpoints.load_trainable(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self):
        checkpoints.load_trainable(self.model, Path(self.state.best_model_checkpoint))

    def _init_training_state(self, max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial):
        done = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        self._losses.zero_()
        if resume_from_checkpoint is not None:
            before = checkpoints.Progress.load(Path(resume_from_checkpoint))
            own = self.args.process_index
            alike = len(before.losses) == self.args.world_size
            self._losses += before.losses[own] if alike else sum(before.losses) / len(before.losses)
            self._earlier = before.seconds
            self._name_best()
        return done


@contextmanager
def _told(checkpoint: Path) -> Iterator[None]:
    """A checkpoint that cannot be written ends the run in one line that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    except RuntimeError as error:  # torch.save's own, which has no errno
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        reason = str(error).splitlines()[0]
    else:
        return
    raise PartialLoraError(
        f"{checkpoint} cannot be written ({reason}): make room there and run the command again, it goes on from "
        "the last checkpoint"
    )
