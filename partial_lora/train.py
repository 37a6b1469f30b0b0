"""One run, from its settings to its result: the paper's algorithm from top to bottom.

`python -m partial_lora.train` is `partial-lora train`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from peft import PeftModel
from torch import Tensor
from transformers import set_seed

from partial_lora import files, models, worker_events
from partial_lora.adapter import module_sparsity
from partial_lora.budget import dense_parameters
from partial_lora.building import build, memory
from partial_lora.calibration.few_shot import halves_few_shot
from partial_lora.errors import shortlist
from partial_lora.finished.run import FinishedRun, at_commits
from partial_lora.launching import directory as results
from partial_lora.launching.directory import finite, timed
from partial_lora.methods import tuners
from partial_lora.methods.setting import heard, training
from partial_lora.models.targets import target_linears
from partial_lora.peers import of_first
from partial_lora.report import card
from partial_lora.settings import rates
from partial_lora.settings.schema import Config
from partial_lora.settings.versions import plain
from partial_lora.tasks.task import Transform
from partial_lora.training import checkpoints, fsdp, objectives, packing
from partial_lora.training.cost import Cost, Unreached, file_bytes, measured
from partial_lora.training.distributed import join
from partial_lora.training.tracking import Tracking
from partial_lora.training.trainer import (
    Computation,
    Pause,
    build_trainer,
    check_arguments,
    mixed_precision,
    still_rising,
)

logger = logging.getLogger(__name__)


def run(config: Config, directory: Path, record: dict, stage: str) -> None:
    """Calibrate, mask, train, evaluate and record one run.

    Args:
        config: the settings (`resolving.resolve`).
        directory: the run's directory, held by the parent.
        record: what becomes result.json; filled in as the run goes.
        stage: "train", or "calibrate" to stop once the sparsities are known.
    """
    config = at_commits(memory.within(config), record.get("commits") or {})  # an attempt goes on over the same models
    method = build.method_of(config.method)
    sharded = fsdp.ask(config.trainer.strategy)
    world = join(config.trainer.device)
    record["device"] = world.device

    # Data, and the frozen model with a new head. The seed decides the head, so every method starts from the same one.
    task = build.task_of(config, mixtures=True)
    transform = build.transform_of(config.model, config.task, task)
    record["labels"] = list(task.labels)
    judge = build.judge_of(config, task, transform, world)
    if stage == "train":  # what cannot be read, or does not go together, ends the run before anything is computed
        check_arguments(config.trainer, world)
        rows = {"train": judge.train(), "validation": judge.validation(), "test": judge.test()}
        record["warnings"] = [*build.warnings_of(config, task), *transform.warnings]
        for warning in record["warnings"]:
            logger.warning("beware: %s", warning)
    set_seed(config.seed)
    model = build.model_of(config.model, task.labels, task.class_names).to(world.device)
    record["commits"] = models.commits(config.model)
    if stage == "train":
        build.check_room(config, task, model)
    if config.trainer.packing:
        packing.check(model)
    calibrated = config.sizing.is_calibrated or stage == "calibrate"
    # A calibration.file takes the place of examples and importance, but not for a method that ranks rows and columns.
    reads_weights = config.method.traits.ranked or (calibrated and not config.calibration.file)
    with models.dequantised(model, values=reads_weights):  # training gets the codes of 4 or 8 bits back
        targets = list(target_linears(model, **config.model.trained_modules))
        shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in targets}

        earlier = build.earlier_calibration(directory / results.CALIBRATION, targets, world) if calibrated else None

        # Importance of rows and columns, on few examples. One process measures it, so that all have the same bits.
        examples, scores, draws = build.few_shot_of(config, task, transform, model), None, None
        if reads_weights:
            with timed(record, "calibrate" if calibrated else "importance"):
                draws = build.draws_of(config, task.train)
                if calibrated and not (earlier or config.calibration.file):
                    examples.announce(targets, draws, world.size)
                scores = of_first(world, lambda: examples.importance(targets, draws))

        # Calibration: from the few examples and the frozen model to one sparsity for each module and axis.
        if calibrated:
            calibrate = partial(examples.calibrate, scores, peers=world)
            with timed(record, "calibrate"):
                calibration = earlier or build.calibration(config.calibration.file, targets, draws, calibrate)
            agreement = {}
            if config.calibration.reliability:
                with timed(record, "reliability"):
                    agreement["reliability"] = halves_few_shot(calibrate, task.train, draws, config.calibration_seed)
                calibration = build.with_reliability(calibration, agreement["reliability"])
            record["calibration"] = calibration.summary() | agreement
            record["sparsity"] = sparsity = calibration.sparsity
            record["shapes"] = {name: list(shape) for name, shape in shapes.items()}
            if world.is_main:
                calibration.save(directory / results.CALIBRATION)
                files.write_json(directory / results.RESULT, record)  # so that a resumed run knows the seconds spent
    if stage == "calibrate":
        return
    if not calibrated:
        sparsity = config.sizing.sparsity(shapes)
        if point := config.sizing.point:
            record["fixed"] = point
        if reads_weights:
            record["warnings"] += draws.warnings  # logged as they were drawn

    # Masks and the adapter: only what the masks keep exists as a parameter.
    set_seed(config.seed)
    setting = build.setting_of(config, shapes, sparsity, scores)
    with heard() as warned:
        adapted = method(model, setting)
    record["warnings"] += warned
    for warning in warned:
        logger.warning("beware: %s", warning)
    dense = dense_parameters(shapes, setting.rank)
    record["parameters"] = measured(adapted, head=setting.head, new_modules=setting.new_modules, dense=dense)
    record["sparsity"] = module_sparsity(adapted)  # measured, which proves that the masks are in force

    start = tuners.taken_out(adapted)

    # How long, and at what learning rates, where the settings leave it to the run.
    width, density = rates.width(shapes.values()), record["parameters"]["adapter_trainable"] / dense
    geometry = {"width": width, "density": density, "has_head": config.model.trains_whole}
    trained = rates.trainer_of(plain(config), config.trainer, **geometry)
    record["training"] = rates.training_of(trained, len(rows["train"]), density)
    worker_events.emit("train", 0, record["training"]["steps"], note=rates.in_words(plain(config), record["training"]))

    # Training, on the kept entries and the head.
    if config.model.gradient_checkpointing:
        models.enable_gradient_checkpointing(adapted)
    if sharded:
        fsdp.name_blocks(adapted, config.model.blocks)
    aids, cost = training(config.method.function, adapted, sharded=sharded), Cost(adapted)
    unreached, pause = Unreached(adapted), Pause(trained.until)
    record["mixed_precision"] = mixed_precision(config.trainer.mixed_precision, world.device)
    # Under other libraries or another precision, a resumed training would compute something else.
    computed_by, folder = record["versions"] | {"precision": record["mixed_precision"]}, directory / results.CHECKPOINTS
    tracking = Tracking(
        config.trainer.report_to if world.is_main else [],
        directory=directory,
        record=directory / results.TRACKERS_FILE,
        results_dir=Path(config.results_dir),
        parameters=files.flatten(plain(replace(config, trainer=trained))),
    )
    trainer = build_trainer(
        adapted,
        trained,
        Computation(world, folder, record["mixed_precision"], config.seed, computed_by, sharded),
        rows=rows,
        transform=transform,
        judge=judge,
        method=aids,
        heads=setting.whole(),
        callbacks=[tracking, cost, unreached, pause],
    )
    shape = checkpoints.shape_of(adapted)
    checkpoint = of_first(world, lambda: checkpoints.resumable(folder, computed_by, shape))
    record["resumed_from_step"] = step = checkpoint and checkpoints.step_of(checkpoint)
    if step:
        worker_events.emit("train", 0, 0, note=f"goes on after step {step}")
    with tracking:
        trainer.train(checkpoint)
    record["seconds"]["train"] = round(trainer.seconds, 3)
    record["history"] = finite(trainer.state.log_history)  # with fp16 a gradient may overflow now and then
    if pause.is_over:
        record["status"] = results.PAUSED
        paused = judge.judged(objectives.predicts(trainer), trainer.model, "validation")
        if world.is_main:  # by which rows a comparison tells apart runs that have not ended
            files.write_atomic(directory / results.VALIDATION, paused.predictions.to_parquet(index=False))
        return
    record["training"]["selected"] = trainer.state.best_global_step
    if unreached.names:
        record["warnings"].append(f"not trained, since the model never calls them: {shortlist(unreached.names)}")
        logger.warning(record["warnings"][-1])
    if still_rising(trainer.state.log_history, judge.selects):
        longer = trained.longer(len(rows["train"]))
        record["warnings"].append(f"validation was still getting better at the end: {longer} trains twice as long")
        logger.warning(record["warnings"][-1])
    record["parameters"] |= aids.summary()

    # Evaluation: validation has selected the checkpoint, test is looked at once.
    with timed(record, "evaluate"), tracking:
        predict = objectives.predicts(trainer)
        judged = {split: judge.judged(predict, trainer.model, split) for split in ("validation", "test")}
    record["metrics"] = {"train": {"primary": "loss", "loss": fmean(world.gather(trainer.mean_loss))}}
    record["metrics"] |= {split: finite(outcome.metrics) for split, outcome in judged.items()}
    record["peak_memory_bytes"] = world.peak_memory_bytes()

    # Records. What fails here is told to the trackers, too.
    with tracking:
        if world.is_main:
            files.write_atomic(directory / results.PREDICTIONS, judged["test"].predictions.to_parquet(index=False))
        with checkpoints.named_on_error(directory / results.ADAPTER):
            _save_adapter(adapted, FinishedRun(directory, config, record), transform, world.is_main, start)
    if world.is_main:
        record["cost"] = {"adapter_bytes": file_bytes(directory / results.ADAPTER)} | cost.measured()
    final = {split: outcome.metrics for split, outcome in judged.items()} | {"parameters": record["parameters"]}
    tracking.finish(final, trainer.state.global_step)


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
        card.write(run, temporary)
        files.replace_folder(temporary, run.adapter)


if __name__ == "__main__":
    from partial_lora.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
