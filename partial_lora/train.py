"""One run, from its settings to its result: the paper's algorithm from top to bottom.

`python -m partial_lora.train` is `partial-lora train`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from partial_lora import files, models, progress
from partial_lora.adapter import module_sparsity
from partial_lora.budget import Shapes, dense_parameters
from partial_lora.building import build, memory
from partial_lora.calibration.peers import of_first
from partial_lora.errors import shortlist
from partial_lora.finished.run import FinishedRun, at_commits
from partial_lora.launching import directory as results
from partial_lora.launching.directory import finite, timed
from partial_lora.launching.run_record import Record
from partial_lora.masks import Sparsity
from partial_lora.methods import Method, tuners
from partial_lora.methods.setting import ModuleScores, Setting, Training, heard, training
from partial_lora.report import run_card
from partial_lora.settings import rates
from partial_lora.settings.schema import Config
from partial_lora.settings.versions import plain
from partial_lora.tasks import Task
from partial_lora.tasks.task import Transform
from partial_lora.training import checkpoints, fsdp, objectives, packing
from partial_lora.training.config import TrainerConfig
from partial_lora.training.cost import Cost, Unreached, file_bytes, measured
from partial_lora.training.distributed import World, join
from partial_lora.training.tracking import Tracking
from partial_lora.training.trainer import (
    Computation,
    Pause,
    ResumableTrainer,
    build_trainer,
    check_arguments,
    mixed_precision,
    still_rising,
)

logger = logging.getLogger(__name__)


def run(config: Config, directory: Path, record: Record, stage: str) -> None:
    """Calibrate, mask, train, evaluate and record one run.

    Args:
        config: the settings (`resolving.resolve`).
        directory: the run's directory, held by the parent.
        record: what becomes result.json; filled in as the run goes.
        stage: "train", or "calibrate" to stop once the sparsities are known.
    """
    begun = begin(config, directory, record, trains=stage == "train")
    data = load(begun)
    choice = calibrate(begun, data)
    if not begun.trains:
        return
    adapted = adapt(begun, data, choice)
    trained = fit(begun, data, adapted)
    if record["status"] != results.PAUSED:
        evaluate(begun, data, adapted, trained)


@dataclass(frozen=True)
class Run:
    """What all stages know. trains: false where the run ends with the sparsities. sharded: over its processes."""

    config: Config
    directory: Path
    record: Record
    trains: bool
    method: Method
    sharded: bool
    world: World

    def beware(self, lines: Iterable[str]) -> None:
        """Put warnings into the record and the log."""
        for line in lines:
            self.record["warnings"].append(line)
            logger.warning("beware: %s", line)

    def write(self, name: str, judged: objectives.Judged) -> None:
        """Write predictions into the run's directory."""
        if self.world.is_main:
            files.write_atomic(self.directory / name, judged.predictions.to_parquet(index=False))


def begin(config: Config, directory: Path, record: Record, *, trains: bool) -> Run:
    """Take this process's place, once the settings are resolved; an attempt goes on over the same models."""
    config = at_commits(memory.within(config), record.get("commits") or {})
    trainer, method = config.trainer, build.method_of(config.method)
    sharded = fsdp.ask(trainer.strategy)
    world = join(trainer.device)
    record["device"] = world.device
    return Run(config, directory, record, trains, method, sharded, world)


# --- Data, and the frozen model with a new head.


@dataclass(frozen=True)
class Data:
    """A task, its rows as the model reads them, by split, what judges them, and the frozen model with a new head."""

    task: Task
    transform: Transform
    judge: objectives.Judge
    rows: Mapping[str, Dataset]
    model: PreTrainedModel


def load(run: Run) -> Data:
    """Load the task and the model. The seed decides the head, so every method starts from the same one.

    What cannot be read, or does not go together, ends a training before anything is computed.
    """
    config, record, world = run.config, run.record, run.world
    chosen, model, trainer = config.task, config.model, config.trainer
    task, rows = build.task_of(config, mixtures=True), {}
    transform = build.transform_of(model, chosen, task)
    record["labels"] = list(task.labels)
    judge = build.judge_of(config, task, transform, world)
    if run.trains:
        check_arguments(trainer, world)
        rows = {"train": judge.train(), "validation": judge.validation(), "test": judge.test()}
        run.beware([*build.warnings_of(config, task), *transform.warnings])
    set_seed(config.seed)
    frozen = build.model_of(model, task.labels, task.class_names).to(world.device)
    record["commits"] = models.commits(model)
    if run.trains:
        build.check_room(chosen, task, frozen)
    if trainer.packing:
        packing.check(frozen)
    return Data(task, transform, judge, rows, frozen)


# --- Calibration: from few examples and the frozen model to one sparsity for each module and axis.


