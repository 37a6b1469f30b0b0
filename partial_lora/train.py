"""One run, from its settings to its result: the paper's algorithm from top to bottom.

`python -m partial_lora.train` is `partial-lora train`.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from statistics import fmean

from peft import PeftModel
from transformers import set_seed

from partial_lora import files, methods, models
from partial_lora.adapter import module_sparsity
from partial_lora.calibration.budget import dense_parameters
from partial_lora.calibration.few_shot import halves_few_shot
from partial_lora.calibration.peers import of_first
from partial_lora.models.targets import target_names
from partial_lora.runs import build
from partial_lora.runs import directory as results
from partial_lora.runs.build import named
from partial_lora.runs.directory import finite, timed
from partial_lora.training import checkpoints, fsdp, metrics, objectives
from partial_lora.training import cost as parameters
from partial_lora.training import trainer as fit
from partial_lora.training.cost import Cost, file_bytes
from partial_lora.training.distributed import join
from partial_lora.training.trackers import Tracking

logger = logging.getLogger(__name__)


def run(settings: dict, directory: Path, record: dict, stage: str) -> None:
    """Calibrate, mask, train, evaluate and record one run.

    Args:
        settings: resolved settings (`config.resolve`).
        directory: the run's directory, held by the parent.
        record: what becomes result.json; filled in as the run goes.
        stage: "train", or "calibrate" to stop once the sparsities are known.
    """
    seed = settings["seed"]
    sharded = fsdp.ask(settings["trainer"]["strategy"])
    world = join(settings["trainer"]["device"])
    record["device"] = world.device

    # Data, and the frozen model with a new head. The seed decides the head, so every method starts from the same one.
    task = build.task_of(settings, mixtures=True)
    transform = build.transform_of(settings, task)
    record["labels"] = list(task.labels)
    judge = objectives.task_judge(task, transform, settings, world)
    if stage == "train":  # what cannot be read is found before anything is paid for
        rows = {"train": judge.train(), "validation": judge.validation(), "test": judge.test()}
    set_seed(seed)
    model = build.model_of(settings["model"], task.labels, task.class_names).to(world.device)
    method = methods.get(settings["method"]["name"])
    calibrated = methods.is_calibrated(method) or stage == "calibrate"
    # What is calibrated are weights; codes of 4 or 8 bits come back for training.
    with models.dequantised(model, values=calibrated):
        targets = target_names(model, **named(settings["model"], "target_modules", "head", "new_modules"))
        shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in targets}

        # Calibration: from few examples and the frozen model to one sparsity for each module and axis.
        calibration, scores = None, None
        if calibrated:
            with timed(record, "calibrate"):
                draws = build.draws_of(settings, task.train)
                # One process measures importance for all of them, to the bit; what it decides on is then shared out.
                scores = of_first(world, lambda: build.importance(settings, task, transform, model, targets, draws))
                given, asked = (model, task.train, transform), build.asked(settings, task, scores, draws, world)
                known = build.before(directory / results.CALIBRATION, targets, world)
                calibration = known or build.calibration(settings["calibration"]["file"], given, asked)
            agreement = {}
            if settings["calibration"]["reliability"]:
                with timed(record, "reliability"):
                    agreement["reliability"] = halves_few_shot(*given, **asked)
                calibration = build.doubted(calibration, agreement["reliability"])
            record["calibration"] = calibration.summary() | agreement
            record["sparsity"] = calibration.sparsity
            record["shapes"] = {name: list(shape) for name, shape in shapes.items()}
            if world.is_main:
                calibration.save(directory / results.CALIBRATION)
                files.write_json(directory / results.RESULT, record)  # what it took is known to who goes on from here
        if stage == "calibrate":
            return

    # Masks and the adapter: only what the masks keep exists as a parameter.
    set_seed(seed)
    mask_seed = settings["mask"]["seed"]
    setting = methods.Setting(
        **named(settings["model"], "target_modules", "head", "new_modules"),
        **named(settings["method"], "rank", "alpha", "dropout", "projections"),
        **named(settings["mask"], "granularity", "count"),
        shapes=shapes,
        mask_seed=seed if mask_seed is None else mask_seed,
        sparsity=calibration.sparsity if calibration else None,
        scores=scores,
    )
    adapted = method(model, setting)
    record["parameters"] = parameters.measured(
        adapted, **named(settings["model"], "head", "new_modules"), dense=dense_parameters(shapes, setting.rank)
    )
    record["sparsity"] = module_sparsity(adapted)  # measured, and proof that the masks are in force

    # Training, on the kept entries and the head.
    if settings["model"]["gradient_checkpointing"]:
        models.enable_gradient_checkpointing(adapted)
    if sharded:
        fsdp.name_blocks(adapted, settings["model"]["blocks"])
    aids, cost = methods.training(settings["method"]["name"], adapted, sharded=sharded), Cost(adapted)
    record["mixed_precision"] = fit.mixed_precision(settings["trainer"]["mixed_precision"], world.device)
    # A checkpoint of other libraries, or of another precision, computes something else.
    computed_by = record["versions"] | {"precision": record["mixed_precision"]}
    tracking = Tracking(
        settings["trainer"]["report_to"] if world.is_main else [],
        directory=directory,
        record=directory / results.TRACKERS,
        results_dir=Path(settings["results_dir"]),
        parameters=files.flatten(settings),
    )
    trainer = fit.trainer(
        adapted,
        train=rows["train"],
        validation=rows["validation"],
        collate=transform.collate,
        length_grouped=transform.lengths,
        reads_tokens=task.modality == "text",
        loss=aids.loss(judge.loss, settings["trainer"]["gradient_accumulation_steps"] * world.size),
        reduce=judge.reduce,
        measure=judge.measure,
        selects=judge.selects,
        directory=directory / results.CHECKPOINTS,
        device=world.device,
        precision=record["mixed_precision"],
        world_size=world.size,
        seed=seed,
        sharded=sharded,
        versions=computed_by,
        callbacks=[tracking, *aids.callbacks, cost],
        final_after=aids.final_after,
        **named(settings["trainer"], *fit.SETTINGS),
    )
    shape, kept = checkpoints.shape_of(adapted), directory / results.CHECKPOINTS
    resumed = of_first(world, lambda: checkpoints.resumable(kept, computed_by, shape))
    record["resumed_from_step"] = resumed and checkpoints.step_of(resumed)
    with tracking:
        trainer.train(resumed)
    record["seconds"]["train"] = round(trainer.seconds, 3)
    record["history"] = finite(trainer.state.log_history)  # with fp16 a gradient may overflow now and then
    record["parameters"] |= aids.summary()

    # Evaluation: validation has selected the checkpoint, test is looked at once.
    with timed(record, "evaluate"), tracking:
        predict = objectives.predicts(trainer)
        judged = {split: judge.judged(predict, trainer.model, split) for split in ("validation", "test")}
    record["metrics"] = {"train": {"primary": "loss", "loss": fmean(world.gather(trainer.mean_loss))}}
    record["metrics"] |= {split: finite(each.metrics) for split, each in judged.items()}
    record["peak_memory_bytes"] = world.peak_memory_bytes()

    # Records.
    _save_adapter(adapted, directory / results.ADAPTER, world.is_main)
    if world.is_main:
        metrics.write_predictions(directory / results.PREDICTIONS, judged["test"].predictions)
        record["cost"] = {"adapter_bytes": file_bytes(directory / results.ADAPTER)} | cost.measured()
    measured = {split: each.metrics for split, each in judged.items()} | {"parameters": record["parameters"]}
    tracking.finish(measured, trainer.state.global_step)


def _save_adapter(adapted: PeftModel, directory: Path, is_main: bool) -> None:
    """Save the adapter so that its folder is there whole or not at all; all processes call it, and one writes."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    state = fsdp.adapter_state(adapted)
    adapted.save_pretrained(temporary, save_embedding_layers=False, is_main_process=is_main, state_dict=state)
    if is_main:
        files.replace_folder(temporary, directory)


if __name__ == "__main__":
    from partial_lora.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
