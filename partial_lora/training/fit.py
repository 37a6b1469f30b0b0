"""Training of the kept entries and the head, by transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from transformers import EvalPrediction, PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from partial_lora.errors import PartialLoraError
from partial_lora.runs import results
from partial_lora.tasks.metrics import LOWER_IS_BETTER
from partial_lora.training import fsdp
from partial_lora.training.by_length import ByLength
from partial_lora.training.callbacks import LogAtSave, Progress, StopOnNonFinite, StopOnRequest
from partial_lora.training.data_workers import Undisturbed, loading_processes
from partial_lora.training.resuming import ResumingTrainer

SETTINGS = (  # of the trainer group, as `trainer` takes them
    "epochs",
    "max_steps",
    "save_steps",
    "save_total_limit",
    "batch_size",
    "eval_batch_size",
    "learning_rate",
    "weight_decay",
    "warmup",
    "max_grad_norm",
    "num_workers",
    "gradient_accumulation_steps",
)


class _Trainer(fsdp.CheckpointsOfParts, ResumingTrainer):
    """Trainer whose optimizer steps all have the same number of examples, in however many parts they are computed.

    The last rows of an epoch that fill no batch are left out of it (other ones every epoch); otherwise several
    processes, which share a short batch unevenly, would compute something else than one, and so would several parts of
    a step. Evaluation leaves none out.
    """

    def __init__(self, *, length_grouped: bool, final_after: Callable[[int], int], **settings) -> None:
        super().__init__(**settings)
        self._length_grouped = length_grouped
        self._final_after = final_after

    @property
    def _batch_size(self) -> int:
        """The examples of one optimizer step."""
        return self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps

    def get_train_dataloader(self):
        self.args.dataloader_drop_last = len(self.train_dataset) >= self._batch_size
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = False

    def _get_train_sampler(self, train_dataset=None):
        """Texts of like length together, in batches of all processes: what one process alone would have drawn.

        Trainer's own setting for this would also bring the rows of an evaluation, and its predictions, out of order.
        """
        count = len(self.train_dataset)
        if self.args.gradient_accumulation_steps > 1:  # or the last parts of an epoch would be a step that lacks some
            count -= count % self._batch_size
        if not self._length_grouped:
            return RandomSampler(self.train_dataset, num_samples=count)
        self._by_length = ByLength(self._batch_size, list(self.train_dataset["length"]), self.args.data_seed, count)
        return self._by_length

    def _run_epoch(self, **settings):
        if self._length_grouped:  # behind what shares out batches and skips some, it does not hear of the epoch
            self._by_length.set_epoch(settings["epoch"])
        super()._run_epoch(**settings)

    def _determine_best_metric(self, metrics, trial):
        """Of checkpoints that select equally well, the one with the least loss.

        With few validation rows many are equal, and the first of them is one that has hardly been trained. One in which
        the method has not come to its final size is none to choose; the last always has, and is measured.
        """
        if self.state.global_step < self._final_after(self.state.max_steps):
            return False
        state, value = self.state, metrics[f"eval_{self.args.metric_for_best_model.removeprefix('eval_')}"]
        losses = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
        if value == state.best_metric and losses[state.global_step] < losses[state.best_global_step]:
            state.best_global_step = state.global_step
            return True
        return super()._determine_best_metric(metrics, trial)


def mixed_precision(requested: str, device: str) -> str:
    """Return the number format that training computes in: "no" (fp32), "bf16" or "fp16".

    "auto" is bf16 on an accelerator that computes it natively, and fp32 on every processor: a result must not depend on
    which one it is (docs/measured.md says what bf16 changes there).
    """
    if requested != "auto":
        return requested
    native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "no"


def trainer(
    model: nn.Module,
    *,
    train: Dataset,
    validation: Dataset,
    collate: Callable[[Sequence], dict[str, Tensor]],
    loss: Callable[..., Tensor],
    measure: Callable[[EvalPrediction], dict[str, float]],
    selects: str,
    directory: Path,
    device: str,
    precision: str,
    world_size: int,
    seed: int,
    epochs: float,
    max_steps: int | None,
    save_steps: int | None,
    versions: Mapping[str, str],
    batch_size: int,
    eval_batch_size: int,
    learning_rate: float,
    weight_decay: float,
    warmup: float,
    max_grad_norm: float,
    num_workers: int | None = None,
    save_total_limit: int = 1,
    length_grouped: bool = False,
    reduce: Callable[[Tensor, Tensor], Tensor] | None = None,
    reads_tokens: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    gradient_accumulation_steps: int = 1,
    sharded: bool = False,
    final_after: Callable[[int], int] = lambda steps: 0,
) -> ResumingTrainer:
    """A Trainer whose `train()` ends with the checkpoint that did best on validation.

    AdamW without decay of biases and norms, a cosine schedule after linear warm-up, gradients clipped to
    `max_grad_norm`. `batch_size` counts the examples of one optimizer step over all processes and the parts that each
    computes its share in (`gradient_accumulation_steps`). Validation is measured and a checkpoint kept every
    `save_steps` steps, or every epoch, `save_total_limit` beside the best; it goes on under the same `versions` of
    libraries alone. `selects`, one of the metrics that `measure` gives, says which did best, and of equals the loss;
    none before step `final_after(steps)` is chosen. `collate` makes a batch of rows, `loss` its loss, and
    `reduce(logits, labels)` what is kept of an evaluation's logits. Where `length_grouped`, rows have a column
    `length`, and those of like length are put in one batch. `reads_tokens`: tokens are counted, so that progress tells
    how many a second. `sharded`: parameters are shared out over the processes. `callbacks`: more.
    """
    parts = world_size * gradient_accumulation_steps
    times = f" times trainer.gradient_accumulation_steps={gradient_accumulation_steps}" if parts > world_size else ""
    if batch_size % parts:
        raise PartialLoraError(
            f"trainer.batch_size={batch_size}: expected a multiple of the {world_size} processes, one an accelerator"
            f"{times}; set it or trainer.num_processes"
        )
    if parts > 1 and len(train) < batch_size:  # which they would share unevenly
        raise PartialLoraError(
            f"trainer.batch_size={batch_size}: expected at most {len(train)}, the training rows, since {world_size} "
            f"processes{times} share each batch"
        )
    steps_per_epoch = max(1, len(train) // batch_size)
    total_steps = max_steps or max(1, int(epochs * steps_per_epoch))
    # A short run still needs one look at validation, at its end.
    strategy = "epoch" if save_steps is None and max_steps is None else "steps"
    steps = min(save_steps or steps_per_epoch, total_steps)
    arguments = TrainingArguments(
        output_dir=str(directory / results.CHECKPOINTS),
        use_cpu=device == "cpu",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        seed=seed,
        data_seed=seed,
        num_train_epochs=epochs,
        max_steps=max_steps or -1,
        per_device_train_batch_size=batch_size // parts,
        gradient_accumulation_steps=gradient_accumulation_steps,
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
        load_best_model_at_end=True,
        metric_for_best_model=selects,
        greater_is_better=selects not in LOWER_IS_BETTER,
        include_num_input_tokens_seen="non_padding" if reads_tokens else "no",
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=loading_processes(num_workers, device, world_size),
        dataloader_pin_memory=device == "cuda",
        ddp_find_unused_parameters=False,
    )
    if sharded and device == "cpu":
        fsdp.allow_on_cpu()
    fit = _Trainer(
        versions=versions,
        keep=save_total_limit,
        length_grouped=length_grouped,
        final_after=final_after,
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=Undisturbed(collate),
        compute_loss_func=loss,
        compute_metrics=measure,
        preprocess_logits_for_metrics=reduce,
        callbacks=[*callbacks, Progress(), StopOnNonFinite(), StopOnRequest(), LogAtSave()],
    )
    if sharded:
        fsdp.reduce_in_float32(fit)
    for own in (PrinterCallback, ProgressCallback):
        fit.remove_callback(own)
    return fit
