"""What a run asks of its few-shot draws, out of its settings, and what is made of the answer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from partial_lora import methods, tasks
from partial_lora.calibration.calibration import Calibration
from partial_lora.calibration.fewshot import calibrate_few_shot, importance_few_shot
from partial_lora.calibration.importance import OPTIONS
from partial_lora.calibration.peers import Peers, of_first
from partial_lora.calibration.reliability import verdict
from partial_lora.errors import PartialLoraError
from partial_lora.runs import loading
from partial_lora.runs.loading import named
from partial_lora.tasks import task

logger = logging.getLogger(__name__)


def importance(
    settings: dict,
    task: tasks.Task,
    transform: task.Transform,
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
        seed=loading.calibration_seed(settings),
        options=options,
        new_head=loading.has_new_head(settings["model"]),
        sizes=task.sizes,
    )


def asked(settings: dict, task: tasks.Task, scores: methods.Scores, draws: tasks.Draws, peers: Peers) -> dict:
    """What is asked of the few-shot draws (`calibrate_few_shot`)."""
    chosen, measure = settings["calibration"], settings["importance"]["name"]
    seed = loading.calibration_seed(settings)
    return {
        "seed": seed,
        "scores": scores,
        "draws": draws,
        "peers": peers,
        "rank": settings["method"]["rank"],
        "granularity": settings["mask"]["granularity"],
        "importance": {"seed": seed} | named(settings["importance"], "name", *OPTIONS[measure]),
        "architecture": named(settings["model"], "architecture", "model_args"),
        "new_head": loading.has_new_head(settings["model"]),
        "sizes": task.sizes,
        "drawn": loading.drawn_by(settings),
        "score": loading.calibration_score(settings, task),
        **named(settings["model"], "head", "blocks"),
        **named(chosen, "threshold", "budget", "levels", "max_sparsity", "search"),
        **named(chosen, "axes", "scope", "repair", "chance", "memory"),
    }


def calibration(file: str | None, given: tuple, asked: dict) -> Calibration:
    """The sparsities: those of a file where one is named, whatever else is asked; else what the draws say.

    What is wrong with the draws is among the warnings.
    """
    if file:
        return Calibration.load(Path(file)).reused_for(list(asked["scores"]))
    found = calibrate_few_shot(*given, **asked)
    return dataclasses.replace(found, warnings=[*asked["draws"].warnings, *found.warnings])


def before(file: Path, targets: Sequence[str], peers: Peers) -> Calibration | None:
    """What an earlier attempt of this run had found, which stands, at its cost; None where there is none.

    It is not found again, since on another device or processor a close call may end otherwise than it did there.
    """

    def read() -> Calibration | None:
        try:
            found = Calibration.load(file) if file.is_file() else None
        except PartialLoraError as error:
            logger.warning("%s; found again", error)
            return None
        return found if found and found.modules.keys() == set(targets) else None

    return of_first(peers, read)


def doubted(calibration: Calibration, agreement: dict) -> Calibration:
    """The same, with a warning where two halves of the scored draw do not support it."""
    weak = agreement["said"] or verdict(agreement["spearman_brown"])
    if not weak or weak in calibration.warnings:
        return calibration
    logger.warning("calibration: %s", weak)
    return dataclasses.replace(calibration, warnings=[*calibration.warnings, weak])
