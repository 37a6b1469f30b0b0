"""The settings of training: every key, its default and its range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Optional, get_type_hints

from partial_lora.errors import of_type, one_of, require
from partial_lora.files import at_home
from partial_lora.ranges import check
from partial_lora.training.trackers import TRACKERS

AUTO = "auto"  # in place of a learning rate
_USUAL_EPOCHS, _LEAST_STEPS = 5.0, 300  # a table of some hundred rows has not been learned after five passes

# Fields of TrainingArguments that a run sets itself, or by which it could not be resumed, compared or found again.
_INSTEAD = {
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup_ratio",
    "optim": "optimizer",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "dataloader_num_workers": "num_workers",
    "bf16": "mixed_precision",
    "fp16": "mixed_precision",
    "bf16_full_eval": "mixed_precision",  # the adapter would be saved as it was evaluated
    "fp16_full_eval": "mixed_precision",
    "use_cpu": "device",
    "report_to": "report_to",
}
OWN_ARGUMENTS = {
    *_INSTEAD,
    *("output_dir", "seed", "data_seed", "full_determinism", "load_best_model_at_end", "metric_for_best_model"),
    *("greater_is_better", "include_num_input_tokens_seen", "include_for_metrics", "batch_eval_metrics"),
    *("prediction_loss_only", "remove_unused_columns", "label_names", "label_smoothing_factor", "disable_tqdm"),
    *("run_name", "project", "ignore_data_skip", "restore_callback_states_from_checkpoint", "resume_from_checkpoint"),
    *("enable_jit_checkpoint", "auto_find_batch_size", "accelerator_config", "parallelism_config", "deepspeed"),
    *("dataloader_drop_last", "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_in_order"),
    *("train_sampling_strategy", "length_column_name", "ddp_find_unused_parameters", "local_rank"),
    *("average_tokens_across_devices", "activation_checkpointing", "activation_checkpointing_kwargs"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "use_cache"),
}
_OWN_PREFIXES = ("do_", "eval_", "fsdp", "hub_", "log", "push_to_hub", "save_", "trackio_")
_COUNT, _RATE = "[1, 2^31)", "(0, inf)"  # a larger count fits no tensor
_LARGEST_RATE = 1.0  # nothing can be learned at a larger one


@dataclass
class TrainerConfig:
    """The training of the kept entries and the head: its length, its optimizer and its machines."""

    # passes over the training rows; null: 5, or as many as make 300 steps
    epochs: Annotated[Optional[float], "(0, 2^31)"] = None
    max_steps: Annotated[Optional[int], _COUNT] = None  # number of optimizer steps, in place of epochs
    # steps between two checkpoints, each with a validation; null: one of each after every epoch
    save_steps: Annotated[Optional[int], _COUNT] = None
    save_total_limit: Annotated[int, _COUNT] = 1  # checkpoints to keep beside the best one
    # the latest checkpoint within so many standard errors of the best on validation; of a loss, or with 0, the best
    select_within: Annotated[float, "[0, inf)"] = 1.0
    # examples of one optimizer step, over all processes and accumulation steps
    batch_size: Annotated[int, _COUNT] = 16
    # parts in which each process computes its share of a batch, one after the other
    gradient_accumulation_steps: Annotated[int, _COUNT] = 1
    eval_batch_size: Annotated[int, _COUNT] = 64  # examples at once in evaluation and prediction
    # causal models: short texts of a batch share a row, so that less of it is padding; losses stay the same
    packing: bool = False
    # learning rate of the adapter; auto: by method, size, model and the number of steps
    learning_rate: Annotated[Any, float, _RATE, (AUTO,)] = AUTO
    # learning rate of the head and of model.new_modules; null: the adapter's, and beside auto dense LoRA's
    head_learning_rate: Annotated[Optional[float], _RATE] = None
    # LoRA+ (arXiv 2402.12354): the learning rate of B divided by that of A
    loraplus_ratio: Annotated[float, "(0, inf)"] = 1.0
    weight_decay: Annotated[float, "[0, inf)"] = 0.01  # weight decay of AdamW
    warmup_ratio: Annotated[float, "[0, 1)"] = 0.1  # share of the steps in which the learning rate rises
    # what it does after them, as transformers calls it: cosine or linear, it falls to 0; constant_with_warmup, it
    # stays; or another
    schedule: str = "cosine"
    optimizer: Optional[str] = None  # as transformers calls it: adafactor, lion_32bit, sgd, …; null: AdamW
    # training ends after so many validations in a row that were no better than the best; null: never before its end
    patience: Annotated[Optional[int], "[1, inf)"] = None
    # share of the steps after whose next validation a run is paused; the same command without it goes on from there
    until: Annotated[float, "(0, 1]"] = 1.0
    # further fields of transformers' TrainingArguments, {field: value}, such as {neftune_noise_alpha: 5}
    args: Annotated[Any, Optional[dict]] = None
    max_grad_norm: Annotated[float, "(0, inf)"] = 1.0  # gradients with a larger norm are scaled down to it
    # auto: bf16 on accelerators that compute it natively, else fp32; bf16; fp16; no
    mixed_precision: Annotated[str, ("auto", "no", "bf16", "fp16")] = "auto"
    device: Annotated[str, ("auto", "cpu", "cuda")] = "auto"  # where it trains
    # fresh: every run imports everything in a process of its own; fork: the runs of a sweep are forked from a process
    # that has imported everything; changes no result
    start: Annotated[str, ("fresh", "fork")] = "fresh"
    # processes on all machines together; null: one for every visible accelerator, 1 on a CPU
    num_processes: Annotated[Optional[int], _COUNT] = None
    num_machines: Annotated[int, _COUNT] = 1  # machines that share the run; each runs the same command
    machine_rank: Annotated[int, "[0, inf)"] = 0  # number of this machine; machine 0 has the run's directory
    main_process_ip: Optional[str] = None  # address of machine 0
    main_process_port: Annotated[int, "[1, 2^16)"] = 29500  # port of machine 0
    accelerate_config: Optional[str] = None  # a file of `accelerate config`; keys that you set here override it
    # processes that load data for each training process; null: some with an accelerator, else none
    num_workers: Annotated[Optional[int], "[0, inf)"] = None
    # ddp: every process has the whole model; fsdp: parameters, gradients and optimizer state are shared out
    strategy: Annotated[str, ("ddp", "fsdp")] = "ddp"
    # trackers to report to, beside the local history: tensorboard, mlflow, wandb, trackio
    report_to: Annotated[list[str], tuple(TRACKERS)] = field(default_factory=list)

    def passes(self, rows: int) -> float:
        """Return the passes over so many training rows."""
        if self.epochs is not None:
            return self.epochs
        return float(max(_USUAL_EPOCHS, math.ceil(_LEAST_STEPS / self.steps_of_epoch(rows))))

    def steps(self, rows: int) -> int:
        """Return the number of optimizer steps that so many training rows make."""
        return self.max_steps or math.ceil(self.passes(rows) * self.steps_of_epoch(rows))

    def steps_of_epoch(self, rows: int) -> int:
        """Return the steps of one pass; the last rows, which fill no batch, are left out."""
        return max(1, rows // self.batch_size)

    def longer(self, rows: int) -> str:
        """Return the setting that trains twice as long on so many rows."""
        steps = self.max_steps
        return f"trainer.max_steps={2 * steps}" if steps else f"trainer.epochs={2 * self.passes(rows):g}"

    @property
    def learning_rates(self) -> dict[str, Any]:
        """The learning rates by part: the adapter, and B and the head where they have their own."""
        if self.learning_rate == AUTO:
            return {"adapter": AUTO}
        rates = {"adapter": self.learning_rate}
        if self.loraplus_ratio != 1:
            rates["B"] = self.loraplus_ratio * self.learning_rate
        if self.head_learning_rate is not None:
            rates["head"] = self.head_learning_rate
        return rates

    @property
    def warnings(self) -> list[str]:
        """Warnings about the settings, a sentence each."""
        keys = {"adapter": "learning_rate", "B": "loraplus_ratio", "head": "head_learning_rate"}
        rates = self.learning_rates.items()
        large = {keys[part]: rate for part, rate in rates if rate != AUTO and rate > _LARGEST_RATE}
        unused = []
        if self.epochs is not None and self.max_steps is not None:
            unused = [f"trainer.epochs={self.epochs:g} has no effect beside trainer.max_steps={self.max_steps}"]
        return unused + [
            f"trainer.{key}: a rate of {rate:g}; AdamW moves every number by about as much in each step"
            for key, rate in large.items()
        ]

    @property
    def local_batch_size(self) -> int:
        """The examples that a process computes at once."""
        return max(1, self.batch_size // ((self.num_processes or 1) * self.gradient_accumulation_steps))

    def __post_init__(self) -> None:
        self.accelerate_config = at_home(self.accelerate_config)
        check(self, "trainer")
        if self.learning_rate != AUTO:
            self.learning_rate = float(self.learning_rate)
        if self.chooses_steps:
            self._check_names()
        processes, steps = self.num_processes or 1, self.gradient_accumulation_steps
        parts = processes * steps
        shared = f"a multiple of {parts}: trainer.num_processes={processes}"
        shared += f" times trainer.gradient_accumulation_steps={steps}" if steps > 1 else ""
        require(self.batch_size % parts == 0, "trainer.batch_size", self.batch_size, shared)
        if self.accelerate_config is None:  # such a file is checked together with these keys where a run starts
            self._check_machines()

    @property
    def chooses_steps(self) -> bool:
        """True where an optimizer, a schedule or arguments of transformers' are chosen; the defaults need no check."""
        return bool(self.args or self.optimizer or self.schedule != TrainerConfig.schedule)

    def _check_names(self) -> None:
        """Refuse names that transformers does not know, and arguments that a run sets itself."""
        from transformers import SchedulerType, TrainingArguments
        from transformers.training_args import OptimizerNames

        one_of("trainer.schedule", self.schedule, *(schedule.value for schedule in SchedulerType))
        one_of("trainer.optimizer", self.optimizer, None, *(optimizer.value for optimizer in OptimizerNames))
        args = {} if self.args is None else self.args
        require(isinstance(args, Mapping), "trainer.args", args, "{field: value}")
        arguments = {argument.name for argument in fields(TrainingArguments) if argument.init}
        for name in args:
            require(name in arguments, f"trainer.args.{name}", args[name], "a field of transformers' TrainingArguments")
            reserved = name in OWN_ARGUMENTS or name.startswith(_OWN_PREFIXES)
            instead = f"another key of trainer ({_INSTEAD[name]})" if name in _INSTEAD else "none of that name"
            require(not reserved, f"trainer.args.{name}", args[name], f"{instead}: a run sets it itself")
            of_type(f"trainer.args.{name}", args[name], get_type_hints(TrainingArguments)[name])

    def _check_machines(self) -> None:
        machines = self.num_machines
        expected = f"0 to {machines - 1}, for trainer.num_machines={machines}"
        require(0 <= self.machine_rank < machines, "trainer.machine_rank", self.machine_rank, expected)
        if machines > 1:
            address = self.main_process_ip
            require(address is not None, "trainer.main_process_ip", address, "the address of machine 0")
            expected = f"a multiple of trainer.num_machines={machines}: all processes of all machines"
            require((self.num_processes or 0) % machines == 0, "trainer.num_processes", self.num_processes, expected)
