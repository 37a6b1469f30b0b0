"""The settings of training: every key, its default and its range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Optional, get_type_hints

from partial_lora.errors import of_type, one_of, positive, require
from partial_lora.files import at_home
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
_MOST = 2**31  # of a count: what is larger fits no tensor
_LARGEST_RATE = 1.0  # nothing can be learned at a larger one


@dataclass
class TrainerConfig:
    """The training of the kept entries and the head: its length, its optimizer and its machines."""

    # passes over the training rows; null: 5, or as many as make 300 steps
    epochs: Optional[float] = None
    max_steps: Optional[int] = None  # number of optimizer steps, in place of epochs
    # steps between two checkpoints, each with a validation; null: one of each after every epoch
    save_steps: Optional[int] = None
    save_total_limit: int = 1  # checkpoints to keep beside the best one
    # the latest checkpoint within so many standard errors of the best on validation; of a loss, or with 0, the best
    select_within: float = 1.0
    batch_size: int = 16  # examples of one optimizer step, over all processes and accumulation steps
    # parts in which each process computes its share of a batch, one after the other
    gradient_accumulation_steps: int = 1
    eval_batch_size: int = 64  # examples at once in evaluation and prediction
    # causal models: short texts of a batch share a row, so that less of it is padding; losses stay the same
    packing: bool = False
    # learning rate of the adapter; auto: by method, size, model and the number of steps
    learning_rate: Any = AUTO
    # learning rate of the head and of model.new_modules; null: the adapter's, and beside auto dense LoRA's
    head_learning_rate: Optional[float] = None
    loraplus_ratio: float = 1.0  # LoRA+ (arXiv 2402.12354): the learning rate of B divided by that of A
    weight_decay: float = 0.01  # weight decay of AdamW
    warmup_ratio: float = 0.1  # share of the steps in which the learning rate rises
    # what it does after them, as transformers calls it: cosine or linear, it falls to 0; constant_with_warmup, it
    # stays; or another
    schedule: str = "cosine"
    optimizer: Optional[str] = None  # as transformers calls it: adafactor, lion_32bit, sgd, …; null: AdamW
    # training ends after so many validations in a row that were no better than the best; null: never before its end
    patience: Optional[int] = None
    # share of the steps after whose next validation a run is paused; the same command without it goes on from there
    until: float = 1.0
    # further fields of transformers' TrainingArguments, {field: value}, such as {neftune_noise_alpha: 5}
    args: Any = None
    max_grad_norm: float = 1.0  # gradients with a larger norm are scaled down to it
    mixed_precision: str = "auto"  # auto: bf16 on accelerators that compute it natively, else fp32; bf16; fp16; no
    device: str = "auto"  # auto, cpu or cuda
    # fresh: every run imports everything in a process of its own; fork: the runs of a sweep are forked from a process
    # that has imported everything; changes no result
    start: str = "fresh"
    # processes on all machines together; null: one for every visible accelerator, 1 on a CPU
    num_processes: Optional[int] = None
    num_machines: int = 1  # machines that share the run; each runs the same command
    machine_rank: int = 0  # number of this machine; machine 0 has the run's directory
    main_process_ip: Optional[str] = None  # address of machine 0
    main_process_port: int = 29500  # port of machine 0
    accelerate_config: Optional[str] = None  # a file of `accelerate config`; keys that you set here override it
    # processes that load data for each training process; null: some with an accelerator, else none
    num_workers: Optional[int] = None
    # ddp: every process has the whole model; fsdp: parameters, gradients and optimizer state are shared out
    strategy: str = "ddp"
    # trackers to report to, beside the local history: tensorboard, mlflow, wandb, trackio
    report_to: list[str] = field(default_factory=list)

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
        if self.epochs is not None:
            require(0 < self.epochs < _MOST, "trainer.epochs", self.epochs, "a number above 0 and below 2^31")
        counts = ("max_steps", "save_steps", "save_total_limit", "batch_size", "gradient_accumulation_steps")
        for key in (*counts, "eval_batch_size", "num_processes", "num_machines"):
            value = getattr(self, key)
            require(value is None or 1 <= value < _MOST, f"trainer.{key}", value, "at least 1 and below 2^31")
        if self.learning_rate != AUTO:
            if type(self.learning_rate) is int:  # isinstance would take true for one
                self.learning_rate = float(self.learning_rate)
            number = isinstance(self.learning_rate, float) and 0 < self.learning_rate < math.inf
            require(number, "trainer.learning_rate", self.learning_rate, "a number above 0, or auto")
        positive("trainer.loraplus_ratio", self.loraplus_ratio)
        if self.head_learning_rate is not None:
            positive("trainer.head_learning_rate", self.head_learning_rate)
        require(0 <= self.weight_decay < math.inf, "trainer.weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.select_within < math.inf, "trainer.select_within", self.select_within, "0 or more")
        require(0 <= self.warmup_ratio < 1, "trainer.warmup_ratio", self.warmup_ratio, "a share in [0, 1)")
        positive("trainer.max_grad_norm", self.max_grad_norm)
        require(0 < self.until <= 1, "trainer.until", self.until, "a share above 0 and at most 1")
        require(self.patience is None or self.patience >= 1, "trainer.patience", self.patience, "1 or more, or null")
        if self.chooses_steps:
            self._check_names()
        require((self.num_workers or 0) >= 0, "trainer.num_workers", self.num_workers, "0 or more, or null")
        one_of("trainer.mixed_precision", self.mixed_precision, "auto", "no", "bf16", "fp16")
        one_of("trainer.device", self.device, "auto", "cpu", "cuda")
        one_of("trainer.start", self.start, "fresh", "fork")
        one_of("trainer.strategy", self.strategy, "ddp", "fsdp")
        processes, steps = self.num_processes or 1, self.gradient_accumulation_steps
        parts = processes * steps
        shared = f"a multiple of {parts}: trainer.num_processes={processes}"
        shared += f" times trainer.gradient_accumulation_steps={steps}" if steps > 1 else ""
        require(self.batch_size % parts == 0, "trainer.batch_size", self.batch_size, shared)
        valid = set(self.report_to) <= set(TRACKERS)
        require(valid, "trainer.report_to", self.report_to, f"some of {', '.join(TRACKERS)}")
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
        machines, port = self.num_machines, self.main_process_port
        expected = f"0 to {machines - 1}, for trainer.num_machines={machines}"
        require(0 <= self.machine_rank < machines, "trainer.machine_rank", self.machine_rank, expected)
        require(0 < port < 2**16, "trainer.main_process_port", port, "a port, 1 to 65535")
        if machines > 1:
            address = self.main_process_ip
            require(address is not None, "trainer.main_process_ip", address, "the address of machine 0")
            expected = f"a multiple of trainer.num_machines={machines}: all processes of all machines"
            require((self.num_processes or 0) % machines == 0, "trainer.num_processes", self.num_processes, expected)
