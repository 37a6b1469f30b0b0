"""Training of the kept entries and the head, by transformers' Trainer."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from partial_lora import progress
from partial_lora.errors import PartialLoraError

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
SETTINGS = (  # of the trainer group, as `trainer` takes them
    "epochs",
    "max_steps",
    "save_steps",
    "batch_size",
    "eval_batch_size",
    "learning_rate",
    "weight_decay",
    "warmup",
    "max_grad_norm",
    "num_workers",
)


class _Progress(TrainerCallback):
    """Tells the parent which step training or evaluation is at, and the log what Trainer measured."""

    def __init__(self) -> None:
        self._stage, self._batches = "evaluate", 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._stage = "validate"

    def on_train_end(self, args, state, control, **kwargs):
        self._stage = "evaluate"

    def on_step_end(self, args, state, control, **kwargs):
        loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
        progress.emit("train", state.global_step, state.max_steps, **({} if loss is None else {"loss": loss}))

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self._batches += 1
        progress.emit(self._stage, self._batches, len(eval_dataloader))
        if self._batches == len(eval_dataloader):
            self._batches = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, logs)


class _StopOnNonFinite(TrainerCallback):
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
        if not torch.isfinite(nn.utils.get_total_norm(gradients)):
            self._stop(state.global_step + 1, optimizer.param_groups[0]["lr"])

    def _stop(self, step: int, learning_rate: float) -> None:
        raise PartialLoraError(
            f"the loss is not finite at step {step} with learning rate {learning_rate:.3g}: "
            "lower trainer.learning_rate, or set trainer.mixed_precision=no"
        )


class _Trainer(Trainer):
    """Trainer whose optimizer steps all have the same number of examples, however many processes share them.

    The last rows of an epoch that fill no batch are left out of it (other ones every epoch); otherwise several
    processes, which share a short batch unevenly, would compute something else than one. Evaluation leaves none out.
    """

    def get_train_dataloader(self):
        whole = len(self.train_dataset) >= self.args.train_batch_size * self.args.world_size
        self.args.dataloader_drop_last = whole
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = False


def mixed_precision(requested: str, device: str) -> str:
    """The number format that training computes in: "no", "bf16" or "fp16".

    "auto" is bf16 where the hardware is made for it: accelerators that compute it natively, processors with AMX. With
    AVX512-BF16 alone a step was 1.6 to 1.7 times slower than in fp32 (scripts/precision.py).
    """
    if requested != "auto":
        return requested
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "no"


def trainer(
    model: nn.Module,
    *,
    train: Dataset,
    validation: Dataset,
    directory: Path,
    metrics: Callable,
    primary: str,
    device: str,
    precision: str,
    world_size: int,
    seed: int,
    epochs: float,
    max_steps: int | None,
    save_steps: int | None,
    batch_size: int,
    eval_batch_size: int,
    learning_rate: float,
    weight_decay: float,
    warmup: float,
    max_grad_norm: float,
    num_workers: int,
) -> Trainer:
    """A Trainer whose `train()` ends with the checkpoint that did best on validation.

    AdamW, a cosine schedule after linear warm-up, gradients clipped to `max_grad_norm`. `batch_size` counts the
    examples of one optimizer step over all processes. Validation is measured and a checkpoint kept every `save_steps`
    steps, or every epoch. Data have the columns pixel_values and labels.
    """
    if batch_size % world_size:
        raise PartialLoraError(
            f"trainer.batch_size={batch_size}: expected a multiple of the {world_size} processes, one an accelerator; "
            "set it or trainer.num_processes"
        )
    steps_per_epoch = max(1, len(train) // batch_size)
    total_steps = max_steps or max(1, int(epochs * steps_per_epoch))
    # A short run still needs one look at validation, at its end.
    strategy = "epoch" if save_steps is None and max_steps is None else "steps"
    steps = min(save_steps or steps_per_epoch, total_steps)
    arguments = TrainingArguments(
        output_dir=str(directory / CHECKPOINTS),
        use_cpu=device == "cpu",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        seed=seed,
        data_seed=seed,
        num_train_epochs=epochs,
        max_steps=max_steps or -1,
        per_device_train_batch_size=batch_size // world_size,
        per_device_eval_batch_size=eval_batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=warmup,  # below 1, a share of the steps
        max_grad_norm=max_grad_norm,
        eval_strategy=strategy,
        save_strategy=strategy,
        eval_steps=steps,
        save_steps=steps,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=primary,
        greater_is_better=True,
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=num_workers,
        dataloader_pin_memory=device == "cuda",
        ddp_find_unused_parameters=False,
    )
    fit = _Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=metrics,
        callbacks=[_Progress(), _StopOnNonFinite()],
    )
    fit.remove_callback(PrinterCallback)
    fit.remove_callback(ProgressCallback)
    return fit


def remove_checkpoints(directory: Path) -> None:
    """Drop the optimizer states and intermediate adapters of a run that has ended well."""
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
