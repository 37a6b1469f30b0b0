"""What happens beside training: progress is told, and a run that is to end, or whose loss is no number, is ended."""

from __future__ import annotations

import logging
import math
import signal
import time

import torch
from torch import distributed, nn
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


class LogAtSave(TrainerCallback):
    """Logs the loss wherever a checkpoint is made: what is not logged by then is lost to whoever goes on from it."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = control.should_log or control.should_save

    on_epoch_end = on_step_end


class StopOnRequest(TrainerCallback):
    """Ends training after the step it is at, with a checkpoint, once a signal asks for that.

    In the last step of an epoch whose end has a look at validation, that comes first: who goes on begins with the next
    epoch. Between steps, while validation is measured or a checkpoint made, a signal ends the process as it would have
    without this, and the last checkpoint is whole; but nothing disturbs the checkpoint of a stop. Several processes
    stop after the same step.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: int | None = None
        self._stepping, self._stopped, self._amid_epoch = False, False, False
        self._before: dict[int, object] = {}
        self._group = None

    def on_train_begin(self, args, state, control, **kwargs):
        if distributed.is_initialized():
            self._group = distributed.new_group(backend="gloo")  # a flag on the CPU: no accelerator has to wait for it
        self._before = {number: signal.signal(number, self._hear) for number in self._SIGNALS}

    def on_step_begin(self, args, state, control, **kwargs):
        self._stepping = True

    def on_step_end(self, args, state, control, **kwargs):
        if self._asked():
            control.should_training_stop = self._stopped = True
            self._amid_epoch = not float(state.epoch).is_integer()
            control.should_save = control.should_save or self._amid_epoch or args.save_strategy != "epoch"
        self._stepping = not (control.should_evaluate or control.should_save)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._stopped and self._amid_epoch:  # Trainer takes this for the end of an epoch
            control.should_evaluate = control.should_save = control.should_log = False
        self._stepping = self._stepping and not (control.should_evaluate or control.should_save)

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._stopped:
            raise SystemExit(128 + (self.received or signal.SIGTERM))

    def _hear(self, number: int, frame: object) -> None:
        if self._stopped:  # the parent reminds
            return
        self.received = number
        if not self._stepping:
            self._before[number](number, frame)

    def _asked(self) -> bool:
        """Whether any process has been asked to stop."""
        if self._group is None:
            return self.received is not None
        flag = torch.tensor([self.received is not None], dtype=torch.int32)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)
