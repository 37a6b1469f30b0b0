"""What happens beside training: progress is told, and a run whose loss is no number is ended."""

from __future__ import annotations

import logging
import math
import time

import torch
from torch import nn
from transformers import TrainerCallback

from partial_lora import progress
from partial_lora.adapter.sharding import whole
from partial_lora.errors import PartialLoraError

logger = logging.getLogger(__name__)


class Progress(TrainerCallback):
    """Tells the parent which step training or evaluation is at, and the log what Trainer measured."""

    def __init__(self) -> None:
        self._stage, self._batches = "evaluate", 0
        self._began, self._tokens = 0.0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._stage = "validate"
        self._began, self._tokens = time.monotonic(), state.num_input_tokens_seen

    def on_train_end(self, args, state, control, **kwargs):
        self._stage = "evaluate"

    def on_step_end(self, args, state, control, **kwargs):
        loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
        detail = {} if loss is None else {"loss": loss}
        if state.num_input_tokens_seen > self._tokens:
            detail["tokens_per_second"] = self._rate(state.num_input_tokens_seen)
        progress.emit("train", state.global_step, state.max_steps, **detail)

    def _rate(self, seen: int) -> float:
        """Tokens a second since training began, looks at validation and checkpoints included."""
        return (seen - self._tokens) / max(time.monotonic() - self._began, 1e-9)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self._batches += 1
        progress.emit(self._stage, self._batches, len(eval_dataloader))
        if self._batches == len(eval_dataloader):
            self._batches = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, logs)


class StopOnNonFinite(TrainerCallback):
    """Ends the run before a step whose gradient is not finite, so that parameters and checkpoints stay good.

    In fp16 such a step is routine, and skipped by the gradient scaler; there only a loss that is not finite ends it.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            self._stop(state.global_step, logs.get("learning_rate", args.learning_rate))

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if args.fp16:
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not torch.isfinite(whole(nn.utils.get_total_norm(gradients))):
            self._stop(state.global_step + 1, optimizer.param_groups[0]["lr"])

    def _stop(self, step: int, learning_rate: float) -> None:
        raise PartialLoraError(
            f"the loss is not finite at step {step} with learning rate {learning_rate:.3g}: "
            "lower trainer.learning_rate, or set trainer.mixed_precision=no"
        )
