"""One run, from its settings to its result: the paper's algorithm from top to bottom.

`python -m partial_lora.train` is `partial-lora train`.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
from pathlib import Path
from statistics import fmean

from peft import PeftModel
from torch import nn
from transformers import set_seed

from partial_lora import (
    calibration_figures,
    evaluation,
    figures,
    fit,
    judges,
    loading,
    methods,
    mixture_judge,
    models,
    parameters,
    results,
    tasks,
)
from partial_lora.adapter import module_sparsity
from partial_lora.budget import dense_parameters
from partial_lora.calibration import Calibration
from partial_lora.fewshot import calibrate_few_shot, halves_few_shot, importance_few_shot
from partial_lora.importance import OPTIONS
from partial_lora.loading import named
from partial_lora.peers import Peers, of_first
from partial_lora.record import timed
from partial_lora.reliability import verdict
from partial_lora.targets import target_names
from partial_lora.world import join

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
    world = join(settings["trainer"]["device"])
    record["device"] = world.device

    # Data, and the frozen model with a new head. The seed decides the head, so every method starts from the same one.
    task = loading.task_of(settings, mixtures=True)
    transform = loading.transform_of(settings, task)
    record["labels"] = list(task.labels)
    judge = mixture_judge.judge_of(task, transform, settings, world)
    if stage == "train":  # what cannot be read is found before anything is paid for
        rows = {"train": judge.train(), "validation": judge.validation(), "test": judge.test()}
    set_seed(seed)
    model = loading.model_of(settings["model"], task.labels, task.class_names).to(world.device)
    with models.dequantised(model):  # what is calibrated are weights; codes of 4 or 8 bits come back for training
        targets = target_names(model, **named(settings["model"], "target_modules", "head", "new_modules"))
        shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in targets}

        # Calibration: from few examples and the frozen model to one sparsity for each module and axis.
        method = methods.named(settings["method"]["name"])
        calibration, scores = None, None
        if methods.is_calibrated(method) or stage == "calibrate":
            with timed(record, "calibrate"):
                draws = loading.draws_of(settings, task.train)
                # One process measures importance for all of them, to the bit; what it decides on is then shared out.
                scores = of_first(world, lambda: _importance(settings, task, transform, model, targets, draws))
                given, asked = (model, task.train, transform), _asked(settings, task, scores, draws, world)
                calibration = _calibration(settings["calibration"]["file"], given, asked)
            agreement = {}
            if settings["calibration"]["reliability"]:
                with timed(record, "reliability"):
                    agreement["reliability"] = halves_few_shot(*given, **asked)
                calibration = _doubted(calibration, agreement["reliability"])
            record["calibration"] = calibration.summary() | agreement
            record["sparsity"] = calibration.sparsity
            record["shapes"] = {name: list(shape) for name, shape in shapes.items()}
            if world.is_main:
                calibration.save(directory / results.CALIBRATION)
        if stage == "calibrate":
            if world.is_main:
                calibration_figures.draw(record, calibration.modules, directory)
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
    record["mixed_precision"] = fit.mixed_precision(settings["trainer"]["mixed_precision"], world.device)
    trainer = fit.trainer(
        adapted,
        train=rows["train"],
        validation=rows["validation"],
        collate=transform.collate,
        length_grouped=transform.lengths,
        reads_tokens=task.modality == "text",
        loss=judge.loss,
        reduce=judge.reduce,
        measure=judge.measure,
        selects=judge.selects,
        directory=directory,
        device=world.device,
        precision=record["mixed_precision"],
        world_size=world.size,
        seed=seed,
        **named(settings["trainer"], *fit.SETTINGS),
    )
    with timed(record, "train"):
        trained = trainer.train()
    record["history"] = trainer.state.log_history

    # Evaluation: validation has selected the checkpoint, test is looked at once.
    with timed(record, "evaluate"):
        predict = judges.predicts(trainer)
        judged = {split: judge.judged(predict, trainer.model, split) for split in ("validation", "test")}
    record["metrics"] = {"train": {"primary": "loss", "loss": fmean(world.gather(trained.training_loss))}}
    record["metrics"] |= {split: each.metrics for split, each in judged.items()}
    record["peak_memory_bytes"] = world.peak_memory_bytes()

    # Records.
    if world.is_main:
        evaluation.write_predictions(directory / results.PREDICTIONS, judged["test"].predictions)
        _save_adapter(adapted, directory / results.ADAPTER)
        calibration_figures.draw(record, calibration.modules if calibration else None, directory)
        figures.training_curve(record, directory / "training.png")
        fit.remove_checkpoints(directory)


def _importance(
    settings: dict,
    task: tasks.Task,
    transform: loading.Transform,
    model: nn.Module,
    targets: list[str],
    draws: tasks.Draws,
) -> methods.Scores:
    """Importance of every row and column of the modules that are to be adapted."""
    measure, head = settings["importance"]["name"], settings["model"]["head"]
    options = named(settings["importance"], *OPTIONS[measure])
    return importance_few_shot(
        model,
        task.train,
        transform,
        measure=measure,
        modules=targets,
        draws=draws,
        head=head,
        seed=settings["calibration"]["seed"],
        options=options,
        new_head=loading.has_new_head(settings["model"]),
        sizes=task.sizes,
    )


def _asked(settings: dict, task: tasks.Task, scores: methods.Scores, draws: tasks.Draws, peers: Peers) -> dict:
    """What is asked of the few-shot draws (`calibrate_few_shot`)."""
    chosen, measure = settings["calibration"], settings["importance"]["name"]
    return {
        "scores": scores,
        "draws": draws,
        "peers": peers,
        "rank": settings["method"]["rank"],
        "granularity": settings["mask"]["granularity"],
        "importance": {"seed": chosen["seed"]} | named(settings["importance"], "name", *OPTIONS[measure]),
        "architecture": named(settings["model"], "architecture", "model_args"),
        "new_head": loading.has_new_head(settings["model"]),
        "sizes": task.sizes,
        "drawn": loading.drawn_by(settings),
        "score": loading.calibration_score(settings, task),
        **named(settings["model"], "head", "blocks"),
        **named(chosen, "seed", "threshold", "budget", "levels", "max_sparsity", "search"),
        **named(chosen, "axes", "scope", "repair", "chance", "memory"),
    }


def _calibration(file: str | None, given: tuple, asked: dict) -> Calibration:
    """The sparsities: those of a file where one is named, whatever else is asked; else what the draws say.

    What is wrong with the draws is among the warnings.
    """
    if file:
        return Calibration.load(Path(file)).reused_for(list(asked["scores"]))
    found = calibrate_few_shot(*given, **asked)
    return dataclasses.replace(found, warnings=[*asked["draws"].warnings, *found.warnings])


def _doubted(calibration: Calibration, agreement: dict) -> Calibration:
    """The same, with a warning where two halves of the scored draw do not support it."""
    weak = agreement["said"] or verdict(agreement["spearman_brown"])
    if not weak:
        return calibration
    logger.warning("calibration: %s", weak)
    return dataclasses.replace(calibration, warnings=[*calibration.warnings, weak])


def _save_adapter(adapted: PeftModel, directory: Path) -> None:
    """Save the adapter so that its folder is there whole or not at all."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    adapted.save_pretrained(temporary, save_embedding_layers=False)
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)


if __name__ == "__main__":
    from partial_lora.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