@dataclass(frozen=True)
class Choice:
    """The modules to adapt, by the shape of W (out, in); sparsity and importance of their rows and columns, if any.

    experts: parameters that hold fused experts, of which each counts as a module.
    """

    shapes: Shapes
    experts: Sequence[str]
    sparsity: Sparsity | None
    scores: ModuleScores | None


def calibrate(run: Run, data: Data) -> Choice:
    """Measure the importance of rows and columns, and find the sparsities (Algorithm 1), as far as the run needs them.

    One process measures importance, so that all have the same bits.
    """
    config, record, world = run.config, run.record, run.world
    sizing, model = config.sizing, data.model
    calibrates, file = sizing.is_calibrated or not run.trains, sizing.calibration.file
    # A calibration.file takes the place of examples and importance, but not for a method that ranks rows and columns.
    reads_weights = sizing.method.traits.ranked or (calibrates and not file)
    with models.dequantised(model, values=reads_weights):  # training gets the codes of 4 or 8 bits back
        shapes, experts = build.modules_of(model, config.model, ranked=reads_weights)
        targets = list(shapes)
        earlier = build.earlier_calibration(run.directory / results.CALIBRATION, targets, world) if calibrates else None
        examples, scores = None, None
        if reads_weights:
            with timed(record, "calibrate" if calibrates else "importance"):
                examples = build.few_shot_of(config, data.task, data.transform, model)
                if calibrates and not (earlier or file):
                    examples.announce(targets, world.size)
                scores = of_first(world, partial(examples.importance, targets))
        if calibrates:
            with timed(record, "calibrate"):
                found = earlier or build.calibration(file, targets, examples, scores, world)
            agreement = {}
            if sizing.calibration.reliability:
                with timed(record, "reliability"):
                    agreement["reliability"] = examples.halves(scores, world)
                found = build.with_reliability(found, agreement["reliability"])
            record["calibration"] = found.summary() | agreement
            record["sparsity"] = found.sparsity
            record["shapes"] = {name: list(shape) for name, shape in shapes.items()}
            if world.is_main:
                found.save(run.directory / results.CALIBRATION)
                files.write_json(run.directory / results.RESULT, record)  # a resumed run knows the seconds spent
            return Choice(shapes, experts, found.sparsity, scores)
    if sizing.point:
        record["fixed"] = sizing.point
    if examples:
        record["warnings"] += examples.draws.warnings  # logged as they were drawn
    return Choice(shapes, experts, sizing.sparsity(shapes), scores)


# --- Masks and the adapter: only what the masks keep exists as a parameter.


@dataclass(frozen=True)
class Adapted:
    """The model with its adapter, what that was made of, and its start, if it was taken out of W (`tuners`)."""

    model: PeftModel
    setting: Setting
    start: Mapping[str, Tensor] | None


def adapt(run: Run, data: Data, choice: Choice) -> Adapted:
    """Draw or choose the masks and add the adapter to the frozen model, by the run's method."""
    config, record = run.config, run.record
    set_seed(config.seed)
    setting = build.setting_of(config, choice.shapes, choice.sparsity, choice.scores, choice.experts)
    with heard() as warned:
        adapted = run.method(data.model, setting)
    run.beware(warned)
    dense = dense_parameters(choice.shapes, setting.rank)
    record["parameters"] = measured(adapted, head=setting.head, new_modules=setting.new_modules, dense=dense)
    record["sparsity"] = module_sparsity(adapted)  # measured, which proves that the masks are in force
    return Adapted(adapted, setting, tuners.taken_out(adapted))


# --- Training, on the kept entries and the head.


@dataclass(frozen=True)
class Trained:
    """The trainer, at the checkpoint that validation selects, what the method added to it, and who watched."""

    trainer: ResumableTrainer
    aids: Training
    cost: Cost
    unreached: Unreached
    tracking: Tracking


