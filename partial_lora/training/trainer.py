"""Training of the kept entries and the head by transformers' Trainer, which can be ended at any moment and resumed."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from joblib import cpu_count
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.utils.data import RandomSampler, get_worker_info
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import is_liger_kernel_available

from partial_lora import progress, signals
from partial_lora.adapter.sharding import whole
from partial_lora.errors import PartialLoraError, UnfitPackageError, one_line
from partial_lora.files import seal
from partial_lora.methods.setting import Training
from partial_lora.models.modes import keep_statistics
from partial_lora.tasks.metrics import LOWER_IS_BETTER, standard_error
from partial_lora.tasks.task import Transform
from partial_lora.training import checkpoints, fsdp, offline_metrics
from partial_lora.training.config import TrainerConfig
from partial_lora.training.distributed import World
from partial_lora.training.fsdp import is_sharded_model
from partial_lora.training.objectives import Judge
from partial_lora.training.packing import packed

_MOST_WORKERS = 8  # that load data for one accelerator
# What is overridden below and in fsdp.py is not public. A transformers without one of these would train in another way.
OVERRIDDEN = (
    *("_run_epoch", "_init_training_state", "_get_train_sampler", "_get_learning_rate", "_determine_best_metric"),
    *("_get_output_dir", "_save", "_save_checkpoint", "_save_optimizer_and_scheduler"),
    *("_load_from_checkpoint", "_load_best_model", "_load_optimizer_and_scheduler"),
)
for _name in OVERRIDDEN:
    if not hasattr(Trainer, _name):
        raise UnfitPackageError(
            f"transformers {transformers.__version__} has no Trainer.{_name}: pip install 'transformers>=5.10.4,<6'"
        )

logger = logging.getLogger(__name__)


class ResumableTrainer(fsdp.ShardedTrainer):
    """Trainer that resumes, in another process too, as if it had never been ended.

    Checkpoints are whole or absent, and hold only what trains (checkpoints.py). All optimizer steps have the same
    number of examples, however many parts they are computed in: the last rows of an epoch that fill no batch are left
    out (other rows in every epoch). Otherwise several processes, which share a short batch unevenly, would compute
    something else than one process does, and so would several parts of a step. Evaluation leaves no row out.

    Args:
        config: the settings of training.
        versions: of the libraries that compute.
        length_grouped: True to put texts of like length in one batch.
        final_after: from the number of steps to the step after which the method has its final size.
        heads: the names of the modules that train whole, in the model that is adapted.
        reduce: makes something smaller of the logits and labels of texts (`Judge.reduce`), or None.
        settings: Trainer's.
    """

    def __init__(
        self,
        *,
        config: TrainerConfig,
        versions: Mapping[str, str],
        length_grouped: bool,
        final_after: Callable[[int], int],
        heads: Sequence[str],
        reduce: Callable[[Tensor, Tensor], Tensor] | None,
        **settings,
    ) -> None:
        super().__init__(**settings)
        self._config, self._versions, self._heads = config, dict(versions), list(heads)
        self._rates, self._reduce = config.learning_rates, reduce
        self._logged_rates: dict[str, float] = {}
        self._length_grouped, self._final_after = length_grouped, final_after
        self._losses = torch.zeros((), dtype=torch.float64, device=self.args.device)
        self._earlier_seconds, self._began = 0.0, time.perf_counter()
        self._checkpoint_parent = Path(self.args.output_dir)

    @property
    def mean_loss(self) -> float:
        """The mean loss of this process over the steps of all attempts."""
        return self._losses.item() / max(self.state.global_step, 1)

    @property
    def seconds(self) -> float:
        """Wall seconds of training in all attempts, without the time between them."""
        return self._earlier_seconds + time.perf_counter() - self._began

    def train(self, resume_from_checkpoint: Path | None = None):
        """Train, from a checkpoint (`checkpoints.resumable`) if there is one."""
        self._began = time.perf_counter()
        return super().train(resume_from_checkpoint and str(resume_from_checkpoint))

    def training_step(self, *arguments, **settings):
        loss = super().training_step(*arguments, **settings)
        self._losses += loss
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Predict a batch; texts in parts, of which only what they are reduced to is kept.

        A sharded model predicts whole batches: all of its processes have to compute equally often.
        """
        if self._reduce is None:
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return loss, logits[0] if isinstance(logits, tuple) else logits, labels  # an encoder's states come after
        outputs, labels = [], []
        for part in [inputs] if is_sharded_model(self.model) else offline_metrics.in_parts(inputs):
            _, logits, of_part = super().prediction_step(model, part, False, ignore_keys)
            outputs.append(self._reduce(logits, of_part))
            labels.append(of_part)
        likelihood, tokens = torch.cat(outputs).sum(0)
        return (-likelihood / tokens).float(), torch.cat(outputs), torch.cat(labels)

    def _run_epoch(self, **settings):
        if self._length_grouped:  # Trainer's own call does not reach through the wrappers that split and skip batches
            self._sampler.set_epoch(settings["epoch"])
        stopping = [rule for rule in self.callback_handler.callbacks if isinstance(rule, EarlyStoppingCallback)]
        impatient = any(rule.early_stopping_patience_counter >= rule.early_stopping_patience for rule in stopping)
        if impatient or self.state.global_step >= self.state.max_steps:  # resumed after the last step: else one more
            self.control.should_training_stop = True
            return
        super()._run_epoch(**settings)

    # Learning rates

    def create_optimizer(self, model=None):
        """Create Trainer's optimizer, its groups parted where B or the head has a learning rate of its own.

        PEFT's `create_loraplus_optimizer` has no rate for the head: the head's weight gets A's rate, and its bias, like
        all vectors, gets B's. Nor does it decay weights by Trainer's rules.
        """
        if self.optimizer is None:
            super().create_optimizer(model)
            if len(self._rates) > 1:
                self.optimizer.param_groups[:] = self._parted(self.model if model is None else model)
        return self.optimizer

    def _parted(self, model: nn.Module) -> list[dict]:
        """Return Trainer's groups by learning rate, the adapter's first: Trainer logs the rate of the first."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        parts = {id(value): "B" for name, value in model.named_parameters() if "lora_B" in name.split(".")}
        parts |= {id(value): "head" for name in self._heads for value in base.get_submodule(name).parameters()}
        parts = {key: part for key, part in parts.items() if part in self._rates}
        groups = [
            {**group, "params": weights, "lr": rate, "part": part}
            for part, rate in self._rates.items()
            for group in self.optimizer.param_groups
            if (weights := [value for value in group["params"] if parts.get(id(value), "adapter") == part])
        ]
        for part in self._rates.keys() - {group["part"] for group in groups} - {"adapter"}:
            raise PartialLoraError(f"{_KEYS[part]}: nothing that trains here has this learning rate; leave it out")
        return groups

    def _get_learning_rate(self):
        self._logged_rates = current_rates(self.optimizer)  # of the step, before the schedule goes on
        return super()._get_learning_rate()

    def log(self, logs, start_time=None):
        if "learning_rate" in logs:
            logs |= {name: rate for name, rate in self._logged_rates.items() if name not in logs}
        super().log(logs, start_time)

    # Batches

    @property
    def _step_size(self) -> int:
        """The examples of one optimizer step."""
        return self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps

    def get_train_dataloader(self):
        self.args.dataloader_drop_last = len(self.train_dataset) >= self._step_size
        collate, self.data_collator = self.data_collator, replace(self.data_collator, packs=self._config.packing)
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last, self.data_collator = False, collate

    def _get_train_sampler(self, train_dataset=None):
        """Draw texts of like length together, in batches of all processes, as one process alone would draw them.

        Trainer's own setting for this would also reorder the rows of an evaluation, and its predictions.
        """
        count = len(self.train_dataset)
        if self.args.gradient_accumulation_steps > 1:  # otherwise an epoch would end with a step that lacks some parts
            count -= count % self._step_size
        if not self._length_grouped:
            return RandomSampler(self.train_dataset, num_samples=count)
        lengths = list(self.train_dataset["length"])
        self._sampler = LengthSampler(self._step_size, lengths, self.args.data_seed, count)
        return self._sampler

    # Selection

    def _determine_best_metric(self, metrics, trial):
        """Select the latest checkpoint whose score is near the best; if only equals are near, that with the least loss.

        With few validation rows many scores are nearly equal, and the first of them has hardly been trained. A
        checkpoint from before the method has its final size is never selected; the last one always has it, and is
        measured.
        """
        state, metric = self.state, self.args.metric_for_best_model.removeprefix("eval_")
        if state.global_step < self._final_after(state.max_steps):
            return False
        value, best = metrics[f"eval_{metric}"], state.best_metric
        if super()._determine_best_metric(metrics, trial):
            return True
        if self._config.select_within == 0 or metric in LOWER_IS_BETTER:
            losses = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
            is_near = value == best and losses[state.global_step] < losses[state.best_global_step]
        else:
            is_near = value >= best - self._config.select_within * standard_error(best, len(self.eval_dataset))
        if is_near:
            state.best_global_step = state.global_step
        return is_near

    # Checkpoints

    def _get_output_dir(self, trial):
        return str(self._checkpoint_parent)

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint in a hidden folder, seal it, and only then give it its name and remove older ones."""
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._checkpoint_parent = final.with_name(".saving")
        try:
            with checkpoints.named_on_error(final):
                super()._save_checkpoint(model, trial)
                self._seal(self._checkpoint_parent / final.name, final)
        finally:
            if self.args.should_save:
                shutil.rmtree(self._checkpoint_parent, ignore_errors=True)
            self._checkpoint_parent = final.parent

    def _seal(self, building: Path, final: Path) -> None:
        self._name_best()
        losses = self.accelerator.gather(self._losses).reshape(-1).tolist()
        self.accelerator.wait_for_everyone()  # every process has written its own random state
        if self.args.should_save:
            self.state.save_to_json(str(building / checkpoints.STATE))
            shape = checkpoints.shape_of(self.model)
            checkpoints.CheckpointState(losses, self.seconds, self._versions, shape).save(building)
            seal(building, final)  # replaces what an earlier attempt left under this name
            checkpoints.rotate(final.parent, best=self.state.best_global_step, limit=self._config.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _name_best(self) -> None:
        """Name the best checkpoint in Trainer's state by its final folder, not by the one it was written in."""
        best = self.state.best_global_step
        self.state.best_model_checkpoint = best and os.path.join(self.args.output_dir, f"checkpoint-{best}")

    def _save(self, output_dir=None, state_dict=None):
        checkpoints.save_trainable(self.model, Path(output_dir), writes=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        fsdp.reshard(self.model)
        checkpoints.load_trainable(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _init_training_state(self, max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial):
        done = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        self._losses.zero_()
        if resume_from_checkpoint is not None:
            before = checkpoints.CheckpointState.load(Path(resume_from_checkpoint))
            same_world = len(before.losses) == self.args.world_size
            mean = sum(before.losses) / len(before.losses)
            self._losses += before.losses[self.args.process_index] if same_world else mean
            self._earlier_seconds = before.seconds
            self._name_best()
        return done


class LengthSampler(LengthGroupedSampler):
    """Batches of like length in an order that seed and epoch decide, so that a resumed run has the same one.

    count: the number of rows of an epoch; None stands for all.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, count: int | None = None) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self._seed, self._count = seed, len(lengths) if count is None else count
        self.set_epoch(0)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self._count)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self._seed + epoch)


@dataclass
class UninterruptedCollate:
    """`collate`, `packed` if it packs, which has a process that only loads data ignore the signals to stop.

    Schedulers signal every process of a job. A process that loads data would die, and its training with it before the
    checkpoint is made. It ends with the training in any case.
    """

    collate: Callable[[Sequence], dict[str, Tensor]]
    packs: bool = False

    def __call__(self, rows: Sequence) -> dict[str, Tensor]:
        if get_worker_info() is not None:
            for number in signals.STOPPING:
                signal.signal(number, signal.SIG_IGN)
        batch = self.collate(rows)
        return packed(batch) if self.packs else batch


class ReportProgress(TrainerCallback):
    """Report each step of training and evaluation to the parent, and what Trainer measures to the log."""

    def __init__(self) -> None:
        self._stage, self._batches = "evaluate", 0
        self._began, self._earlier_tokens = 0.0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._stage = "validate"
        self._began, self._earlier_tokens = time.monotonic(), state.num_input_tokens_seen

    def on_train_end(self, args, state, control, **kwargs):
        self._stage = "evaluate"

    def on_step_end(self, args, state, control, **kwargs):
        loss, score = _last(state, "loss"), _last(state, f"eval_{args.metric_for_best_model}")
        detail = {} if loss is None else {"loss": loss}
        if score is not None:
            detail["validation"] = {args.metric_for_best_model: score}
        tokens = state.num_input_tokens_seen - self._earlier_tokens
        if tokens > 0:  # the time since training began includes validation and checkpoints
            detail["tokens_per_second"] = tokens / max(time.monotonic() - self._began, 1e-9)
        progress.emit("train", state.global_step, state.max_steps, **detail)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self._batches += 1
        progress.emit(self._stage, self._batches, len(eval_dataloader))
        if self._batches == len(eval_dataloader):
            self._batches = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, logs)


def _last(state: TrainerState, name: str) -> float | None:
    """Return the last value that was logged of that name."""
    return next((entry[name] for entry in reversed(state.log_history) if name in entry), None)


_KEYS = {"B": "trainer.loraplus_ratio", "head": "trainer.head_learning_rate"}  # of parts with a rate of their own


def current_rates(optimizer: Optimizer) -> dict[str, float]:
    """Return the learning rates of the next step, by the names that they have in the history."""
    groups = optimizer.param_groups
    parts = {f"{group['part']}_learning_rate": group["lr"] for group in groups if group.get("part") in _KEYS}
    return {"learning_rate": groups[0]["lr"]} | parts


_RISE, _FALL = 0.02, 0.05  # of the score and, as a share, of the loss, in the last quarter of a training that is short


def still_rising(history: Sequence[Mapping], metric: str) -> bool:
    """Return whether validation was still getting better when training ended: by score and loss, in the last quarter.

    In searches of 75 steps it held for most runs, and for no run in ten of 600.
    """
    measured = [entry for entry in history if "eval_loss" in entry]
    before = [entry for entry in measured if entry["step"] <= 0.75 * measured[-1]["step"]]
    if not before:
        return False
    (score, loss), (earlier, earlier_loss) = (
        (entry[f"eval_{metric}"], entry["eval_loss"]) for entry in (measured[-1], before[-1])
    )
    return loss <= (1 - _FALL) * earlier_loss and (metric in LOWER_IS_BETTER or score >= earlier + _RISE)


class StopOnNonFinite(TrainerCallback):
    """End the run before a step whose gradient is not finite, so that parameters and checkpoints stay good.

    In fp16 such a step is routine, and skipped by the gradient scaler; there only a loss that is not finite ends it.
    What the last step made of the parameters no gradient shows: they are looked at in the end.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            self._stop(state.global_step, {"learning_rate": args.learning_rate, **logs})

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if args.fp16:
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not torch.isfinite(whole(nn.utils.get_total_norm(gradients))):
            self._stop(state.global_step + 1, current_rates(optimizer))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
        if not torch.isfinite(whole(nn.utils.get_total_norm(trained))):
            self._stop(state.global_step, {"learning_rate": args.learning_rate})

    def _stop(self, step: int, rates: Mapping[str, float]) -> None:
        parts = {part: key for part, key in _KEYS.items() if f"{part}_learning_rate" in rates}
        of_parts = ", ".join(f"{part} {rates[f'{part}_learning_rate']:.3g}" for part in parts)
        raise PartialLoraError(
            f"the loss is not finite at step {step} with learning rate {rates['learning_rate']:.3g}"
            f"{f' ({of_parts})' if of_parts else ''}: lower {' or '.join(['trainer.learning_rate', *parts.values()])}, "
            "or set trainer.mixed_precision=no"
        )


class LogAtSave(TrainerCallback):
    """Log the loss wherever a checkpoint is made: what is not logged by then is lost to a run that resumes there."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = control.should_log or control.should_save

    on_epoch_end = on_step_end


class Pause(TrainerCallback):
    """End training at the first checkpoint from a share of its steps on, which a later run goes on from.

    is_over: whether that came before the last step.
    """

    def __init__(self, until: float) -> None:
        self._until, self.is_over = until, False

    def on_save(self, args, state, control, **kwargs):
        if self._until * state.max_steps <= state.global_step < state.max_steps:
            control.should_training_stop = self.is_over = True


class StopOnSignal(TrainerCallback):
    """End training at a signal: after the current step, with a checkpoint.

    After the last step of an epoch that ends with validation, the validation comes first: a resumed run begins with the
    next epoch. Between steps, while validation is measured or a checkpoint made, a signal ends the process as it would
    without this callback, and the last checkpoint is whole; but nothing interrupts the checkpoint of a stop. Several
    processes stop after the same step.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._in_step, self._stopped, self._amid_epoch = False, False, False
        self._handlers: dict[int, object] = {}
        self._group = None

    def on_train_begin(self, args, state, control, **kwargs):
        if distributed.is_initialized():
            self._group = distributed.new_group(backend="gloo")  # a flag on the CPU: no accelerator has to wait for it
        self._handlers = {number: signal.signal(number, self._receive) for number in signals.STOPPING}

    def on_step_begin(self, args, state, control, **kwargs):
        self._in_step = True

    def on_step_end(self, args, state, control, **kwargs):
        if self._any_received():
            control.should_training_stop = self._stopped = True
            self._amid_epoch = not float(state.epoch).is_integer()
            control.should_save = control.should_save or self._amid_epoch or args.save_strategy != "epoch"
        self._in_step = not (control.should_evaluate or control.should_save)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._stopped and self._amid_epoch:  # Trainer takes this for the end of an epoch
            control.should_evaluate = control.should_save = control.should_log = False
        self._in_step = self._in_step and not (control.should_evaluate or control.should_save)

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._stopped:
            raise SystemExit(128 + (self.received or signal.SIGTERM))

    def _receive(self, number: int, frame: object) -> None:
        if self._stopped:  # the parent repeats its signal
            return
        self.received = number
        if not self._in_step:
            self._handlers[number](number, frame)

    def _any_received(self) -> bool:
        """Return True where any process has received a signal."""
        if self._group is None:
            return self.received is not None
        flag = torch.tensor([self.received is not None], dtype=torch.int32)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)


def mixed_precision(requested: str, device: str) -> str:
    """Return the number format that training computes in: "no" (fp32), "bf16" or "fp16".

    "auto" is bf16 on an accelerator that computes it natively, else fp32. On a CPU it is always fp32: a result must not
    depend on which CPU it is.
    """
    if requested != "auto":
        return requested
    native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "no"


def _data_workers_of(config: TrainerConfig, world: World) -> int:
    return data_workers(config.num_workers, world.device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def data_workers(requested: int | None, device: str, processes: int) -> int:
    """Return the number of processes that load data for this one, of so many that share a machine's cores.

    None on a CPU, where they would compete with it.
    """
    if requested is not None:
        return requested
    return 0 if device == "cpu" else min(_MOST_WORKERS, max(1, cpu_count() // processes - 1))


def check_arguments(config: TrainerConfig, world: World) -> None:
    """Raise PartialLoraError for `trainer.args` that transformers refuses in combination, or lacks a package for."""
    if not config.args:
        return
    precision = mixed_precision(config.mixed_precision, world.device)
    try:
        with tempfile.TemporaryDirectory() as folder:  # which a Trainer makes
            arguments = TrainingArguments(
                output_dir=folder,
                use_cpu=world.device == "cpu",
                bf16=precision == "bf16",
                fp16=precision == "fp16",
                report_to=[],
                dataloader_num_workers=_data_workers_of(config, world),
                **({"optim": config.optimizer} if config.optimizer else {}),
                **config.args,
            )
            if arguments.use_liger_kernel and not is_liger_kernel_available():
                raise ImportError("use_liger_kernel needs `pip install liger-kernel`")
            if config.strategy == "ddp":  # a Trainer of anything else changes how all later ones share a model out
                Trainer(model=nn.Linear(1, 1), args=arguments)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise PartialLoraError(
            f"trainer.args={config.args}: expected what transformers takes together: {one_line(error)}"
        ) from error


@dataclass(frozen=True)
class Computation:
    """Place and form of a training's computation.

    directory: of its checkpoints. precision: "no", "bf16" or "fp16" (`mixed_precision`). versions: of the libraries;
    training resumes under the same ones alone. sharded: True where parameters are, over the processes (fsdp.py).
    """

    world: World
    directory: Path
    precision: str
    seed: int
    versions: Mapping[str, str]
    sharded: bool = False


def build_trainer(
    model: nn.Module,
    config: TrainerConfig,
    computation: Computation,
    *,
    rows: Mapping[str, Dataset],
    transform: Transform,
    judge: Judge,
    method: Training | None = None,
    heads: Sequence[str] = (),
    callbacks: Sequence[TrainerCallback] = (),
) -> ResumableTrainer:
    """Return a Trainer whose `train()` ends with the checkpoint that validation selects.

    AdamW without decay of biases and norms, a schedule after linear warm-up, clipped gradients. Validation is
    measured and a checkpoint made every `config.save_steps` steps, or every epoch.

    Args:
        rows: to train on and for validation, by split, as `transform` prepares them; judge: their loss and metrics.
        method: what the method adds.
        heads: the names of the modules that train whole beside the adapter: the head and other new modules.
    """
    method, world, train = method or Training(), computation.world, rows["train"]
    batch_size, accumulation = config.batch_size, config.gradient_accumulation_steps
    parts = world.size * accumulation
    times = f" times trainer.gradient_accumulation_steps={accumulation}" if accumulation > 1 else ""
    if parts > 1 and len(train) < batch_size:  # processes and parts would share a short batch unevenly
        raise PartialLoraError(
            f"trainer.batch_size={batch_size}: expected at most {len(train)}, the training rows, since {world.size} "
            f"processes{times} share each batch"
        )
    counted = "all" if config.packing else "non_padding"  # packed texts have no attention mask to count by
    strategy = "epoch" if config.save_steps is None and config.max_steps is None else "steps"
    steps = config.save_steps or max(1, len(train) // batch_size)
    arguments = TrainingArguments(
        output_dir=str(computation.directory),
        use_cpu=world.device == "cpu",
        bf16=computation.precision == "bf16",
        fp16=computation.precision == "fp16",
        seed=computation.seed,
        data_seed=computation.seed,
        num_train_epochs=config.passes(len(train)),
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=batch_size // parts,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=config.eval_batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_ratio,  # below 1, a share of the steps
        max_grad_norm=config.max_grad_norm,
        eval_strategy=strategy,
        save_strategy=strategy,
        eval_steps=steps,
        save_steps=steps,
        load_best_model_at_end=True,
        metric_for_best_model=judge.selects,
        greater_is_better=judge.selects not in LOWER_IS_BETTER,
        include_num_input_tokens_seen=counted if transform.lengths else "no",
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=_data_workers_of(config, world),
        dataloader_pin_memory=world.device == "cuda",
        ddp_find_unused_parameters=False,
        restore_callback_states_from_checkpoint=config.patience is not None,  # of a resumed run: its patience so far
        **({"optim": config.optimizer} if config.optimizer else {}),
        **(config.args or {}),
    )
    keep_statistics(model)
    if computation.sharded and world.device == "cpu":
        fsdp.allow_on_cpu()
    trainer = ResumableTrainer(
        config=config,
        versions=computation.versions,
        length_grouped=transform.lengths,
        final_after=method.final_after,
        heads=heads,
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=rows["validation"],
        data_collator=UninterruptedCollate(transform.collate),
        compute_loss_func=method.loss(judge.loss, parts),
        compute_metrics=judge.measure,
        reduce=judge.reduce,
        callbacks=[
            *callbacks,
            *method.callbacks,
            *([] if config.patience is None else [EarlyStoppingCallback(config.patience)]),
            *(ReportProgress(), StopOnNonFinite(), StopOnSignal(), LogAtSave()),
        ],
    )
    if computation.sharded:
        fsdp.reduce_in_float32(trainer)
    trainer.remove_callback(PrinterCallback)
    return trainer