def fit(run: Run, data: Data, adapted: Adapted) -> Trained:
    """Train, from the last checkpoint of an earlier attempt on, to the end or as far as trainer.until."""
    config, record, world, model = run.config, run.record, run.world, adapted.model
    chosen, of_model = _with_rates(run, data, adapted), config.model
    if of_model.gradient_checkpointing:
        models.enable_gradient_checkpointing(model)
    if run.sharded:
        fsdp.name_blocks(model, of_model.blocks)
    aids, cost = training(adapted.setting.method.function, model, sharded=run.sharded), Cost(model)
    unreached, pause = Unreached(model), Pause(chosen.until)
    record["mixed_precision"] = precision = mixed_precision(chosen.mixed_precision, world.device)
    # Under other libraries or another precision, a resumed training would compute something else.
    computed_by, folder = record["versions"] | {"precision": precision}, run.directory / results.CHECKPOINTS
    settings = plain(replace(config, trainer=chosen))
    tracking = Tracking(chosen.report_to if world.is_main else [], run.directory, settings)
    trainer = build_trainer(
        model,
        chosen,
        Computation(world, folder, precision, config.seed, computed_by, run.sharded),
        rows=data.rows,
        transform=data.transform,
        judge=data.judge,
        method=aids,
        heads=adapted.setting.whole(),
        callbacks=[tracking, cost, unreached, pause],
    )
    shape = checkpoints.shape_of(model)
    checkpoint = of_first(world, lambda: checkpoints.resumable(folder, computed_by, shape))
    record["resumed_from_step"] = step = checkpoint and checkpoints.step_of(checkpoint)
    if step:
        progress.emit("train", 0, 0, note=f"goes on after step {step}")
    with tracking:
        trainer.train(checkpoint)
    record["seconds"]["train"] = round(trainer.seconds, 3)
    record["history"] = finite(trainer.state.log_history)  # with fp16 a gradient may overflow now and then
    if pause.is_over:
        record["status"] = results.PAUSED
        paused = data.judge.judged(objectives.predicts(trainer), trainer.model, "validation")
        run.write(results.VALIDATION, paused)  # by which rows a comparison tells apart runs that have not ended
    return Trained(trainer, aids, cost, unreached, tracking)


def _with_rates(run: Run, data: Data, adapted: Adapted) -> TrainerConfig:
    """Return the settings of training with the learning rates that they leave to the run, and record its length."""
    config, setting, settings = run.config, adapted.setting, plain(run.config)
    density = run.record["parameters"]["adapter_trainable"] / dense_parameters(setting.shapes, setting.rank)
    geometry = {"width": rates.width(setting.shapes.values()), "density": density, "has_head": bool(setting.whole())}
    chosen = rates.trainer_of(settings, config.trainer, **geometry)
    run.record["training"] = length = rates.training_of(chosen, len(data.rows["train"]), density)
    progress.emit("train", 0, length["steps"], note=rates.in_words(settings, length))
    return chosen


# --- Evaluation: validation has selected the checkpoint, test is looked at once. Records.


def evaluate(run: Run, data: Data, adapted: Adapted, trained: Trained) -> None:
    """Evaluate the selected checkpoint, and leave the adapter, the predictions and a whole record."""
    record, directory, world = run.record, run.directory, run.world
    trainer, tracking = trained.trainer, trained.tracking
    record["training"]["selected"] = trainer.state.best_global_step
    if names := trained.unreached.names:
        run.beware([f"not trained, since the model never calls them: {shortlist(names)}"])
    if still_rising(trainer.state.log_history, data.judge.selects):
        longer = run.config.trainer.longer(len(data.rows["train"]))
        run.beware([f"validation was still getting better at the end: {longer} trains twice as long"])
    record["parameters"] |= trained.aids.summary()
    with timed(record, "evaluate"), tracking:
        predict = objectives.predicts(trainer)
        judged = {split: data.judge.judged(predict, trainer.model, split) for split in ("validation", "test")}
    metrics = {split: outcome.metrics for split, outcome in judged.items()}
    record["metrics"] = {"train": {"primary": "loss", "loss": fmean(world.gather(trainer.mean_loss))}} | finite(metrics)
    record["peak_memory_bytes"] = world.peak_memory_bytes()
    with tracking:  # what fails here is told to the trackers, too
        run.write(results.PREDICTIONS, judged["test"])
        with checkpoints.named_on_error(directory / results.ADAPTER):
            finished = FinishedRun(directory, run.config, record)
            _save_adapter(adapted.model, finished, data.transform, world.is_main, adapted.start)
    if world.is_main:
        record["cost"] = {"adapter_bytes": file_bytes(directory / results.ADAPTER)} | trained.cost.measured()
    tracking.finish(metrics | {"parameters": record["parameters"]}, trainer.state.global_step)


def _save_adapter(
    adapted: PeftModel, run: FinishedRun, transform: Transform, is_main: bool, start: Mapping[str, Tensor] | None
) -> None:
    """Save the adapter; its folder is there whole or not at all. All processes call this, and one writes.

    run: finished but for the adapter. start: the new adapter, if it was taken out of W (`tuners.taken_out`).
    """
    temporary = run.adapter.with_name(f".{run.adapter.name}.tmp")
    state = fsdp.adapter_state(adapted)
    if is_main:  # a second process would make the temporary folder again, perhaps after the first has renamed it
        adapted.save_pretrained(temporary, save_embedding_layers=False, state_dict=state)
        if start:
            tuners.put_back(temporary, start)
        build.describe(adapted.get_base_model(), run.config.model, transform, temporary)
        run_card.write(run, temporary)
        files.replace_folder(temporary, run.adapter)


if __name__ == "__main__":
    from partial_lora.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
